"""What attention kernels share in whose products keys are the rows and heads the columns: threads, ring, softmax.

A warpgroup's accumulators are [64, columns]. A thread has rows g and g + 8 of its warp's 16, g = lane / 4, and columns
2 (lane % 4) and the next of every 8. So a thread's numbers are, of every 8 columns, two of row g and the same two of g + 8,
and its numbers by column, such as the running maxima and sums of weights, two of every 8.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

from pallas_kernels.hopper import ptx
from pallas_kernels.softmax import LAZY

KEYS = 64  # of a block
PIECE = KEYS * 128  # bytes of 128 bytes of every key of a block
SHARED_BYTES = 226 * 1024  # a block may have 227 KB, but Mosaic rounds up to whole KB and adds a static byte
VOTE_BARRIER, MAXIMA_BARRIER = 8, 9  # named barriers of the softmax's warpgroup

Value = ptx.Value
Values = list[ptx.Value]


@dataclasses.dataclass(frozen=True)
class Thread:
    """Which thread of its warpgroup this is, and what it has of an accumulator."""

    index: Value
    lane: Value
    warp: Value
    row: Value  # g, of its warp's 16
    column: Value  # the first of its two of every 8

    @staticmethod
    def of(thread: Value) -> Thread:
        index = ptx.bit_and(thread, 127)
        lane, warp = ptx.bit_and(index, 31), ptx.shift_right(index, 5)
        return Thread(index, lane, warp, ptx.shift_right(lane, 2), ptx.shift_left(ptx.bit_and(lane, 3), 1))


def copied_line(thread: Value) -> tuple[Value, Value]:
    """(16-byte chunk of a line of 128 bytes, line) of a thread whose warpgroup copies 16 lines at once."""
    return ptx.bit_and(thread, 7), ptx.shift_right(thread, 3)


def in_tiles(line: Value, chunk: Value) -> Value:
    """Where a chunk of a line is in a matrix of swizzled tiles of 8 lines, which wgmma reads."""
    within = ptx.bit_and(line, 7)
    return ptx.add(ptx.shift_left(line, 7), ptx.shift_left(ptx.bit_xor(chunk, within), 4))


@dataclasses.dataclass(frozen=True)
class Ring:
    """A place in a ring of `size`, and the parity of how often the ring went round, as values of a loop's carry."""

    size: int
    place: Value
    parity: Value

    @staticmethod
    def start(size: int) -> Ring:
        return Ring(size, ptx.constant(0), ptx.constant(0))

    @property
    def carry(self) -> Values:
        return [self.place, self.parity]

    def next(self) -> Ring:
        following = ptx.add(self.place, 1)
        around = ptx.compare("eq", following, self.size)
        parity = ptx.select(around, ptx.bit_xor(self.parity, 1), self.parity)
        return Ring(self.size, ptx.select(around, 0, following), parity)


class Layout(Protocol):
    """Where what the softmax's warpgroup hands on is in shared memory, in bytes; each of it for two blocks, in two buffers."""

    @property
    def columns(self) -> int: ...
    @property
    def weights(self) -> int: ...  # [2][columns][64], 16 bits
    @property
    def factors(self) -> int: ...  # [2][columns] float32, by which the values so far are rescaled
    @property
    def sums(self) -> int: ...  # [2][4 warps][columns] float32, of the weights of a task
    @property
    def maxima(self) -> int: ...  # [4 warps][columns] float32
    @property
    def raised(self) -> int: ...  # [2], whether factors are to be applied
    @property
    def p_ready(self) -> int: ...  # [2] mbarriers: an arrival of every thread of the softmax's warpgroup
    @property
    def p_free(self) -> int: ...  # [2] mbarriers: an arrival of every thread that multiplies by the weights


@dataclasses.dataclass(frozen=True)
class Buffers:
    """The addresses of what the softmax's warpgroup hands on."""

    layout: Layout
    base: Value

    def p_ready(self, buffer: Value | int) -> Value:
        return self._barrier(self.layout.p_ready, buffer)

    def p_free(self, buffer: Value | int) -> Value:
        return self._barrier(self.layout.p_free, buffer)

    def _barrier(self, first: int, buffer: Value | int) -> Value:
        if isinstance(buffer, int):
            return ptx.add(self.base, first + 8 * buffer)
        return ptx.add(self.base, first, ptx.shift_left(buffer, 3))

    def init(self, consumers: int) -> None:
        """By one thread. consumers: how many threads multiply by the weights."""
        for buffer in range(2):
            ptx.barrier_init(self.p_ready(buffer), 128)
            ptx.barrier_init(self.p_free(buffer), consumers)

    def weights(self, buffer: Value) -> Value:
        return ptx.add(self.base, self.layout.weights, ptx.mul(buffer, 128 * self.layout.columns))

    def raised(self, buffer: Value) -> Value:
        return ptx.add(self.base, self.layout.raised, ptx.shift_left(buffer, 2))


