"""What the kernels for rows of activations on Hopper share: a grid of small blocks whose warps each have rows of their own.

Such a kernel reads and writes every number once, in pieces of 16 bytes a lane, and its warps never wait for one another. So it
is as fast as memory where enough loads are under way: many small blocks, and in each thread several loads before the first
result is used. Importing this needs JAX's Mosaic GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ptx

WARPGROUPS = 2
WARPS = 4 * WARPGROUPS
THREADS = 32 * WARPS

Value = Any
Program = Callable[..., None]  # of the addresses of all arrays, inputs first, and the number of a block


def call_kernel(program: Program, operands: Sequence[jax.Array], outputs: Sequence[jax.ShapeDtypeStruct], blocks: int) -> Any:
    """Runs `program`, written in `ptx`, in every thread of so many blocks. The arrays that it writes."""
    number, arrays = plgpu.Layout.WG_SPLAT(()), len(operands) + len(outputs)

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * arrays, number))
        def run(ctx: Any, *values: Any) -> None:
            *arrays, block = values
            program(*map(ptx.global_address, arrays), ptx.scalar(block))

        run(*refs, jax.lax.axis_index("block"))

    body.__name__ = program.__name__
    return plgpu.kernel(
        body,
        out_type=tuple(outputs),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*operands)


def lane_and_warp() -> tuple[Value, Value]:
    """This thread's lane, and the number of its warp in the block."""
    thread = ptx.thread()
    return ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)


def floats_of(words: Sequence[Value]) -> list[Value]:
    """bfloat16 numbers, two a word, as float32."""
    return [x for word in words for x in ptx.from_bfloat16_pair(word)]


def bfloat16_words(numbers: Sequence[Value]) -> list[Value]:
    """float32 numbers rounded to bfloat16, two a word."""
    return [ptx.to_bfloat16_pair(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def sum_of_lanes(x: Value) -> Value:
    """The sum of a float32 over the warp, the same in all lanes."""
    for distance in (16, 8, 4, 2, 1):
        x = ptx.plus(x, ptx.lane_distant(x, distance))
    return x
