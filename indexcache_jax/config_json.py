"""config.json: reading a model's shape from Hugging Face's fields, and writing it (docs/model.md, Config fields).

A field that is null counts as absent. Defaults are those of transformers' config class of the family.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from indexcache_jax import arguments
from indexcache_jax.foreign import escaped, is_there, read_json, shown

if TYPE_CHECKING:
    from indexcache_jax.config import Config

GLM = "glm_moe_dsa"
DEEPSEEK = "deepseek_v32"
ARCHITECTURES = {GLM: "GlmMoeDsaForCausalLM", DEEPSEEK: "DeepseekV32ForCausalLM"}
# Model types that a reader may take for these.
OTHERS = {
    "glm5_next": "GLM-5.3-Flash (glm5_next) is another architecture than GLM-5, 5.1, 5.2 and 5.3 (glm_moe_dsa)",
    "deepseek_v3": "DeepSeek-V3 (deepseek_v3) has no indexers; DeepSeek-V3.2 (deepseek_v32) has",
}
HF_NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}  # where Config's names differ
# Far above any model's, so that lists of layers and experts, which are made before a weight is seen, stay short.
MAX_VALUES = {"num_layers": 10_000, "n_routed_experts": 100_000}


def read_config_json(source: Mapping[str, Any] | str | pathlib.Path) -> dict[str, Any]:
    """The fields of a JSON file, given as a dict, the file, or the directory whose config.json it is.

    Raises ValueError that names a file which is missing or does not hold a JSON object.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = arguments.path("config.json", source)
    if path.is_dir():
        path = path / "config.json"
    if not is_there(path):
        raise ValueError(f"{path}: no such file; a checkpoint directory holds a config.json")
    return read_json(path)


def to_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `config.Config` that a config.json's fields give; "rope" holds those of `config.Rope`.

    Raises ValueError that names a field which is missing, of another type, or asks for something unsupported.
    """
    family = _family(fields)
    glm = family == GLM
    reader = _Reader(fields)
    get, number, flag = reader.get, reader.number, reader.flag
    num_layers = reader.num_layers()
    heads = get("num_attention_heads")
    if (key_value_heads := get("num_key_value_heads", heads)) != heads:
        raise ValueError(f"num_key_value_heads: {shown(key_value_heads)} differs from num_attention_heads {shown(heads)}")
    for name, supported in (("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (value := get(name, supported)) != supported:
            raise ValueError(f"{name}: {shown(value)} is not supported, only {supported!r}")
    longest = get("max_position_embeddings", 202752 if glm else 163840)
    return {
        "family": family,
        "vocab_size": get("vocab_size"),
        "hidden_size": get("hidden_size"),
        "intermediate_size": get("intermediate_size"),
        "moe_intermediate_size": get("moe_intermediate_size"),
        "num_layers": num_layers,
        "num_heads": heads,
        "q_lora_rank": get("q_lora_rank"),
        "kv_lora_rank": get("kv_lora_rank"),
        "qk_nope_head_dim": get("qk_nope_head_dim"),
        "qk_rope_head_dim": get("qk_rope_head_dim"),
        "v_head_dim": get("v_head_dim"),
        "n_routed_experts": get("n_routed_experts") if fields.get("num_experts") is None else get("num_experts"),
        "n_shared_experts": get("n_shared_experts", 1),
        "num_experts_per_tok": get("num_experts_per_tok", 8),
        "n_group": get("n_group", 1 if glm else 8),
        "topk_group": get("topk_group", 1 if glm else 4),
        "routed_scaling_factor": number("routed_scaling_factor", 2.5),
        "norm_topk_prob": flag("norm_topk_prob", True),
        "moe_layers": _moe_layers(fields, num_layers),
        "index_n_heads": get("index_n_heads", 32 if glm else 64),
        "index_head_dim": get("index_head_dim", 128),
        "index_topk": get("index_topk", 2048),
        "index_rope_interleave": flag("indexer_rope_interleave", glm),
        "rope": _rope(fields, _number("max_position_embeddings", longest)),
        "max_position_embeddings": longest,
        "rms_norm_eps": number("rms_norm_eps", 1e-5 if glm else 1e-6),
        "attention_bias": flag("attention_bias", False),
        "tie_word_embeddings": flag("tie_word_embeddings", False),
        "initializer_range": number("initializer_range", 0.02),
        "bos_token_id": reader.optional_integer("bos_token_id"),
        "eos_token_ids": token_ids("eos_token_id", fields.get("eos_token_id")),
        "pad_token_id": reader.optional_integer("pad_token_id"),
        "num_nextn_predict_layers": get("num_nextn_predict_layers", 0),
    }


def to_fields(config: Config) -> dict[str, Any]:
    """The config.json fields of a model's shape, without a schedule (Schedule.to_hf adds that)."""
    rope: dict[str, Any] = {"rope_theta": config.rope.theta, "rope_type": config.rope.type}
    if config.rope.type == "yarn":
        rope |= {
            "factor": config.rope.factor,
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "original_max_position_embeddings": config.rope.original_max_position,
        }
        rope |= {n: v for n in ("mscale", "mscale_all_dim") if (v := getattr(config.rope, n)) is not None}
    eos = config.eos_token_ids
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "qk_head_dim": config.qk_head_dim,
        "v_head_dim": config.v_head_dim,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "routed_scaling_factor": config.routed_scaling_factor,
        "norm_topk_prob": config.norm_topk_prob,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": next((i for i, moe in enumerate(config.moe_layers) if moe), config.num_layers),
        "mlp_layer_types": ["sparse" if moe else "dense" for moe in config.moe_layers],
        "index_n_heads": config.index_n_heads,
        "index_head_dim": config.index_head_dim,
        "index_topk": config.index_topk,
        "indexer_rope_interleave": config.index_rope_interleave,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": config.pad_token_id,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "use_cache": True,
    }


