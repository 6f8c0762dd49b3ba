"""Runs a Mosaic GPU kernel that is written in `ptx` words alone with all threads of a block in lockstep.

Threads take every step together, under a mask of those that a branch or a loop has active. Indexing, arithmetic and the
algorithm are checked; shared memory starts as garbage, and what a copy will overwrite is garbage until it is waited for. Where
a block is told to (`races`), every access to a word of shared memory that another warp wrote, and every write to one that
another warp read, since the last barrier counts as a race. Fences and timing are outside its reach.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import ml_dtypes
import numpy as np

from tests.support.emulated.registers import put_in_place, registers
from tests.support.emulated.threads import Memory, Threads, pallas, vocabulary

GARBAGE = 0x5A5A5A5A


class _Accesses:
    """Who touched a shared word since the last barrier, and whether it was several warps."""

    def __init__(self, words: int):
        self.epoch, self.warp, self.several = np.zeros(words, int), np.zeros(words, int), np.zeros(words, bool)

    def by_others(self, index, warps, epoch):
        return (self.epoch[index] == epoch) & ((self.warp[index] != warps) | self.several[index])

    def note(self, index, warps, epoch) -> bool:
        """Returns whether two warps touched one word."""
        seen = dict.fromkeys(zip(index.tolist(), warps.tolist(), strict=True))
        clash = False
        for i, warp in seen:
            if self.epoch[i] != epoch:
                self.epoch[i], self.warp[i], self.several[i] = epoch, warp, False
            elif self.warp[i] != warp:
                self.several[i] = clash = True
        return clash


class Block(Threads):
    """The threads of one block."""

    def __init__(self, threads: int, memory: Memory | None = None, rank: int = 0):
        super().__init__(np.arange(threads), memory or Memory(), rank)
        self.groups: list[list] = []  # of copies that have not landed
        self.epoch, self.races, self.tracked = 1, 0, None
        self.tracked_accesses: dict[str, _Accesses] = {}

    def count_races(self, array: np.ndarray) -> None:
        """Counts races in this shared memory."""
        self.tracked, _ = self.memory.at(self.memory.address(array))
        self.tracked_accesses = {kind: _Accesses(array.size) for kind in ("reads", "writes", "counts")}

    def note(self, kind, array, places, size, threads):
        if array is not self.tracked or size < 4:
            return
        words = (places[:, None] * (size // 4) + np.arange(size // 4)).reshape(-1)
        warps = np.repeat(self.ids[threads] >> 5, size // 4)
        others = {"reads": ("writes", "counts"), "writes": ("writes", "reads", "counts"), "counts": ("reads", "writes")}
        accesses = self.tracked_accesses
        self.races += any(accesses[other].by_others(words, warps, self.epoch).any() for other in others[kind])
        clash = accesses[kind].note(words, warps, self.epoch)
        self.races += clash and kind == "writes"

    # -- copies and barriers

    def copies_commit(self):
        self.groups.append(self.copies)
        self.copies = []

    def copies_done(self, pending=None):
        """What this thread copied is there from here on, and not before."""
        if pending is None:
            self.copies_commit()
            pending = 0
        done, self.groups = self.groups[: len(self.groups) - pending], self.groups[len(self.groups) - pending :]
        for land in (land for group in done for land in group):
            land()

    def block_barrier(self):
        self.epoch += 1

    def barrier_aligned(self, identity, threads):
        assert self.active.all() and threads == self.ids.size
        self.epoch += 1

    def cluster_barrier(self):
        """Where stages end, all blocks have come."""

    cluster_exit = cluster_barrier

    # -- products

    def products_of_codes(self, row, other_row, vector):
        """The vector is that of lanes 0 .. 3; others must have the same."""
        numbers = self.bytes_of(vector, np.float16)
        lanes = self.by_warp(np.arange(self.ids.size)).reshape(-1)
        first = numbers[lanes // 32 * 32 + lanes % 4]
        assert np.array_equal(first, numbers, equal_nan=True), "every row has the same vector"
        codes = (self.bytes_of(words, ml_dtypes.float8_e4m3fn) for words in (row, other_row))
        sums = [(c * numbers).sum(1, dtype=np.float32) for c in codes]
        for distance in (1, 2):
            sums = [x + self.lane_distant(x, distance) for x in sums]
        return sums

    def add_products(self, sums, row, other_row, column):
        def lines(words):  # of a warp's 8 rows or columns, 32 numbers each
            return self.bytes_of(words, ml_dtypes.bfloat16).reshape(-1, 8, 32)

        products = np.concatenate([lines(row), lines(other_row)], axis=1) @ lines(column).transpose(0, 2, 1)  # [warps, 16, 8]
        products = products.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(self.ids.size, 4)
        return [x + products[:, i] for i, x in enumerate(sums)]

    def multiply_codes(self, codes, b, chunk, columns):
        row, other_row = (
            np.concatenate([self.bytes_of(codes[i], ml_dtypes.float8_e4m3fn) for i in (start, start + 2)], axis=1)
            for start in (0, 1)
        )
        sums = np.zeros((self.ids.size, columns // 2), np.float32)
        for first in range(0, self.ids.size, 128):
            group = slice(first, first + 128)
            halves = [self.swizzled(self.spread(b)[first] + half * chunk, columns, 64, np.float16) for half in range(2)]
            # Word q of a line's 16 bytes i has its numbers 16 q + 2 i and the next.
            words = [half.reshape(columns, 8, 4, 2).transpose(0, 2, 1, 3).reshape(columns, 64) for half in halves]
            matrix = np.concatenate(words, axis=1).T
            for other, of_lane in enumerate((row, other_row)):
                # Of the 32 codes of lane 4 r + q, the first 16 begin at 16 q, the others at 64 + 16 q.
                lines = of_lane[group].reshape(32, 4, 2, 16).transpose(0, 2, 1, 3).reshape(32, 128)
                products = np.repeat(lines @ matrix, 4, axis=0).reshape(128, columns // 8, 4, 2)
                mine = products[np.arange(128), :, np.arange(128) % 4]
                sums[group].reshape(128, columns // 8, 2, 2)[:, :, other] = mine
        return list(sums.T)


@contextlib.contextmanager
def turns(monkeypatch, kind: type[Block] = Block):
    """take(block, action) is action() with the block's words in the place of `ptx`."""
    whose: list[Block] = []

    def take(block: Block, action):
        whose[:] = [block]
        return action()

    # What lanes without work compute from garbage may overflow.
    with monkeypatch.context() as patch, np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        put_in_place(patch, vocabulary(kind, lambda: whose[0]))
        yield take


