"""The latents of new tokens on Hopper, from their projection to the cache in one kernel.

A warp has a token: 16 of its 512 numbers a lane, and four of the 64 rotary ones in the first 16 lanes. XLA takes a kernel for
each of the two reductions and for each of the three arrays that it scatters to.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.lanes import WARPS, Thread, Value, call_kernel, floats_of, rounded_numbers, sum_of_lanes
from pallas_kernels.latents import ROTARY, VALUE_DIM
from pallas_kernels.quant import E4M3_MAX, MIN_MAGNITUDE, Latents

LANE = VALUE_DIM // 32  # numbers of a lane
ROTARY_LANE = 4  # of the rotary ones
FEW = 128  # tokens: below, the launch of one more kernel costs what it saves


def why_not(
    cache: Latents,
    product: jax.Array,
    norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    *,
    start: int,
    eps: float,
) -> str | None:
    kinds = product.dtype, norm.dtype, cache.codes.dtype, cache.rotary.dtype
    if kinds != (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.bfloat16):
        return f"it takes projections in float32 and norms in bfloat16 to latents in 8 bits, not {[str(x) for x in kinds]}"
    if (norm.shape[0], cache.rotary.shape[-1]) != (VALUE_DIM, ROTARY):
        return f"latents have {VALUE_DIM} and {ROTARY} numbers, not {norm.shape[0]} and {cache.rotary.shape[-1]}"
    if start % 4 or product.shape[-1] % 4:
        return f"it reads pieces of 16 bytes: start {start} and width {product.shape[-1]} are no multiples of 4"
    if positions.size < FEW:
        return f"XLA's kernels for {positions.size} tokens are as fast"
    return None


def append_latents(
    cache: Latents,
    product: jax.Array,
    norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    *,
    start: int,
    eps: float,
) -> Latents:
    batch, tokens = positions.shape
    program = append_program(batch, tokens, cache.shape[1], product.shape[-1], start, eps)
    kept = jax.tree.map(jax.new_ref, cache)
    operands = [product, norm, cos, sin, positions, kept.codes, kept.rotary, kept.scales]
    call_kernel(program, operands, [], -(-positions.size // WARPS))
    return jax.tree.map(jax.freeze, kept)


def append_program(batch: int, tokens: int, length: int, of_row: int, start: int, eps: float) -> Callable[..., None]:
    """The kernel for tokens of `batch` rows, whose cache has `length` positions, in lines of `of_row` numbers."""

    def append_latents(
        product: Value,
        norm: Value,
        cos: Value,
        sin: Value,
        positions: Value,
        codes: Value,
        rotary: Value,
        scales: Value,
        block: Value,
    ) -> None:
        thread = Thread.current()
        token = block * WARPS + thread.warp
        exists = token.signed < batch * tokens
        token = ptx.min_s32(token, batch * tokens - 1)
        position = ptx.load_global(ptx.offset(positions, token, 4))
        line = ptx.offset(product, token, 4 * of_row)

        def numbers_at(address: Value, index: Value, count: int, loads: Value) -> list[Value]:
            at = ptx.offset(address, index, 4)
            pieces = [ptx.offset(at, ptx.constant(4 * i), 4) for i in range(count // 4)]
            return [ptx.float_of(word) for piece in pieces for word in ptx.load_global_words_or_zeros(piece, loads, 4)]

        always = ptx.constant(1)
        numbers = numbers_at(line, thread.lane * LANE + start, LANE, always)
        # Lanes beyond the rotary numbers compute those of lanes before them once more.
        lane = thread.lane % (ROTARY // ROTARY_LANE)
        pairs = numbers_at(line, lane * ROTARY_LANE + (start + VALUE_DIM), ROTARY_LANE, always)
        angle = token * (ROTARY // 2) + lane * (ROTARY_LANE // 2)
        turns = [[ptx.load_global_float(ptx.offset(of, angle + i, 4)) for i in range(ROTARY_LANE // 2)] for of in (cos, sin)]
        at = ptx.offset(norm, thread.lane * LANE, 2)
        pieces = [ptx.load_global_words_or_zeros(ptx.offset(at, ptx.constant(16 * i), 1), always, 4) for i in range(2)]
        weights = floats_of([word for piece in pieces for word in piece])

        total = ptx.number(0.0)
        for x in numbers:
            total = ptx.fma(x, x, total)
        factor = ptx.rsqrt(sum_of_lanes(total) * (1 / VALUE_DIM) + eps)
        values = rounded_numbers([x * factor * w for x, w in zip(numbers, weights, strict=True)])
        top = ptx.constant(int(np.float32(MIN_MAGNITUDE).view(np.int32)))
        for x in values:
            top = ptx.max_s32(top, ptx.magnitude_bits(x))
        scale = ptx.float_of(ptx.reduce_warp("max", top)) * float(np.float32(1 / E4M3_MAX))
        rotated: list[Value] = []
        for first, second, c, s in zip(pairs[::2], pairs[1::2], *turns, strict=True):
            rotated.append(first * c - second * s)
            rotated.append(second * c + first * s)

        inside = (position.signed >= 0) & (position.signed < length)
        writes = exists & inside
        row = token // tokens * length + ptx.max_s32(position, 0)
        scaled = [ptx.div_full(x, scale) for x in values]
        words = [ptx.to_e4m3_word(scaled[i : i + 4]) for i in range(0, LANE, 4)]
        ptx.store_global_words(ptx.offset(ptx.offset(codes, row, VALUE_DIM), thread.lane * LANE, 1), words, writes)
        turned = [ptx.div_full(x, scale) for x in rounded_numbers(rotated)]
        at = ptx.offset(ptx.offset(rotary, row, 2 * ROTARY), lane * ROTARY_LANE, 2)
        of_rotary = writes & (thread.lane.signed < ROTARY // ROTARY_LANE)
        for i in range(0, ROTARY_LANE, 2):
            ptx.store_global(ptx.offset(at, ptx.constant(i), 2), ptx.to_bfloat16_pair(*turned[i : i + 2]), of_rotary)
        of_scale = writes & thread.lane.equals(0)
        ptx.store_global(ptx.offset(scales, row, 4), ptx.bits_of(scale), of_scale)

    return append_latents
