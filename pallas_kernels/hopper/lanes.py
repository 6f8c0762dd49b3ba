"""What the kernels for rows of activations on Hopper share: a grid of small blocks whose warps each have rows of their own.

Such a kernel reads and writes every number once, in pieces of 16 bytes a lane, and its warps never wait for one another. So it
is as fast as memory where enough loads are under way: many small blocks, and in each thread several loads before the first
result is used. Importing this needs JAX's Mosaic GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ptx

WARPGROUPS = 2
WARPS = 4 * WARPGROUPS
THREADS = 32 * WARPS

Value = Any
# Of the addresses of all arrays, inputs first, and the number of a block; and of shared memory where there is any.
Program = Callable[..., None]


def call_kernel(
    program: Program,
    operands: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    blocks: int,
    shared_words: int = 0,
) -> Any:
    """Runs `program`, written in `ptx`, in every thread of `blocks` blocks, and returns the arrays that it writes.

    shared_words: words of shared memory, whose address then is the program's last argument.
    """
    number, arrays = plgpu.Layout.WG_SPLAT(()), len(operands) + len(outputs)
    memories = int(shared_words > 0)

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * (arrays + memories), number))
        def run(ctx: Any, *values: Any) -> None:
            *refs, block = values
            memory = map(ptx.shared_address, refs[arrays:])
            program(*map(ptx.global_address, refs[:arrays]), ptx.scalar(block), *memory)

        run(*refs, jax.lax.axis_index("block"))

    body.__name__ = program.__name__
    return plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=(plgpu.SMEM((shared_words,), jnp.int32),) * memories,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*operands)


@dataclasses.dataclass(frozen=True)
class Thread:
    """A thread: its number in the block, its lane, and the number of its warp."""

    index: Value
    lane: Value
    warp: Value

    @classmethod
    def current(cls) -> Thread:
        index = ptx.thread()
        return cls(index, index & 31, index >> 5)


def floats_of(words: Sequence[Value]) -> list[Value]:
    """bfloat16 numbers, two a word, as float32."""
    return [x for word in words for x in ptx.from_bfloat16_pair(word)]


def bfloat16_words(numbers: Sequence[Value]) -> list[Value]:
    """float32 numbers rounded to bfloat16, two a word."""
    return [ptx.to_bfloat16_pair(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def rounded_numbers(numbers: Sequence[Value]) -> list[Value]:
    """float32 numbers rounded to bfloat16, as float32."""
    return floats_of(bfloat16_words(numbers))


def sum_of_lanes(x: Value) -> Value:
    """The sum of a float32 over the warp, the same in all lanes."""
    for distance in (16, 8, 4, 2, 1):
        x = x + ptx.lane_distant(x, distance)
    return x


def largest_of_group(numbers: Sequence[Value]) -> Value:
    """The bits of the largest magnitude among the float32 numbers of eight neighbouring lanes, the same in all of them."""
    top = ptx.constant(0)
    for number in numbers:
        top = ptx.max_s32(top, ptx.magnitude_bits(number))
    for distance in (1, 2, 4):
        top = ptx.max_s32(top, ptx.bits_of(ptx.lane_distant(ptx.float_of(top), distance)))
    return top
