"""The reference selected_attention in plain XLA: masked logits of a block of queries at a time, recomputed backwards."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import bits
from pallas_kernels.blocks import block_rows, map_queries

LOGIT_BYTES = 512 * 2**20  # of one block's float32 logits


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, words: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """All queries at once: [B, S, H, V] in the dtype of values and [B, H, S] float32."""
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
    mask = bits.unpack(words, keys.shape[1])[:, None]
    logits = jnp.where(mask, product("bqhd,bthd->bhqt", queries, keys) * scale, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1.0, total)
    out = product("bhqt,bthv->bqhv", (weights / total).astype(values.dtype), values).astype(values.dtype)
    return out, jax.lax.stop_gradient((jnp.log(total) + top)[..., 0])


def selected_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The bits say all: positions only tell a kernel which keys it need not read."""
    b, s, h, _ = queries.shape
    block = jax.checkpoint(lambda q, w: attend(q, keys, values, w, scale=scale))
    rows = block_rows(s, 4 * b * h * keys.shape[1], LOGIT_BYTES)
    return map_queries(block, (queries, words), rows, axes=(1, 2), out_axes=(1, 2))
