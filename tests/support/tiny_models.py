"""The tiny models that tests share: config.json fields of both families, seeded weights, and params made of them.

Weights are far from their initialisers on purpose (norms not 1, biases not 0), so that nothing that is left out goes
unseen. They come from NumPy's RandomState, whose stream never changes, so that a recorded result needs no stored
weights; every tensor has a stream of its own, so that two schedules of one model share all that both have.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax.config import Config
from indexcache_jax.params import Params, abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor, leaves

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 8,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": None,
}
GLM_FIELDS = _SHAPE | {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
DEEPSEEK_FIELDS = _SHAPE | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "n_group": 4,
    "topk_group": 2,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    },
}
# What the usual models leave at its default.
UNUSUAL = {
    "attention_bias": True,
    "mlp_layer_types": ["sparse", "dense", "sparse", "dense", "sparse"],
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-3,
    "routed_scaling_factor": 1.3,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a schedule and a right-padded batch. The seed is one where no choice is a near-tie (see the guard)."""

    fields: Mapping[str, Any]
    pattern: str
    seed: int
    lengths: tuple[int, ...] = (60, 60)

    @property
    def config(self) -> Config:
        return Config.from_hf(self.fields)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.pattern)

    @property
    def state(self) -> dict[str, np.ndarray]:
        return state(self.config, self.schedule, self.seed)

    @functools.cached_property
    def params(self) -> Params:
        return to_params(self.state, self.config, self.schedule)

    @property
    def tokens(self) -> np.ndarray:
        """[B, S]; what stands in the padding is as random as the rest."""
        shape = (len(self.lengths), max(self.lengths))
        return np.random.RandomState(self.seed).randint(0, self.fields["vocab_size"], shape).astype(np.int32)

    @property
    def is_valid(self) -> np.ndarray:
        """[B, S]: True where a token is not padding."""
        return np.arange(max(self.lengths)) < np.array(self.lengths)[:, None]


# Recorded from transformers in tests/fixtures.
RECORDED = {
    "glm-all-full": Case(GLM_FIELDS, "FFFFF", 0),
    "glm-mixed": Case(GLM_FIELDS, "FFSFS", 2),
    "glm-one-indexer": Case(GLM_FIELDS, "FSSSS", 0),
    "glm-fewer-tokens-than-k": Case(GLM_FIELDS, "FFSFS", 0, (6, 6)),
    "glm-ragged": Case(GLM_FIELDS, "FSFFS", 0, (60, 37, 5)),
    "glm-unusual": Case(GLM_FIELDS | UNUSUAL | {"n_group": 4, "topk_group": 3}, "FSFSF", 0, (33, 33)),
    "deepseek-all-full": Case(DEEPSEEK_FIELDS, "FFFFF", 1),
    "deepseek-ragged": Case(DEEPSEEK_FIELDS, "FFFFF", 1, (60, 37, 5)),
    "deepseek-unusual": Case(
        DEEPSEEK_FIELDS
        | UNUSUAL
        | {"rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 32}, "topk_group": 3},
        "FFFFF",
        1,
        (33, 33),
    ),
}
# No other program runs these: they are held against the float64 forward.
DEEPSEEK_SHARED = {
    "deepseek-mixed": Case(DEEPSEEK_FIELDS, "FFSFS", 0),
    "deepseek-one-indexer": Case(DEEPSEEK_FIELDS, "FSSSS", 0),
    "deepseek-mixed-ragged": Case(DEEPSEEK_FIELDS, "FSFSF", 0, (60, 37, 5)),
}
CASES = RECORDED | DEEPSEEK_SHARED


def checkpoint_shapes(config: Config, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such a model's checkpoint."""
    return {
        source.name.format(layer=layer): source.shape
        for _, tensor in leaves(abstract(config, schedule))
        for layer in tensor.layers or (None,)
        for source in tensor.sources
    }


def state(config: Config, schedule: Schedule, seed: int) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by name, float32: norms around 1, biases around 0, the rest of variance 1 / fan-in."""

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape)
        if name.endswith("norm.weight"):
            noise = 1 + 0.3 * noise
        elif len(shape) == 1:
            noise = 0.2 * noise
        elif name != "model.embed_tokens.weight" or config.tie_word_embeddings:
            noise = noise * shape[1] ** -0.5
        return noise.astype(np.float32)

    return {name: tensor(name, shape) for name, shape in checkpoint_shapes(config, schedule).items()}


def to_params(state: Mapping[str, np.ndarray], config: Config, schedule: Schedule, dtype: Any = jnp.float32) -> Params:
    """The params tree of a checkpoint held in memory."""

    def one(tensor: Tensor, layer: int | None) -> np.ndarray:
        out = np.empty(tensor.layer_shape, np.float32)
        for source in tensor.sources:
            out[source.at] = source.read(state[source.name.format(layer=layer)])
        return out

    def stack(tensor: Tensor) -> jax.Array:
        every = [one(tensor, layer) for layer in tensor.layers or (None,)]
        return jnp.asarray(every[0] if tensor.layers is None else np.stack(every), tensor.dtype or dtype)

    return jax.tree.map(stack, abstract(config, schedule))
