"""Running a function over blocks of queries, so that what it computes per query exists for one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def block_rows(queries: int, bytes_per_query: int, budget: int) -> int:
    """Queries of a block, so that every block needs at most `budget` bytes and all blocks but the last are equal."""
    blocks = min(queries, -(-queries * bytes_per_query // budget))
    return -(-queries // blocks)


def split(x: jax.Array, rows: int, axis: int = 1, fill: int = 0) -> jax.Array:
    """[..., S, ...] with S at `axis` -> [blocks, ..., rows, ...]; the last block is padded with `fill`."""
    s = x.shape[axis]
    blocks = -(-s // rows)
    x = jnp.pad(x, [(0, blocks * rows - s if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, rows, *x.shape[axis + 1 :]), axis, 0)


def merge(x: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """What `split` does, undone: [blocks, ..., rows, ...] -> [..., size, ...]."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return x[(slice(None),) * axis + (slice(size),)]


def map_queries(function: Callable[..., Any], inputs: tuple[Any, ...], rows: int, axes: Any = 1, out_axes: Any = 1) -> Any:
    """`function(*inputs)` over blocks of `rows` queries, one block after the other.

    Args:
      function: of arrays with `rows` queries instead of S; returns an array or a tree of arrays with as many queries.
      inputs: trees of arrays with S queries. The last block is padded with zeros, of which the results are dropped.
      axes: where the queries lie in `inputs`: one axis for all arrays, or a tree of axes of which `inputs` is an extension.
      out_axes: the same for the results.

    Returns:
      What `function` returns for all queries.
    """
    axes = jax.tree.broadcast(axes, inputs)
    size = jax.tree.leaves(jax.tree.map(lambda x, axis: x.shape[axis], inputs, axes))[0]
    if size <= rows:
        return function(*inputs)
    blocked = jax.tree.map(lambda x, axis: split(x, rows, axis), inputs, axes)
    out = jax.lax.map(lambda block: function(*block), blocked)
    return jax.tree.map(lambda x, axis: merge(x, size, axis), out, jax.tree.broadcast(out_axes, out))
