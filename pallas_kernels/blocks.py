"""Running a function over blocks of queries, so that what it makes per query exists for one block at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def map_queries(function: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], rows: int) -> jax.Array:
    """`function(*inputs)` over blocks of `rows` of axis 1 of every [B, S, ...] input, one block after the other.

    The last block is padded with zeros and what the function makes of them is dropped.
    """
    s = inputs[0].shape[1]
    blocks = -(-s // rows)
    if blocks == 1:
        return function(*inputs)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * rows - s)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], blocks, rows, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda block: function(*block), tuple(cut(x) for x in inputs)).swapaxes(0, 1)
    return out.reshape(out.shape[0], blocks * rows, *out.shape[3:])[:, :s]
