"""grouped_matmul on Hopper of matrices in 8 bits where groups have few rows: what counts is how fast the codes stream.

A tile is 64 rows of a matrix for each working warpgroup and a block of rows with one group, as in mosaic_gpu. The matrix is
wgmma's first operand: its codes, converted to float16 in registers, which keeps them as they are. Rows are float16 too, after
division by a power of two of each row, so that what is lost of them lies below 2^-24 of a row's largest number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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


def multiply(
    rows: jax.Array,
    factors: jax.Array,
    matrices: jax.Array,
    scales: jax.Array,
    tiles: jax.Array,
    blocks: Blocks,
    interpret: Any = False,
) -> jax.Array:
    """The tiles [4, tiles] of rows [M, K] float16, M a multiple of blocks.rows, times codes [E, N, K] -> [M, N] bfloat16.

    factors [M]: by which the products with each row are multiplied. scales [E, N / 128, K / 128].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.grouped_matmul import mosaic_gpu_registers as registers

    (m, k), (_, n, _) = rows.shape, matrices.shape
    size, workers, stages = blocks.rows, blocks.workers, blocks.stages
    columns, steps, down = pl.cdiv(n, workers * TILE), k // BLOCK_K, scales.shape[1]
    grid = min(hopper.NUM_SMS, tiles.shape[1] * columns)
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def tiled(shape, dtype):
        line = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(128)))

    def grouped_matmul_codes_few_rows(
        tile_gmem, row_gmem, factor_gmem, matrix_gmem, scale_gmem, out_gmem, row_smem, matrix_smem, full, empty
    ):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        mine = lax.div(tiles.shape[1] * columns - block + (grid - 1), grid)

        def place(i):
            index = block + i * grid
            tile = lax.div(index, columns)
            return tile, (index - tile * columns) * (workers * TILE)

        def each_tile(run, start):
            """Carries on over those of this block's tiles that have rows."""

            def one(i, carry):
                tile, column = place(i)
                group, row_block, begin, end = (tile_gmem[j, tile] for j in range(4))
                return lax.cond(
                    end > begin, lambda carry: run(group, row_block, begin, end, column, carry), lambda carry: carry, carry
                )

            return lax.fori_loop(0, mine, one, start)

        @pl.when(warpgroup == workers)
        def _copy():
            def one_tile(group, row_block, begin, end, column, done):
                def step(j, done):
                    slot = lax.rem(done, stages)

                    @pl.when(done >= stages)
                    def await_free():
                        plgpu.barrier_wait(empty.at[slot])

                    source = matrix_gmem.at[group, pl.ds(column, workers * TILE), pl.ds(j * BLOCK_K, BLOCK_K)]
                    plgpu.copy_gmem_to_smem(source, matrix_smem.at[slot], full.at[slot])
                    for half in range(BLOCK_K // LINE):
                        depth = pl.ds(j * BLOCK_K + half * LINE, LINE)
                        source = row_gmem.at[pl.ds(row_block * size, size), depth]
                        plgpu.copy_gmem_to_smem(source, row_smem.at[slot, half], full.at[slot])
                    return done + 1

                return lax.fori_loop(0, steps, step, done)

            total = each_tile(one_tile, jnp.int32(0))

            def drain(done, nothing):
                plgpu.barrier_wait(empty.at[lax.rem(done, stages)])

            lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)

        def product(slot):
            """A [TILE, size] float32 of the stage `slot`."""
            codes = matrix_smem.at[slot, pl.ds(warpgroup * TILE, TILE)]
            halves = range(BLOCK_K // LINE)
            if interpret:  # it knows no operands in registers
                of_rows = [row_smem[slot, half].astype(jnp.float32) for half in halves]
                own = [codes[...][:, half * LINE : (half + 1) * LINE].astype(jnp.float32) for half in halves]
                return sum(a @ b.T for a, b in zip(own, of_rows, strict=True))
            converted = [registers.float16_operand(codes, half) for half in halves]

            def fresh(acc):
                for half in halves:
                    plgpu.wgmma(acc, converted[half], row_smem.at[slot, half].transpose((1, 0)))
                return acc[...]

            return pl.run_scoped(fresh, plgpu.ACC((TILE, size), jnp.float32))

        def store(result, row, begin, end, column):
            """result [TILE, size] to the rows from begin to end of `size` that start at `row`."""
            if interpret:
                places = pl.ds(row, size), pl.ds(column, TILE)
                inside = (row + lax.iota(jnp.int32, size) >= begin) & (row + lax.iota(jnp.int32, size) < end)

                @pl.when(column < n)
                def _():
                    kept = out_gmem[places]
                    out_gmem[places] = jnp.where(inside[:, None], result.T.astype(out_gmem.dtype), kept)
            else:
                registers.store_transposed(out_gmem, result, row, begin, end, column)

        @pl.when(warpgroup < workers)
        def _multiply():
            def one_tile(group, row_block, begin, end, column, done):
                own_column = column + warpgroup * TILE
                index = (group * down + jnp.minimum(lax.div(own_column, BLOCK), down - 1)) * steps
                lane_index: Any = None if interpret else registers.alternate(index, jnp.maximum(index - steps, 0))
                ones = plgpu.layout_cast(jnp.ones((TILE,), jnp.float32), by_row)

                def scale(j):
                    return scale_gmem[index + j] if interpret else registers.load(scale_gmem, lane_index, j)

                def step(j, carry):
                    done, total, own = carry
                    factor = ones * own if interpret else registers.products(ones, own)[0]
                    following = scale(jnp.minimum(j + 1, steps - 1))  # in time for the next step
                    slot = lax.rem(done, stages)
                    plgpu.barrier_wait(full.at[slot])
                    part = product(slot)
                    plgpu.barrier_arrive(empty.at[slot])
                    return done + 1, total + part * lax.broadcast_in_dim(factor, (TILE, size), [0]), following

                zeros = plgpu.layout_cast(jnp.zeros((TILE, size), jnp.float32), plgpu.Layout.WGMMA)
                done, total, _ = lax.fori_loop(0, steps, step, (done, zeros, scale(0)))
                of_rows = plgpu.load(factor_gmem.at[pl.ds(row_block * size, size)], layout=by_column, optimized=False)
                store(total * lax.broadcast_in_dim(of_rows, (TILE, size), [1]), row_block * size, begin, end, own_column)
                return done

            each_tile(one_tile, jnp.int32(0))

    kernel = plgpu.kernel(
        grouped_matmul_codes_few_rows,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        scratch_types=[
            tiled((stages, BLOCK_K // LINE, size, LINE), jnp.float16),
            tiled((stages, workers * TILE, BLOCK_K), matrices.dtype),
            plgpu.Barrier(num_arrivals=1 + BLOCK_K // LINE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        ],
        grid=(grid,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
    )
    return kernel(tiles, rows, factors, matrices, scales.reshape(-1))


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
    return multiply(halves, factors, matrices.codes, float_scales(matrices.scales), tiles, blocks, interpret)[:m]
