"""attention_target on Hopper: probabilities summed over heads, without keeping those of any one head.

A thread block keeps a tile of queries and keys: the heads' queries and keys stream past, and a tile of the heads' summed
probabilities stays in registers, 64 numbers a thread beside as many logits. What other layers add up to is loaded before the
first head, so that the copies of its queries and keys hide it, and the entropy is taken from the tile when it is done: a
partial sum for each tile of keys. A pair of tiles that causality empties is filled with zeros.

Two stages of queries and keys 128 long fill shared memory up to heads of 192; wider ones take keys 64 at a time.
Every sum is one thread block's in the order of heads or tiles, or XLA's: the result repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_denominators import mosaic_gpu as attention_denominators
from pallas_kernels.bits import WORD_BITS
from pallas_kernels.hopper.tiles import (
    BY_ROW,
    ROWS,
    SWIZZLE_COLUMNS,
    TILE,
    WARPGROUPS,
    by_row,
    call_kernel,
    filled,
    product,
    selected_by_row,
    stream,
    streamed,
    tiles_seen,
    to_tiles,
    vector,
)
from pallas_kernels.softmax import LOG2E

STAGES = 2
WIDE = 192  # heads above take HALF_TILE keys at a time
HALF_TILE = TILE // 2


def why_not(total: jax.Array, queries: jax.Array, keys: jax.Array, *_: Any, **__: Any) -> str | None:
    return attention_denominators.why_not(queries, keys)


def add_target(
    total: jax.Array,
    seen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    words: jax.Array,
    share: jax.Array,
    heads: int,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """total + share * p [B, R, T] float32 of queries [B, R, H D] and keys [B, T, H D], and the entropies of p [B, R].

    R and T are multiples of TILE. lse [B, H, R] to base 2; words [B, T / 32, R]; share [1] float32; seen [R / TILE]: how many
    tiles of keys each tile of queries sees.
    """
    b, r, width = q.shape[0], q.shape[1], q.shape[2] // heads
    t = k.shape[1]
    columns = HALF_TILE if width > WIDE else TILE

    def target_kernel(
        # Input
        seen_ref,  # [R / TILE]
        share_ref,  # [1]
        total_ref,  # [B, R, T]
        q_ref,  # [B, R, H D]
        k_ref,  # [B, T, H D]
        lse_ref,  # [B, H, R]
        words_ref,  # [B, T / 32, R]
        # Output
        out_ref,  # [B, R, T]
        entropy_ref,  # [B, T / columns, R]
        # Scratch
        words_sm,  # [WARPGROUPS, columns / 32, ROWS]
        entropy_sm,  # [WARPGROUPS, ROWS]
        # Barriers
        barriers,  # [WARPGROUPS]
    ):
        batch, i, j = lax.axis_index("batch"), lax.axis_index("queries"), lax.axis_index("keys")
        group = lax.axis_index("warpgroup")
        rows, tile = pl.ds(i * TILE + group * ROWS, ROWS), pl.ds(j * columns, columns)

        sees = j < seen_ref[i] * (TILE // columns)

        def context(run: Any) -> None:
            nothing = filled((ROWS, columns), 0)

            def load() -> jax.Array:
                return plgpu.load(total_ref.at[batch, rows, tile], layout=plgpu.Layout.WGMMA, optimized=False)

            source = words_ref.at[batch, pl.ds(j * (columns // WORD_BITS), columns // WORD_BITS), rows]
            plgpu.copy_gmem_to_smem(source, words_sm.at[group], barriers.at[group])
            before = lax.cond(sees, load, lambda: nothing)
            plgpu.barrier_wait(barriers.at[group])
            p = run(nothing)

            @pl.when(sees)
            def _store() -> None:
                mean = jnp.where(selected_by_row(words_sm.at[group], 0, columns), p * (1 / heads), 0.0)
                out_ref[batch, rows, tile] = before + share_ref[0] * mean
                entropy_sm[group] = jnp.where(mean > 0, mean * -jnp.log(jnp.where(mean > 0, mean, 1.0)), 0.0).sum(axis=1)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(entropy_sm.at[group], entropy_ref.at[batch, j, rows])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(~sees)
            def _store_nothing() -> None:
                out_ref[batch, rows, tile] = nothing

        def step(_, q_sm, k_sm, lse_sm, total):
            logits = product(q_sm.at[pl.ds(group * ROWS, ROWS)], k_sm.transpose((1, 0)), ROWS, columns)
            lse = vector(lse_sm.at[0, pl.ds(group * ROWS, ROWS)], BY_ROW)
            # A key that is not selected may have any logit: bound it, its probability is dropped in the end.
            exponent = jnp.minimum(logits * (scale * LOG2E) - by_row(lse, columns), 1.0)
            return total + jnp.exp2(exponent)

        specs = [
            streamed(TILE, width, lambda h: (i, h)),
            streamed(columns, width, lambda h: (j, h)),
            plgpu.BlockSpec((1, TILE), lambda h: (h, i)),
        ]
        stream(step, context, (jnp.where(sees, heads, 0),), specs, STAGES)(q_ref.at[batch], k_ref.at[batch], lse_ref.at[batch])

    outputs = jax.ShapeDtypeStruct((b, r, t), jnp.float32), jax.ShapeDtypeStruct((b, t // columns, r), jnp.float32)
    scratch = (
        plgpu.SMEM((WARPGROUPS, columns // WORD_BITS, ROWS), jnp.int32),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    grid, names = (t // columns, r // TILE, b), ("keys", "queries", "batch")
    run = call_kernel(target_kernel, outputs, grid, names, scratch, interpret)
    out, entropies = run(seen, share, total, q, k, lse, words)
    sees = jnp.arange(t // columns)[:, None] < jnp.repeat(seen * (TILE // columns), TILE)  # the rest was never written
    return out, jnp.sum(jnp.where(sees, entropies, 0.0), axis=1)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


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
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    _, s, t = total.shape
    seen = tiles_seen(q_positions, s, t)
    q, k = (to_tiles(_flat(to_tiles(x, 3, SWIZZLE_COLUMNS)), 1) for x in (queries, keys))
    lse, words = to_tiles(lse * LOG2E, 2), to_tiles(to_tiles(words, 1, TILE // WORD_BITS), 2)
    total, share = to_tiles(to_tiles(total, 1), 2), share.reshape(1)
    out, entropy = add_target(total, seen, q, k, lse, words, share, queries.shape[2], scale, interpret)
    return out[:, :s, :t], entropy[:, :s]
