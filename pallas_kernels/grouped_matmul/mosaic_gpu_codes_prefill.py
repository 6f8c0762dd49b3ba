"""grouped_matmul on Hopper of rows and matrices in 8 bits, where groups have many rows.

Tiles, warpgroups and copies are those of mosaic_gpu_prefill. The sums of wgmma over 8-bit floats keep too few bits for a whole
row, so each of them is over BLOCK_K = 128 codes, which share their scales, and begins at zero; float32 registers add up the
scaled sums. A warpgroup multiplies WAVE columns at a time: while it scales and adds those, the other warpgroup multiplies.

This file has the rules by which arguments become tiles; the kernel is in mosaic_gpu_codes_prefill_kernel.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill import HALF, SHARED_MEMORY, tiles_of
from pallas_kernels.quant import BLOCK, Scaled, float_scales

BLOCK_K = BLOCK  # 128 bytes, one swizzled line, and the codes that share a scale
WAVE = BLOCK  # columns that share scales
WAVES = 2  # of a tile; with `gated` one of either half of a matrix's columns
PIECE = 64  # columns stored by one copy; a matrix has a multiple of it
CODES = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Tiling:
    """stages: steps of BLOCK_K in flight; slots: pieces of a warpgroup's result on their way out, which `gated` has none of;
    cluster: blocks that take a tile's columns next to each other at the same time and share the copies of its rows; gated,
    coded: as in `forward`.
    """

    stages: int = 4
    slots: int = 2
    cluster: int = 1
    gated: bool = False
    coded: bool = False

    def __post_init__(self) -> None:
        if self.cluster not in (1, 2):
            raise ValueError(f"{self}: a cluster has 1 or 2 blocks, more do not fill the SMs")
        if self.stages < 2 or not 1 <= self.slots <= WAVE // PIECE:
            raise ValueError(f"{self}: it needs 2 stages at least and 1 or {WAVE // PIECE} slots")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(f"{self}: {self.shared_memory} bytes of shared memory, there are {SHARED_MEMORY}")
        if self.coded and not self.gated:
            raise ValueError(f"{self}: only activations leave in 8 bits")

    @property
    def columns(self) -> int:
        """Columns of the result that a tile has."""
        return WAVES * WAVE // (1 + self.gated)

    @property
    def shared_memory(self) -> int:
        results = 0 if self.gated else 2 * self.slots * HALF * PIECE * 2
        return self.stages * BLOCK_K * (2 * HALF + WAVES * WAVE) + results


def tiling_for(columns: int, gated: bool = False, coded: bool = False) -> Tiling:
    """The fastest tiling for a result of so many columns; docs/kernels.md has the measurements."""
    tiles = -(-columns // (WAVES * WAVE // (1 + gated)))
    return Tiling(cluster=2 - tiles % 2, gated=gated, coded=coded)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of a call: rows [m, k] in 8 bits times matrices [E, n, k], in so many tiles of rows."""

    tiling: Tiling
    m: int
    k: int
    n: int
    tiles: int

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.n // (1 + self.tiling.gated)

    @property
    def columns(self) -> int:
        """Tiles that a cluster has side by side of one tile of rows."""
        return -(-self.width // (self.tiling.columns * self.tiling.cluster))

    @property
    def steps(self) -> int:
        """Steps of BLOCK_K that a tile takes."""
        return self.k // BLOCK_K

    @property
    def blocks(self) -> int:
        """Clusters of the grid."""
        return min(hopper.NUM_SMS // self.tiling.cluster, self.tiles * self.columns)

    @property
    def row_blocks(self) -> int:
        """Blocks of WAVE rows of a matrix, each with scales of its own."""
        return -(-self.n // WAVE)


def forward(
    rows: Scaled,
    matrices: Scaled,
    group_sizes: jax.Array,
    *,
    gated: bool = False,
    coded: bool = False,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> Any:
    """rows [M, K] times matrices [E, N, K] -> [M, N] bfloat16.

    gated: silu(the first N / 2 columns) * the others, [M, N / 2]; coded: that in 8 bits, with a scale for 128 of a row.
    `tiling` overrules all of these.
    """
    from pallas_kernels.grouped_matmul import mosaic_gpu_codes_prefill_kernel as kernel

    (m, k), n = rows.shape, matrices.shape[1]
    tiling = tiling or tiling_for(n // (1 + gated), gated, coded)
    tiles, count = tiles_of(group_sizes, max(m, HALF))
    codes, scales = (jnp.pad(x, ((0, max(HALF - m, 0)), (0, 0))) for x in (rows.codes, rows.scales))
    problem = Problem(tiling, max(m, HALF), k, n, tiles.shape[1])
    in_float32 = Scaled(matrices.codes, float_scales(matrices.scales))
    out, *out_scales = kernel.multiply(problem, Scaled(codes, scales.T), in_float32, tiles, count, interpret)
    if not tiling.coded:
        return out[:m]
    return Scaled(out[:m], out_scales[0].reshape(-1, max(m, HALF)).T[:m])
