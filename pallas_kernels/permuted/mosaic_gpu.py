"""Rows in another order on Hopper, and weighted sums of rows that stand apart.

A warp moves two rows, or adds up 512 numbers of a token: all loads of what it needs are under way before the first is used.
XLA's gather of rows in 8 bits moves single bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.lanes import WARPS, Thread, Value, bfloat16_words, call_kernel, floats_of
from pallas_kernels.permuted import reference
from pallas_kernels.quant import Scaled

PIECE = 16  # bytes of a lane
ROWS = 2  # that a warp moves
MAX_BYTES = 32 * 32 * PIECE  # of a row
NUMBERS = 8  # of a lane: 16 bytes of bfloat16
SPANS = 2  # times 32 * NUMBERS of a token that a warp adds up


def why_not(rows: jax.Array | Scaled, index: jax.Array) -> str | None:
    if not isinstance(rows, Scaled):
        return f"it moves rows in 8 bits, not in {rows.dtype}"
    if rows.scales.dtype != jnp.float32:
        return f"it moves float32 scales, not {rows.scales.dtype}"
    if not index.size:
        return "there are no rows to move: the index is empty"
    if rows.shape[1] % PIECE or rows.shape[1] > MAX_BYTES:
        return f"it moves rows of a multiple of {PIECE} and at most {MAX_BYTES} codes, they have {rows.shape[1]}"
    return None


def gather_rows(rows: Scaled, index: jax.Array) -> Scaled:
    (n, width), (m,), groups = rows.shape, index.shape, rows.scales.shape[1]
    outputs = [jax.ShapeDtypeStruct((m, width), rows.dtype), jax.ShapeDtypeStruct((groups, m), jnp.float32)]
    program = gather_program(n, m, width, groups)
    codes, scales = call_kernel(program, [index, rows.codes, rows.scales.T], outputs, -(-m // (ROWS * WARPS)))
    return Scaled(codes, scales.T)


def gather_program(source_rows: int, rows: int, width: int, groups: int) -> Callable[..., None]:
    """The kernel that moves rows of `width` bytes, and their scales [groups, source_rows] to [groups, rows]."""

    def gather_rows(index: Value, codes: Value, scales: Value, out_codes: Value, out_scales: Value, block: Value) -> None:
        thread = Thread.current()
        first = (block * WARPS + thread.warp) * ROWS
        moved = []
        for i in range(ROWS):
            row = first + i
            exists = row.signed < rows
            moved.append((row, exists, ptx.load_global(ptx.offset(index, ptx.min_s32(row, rows - 1), 4))))
        loaded = []
        for row, exists, source in moved:
            for start in range(0, width, 32 * PIECE):
                column = thread.lane * PIECE + start
                inside = exists & (column.signed < width)
                at = ptx.offset(ptx.offset(codes, source, width), column, 1)
                words = ptx.load_global_words_or_zeros(at, ptx.select(inside, 1, 0), 4)
                loaded.append((ptx.offset(ptx.offset(out_codes, row, width), column, 1), words, inside))
            for start in range(0, groups, 32):
                group = thread.lane + start
                inside = exists & (group.signed < groups)
                at = ptx.offset(ptx.offset(scales, group, 4 * source_rows), source, 4)
                word = ptx.bits_of(ptx.load_global_float_or_zero(at, ptx.select(inside, 1, 0)))
                loaded.append((ptx.offset(ptx.offset(out_scales, group, 4 * rows), row, 4), [word], inside))
        for at, words, inside in loaded:
            if len(words) == 1:
                ptx.store_global(at, words[0], inside)
            else:
                ptx.store_global_words(at, words, inside)

    return gather_rows


def why_not_sum(
    rows: jax.Array, places: jax.Array, weights: jax.Array, added: tuple[jax.Array, ...] = (), dtype: Any = jnp.float32
) -> str | None:
    if any(x.dtype != jnp.bfloat16 for x in (rows, *added)) or weights.dtype != jnp.float32:
        kinds = [str(x.dtype) for x in (rows, *added, weights)]
        return f"it adds up rows in bfloat16 with weights in float32, these are in {', '.join(kinds)}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"its sums are in bfloat16 or float32, not {jnp.dtype(dtype)}"
    if not places.size:
        return f"there is nothing to add up: places are {places.shape}"
    if rows.shape[1] % NUMBERS:
        return f"it reads rows of a multiple of {NUMBERS} numbers, they have {rows.shape[1]}"
    return None


def sum_rows(
    rows: jax.Array, places: jax.Array, weights: jax.Array, added: tuple[jax.Array, ...] = (), dtype: Any = jnp.float32
) -> jax.Array:
    """Its gradient is that of the reference."""
    return _sum(rows, places, weights, added, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum(rows: jax.Array, places: jax.Array, weights: jax.Array, added: tuple[jax.Array, ...], dtype: Any) -> jax.Array:
    (n, k), d = places.shape, rows.shape[1]
    program, blocks = sum_program(n, k, d, len(added), dtype == jnp.float32)
    return call_kernel(program, [places, weights, rows, *added], [jax.ShapeDtypeStruct((n, d), dtype)], blocks)[0]


def _sum_and_keep(*arguments: Any) -> tuple[jax.Array, Any]:
    return _sum(*arguments), arguments[:4]


def _backward_sum(dtype: Any, residuals: Any, cotangent: jax.Array) -> Any:
    rows, places, weights, added = residuals
    _, pull = jax.vjp(
        lambda rows, weights, added: reference.sum_rows(rows, places, weights, added, dtype), rows, weights, added
    )
    of_rows, of_weights, of_added = pull(cotangent)
    return of_rows, None, of_weights, of_added


_sum.defvjp(_sum_and_keep, _backward_sum)


def sum_program(tokens: int, k: int, width: int, others: int, in_float32: bool) -> tuple[Callable[..., None], int]:
    """The kernel that adds up k rows of `width` numbers for a token, and `others` of its own; and its number of blocks."""
    span = SPANS * 32 * NUMBERS
    of_token = -(-width // span)
    itemsize = 4 if in_float32 else 2

    def sum_rows(places: Value, weights: Value, rows: Value, *others_out_block: Value) -> None:
        *added, out, block = others_out_block
        thread = Thread.current()
        task = block * WARPS + thread.warp
        token, start = task // of_token, task % of_token * span
        exists = token.signed < tokens
        first = ptx.min_s32(token, tokens - 1) * k
        at = [first + j for j in range(k)]
        sources = [ptx.load_global(ptx.offset(places, i, 4)) for i in at]
        factors = [ptx.load_global_float(ptx.offset(weights, i, 4)) for i in at]
        pieces = []
        for i in range(SPANS):
            column = start + thread.lane * NUMBERS + 32 * NUMBERS * i
            inside = exists & (column.signed < width)
            loads = ptx.select(inside, 1, 0)
            lines = [(rows, source) for source in sources] + [(other, token) for other in added]
            read = [
                ptx.load_global_words_or_zeros(ptx.offset(ptx.offset(array, line, 2 * width), column, 2), loads, 4)
                for array, line in lines
            ]
            pieces.append((column, inside, read))
        for column, inside, read in pieces:
            sums = [ptx.number(0.0)] * NUMBERS
            for words, factor in zip(read, factors, strict=False):
                sums = [ptx.fma(factor, x, total) for total, x in zip(sums, floats_of(words), strict=True)]
            for words in read[k:]:
                sums = [total + x for total, x in zip(sums, floats_of(words), strict=True)]
            target = ptx.offset(ptx.offset(out, token, itemsize * width), column, itemsize)
            result = list(map(ptx.bits_of, sums)) if in_float32 else bfloat16_words(sums)
            for i in range(0, len(result), 4):
                ptx.store_global_words(ptx.offset(target, ptx.constant(4 * i), 1), result[i : i + 4], inside)

    return sum_rows, -(-tokens * of_token // WARPS)
