"""A row that fits into shared memory whole, some 20000 scores: steps 4 and 5 of a selection run over it as it lies there.

No threshold is needed and nothing is appended: the search for the k-th best and the ordered pass read the scores themselves, 16
bytes a thread and round. A thread reads back what it copied itself, so there is no barrier between.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.ptx import Address, Predicate, Word
from pallas_kernels.indexer_topk.mosaic_gpu_select_row import KEY_OF_INFINITY, KEY_OF_LOWEST, Add, Row


@dataclasses.dataclass(frozen=True, eq=False)
class Resident:
    """The `visible` scores of a row, in the buffer and what follows it."""

    row: Row
    visible: Word
    pieces: Word  # of 16 bytes

    @staticmethod
    def copied(row: Row, visible: Word, scores: Address) -> Resident:
        """Copies the scores and waits for them."""
        pieces = (visible + 3) >> 2

        def copy(i: Word, carry: list[Word]) -> list[Word]:
            piece = i * row.threads + row.thread
            real = piece < pieces
            ptx.copy_async_where(row.buffer + (piece << 4), ptx.offset(scores, piece << 2, 4), real)
            return carry

        ptx.loop(row.rounds(pieces), [], copy)
        ptx.copies_commit()
        ptx.copies_done(0)
        return Resident(row, visible, pieces)

    def keys_of(self, i: Word) -> tuple[Word, list[Word], list[Predicate]]:
        """First position, keys and whether there are such of a thread's piece in round i."""
        row = self.row
        piece = i * row.threads + row.thread
        position, xs = piece << 2, ptx.load_shared_floats(row.buffer + (piece << 4), 4)
        if not row.p.clean:
            xs = [ptx.number_or_lowest(x) for x in xs]
        return position, [row.key(ptx.bits_of(x)) for x in xs], [position + e < self.visible for e in range(4)]

    def visit_keys(self, add: Add) -> None:
        def step(i: Word, carry: list[Word]) -> list[Word]:
            _, keys, real = self.keys_of(i)
            for key, valid in zip(keys, real, strict=True):
                add(key, valid)
            return carry

        ptx.loop(self.row.rounds(self.pieces), [], step)

    def choose(self, out: Address) -> None:
        """Writes the positions of the best k, of more than k scores."""
        lowest, infinity = ptx.constant(KEY_OF_LOWEST), ptx.constant(KEY_OF_INFINITY)
        lo, hi, room = self.row.narrow(self.visit_keys, lowest, infinity, ptx.constant(self.row.p.k), 0)
        self._write(lo, hi, room, out)

    def _write(self, lo: Word, hi: Word, room: Word, out: Address) -> None:
        """Writes, in order, the positions of the keys above `hi` and of the first `room` within [lo, hi]."""
        row = self.row

        def step(i: Word, carry: list[Word]) -> list[Word]:
            above_before, within_before, line = carry
            position, keys, real = self.keys_of(i)
            above = [valid & (key > hi) for key, valid in zip(keys, real, strict=True)]
            within = [valid & (key >= lo) & (key <= hi) for key, valid in zip(keys, real, strict=True)]
            counts = [ptx.as_number(a) | (ptx.as_number(w) << 16) for a, w in zip(above, within, strict=True)]
            mine = ptx.total(counts)
            scanned = ptx.sum_of_lanes_up_to(mine)
            before, total = row.before_and_total(row.sums + (line << 7), ptx.from_lane(scanned, 31))
            before = before + scanned - mine
            for e, (a, w, count) in enumerate(zip(above, within, counts, strict=True)):
                rank_within = within_before + (before >> 16)
                rank = above_before + (before & 0xFFFF) + ptx.min_u32(rank_within, room)
                chosen = a | (w & (rank_within < room))
                ptx.store_global(ptx.offset(out, rank, 4), position + e, chosen)
                before = before + count
            return [above_before + (total & 0xFFFF), within_before + (total >> 16), line ^ 1]

        ptx.loop(row.rounds(self.pieces), [ptx.constant(0), ptx.constant(0), ptx.constant(0)], step)
