"""What attention kernels share in whose products keys are the rows and heads the columns: threads, ring, softmax.

A warpgroup's accumulators are [64, columns]. A thread has rows g and g + 8 of its warp's 16, g = lane / 4, and columns
2 (lane % 4) and the next of every 8. So a thread's numbers are, of every 8 columns, two of row g and the same two of g + 8,
and its numbers by column, such as the running maxima and sums of weights, two of every 8.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

from pallas_kernels.hopper import ptx
from pallas_kernels.softmax import LAZY

KEYS = 64  # of a block
PIECE = KEYS * 128  # bytes of 128 bytes of every key of a block
SHARED_BYTES = 226 * 1024  # a block may have 227 KB, but Mosaic rounds up to whole KB and adds a static byte
VOTE_BARRIER, MAXIMA_BARRIER = 8, 9  # named barriers of the softmax's warpgroup

Values = list[Any]  # registers


@dataclasses.dataclass(frozen=True)
class Thread:
    """Which thread of its warpgroup this is, and what it has of an accumulator."""

    index: ptx.Word
    lane: ptx.Word
    warp: ptx.Word
    row: ptx.Word  # g, of its warp's 16
    column: ptx.Word  # the first of its two of every 8

    @staticmethod
    def of(thread: ptx.Word) -> Thread:
        index = thread & 127
        lane, warp = index & 31, index >> 5
        return Thread(index, lane, warp, lane >> 2, (lane & 3) << 1)


def copied_line(thread: ptx.Word) -> tuple[ptx.Word, ptx.Word]:
    """(16-byte chunk of a line of 128 bytes, line) of a thread whose warpgroup copies 16 lines at once."""
    return thread & 7, thread >> 3


def in_tiles(line: ptx.Word, chunk: ptx.Word) -> ptx.Word:
    """Where a chunk of a line is in a matrix of swizzled tiles of 8 lines, which wgmma reads."""
    within = line & 7
    return (line << 7) + ((chunk ^ within) << 4)


@dataclasses.dataclass(frozen=True)
class Ring:
    """A place in a ring of `size`, and the parity of how often the ring went round, as values of a loop's carry."""

    size: int
    place: ptx.Word
    parity: ptx.Word

    @staticmethod
    def start(size: int) -> Ring:
        return Ring(size, ptx.constant(0), ptx.constant(0))

    @property
    def carry(self) -> Values:
        return [self.place, self.parity]

    def next(self) -> Ring:
        following = self.place + 1
        around = following.equals(self.size)
        parity = ptx.select(around, self.parity ^ 1, self.parity)
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
    base: ptx.Word

    def p_ready(self, buffer: ptx.Word | int) -> ptx.Word:
        return self._barrier(self.layout.p_ready, buffer)

    def p_free(self, buffer: ptx.Word | int) -> ptx.Word:
        return self._barrier(self.layout.p_free, buffer)

    def _barrier(self, first: int, buffer: ptx.Word | int) -> ptx.Word:
        if isinstance(buffer, int):
            return self.base + (first + 8 * buffer)
        return self.base + first + (buffer << 3)

    def init(self, consumers: int) -> None:
        """Initialises the barriers, in one thread. consumers: how many threads multiply by the weights."""
        for buffer in range(2):
            ptx.barrier_init(self.p_ready(buffer), 128)
            ptx.barrier_init(self.p_free(buffer), consumers)

    def weights(self, buffer: ptx.Word) -> ptx.Word:
        return self.base + self.layout.weights + buffer * (128 * self.layout.columns)

    def raised(self, buffer: ptx.Word) -> ptx.Word:
        return self.base + self.layout.raised + (buffer << 2)


