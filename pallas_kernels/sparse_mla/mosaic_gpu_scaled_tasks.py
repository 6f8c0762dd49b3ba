"""How queries, heads and lists become the tasks of mosaic_gpu_scaled.py, and where it has what in shared memory."""

from __future__ import annotations

import dataclasses
import itertools

from pallas_kernels import hopper
from pallas_kernels.hopper.columns import KEYS, PIECE, SHARED_BYTES
from pallas_kernels.latents import VALUE_DIM

MAX_COLUMNS = 64
MAX_SPLITS = 8  # blocks of a cluster
MAX_SLOTS = 6
PIECES = VALUE_DIM // 128  # of 128 columns of a key block's codes
HALVES = 2  # of a slot, one for each values' warpgroup
STAGED_LINE = 2 * VALUE_DIM + 16  # bytes of a head's staged result; 16 more, so that a warp's stores meet no bank twice


@dataclasses.dataclass(frozen=True)
class Tasks:
    """B x S queries of H heads over T keys each, with lists of `blocks` key blocks.

    Where `splits` is more than 1, a task is that of a cluster: all but its last block have `share` key blocks of the list, the
    last one has what is left.
    """

    batch: int
    queries: int
    heads: int
    keys: int
    blocks: int
    splits: int = 1

    def __post_init__(self) -> None:
        if min(self.heads, self.blocks) < 1:
            raise ValueError(f"there is no task of {self.heads} heads and {self.blocks} key blocks")
        if not 1 <= self.splits <= MAX_SPLITS or (self.splits - 1) * self.share >= self.blocks:
            raise ValueError(f"{self.blocks} key blocks do not divide into {self.splits} of at most {MAX_SPLITS} splits")

    @property
    def tiles(self) -> int:
        """Into how many tasks the heads of a query are divided."""
        return -(-self.heads // MAX_COLUMNS)

    @property
    def heads_per_tile(self) -> int:
        """Heads of every tile but perhaps the last."""
        return -(-self.heads // self.tiles)

    @property
    def columns(self) -> int:
        return -(-self.heads_per_tile // 8) * 8

    @property
    def is_wide(self) -> bool:
        """Whether the accumulators need more than a warpgroup's even share of registers."""
        return self.columns > MAX_COLUMNS // 2

    @property
    def count(self) -> int:
        """Tasks, or clusters that share one."""
        return self.batch * self.queries * self.tiles

    @property
    def grid(self) -> int:
        """Persistent blocks, or clusters of one task each."""
        return self.count if self.splits > 1 else min(hopper.NUM_SMS, self.count)

    @property
    def share(self) -> int:
        """Key blocks of a task, at most."""
        return -(-self.blocks // self.splits)


# How many clusters of so many blocks run at a time for sure: a cluster lies within a group of 14 to 18 of the 132
# multiprocessors. One cluster too many takes as long as twice as many (docs/kernels.md).
RESIDENT_CLUSTERS = {8: 13, 4: 29, 2: 66}


def splits_of(tiles: int, blocks: int) -> int:
    """Into how many parts lists of `blocks` key blocks are split, so that the device is full and all run at once."""
    fitting = (n for n, most in RESIDENT_CLUSTERS.items() if tiles <= most and (n - 1) * -(-blocks // n) < blocks)
    return max(fitting, default=1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where things are in shared memory, in bytes. Matrices come first and are tiles of 8 lines of 128 bytes."""

    columns: int
    slots: int
    codes: int  # [slots][4 pieces][64 keys][128]
    rotary: int  # [slots][64 keys][64] bfloat16
    queries: int  # [4 pieces][2 parts][columns][128]; in the end the results of a cluster's block, [columns][STAGED_LINE]
    rotary_queries: int  # [columns][64] bfloat16
    weights: int  # [2][columns][64] float16
    scales: int  # [slots][64] float32, of keys; zero for entries that do not count
    query_scales: int  # [columns] float32
    factors: int  # [2][columns] float32
    sums: int  # [2][4 warps][columns] float32
    logs: int  # [columns] float32, log2 of the sum of the weights of a cluster's block
    maxima: int  # [4 warps][columns] float32
    raised: int  # [2], whether factors are to be applied
    full: int  # barriers, [slots][2]
    empty: int
    p_ready: int
    p_free: int
    end: int

    @staticmethod
    def of(columns: int) -> Memory:
        for slots in range(MAX_SLOTS, 1, -1):
            row, barriers = 4 * columns, 16 * slots
            sizes = [slots * PIECES * PIECE, slots * PIECE, PIECES * 256 * columns, 128 * columns, 256 * columns]
            sizes += [4 * KEYS * slots, row, 2 * row, 8 * row, row, 4 * row, 8, barriers, barriers, 16, 16]
            if sum(sizes) <= SHARED_BYTES:
                break
        return Memory(columns, slots, *itertools.accumulate([0, *sizes]))

    @property
    def query_part(self) -> int:
        return 128 * self.columns

    @property
    def query_piece(self) -> int:
        return 2 * self.query_part
