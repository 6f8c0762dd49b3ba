"""The reference attention_denominators in plain XLA: masked logits of a block of queries at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import bits
from pallas_kernels.blocks import block_rows, map_queries

LOGIT_BYTES = 512 * 2**20  # of one block's float32 logits


def masked_logits(queries: jax.Array, keys: jax.Array, words: jax.Array, scale: float) -> jax.Array:
    """[B, H, Q, T] float32, -inf where not selected."""
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    logits = jnp.einsum("bqhd,bthd->bhqt", queries, keys, preferred_element_type=jnp.float32, precision=precision) * scale
    return jnp.where(bits.unpack(words, keys.shape[1])[:, None], logits, -jnp.inf)


def rows_of_block(queries: jax.Array, keys: jax.Array) -> int:
    """Queries of a block."""
    b, s, h, _ = queries.shape
    return block_rows(s, 4 * b * h * keys.shape[1], LOGIT_BYTES)


def attention_denominators(
    queries: jax.Array, keys: jax.Array, words: jax.Array, *, scale: float, q_positions: jax.Array | None = None
) -> jax.Array:
    """The bits say all: positions only tell a kernel which keys it need not read."""

    def block(queries: jax.Array, words: jax.Array) -> jax.Array:
        found = jax.nn.logsumexp(masked_logits(queries, keys, words, scale), axis=-1)
        return jnp.where(jnp.isneginf(found), 0.0, found)

    return map_queries(block, (queries, words), rows_of_block(queries, keys), axes=(1, 2), out_axes=2)
