"""Steps 1 and 2 of a selection: a threshold for a row's scores, and the blocks that can have any above it.

The values are the block maxima of a row, or a sample of its scores. Of maxima at least k reach the threshold, hence at least k
scores; of a sample so many that fewer than k scores pass only if it misleads. A histogram finds it; it need not be exact, so
the search ends as soon as few too many values pass. Values are kept in shared memory where they fit, and read again in each
pass where not. With maxima only blocks that reach the threshold are listed and read: at 120K keys that is a quarter of the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.ptx import Address, Float, Word
from pallas_kernels.indexer_topk.mosaic_gpu_select_row import LEAST, MOST, Add, Row

NO_VALUE = 0x7FFFFFFF  # a NaN: it reaches no threshold
KEY_OF_NONE = 0xFFFFFFFF  # its key, above every range


@dataclasses.dataclass(frozen=True, eq=False)
class Values:
    """`count` values that the threshold is found from; address(i): where values i .. i + 3 are, i a multiple of 4."""

    row: Row
    count: Word
    address: Callable[[Word], Address]

    def _load(self, index: Word) -> list[Float]:
        """Four values of the sample or the maxima, NO_VALUE from `count` on."""
        count = self.count
        xs = ptx.load_global_floats_or_nan(self.address(index), index < count)
        if not self.row.p.clean:
            xs = [ptx.number_or_lowest(x) for x in xs]
        return [ptx.float_of(ptx.select(index + e < count, ptx.bits_of(x), NO_VALUE)) for e, x in enumerate(xs)]

    def fold(self, carry: list[Word], visit: Callable[[Word, list[Float], list[Word]], list[Word]]) -> list[Word]:
        """carry = visit(index, four values, carry) over all values, a thread's in the same order each time."""
        row = self.row

        def step(i: Word, carry: list[Word]) -> list[Word]:
            index = (i * row.threads + row.thread) << 2
            if row.p.keeps_values:
                return visit(index, ptx.load_shared_floats(row.buffer + (index << 2), 4), carry)
            return visit(index, self._load(index), carry)

        return ptx.loop(row.rounds((self.count + 3) >> 2), carry, step)

    def _keep(self) -> None:
        """Copies the values into the buffer. A thread reads back what it wrote itself, so there is no barrier."""
        row = self.row

        def step(i: Word, carry: list[Word]) -> list[Word]:
            index = (i * row.threads + row.thread) << 2
            ptx.store_shared_floats(row.buffer + (index << 2), self._load(index))
            return carry

        if row.p.keeps_values:
            ptx.loop(row.rounds((self.count + 3) >> 2), [], step)

    def _range(self) -> tuple[Word, Word]:
        """The keys of the smallest and the largest value."""
        row = self.row

        def visit(index: Word, xs: list[Float], carry: list[Word]) -> list[Word]:
            least, most = carry
            for x in xs:
                key = row.key(ptx.bits_of(x))
                least, most = ptx.min_u32(least, key), ptx.max_u32(most, ptx.select(key.equals(KEY_OF_NONE), 0, key))
            return [least, most]

        least, most = self.fold([ptx.constant(KEY_OF_NONE), ptx.constant(0)], visit)
        least, most = ptx.reduce_warp("min", least), ptx.reduce_warp("max", most)
        with ptx.when(row.lane.equals(0)):
            ptx.store_shared(row.line(LEAST) + (row.warp << 2), least)
            ptx.store_shared(row.line(MOST) + (row.warp << 2), most)
        row.barrier()
        there = (row.lane & (row.warps - 1)) << 2
        least, most = ptx.load_shared(row.line(LEAST) + there), ptx.load_shared(row.line(MOST) + there)
        return ptx.reduce_warp("min", least), ptx.reduce_warp("max", most)

    def threshold(self, rank: Word, slack: Word) -> list[Word]:
        """A key that at least `rank` of the values reach, at most about `slack` more, and the largest value's key."""
        row = self.row
        self._keep()
        least, most = self._range()

        def visit_keys(add: Add) -> None:
            def visit(index: Word, xs: list[Float], carry: list[Word]) -> list[Word]:
                for x in xs:
                    add(row.key(ptx.bits_of(x)))
                return carry

            self.fold([], visit)

        return [row.narrow(visit_keys, least, most, rank, slack)[0], most]

    def list_blocks(self, threshold: Word) -> Word:
        """Lists, in order, the blocks whose maximum reaches the threshold, as far as the list goes; returns how many."""
        row = self.row
        limit = row.number_of_key(threshold)

        def visit(index: Word, xs: list[Float], carry: list[Word]) -> list[Word]:
            listed, line = carry
            hits = [x >= limit for x in xs]
            mine = ptx.total([ptx.as_number(hit) for hit in hits])
            scanned = ptx.sum_of_lanes_up_to(mine)
            before, total = row.before_and_total(row.sums + (line << 7), ptx.from_lane(scanned, 31))
            place = listed + before + scanned - mine
            for e, hit in enumerate(hits):
                fits = hit & (place < row.p.list_capacity)
                ptx.store_shared_short(row.list + (place << 1), index + e, fits)
                place = place + ptx.as_number(hit)
            return [listed + total, line ^ 1]

        return self.fold([ptx.constant(0), ptx.constant(0)], visit)[0]
