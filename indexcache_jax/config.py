"""Config: the shape of a DSA model (docs/model.md, Config fields).

One frozen, hashable value holds every fact that a program's shape depends on. It is registered static, so it is passed
through `jax.jit` as an ordinary argument, and a new one compiles a new program.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from indexcache_jax import arguments, config_json
from indexcache_jax.config_json import ARCHITECTURES, HF_NAMES, MAX_VALUES
from indexcache_jax.foreign import shown


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies, plain or stretched by yarn (docs/model.md, Rope).

    Raises ValueError, naming the config.json field and its value, for a type or number that yarn is not defined for.
    """

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
            raise ValueError(f"rope_parameters.rope_type: {shown(self.type)} is not supported, only 'default' and 'yarn'")
        hf_names = {"theta": "rope_theta", "original_max_position": "original_max_position_embeddings"}
        for own in dataclasses.fields(self):
            value = getattr(self, own.name)
            if own.type != "str" and not (value is None and "None" in str(own.type)) and not arguments.is_real(value):
                raise ValueError(f"rope_parameters.{hf_names.get(own.name, own.name)}: {shown(value)} is not a number")
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
            for field in ("mscale", "mscale_all_dim"):  # gains are divided by each other, and one may not be 0
                if (getattr(self, field) or 0) < 0:
                    raise ValueError(f"rope_parameters.{field}: {getattr(self, field)!r} is negative")

    def _gain(self, mscale: float) -> float:
        """Yarn's g(m) = 0.1 m ln(factor) + 1."""
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
        """What yarn multiplies the attention scale by: g(mscale_all_dim) squared, or 1 without that key."""
        return self._gain(self.mscale_all_dim) ** 2 if self.type != "default" and self.mscale_all_dim else 1.0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and constants of a DeepSeek-V3.2 or GLM-5 family model, named as in its config.json where they are there.

    latent_norm_eps is in no config.json. moe_layers says for every layer whether its MLP has routed experts.

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
    moe_layers: tuple[bool, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    index_rope_interleave: bool
    rope: Rope
    max_position_embeddings: int
    rms_norm_eps: float
    latent_norm_eps: float = 1e-6  # of q_a_layernorm and kv_a_layernorm: transformers fixes 1e-6 (docs/model.md, Norms)
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise ValueError(f"model_type: {shown(self.family)} is not one of {sorted(ARCHITECTURES)}")
        for field in dataclasses.fields(self):
            if field.type == "int":
                value, name = getattr(self, field.name), HF_NAMES.get(field.name, field.name)
                least = 0 if field.name in ("n_shared_experts", "num_nextn_predict_layers") else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ValueError(f"{name}: {shown(value)} is not an integer of at least {least}")
                if value > MAX_VALUES.get(field.name, value):
                    raise ValueError(f"{name}: {value} is above {MAX_VALUES[field.name]}")
            elif field.type == "float" and not arguments.is_real(value := getattr(self, field.name)):
                raise ValueError(f"{field.name}: {shown(value)} is not a number")
        if not isinstance(self.rope, Rope):
            raise ValueError(f"rope: {arguments.described(self.rope)} is not a Rope")
        if not self.rms_norm_eps >= 0:
            raise ValueError(f"rms_norm_eps: {self.rms_norm_eps!r} is negative")
        if self.rms_norm_eps > 1:  # beside it every hidden state would be 0, and all logits alike
            raise ValueError(f"rms_norm_eps: {self.rms_norm_eps!r} is above 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: {self.qk_rope_head_dim} is odd")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(f"index_head_dim: {self.index_head_dim} is below qk_rope_head_dim {self.qk_rope_head_dim}")
        if len(self.moe_layers) != self.num_layers:
            raise ValueError(f"mlp_layer_types: {len(self.moe_layers)} entries for {self.num_layers} layers")
        if self.n_routed_experts % self.n_group or self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"n_group: {self.n_routed_experts} experts cannot be divided into {self.n_group} equal groups of at least 2"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group: {self.topk_group} is above n_group {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} is above the {reachable} experts of the kept groups"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys: dn + dr."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached latent: C + dr (docs/model.md, Cache)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """What attention logits are multiplied by: (dn + dr)^-1/2, times yarn's gain (docs/model.md, Attention)."""
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
        """The shape that a config.json describes, given as its dict, its path or its directory.

        Raises ValueError that names the field at fault, or the file that cannot be read.
        """
        arguments = config_json.to_arguments(config_json.read_config_json(source))
        return cls(**(arguments | {"rope": Rope(**arguments["rope"])}))

    def to_hf(self) -> dict[str, Any]:
        """The config.json fields of this shape, without a schedule (Schedule.to_hf adds that)."""
        return config_json.to_fields(self)
