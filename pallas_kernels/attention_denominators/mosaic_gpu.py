"""attention_denominators on Hopper: the forward pass of flash attention without values.

A tile of queries of one head stays, two warpgroups of 64 rows, and the head's keys stream past, 128 at a time, two stages of
which fill shared memory at the widest heads. What stays in registers is a running maximum and a running sum for every query.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
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
    smem,
    stream,
    streamed,
    tiles_seen,
    to_tiles,
)
from pallas_kernels.softmax import LOG2E, MASKED, START

STAGES = 2
MAX_WIDTH = 256  # of heads; narrower ones are padded to a multiple of SWIZZLE_COLUMNS


def why_not(queries: jax.Array, keys: jax.Array, *_: Any, **__: Any) -> str | None:
    if reason := hopper.why_not():
        return reason
    if any(x.dtype != jnp.bfloat16 for x in (queries, keys)):
        return f"it takes bfloat16, not {queries.dtype} and {keys.dtype}"
    if queries.shape[3] > MAX_WIDTH:
        return f"it takes heads up to {MAX_WIDTH} wide, these are {queries.shape[3]}"
    if 0 in queries.shape or 0 in keys.shape:
        return f"there is nothing to attend: queries are {queries.shape}, keys {keys.shape}"
    return None


def _denominators(seen: jax.Array, q: jax.Array, k: jax.Array, words: jax.Array, scale: float, interpret: Any) -> jax.Array:
    """[B, H, S] float32 of queries [B, S, H, D] and keys [B, T, H, D], to base 2; S and T are multiples of TILE.

    words [B, T / 32, S]; seen [S / TILE]: how many tiles of keys each tile of queries sees.
    """
    b, s, h, width = q.shape
    tiles = s // TILE

    def denominators_kernel(
        # Input
        seen_ref,  # [S / TILE]
        q_ref,  # [B, S, H, D]
        k_ref,  # [B, T, H, D]
        words_ref,  # [B, T / 32, S]
        # Output
        lse_ref,  # [B, H, S]
        # Scratch
        q_sm,  # [WARPGROUPS, ROWS, D]
        lse_sm,  # [WARPGROUPS, ROWS]
        # Barriers
        barriers,  # [WARPGROUPS]
    ):
        batch, head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = tiles - 1 - lax.axis_index("tile")  # those with most to do start first
        rows = pl.ds(tile * TILE + group * ROWS, ROWS)

        def context(run: Any) -> None:
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_sm.at[group], barriers.at[group])
            plgpu.barrier_wait(barriers.at[group])
            top, total = run((filled((ROWS,), START, BY_ROW), filled((ROWS,), 0, BY_ROW)))
            some = total > 0
            lse_sm[group] = jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)) * LOG2E, 0.0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_sm.at[group], lse_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def step(_, k_sm, words_sm, carry):
            top, total = carry
            logits = product(q_sm.at[group], k_sm.transpose((1, 0)), ROWS, TILE)
            logits = jnp.where(selected_by_row(words_sm, group * ROWS, TILE), logits * (scale * LOG2E), MASKED)
            new_top = jnp.maximum(top, logits.max(axis=1))
            weights = jnp.exp2(logits - by_row(new_top, TILE))
            return new_top, total * jnp.exp2(top - new_top) + weights.sum(axis=1)

        specs = [
            streamed(TILE, width, lambda i: (i, 0)),
            plgpu.BlockSpec((TILE // WORD_BITS, TILE), lambda i: (i, tile)),
        ]
        stream(step, context, (seen_ref[tile],), specs, STAGES)(k_ref.at[batch, :, head], words_ref.at[batch])

    scratch = (
        smem(WARPGROUPS, ROWS, width),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    output, grid, names = jax.ShapeDtypeStruct((b, h, s), jnp.float32), (h, tiles, b), ("head", "tile", "batch")
    return call_kernel(denominators_kernel, output, grid, names, scratch, interpret)(seen, q, k, words)


def attention_denominators(
    queries: jax.Array,
    keys: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
    interpret: Any = None,
) -> jax.Array:
    s = queries.shape[1]
    seen = tiles_seen(q_positions, s, keys.shape[1])
    q, k = (to_tiles(to_tiles(x, 3, SWIZZLE_COLUMNS), 1) for x in (queries, keys))
    words = to_tiles(to_tiles(words, 1, TILE // WORD_BITS), 2)
    return _denominators(seen, q, k, words, scale, interpret)[..., :s] / LOG2E
