"""Which thread this is, and exchanges among the lanes of a warp (shfl, redux)."""

from __future__ import annotations

from collections.abc import Sequence

from jax.experimental.mosaic.gpu import utils

from pallas_kernels.hopper.ptx.arithmetic import select
from pallas_kernels.hopper.ptx.registers import Float, Predicate, Word, asm, constant, f32, i32


def thread() -> Word:
    """The number of this thread in its block."""
    return Word(utils.thread_idx())


def uniform(x: Word) -> Word:
    """x of the warp's first lane. The compiler knows nothing more of it, and that it is the same in all lanes."""
    return asm("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", [x], "=r,r", i32())


def sum_of_warp(x: Word) -> Word:
    return asm("redux.sync.add.s32 $0, $1, 0xffffffff;", [x], "=r,r", i32())


def sum_of_lanes_below(x: Word) -> Word:
    """The sum of x over the lanes of the warp before this one."""
    steps = "".join(
        f"shfl.sync.up.b32 t|p, s, {distance}, 0, 0xffffffff;\n@p add.s32 s, s, t;\n" for distance in (1, 2, 4, 8, 16)
    )
    ptx = "{\n.reg .pred p;\n.reg .b32 s, t;\nmov.b32 s, $1;\n" + steps + "sub.s32 $0, s, $1;\n}"
    return asm(ptx, [x], "=&r,r", i32())


def sum_of_lanes_up_to(x: Word) -> Word:
    """The sum of x over the lanes of the warp up to this one, which counts."""
    step = "shfl.sync.up.b32 t|p, $0, {}, 0, 0xffffffff;\n@p add.u32 $0, $0, t;\n"
    text = "{\n.reg .pred p;\n.reg .b32 t;\nmov.b32 $0, $1;\n" + "".join(step.format(d) for d in (1, 2, 4, 8, 16)) + "}"
    return asm(text, [x], "=&r,r", i32())


def from_lane(x: Word, lane: int) -> Word:
    return asm("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", [x, constant(lane)], "=r,r,r", i32())


def ballot(predicate: Predicate) -> Word:
    """Bit l says whether the predicate holds in lane l."""
    return asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [predicate], "=r,b", i32())


def cluster_rank() -> Word:
    """Which block of its cluster this is."""
    return asm("mov.u32 $0, %cluster_ctarank;", (), "=r", i32())


def alike_in_warp(x: Word) -> Word:
    """The lanes of the warp, as bits, that have the same number as this one."""
    return asm("match.any.sync.b32 $0, $1, 0xffffffff;", [x], "=r,r", i32())


def lane_distant(x: Float, distance: int) -> Float:
    """x of the lane whose number differs by the bit `distance`."""
    return asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;", [x], "=f,f", f32())


def transposed_among_lanes(words: Sequence[Word], lane: Word) -> list[Word]:
    """Four words of four neighbouring lanes: lane q gets word q of each, in the lanes' order."""
    words = list(words)
    for distance in (1, 2):
        upper = (lane & distance).differs(0)
        for low in range(4):
            if not low & distance:
                high = low | distance
                received = Word(utils.shfl_bfly(select(upper, words[low], words[high]), distance))
                words[low], words[high] = select(upper, received, words[low]), select(upper, words[high], received)
    return words


def reduce_warp(operation: str, x: Word) -> Word:
    """What `operation` makes of the lanes' numbers, the same in all lanes: "add", "or", "max" or "min", unsigned."""
    kind = "b32" if operation == "or" else "u32"
    return asm(f"redux.sync.{operation}.{kind} $0, $1, 0xffffffff;", [x], "=r,r", i32())
