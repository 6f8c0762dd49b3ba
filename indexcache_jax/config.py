"""Config: the shape of a DSA model, read from a Hugging Face config.json (SPEC.md 1).

One frozen, hashable value holds every fact that a program's shape depends on. It is registered static, so it
travels through `jax.jit` as an ordinary argument and a new one compiles a new program.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

GLM = "glm_moe_dsa"
DEEPSEEK = "deepseek_v32"
ARCHITECTURES = {GLM: "GlmMoeDsaForCausalLM", DEEPSEEK: "DeepseekV32ForCausalLM"}
# Far above any model's, so that lists of layers and experts, which are made before a weight is seen, stay short.
MOST = {"num_layers": 10_000, "n_routed_experts": 100_000}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies: plain, or stretched by yarn (SPEC.md 2.1)."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    original_max_position: int = 4096

    def __post_init__(self) -> None:
        if self.type not in ("default", "yarn"):
            raise ValueError(f"rope_parameters.rope_type: {self.type!r} is not supported, only 'default' and 'yarn'")
        if not self.theta > 0:
            raise ValueError(f"rope_parameters.rope_theta: {self.theta!r} is not positive")
        if self.type == "yarn" and not self.factor >= 1:
            raise ValueError(f"rope_parameters.factor: {self.factor!r} is below 1")
        if self.type == "yarn":  # its frequencies take these numbers' logarithms and divide by them
            for field, value, above in (
                ("rope_theta", self.theta, 1),
                ("beta_fast", self.beta_fast, 0),
                ("beta_slow", self.beta_slow, 0),
                ("original_max_position_embeddings", self.original_max_position, 0),
            ):
                if not value > above:
                    raise ValueError(f"rope_parameters.{field}: {value!r} is not above {above}")

    def _gain(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: g(mscale) / g(mscale_all_dim), or g(1) without both keys."""
        if self.type == "default":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._gain(self.mscale) / self._gain(self.mscale_all_dim)
        return self._gain(1.0)

    @property
    def softmax_gain(self) -> float:
        """What yarn multiplies the attention scale by: g(mscale_all_dim) squared."""
        return self._gain(self.mscale_all_dim) ** 2 if self.type != "default" and self.mscale_all_dim else 1.0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and constants of a DeepSeek-V3.2 or GLM-5 family model.

    Raises ValueError, naming the config.json field and its value, where the values contradict each other.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    moe_layers: tuple[bool, ...]  # True where layer i has routed experts, False where its MLP is dense
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    index_rope_interleave: bool
    rope: Rope
    max_position_embeddings: int
    rms_norm_eps: float
    latent_norm_eps: float = 1e-6  # of q_a_layernorm and kv_a_layernorm: transformers fixes 1e-6 (SPEC.md 2)
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise ValueError(f"model_type: {self.family!r} is not one of {sorted(ARCHITECTURES)}")
        for field in dataclasses.fields(self):
            if field.type == "int":
                value = getattr(self, field.name)
                least = 0 if field.name in ("n_shared_experts", "num_nextn_predict_layers") else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ValueError(
                        f"{_HF_NAMES.get(field.name, field.name)}: {value!r} is not an integer of at least {least}"
                    )
                if value > MOST.get(field.name, value):
                    raise ValueError(f"{_HF_NAMES.get(field.name, field.name)}: {value} is above {MOST[field.name]}")
        if not self.rms_norm_eps >= 0:
            raise ValueError(f"rms_norm_eps: {self.rms_norm_eps!r} is negative")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: {self.qk_rope_head_dim} is odd")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(f"index_head_dim: {self.index_head_dim} is below qk_rope_head_dim {self.qk_rope_head_dim}")
        if len(self.moe_layers) != self.num_layers:
            raise ValueError(f"mlp_layer_types: {len(self.moe_layers)} entries for {self.num_layers} layers")
        if self.n_routed_experts % self.n_group or self.n_routed_experts // self.n_group < 2:
            raise ValueError(f"n_group: {self.n_group} does not cut {self.n_routed_experts} experts into groups of at least 2")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group: {self.topk_group} is above n_group {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} is above the {reachable} experts of the kept groups"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached latent: C + dr."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        return self.qk_head_dim**-0.5 * self.rope.softmax_gain

    @property
    def index_scale(self) -> float:
        """What a sum over index heads of relu(q . k) is multiplied by: Hi^-1/2 Di^-1/2 (docs/model.md, Indexer)."""
        return self.index_n_heads**-0.5 * self.index_head_dim**-0.5

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers with one dense MLP."""
        return tuple(layer for layer, experts in enumerate(self.moe_layers) if not experts)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers with routed experts."""
        return tuple(layer for layer, experts in enumerate(self.moe_layers) if experts)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | pathlib.Path) -> Config:
        """Reads a config.json: its dict, its path, or its directory. ValueError names the field at fault."""
        fields = read_config_json(source)
        family = _family(fields)
        glm = family == GLM

        def get(name: str, default: Any = None) -> Any:
            value = fields.get(name)  # null means absent
            if value is None:
                value = default
            if value is None:
                raise ValueError(f"{name}: missing from the config")
            return value

        def flag(name: str, default: bool) -> bool:
            value = get(name, default)
            if not isinstance(value, bool):  # "false", as a string, would count as true
                raise ValueError(f"{name}: {value!r} is neither true nor false")
            return value

        def optional_int(name: str) -> int | None:
            value = fields.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}: {value!r} is not an integer")
            return value

        num_layers = get("num_hidden_layers")
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_hidden_layers: {num_layers!r} is not an integer of at least 1")
        if num_layers > MOST["num_layers"]:  # before a list as long is made
            raise ValueError(f"num_hidden_layers: {num_layers} is above {MOST['num_layers']}")
        heads = get("num_attention_heads")
        if (pairs := get("num_key_value_heads", heads)) != heads:
            raise ValueError(f"num_key_value_heads: {pairs!r} differs from num_attention_heads {heads!r}")
        if get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act: {fields['hidden_act']!r} is not supported, only 'silu'")
        if get("scoring_func", "sigmoid") != "sigmoid":
            raise ValueError(f"scoring_func: {fields['scoring_func']!r} is not supported, only 'sigmoid'")
        if get("topk_method", "noaux_tc") != "noaux_tc":
            raise ValueError(f"topk_method: {fields['topk_method']!r} is not supported, only 'noaux_tc'")
        eos = fields.get("eos_token_id")
        eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in eos):
            raise ValueError(f"eos_token_id: {fields['eos_token_id']!r} is not an integer or a list of them")
        return cls(
            family=family,
            vocab_size=get("vocab_size"),
            hidden_size=get("hidden_size"),
            intermediate_size=get("intermediate_size"),
            moe_intermediate_size=get("moe_intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            q_lora_rank=get("q_lora_rank"),
            kv_lora_rank=get("kv_lora_rank"),
            qk_nope_head_dim=get("qk_nope_head_dim"),
            qk_rope_head_dim=get("qk_rope_head_dim"),
            v_head_dim=get("v_head_dim"),
            n_routed_experts=get("n_routed_experts") if fields.get("num_experts") is None else get("num_experts"),
            n_shared_experts=get("n_shared_experts", 1),
            num_experts_per_tok=get("num_experts_per_tok", 8),
            n_group=get("n_group", 1 if glm else 8),
            topk_group=get("topk_group", 1 if glm else 4),
            routed_scaling_factor=_number("routed_scaling_factor", get("routed_scaling_factor", 2.5)),
            norm_topk_prob=flag("norm_topk_prob", True),
            moe_layers=_moe_layers(fields, num_layers),
            index_n_heads=get("index_n_heads", 32 if glm else 64),
            index_head_dim=get("index_head_dim", 128),
            index_topk=get("index_topk", 2048),
            index_rope_interleave=flag("indexer_rope_interleave", glm),
            rope=_rope(fields),
            max_position_embeddings=get("max_position_embeddings", 202752 if glm else 163840),
            rms_norm_eps=_number("rms_norm_eps", get("rms_norm_eps", 1e-5 if glm else 1e-6)),
            attention_bias=flag("attention_bias", False),
            tie_word_embeddings=flag("tie_word_embeddings", False),
            initializer_range=_number("initializer_range", get("initializer_range", 0.02)),
            bos_token_id=optional_int("bos_token_id"),
            eos_token_ids=eos,
            pad_token_id=optional_int("pad_token_id"),
            num_nextn_predict_layers=get("num_nextn_predict_layers", 0),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json fields of this shape, without a schedule (Schedule.to_hf adds that)."""
        rope: dict[str, Any] = {"rope_theta": self.rope.theta, "rope_type": self.rope.type}
        if self.rope.type == "yarn":
            rope |= {
                "factor": self.rope.factor,
                "beta_fast": self.rope.beta_fast,
                "beta_slow": self.rope.beta_slow,
                "original_max_position_embeddings": self.rope.original_max_position,
            }
            rope |= {n: v for n in ("mscale", "mscale_all_dim") if (v := getattr(self.rope, n)) is not None}
        eos = self.eos_token_ids
        return {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "qk_head_dim": self.qk_head_dim,
            "v_head_dim": self.v_head_dim,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": self.n_shared_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "routed_scaling_factor": self.routed_scaling_factor,
            "norm_topk_prob": self.norm_topk_prob,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "first_k_dense_replace": next((i for i, moe in enumerate(self.moe_layers) if moe), self.num_layers),
            "mlp_layer_types": ["sparse" if moe else "dense" for moe in self.moe_layers],
            "index_n_heads": self.index_n_heads,
            "index_head_dim": self.index_head_dim,
            "index_topk": self.index_topk,
            "indexer_rope_interleave": self.index_rope_interleave,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
            "pad_token_id": self.pad_token_id,
            "num_nextn_predict_layers": self.num_nextn_predict_layers,
            "use_cache": True,
        }


_HF_NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}


def read_config_json(source: Mapping[str, Any] | str | pathlib.Path) -> dict[str, Any]:
    """The fields of a config.json, given as a dict, a file or a directory; ValueError names the file."""
    if isinstance(source, Mapping):
        return dict(source)
    path = pathlib.Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint directory holds a config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds {type(fields).__name__}, not an object")
    return fields


def _family(fields: Mapping[str, Any]) -> str:
    architectures = fields.get("architectures") or []
    model_type = fields.get("model_type")
    if not isinstance(architectures, (list, tuple)):
        raise ValueError(f"architectures: {architectures!r} is not a list")
    if architectures:
        for family, architecture in ARCHITECTURES.items():
            if architecture in architectures:
                return family
        raise ValueError(f"architectures: {architectures!r} is not supported, only {sorted(ARCHITECTURES.values())}")
    if model_type in ARCHITECTURES:
        return str(model_type)
    raise ValueError(f"model_type: {model_type!r} is not supported, only {sorted(ARCHITECTURES)}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: {value!r} is not a number")
    if not abs(value) <= sys.float_info.max:  # NaN too; json reads NaN, Infinity and integers of any length
        raise ValueError(f"{name}: {value!r} is not finite")
    return float(value)


def _moe_layers(fields: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """mlp_layer_types wins over first_k_dense_replace (SPEC.md 1.2)."""
    types = fields.get("mlp_layer_types")
    if types is None:
        first = fields.get("first_k_dense_replace")
        first = 3 if first is None else first
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"first_k_dense_replace: {first!r} is not a non-negative integer")
        return tuple(i >= first for i in range(num_layers))
    if not isinstance(types, (list, tuple)) or len(types) != num_layers:
        raise ValueError(f"mlp_layer_types: {types!r} is not a list of {num_layers} entries")
    for entry in types:
        if entry not in ("dense", "sparse"):
            raise ValueError(f"mlp_layer_types: {entry!r} is neither 'dense' nor 'sparse'")
    return tuple(entry == "sparse" for entry in types)


def _rope(fields: Mapping[str, Any]) -> Rope:
    """A non-null rope_scaling replaces rope_parameters; top-level rope_theta only fills a gap (SPEC.md 1.2)."""
    name = "rope_scaling" if fields.get("rope_scaling") is not None else "rope_parameters"
    given = fields.get(name)
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: {given!r} is not an object")

    def number(key: str, default: float) -> float:
        return default if given.get(key) is None else _number(f"{name}.{key}", given[key])

    def optional(key: str) -> float | None:
        return None if given.get(key) is None else _number(f"{name}.{key}", given[key])

    for key, only in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        if given.get(key) not in (None, only):
            raise ValueError(f"{name}.{key}: {given[key]!r} is not supported")
    top_theta = fields.get("rope_theta")
    theta = number("rope_theta", 10000.0 if top_theta is None else _number("rope_theta", top_theta))
    rope_type = given.get("rope_type") or given.get("type") or "default"
    if rope_type != "yarn":
        return Rope(theta=theta, type=rope_type)
    longest = fields.get("max_position_embeddings")
    longest = None if longest is None else _number("max_position_embeddings", longest)
    original = number("original_max_position_embeddings", longest or 4096.0)
    if original < 1:
        raise ValueError(f"{name}.original_max_position_embeddings: {original!r} is below 1")
    return Rope(
        theta=theta,
        type=rope_type,
        factor=number("factor", longest / original if longest else 1.0),
        beta_fast=number("beta_fast", 0.0) or 32.0,
        beta_slow=number("beta_slow", 0.0) or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        original_max_position=int(original),
    )


_GLM_5: dict[str, Any] = {
    "architectures": [ARCHITECTURES[GLM]],
    "model_type": GLM,
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
}

# The shapes as shipped (SPEC.md 1.1). "30b" is GLM-4.7-Flash with an indexer of our choosing: the paper's own
# 30B checkpoint is not public.
PRESETS: dict[str, dict[str, Any]] = {
    "glm-5": _GLM_5,
    "glm-5.2": _GLM_5
    | {
        "rope_parameters": {"rope_theta": 8000000.0, "rope_type": "default"},
        "max_position_embeddings": 1048576,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
    },
    "deepseek-v3.2": {
        "architectures": [ARCHITECTURES[DEEPSEEK]],
        "model_type": DEEPSEEK,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "30b": _GLM_5
    | {
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "q_lora_rank": 768,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
    },
}


def preset(name: str) -> dict[str, Any]:
    """The config.json fields of a known model, for Config.from_hf and Schedule.from_hf."""
    if name not in PRESETS:
        raise ValueError(f"preset: {name!r} is not one of {sorted(PRESETS)}")
    return copy.deepcopy(PRESETS[name])
