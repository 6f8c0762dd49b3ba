"""How queries, heads and lists become the tasks of mosaic_gpu_attention.py, and how its lists are packed."""

from __future__ import annotations

import dataclasses

from pallas_kernels import hopper

TILE = 64  # query rows of a tile, keys of a block
PAIR = 2 * TILE  # keys per step: one block for each computing warpgroup
OWNER_SHIFT = 24  # a packed entry is key | owners << OWNER_SHIFT
MAX_PACKED = 8 - 1  # owners fit the bits above the key, without the sign
MAX_SPLITS = 8  # blocks of a cluster


@dataclasses.dataclass(frozen=True)
class Tasks:
    """How B x S queries of H heads become tiles, and tiles tasks.

    packed queries share a tile and one list of entries key | owners << 24 (bit p: query p of the tile selected the key);
    with packed 1 a list holds one query's keys, -1 where empty. A list's `pairs` blocks of 128 entries are divided evenly
    among `splits` tasks, which the blocks of a cluster do at the same time and combine.
    """

    batch: int
    queries: int
    heads: int
    keys: int
    pairs: int
    packed: int = 1
    splits: int = 1

    def __post_init__(self) -> None:
        if self.heads > TILE and self.heads % TILE:
            raise ValueError(f"more than {TILE} heads must be a multiple of {TILE}, not {self.heads}")
        if not 1 <= self.packed <= MAX_PACKED or (self.packed > 1 and self.packed * self.heads > TILE):
            raise ValueError(f"{self.packed} queries of {self.heads} heads do not fit a tile of {TILE} rows")
        if self.packed > 1 and self.splits > 1:
            raise ValueError(f"lists of {self.packed} queries are not split, here into {self.splits}")
        if self.packed > 1 and self.keys > 1 << OWNER_SHIFT:
            raise ValueError(f"{self.keys} keys do not fit the {OWNER_SHIFT} bits of a packed entry")
        if not 1 <= self.splits <= MAX_SPLITS or self.pairs < 1 or self.pairs % self.splits:
            raise ValueError(
                f"{self.pairs} pairs of key blocks do not divide into {self.splits} of at most {MAX_SPLITS} splits"
            )

    @property
    def rows(self) -> int:
        """Query rows, B * S * H."""
        return self.batch * self.queries * self.heads

    @property
    def rows_per_tile(self) -> int:
        return min(TILE, self.packed * self.heads)

    @property
    def tiles_per_list(self) -> int:
        return max(1, self.heads // TILE)

    @property
    def tiles_per_batch(self) -> int:
        return -(-self.queries * self.heads // self.rows_per_tile)

    @property
    def lists(self) -> int:
        return self.batch * self.tiles_per_batch // self.tiles_per_list

    @property
    def count(self) -> int:
        return self.batch * self.tiles_per_batch * self.splits

    @property
    def blocks(self) -> int:
        """Thread blocks of the grid: persistent ones, or one for each task of a cluster."""
        return self.count if self.splits > 1 else min(hopper.NUM_SMS, self.count)

    @property
    def pairs_per_task(self) -> int:
        """Pairs of key blocks that a task has of a list of full length."""
        return self.pairs // self.splits