class _Reader:
    """Fields of a config.json by name, with a default for those that are absent. ValueError names the field."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, of whatever type; ValueError where it is absent and has no default."""
        value = self._fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{name}: missing from the config")
        return value

    def number(self, name: str, default: float) -> float:
        return _number(name, self.get(name, default))

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):  # "false", as a string, would count as true
            raise ValueError(f"{name}: {shown(value)} is neither true nor false")
        return value

    def optional_integer(self, name: str) -> int | None:
        value = self._fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name}: {shown(value)} is not an integer")
        return value

    def num_layers(self) -> int:
        value = self.get("num_hidden_layers")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"num_hidden_layers: {shown(value)} is not an integer of at least 1")
        if value > MAX_VALUES["num_layers"]:  # before a list as long is made
            raise ValueError(f"num_hidden_layers: {value} is above {MAX_VALUES['num_layers']}")
        return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """The tokens that a field holds: one, a list of them, or None. ValueError that names it for anything else."""
    tokens = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ValueError(f"{name}: {shown(value)} is not an integer or a list of them")
    return tokens


def _family(fields: Mapping[str, Any]) -> str:
    """The model type that `architectures`, else `model_type`, names."""
    architectures = fields.get("architectures") or []
    model_type = fields.get("model_type")
    if not isinstance(architectures, (list, tuple)):
        raise ValueError(f"architectures: {shown(architectures)} is not a list")
    if model_type is not None and not isinstance(model_type, str):
        raise ValueError(f"model_type: {shown(model_type)} is not a string")
    for family, architecture in ARCHITECTURES.items():
        if architecture in architectures:
            return family
    if not architectures and model_type in ARCHITECTURES:
        return str(model_type)
    field, value = ("architectures", architectures) if architectures else ("model_type", model_type)
    if model_type in OTHERS or any(isinstance(a, str) and a.startswith("Glm5Next") for a in architectures):
        what = OTHERS.get(model_type or "", OTHERS["glm5_next"])
        raise ValueError(f"{field}: {shown(value)} is not supported: {what}")
    supported = sorted(ARCHITECTURES.values() if architectures else ARCHITECTURES)
    raise ValueError(f"{field}: {shown(value)} is not supported, only {supported}")


