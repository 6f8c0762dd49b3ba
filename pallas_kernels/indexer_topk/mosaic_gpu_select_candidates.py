"""The buffer of a row's candidates: (score bits, position), 8 bytes each, in the order of their positions.

Before the buffer would overflow it is compacted to its best k, and the threshold rises to the worst of them: nothing is lost,
however the scores lie. Steps 4 and 5 of a selection are a last search and a last ordered pass over it, which writes the
chosen positions. A pass in order counts, by ballots and one barrier a round, the chosen candidates before each one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.ptx import Predicate, Word
from pallas_kernels.indexer_topk.mosaic_gpu_select_row import LEAST, Add, Row, VisitKeys

# sink(chosen, rank among the chosen, score bits, position)
CandidateSink = Callable[[Predicate, Word, Word, Word], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates of a row, of which there are `count` where a method is told so."""

    row: Row

    def visit(self, count: Word) -> VisitKeys:
        row = self.row

        def visit_keys(add: Add) -> None:
            def step(i: Word, carry: list[Word]) -> list[Word]:
                place = i * row.threads + row.thread
                add(row.key(ptx.load_shared(row.buffer + (place << 3))), place < count)
                return carry

            ptx.loop(row.rounds(count), [], step)

        return visit_keys

    def largest(self, count: Word) -> Word:
        """The largest key in the buffer."""
        row = self.row

        def step(i: Word, carry: list[Word]) -> list[Word]:
            place = i * row.threads + row.thread
            return [ptx.max_u32(carry[0], ptx.select(place < count, row.key(ptx.load_shared(row.buffer + (place << 3))), 0))]

        mine = ptx.reduce_warp("max", ptx.loop(row.rounds(count), [ptx.constant(0)], step)[0])
        with ptx.when(row.lane.equals(0)):
            ptx.store_shared(row.line(LEAST) + (row.warp << 2), mine)
        row.barrier()
        return ptx.reduce_warp("max", ptx.load_shared(row.line(LEAST) + ((row.lane & (row.warps - 1)) << 2)))

    def in_order(self, count: Word, lo: Word, hi: Word, room: Word, sink: CandidateSink) -> None:
        """Passes all in the buffer to `sink`: chosen are those above `hi` and the first `room` within [lo, hi], in order."""
        row = self.row

        def step(i: Word, carry: list[Word]) -> list[Word]:
            above_before, within_before, line = carry
            place = i * row.threads + row.thread
            score, position = ptx.load_shared_pair(row.buffer + (place << 3))
            key = row.key(score)
            real = place < count
            above, within = real & (key > hi), real & (key >= lo) & (key <= hi)
            lanes_above, lanes_within = ptx.ballot(above), ptx.ballot(within)
            mine = ptx.population(lanes_above) | (ptx.population(lanes_within) << 16)
            before, total = row.before_and_total(row.sums + (line << 7), mine)
            rank_above = above_before + (before & 0xFFFF) + ptx.population(lanes_above & row.earlier_lanes)
            rank_within = within_before + (before >> 16) + ptx.population(lanes_within & row.earlier_lanes)
            chosen = above | (within & (rank_within < room))
            sink(chosen, rank_above + ptx.min_u32(rank_within, room), score, position)
            return [above_before + (total & 0xFFFF), within_before + (total >> 16), line ^ 1]

        ptx.loop(row.rounds(count), [ptx.constant(0), ptx.constant(0), ptx.constant(0)], step)

    def compact(self, count: Word, threshold: Word, top: Word) -> list[Word]:
        """Keeps the best k of a full buffer. Returns how many are in it and the threshold a score now has to reach."""
        row = self.row
        row.barrier()
        lo, hi, room = row.narrow(self.visit(count), self.below(threshold), top, ptx.constant(row.p.k), 0)

        def sink(chosen: Predicate, rank: Word, score: Word, position: Word) -> None:
            # Ranks are at most the place read, and in_order's barrier stands between this round's reads and the writes.
            ptx.store_shared_pair(row.buffer + (rank << 3), (score, position), chosen)

        self.in_order(count, lo, hi, room, sink)
        row.barrier()
        # Of a single value the first ones were kept, and later ones cannot replace them.
        return [ptx.constant(row.p.k), ptx.select(lo.equals(hi), lo + 1, lo)]

    def below(self, threshold: Word) -> Word:
        """A bound of the keys in the buffer: after compaction its worst may sit one below the threshold."""
        return threshold - ptx.as_number(threshold > 0)
