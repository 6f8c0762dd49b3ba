"""Queries in 8 bits and their weights, in the order of the scores' columns, on Hopper in one pass.

The order is that of `in_columns` in mosaic_gpu_scores_epilogue.py, and the weight of a head becomes NaN where one of its codes
is, which the saturation of the epilogue would lose. XLA moves single bytes, and reads all codes once more for the test. Here
eight lanes move the 128 codes of a head, 16 bytes each, and test four codes at a time: 0x7F and 0xFF alone are NaN, so adding 1
to seven bits of a code carries into the eighth for a NaN only.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.lanes import WARPS, Thread, Value, call_kernel

WIDTH = 128  # codes of a head
PIECE = 16  # bytes of a lane
LANES = WIDTH // PIECE  # that move a head
STEPS = 2  # heads of eight lanes
NAN_BITS = 0x7FC00000


def in_columns(queries: jax.Array, weights: jax.Array, tile: int, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Queries [B, S, Hi, 128] in float8_e4m3fn and weights [B, S, Hi] float32 as the columns of tiles of `tile` queries.

    Returns [B, S' Hi, 128] and [B, S' Hi]; S' is S rounded up to `multiple` tiles, and added queries are zeros.
    """
    b, s, heads, _ = queries.shape
    columns = -(-s // (tile * multiple)) * tile * multiple * heads
    program, blocks = columns_program(b, s, heads, tile, columns)
    outputs = [jax.ShapeDtypeStruct((b, columns, WIDTH), queries.dtype), jax.ShapeDtypeStruct((b, columns), jnp.float32)]
    codes, moved = call_kernel(program, [queries, weights], outputs, blocks)
    return codes, moved


def columns_program(batch: int, queries: int, heads: int, tile: int, columns: int) -> tuple[Callable[..., None], int]:
    """The kernel for `columns` columns of every batch row, and its number of blocks."""
    of_step, total = 32 // LANES, batch * columns
    of_query = 8 // tile  # neighbouring columns that are heads of one query

    def scores_columns(codes: Value, weights: Value, out_codes: Value, out_weights: Value, block: Value) -> None:
        thread = Thread.current()
        first = (block * WARPS + thread.warp) * STEPS * of_step + (thread.lane >> 3)
        at_byte = (thread.lane & (LANES - 1)) * PIECE
        moved = []
        for step in range(STEPS):
            column = first + step * of_step
            exists = column.signed < total
            row, own = column // columns, column % columns
            query = own // (tile * heads) * tile + own % 8 // of_query
            head = own % (tile * heads) // 8 * of_query + own % of_query
            source = (row * queries + query) * heads + head
            given = ptx.select(exists & (query.signed < queries), 1, 0)
            at = ptx.offset(ptx.offset(codes, source, WIDTH), at_byte, 1)
            words = ptx.load_global_words_or_zeros(at, given, 4)
            weight = ptx.load_global_float_or_zero(ptx.offset(weights, source, 4), given)
            moved.append((column, exists, words, weight))
        for column, exists, words, weight in moved:
            nan = ptx.constant(0)
            for word in words:
                nan = nan | (((word & 0x7F7F7F7F) + 0x01010101) & 0x80808080)
            for distance in (1, 2, 4):
                nan = nan | ptx.bits_of(ptx.lane_distant(ptx.float_of(nan), distance))
            weight_bits = ptx.select(nan.equals(0), ptx.bits_of(weight), NAN_BITS)
            ptx.store_global_words(ptx.offset(ptx.offset(out_codes, column, WIDTH), at_byte, 1), words, exists)
            ptx.store_global(ptx.offset(out_weights, column, 4), weight_bits, exists & at_byte.equals(0))

    return scores_columns, -(-total // (WARPS * STEPS * of_step))
