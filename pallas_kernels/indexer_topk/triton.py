"""indexer_topk for GPUs before Hopper: scores by XLA, a block of queries at a time, and the selection by Pallas' Triton.

One program selects of one row. It narrows down the k-th best two bits at a time on the ordered integer image of the floats,
counting the row against three candidates in every pass, and then writes the chosen positions in one ordered pass, ties
cut lowest position first. Seventeen reads of the row, all but the first mostly from L2, and no buffer that could
overflow. CHUNK scores over 4 warps keep the three counts and a chunk in registers.

JAX deprecated this backend in 0.11 and will remove it: delete this file, its row in api.py and its tests then.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.blocks import map_queries
from pallas_kernels.indexer_topk import reference

CHUNK = 1024
WARPS = 4
SCORE_BYTES = 2**28  # of float32 scores at a time
HIDDEN = -(2**31)  # below the integer image of every float


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
    if device.platform() != "gpu":
        return f"it needs a GPU, the device compiled for is a {device.platform()!r}"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"JAX {jax.__version__} has no Pallas Triton backend any more"
    if 0 in queries.shape or 0 in keys.shape:
        return "there is nothing to select from"
    return None


def _ordered(scores: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order; -0 becomes 0 and NaN -inf."""
    scores = jnp.where(scores == 0, 0.0, jnp.where(scores == scores, scores, -jnp.inf))
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask.astype(jnp.int32))


def _select(scores_ref: Any, visible_ref: Any, out_ref: Any, *, k: int) -> None:
    """scores [1, T'], visible [1] -> out [1, k]."""
    from jax.experimental.pallas import triton as plgpu

    visible = visible_ref[0]
    wanted = jnp.minimum(visible, k)
    chunks = pl.cdiv(visible, CHUNK)
    lane = jnp.arange(CHUNK, dtype=jnp.int32)

    def read(chunk: jax.Array) -> jax.Array:
        ordered = _ordered(scores_ref[0, pl.ds(chunk * CHUNK, CHUNK)])
        return jnp.where(chunk * CHUNK + lane < visible, ordered, HIDDEN)

    def counts(thresholds: list[jax.Array]) -> tuple[jax.Array, ...]:
        """How many scores reach each."""

        def add(chunk: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            keys = read(chunk)
            return tuple(total + _count(keys >= t) for total, t in zip(totals, thresholds, strict=True))

        return jax.lax.fori_loop(0, chunks, add, (jnp.int32(0),) * len(thresholds))

    def two_bits(i: jax.Array, low: jax.Array) -> jax.Array:
        step = jnp.left_shift(jnp.int32(1), 30 - 2 * i)
        candidates = [low + step * j for j in (1, 2, 3)]
        for candidate, total in zip(candidates, counts(candidates), strict=True):
            low = jnp.where(total >= wanted, candidate, low)
        return low

    worst = jax.lax.fori_loop(0, 16, two_bits, jnp.int32(HIDDEN))
    above = jax.lax.fori_loop(0, chunks, lambda c, total: total + _count(read(c) > worst), jnp.int32(0))

    def write(chunk: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        written, equals_before = carry
        position = chunk * CHUNK + lane
        keys = read(chunk)
        equal = (keys == worst) & (position < visible)
        order = equals_before + jnp.cumsum(equal.astype(jnp.int32))
        chosen = (keys > worst) | (equal & (order <= wanted - above))
        # The other lanes get distinct positions, which are not written: interpreted, equal ones would overwrite each other.
        place = jnp.where(chosen, written + jnp.cumsum(chosen.astype(jnp.int32)) - 1, k + lane)
        plgpu.store(out_ref.at[0, place], position, mask=chosen)
        return written + _count(chosen), equals_before + _count(equal)

    def clear(chunk: jax.Array, carry: jax.Array) -> jax.Array:
        place = chunk * CHUNK + lane
        plgpu.store(out_ref.at[0, place], jnp.full_like(place, -1), mask=(place >= wanted) & (place < k))
        return carry

    jax.lax.fori_loop(0, chunks, write, (jnp.int32(0), jnp.int32(0)))
    jax.lax.fori_loop(0, pl.cdiv(k, CHUNK), clear, jnp.int32(0))


def select(scores: jax.Array, visible: jax.Array, k: int, *, interpret: bool = False) -> jax.Array:
    """scores [rows, T'], T' a multiple of CHUNK, of which row i sees the first visible[i]: [rows, k] positions, then -1.

    `interpret` runs it without a GPU, for tests.
    """
    from jax.experimental.pallas import triton as plgpu

    rows, width = scores.shape
    return pl.pallas_call(
        functools.partial(_select, k=k),
        grid=(rows,),
        in_specs=[pl.BlockSpec((1, width), lambda row: (row, 0)), pl.BlockSpec((1,), lambda row: (row,))],
        out_specs=pl.BlockSpec((1, k), lambda row: (row, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, k), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=interpret,
    )(scores, visible)


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
    b, s = q_positions.shape
    t = keys.shape[1]
    visible = jnp.clip(jnp.minimum(q_positions + 1, kv_lengths[:, None]), 0, t)
    padded = -(-t // CHUNK) * CHUNK
    keys = jnp.pad(keys, ((0, 0), (0, padded - t), (0, 0)))
    key_scales = None if key_scales is None else jnp.pad(key_scales, ((0, 0), (0, padded - t)))
    queries, keys, head_weights, key_scales = jax.lax.stop_gradient((queries, keys, head_weights, key_scales))

    def block(queries: jax.Array, head_weights: jax.Array, visible: jax.Array) -> Any:
        scores = jax.vmap(reference.scores)(queries, keys, head_weights, key_scales)
        chosen = select(scores.reshape(-1, padded), visible.reshape(-1), k_select).reshape(b, -1, k_select)
        return (chosen, reference.scores_of(chosen, scores)) if return_scores else chosen

    rows = max(1, min(s, SCORE_BYTES // (4 * b * padded)))
    return map_queries(block, (queries, head_weights, visible), rows)
