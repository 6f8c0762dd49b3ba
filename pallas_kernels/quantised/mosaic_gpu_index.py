"""Index queries in 8 bits on Hopper: rotated, and with a power-of-two scale a head, in one pass over their projection.

A group of 128 numbers of mosaic_gpu is a head here. Pairs that are rotated are neighbours, so each lies within a lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.lanes import WARPS, Thread, Value, call_kernel, floats_of, largest_of_group, rounded_numbers
from pallas_kernels.quant import E4M3_MAX, INDEX_GROUP, MIN_MAGNITUDE
from pallas_kernels.quantised.mosaic_gpu import INFINITY_BITS, LANE, LANES, SPAN, loaded

STEPS = 2  # times SPAN of a warp
EXPONENT, MANTISSA = 0x7F800000, 0x7FFFFF


def why_not(product: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> str | None:
    if product.dtype != jnp.bfloat16:
        return f"it reads projections in bfloat16, not {product.dtype}"
    if not interleaved:
        return "it rotates pairs of neighbours"
    if product.shape[2] != INDEX_GROUP or 2 * cos.shape[1] > INDEX_GROUP or 2 * cos.shape[1] % LANE or not product.size:
        return f"it takes heads of {INDEX_GROUP} of which a multiple of {LANE} is rotated, not {product.shape} and {cos.shape}"
    return None


def quantise_index_queries(
    product: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool
) -> tuple[jax.Array, jax.Array]:
    del interleaved
    m, heads, _ = product.shape
    program, blocks = index_program(m, heads, 2 * cos.shape[1])
    outputs = [jax.ShapeDtypeStruct((m, heads, INDEX_GROUP), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((m, heads), jnp.float32)]
    codes, scales = call_kernel(program, [product, cos, sin], outputs, blocks)
    return codes, scales


def _turns(address: Value, loads: Value) -> list[Value]:
    """The cosines or sines of a lane's pairs."""
    pieces = [ptx.offset(address, ptx.constant(16 * i), 1) for i in range(LANE // 2 // 4)]
    return [ptx.float_of(word) for piece in pieces for word in ptx.load_global_words_or_zeros(piece, loads, 4)]


def index_program(rows: int, heads: int, rotary: int) -> tuple[Callable[..., None], int]:
    """The kernel for rows of so many heads, of which the first `rotary` numbers are rotated, and its number of blocks."""
    of_warp, total = STEPS * SPAN // INDEX_GROUP, rows * heads

    def quantise_index_queries(product: Value, cos: Value, sin: Value, codes: Value, scales: Value, block: Value) -> None:
        thread = Thread.current()
        first = (block * WARPS + thread.warp) * of_warp + (thread.lane >> 3)
        column = (thread.lane & (LANES - 1)) * LANE
        rotates = column.signed < rotary
        tasks: list[Any] = []
        for step in range(STEPS):
            head = first + step * SPAN // INDEX_GROUP
            exists = head.signed < total
            words = loaded(product, INDEX_GROUP, head, column, ptx.select(exists, 1, 0))
            turned = ptx.select(exists & rotates, 1, 0)
            angle = head // heads * (rotary // 2) + (column >> 1)
            turns = [_turns(ptx.offset(of, angle, 4), turned) for of in (cos, sin)]
            tasks.append((head, exists, words, turns))
        for head, exists, words, turns in tasks:
            numbers = floats_of(words)
            rotated: list[Value] = []
            for a, b, c, s in zip(numbers[::2], numbers[1::2], *turns, strict=True):
                rotated.append(a * c - b * s)
                rotated.append(b * c + a * s)
            rotated = rounded_numbers(rotated)
            numbers = [ptx.select(rotates, r, x) for r, x in zip(rotated, numbers, strict=True)]
            top = largest_of_group(numbers)
            least = ptx.constant(int(np.float32(MIN_MAGNITUDE).view(np.int32)))
            scale = ptx.float_of(ptx.max_s32(top, least)) * float(np.float32(1 / E4M3_MAX))
            # Up to a power of two, whose inverse is exact.
            bits = (ptx.bits_of(scale) + MANTISSA) & EXPONENT
            inverse = ptx.float_of((254 << 23) - bits)
            nan = ptx.number(float("nan"))
            finite = top.signed < INFINITY_BITS
            inverse, scale = (ptx.select(finite, x, nan) for x in (inverse, ptx.float_of(bits)))
            scaled = [x * inverse for x in numbers]
            out = [ptx.to_e4m3_word(scaled[i : i + 4]) for i in range(0, LANE, 4)]
            ptx.store_global_words(ptx.offset(ptx.offset(codes, head, INDEX_GROUP), column, 1), out, exists)
            ptx.store_global(ptx.offset(scales, head, 4), ptx.bits_of(scale), exists & column.equals(0))

    return quantise_index_queries, -(-total // (WARPS * of_warp))