def run(monkeypatch, module, function, *arguments):
    """`function(*arguments)` of a kernel module whose kernels' bodies are single inline functions."""

    def kernel(body, *, out_type, scratch_types, grid, num_threads, **_):
        def call(*operands):
            outs = [np.full(out.shape, GARBAGE, np.int32) for out in out_type]
            for i in range(*grid):
                scratch = [np.full(s.shape, GARBAGE, np.int32) for s in scratch_types]
                inputs = [*map(np.asarray, operands), *outs, *scratch]
                with turns(monkeypatch) as take, monkeypatch.context() as patch:
                    patch.setattr(jax.lax, "axis_index", lambda _, i=i: i)
                    take(Block(128 * num_threads), functools.partial(body, *inputs))
            return outs

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "plgpu", pallas(kernel))
        return function(*arguments)


def run_grid(
    monkeypatch, arrays: dict[str, np.ndarray], blocks: int, threads: int, shared_bytes: int, stages, cluster: int = 1
) -> None:
    """Runs the stages of a grid of thread blocks with a grid barrier between any two stages.

    stages(addresses by name, number of the block, address of its shared memory) returns one block's stages, each with
    `begin`, `prefetches` and `run`. `arrays` are of 32-bit words; the kernel's writes go to them. Every `cluster` blocks that
    follow one another read each other's shared memory.
    """
    memory, grid = Memory(), []
    shared_memories = [np.full(-(-shared_bytes // 4), GARBAGE, np.int32) for _ in range(blocks)]
    for shared in shared_memories:
        memory.address(shared)
    with turns(monkeypatch) as take:
        for rank, shared in enumerate(shared_memories):
            block = Block(threads, memory, rank % cluster)
            addresses = {name: registers(block.global_address(array)) for name, array in arrays.items()}
            given = addresses, registers(block.spread(rank)), registers(block.global_address(shared))
            grid.append((block, take(block, functools.partial(stages, *given))))
        for i in range(len(grid[0][1])):
            # Every block before this stage has ended the one before it; `begin` may run while others have not.
            for block, stages_of_block in grid:
                for begin in (stages_of_block[i].begin, *stages_of_block[i].prefetches):
                    take(block, begin)
            for block, stages_of_block in grid:
                take(block, stages_of_block[i].run)
