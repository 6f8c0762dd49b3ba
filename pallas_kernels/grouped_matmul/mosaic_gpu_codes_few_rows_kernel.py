"""The kernel of mosaic_gpu_codes_few_rows, where its algorithm is told: what the warpgroups of a block do.

One copies codes and rows; each of the others multiplies TILE rows of a matrix by a tile's rows, so that what it sums up is the
transposed result, and stores it straight from registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import mosaic_gpu_registers as registers
from pallas_kernels.grouped_matmul.mosaic_gpu_codes_few_rows import BLOCK_K, LINE, TILE, Problem
from pallas_kernels.quant import BLOCK

HALVES = range(BLOCK_K // LINE)  # of a step: lines of 16-bit numbers
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Refs:
    """The kernel's references. R: rows of a block, W: working warpgroups."""

    # Input
    tiles: Any  # [4, tiles] int32, as `tiles_of` makes them
    rows: Any  # [M, K] float16
    factors: Any  # [M] float32
    matrices: Any  # [E, N, K]
    scales: Any  # [E * N / BLOCK * K / BLOCK_K] float32
    # Output
    out: Any  # [M, N]
    # Scratch
    tile_rows: Any  # [stages, 2, R, LINE] float16
    tile_codes: Any  # [stages, W * TILE, BLOCK_K]
    # Barriers, of every stage
    full: Any  # its operands are there
    empty: Any  # all working warpgroups have read them


