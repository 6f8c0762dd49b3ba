"""Scales of two blocks of a matrix, kept in the lanes of each warp: one in the even lanes and one in the odd ones.

A number that all threads load is a scalar to the compiler, which keeps it in a register of the whole warp and waits for it as
soon as it is asked for. What lanes load for themselves may arrive while the warpgroup multiplies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels import hopper, ptx

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
    return ptx.compare("ne", ptx.bit_and(ptx.thread(), 1), 0)


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
        place = ptx.add(_number(places.registers.item()), ptx.scalar(step))
        return _by_thread(ptx.load_global_float(ptx.offset(ptx.global_address(scales), place, 4)))

    return run(scales, places, step)


def products(rows: jax.Array, alternating: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rows [64] times the number of the even lanes, and times that of the odd ones."""
    like = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=BY_ROW)

    @plgpu.inline_mgpu(arg_types=(BY_ROW, _BY_THREAD), return_type=(like, like))
    def run(ctx: Any, rows: Any, alternating: Any) -> Any:
        own = _number(alternating.registers.item())
        other, odd = ptx.lane_distant(own, 1), _is_odd()
        both = ptx.either(odd, other, own), ptx.either(odd, own, other)
        return tuple(rows * mgpu.FragmentedArray.splat(factor, rows.shape, rows.layout) for factor in both)

    return run(rows, alternating)


def store_some(target: Any, values: jax.Array, place: jax.Array, start: jax.Array, end: jax.Array) -> None:
    """Writes values[start:end] of values [64] to place + start .. place + end - 1 of target [...] float32 in global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), BY_ROW, _SCALAR, _SCALAR, _SCALAR))
    def run(ctx: Any, target: Any, values: Any, place: Any, start: Any, end: Any) -> None:
        thread = ptx.bit_and(ptx.thread(), hopper.WARPGROUP - 1)
        warp, lane = ptx.div(thread, 32), ptx.rem(thread, 32)
        first = ptx.add(ptx.mul(warp, 16), ptx.div(lane, 4))
        for i, register in enumerate(values.registers.reshape(-1)):
            row = ptx.add(first, 8 * i)
            inside = ptx.both(ptx.compare("sge", row, ptx.scalar(start)), ptx.compare("slt", row, ptx.scalar(end)))
            one_lane = ptx.compare("eq", ptx.bit_and(lane, 3), 0)
            address = ptx.offset(ptx.global_address(target), ptx.maximum(ptx.add(ptx.scalar(place), row), 0), 4)
            ptx.store_global(address, ptx.bits_of(_number(register)), ptx.both(inside, one_lane))

    run(target, values, place, start, end)
