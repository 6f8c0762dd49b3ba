"""indexer_topk on Hopper: for a block of queries the scores with their block maxima, then the selection, two kernels.

Scores exist for one block of queries only, at most BLOCK_ROWS rows and SCORE_BYTES. What the kernels do not take as it is
is padded by rule: heads to the next of 8, 16, 32, 64 and the head dimension to 128, with zeros; keys to a multiple
of 8 and to 256. (With heads added, an infinite key has NaN for its scores.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.blocks import map_queries
from pallas_kernels.indexer_topk import reference

BLOCK_ROWS = 1024  # queries of all batch rows whose scores exist at a time: four waves of the selection
SCORE_BYTES = 2**30  # of float32 scores at a time, unless one tile of 4 queries per batch row has more
MAX_HEADS, MAX_WIDTH = 64, 128
MAX_K, MAX_KEYS = 4096, 2**20
KEY_MULTIPLE, MIN_KEYS = 8, 256


def why_not(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    *,
    k_select: int,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    key_scales: jax.Array | None = None,
    return_scores: bool = False,
) -> str | None:
    if reason := hopper.why_not():
        return reason
    if queries.dtype != keys.dtype or keys.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"it takes queries and keys in bfloat16 or float8_e4m3fn, not {queries.dtype} and {keys.dtype}"
    if queries.shape[2] > MAX_HEADS or queries.shape[3] > MAX_WIDTH:
        return f"it takes up to {MAX_HEADS} heads of {MAX_WIDTH}, these are {queries.shape[2]} of {queries.shape[3]}"
    if k_select > MAX_K or keys.shape[1] > MAX_KEYS:
        return f"it selects up to {MAX_K} of {MAX_KEYS} keys, not {k_select} of {keys.shape[1]}"
    if 0 in queries.shape or 0 in keys.shape:
        return "there is nothing to select from"
    return None


def block_rows(batch: int, queries: int, keys: int) -> int:
    """Queries of each batch row whose scores exist at a time: even blocks of whole units of the scores kernel."""
    most = max(4, min(BLOCK_ROWS, SCORE_BYTES // (4 * keys)) // batch)
    unit = max(n for n in (4, 8, 16) if n <= most)
    blocks = -(-queries // (most // unit * unit))
    rows = -(-queries // blocks)
    return rows if blocks == 1 else -(-rows // unit) * unit


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads)


def indexer_topk(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    *,
    k_select: int,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    key_scales: jax.Array | None = None,
    return_scores: bool = False,
) -> Any:
    from pallas_kernels.indexer_topk import mosaic_gpu_scores, mosaic_gpu_select

    t = keys.shape[1]
    if t <= k_select and not return_scores:
        positions = jnp.arange(k_select, dtype=jnp.int32)
        visible = jnp.clip(jnp.minimum(q_positions + 1, kv_lengths[:, None]), 0, t)
        return jnp.where(positions < visible[:, :, None], positions, -1)

    heads = next(heads for heads in mosaic_gpu_scores.HEADS if heads >= queries.shape[2])
    queries = _padded(_padded(queries, 2, heads), 3, mosaic_gpu_scores.WIDTH)
    head_weights = _padded(head_weights, 2, heads)
    padded_t = max(MIN_KEYS, -(-t // KEY_MULTIPLE) * KEY_MULTIPLE)
    keys = _padded(_padded(keys, 2, mosaic_gpu_scores.WIDTH), 1, padded_t)
    key_scales = None if key_scales is None else _padded(key_scales, 1, padded_t)
    queries, keys, head_weights, key_scales = jax.lax.stop_gradient((queries, keys, head_weights, key_scales))

    def block(queries: jax.Array, head_weights: jax.Array, positions: jax.Array) -> Any:
        scores, maxima = mosaic_gpu_scores.scores(
            queries, keys, head_weights, key_scales, positions, kv_lengths, take_all=0 if return_scores else k_select
        )
        chosen = mosaic_gpu_select.select(scores, maxima, positions, kv_lengths, k_select, clean=True, keys=t)
        return (chosen, reference.scores_of(chosen, scores[:, : chosen.shape[1]])) if return_scores else chosen

    rows = block_rows(queries.shape[0], queries.shape[1], padded_t)
    return map_queries(block, (queries, head_weights, q_positions), rows)
