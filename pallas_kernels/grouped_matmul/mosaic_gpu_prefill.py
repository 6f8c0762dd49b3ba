"""grouped_matmul on Hopper where groups have many rows: one warpgroup copies, two multiply.

A tile is up to 128 rows of one group, counted from the group's first row, and `n` columns. Each of the two multiplying
warpgroups has a half of 64 rows. A group's last half is moved up so that it ends with the group: the rows it shares with
the half before are computed and written twice, with the same values, and no half needs a mask. Only a group of fewer than
64 rows does. Where a tile has one half only, the second warpgroup sits it out. For groups of about 640 random rows that
is 5 % of products in vain, against 20 % for blocks at fixed multiples of 128 that are cut where groups meet.

A block of the grid is persistent, one on each SM. Neighbouring blocks take the columns of one tile, then
those of the group's next one, so that what is read at one time, a group's matrix or two and their rows, stays in L2.
The copies run ahead into the next tile while the warpgroups store this one; and a warpgroup may be ahead of the other by
the stages, so that one multiplies while the other stores.

With `gated`, the columns of a tile are `n` of the first half of a matrix's columns (a) and the same of the second (b), and
what is stored is silu(a) * b.

This file has the rules by which arguments become tiles; the kernel is in mosaic_gpu_prefill_kernel.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper

HALF = 64  # rows of a warpgroup, what one wgmma takes
BLOCK_K = 64  # 128 bytes, one swizzled line
PIECE = 64  # columns stored by one copy
WIDTHS, GATED_WIDTHS = (256, 192, 128, 64), (128, 64)  # of a tile; the widest that divides the columns of the result
SHARED_MEMORY = 232448 - 2048  # bytes, less what barriers, alignment and the compiler take


@dataclasses.dataclass(frozen=True)
class Tiling:
    """n: columns of a tile's result; stages: steps of BLOCK_K in flight; slots: pieces of a warpgroup on their way out;
    cluster: blocks that take the columns next to each other of one tile at the same time and share the copies of its rows.
    """

    n: int
    stages: int
    slots: int = 2
    gated: bool = False
    cluster: int = 1

    def __post_init__(self) -> None:
        if self.cluster not in (1, 2):
            raise ValueError(f"{self}: a cluster has 1 or 2 blocks, more do not fill the SMs")
        if self.n % PIECE or not PIECE <= self.columns <= 256:
            raise ValueError(f"{self}: a tile takes a multiple of {PIECE} columns and at most 256 of a matrix")
        if self.stages < 2 or not 1 <= self.slots <= self.n // PIECE:
            raise ValueError(f"{self}: it needs 2 stages at least and 1 to {self.n // PIECE} slots")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self}: {self.shared_memory} bytes of shared memory, there are {SHARED_MEMORY}")

    @property
    def columns(self) -> int:
        """Columns of a matrix that a tile reads."""
        return self.n * (1 + self.gated)

    @property
    def shared_memory(self) -> int:
        return 2 * (self.stages * BLOCK_K * (2 * HALF + self.columns) + 2 * self.slots * HALF * PIECE)


def tiling_for(columns: int, gated: bool) -> Tiling:
    """The fastest tiling for a result of so many columns, a multiple of PIECE; docs/kernels.md has the measurements."""
    width = next(width for width in (GATED_WIDTHS if gated else WIDTHS) if columns % width == 0)
    cluster = 2 if columns % (2 * width) == 0 else 1
    return Tiling(n=width, stages=4, slots=min(2, width // PIECE), gated=gated, cluster=cluster)


def serves(rows: int, groups: int) -> bool:
    """Whether groups fill the tiles."""
    return rows >= 2 * HALF * groups


def tiles_of(group_sizes: jax.Array, rows: int, pieces: int = 2) -> tuple[jax.Array, jax.Array]:
    """The tiles of up to `pieces` times HALF rows, as [3 + pieces, tiles] int32, and their number [1].

    A tile's group, the first row of each piece of HALF rows (-1: there is none), first row and end of the group. A piece that
    is not whole (size < HALF) starts where the rows end at the latest, which may be before its group.
    """
    groups, tall = group_sizes.shape[0], pieces * HALF
    count = rows // tall + min(groups, rows)
    places = jnp.arange(groups)
    up_to = places[None] <= places[:, None]
    ends = jnp.sum(jnp.where(up_to, group_sizes[None], 0), axis=1)
    tiles = -(-group_sizes // tall)
    after = jnp.sum(jnp.where(up_to, tiles[None], 0), axis=1)
    tile = jnp.arange(count)
    group = jnp.minimum(jnp.sum(after <= tile[:, None], axis=1), groups - 1)
    end, size = ends[group], group_sizes[group]
    start = end - size
    first = tall * (tile - (after - tiles)[group])  # of the tile in its group
    latest = jnp.where(size < HALF, jnp.minimum(start, rows - HALF), end - HALF)
    begins = [jnp.minimum(start + first, latest)]
    for piece in range(1, pieces):
        row = first + piece * HALF
        begins.append(jnp.where(row < size, jnp.minimum(start + row, latest), -1))
    return jnp.stack([group, *begins, start, end]).astype(jnp.int32), after[-1:].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of a call: rows [m, k] of `dtype` times matrices [E, k, n], in so many tiles of rows."""

    tiling: Tiling
    m: int
    k: int
    n: int
    tiles: int
    dtype: Any

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.n // self.parts

    @property
    def parts(self) -> int:
        """Parts of a matrix's columns that a tile has some of."""
        return 1 + self.tiling.gated

    @property
    def columns(self) -> int:
        """Tiles that a cluster has side by side of one tile of rows."""
        return self.width // (self.tiling.n * self.tiling.cluster)

    @property
    def steps(self) -> int:
        """Steps of BLOCK_K that a tile takes."""
        return self.k // BLOCK_K

    @property
    def blocks(self) -> int:
        """Clusters of the grid."""
        return min(hopper.NUM_SMS // self.tiling.cluster, self.tiles * self.columns)


def forward(
    rows: jax.Array,
    matrices: jax.Array,
    group_sizes: jax.Array,
    *,
    gated: bool = False,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> jax.Array:
    """rows [M, K], M >= HALF, times matrices [E, K, N] -> [M, N]; gated: silu(the first N / 2 columns) * the others."""
    (m, k), n = rows.shape, matrices.shape[2]
    width = n // (1 + gated)
    tiling = tiling or tiling_for(width, gated)
    if width % (tiling.n * tiling.cluster):
        raise ValueError(f"{tiling} does not divide {width} columns")
    from pallas_kernels.grouped_matmul import mosaic_gpu_prefill_kernel as kernel

    tiles, count = tiles_of(group_sizes, m)
    return kernel.multiply(Problem(tiling, m, k, n, tiles.shape[1], rows.dtype), rows, matrices, tiles, count, interpret)
