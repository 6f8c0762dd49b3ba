"""selected_attention on Hopper: flash attention whose mask is a bit a pair, forward and backward, without atomics.

A thread block owns a tile: two warpgroups of 64 rows each, and one that copies. Forward and gradient of queries: the
rows are queries and tiles of keys stream past; gradient of keys and values: the rows are keys, tiles of queries stream
past. Every sum is thus one block's, in the order of the tiles: the result repeats bit for bit. Tiles that causality
empties, by the positions of the queries, are left out; within the rest every pair is computed and the mask zeroes what
is not selected. At a selection of 1/16 that is more arithmetic than gathering, but all of it runs on the tensor cores
from tiles that TMA copies: a gathered row would serve one query, a tile serves 128.

Why these tiles: registers. The rows' sums stay in them (64 x (192 + 128) numbers a warpgroup for keys and values: 160 a
thread), so the streamed tile is 64 wide in the backward pass and 128 in the forward one, which keeps 64.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.bits import WORD_BITS
from pallas_kernels.hopper.tiles import (
    BY_COLUMN,
    BY_ROW,
    ROWS,
    SWIZZLE_COLUMNS,
    TILE,
    WARPGROUPS,
    add_product,
    add_products,
    by_column,
    by_row,
    call_kernel,
    filled,
    first_seeing,
    product,
    selected_by_column,
    selected_by_row,
    smem,
    stream,
    streamed,
    tiles_seen,
    to_tiles,
    vector,
)
from pallas_kernels.softmax import LOG2E, MASKED, START

KEYS = 128  # of a streamed tile, forward
STREAMED = 64  # rows of a streamed tile, backward
STAGES = 2, 3  # streamed tiles in flight, forward and backward
MAX_WIDTH = 192, 128  # of keys and values: what the registers hold; narrower ones are padded to a multiple of SWIZZLE_COLUMNS


def why_not(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
) -> str | None:
    if reason := hopper.why_not():
        return reason
    if any(x.dtype != jnp.bfloat16 for x in (queries, keys, values)):
        return f"it takes bfloat16, not {queries.dtype}, {keys.dtype} and {values.dtype}"
    if queries.shape[3] > MAX_WIDTH[0] or values.shape[3] > MAX_WIDTH[1]:
        return f"it takes keys and values up to {MAX_WIDTH}, these are {queries.shape[3]} and {values.shape[3]} wide"
    if 0 in queries.shape or 0 in keys.shape:
        return "there is nothing to attend"
    return None


def products(first: tuple[Any, Any], second: tuple[Any, Any], use: Any, rows: int, columns: int) -> Any:
    """use(the product of the first pair) and the product of the second, which is computed meanwhile."""

    def run(acc: Any, acc2: Any) -> Any:
        plgpu.wgmma(acc, *first)
        plgpu.wgmma(acc2, *second)
        used = use(plgpu.wgmma_accumulator_load(acc, wait_n=1))
        return used, plgpu.wgmma_accumulator_load(acc2, wait_n=0)

    acc = plgpu.ACC((rows, columns), jnp.float32)
    return pl.run_scoped(run, acc, acc)


def _last_first(axis: str, tiles: int) -> jax.Array:
    """The tile of this block: those with most to do start first."""
    return tiles - 1 - lax.axis_index(axis)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array, seen: jax.Array, scale: float, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """[B, S, H, V] and the logarithms to base 2 of the sums of exponentials [B, H, S]; S and T multiples of TILE.

    seen [S / TILE]: how many tiles of keys each tile of queries sees.
    """
    b, s, h, width = q.shape
    value_width = v.shape[3]
    tiles = s // TILE

    def selected_attention_forward(
        # Input
        q_ref,  # [B, S, H, D]
        k_ref,  # [B, T, H, D]
        v_ref,  # [B, T, H, V]
        words_ref,  # [B, T / 32, S]
        seen_ref,  # [S / TILE]
        # Output
        out_ref,  # [B, S, H, V]
        lse_ref,  # [B, H, S]
        # Scratch
        q_sm,  # [WARPGROUPS, ROWS, D]
        lse_sm,  # [WARPGROUPS, ROWS]
        # Barriers
        barriers,  # [WARPGROUPS]
    ):
        batch, head, tile = lax.axis_index("batch"), lax.axis_index("head"), _last_first("tile", tiles)
        group = lax.axis_index("warpgroup")
        rows = pl.ds(tile * TILE + group * ROWS, ROWS)

        def context(run: Any) -> None:
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_sm.at[group], barriers.at[group])
            plgpu.barrier_wait(barriers.at[group])
            start = filled((ROWS,), START, BY_ROW), filled((ROWS,), 0, BY_ROW), filled((ROWS, value_width), 0)
            top, total, out = run(start)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            out_ref[batch, rows, head] = (out / by_row(total, value_width)).astype(out_ref.dtype)
            lse_sm[group] = jnp.where(some, top + jnp.log(total) * LOG2E, 0.0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_sm.at[group], lse_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def step(_, k_sm, v_sm, words_sm, carry):
            top, total, out = carry
            logits = product(q_sm.at[group], k_sm.transpose((1, 0)), ROWS, KEYS)
            logits = jnp.where(selected_by_row(words_sm, group * ROWS, KEYS), logits * (scale * LOG2E), MASKED)
            new_top = jnp.maximum(top, logits.max(axis=1))
            weights, factors = jnp.exp2(logits - by_row(new_top, KEYS)), jnp.exp2(top - new_top)
            total = total * factors + weights.sum(axis=1)
            out = add_product(out * by_row(factors, value_width), weights.astype(v_sm.dtype), v_sm)
            return new_top, total, out

        specs = [
            streamed(KEYS, width, lambda i: (i, 0)),
            streamed(KEYS, value_width, lambda i: (i, 0)),
            plgpu.BlockSpec((KEYS // WORD_BITS, TILE), lambda i: (i, tile)),
        ]
        pipeline = stream(step, context, (seen_ref[tile] * (TILE // KEYS),), specs, STAGES[0])
        pipeline(k_ref.at[batch, :, head], v_ref.at[batch, :, head], words_ref.at[batch])

    outputs = (jax.ShapeDtypeStruct((b, s, h, value_width), q.dtype), jax.ShapeDtypeStruct((b, h, s), jnp.float32))
    scratch = (
        smem(WARPGROUPS, ROWS, width),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    run = call_kernel(selected_attention_forward, outputs, (h, tiles, b), ("head", "tile", "batch"), scratch, interpret)
    return run(q, k, v, words, seen)


def _of_queries(q, k, v, words, seen, lse, delta, out_grad, scale: float, interpret: Any) -> jax.Array:
    """The gradient of queries [B, S, H, D]."""
    b, s, h, width = q.shape
    value_width = v.shape[3]
    tiles = s // TILE

    def selected_attention_dq(
        # Input
        q_ref,  # [B, S, H, D]
        k_ref,  # [B, T, H, D]
        v_ref,  # [B, T, H, V]
        grad_ref,  # [B, S, H, V]
        words_ref,  # [B, T / 32, S]
        seen_ref,  # [S / TILE]
        lse_ref,  # [B, H, S]
        delta_ref,  # [B, H, S]
        # Output
        dq_ref,  # [B, S, H, D]
        # Scratch
        q_sm,  # [WARPGROUPS, ROWS, D]
        grad_sm,  # [WARPGROUPS, ROWS, V]
        lse_sm,  # [WARPGROUPS, ROWS]
        delta_sm,  # [WARPGROUPS, ROWS]
        # Barriers
        barriers,  # [WARPGROUPS]
    ):
        batch, head, tile = lax.axis_index("batch"), lax.axis_index("head"), _last_first("tile", tiles)
        group = lax.axis_index("warpgroup")
        rows = pl.ds(tile * TILE + group * ROWS, ROWS)

        def context(run: Any) -> None:
            barrier = barriers.at[group]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(grad_ref.at[batch, rows, head], grad_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], delta_sm.at[group], barrier)
            plgpu.barrier_wait(barrier)
            lse = vector(lse_sm.at[group], BY_ROW)
            delta = vector(delta_sm.at[group], BY_ROW)
            dq, _, _ = run((filled((ROWS, width), 0), lse, delta))
            q_sm[group] = (dq * scale).astype(q_sm.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm.at[group], dq_ref.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        def step(_, k_sm, v_sm, words_sm, carry):
            dq, lse, delta = carry
            of_key, of_value = (q_sm.at[group], k_sm.transpose((1, 0))), (grad_sm.at[group], v_sm.transpose((1, 0)))

            def probabilities(logits: jax.Array) -> jax.Array:
                return jnp.exp2(logits * (scale * LOG2E) - by_row(lse, STREAMED))

            p, of_p = products(of_key, of_value, probabilities, ROWS, STREAMED)
            of_logits = p * (of_p - by_row(delta, STREAMED))
            of_logits = jnp.where(selected_by_row(words_sm, group * ROWS, STREAMED), of_logits, 0.0)
            return add_product(dq, of_logits.astype(k_sm.dtype), k_sm), lse, delta

        specs = [
            streamed(STREAMED, width, lambda i: (i, 0)),
            streamed(STREAMED, value_width, lambda i: (i, 0)),
            plgpu.BlockSpec((STREAMED // WORD_BITS, TILE), lambda i: (i, tile)),
        ]
        pipeline = stream(step, context, (seen_ref[tile] * (TILE // STREAMED),), specs, STAGES[1])
        pipeline(k_ref.at[batch, :, head], v_ref.at[batch, :, head], words_ref.at[batch])

    scratch = (
        smem(WARPGROUPS, ROWS, width),
        smem(WARPGROUPS, ROWS, value_width),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
    )
    grid, names = (h, tiles, b), ("head", "tile", "batch")
    run = call_kernel(selected_attention_dq, jax.ShapeDtypeStruct(q.shape, q.dtype), grid, names, scratch, interpret)
    return run(q, k, v, out_grad, words, seen, lse, delta)


def _of_keys(q, k, v, words, seen, lse, delta, out_grad, scale: float, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys [B, T, H, D] and values [B, T, H, V]."""
    b, s, h, width = q.shape
    t, value_width = k.shape[1], v.shape[3]

    def selected_attention_dkv(
        # Input
        q_ref,  # [B, S, H, D]
        k_ref,  # [B, T, H, D]
        v_ref,  # [B, T, H, V]
        grad_ref,  # [B, S, H, V]
        words_ref,  # [B, T / 32, S]
        first_ref,  # [T / TILE]
        lse_ref,  # [B, H, S]
        delta_ref,  # [B, H, S]
        # Output
        dk_ref,  # [B, T, H, D]
        dv_ref,  # [B, T, H, V]
        # Scratch
        k_sm,  # [WARPGROUPS, ROWS, D]
        v_sm,  # [WARPGROUPS, ROWS, V]
        # Barriers
        barriers,  # [WARPGROUPS]
    ):
        batch, head, tile = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        group = lax.axis_index("warpgroup")
        rows = pl.ds(tile * TILE + group * ROWS, ROWS)
        first = first_ref[tile] * (TILE // STREAMED)  # tile of queries: those before see none of these keys

        def context(run: Any) -> None:
            barrier = barriers.at[group]
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, head], k_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, head], v_sm.at[group], barrier)
            plgpu.barrier_wait(barrier)
            dk, dv = run((filled((ROWS, width), 0), filled((ROWS, value_width), 0)))
            k_sm[group] = (dk * scale).astype(k_sm.dtype)
            v_sm[group] = dv.astype(v_sm.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_sm.at[group], dk_ref.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(v_sm.at[group], dv_ref.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        def step(_, q_sm, grad_sm, words_sm, lse_sm, delta_sm, carry):
            logits = product(k_sm.at[group], q_sm.transpose((1, 0)), ROWS, STREAMED)
            p = jnp.exp2(logits * (scale * LOG2E) - by_column(vector(lse_sm.at[0], BY_COLUMN)))
            p = jnp.where(selected_by_column(words_sm, group * (ROWS // WORD_BITS), STREAMED), p, 0.0).astype(grad_sm.dtype)
            of_p = product(v_sm.at[group], grad_sm.transpose((1, 0)), ROWS, STREAMED)
            of_logits = p.astype(jnp.float32) * (of_p - by_column(vector(delta_sm.at[0], BY_COLUMN)))
            return add_products(carry, (of_logits.astype(q_sm.dtype), q_sm), (p, grad_sm))

        specs = [
            streamed(STREAMED, width, lambda i: (first + i, 0)),
            streamed(STREAMED, value_width, lambda i: (first + i, 0)),
            plgpu.BlockSpec((TILE // WORD_BITS, STREAMED), lambda i: (tile, first + i)),
            plgpu.BlockSpec((1, STREAMED), lambda i: (head, first + i)),
            plgpu.BlockSpec((1, STREAMED), lambda i: (head, first + i)),
        ]
        pipeline = stream(step, context, (s // STREAMED - first,), specs, STAGES[1])
        pipeline(
            q_ref.at[batch, :, head], grad_ref.at[batch, :, head], words_ref.at[batch], lse_ref.at[batch], delta_ref.at[batch]
        )

    outputs = jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)
    scratch = (
        smem(WARPGROUPS, ROWS, width),
        smem(WARPGROUPS, ROWS, value_width),
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    )
    grid, names = (h, t // TILE, b), ("head", "tile", "batch")
    run = call_kernel(selected_attention_dkv, outputs, grid, names, scratch, interpret)
    return run(q, k, v, out_grad, words, first_seeing(seen, t), lse, delta)


def padded(q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Whole tiles: what is added is selected by nobody and selects nothing."""
    words = to_tiles(to_tiles(words, 1, TILE // WORD_BITS), 2)
    return to_tiles(q, 1), to_tiles(k, 1), to_tiles(v, 1), words


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, words: jax.Array, seen: jax.Array, scale: float, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    out, lse = _forward(*padded(q, k, v, words), seen, scale, interpret)
    return out[:, : q.shape[1]], lse[:, :, : q.shape[1]] / LOG2E


def _keep(q, k, v, words, seen, scale, interpret):
    out, lse = attend(q, k, v, words, seen, scale, interpret)
    return (out, lse), (q, k, v, words, seen, out, lse)


def _pull(scale, interpret, residuals, cotangents):
    q, k, v, words, seen, out, lse = residuals
    out_grad = cotangents[0]
    delta = jnp.einsum("bshv,bshv->bhs", out.astype(jnp.float32), out_grad.astype(jnp.float32))
    lse, delta = to_tiles(lse * LOG2E, 2), to_tiles(delta, 2)
    arguments = (*padded(q, k, v, words), seen, lse, delta, to_tiles(out_grad, 1), scale, interpret)
    dq = _of_queries(*arguments)
    dk, dv = _of_keys(*arguments)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], None, None


attend.defvjp(_keep, _pull)


def selected_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    width = values.shape[3]
    queries, keys, values = (to_tiles(x, 3, SWIZZLE_COLUMNS) for x in (queries, keys, values))
    seen = tiles_seen(q_positions, queries.shape[1], keys.shape[1])
    out, lse = attend(queries, keys, values, words, seen, scale, interpret)
    return out[..., :width], lse
