"""The reference index_divergence in plain XLA: a block of queries at a time, recomputed in the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import bits
from pallas_kernels.blocks import block_rows, split

LOGIT_BYTES = 512 * 2**20  # of one block's float32 logits, all attention and index heads


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
    mask = bits.unpack(words, keys.shape[1])
    logits = product("bqhd,bthd->bhqt", queries, keys) * scale - lse[..., None]
    target = jax.lax.stop_gradient(jnp.mean(jnp.exp(jnp.where(mask[:, None], logits, -jnp.inf)), axis=1))
    dots = jax.nn.relu(product("bqhd,btd->bhqt", index_queries, index_keys))
    scores = product("bhqt,bqh->bqt", dots, head_weights.astype(jnp.float32))
    some = jnp.any(mask, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, jnp.where(some, -jnp.inf, 0.0)), axis=-1)
    return jnp.sum(jax.scipy.special.xlogy(target, target) - target * jnp.where(mask, log_q, 0.0))


def index_divergence(*arrays: jax.Array, scale: float, q_positions: jax.Array | None = None) -> jax.Array:
    """The bits say all: positions only tell a kernel which keys it need not read."""
    index_queries, index_keys, head_weights, queries, keys, lse, words = arrays
    b, s, h, _ = queries.shape
    rows = block_rows(s, 4 * b * keys.shape[1] * (h + index_queries.shape[2]), LOGIT_BYTES)

    @jax.checkpoint
    def block(iq: jax.Array, w: jax.Array, q: jax.Array, lse: jax.Array, words: jax.Array) -> jax.Array:
        return diverge(iq, index_keys, w, q, keys, lse, words, scale=scale)

    per_query = (index_queries, 1), (head_weights, 1), (queries, 1), (lse, 2), (words, 2)
    # A padded query selects nothing, so its divergence is zero.
    return jnp.sum(jax.lax.map(lambda xs: block(*xs), tuple(split(x, rows, axis) for x, axis in per_query)))