@dataclasses.dataclass(frozen=True)
class ColumnSoftmax:
    """The softmax of a list's keys, block by block, by one warpgroup.

    The maximum that a head's weights refer to is its largest logit so far up to LAZY powers of two: only where a block has a
    larger one do the warps exchange maxima.
    """

    buffers: Buffers
    thread: Thread
    speaks: Value  # for its columns, where all lanes have the same

    @staticmethod
    def of(buffers: Buffers, thread: Thread) -> ColumnSoftmax:
        return ColumnSoftmax(buffers, thread, ptx.compare("eq", thread.row, 0))

    @property
    def layout(self) -> Layout:
        return self.buffers.layout

    @property
    def groups(self) -> int:
        """Of 8 columns."""
        return self.layout.columns // 8

    def column(self, i: int) -> int:
        """Which of a thread's columns its number i is of."""
        return i // 4 * 2 + i % 2

    def row_at(self, kind: int, row: Value) -> Value:
        """The address of this thread's first two columns of a row [columns] of float32."""
        own = ptx.shift_left(self.thread.column, 2)
        return ptx.add(self.buffers.base, kind, ptx.mul(row, 4 * self.layout.columns), own)

    def update_maxima(
        self,
        scaled: Values,
        tops: Values,
        totals: Values,
        buffer: Value,
        turn: Value,
        after_vote: Callable[[], None] | None = None,
    ) -> tuple[Values, Values]:
        """The maxima and sums of weights so far, for base-2 logits `scaled` of a block.

        After it the block's buffer may be written, which `turn` blocks had before. after_vote() is called once all warps have
        their logits.
        """
        over = [ptx.minus(x, tops[self.column(i)]) for i, x in enumerate(scaled)]
        exceeds = ptx.above(functools.reduce(ptx.larger, over), ptx.number(LAZY))
        ptx.barrier_wait(self.buffers.p_free(buffer), ptx.bit_xor(ptx.bit_and(turn, 1), 1))
        raised = ptx.barrier_any(VOTE_BARRIER, 128, exceeds)
        if after_vote is not None:
            after_vote()
        changed = ptx.choose(
            ptx.compare("ne", raised, 0), lambda: self._raise_maxima(scaled, tops, totals, buffer), [*tops, *totals]
        )
        with ptx.when(ptx.compare("eq", self.thread.index, 0)):
            ptx.store_shared(self.buffers.raised(buffer), raised)
        return changed[: len(tops)], changed[len(tops) :]

    def _raise_maxima(self, scaled: Values, tops: Values, totals: Values, buffer: Value) -> Values:
        """New maxima where a block's are too far above, and sums of weights that refer to them."""
        layout, groups = self.layout, range(self.groups)
        own = [ptx.larger(scaled[4 * j + c], scaled[4 * j + 2 + c]) for j in groups for c in range(2)]
        for distance in (4, 8, 16):
            own = [ptx.larger(x, ptx.lane_distant(x, distance)) for x in own]
        maxima, row = ptx.add(self.buffers.base, layout.maxima, ptx.shift_left(self.thread.column, 2)), 4 * layout.columns
        with ptx.when(self.speaks):
            self._store_row(ptx.add(maxima, ptx.mul(self.thread.warp, row)), own)
        ptx.barrier(MAXIMA_BARRIER, 128)
        new_tops, factors = [], []
        for j in groups:
            by_warp = [ptx.load_shared_floats(ptx.add(maxima, row * w + 32 * j)) for w in range(4)]
            for c in range(2):
                top = tops[2 * j + c]
                block_top = functools.reduce(ptx.larger, [pair[c] for pair in by_warp])
                exceeds = ptx.above(block_top, ptx.plus(top, ptx.number(LAZY)))
                new_tops.append(ptx.either(exceeds, block_top, top))
                factors.append(ptx.exp2(ptx.minus(top, new_tops[-1])))
        with ptx.when(ptx.compare("slt", self.thread.index, 4)):
            self._store_row(self.row_at(layout.factors, buffer), factors)
        return [*new_tops, *map(ptx.times, totals, factors)]

    def weights(self, scaled: Values, tops: Values) -> Values:
        return [ptx.exp2(ptx.minus(x, tops[self.column(i)])) for i, x in enumerate(scaled)]

    def store_weights(self, weights: Values, buffer: Value, to_pair: Callable[[Value, Value], Value]) -> None:
        """As a matrix whose lines are heads, 16 bytes of them 8 keys; to_pair makes a word of two numbers."""
        lane, warp = self.thread.lane, self.thread.warp
        block_of_8 = ptx.add(ptx.shift_left(warp, 1), ptx.bit_and(ptx.shift_right(lane, 3), 1))
        within = ptx.mul(buffer, 128 * self.layout.columns), in_tiles(ptx.bit_and(lane, 7), block_of_8)
        to = ptx.add(self.buffers.base, self.layout.weights, *within)
        for j in range(self.groups):
            a, b, c, d = weights[4 * j : 4 * j + 4]
            ptx.store_shared_transposed(ptx.add(to, 1024 * j), [to_pair(a, b), to_pair(c, d)])

    def store_sums(self, totals: Values, buffer: Value) -> None:
        """This warp's sums of weights, at the end of a list."""
        for distance in (4, 8, 16):
            totals = [ptx.plus(x, ptx.lane_distant(x, distance)) for x in totals]
        to = self.row_at(self.layout.sums, ptx.add(ptx.shift_left(buffer, 2), self.thread.warp))
        with ptx.when(self.speaks):
            self._store_row(to, totals)

    def publish(self, buffer: Value) -> None:
        ptx.proxy_fence()
        ptx.barrier_arrive(self.buffers.p_ready(buffer))

    def _store_row(self, to: Value, by_column: Sequence[Value]) -> None:
        for j in range(self.groups):
            ptx.store_shared_floats(ptx.add(to, 32 * j), by_column[2 * j : 2 * j + 2])


def times_by_column(values: Values, factors: Values) -> Values:
    """Accumulators of any number of tiles, one after the other, times a factor for every column."""
    return [ptx.times(x, factors[i % (2 * len(factors)) // 4 * 2 + i % 2]) for i, x in enumerate(values)]


def inverses_of(totals: Values) -> Values:
    """1 / x, 0 where x is not above 0."""
    zero = ptx.number(0.0)
    return [ptx.either(ptx.above(x, zero), ptx.inverse(x), zero) for x in totals]
