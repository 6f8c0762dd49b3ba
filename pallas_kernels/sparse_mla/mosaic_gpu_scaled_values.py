"""The values' warpgroups of mosaic_gpu_scaled.py, and how the blocks of a cluster combine what they have."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.columns import PIECE, Buffers, Ring, Thread, in_tiles, inverses_of, times_by_column
from pallas_kernels.latents import VALUE_DIM
from pallas_kernels.sparse_mla.mosaic_gpu_scaled_tasks import HALVES, PIECES, STAGED_LINE, Memory, Tasks

TILES = VALUE_DIM // HALVES // 64  # of 64 value columns, of a values' warpgroup
FRAGMENTS = {False: 2, True: 1}  # of 16 keys and 64 value columns that are multiplied together; True for wide tasks

Values = list[Any]  # registers


@dataclasses.dataclass(frozen=True)
class Shared:
    """The addresses of what is in shared memory. A place in the ring is a slot."""

    memory: Memory
    base: ptx.Word

    @staticmethod
    def of(memory: Memory, ref: Any) -> Shared:
        return Shared(memory, ptx.shared_address(ref))

    @property
    def buffers(self) -> Buffers:
        return Buffers(self.memory, self.base)

    def start(self) -> Ring:
        return Ring.start(self.memory.slots)

    def ring(self, carry: Values) -> Ring:
        return Ring(self.memory.slots, *carry)

    def codes(self, ring: Ring) -> ptx.Word:
        return self.base + self.memory.codes + ring.place * (PIECES * PIECE)

    def rotary(self, ring: Ring) -> ptx.Word:
        return self.base + self.memory.rotary + ring.place * PIECE

    def scales(self, ring: Ring) -> ptx.Word:
        return self.base + self.memory.scales + ring.place * (PIECE // 32)

    def full(self, ring: Ring, half: int) -> ptx.Word:
        """An arrival of every gathering thread after its copies."""
        return self.base + (self.memory.full + 8 * half) + (ring.place << 4)

    def empty(self, ring: Ring, half: int) -> ptx.Word:
        """An arrival of every thread of the half's warpgroup, once the codes are in its registers."""
        return self.base + (self.memory.empty + 8 * half) + (ring.place << 4)

    def init_barriers(self) -> None:
        for i in range(HALVES * self.memory.slots):
            ptx.barrier_init(self.base + (self.memory.full + 8 * i), 128)
            ptx.barrier_init(self.base + (self.memory.empty + 8 * i), 128)
        self.buffers.init(consumers=128 * HALVES)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task is about."""

    query: ptx.Word
    split: ptx.Word
    first_head: ptx.Word
    heads: ptx.Word
    first_row: ptx.Word  # of the [B * S * H] query rows
    first_block: ptx.Word  # of the [B * S * blocks] key blocks

    @staticmethod
    def of(tasks: Tasks, number: ptx.Word) -> Task:
        query, tile = number // tasks.tiles, number % tasks.tiles
        split = ptx.cluster_rank() if tasks.splits > 1 else ptx.constant(0)
        first_head = tile * tasks.heads_per_tile
        return Task(
            query,
            split,
            first_head,
            ptx.min_s32(tasks.heads - first_head, tasks.heads_per_tile),
            query * tasks.heads + first_head,
            query * tasks.blocks + split * tasks.share,
        )

    def blocks(self, tasks: Tasks, counts: ptx.Address | None) -> ptx.Word:
        """How many key blocks to visit. counts: address of [B * S] int32, if there are any."""
        if counts is not None:
            return ptx.load_global(ptx.offset(counts, self.query, 4))
        rest = tasks.blocks - self.split * tasks.share
        return ptx.opaque(ptx.min_s32(rest, tasks.share))  # a constant would cost registers


def for_each_task(tasks: Tasks, block: ptx.Word, carry: Values, body: Callable[[ptx.Word, Values], Values]) -> None:
    """carry = body(number of a task, carry) for the tasks of a block of the grid."""
    if tasks.splits > 1:
        body(block, carry)
        return
    count = (tasks.count + tasks.grid - 1 - block) // tasks.grid
    ptx.loop(count, carry, lambda i, carry: body(block + i * tasks.grid, carry))


def sit_out_combine(tasks: Tasks) -> None:
    """Warpgroups that do not combine take part in the barriers of those that do."""
    if tasks.splits > 1:
        ptx.cluster_barrier()
        ptx.cluster_barrier()


@dataclasses.dataclass(frozen=True)
class Summer:
    """A thread of the second or the third warpgroup: values times weights, 4 tiles of 64 value columns each.

    Row g of a warp's 16 rows of a tile is its value column 2 g, row g + 8 the next one.
    """

    tasks: Tasks
    shared: Shared
    half: int
    block: ptx.Word
    counts: ptx.Address | None
    out: Any
    to_columns: tuple[ptx.Word, ...]  # a key's 16 columns, the warp's of an even tile of 64; the same of an odd one

    @staticmethod
    def of(tasks: Tasks, memory: Memory, half: int, block: ptx.Word, ref, out, counts=None) -> Summer:
        shared = Shared.of(memory, ref)
        thread = ptx.thread() & 127
        lane, warp = thread & 31, thread >> 5
        counts_at = None if counts is None else ptx.global_address(counts)
        to_columns = tuple(in_tiles(lane, warp + 4 * odd) for odd in range(2))
        return Summer(tasks, shared, half, block, counts_at, out, to_columns)

    @property
    def groups(self) -> int:
        return self.tasks.columns // 8

    def run(self) -> None:
        for_each_task(self.tasks, self.block, [*self.shared.start().carry, ptx.constant(0)], self._task)

    def _task(self, number: ptx.Word, carry: Values) -> Values:
        blocks = Task.of(self.tasks, number).blocks(self.tasks, self.counts)
        zeros = [ptx.number(0.0)] * (4 * TILES * self.groups)
        carry = ptx.loop(blocks, [*carry, *zeros], lambda b, carry: self._add_block(b, blocks, carry))
        # Else what the following needs is kept in registers through the loop.
        task, thread = Task.of(self.tasks, ptx.opaque(number)), Thread.of(ptx.opaque(ptx.thread()))
        buffer, buffers = (carry[2] - 1) & 1, self.shared.buffers
        totals = []
        for j in range(self.groups):
            by_warp = [self._columns(self.shared.memory.sums, (buffer << 2) + w, j) for w in range(4)]
            totals += [ptx.total(parts) for parts in zip(*by_warp, strict=True)]
        ptx.barrier_arrive(buffers.p_free(buffer))
        self._store(task, thread, times_by_column(carry[3:], inverses_of(totals)))
        if self.tasks.splits > 1:
            combine(self.tasks, self.shared, self.out, task, self.half)
        return carry[:3]

    def _columns(self, kind: int, row: ptx.Word, j: int) -> Values:
        """This thread's two of the j-th 8 columns of a row of float32."""
        own = (ptx.opaque(ptx.thread()) & 3) << 3
        return ptx.load_shared_floats(self.shared.base + (kind + 32 * j) + row * (4 * self.tasks.columns) + own)

    def _add_block(self, number: ptx.Word, blocks: ptx.Word, carry: Values) -> Values:
        """Adds a block's weighted values to the sums."""
        shared, buffers, groups = self.shared, self.shared.buffers, self.groups
        ring, done, sums = shared.ring(carry[:2]), carry[2], carry[3:]
        buffer, turn = done & 1, done >> 1
        ptx.barrier_wait(shared.full(ring, self.half), ring.parity)
        ptx.barrier_wait(buffers.p_ready(buffer), turn & 1)
        raised = ptx.load_shared(buffers.raised(buffer))

        def rescaled():
            factors = [x for j in range(groups) for x in self._columns(shared.memory.factors, buffer, j)]
            return times_by_column(sums, factors)

        sums = ptx.choose(raised.differs(0), rescaled, sums)
        by_tile = self._multiply(ring, buffer, [sums[i : i + 4 * groups] for i in range(0, len(sums), 4 * groups)])
        sums = [x for tile in ptx.multiplied(by_tile) for x in tile]
        with ptx.when((number + 1).differs(blocks)):
            ptx.barrier_arrive(buffers.p_free(buffer))
        return [*ring.next().carry, done + 1, *sums]

    def _multiply(self, ring: Ring, buffer: ptx.Word, by_tile: list[Values]) -> list[Values]:
        """Starts the products of a block, and frees its codes."""
        weights = ptx.matrix(self.shared.buffers.weights(buffer))
        codes, together = self.shared.codes(ring), FRAGMENTS[self.tasks.is_wide]
        words = self._load(codes, 0)
        for step in range(2 * TILES):
            tile, keys = divmod(step, 2)
            pairs = [ptx.float16_from_e4m3(word) for word in words]
            fragments = [[*pairs[i], *pairs[i + 1]] for i in (0, 2)]
            if step + 1 < 2 * TILES:
                words = self._load(codes, step + 1)
            else:  # all codes are in registers
                ptx.barrier_arrive(self.shared.empty(ring, self.half))
            for first in range(0, 2, together):
                these = range(first, first + together)
                by_tile[tile] = ptx.multiply_fragments(
                    by_tile[tile],
                    [fragments[i] for i in these],
                    weights,
                    [64 * keys + 32 * i for i in these],
                    columns=self.tasks.columns,
                )
                ptx.multiply_commit()
                ptx.multiply_wait(1)  # the registers of the fragments before are free
        return by_tile

    def _load(self, codes: ptx.Word, step: int) -> Values:
        """Four words: of 32 keys, two columns of two keys each."""
        tile, keys = divmod(step, 2)
        piece = self.half * PIECES // HALVES + tile // 2
        return ptx.load_shared_transposed(codes + self.to_columns[tile % 2] + (piece * PIECE + 4096 * keys))

    def _store(self, task: Task, thread: Thread, sums: Values) -> None:
        """Stores to the output, or where the blocks of a cluster combine."""
        is_split = self.tasks.splits > 1
        column = (thread.warp << 4) + (thread.row << 1)  # of a tile, and the next one
        if is_split:
            staged = self.shared.base + self.shared.memory.queries + thread.column * STAGED_LINE + (column << 1)
        else:
            to = ptx.offset(ptx.global_address(self.out), task.first_row + thread.column, 2 * VALUE_DIM)
            to = ptx.offset(to, column, 2)
        for j in range(self.groups):
            for c in range(2):
                head = 8 * j + c
                counts = (thread.column + head).signed < task.heads
                for tile in range(TILES):
                    of_tile = sums[4 * (tile * self.groups + j) :]
                    word = ptx.to_bfloat16_pair(of_tile[c], of_tile[2 + c])
                    first = 128 * (TILES * self.half + tile)
                    if is_split:
                        ptx.store_shared(staged + (STAGED_LINE * head + first), word)
                    else:
                        ptx.store_global(ptx.offset(to, ptx.constant(1), 2 * VALUE_DIM * head + first), word, counts)


