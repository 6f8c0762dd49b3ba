"""grouped_matmul on Hopper of matrices in 8 bits where groups have few rows: what counts is how fast the codes stream.

A tile is 64 rows of a matrix for each working warpgroup and a block of rows with one group, as in mosaic_gpu. The matrix is
wgmma's first operand: its codes, converted to float16 in registers, which keeps them as they are. Rows are float16 too, after
division by a power of two of each row, so that what is lost of them lies below 2^-24 of a row's largest number.

This file has the rules by which arguments become tiles; the kernel is in mosaic_gpu_codes_few_rows_kernel.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.mosaic_gpu import tiles_of
from pallas_kernels.quant import BLOCK, Scaled, dequantise, float_scales

BLOCK_K = BLOCK  # codes of a row of a matrix that share a scale
TILE = 64  # rows of a matrix, what one wgmma takes
LINE = 64  # numbers in 16 bits of one swizzled line


@dataclasses.dataclass(frozen=True)
class Blocks:
    """rows: of a block; workers: warpgroups that multiply; stages: steps of BLOCK_K in flight."""

    rows: int
    workers: int = 2
    stages: int = 8

    def __post_init__(self) -> None:
        if self.rows % 8 or not 8 <= self.rows <= 64:
            raise ValueError(f"{self}: a block has a multiple of 8 and at most 64 rows")
        if self.workers not in (1, 2):
            raise ValueError(f"{self}: 1 or 2 warpgroups may multiply")


def blocks_for(rows: int, groups: int, columns: int) -> Blocks:
    """Blocks of four times as many rows as groups have on average, and as many tiles as there are SMs where possible."""
    block = 8
    while block < 64 and block * groups < 4 * rows:
        block *= 2
    tiles = min(rows, groups) * -(-columns // (2 * TILE))
    return Blocks(block, workers=2 if tiles >= hopper.NUM_SMS else 1, stages=8 if block < 64 else 6)


def to_float16(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [M, K] divided by powers of two [M] float32, of which the largest number becomes 1 to 2 (NaN if not finite)."""
    wide = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    exponents = jnp.frexp(jnp.maximum(largest, jnp.finfo(jnp.float32).tiny))[1]
    factors = jnp.where(largest < jnp.inf, jnp.ldexp(jnp.float32(1), exponents - 1), jnp.nan)
    return (wide / factors[:, None]).astype(jnp.float16), factors


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of a call: rows [m, k] times matrices [E, n, k], in so many tiles of rows."""

    blocks: Blocks
    m: int
    k: int
    n: int
    tiles: int

    @property
    def columns(self) -> int:
        """Tiles that stand side by side over the columns of the result."""
        return -(-self.n // (self.blocks.workers * TILE))

    @property
    def steps(self) -> int:
        """Steps of BLOCK_K that a tile takes."""
        return self.k // BLOCK_K

    @property
    def row_blocks(self) -> int:
        """Blocks of BLOCK rows of a matrix, each with scales of its own."""
        return -(-self.n // BLOCK)

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return min(hopper.NUM_SMS, self.tiles * self.columns)


def _in_lanes_order(rows: jax.Array) -> jax.Array:
    """Rows [M, K] with every 64 numbers in the order in which lanes hold a matrix's (mosaic_gpu_registers.float16_operand)."""
    m, k = rows.shape
    return rows.reshape(m, k // LINE, 4, 4, 2, 2).transpose(0, 1, 3, 4, 2, 5).reshape(m, k)


def forward(
    rows: jax.Array | Scaled,
    matrices: Scaled,
    group_sizes: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """rows [M, K] times matrices [E, N, K] -> [M, N] bfloat16."""
    if isinstance(rows, Scaled):
        rows = dequantise(rows, jnp.float32)
    m, (groups, n, _) = rows.shape[0], matrices.shape
    blocks = blocks or blocks_for(m, groups, n)
    halves, factors = to_float16(jnp.pad(rows, ((0, -m % blocks.rows), (0, 0))))
    if not interpret:
        halves = _in_lanes_order(halves)
    tiles = tiles_of(group_sizes, m, blocks.rows)
    from pallas_kernels.grouped_matmul import mosaic_gpu_codes_few_rows_kernel as kernel

    problem = Problem(blocks, halves.shape[0], halves.shape[1], n, tiles.shape[1])
    scales = float_scales(matrices.scales)
    return kernel.multiply(problem, halves, factors, matrices.codes, scales, tiles, interpret)[:m]