def _scratch(problem: Problem, dtype: Any) -> list[Any]:
    """Scratch and barriers in the order of `Refs`; dtype: of the codes."""
    rows, workers, stages = problem.blocks.rows, problem.blocks.workers, problem.blocks.stages

    def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
        line = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(128)))

    return [
        tiled((stages, len(HALVES), rows, LINE), jnp.float16),
        tiled((stages, workers * TILE, BLOCK_K), dtype),
        plgpu.Barrier(num_arrivals=1 + len(HALVES), num_barriers=stages),
        plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Tile:
    """A tile: its group, whose rows are begin .. end - 1 of the block of rows `row_block`, and its first column."""

    group: Any
    row_block: Any
    begin: Any
    end: Any
    column: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A block of the grid, as one of its warpgroups has it; mine: how many tiles it has."""

    problem: Problem
    refs: Refs
    warpgroup: Any
    block: Any
    mine: Any
    interpret: Any

    @property
    def stages(self) -> int:
        return self.problem.blocks.stages

    def place(self, i: Any) -> tuple[Any, Any]:
        """The tile of rows of this block's tile i, and its first column."""
        p = self.problem
        index = self.block + i * p.grid
        tile = lax.div(index, p.columns)
        return tile, (index - tile * p.columns) * (p.blocks.workers * TILE)

    def each_tile(self, run: Callable[[_Tile, Any], Any], start: Any) -> Any:
        """carry = run(tile, carry) over those of this block's tiles that have rows."""

        def one(i: Any, carry: Any) -> Any:
            tile, column = self.place(i)
            group, row_block, begin, end = (self.refs.tiles[j, tile] for j in range(4))
            own = _Tile(group, row_block, begin, end, column)
            return lax.cond(end > begin, lambda carry: run(own, carry), lambda carry: carry, carry)

        return lax.fori_loop(0, self.mine, one, start)


@dataclasses.dataclass(frozen=True, eq=False)
class _Copies(_Block):
    """The warpgroup that copies codes and rows to shared memory."""

    def run(self) -> None:
        total = self.each_tile(self.copy_tile, jnp.int32(0))

        def drain(done: Any, nothing: Any) -> None:
            plgpu.barrier_wait(self.refs.empty.at[lax.rem(done, self.stages)])

        lax.fori_loop(jnp.maximum(total - self.stages, 0), total, drain, None)

    def copy_tile(self, tile: _Tile, done: Any) -> Any:
        """Copies a tile's operands, before which so many steps have come in all; returns that number afterwards."""
        refs, rows, workers = self.refs, self.problem.blocks.rows, self.problem.blocks.workers

        def step(j: Any, done: Any) -> Any:
            slot = lax.rem(done, self.stages)

            @pl.when(done >= self.stages)
            def await_free() -> None:
                plgpu.barrier_wait(refs.empty.at[slot])

            source = refs.matrices.at[tile.group, pl.ds(tile.column, workers * TILE), pl.ds(j * BLOCK_K, BLOCK_K)]
            plgpu.copy_gmem_to_smem(source, refs.tile_codes.at[slot], refs.full.at[slot])
            for half in HALVES:
                depth = pl.ds(j * BLOCK_K + half * LINE, LINE)
                source = refs.rows.at[pl.ds(tile.row_block * rows, rows), depth]
                plgpu.copy_gmem_to_smem(source, refs.tile_rows.at[slot, half], refs.full.at[slot])
            return done + 1

        return lax.fori_loop(0, self.problem.steps, step, done)


@dataclasses.dataclass(frozen=True, eq=False)
class _Math(_Block):
    """A warpgroup that multiplies."""

    def run(self) -> None:
        self.each_tile(self.multiply_tile, jnp.int32(0))

    def multiply_tile(self, tile: _Tile, done: Any) -> Any:
        """Multiplies and stores a tile, before which so many steps have come in all; returns that number afterwards."""
        p, refs = self.problem, self.refs
        shape = TILE, p.blocks.rows
        own_column = tile.column + self.warpgroup * TILE
        index = (tile.group * p.row_blocks + jnp.minimum(lax.div(own_column, BLOCK), p.row_blocks - 1)) * p.steps
        lane_index: Any = None if self.interpret else registers.alternate(index, jnp.maximum(index - p.steps, 0))
        ones = plgpu.layout_cast(jnp.ones((TILE,), jnp.float32), _BY_ROW)

        def scale(j: Any) -> Any:
            return refs.scales[index + j] if self.interpret else registers.load(refs.scales, lane_index, j)

        def step(j: Any, carry: Any) -> Any:
            done, total, own = carry
            factor = ones * own if self.interpret else registers.products(ones, own)[0]
            following = scale(jnp.minimum(j + 1, p.steps - 1))  # in time for the next step
            slot = lax.rem(done, self.stages)
            plgpu.barrier_wait(refs.full.at[slot])
            part = self.product(slot)
            plgpu.barrier_arrive(refs.empty.at[slot])
            return done + 1, total + part * lax.broadcast_in_dim(factor, shape, [0]), following

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        done, total, _ = lax.fori_loop(0, p.steps, step, (done, zeros, scale(0)))
        row = tile.row_block * p.blocks.rows
        of_rows = plgpu.load(refs.factors.at[pl.ds(row, p.blocks.rows)], layout=_BY_COLUMN, optimized=False)
        self.store(total * lax.broadcast_in_dim(of_rows, shape, [1]), row, tile, own_column)
        return done

    def product(self, slot: Any) -> jax.Array:
        """The product of a stage's codes and rows: [TILE, R] float32."""
        refs = self.refs
        codes = refs.tile_codes.at[slot, pl.ds(self.warpgroup * TILE, TILE)]
        if self.interpret:  # it knows no operands in registers
            of_rows = [refs.tile_rows[slot, half].astype(jnp.float32) for half in HALVES]
            own = [codes[...][:, half * LINE : (half + 1) * LINE].astype(jnp.float32) for half in HALVES]
            return sum((a @ b.T for a, b in zip(own, of_rows, strict=True)), start=jnp.float32(0))
        converted = [registers.float16_operand(codes, half) for half in HALVES]

        def fresh(acc: Any) -> Any:
            for half in HALVES:
                plgpu.wgmma(acc, converted[half], refs.tile_rows.at[slot, half].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(fresh, plgpu.ACC((TILE, self.problem.blocks.rows), jnp.float32))

    def store(self, result: jax.Array, row: Any, tile: _Tile, column: Any) -> None:
        """Stores result [TILE, R] to the group's of the R rows from `row` on, and to the columns from `column` on."""
        out, size = self.refs.out, self.problem.blocks.rows
        if not self.interpret:
            return registers.store_transposed(out, result, row, tile.begin, tile.end, column)
        places = pl.ds(row, size), pl.ds(column, TILE)
        rows = row + lax.iota(jnp.int32, size)
        inside = (rows >= tile.begin) & (rows < tile.end)

        @pl.when(column < self.problem.n)
        def _() -> None:
            out[places] = jnp.where(inside[:, None], result.T.astype(out.dtype), out[places])


def multiply(
    problem: Problem,
    rows: jax.Array,
    factors: jax.Array,
    matrices: jax.Array,
    scales: jax.Array,
    tiles: jax.Array,
    interpret: Any = False,
) -> jax.Array:
    """The tiles [4, tiles] of rows [M, K] float16, M a multiple of a block's, times codes [E, N, K] -> [M, N] bfloat16.

    factors [M]: by which the products with each row are multiplied. scales [E, N / 128, K / 128].
    """
    p, workers = problem, problem.blocks.workers

    def grouped_matmul_codes_few_rows(*references: Any) -> None:
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        mine = lax.div(p.tiles * p.columns - block + (p.grid - 1), p.grid)
        own = p, Refs(*references), warpgroup, block, mine, interpret

        @pl.when(warpgroup == workers)
        def _copy() -> None:
            _Copies(*own).run()

        @pl.when(warpgroup < workers)
        def _multiply() -> None:
            _Math(*own).run()

    kernel = plgpu.kernel(
        grouped_matmul_codes_few_rows,
        out_type=jax.ShapeDtypeStruct((p.m, p.n), jnp.bfloat16),
        scratch_types=_scratch(p, matrices.dtype),
        grid=(p.grid,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
    )
    return kernel(tiles, rows, factors, matrices, scales.reshape(-1))