def combine(tasks: Tasks, shared: Shared, out: Any, task: Task, half: int) -> None:
    """The blocks of a cluster combine their parts: each writes an even share of the heads, from all blocks' shared memory."""
    share = -(-tasks.heads_per_tile // tasks.splits)
    ptx.cluster_barrier()
    thread = (ptx.opaque(ptx.thread()) & 127) + 128 * half
    to = ptx.offset(ptx.global_address(out), task.first_row, 2 * VALUE_DIM)
    chunk = thread & 63

    def four_heads(i, carry):  # 256 threads take 64 chunks of 16 bytes of each
        within = (thread >> 6) + (i << 2)
        head = task.split * share + within
        here = ptx.min_s32(head, tasks.columns - 1)
        words = _combined_words(tasks.splits, shared, here, chunk)
        counts = (within.signed < share) & (head.signed < task.heads)
        ptx.store_global_words(ptx.offset(ptx.offset(to, here, 2 * VALUE_DIM), chunk, 16), words, counts)
        return carry

    ptx.loop(ptx.opaque(ptx.constant(-(-share // 4))), [], four_heads)  # unrolled, it would take too many registers
    ptx.cluster_barrier()  # no block leaves while others read its memory


def _combined_words(splits: int, shared: Shared, head: ptx.Word, chunk: ptx.Word) -> Values:
    """8 numbers of a head of all blocks' results, weighed by their sums of weights."""
    memory = shared.memory
    part_at = shared.base + memory.queries + head * STAGED_LINE + (chunk << 4)
    log_at = shared.base + memory.logs + (head << 2)
    logs = [ptx.load_peer_float(ptx.peer_address(log_at, peer)) for peer in range(splits)]
    parts = [ptx.load_peer_words(ptx.peer_address(part_at, peer)) for peer in range(splits)]
    top = functools.reduce(ptx.max_f32, logs)
    weights = [ptx.exp2(log - top) for log in logs]
    inverse = 1.0 / ptx.total(weights)
    words = []
    for word in range(4):
        low, high = zip(*(ptx.from_bfloat16_pair(part[word]) for part in parts), strict=True)
        sums = [ptx.total(map(operator.mul, values, weights)) for values in (low, high)]
        words.append(ptx.to_bfloat16_pair(*(x * inverse for x in sums)))
    return words
