"""The backward pass of sparse_mla on Hopper: the formulas of gradient.py, over all pairs of a block of queries and the keys.

A latent's gradient sums over whichever queries selected it. Here a block's probabilities P and dS are made for every
pair of a row (a query's head) and a key, zero where not selected, in bfloat16, and three matrix products give the
gradients: more arithmetic than gathering would need, all of it on the tensor cores, and no order of adding to fix: XLA's
scatter would add H numbers for every selected pair. Two kernels make P and dS. Both take a tile of rows and one of keys
and stream both past in pieces of their width: the first for the tile's part of the softmax's denominator, the second,
which knows the denominator, for P and dS. A tile in which nothing is selected is left out, as most above the diagonal are.

A bit a pair says what is selected, so a list must hold a position once. The lists of indexer_topk ascend; others, which may
repeat one, are left to gradient.py, at run time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import bits
from pallas_kernels.bits import WORD_BITS
from pallas_kernels.blocks import merge, split
from pallas_kernels.hopper.tiles import (
    BY_ROW,
    ROWS,
    SWIZZLE_COLUMNS,
    TILE,
    WARPGROUPS,
    add_product,
    add_products,
    by_row,
    call_kernel,
    filled,
    selected_by_row,
    smem,
    stream,
    streamed,
    to_tiles,
    vector,
)
from pallas_kernels.softmax import LOG2E, MASKED
from pallas_kernels.sparse_mla import gradient

STAGES = 4
PAIR_BYTES = 512 * 2**20  # of one block's P, and as much of its dS


def _denominators(q: jax.Array, kv: jax.Array, words: jax.Array, taken: jax.Array, scale: float, interpret: Any) -> Any:
    """Logarithms to base 2 of the denominators [B, M] of rows [B, M, W], 0 for a row that selects nothing.

    words [B, T / 32, M] and, by tiles, whether anything is selected [B, M / TILE, T / TILE] int32.
    """
    (b, m, width), t = q.shape, kv.shape[1]

    def sparse_mla_denominators(
        # Input
        q_ref,  # [B, M, W] bfloat16
        kv_ref,  # [B, T, W] bfloat16
        words_ref,  # [B, T / 32, M] int32
        taken_ref,  # [B, M / TILE, T / TILE] int32
        # Output
        top_ref,  # [B, T / TILE, M] float32: the largest logit of a row in a tile of keys
        total_ref,  # [B, T / TILE, M] float32: the sum of exp2(logit - largest)
        # Scratch
        words_sm,  # [2, TILE / 32, ROWS] int32, of either warpgroup's rows
        out_sm,  # [2, 2, ROWS] float32: largest, sum
        # Barriers
        words_ready,  # [2]
    ):
        batch, i, j = lax.axis_index("batch"), lax.axis_index("rows"), lax.axis_index("keys")
        group = lax.axis_index("warpgroup")
        rows = pl.ds(i * TILE + group * ROWS, ROWS)

        def context(run: Any) -> None:
            source = words_ref.at[batch, pl.ds(j * (TILE // WORD_BITS), TILE // WORD_BITS), rows]
            plgpu.copy_gmem_to_smem(source, words_sm.at[group], words_ready.at[group])
            plgpu.barrier_wait(words_ready.at[group])
            logits = run(filled((ROWS, TILE), 0))
            mine = selected_by_row(words_sm.at[group], 0, TILE)
            logits = jnp.where(mine, logits * (scale * LOG2E), MASKED)
            top = logits.max(axis=1)
            out_sm[group, 0] = top
            out_sm[group, 1] = jnp.where(mine, jnp.exp2(logits - by_row(top, TILE)), 0.0).sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_sm.at[group, 0], top_ref.at[batch, j, rows])
            plgpu.copy_smem_to_gmem(out_sm.at[group, 1], total_ref.at[batch, j, rows])
            plgpu.wait_smem_to_gmem(0)

        def step(_, q_sm, kv_sm, logits):
            return add_product(logits, q_sm.at[pl.ds(group * ROWS, ROWS)], kv_sm.transpose((1, 0)))

        specs = [streamed(TILE, SWIZZLE_COLUMNS, lambda c: (i, c)), streamed(TILE, SWIZZLE_COLUMNS, lambda c: (j, c))]
        steps = jnp.where(taken_ref[batch, i, j] > 0, width // SWIZZLE_COLUMNS, 0)
        stream(step, context, (steps,), specs, STAGES)(q_ref.at[batch], kv_ref.at[batch])

    parts = jax.ShapeDtypeStruct((b, t // TILE, m), jnp.float32)
    scratch = (
        plgpu.SMEM((WARPGROUPS, TILE // WORD_BITS, ROWS), jnp.int32),
        plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    grid, names = (t // TILE, m // TILE, b), ("keys", "rows", "batch")
    run = call_kernel(sparse_mla_denominators, (parts, parts), grid, names, scratch, interpret)
    tops, totals = run(q, kv, words, taken)
    top = jnp.max(tops, axis=1)
    total = jnp.sum(totals * jnp.exp2(tops - top[:, None]), axis=1)
    return jnp.where(total > 0, top + jnp.log2(jnp.where(total > 0, total, 1.0)), 0.0)


def _pairs(q, kv, grad, words, taken, denominators, delta, scale: float, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """P and dS [B, M, T] bfloat16 of rows [B, M, W]; grad [B, M, W] is that of the output, zeros beyond its width."""
    (b, m, width), t = q.shape, kv.shape[1]

    def sparse_mla_pairs(
        # Input
        q_ref,  # [B, M, W] bfloat16
        kv_ref,  # [B, T, W] bfloat16
        grad_ref,  # [B, M, W] bfloat16
        words_ref,  # [B, T / 32, M] int32
        taken_ref,  # [B, M / TILE, T / TILE] int32
        lse_ref,  # [B, M] float32, to base 2
        delta_ref,  # [B, M] float32
        # Output
        p_ref,  # [B, M, T] bfloat16
        ds_ref,  # [B, M, T] bfloat16
        # Scratch
        words_sm,  # [2, TILE / 32, ROWS] int32, of either warpgroup's rows
        rows_sm,  # [2, 2, ROWS] float32: lse, delta
        p_sm,  # [2, ROWS, TILE] bfloat16
        ds_sm,  # [2, ROWS, TILE] bfloat16
        # Barriers
        rows_ready,  # [2]: words, lse and delta
    ):
        batch, i, j = lax.axis_index("batch"), lax.axis_index("rows"), lax.axis_index("keys")
        group = lax.axis_index("warpgroup")
        rows, columns = pl.ds(i * TILE + group * ROWS, ROWS), pl.ds(j * TILE, TILE)

        def context(run: Any) -> None:
            barrier = rows_ready.at[group]
            source = words_ref.at[batch, pl.ds(j * (TILE // WORD_BITS), TILE // WORD_BITS), rows]
            plgpu.copy_gmem_to_smem(source, words_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch, rows], rows_sm.at[group, 0], barrier)
            plgpu.copy_gmem_to_smem(delta_ref.at[batch, rows], rows_sm.at[group, 1], barrier)
            plgpu.barrier_wait(barrier)
            logits, of_p = run((filled((ROWS, TILE), 0), filled((ROWS, TILE), 0)))
            lse, delta = (by_row(vector(rows_sm.at[group, n], BY_ROW), TILE) for n in range(2))
            mine = selected_by_row(words_sm.at[group], 0, TILE)
            p = jnp.where(mine, jnp.exp2(logits * (scale * LOG2E) - lse), 0.0)
            p_sm[group] = p.astype(p_sm.dtype)
            ds_sm[group] = jnp.where(mine, p * (of_p - delta) * scale, 0.0).astype(ds_sm.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(p_sm.at[group], p_ref.at[batch, rows, columns])
            plgpu.copy_smem_to_gmem(ds_sm.at[group], ds_ref.at[batch, rows, columns])
            plgpu.wait_smem_to_gmem(0)

        def step(_, q_sm, kv_sm, grad_sm, carry):
            mine, of_keys = pl.ds(group * ROWS, ROWS), kv_sm.transpose((1, 0))
            return add_products(carry, (q_sm.at[mine], of_keys), (grad_sm.at[mine], of_keys))

        specs = [
            streamed(TILE, SWIZZLE_COLUMNS, lambda c: (i, c)),
            streamed(TILE, SWIZZLE_COLUMNS, lambda c: (j, c)),
            streamed(TILE, SWIZZLE_COLUMNS, lambda c: (i, c)),
        ]
        steps = jnp.where(taken_ref[batch, i, j] > 0, width // SWIZZLE_COLUMNS, 0)
        stream(step, context, (steps,), specs, STAGES - 1)(q_ref.at[batch], kv_ref.at[batch], grad_ref.at[batch])

    pairs = jax.ShapeDtypeStruct((b, m, t), jnp.bfloat16)
    scratch = (
        plgpu.SMEM((WARPGROUPS, TILE // WORD_BITS, ROWS), jnp.int32),
        plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
        smem(WARPGROUPS, ROWS, TILE),
        smem(WARPGROUPS, ROWS, TILE),
        plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
    )
    grid, names = (t // TILE, m // TILE, b), ("keys", "rows", "batch")
    run = call_kernel(sparse_mla_pairs, (pairs, pairs), grid, names, scratch, interpret)
    return run(q, kv, grad, words, taken, denominators, delta)


def block_queries(batch: int, queries: int, heads: int, keys: int) -> int:
    """Queries of a batch row whose pairs exist at a time: even blocks, at most PAIR_BYTES."""
    most = max(1, PAIR_BYTES // (2 * batch * heads * keys))
    return -(-queries // -(-queries // most))


def ascending(indices: jax.Array) -> jax.Array:
    """Whether every list [..., k] ascends strictly, but for -1 in its tail."""
    before, after = indices[..., :-1], indices[..., 1:]
    return jnp.all((after == -1) | ((before >= 0) & (after > before)))


def pull(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    out: jax.Array,
    cotangent: jax.Array,
    scale: float,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of queries [B, S, H, W] and latents [B, T, W] from that of the output [B, S, H, C]."""

    def by_tiles() -> tuple[jax.Array, jax.Array]:
        return pull_ascending(queries, latents, indices, out, cotangent, scale, value_dim)

    def anything() -> tuple[jax.Array, jax.Array]:
        return gradient.pull(queries, latents, indices, cotangent, scale, value_dim)

    return lax.cond(ascending(indices), by_tiles, anything)