@dataclasses.dataclass(frozen=True)
class ColumnSoftmax:
    """The softmax of a list's keys, block by block, by one warpgroup.

    The maximum that a head's weights refer to is its largest logit so far up to LAZY powers of two: only where a block has a
    larger one do the warps exchange maxima.
    """

    buffers: Buffers
    thread: Thread
    speaks: ptx.Predicate  # for its columns, where all lanes have the same

    @staticmethod
    def of(buffers: Buffers, thread: Thread) -> ColumnSoftmax:
        return ColumnSoftmax(buffers, thread, thread.row.equals(0))

    @property
    def layout(self) -> Layout:
        return self.buffers.layout

    @property
    def groups(self) -> int:
        """How many groups of 8 columns there are."""
        return self.layout.columns // 8

    def column(self, i: int) -> int:
        """Which of a thread's columns its number i is of."""
        return i // 4 * 2 + i % 2

    def row_at(self, kind: int, row: ptx.Word) -> ptx.Word:
        """The address of this thread's first two columns of a row [columns] of float32."""
        own = self.thread.column << 2
        return self.buffers.base + kind + row * (4 * self.layout.columns) + own

    def rows_at(self, kind: int) -> Callable[[ptx.Word | int], ptx.Word]:
        """`row_at` for several rows."""
        start = self.buffers.base + kind + (self.thread.column << 2)
        size = 4 * self.layout.columns
        return lambda row: start + (size * row if isinstance(row, int) else row * size)

    def update_maxima(
        self,
        scaled: Values,
        tops: Values,
        totals: Values,
        buffer: ptx.Word,
        turn: ptx.Word,
        after_vote: Callable[[], None] | None = None,
    ) -> tuple[Values, Values]:
        """The maxima and sums of weights so far, for base-2 logits `scaled` of a block.

        After it the block's buffer may be written, which `turn` blocks had before. after_vote() is called once all warps have
        their logits.
        """
        over = [x - tops[self.column(i)] for i, x in enumerate(scaled)]
        exceeds = functools.reduce(ptx.max_f32, over) > LAZY
        ptx.barrier_wait(self.buffers.p_free(buffer), (turn & 1) ^ 1)
        raised = ptx.barrier_any(VOTE_BARRIER, 128, exceeds)
        if after_vote is not None:
            after_vote()
        changed = ptx.choose(raised.differs(0), lambda: self._raise_maxima(scaled, tops, totals, buffer), [*tops, *totals])
        with ptx.when(self.thread.index.equals(0)):
            ptx.store_shared(self.buffers.raised(buffer), raised)
        return changed[: len(tops)], changed[len(tops) :]

    def _raise_maxima(self, scaled: Values, tops: Values, totals: Values, buffer: ptx.Word) -> Values:
        """New maxima where a block's are too far above, and sums of weights that refer to them."""
        layout, groups = self.layout, range(self.groups)
        own = [ptx.max_f32(scaled[4 * j + c], scaled[4 * j + 2 + c]) for j in groups for c in range(2)]
        for distance in (4, 8, 16):
            own = [ptx.max_f32(x, ptx.lane_distant(x, distance)) for x in own]
        maxima_at = self.rows_at(layout.maxima)
        with ptx.when(self.speaks):
            self._store_row(maxima_at(self.thread.warp), own)
        ptx.barrier(MAXIMA_BARRIER, 128)
        new_tops, factors = [], []
        for j in groups:
            by_warp = [ptx.load_shared_floats(maxima_at(w) + 32 * j) for w in range(4)]
            for c in range(2):
                top = tops[2 * j + c]
                block_top = functools.reduce(ptx.max_f32, [pair[c] for pair in by_warp])
                exceeds = block_top > (top + LAZY)
                new_tops.append(ptx.select(exceeds, block_top, top))
                factors.append(ptx.exp2(top - new_tops[-1]))
        with ptx.when(self.thread.index.signed < 4):
            self._store_row(self.row_at(layout.factors, buffer), factors)
        return [*new_tops, *(total * factor for total, factor in zip(totals, factors, strict=True))]

    def weights(self, scaled: Values, tops: Values) -> Values:
        return [ptx.exp2(x - tops[self.column(i)]) for i, x in enumerate(scaled)]

    def store_weights(self, weights: Values, buffer: ptx.Word, to_pair: Callable[[ptx.Float, ptx.Float], ptx.Word]) -> None:
        """Stores weights as a matrix whose lines are heads, 16 bytes of them 8 keys; to_pair makes a word of two numbers."""
        lane, warp = self.thread.lane, self.thread.warp
        block_of_8 = (warp << 1) + ((lane >> 3) & 1)
        to = self.buffers.weights(buffer) + in_tiles(lane & 7, block_of_8)
        for j in range(self.groups):
            a, b, c, d = weights[4 * j : 4 * j + 4]
            ptx.store_shared_transposed(to + 1024 * j, [to_pair(a, b), to_pair(c, d)])

    def store_sums(self, totals: Values, buffer: ptx.Word) -> None:
        """This warp's sums of weights, at the end of a list."""
        for distance in (4, 8, 16):
            totals = [x + ptx.lane_distant(x, distance) for x in totals]
        to = self.row_at(self.layout.sums, (buffer << 2) + self.thread.warp)
        with ptx.when(self.speaks):
            self._store_row(to, totals)

    def publish(self, buffer: ptx.Word) -> None:
        ptx.proxy_fence()
        ptx.barrier_arrive(self.buffers.p_ready(buffer))

    def _store_row(self, to: ptx.Word, by_column: Values) -> None:
        for j in range(self.groups):
            ptx.store_shared_floats(to + 32 * j, by_column[2 * j : 2 * j + 2])


def times_by_column(values: Values, factors: Values) -> Values:
    """Accumulators of any number of tiles, one after the other, times a factor for every column."""
    return [x * factors[i % (2 * len(factors)) // 4 * 2 + i % 2] for i, x in enumerate(values)]


def inverses_of(totals: Values) -> Values:
    """1 / x, 0 where x is not above 0."""
    zero = ptx.number(0.0)
    return [ptx.select(x > zero, 1.0 / x, zero) for x in totals]
