"""A tiny model whose matrices have several blocks of 128 x 128 and ragged ones, and trees of it decoded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.params import Params, decoded
from pallas_kernels.quant import Scaled, dequantise
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS, Case

# kv_a_proj has 576 rows, kv_b_proj blocks across heads, and gate and up of an MLP 160 rows, so that the blocks of those that
# are joined do not line up.
_RAGGED = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 160,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 160,
}
RAGGED = Case(GLM_FIELDS | _RAGGED, "FSF", 6, (40, 23))
RAGGED_DEEPSEEK = Case(DEEPSEEK_FIELDS | _RAGGED, "FSF", 1, (40, 23))


# Heads of 128 numbers, so that a mesh that splits four heads or the hidden size over two devices splits between blocks.
ALIGNED = Case(
    GLM_FIELDS
    | {
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_head_dim": 96,
        "moe_intermediate_size": 160,
    },
    "FSF",
    3,
    (40, 40),
)


def decoded_tree(tree: Any) -> Any:
    """The tree with every `Scaled` as the float32 products [..., out, in]."""
    return jax.tree.map(
        lambda leaf: dequantise(leaf, jnp.float32) if isinstance(leaf, Scaled) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Scaled),
    )


@jax.jit
def decoded_params(params: Params, config: Config) -> Params:
    """Params in 8 bits as float32 ones."""

    def stack(p: Any) -> Any:
        return None if p is None else jax.vmap(lambda one: decoded(one, config, jnp.float32))(p)

    moe = decoded_tree(stack(params.moe))
    moe = dataclasses.replace(moe, gate_up=jnp.moveaxis(moe.gate_up, -1, 2), down=moe.down.swapaxes(2, 3))
    parts = {"attention": stack(params.attention), "indexer": stack(params.indexer), "dense": stack(params.dense), "moe": moe}
    return dataclasses.replace(params, **parts)


@jax.jit
def decoded_serving(weights: serving.Weights) -> serving.Weights:
    """Serving weights in 8 bits as float32 ones."""

    def layer(p: serving.Layer) -> serving.Layer:
        p = decoded_tree(p)
        if isinstance(p.mlp, serving.Dense):
            return p
        gate_up, down = jnp.moveaxis(p.mlp.gate_up, -1, 1), p.mlp.down.swapaxes(1, 2)
        return dataclasses.replace(p, mlp=dataclasses.replace(p.mlp, gate_up=gate_up, down=down))

    return dataclasses.replace(weights, layers=tuple(map(layer, weights.layers)))