def pull_ascending(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    out: jax.Array,
    cotangent: jax.Array,
    scale: float,
    value_dim: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`pull` for lists without repetitions."""
    b, s, h, width = queries.shape
    t = latents.shape[1]
    words = to_tiles(bits.pack(indices, t), 1, TILE // WORD_BITS)
    # The products below take all latents: what no query selects may be anything, and must not be.
    used = bits.unpack(jnp.bitwise_or.reduce(words, axis=2, keepdims=True), t)[:, 0, :, None]
    kv = to_tiles(jnp.where(used, latents, 0), 1)
    count = block_queries(b, s, h, kv.shape[1])

    def step(of_latents: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, out, grad, words = block
        delta = jnp.einsum("bqhc,bqhc->bqh", out, grad, preferred_element_type=jnp.float32)
        q, grad = (to_tiles(x.reshape(b, count * h, -1), 1) for x in (q, grad))
        words = to_tiles(jnp.repeat(words, h, axis=2), 2)
        delta = to_tiles(delta.reshape(b, -1), 1)
        tiles = words.reshape(b, -1, TILE // WORD_BITS, words.shape[2] // TILE, TILE)
        taken = jnp.any(tiles != 0, axis=(2, 4)).swapaxes(1, 2).astype(jnp.int32)
        denominators = _denominators(q, kv, words, taken, scale, interpret)
        wide = jnp.pad(grad, ((0, 0), (0, 0), (0, width - value_dim)))
        p, ds = _pairs(q, kv, wide, words, taken, denominators, delta, scale, interpret)
        of_kv = jnp.einsum("bmt,bmw->btw", ds, q, preferred_element_type=jnp.float32)
        of_values = jnp.einsum("bmt,bmc->btc", p, grad, preferred_element_type=jnp.float32)
        of_kv = of_kv.at[..., :value_dim].add(of_values)
        of_queries = jnp.einsum("bmt,btw->bmw", ds, kv, preferred_element_type=jnp.float32).astype(q.dtype)
        return of_latents + of_kv, of_queries[:, : count * h].reshape(b, count, h, width)

    start = jnp.zeros(kv.shape, jnp.float32)
    blocked = *(split(x, count) for x in (queries, out, cotangent.astype(queries.dtype))), split(words, count, axis=2)
    of_latents, of_queries = lax.scan(step, start, blocked)
    return merge(of_queries, s), of_latents[:, :t].astype(latents.dtype)
