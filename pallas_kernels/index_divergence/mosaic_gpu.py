"""index_divergence on Hopper: the target of a block of queries, what the index scores miss of it, and both gradients at once.

Nothing that is quadratic outlives a block of queries: its targets are made by the kernel of `attention_target`, and
`index_cross_entropy` makes the value and the gradients from them. The gradient with respect to a score is q - p, whatever comes
after, so the forward pass makes the gradients and the backward pass scales them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_target import mosaic_gpu as attention_target
from pallas_kernels.hopper.tiles import SWIZZLE_COLUMNS, to_tiles
from pallas_kernels.index_cross_entropy import mosaic_gpu as index_cross_entropy

BLOCK_BYTES = 128 * 2**20  # of one block's float32 targets


def why_not(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
) -> str | None:
    reason = attention_target.why_not(index_queries, queries, keys)
    return reason or index_cross_entropy.why_not(index_queries, index_keys, head_weights, queries, words)


def _run(
    arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, scale: float, interpret: Any, gradients: bool
) -> tuple[jax.Array, Any]:
    """The divergence and the gradients of index queries, keys and head weights, None unless wanted."""
    index_queries, index_keys, head_weights, queries, keys, lse, words = arrays
    b, s = queries.shape[:2]
    t = keys.shape[1]
    rows = index_cross_entropy.block_rows(b, s, t, BLOCK_BYTES)
    positions = jnp.arange(s, dtype=jnp.int32) if q_positions is None else q_positions
    positions = jnp.pad(positions, (0, -s % rows), mode="edge")
    axes = 1, 1, 1, 2, 2
    given = index_queries, head_weights, queries, lse, words
    of_queries = [to_tiles(x, axis, rows) for x, axis in zip(given, axes, strict=True)]

    def step(carry: Any, i: jax.Array) -> Any:
        total, of_keys = carry
        block = functools.partial(lax.dynamic_slice_in_dim, start_index=i * rows, slice_size=rows)
        iq, w, q, lse, words = (block(x, axis=axis) for x, axis in zip(of_queries, axes, strict=True))
        options = {"q_positions": block(positions), "interpret": interpret}
        nothing, share = jnp.zeros((b, rows, t), jnp.float32), jnp.ones((), jnp.float32)
        target, entropy = attention_target.attention_target(nothing, q, keys, lse, words, share, scale=scale, **options)
        value, found = index_cross_entropy.run_blocks((iq, index_keys, w, target, words), gradients=gradients, **options)
        total = total + value - jnp.sum(entropy)
        if found is None:
            return (total, of_keys), None
        dq, dk, dw = found
        return (total, of_keys + dk.astype(jnp.float32)), (dq, dw)

    start = jnp.zeros((), jnp.float32), jnp.zeros(index_keys.shape, jnp.float32)
    (total, of_keys), found = lax.scan(step, start, jnp.arange(positions.size // rows, dtype=jnp.int32))
    if not gradients:
        return total, None
    dq, dw = (x.swapaxes(0, 1).reshape(b, -1, *x.shape[3:])[:, :s] for x in found)
    return total, (dq, of_keys.astype(index_keys.dtype), dw)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def diverge(arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, scale: float, interpret: Any) -> jax.Array:
    return _run(arrays, q_positions, scale, interpret, gradients=False)[0]


def _keep(arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, scale: float, interpret: Any) -> tuple[jax.Array, Any]:
    return _run(arrays, q_positions, scale, interpret, gradients=True)


def _pull(scale: float, interpret: Any, gradients: tuple[jax.Array, ...], cotangent: jax.Array) -> Any:
    return (*index_cross_entropy.scaled_gradients(gradients, cotangent), None, None, None, None), None


diverge.defvjp(_keep, _pull)


def index_divergence(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
    interpret: Any = None,
) -> jax.Array:
    index_queries, queries, keys = (to_tiles(x, 3, SWIZZLE_COLUMNS) for x in (index_queries, queries, keys))
    index_keys = to_tiles(index_keys, 2, SWIZZLE_COLUMNS)
    return diverge((index_queries, index_keys, head_weights, queries, keys, lse, words), q_positions, scale, interpret)
