"""The reference attention_target in plain XLA: probabilities of a block of queries at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention_denominators.reference import masked_logits, rows_of_block
from pallas_kernels.blocks import map_queries


def attention_target(
    total: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    words: jax.Array,
    share: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The bits say all: positions only tell a kernel which keys it need not read."""

    def block(total: jax.Array, queries: jax.Array, lse: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = jnp.mean(jnp.exp(masked_logits(queries, keys, words, scale) - lse[..., None]), axis=1)
        return total + share * p, -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)

    given = total, queries, lse, words
    return map_queries(block, given, rows_of_block(queries, keys), axes=(1, 1, 2, 2))
