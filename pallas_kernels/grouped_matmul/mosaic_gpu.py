"""grouped_matmul on Hopper, and the kernel for few rows a group; mosaic_gpu_prefill has the one for many.

A tile is a block of rows with one group that has rows in it: a block with rows of several groups is several tiles, each
of which computes the whole block and writes the rows of its group alone. XLA computes beforehand which tiles there are
and the kernel reads them, so that the number of groups costs nothing in it, and a group without rows, its matrix above all,
is never touched: in a decode step that is most of them. The columns of one tile come after one another, and the tiles that
have rows come first: so the SMs have equally much to do, however few of all possible tiles there are.

The backward pass is that of `lax.ragged_dot`, for grouped_swiglu after the product is computed again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import mosaic_gpu_prefill, reference

ROW_TILE = 8  # the copies' layout takes whole tiles of rows
BLOCK_K = 64  # 128 bytes, one swizzled line
WIDTHS = (128, 64)  # of a block; the widest that divides N


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one block of the grid multiplies at a time: [m, k] times [k, n], in a pipeline of `stages` steps."""

    m: int
    n: int
    stages: int
    k: int = BLOCK_K

    def __post_init__(self) -> None:
        if self.m % 64 or self.n % 8 or not 8 <= self.n <= 256:
            raise ValueError(f"a block of {self.m} x {self.n} is not one that wgmma takes")


def _why_not(rows: jax.Array, dtype: jnp.dtype, k: int, n: int) -> str | None:
    if reason := hopper.why_not():
        return reason
    if rows.dtype != dtype or dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies two 16-bit arrays of one dtype, not {rows.dtype} and {dtype}"
    if rows.shape[0] == 0:
        return "there are no rows"
    if k % BLOCK_K or n % WIDTHS[-1]:
        return f"K and N must be multiples of {BLOCK_K} and {WIDTHS[-1]}, they are {k} and {n}"
    return None


def why_not(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> str | None:
    return _why_not(rows, matrices.dtype, *matrices.shape[1:])


def blocks_for(n: int) -> Blocks:
    """The least rows wgmma takes, with many steps under way."""
    return Blocks(m=64, n=next(width for width in WIDTHS if n % width == 0), stages=6)


def _running_sum(x: jax.Array) -> jax.Array:
    """cumsum as one fused step; a scan takes several kernels, which slows a decode step."""
    index = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(index[None] <= index[:, None], x[None], 0), axis=1)


