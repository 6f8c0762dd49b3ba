"""What kernels of matrices in 8 bits do to single registers: scales by lane, operands from codes, results to memory.

A number that all threads load is a scalar to the compiler, which keeps it in a register of the whole warp and waits for it as
soon as it is asked for. So scales of two blocks of a matrix are kept in the lanes of each warp, one in the even lanes, one in
the odd ones: what lanes load for themselves may arrive while the warpgroup multiplies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels import hopper
from pallas_kernels.hopper import ptx

BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_SCALAR = plgpu.Layout.WG_SPLAT
_BY_THREAD = plgpu.Layout.WG_STRIDED((hopper.WARPGROUP,), vec_size=1)


def _struct(dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct((hopper.WARPGROUP,), dtype, layout=_BY_THREAD)


def _by_thread(x: Any, is_signed: bool | None = None) -> Any:
    registers = np.empty((1,), dtype=object)
    registers[0] = vector.broadcast(ir.VectorType.get((1,), x.type), x)
    return mgpu.FragmentedArray(_registers=registers, _layout=_BY_THREAD.to_mgpu(), _is_signed=is_signed)


def _number(register: Any) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def _is_odd() -> Any:
    return (ptx.thread() & 1).differs(0)


def alternate(even: jax.Array, odd: jax.Array) -> jax.Array:
    """The int32 scalar `even` in even lanes, `odd` in odd ones: an array with a number of each thread."""

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _SCALAR), return_type=_struct(jnp.int32))
    def choose(ctx: Any, even: Any, odd: Any) -> Any:
        return _by_thread(ptx.select(_is_odd(), ptx.scalar(odd), ptx.scalar(even)), is_signed=True)

    return choose(even, odd)


def load(scales: Any, places: jax.Array, step: jax.Array) -> jax.Array:
    """What each thread's lane finds at its own place + step of scales [...] float32 in global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _BY_THREAD, _SCALAR), return_type=_struct(jnp.float32))
    def run(ctx: Any, scales: Any, places: Any, step: Any) -> Any:
        place = _number(places.registers.item()) + ptx.scalar(step)
        return _by_thread(ptx.load_global_float(ptx.offset(ptx.global_address(scales), place, 4)))

    return run(scales, places, step)


def products(rows: jax.Array, alternating: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rows [64] times the number of the even lanes, and times that of the odd ones."""
    like = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=BY_ROW)

    @plgpu.inline_mgpu(arg_types=(BY_ROW, _BY_THREAD), return_type=(like, like))
    def run(ctx: Any, rows: Any, alternating: Any) -> Any:
        own = _number(alternating.registers.item())
        other, odd = ptx.lane_distant(own, 1), _is_odd()
        both = ptx.select(odd, other, own), ptx.select(odd, own, other)
        return tuple(rows * mgpu.FragmentedArray.splat(factor, rows.shape, rows.layout) for factor in both)

    return run(rows, alternating)


def store_some(target: Any, values: jax.Array, place: jax.Array, start: jax.Array, end: jax.Array) -> None:
    """Writes values[start:end] of values [64] to place + start .. place + end - 1 of target [...] float32 in global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), BY_ROW, _SCALAR, _SCALAR, _SCALAR))
    def run(ctx: Any, target: Any, values: Any, place: Any, start: Any, end: Any) -> None:
        lane = _lane()
        for i, register in enumerate(values.registers.reshape(-1)):
            row = lane.row + 8 * i
            inside = (row.signed >= ptx.scalar(start)) & (row.signed < ptx.scalar(end))
            one_lane = lane.quarter.equals(0)
            address = ptx.offset(ptx.global_address(target), ptx.max_s32(ptx.scalar(place) + row, 0), 4)
            ptx.store_global(address, ptx.bits_of(_number(register)), inside & one_lane)

    run(target, values, place, start, end)


def float16_operand(codes: Any, half: int) -> jax.Array:
    """Half of codes [64, 128] in shared memory, tiled and swizzled by lines of 128, as wgmma's first operand [64, 64] float16.

    Of every row a lane takes 16 codes that lie side by side, those of four steps of wgmma. So the operand's columns are those
    of the codes in another order: column 16 s + 8 h + 2 q + b is code 16 q + 4 s + 2 h + b.
    """
    result = plgpu.ShapeDtypeStruct((64, 64), jnp.float16, layout=plgpu.Layout.WGMMA)
    kind = plgpu.RefType((plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)))

    @plgpu.inline_mgpu(arg_types=(kind,), return_type=result)
    def run(ctx: Any, codes: Any) -> Any:
        lane = _lane()
        chunk = (lane.quarter + 4 * half) ^ (lane.row & 7)
        address = ptx.shared_address(codes) + lane.row * 128 + chunk * 16
        registers = np.empty((8, 2), dtype=object)
        for which in range(2):  # the row, and the one 8 further down: the next tile of 8 rows
            for step, word in enumerate(ptx.load_shared_words(address + 1024 * which)):
                for pair, numbers in enumerate(ptx.float16_pairs(word)):
                    registers[2 * step + pair, which] = numbers
        layout = plgpu.Layout.WGMMA.to_mgpu()
        shape = layout.registers_shape((64, 64))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return run(codes)


