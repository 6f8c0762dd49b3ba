"""The reference index_divergence in plain XLA: a block of queries at a time, recomputed in the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.selected_attention import bits

SCORE_BYTES = 512 * 2**20  # of one block's float32 logits, all attention and index heads


def diverge(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    words: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """All queries at once, summed."""
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
    mask = bits.mask(words, keys.shape[1])
    logits = product("bqhd,bthd->bhqt", queries, keys) * scale - lse[..., None]
    target = jax.lax.stop_gradient(jnp.mean(jnp.exp(jnp.where(mask[:, None], logits, -jnp.inf)), axis=1))
    dots = jax.nn.relu(product("bqhd,btd->bhqt", index_queries, index_keys))
    scores = product("bhqt,bqh->bqt", dots, head_weights.astype(jnp.float32))
    some = jnp.any(mask, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, jnp.where(some, -jnp.inf, 0.0)), axis=-1)
    return jnp.sum(jax.scipy.special.xlogy(target, target) - target * jnp.where(mask, log_q, 0.0))


def index_divergence(*arrays: jax.Array, scale: float) -> jax.Array:
    index_queries, index_keys, head_weights, queries, keys, lse, words = arrays
    b, s, h, _ = queries.shape
    row = 4 * b * keys.shape[1] * (h + index_queries.shape[2])
    blocks = min(s, -(-row * s // SCORE_BYTES))
    rows = -(-s // blocks)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.pad(x, [(0, blocks * rows - s if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], blocks, rows, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def block(iq: jax.Array, w: jax.Array, q: jax.Array, lse: jax.Array, words: jax.Array) -> jax.Array:
        return diverge(iq, index_keys, w, q, keys, lse, words, scale=scale)

    blocked = cut(index_queries, 1), cut(head_weights, 1), cut(queries, 1), cut(lse, 2), cut(words, 2)
    return jnp.sum(jax.lax.map(lambda xs: block(*xs), blocked))
