"""Step 3 of a selection: a row's scores stream past, and those that reach the threshold are appended to the candidates.

Each thread copies its own 16-byte pieces of the next chunks to shared memory (cp.async) while it works on the ones that have
come, so there is no barrier between a copy and its use. A score's position in the buffer is the number of those before it: one
packed scan per warp, a byte for each of a thread's loads, and one barrier per chunk.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word
from pallas_kernels.indexer_topk.mosaic_gpu_select_candidates import Candidates
from pallas_kernels.indexer_topk.mosaic_gpu_select_problem import BLOCK
from pallas_kernels.indexer_topk.mosaic_gpu_select_row import Row
from pallas_kernels.indexer_topk.mosaic_gpu_select_threshold import NO_VALUE


@dataclasses.dataclass(frozen=True)
class Loads:
    """A thread's loads of a chunk: their first positions, four scores each, and what these have to reach."""

    positions: list[Word]
    values: list[list[Float]]
    limits: list[Float]


class Stream:
    """Step 3 of a row. `begin` starts the copies of the first chunks, `fill` works them off and starts the others.

    blocks: how many to read: the listed ones, or without `listed` all of the row.
    """

    def __init__(self, row: Row, scores: Address, visible: Word, listed: Predicate | None, blocks: Word):
        self.row, self.p, self.candidates = row, row.p, Candidates(row)
        self.scores, self.visible, self.listed, self.blocks = scores, visible, listed, blocks
        blocks_per_load = 128 // BLOCK  # of a warp: 32 lanes, 4 scores each
        self.loads, self.lanes_per_block = self.p.config.loads, BLOCK // 4
        log_lanes = self.lanes_per_block.bit_length() - 1
        self.slots = [
            row.warp * (self.loads * blocks_per_load) + (row.lane >> log_lanes) + load * blocks_per_load
            for load in range(self.loads)
        ]
        self.within_block = (row.lane & (self.lanes_per_block - 1)) << 2

    def place(self, chunk: Word, load: int) -> tuple[Predicate, Word]:
        """Whether there is anything for this thread's load in a chunk, and its first position."""
        slot = chunk * (self.p.chunk // BLOCK) + self.slots[load]
        real, block = slot < self.blocks, slot
        if self.listed is not None:
            in_list = real & self.listed
            entry = ptx.load_shared_short(self.row.list + (slot << 1), in_list)
            block = ptx.select(self.listed, entry, slot)
        return real, block * BLOCK + self.within_block

    def arrival(self, stage: Word, load: int) -> Word:
        return self.row.staging + stage + load * 16 * self.row.threads

    def fetch(self, chunk: Word, stage: Word) -> None:
        for load in range(self.loads):
            real, position = self.place(chunk, load)
            ptx.copy_async_where(self.arrival(stage, load), ptx.offset(self.scores, position, 4), real)
        ptx.copies_commit()

    def begin(self) -> None:
        for ahead in range(self.p.stages):
            self.fetch(ptx.constant(ahead), ptx.constant(ahead * self.p.stage_bytes))

    def arrived(self, stage: Word, load: int, position: Word) -> list[Float]:
        xs = ptx.load_shared_floats(self.arrival(stage, load), 4)
        if self.p.clean:
            return xs
        keys = [
            ptx.select(position + e < self.visible, ptx.bits_of(ptx.number_or_lowest(x)), NO_VALUE) for e, x in enumerate(xs)
        ]
        return [ptx.float_of(key) for key in keys]

    def until_full(self, chunk: Word, count: Word, chunks: Word, limit: Float) -> list[Word]:
        """Appends chunks until one does not fit or all have: [the next one's number, how many scores there are]."""
        row, loads, stages = self.row, self.loads, self.p.stages

        def one(carry: list[Word]) -> tuple[list[Word], list[Word], Predicate]:
            chunk, count = carry
            stage = (chunk & (stages - 1)) * self.p.stage_bytes
            ptx.copies_done(stages - 1)
            come = self.loads_of(chunk, stage, limit)
            packed = ptx.constant(0)  # a byte per load, at most 4 x 32 lanes each
            for load in range(loads):
                packed = ptx.count_at_least(come.values[load], come.limits[load], packed, 1 << (8 * load))
            if self.p.config.leave_out == "append":
                self.fetch(chunk + stages, stage)
                chunk = chunk + 1
                return [chunk, count + packed], [], chunk < chunks
            scanned = ptx.sum_of_lanes_up_to(packed)
            of_warp, before_lane = ptx.from_lane(scanned, 31), scanned - packed
            parts = [(of_warp >> (8 * load)) & 255 for load in range(loads)]
            mine = ptx.total(parts)
            before, total = row.before_and_total(row.sums + ((chunk & 1) << 7), mine)
            fits = count + total <= self.p.capacity

            def append() -> None:
                self.fetch(chunk + stages, stage)
                self.append(come, count + before, before_lane, parts)

            ptx.branch(fits, append)
            chunk, count = chunk + ptx.as_number(fits), ptx.select(fits, count + total, count)
            return [chunk, count], [], fits & (chunk < chunks)

        return ptx.repeat([chunk, count], one, 0)

    def loads_of(self, chunk: Word, stage: Word, limit: Float) -> Loads:
        """What has come of a chunk; loads without anything have a limit that no score reaches."""
        places = [self.place(chunk, load) for load in range(self.loads)]
        values = [self.arrived(stage, load, position) for load, (_, position) in enumerate(places)]
        limits = [ptx.float_of(ptx.select(real, ptx.bits_of(limit), NO_VALUE)) for real, _ in places]
        return Loads([position for _, position in places], values, limits)

    def append(self, come: Loads, first: Word, before_lane: Word, of_warp: list[Word]) -> None:
        """Writes the scores that reach their limits to the buffer, those of a warp from `first` on, load by load.

        before_lane: a byte per load, how many of them earlier lanes have; of_warp: how many the warp has of each load.
        """
        for load in range(self.loads):
            address = self.row.buffer + ((first + ((before_lane >> (8 * load)) & 255)) << 3)
            ptx.append_at_least(come.values[load], come.limits[load], address, come.positions[load])
            first = first + of_warp[load]

    def fill(self, threshold: Word, top: Word) -> list[Word]:
        """Fills the buffer with the scores that reach the threshold: how many, and the new threshold. No key is above `top`.

        Compaction stands outside the loop over chunks: rare as it is, within it it would cost registers.
        """
        row = self.row
        blocks_per_chunk = self.p.chunk // BLOCK
        chunks = (self.blocks + (blocks_per_chunk - 1)) // blocks_per_chunk

        def fill_and_compact(carry: list[Word]) -> tuple[list[Word], list[Word], Predicate]:
            chunk, count, threshold = carry
            chunk, count = self.until_full(chunk, count, chunks, row.number_of_key(threshold))
            left = chunk < chunks
            count, threshold = ptx.choose(left, lambda: self.candidates.compact(count, threshold, top), [count, threshold])
            return [chunk, count, threshold], [], left

        count, threshold = ptx.repeat([ptx.constant(0), ptx.constant(0), threshold], fill_and_compact, 0)[1:]
        ptx.copies_done(0)  # of the groups that found nothing left to copy
        row.barrier()
        return [count, threshold]
