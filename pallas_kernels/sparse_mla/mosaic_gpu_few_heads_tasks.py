"""How queries and lists become the tasks of mosaic_gpu_few_heads.py, and where it has what in shared memory."""

from __future__ import annotations

import dataclasses
import itertools

from pallas_kernels import hopper
from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.columns import PIECE, SHARED_BYTES
from pallas_kernels.latents import VALUE_DIM, WIDTH

ROW_BYTES = 2 * WIDTH
MAX_HEADS = 32
UNIT_PIECES = 2  # 128 bytes wide pieces of a unit
UNITS = VALUE_DIM // (64 * UNIT_PIECES)  # of a key block
UNIT = UNIT_PIECES * PIECE
MAX_UNITS = 3 * UNITS - 1  # of the ring: `Memory` says why


@dataclasses.dataclass(frozen=True)
class Tasks:
    """B x S queries of H heads over T keys each, with lists of `blocks` key blocks."""

    batch: int
    queries: int
    heads: int
    keys: int
    blocks: int

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= MAX_HEADS:
            raise ValueError(f"between 1 and {MAX_HEADS} heads fit, not {self.heads}")

    @property
    def columns(self) -> int:
        return -(-self.heads // 8) * 8

    @property
    def count(self) -> int:
        return self.batch * self.queries

    @property
    def grid(self) -> int:
        return min(hopper.NUM_SMS, self.count)

    def of_block(self, block: ptx.Word) -> ptx.Word:
        """How many tasks a block of the grid has: `block`, `block` + grid, ..."""
        return (self.count + self.grid - 1 - block) // self.grid


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where things are in shared memory, in bytes. Matrices come first and are tiles of 8 lines of 128 bytes.

    ring: how many units there are. Few enough for two buffers of rotary columns: when the gathering warpgroup fills the last
    unit of block b + 2, the first one of block b or a later one is free, so the logits of b have been made.
    """

    columns: int
    ring: int
    units: int  # [ring][UNIT]
    rotary: int  # [2][PIECE]
    queries: int  # [9][columns][64] bfloat16
    weights: int  # [2][columns][64] bfloat16
    factors: int  # [2][columns] float32
    sums: int  # [2][4 warps][columns] float32
    maxima: int  # [4 warps][columns] float32
    raised: int  # [2], whether factors are to be applied
    full: int  # barriers
    empty: int
    p_ready: int
    p_free: int
    end: int

    @staticmethod
    def of(columns: int) -> Memory:
        row, barriers = 4 * columns, 8 * MAX_UNITS
        rest = [2 * PIECE, ROW_BYTES * columns, 2 * 128 * columns, 2 * row, 8 * row, 4 * row, 8, barriers, barriers, 16, 16]
        ring = min((SHARED_BYTES - sum(rest)) // UNIT, MAX_UNITS)
        return Memory(columns, ring, *itertools.accumulate([0, ring * UNIT, *rest]))
