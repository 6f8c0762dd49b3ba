"""The reference index_cross_entropy in plain XLA: a block of queries at a time, recomputed in the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import bits
from pallas_kernels.blocks import block_rows, split

LOGIT_BYTES = 512 * 2**20  # of one block's float32 logits of all index heads


def index_scores(index_queries: jax.Array, index_keys: jax.Array, head_weights: jax.Array) -> jax.Array:
    """I [B, Q, T] float32 of all queries at once."""
    precision = jax.lax.Precision.HIGHEST if index_queries.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
    dots = jax.nn.relu(product("bqhd,btd->bhqt", index_queries, index_keys))
    return product("bhqt,bqh->bqt", dots, head_weights.astype(jnp.float32))


def cross_entropy(
    index_queries: jax.Array, index_keys: jax.Array, head_weights: jax.Array, target: jax.Array, words: jax.Array
) -> jax.Array:
    """All queries at once, summed."""
    mask = bits.unpack(words, index_keys.shape[1])
    scores = index_scores(index_queries, index_keys, head_weights)
    some = jnp.any(mask, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, jnp.where(some, -jnp.inf, 0.0)), axis=-1)
    return -jnp.sum(target.astype(jnp.float32) * jnp.where(mask, log_q, 0.0))


def index_cross_entropy(*arrays: jax.Array, q_positions: jax.Array | None = None) -> jax.Array:
    """The bits say all: positions only tell a kernel which keys it need not read."""
    index_queries, index_keys, head_weights, target, words = arrays
    b, s, h, _ = index_queries.shape
    rows = block_rows(s, 4 * b * index_keys.shape[1] * (h + 1), LOGIT_BYTES)

    @jax.checkpoint
    def block(iq: jax.Array, w: jax.Array, target: jax.Array, words: jax.Array) -> jax.Array:
        return cross_entropy(iq, index_keys, w, target, words)

    per_query = (index_queries, 1), (head_weights, 1), (target, 1), (words, 2)
    # A padded query selects nothing, so it misses nothing.
    return jnp.sum(jax.lax.map(lambda xs: block(*xs), tuple(split(x, rows, axis) for x, axis in per_query)))