def _number(name: str, value: Any) -> float:
    """The value as a float. ValueError, naming it, unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: {shown(value)} is not a number")
    if not abs(value) <= sys.float_info.max:  # NaN too; json reads NaN, Infinity and integers of any length
        raise ValueError(f"{name}: {shown(value)} is not finite")
    return float(value)


def _moe_layers(fields: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """For each layer, whether it has routed experts: by mlp_layer_types, else first_k_dense_replace.

    docs/model.md, Config fields.
    """
    types = fields.get("mlp_layer_types")
    if types is None:
        first = fields.get("first_k_dense_replace")
        first = 3 if first is None else first
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"first_k_dense_replace: {shown(first)} is not a non-negative integer")
        return tuple(i >= first for i in range(num_layers))
    if not isinstance(types, (list, tuple)) or len(types) != num_layers:
        raise ValueError(f"mlp_layer_types: {shown(types)} is not a list of {num_layers} entries")
    for entry in types:
        if entry not in ("dense", "sparse"):
            raise ValueError(f"mlp_layer_types: {shown(entry)} is neither 'dense' nor 'sparse'")
    return tuple(entry == "sparse" for entry in types)


# What an object of rotary settings may hold, by rope_type; "type" is rope_type's old name.
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_YARN_KEYS = {
    *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("original_max_position_embeddings", "truncate"),
}
# The same of config.json itself, and what only has a meaning beside it.
_ROTARY = re.compile(r"(^|_)(m?rope|rotary|yarn)(_|$)")
_TOP_LEVEL = {"rope_theta", "rope_scaling", "rope_parameters", "rope_interleave", "indexer_rope_interleave", "qk_rope_head_dim"}


def _check_rotary_fields(fields: Mapping[str, Any], name: str, values: Mapping[str, Any], rope_type: Any) -> None:
    """ValueError for a rotary setting, of config.json or of its object `name`, that would count for nothing."""
    for key, value in fields.items():
        if value is not None and _ROTARY.search(key) and key not in {*_TOP_LEVEL, "partial_rotary_factor"}:
            raise ValueError(f"{escaped(key)}: {shown(value)} is a rotary setting that is not understood")
    if fields.get("rope_interleave") not in (None, True):
        raise ValueError(f"rope_interleave: {shown(fields['rope_interleave'])} is not supported, only true")
    for where, of in (("", fields), (f"{name}.", values)):
        if of.get("partial_rotary_factor") not in (None, 1.0):
            raise ValueError(f"{where}partial_rotary_factor: {shown(of['partial_rotary_factor'])} is not supported")
    for key, value in values.items():
        if value is None or key in _ROPE_KEYS:
            continue
        at = f"{name}.{escaped(key)}: {shown(value)}"
        if isinstance(value, Mapping):
            raise ValueError(f"{at} is an object in {name}; rotary settings are read from {name} itself, for all layers")
        if key not in _YARN_KEYS:
            raise ValueError(f"{at} is not understood, only {', '.join(sorted(_ROPE_KEYS | _YARN_KEYS))}")
        if rope_type == "default" and value != 1 and value is not True:  # a factor of 1 stretches nothing
            raise ValueError(f"{at} has no meaning for rope_type 'default'")
    if values.get("attention_factor") is not None:
        raise ValueError(f"{name}.attention_factor: {shown(values['attention_factor'])} is not supported")
    if rope_type == "yarn" and values.get("truncate", True) is not True:  # null too, which transformers takes for false
        raise ValueError(f"{name}.truncate: {shown(values['truncate'])} is not supported, only true")


def _rope(fields: Mapping[str, Any], longest: float) -> dict[str, Any]:
    """The arguments of `config.Rope`, as transformers reads them: of rope_scaling, else rope_parameters (docs/model.md, Rope).

    A top-level rope_theta fills a missing key; a top-level original_max_position_embeddings replaces yarn's own. longest:
    max_position_embeddings. ValueError, naming the field, for a setting that is not understood.
    """
    name = "rope_scaling" if fields.get("rope_scaling") not in (None, {}) else "rope_parameters"
    values = fields.get(name)
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: {shown(values)} is not an object")
    rope_type = values.get("rope_type") or values.get("type") or "default"
    _check_rotary_fields(fields, name, values, rope_type)

    def number(key: str, default: float) -> float:
        return default if values.get(key) is None else _number(f"{name}.{key}", values[key])

    def optional(key: str) -> float | None:
        return None if values.get(key) is None else _number(f"{name}.{key}", values[key])

    top_theta = fields.get("rope_theta")
    theta = number("rope_theta", 10000.0 if top_theta is None else _number("rope_theta", top_theta))
    if rope_type != "yarn":
        return {"theta": theta, "type": rope_type}
    field = "original_max_position_embeddings"
    of, where = (values, f"{name}.{field}") if fields.get(field) is None else (fields, field)
    original = longest if of.get(field) is None else _number(where, of[field])
    if original < 1:
        raise ValueError(f"{where}: {original!r} is below 1")
    return {
        "theta": theta,
        "type": rope_type,
        "factor": number("factor", longest / original),
        "beta_fast": number("beta_fast", 0.0) or 32.0,
        "beta_slow": number("beta_slow", 0.0) or 1.0,
        "mscale": optional("mscale"),
        "mscale_all_dim": optional("mscale_all_dim"),
        "original_max_position": int(original),
    }
