"""Rows in 8 bits on Hopper, in one pass over memory.

XLA reads the numbers once for the scales and once more for the codes, in kernels of their own, and writes scales row by row,
which a product's kernel wants column by column. Here a lane has 16 numbers that lie side by side, 16 bytes of codes, and 8
lanes exchange the largest magnitude of the 128 that share a scale. Where rows are normalised first, a warp has a whole row and
keeps it in registers between the sum of squares and the codes; else all groups of 128 are alike, whatever row they are of.

Scales are written [K / 128, M], which is how the product's kernel reads them; XLA drops the two transpositions between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.lanes import (
    WARPS,
    Thread,
    Value,
    bfloat16_words,
    call_kernel,
    floats_of,
    largest_of_group,
    sum_of_lanes,
)
from pallas_kernels.quant import BLOCK, E4M3_MAX, MIN_MAGNITUDE, Scaled

LANE = 16  # numbers of a lane: 16 bytes of codes
LANES = BLOCK // LANE  # that share a scale
SPAN = 32 * LANE  # numbers that a warp has at a time
STEPS = 1  # times SPAN of a warp where rows are not normalised
KEPT = 6  # times SPAN of a row that a warp keeps in registers; a wider one it reads once more
MAX_WIDTH = 16 * SPAN
INFINITY_BITS = 0x7F800000


def _why_not(rows: jax.Array, width: int, *dtypes: Any) -> str | None:
    if rows.dtype not in dtypes:
        return f"it reads rows in {' or '.join(jnp.dtype(dtype).name for dtype in dtypes)}, not {rows.dtype}"
    if width % BLOCK or not rows.size:
        return f"it writes rows of whole blocks of {BLOCK} numbers, they are [{rows.shape[0]}, {width}]"
    return None


def why_not(rows: jax.Array) -> str | None:
    return _why_not(rows, rows.shape[1], jnp.bfloat16)


def why_not_swiglu(gate_up: jax.Array) -> str | None:
    return _why_not(gate_up, gate_up.shape[1] // 2, jnp.bfloat16)


def why_not_normalise(
    rows: jax.Array, weight: jax.Array, eps: float, *, plain: bool = True, in_8_bits: bool = True
) -> str | None:
    if weight.dtype != jnp.bfloat16:
        return f"its weight is in bfloat16, not {weight.dtype}"
    if weight.shape[0] > MAX_WIDTH:
        return f"a warp normalises rows of at most {MAX_WIDTH} numbers, they have {weight.shape[0]}"
    if rows.shape[1] % LANES:
        return f"it reads rows of a multiple of {LANES} numbers, they have {rows.shape[1]}"
    return _why_not(rows, weight.shape[0], jnp.bfloat16, jnp.float32)


def quantise_rows(rows: jax.Array) -> Scaled:
    return _quantise(rows, rows.shape[1], _plain)


def quantise_swiglu(gate_up: jax.Array) -> Scaled:
    return _quantise(gate_up, gate_up.shape[1] // 2, _swiglu)


def _outputs(rows: int, width: int) -> list[jax.ShapeDtypeStruct]:
    """Codes, and scales [K / 128, M]."""
    codes = jax.ShapeDtypeStruct((rows, width), jnp.float8_e4m3fn)
    return [codes, jax.ShapeDtypeStruct((width // BLOCK, rows), jnp.float32)]


def _quantise(rows: jax.Array, width: int, numbers_at: Callable[..., Any]) -> Scaled:
    program, blocks = groups_program(rows.shape[0], width, numbers_at)
    codes, scales = call_kernel(program, [rows], _outputs(rows.shape[0], width), blocks)
    return Scaled(codes, scales.T)


def groups_program(rows: int, width: int, numbers_at: Callable[..., Any]) -> tuple[Callable[..., None], int]:
    """The kernel for rows of `width` numbers, each lane's of which numbers_at finds, and its number of blocks."""
    groups = rows * (width // BLOCK)
    of_warp = STEPS * SPAN // BLOCK

    def quantise_rows(source: Value, codes: Value, scales: Value, block: Value) -> None:
        thread = Thread.current()
        first = (block * WARPS + thread.warp) * of_warp + (thread.lane >> 3)
        tasks = []
        for step in range(STEPS):
            group = first + step * SPAN // BLOCK
            exists = group.signed < groups
            row, column = group // (width // BLOCK), group % (width // BLOCK)
            column = column * BLOCK + (thread.lane & (LANES - 1)) * LANE
            tasks.append((row, column, exists, numbers_at(source, width, row, column, ptx.select(exists, 1, 0))))
        for row, column, exists, numbers in tasks:
            _store(codes, scales, rows, width, row, column, exists, numbers())

    return quantise_rows, -(-groups // (WARPS * of_warp))


def loaded(source: Value, width: int, row: Value, column: Value, exists: Value, itemsize: int = 2) -> list[Value]:
    """The words of LANE numbers in rows of `width`, zeros where they do not exist."""
    at = ptx.offset(ptx.offset(source, row, itemsize * width), column, itemsize)
    pieces = [ptx.offset(at, ptx.constant(16 * i), 1) for i in range(LANE * itemsize // 16)]
    return [word for piece in pieces for word in ptx.load_global_words_or_zeros(piece, exists, 4)]


def _plain(source: Value, width: int, row: Value, column: Value, exists: Value) -> Callable[[], list[Value]]:
    words = loaded(source, width, row, column, exists)
    return lambda: floats_of(words)


def _swiglu(source: Value, width: int, row: Value, column: Value, exists: Value) -> Callable[[], list[Value]]:
    halves = [loaded(source, 2 * width, row, column + start, exists) for start in (0, width)]

    def numbers() -> list[Value]:
        gates, ups = map(floats_of, halves)
        return [gate * _sigmoid(gate) * up for gate, up in zip(gates, ups, strict=True)]

    return numbers


def _sigmoid(x: Value) -> Value:
    power = ptx.exp2(x * -np.log2(np.e))
    return ptx.rcp(power + 1.0)


def _store(
    codes: Value, scales: Value, rows: int, width: int, row: Value, column: Value, exists: Value, numbers: Sequence[Value]
) -> None:
    """Writes LANE numbers in 8 bits, and a group's scale."""
    top = largest_of_group(numbers)
    least = int(np.float32(MIN_MAGNITUDE).view(np.int32))
    scale = ptx.float_of(ptx.max_s32(top, least)) * float(np.float32(1 / E4M3_MAX))
    scale = ptx.select(top.signed < INFINITY_BITS, scale, ptx.number(float("nan")))
    inverse = ptx.rcp(scale)
    products = [number * inverse for number in numbers]
    words = [ptx.to_e4m3_word(products[i : i + 4]) for i in range(0, LANE, 4)]
    ptx.store_global_words(ptx.offset(ptx.offset(codes, row, width), column, 1), words, exists)
    group = column >> (BLOCK.bit_length() - 1)
    writes = exists & (column & (BLOCK - 1)).equals(0)
    ptx.store_global(ptx.offset(ptx.offset(scales, group, 4 * rows), row, 4), ptx.bits_of(scale), writes)


def normalise_rows(
    rows: jax.Array, weight: jax.Array, eps: float, *, plain: bool = True, in_8_bits: bool = True
) -> tuple[jax.Array | None, Scaled | None]:
    (m, of_row), width = rows.shape, weight.shape[0]
    program = normalise_program(m, of_row, width, eps, rows.dtype == jnp.float32, plain, in_8_bits)
    outputs = [jax.ShapeDtypeStruct((m, width), jnp.bfloat16)] * plain + _outputs(m, width) * in_8_bits
    results = list(call_kernel(program, [rows, weight], outputs, -(-m // WARPS)))
    normalised = results.pop(0) if plain else None
    return normalised, Scaled(results[0], results[1].T) if in_8_bits else None


def normalise_program(
    rows: int, of_row: int, width: int, eps: float, in_float32: bool, plain: bool = True, in_8_bits: bool = True
) -> Callable[..., None]:
    """The kernel for the first `width` of rows of `of_row` numbers, bfloat16 or float32. Its results are those asked for."""

    pieces = -(-width // SPAN)
    itemsize = 4 if in_float32 else 2

    def normalise_rows(source: Value, weight: Value, *results_and_block: Value) -> None:
        *results, block = results_and_block
        thread = Thread.current()
        row = block * WARPS + thread.warp
        in_rows = row.signed < rows

        def place(piece: Value | int) -> tuple[Value, Value]:
            """The column of this lane's numbers of a piece, and whether they exist."""
            column = thread.lane * LANE + piece * SPAN
            return column, in_rows & (column.signed < width)

        def load(piece: Value | int) -> list[Value]:
            column, exists = place(piece)
            return loaded(source, of_row, row, column, ptx.select(exists, 1, 0), itemsize)

        def numbers(words: Sequence[Value]) -> list[Value]:
            return list(map(ptx.float_of, words)) if in_float32 else floats_of(words)

        def squares_added(total: Value, words: Sequence[Value]) -> Value:
            for x in numbers(words):
                total = ptx.fma(x, x, total)
            return total

        def write(piece: Value | int, words: Sequence[Value], factor: Value) -> None:
            column, exists = place(piece)
            weights = floats_of(loaded(weight, width, ptx.constant(0), column, ptx.select(exists, 1, 0)))
            scaled = [x * factor for x in numbers(words)]
            if not in_float32:
                scaled = floats_of(bfloat16_words(scaled))
            result = bfloat16_words([x * w for x, w in zip(scaled, weights, strict=True)])
            if plain:
                at = ptx.offset(ptx.offset(results[0], row, 2 * width), column, 2)
                for i in range(2):
                    ptx.store_global_words(ptx.offset(at, ptx.constant(16 * i), 1), result[4 * i : 4 * i + 4], exists)
            if in_8_bits:
                codes, scales = results[-2:]
                _store(codes, scales, rows, width, row, column, exists, floats_of(result))

        def factor_of(total: Value) -> Value:
            mean = sum_of_lanes(total) * (1 / width)
            return ptx.rsqrt(mean + eps)

        if pieces <= KEPT:
            kept, total = list(map(load, range(pieces))), ptx.number(0.0)
            for words in kept:
                total = squares_added(total, words)
            factor = factor_of(total)
            for piece, words in enumerate(kept):
                write(piece, words, factor)
            return

        def write_one(piece: Value, carry: list[Value]) -> list[Value]:
            write(piece, load(piece), carry[0])
            return carry

        count, zero = ptx.constant(pieces), ptx.number(0.0)
        (total,) = ptx.loop(count, [zero], lambda piece, carry: [squares_added(carry[0], load(piece))])
        ptx.loop(count, [factor_of(total)], write_one)

    return normalise_rows
