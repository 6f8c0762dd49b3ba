"""The epilogue of the index scores on Hopper, on the registers of one thread: relu, weights, sums over heads, block maxima.

A warpgroup's accumulator has 64 keys as rows and queries x heads as columns. Four lanes share a row, every fourth pair of
columns each; `in_columns` puts the columns into such an order that a lane's are of one query.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from pallas_kernels.hopper import ptx


def in_columns(x: jax.Array, queries: int, multiple: int = 1) -> jax.Array:
    """[B, S, Hi, ...] -> [B, S' * Hi, ...], as the columns of tiles of `queries`, S' whole multiples of so many tiles.

    Of every 8 columns each query has 8 / queries, neighbouring heads: with 4 queries, column 8 t + 2 i + e is head 2 t + e of
    query i.
    """
    b, s, heads, *rest = x.shape
    x = jnp.pad(x, [(0, -s % (queries * multiple) if axis == 1 else 0) for axis in range(x.ndim)])
    x = x.reshape(b, -1, queries, heads * queries // 8, 8 // queries, *rest)
    return jnp.swapaxes(x, 2, 3).reshape(b, -1, *rest)


def element(x: Any, i: int) -> Any:
    """Number i of a vector register."""
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _lane_and_warp() -> tuple[ptx.Word, ptx.Word]:
    """The lane, and the warp's number in its warpgroup."""
    thread = ptx.thread()
    return thread & 31, (thread >> 5) & 3


def _saturates(column_tile: int) -> bool:
    return column_tile % 4 < 2


def scaled_for_saturation(weights: Any) -> Any:
    """relu(x) = 2^25 saturate(2^-25 x): the weights of the columns treated so carry the 2^25."""
    kind = ir.VectorType.get((2,), ir.F32Type.get())
    scale = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(ir.F32Type.get(), 2.0**25)))
    registers = weights.registers.copy().reshape(-1)
    for tile in range(registers.shape[0]):
        if _saturates(tile):
            registers[tile] = arith.mulf(registers[tile], scale)
    return fragmented_array.FragmentedArray(
        _registers=registers.reshape(weights.registers.shape), _layout=weights.layout, _is_signed=weights.is_signed
    )


def relu(x: Any, saturate: bool) -> Any:
    if saturate:
        return utils.inline_ptx("mul.rn.sat.f32 $0, $1, 0f33000000;", x, result_types=x.type)  # 2^-25
    return ptx.max_nan_f32(x, ptx.number(0.0))