@dataclasses.dataclass(frozen=True)
class _Lane:
    """Where the registers of an array [64, n] in the layout of wgmma's results are: of 16 rows of a warp, a thread has
    `row` and row + 8, and of every 8 columns 2 * `quarter` and the next."""

    row: Any
    quarter: Any


def _lane() -> _Lane:
    thread = ptx.thread() & (hopper.WARPGROUP - 1)
    lane = thread % 32
    return _Lane(thread // 32 * 16 + lane // 4, lane % 4)


def _numbers(register: Any) -> list[Any]:
    """The two numbers of a register of such an array."""
    return [vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])) for i in range(2)]


def store_rows(target: Any, values: jax.Array, row: jax.Array, start: jax.Array, end: jax.Array, column: jax.Array) -> None:
    """values [64, n] float32 to target[row : row + 64, column : column + n] in global memory, bfloat16 or float8_e4m3fn.

    Only the rows from start to end are written, and only the columns that there are. Lanes exchange what they have until each
    has 16 bytes that lie side by side, 64 bytes with its neighbours.
    """
    wgmma, width = plgpu.Layout.WGMMA, target.shape[1]
    in_bytes = jnp.dtype(target.dtype).itemsize == 1

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), wgmma, *(_SCALAR,) * 4))
    def run(ctx: Any, target: Any, values: Any, row: Any, start: Any, end: Any, column: Any) -> None:
        lane = _lane()
        tiles = values.registers.reshape(-1, 2)
        for which in range(2):
            at = ptx.scalar(row) + lane.row + 8 * which
            inside = (at.signed >= ptx.scalar(start)) & (at.signed < ptx.scalar(end))
            pairs = [_numbers(register) for register in tiles[:, which]]
            words = _code_words(pairs) if in_bytes else [ptx.to_bfloat16_pair(*pair) for pair in pairs]
            for first in range(0, len(words), 4):
                own = ptx.transposed_among_lanes(words[first : first + 4], lane.quarter)
                if in_bytes:
                    own = _halves_joined(own)
                piece = 16 if in_bytes else 8  # columns
                place = ptx.scalar(column) + lane.quarter * piece + first * piece
                start_of_row = ptx.offset(ptx.global_address(target), at, width * (1 if in_bytes else 2))
                address = ptx.offset(start_of_row, place, 1 if in_bytes else 2)
                ptx.store_global_words(address, own, inside & (place.signed < width))

    run(target, values, row, start, end, column)


def _code_words(pairs: list[Any]) -> list[Any]:
    """Words of two pairs of codes each, which lie 8 columns apart."""
    return [ptx.to_e4m3_word([*pairs[i], *pairs[i + 1]]) for i in range(0, len(pairs), 2)]


def _halves_joined(words: list[Any]) -> list[Any]:
    """The low halves of four words, then their high halves."""
    a, b, c, d = words
    low = [(x & 0xFFFF) | (y << 16) for x, y in ((a, b), (c, d))]
    high = [(x >> 16) | (y & -0x10000) for x, y in ((a, b), (c, d))]
    return low + high


def store_transposed(
    target: Any, values: jax.Array, row: jax.Array, begin: jax.Array, end: jax.Array, column: jax.Array
) -> None:
    """values [64, R] as bfloat16 to target[row : row + R, column : column + 64] in global memory.

    Only the rows from begin to end are written, and only the columns that there are.
    """
    wgmma = plgpu.Layout.WGMMA
    total = target.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), wgmma, _SCALAR, _SCALAR, _SCALAR, _SCALAR))
    def run(ctx: Any, target: Any, values: Any, row: Any, begin: Any, end: Any, column: Any) -> None:
        lane = _lane()
        own_column = ptx.scalar(column) + lane.row
        own_row = ptx.scalar(row) + lane.quarter * 2
        for tile, pair in enumerate(values.registers.reshape(-1, 2)):
            for which, register in enumerate(pair):
                at = own_column + 8 * which
                for i, number in enumerate(_numbers(register)):
                    line = own_row + (8 * tile + i)
                    inside = (line.signed >= ptx.scalar(begin)) & (line.signed < ptx.scalar(end))
                    inside = inside & (at.signed < total)
                    address = ptx.offset(ptx.offset(ptx.global_address(target), line, 2 * total), at, 2)
                    ptx.store_global_bfloat16(address, number, inside)

    run(target, values, row, begin, end, column)