def tiles_of(group_sizes: jax.Array, rows: int, block: int) -> jax.Array:
    """[4, tiles] int32: group, block of rows, first row and end of every tile; empty where there are fewer."""
    groups = group_sizes.shape[0]
    count = -(-rows // block) + min(groups, rows) - 1
    ends = _running_sum(group_sizes)
    starts = ends - group_sizes
    first = starts // block
    tiles = jnp.where(group_sizes > 0, (ends - 1) // block - first + 1, 0)
    after = _running_sum(tiles)
    tile = jnp.arange(count)
    group = jnp.sum(after <= tile[:, None], axis=1)
    exists = group < groups
    group = jnp.minimum(group, groups - 1)
    row_block = first[group] + tile - (after - tiles)[group]
    begin = jnp.maximum(starts[group], row_block * block)
    end = jnp.where(exists, jnp.minimum(ends[group], (row_block + 1) * block), begin)
    return jnp.stack([group, row_block, begin, end]).astype(jnp.int32)


def multiply(rows: jax.Array, matrices: jax.Array, tiles: jax.Array, blocks: Blocks, interpret: Any = False) -> jax.Array:
    """The tiles [4, tiles] of rows [M, K], M a multiple of ROW_TILE, times matrices [E, K, N] -> [M, N]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (m, k), n = rows.shape, matrices.shape[2]
    grid = (tiles.shape[1], n // blocks.n)

    def grouped_matmul_tiles(tile_gmem, row_gmem, matrix_gmem, out_gmem):
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
        def _(info):
            tile, column = lax.div(info.index[0], grid[1]), lax.rem(info.index[0], grid[1])
            group, row_block, begin, end = (tile_gmem[i, tile] for i in range(4))

            @pl.when(end > begin)
            def _():
                def product(acc):
                    plgpu.emit_pipeline(
                        lambda _, a, b: plgpu.wgmma(acc, a, b),
                        grid=(k // blocks.k,),
                        in_specs=[
                            plgpu.BlockSpec((blocks.m, blocks.k), lambda i: (row_block, i), delay_release=1),
                            plgpu.BlockSpec((blocks.k, blocks.n), lambda i: (i, column), delay_release=1),
                        ],
                        max_concurrent_steps=blocks.stages,
                    )(row_gmem, matrix_gmem.at[group])
                    return acc[...]

                def store(staged):
                    staged[...] = pl.run_scoped(product, plgpu.ACC((blocks.m, blocks.n))).astype(staged.dtype)
                    plgpu.commit_smem()
                    size, row = end - begin, begin
                    # A copy has a fixed number of rows: one copy for every bit of how many there are.
                    piece = 1 << (min(blocks.m, m).bit_length() - 1)
                    while piece:

                        @pl.when(size & piece != 0)
                        def _(piece=piece, row=row):
                            plgpu.copy_smem_to_gmem(
                                staged.at[pl.ds(row - row_block * blocks.m, piece)],
                                out_gmem.at[pl.ds(row, piece), pl.ds(column * blocks.n, blocks.n)],
                            )

                        row = row + (size & piece)
                        piece //= 2
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                pl.run_scoped(store, plgpu.SMEM((blocks.m, blocks.n), rows.dtype))

    kernel = plgpu.kernel(
        grouped_matmul_tiles,
        out_type=jax.ShapeDtypeStruct((m, n), rows.dtype),
        grid=(min(hopper.NUM_SMS, grid[0] * grid[1]),),
        grid_names=("block",),
        interpret=interpret,
    )
    return kernel(tiles, rows, matrices)


def forward(
    rows: jax.Array,
    matrices: jax.Array,
    group_sizes: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`blocks` overrules the choice of the kernel and its blocks, `interpret` runs on a CPU (plgpu.InterpretGPUParams)."""
    m, (groups, _, n) = rows.shape[0], matrices.shape
    if blocks is None and mosaic_gpu_prefill.serves(m, groups):
        return mosaic_gpu_prefill.forward(rows, matrices, group_sizes, interpret=interpret)
    blocks = blocks or blocks_for(n)
    padded = jnp.pad(rows, ((0, -m % ROW_TILE), (0, 0)))
    return multiply(padded, matrices, tiles_of(group_sizes, m, blocks.m), blocks, interpret)[:m]


@jax.custom_vjp
def grouped_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return forward(rows, matrices, group_sizes)


def _forward_and_keep(rows, matrices, group_sizes):
    return forward(rows, matrices, group_sizes), (rows, matrices, group_sizes)


def _backward(residuals, cotangent):
    rows, matrices, group_sizes = residuals
    _, pull = jax.vjp(lambda r, m: jax.lax.ragged_dot(r, m, group_sizes), rows, matrices)
    return *pull(cotangent), None


grouped_matmul.defvjp(_forward_and_keep, _backward)


def why_not_swiglu(rows: jax.Array, gate_up: jax.Array, group_sizes: jax.Array) -> str | None:
    groups, k, _, n = gate_up.shape
    if reason := _why_not(rows, gate_up.dtype, k, n):
        return reason
    if not mosaic_gpu_prefill.serves(rows.shape[0], groups):
        return f"{rows.shape[0]} rows do not fill the tiles of {groups} groups"
    return None


@jax.custom_vjp
def grouped_swiglu(rows: jax.Array, gate_up: jax.Array, group_sizes: jax.Array) -> jax.Array:
    groups, k, _, n = gate_up.shape
    return mosaic_gpu_prefill.forward(rows, gate_up.reshape(groups, k, 2 * n), group_sizes, gated=True)


def _forward_and_keep_swiglu(rows, gate_up, group_sizes):
    return grouped_swiglu(rows, gate_up, group_sizes), (rows, gate_up, group_sizes)


def _backward_swiglu(residuals, cotangent, multiply=grouped_matmul):
    rows, gate_up, group_sizes = residuals
    _, pull = jax.vjp(lambda r, m: reference.swiglu_of(multiply, r, m, group_sizes), rows, gate_up)
    return *pull(cotangent), None


grouped_swiglu.defvjp(_forward_and_keep_swiglu, _backward_swiglu)