def sums_of_lane(acc: Any, weights: Any, queries: int, saturate: bool, lane: ptx.Word) -> list[Any]:
    """The head sums that are this lane's; `Place` tells which, of its query in the two rows 8 apart that it has.

    Heads 8 i + 2 part + (0, 1) are a part of four, the parts (0 + 2) + (1 + 3) are the sum.
    """
    tiles = acc.shape[1] // 8
    products = acc.registers.reshape(tiles, 2)
    columns = [[element(w, e) for e in range(2)] for w in weights.registers.reshape(tiles)]

    sums = []
    for half in range(2):
        parts = []
        for first in range(queries):
            total: Any = None
            for tile in range(first, tiles, queries):
                for e in range(2):
                    x = relu(element(products[tile, half], e), saturate and _saturates(tile))
                    x = fragmented_array.mulf(x, columns[tile][e])
                    total = x if total is None else fragmented_array.addf(total, x)
            parts.append(total)
        while (n := len(parts) // 2) > 0:
            parts = [fragmented_array.addf(parts[i], parts[n + i]) for i in range(n)]
        sums += parts
    for step in {4: (), 2: (1,), 1: (2, 1)}[queries]:  # the distance of lanes that have other heads of the same query
        if len(sums) == 1:
            sums = [fragmented_array.addf(sums[0], utils.shfl_bfly(sums[0], step))]
        else:  # a row for each of the two lanes
            upper, (low, high) = (lane & step).differs(0), sums
            mine, other = ptx.select(upper, high, low), ptx.select(upper, low, high)
            sums = [fragmented_array.addf(mine, utils.shfl_bfly(other, step))]
    return sums


@dataclasses.dataclass(frozen=True)
class Place:
    """Which query and row half the sums of `sums_of_lane` belong to."""

    queries: int

    def query(self, lane: ptx.Word) -> ptx.Word:
        return (lane & 3) >> {4: 0, 2: 1, 1: 2}[self.queries]

    def half(self, lane: ptx.Word) -> ptx.Word:
        """Which half of the rows the lane's first sum is of; with 4 queries there are two sums, of halves 0 and 1."""
        return ptx.constant(0) if self.queries == 4 else (lane >> int(self.queries == 1)) & 1

    @property
    def lanes_of_block(self) -> list[int]:
        """The lane distances over which the scores of a query's 16 keys lie."""
        return {4: [], 2: [1], 1: [2]}[self.queries] + [4, 8, 16]

    def is_first(self, lane: ptx.Word) -> ptx.Predicate:
        """Whether the lane comes first among those that hold the same query's keys."""
        others = sum(self.lanes_of_block) | (self.queries == 1)
        return (lane & others).equals(0)


def limit_of_lane(place: Place, limits: list[ptx.Word]) -> ptx.Word:
    """How many keys the lane's query sees, of the tile's queries' numbers."""
    lane, _ = _lane_and_warp()
    query = place.query(lane)
    limit = limits[0]
    for i in range(1, len(limits)):
        limit = ptx.select(query.equals(i), limits[i], limit)
    return limit


def _never(x: Any) -> ptx.Predicate:
    """False for whatever is computed here, which the compiler cannot know: it keeps all that x depends on."""
    return ptx.Float(x).equals(-1e30)


def _store(x: Any, ref: Any, query: Any, column: Any) -> None:
    index = ir.IndexType.get()
    memref.store(x, ref, [arith.index_castui(index, query), arith.index_castui(index, column)])


def finish(
    acc: Any,  # [64, queries * heads] float32
    weights: Any,  # [queries * heads] float32
    key_scales: Any,  # [64] float32, None for bfloat16
    limit: ptx.Word,  # how many keys the lane's query sees
    first: ptx.Word,  # the accumulator's first key
    scores: Any,  # [queries, 64] float32
    maxima: Any,  # [queries, 4] float32
    *,
    queries: int,
    saturate: bool,
    leave_out: str,
) -> None:
    """Writes the scores of an accumulator and their maxima."""
    if leave_out == "epilogue":
        used, zero = element(acc.registers.reshape(-1)[0], 0), arith.constant(ir.IndexType.get(), 0)
        with ptx.when(_never(used)):
            memref.store(used, scores, [zero, zero])
        return
    place = Place(queries)
    lane, warp = _lane_and_warp()
    sums = sums_of_lane(acc, weights, queries, saturate, lane)
    query, half = place.query(lane), place.half(lane)
    row = (warp << 4) + (lane >> 2) + (half << 3)
    seen = limit - (first + row)  # keys from this one on that the query sees
    best: Any = None
    for i, score in enumerate(sums):
        if key_scales is not None:
            low, high = (element(x, 0) for x in key_scales.registers.reshape(2))
            scale = (low, high)[i] if len(sums) == 2 else ptx.select((half & 1).differs(0), high, low)
            score = fragmented_array.mulf(score, scale)
        score = ptx.number_or_lowest(score)
        score = ptx.select(seen.signed > 8 * i, score, float("-inf"))
        column = row + 8 * i
        if leave_out != "stores":
            _store(score, scores, query, column)
        best = score if best is None else ptx.maxnum_f32(best, score)
    for distance in place.lanes_of_block:
        best = ptx.maxnum_f32(best, utils.shfl_bfly(best, distance))
    with ptx.when(_never(best) if leave_out == "stores" else place.is_first(lane)):
        _store(best, maxima, query, warp)
