"""The kernel of mosaic_gpu_codes_prefill, where its algorithm is told: what the three warpgroups of a block do.

One copies, by `Work` of mosaic_gpu_prefill_kernel; each of the two others multiplies a half of a tile's rows and stores the
result: by way of shared memory, or where it is an activation (`gated`) straight from registers, whose shared memory the stages
then have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import mosaic_gpu_registers as registers
from pallas_kernels.grouped_matmul.mosaic_gpu_codes_prefill import BLOCK_K, CODES, PIECE, WAVE, WAVES, Problem
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill import HALF
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill_kernel import Part, Work, call_kernel
from pallas_kernels.quant import Scaled, row_scales


@dataclasses.dataclass(frozen=True, eq=False)
class Refs:
    """The kernel's references. `width`: columns of the result."""

    # Input
    tiles: Any  # [3 + 2, tiles] int32, as `tiles_of` makes them
    count: Any  # [1] int32: how many tiles there are
    rows: Any  # [M, K]
    row_scales: Any  # [K / BLOCK_K, M] float32
    matrices: Any  # [E, N, K]
    matrix_scales: Any  # [E * N / WAVE * K / BLOCK_K] float32
    # Output
    out: Any  # [M, width]
    out_scales: Any  # [width / WAVE * M] float32, None unless coded
    # Scratch
    row_tiles: Any  # [stages, 2, HALF, BLOCK_K]
    row_lines: Any  # the same memory
    matrix_tiles: Any  # [stages, WAVES, WAVE, BLOCK_K]
    result_tiles: Any  # [2, slots, HALF, PIECE], None where gated
    result_lines: Any  # the same memory
    result_plain: Any  # [2, HALF, PIECE] of the same memory
    # Barriers, of every stage
    full: Any  # its operands are there
    empty: Any  # both warpgroups have read them

    @staticmethod
    def of(problem: Problem, refs: tuple[Any, ...], interpret: Any) -> Refs:
        """The references in the kernel's order, in which what a tiling does not have is left out or None."""
        out, *others = refs[6:]
        out_scales = others.pop(0) if problem.tiling.coded else None
        (row_tiles, row_lines), matrix_tiles, results, full, empty = others
        tiles, lines, plain = (None,) * 3 if problem.tiling.gated else results
        if interpret:  # it keeps names of the same memory apart, but copies from any row
            row_lines, lines = row_tiles, tiles
        scratch = row_tiles, row_lines, matrix_tiles, tiles, lines, plain
        return Refs(*(*refs[:6], out, out_scales, *scratch, full, empty))


def _scratch(problem: Problem) -> list[Any]:
    """Scratch and barriers in the order of `Refs`."""
    tiling = problem.tiling

    def smem(shape: tuple[int, ...], dtype: Any, line_rows: int = 8) -> Any:
        line = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((line_rows, line)), plgpu.SwizzleTransform(128)))

    # 128 codes of a line are the same in memory whether 8 lines or 1 make a tile, as in mosaic_gpu_prefill.
    row_shape, result_shape = (tiling.stages, 2, HALF, BLOCK_K), (2, tiling.slots, HALF, PIECE)
    results = plgpu.RefUnion(
        smem(result_shape, jnp.bfloat16), smem(result_shape, jnp.bfloat16, 1), plgpu.SMEM((2, HALF, PIECE), jnp.bfloat16)
    )
    return [
        plgpu.RefUnion(smem(row_shape, CODES), smem(row_shape, CODES, 1)),
        smem((tiling.stages, WAVES, WAVE, BLOCK_K), CODES),
        None if tiling.gated else results,
        plgpu.Barrier(num_arrivals=2 + WAVES, num_barriers=tiling.stages),
        # Rows arrive in the slots of all blocks of a cluster, once all of them are free.
        plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=2, num_barriers=tiling.stages)
        if tiling.cluster > 1
        else plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Tile:
    """A tile of the block, as one of its warpgroups has it: its number, its group, whose rows are start .. end - 1, and its
    first column of the result."""

    number: Any
    group: Any
    start: Any
    end: Any
    column: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A block of the grid, as one of its warpgroups has it."""

    problem: Problem
    refs: Refs
    work: Work
    warpgroup: Any
    interpret: Any

    def in_matrix(self, wave: Any, column: Any) -> Any:
        """Where a wave of a tile's columns begins in a matrix."""
        return column + wave * (self.problem.width if self.problem.tiling.gated else WAVE)


@dataclasses.dataclass(frozen=True, eq=False)
class _Copies(_Block):
    """The warpgroup that copies rows and matrices to shared memory."""

    def run(self) -> None:
        self.work.copy(self.copy_matrices)

    def copy_matrices(self, slot: Any, group: Any, column: Any, depth: Any) -> None:
        refs = self.refs
        for wave in range(WAVES):
            source = refs.matrices.at[group, pl.ds(self.in_matrix(wave, column), WAVE), depth]
            plgpu.copy_gmem_to_smem(source, refs.matrix_tiles.at[slot, wave], refs.full.at[slot])


@dataclasses.dataclass(frozen=True, eq=False)
class _Scales:
    """The scales of HALF rows from `begin` on and of two blocks of a matrix, of which those of step 0 are at `indices`.

    of_lane: the indices by lane, as registers.load takes them; None for the interpreter.
    """

    refs: Refs
    begin: Any
    indices: list[Any]
    of_lane: Any

    def load(self, j: Any) -> Any:
        """Those of step j."""
        refs = self.refs
        of_rows = plgpu.load(refs.row_scales.at[j, pl.ds(self.begin, HALF)], layout=registers.BY_ROW, optimized=False)
        if self.of_lane is None:
            return of_rows, [refs.matrix_scales[index + j] for index in self.indices]
        return of_rows, registers.load(refs.matrix_scales, self.of_lane, j)

    def products(self, loaded: Any) -> Any:
        """What the sums of each of the two blocks are multiplied by, [HALF] float32 each."""
        of_rows, of_blocks = loaded
        return [of_rows * x for x in of_blocks] if self.of_lane is None else registers.products(of_rows, of_blocks)


@dataclasses.dataclass(frozen=True, eq=False)
class _Math(_Block):
    """A warpgroup that multiplies."""

    def run(self) -> None:
        self.work.for_each(self.one_tile)
        if not self.problem.tiling.gated:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def one_tile(self, i: Any, nothing: Any) -> None:
        """This warpgroup's part in the block's tile i: a half of its rows or, of a single half, one of the waves."""
        gated = self.problem.tiling.gated
        tile, column = self.work.place(i)
        group, first, second, start, end = (self.refs.tiles[j, tile] for j in range(5))
        own = _Tile(i, group, start, end, column)

        if not gated:

            @pl.when(second < 0)
            def share_half() -> None:
                self.take(own, 0, first, (self.warpgroup,))

        @pl.when((second >= 0) | ((self.warpgroup == 0) & gated))
        def take_half() -> None:
            self.take(own, self.warpgroup, jnp.where(self.warpgroup == 0, first, second), (0, 1))

        if gated:

            @pl.when((second < 0) & (self.warpgroup == 1))
            def sit_out() -> None:
                self.work.skip(i)

    def take(self, tile: _Tile, half: Any, begin: Any, waves: Sequence[Any]) -> None:
        """Multiplies half `half` of a tile's rows, which begins at row `begin`, by some of its waves, and stores the result."""
        results = self.product(tile, half, begin, waves)
        if not self.problem.tiling.gated:
            columns = [tile.column + wave * WAVE for wave in waves]
            return self.store(list(zip(columns, results, strict=True)), begin, tile)
        gate, up = results
        store = self.store_codes if self.problem.tiling.coded else self.store_directly
        store(gate / (1.0 + jnp.exp(-gate)) * up, begin, tile)

    def scales(self, tile: _Tile, begin: Any, waves: Sequence[Any]) -> _Scales:
        """Those of the waves, the other of the two beside a single one."""
        p = self.problem

        def index(wave: Any) -> Any:
            # A tile may extend beyond the columns.
            first = tile.group * p.row_blocks
            return (first + jnp.minimum(lax.div(self.in_matrix(wave, tile.column), WAVE), p.row_blocks - 1)) * p.steps

        indices = [index(wave) for wave in (waves if len(waves) == WAVES else (waves[0], 1 - waves[0]))]
        return _Scales(self.refs, begin, indices, None if self.interpret else registers.alternate(*indices))

    def product(self, tile: _Tile, half: Any, begin: Any, waves: Sequence[Any]) -> Any:
        """A [HALF, WAVE] float32 of each of `waves` and the half's rows."""
        refs, steps, stages = self.refs, self.problem.steps, self.problem.tiling.stages
        scales = self.scales(tile, begin, waves)

        def step(j: Any, carry: Any) -> Any:
            sums, loaded = carry
            factors = scales.products(loaded)
            following = scales.load(jnp.minimum(j + 1, steps - 1))  # in time for the next step
            slot = lax.rem(tile.number * steps + j, stages)
            plgpu.barrier_wait(refs.full.at[slot])
            left = refs.row_tiles.at[slot, half]
            if self.problem.tiling.gated and not self.interpret:
                # Read once for both waves; the interpreter knows no operand in registers.
                left = plgpu.load(left, layout=plgpu.Layout.WGMMA_8BIT)
            added: list[jax.Array] = []
            for wave, total, factor in zip(waves, sums, factors, strict=False):

                def fresh(acc: Any, wave: Any = wave) -> Any:
                    # Nothing may come between the zeros and wgmma: then no register is zeroed.
                    plgpu.wgmma(acc, left, refs.matrix_tiles.at[slot, wave].transpose((1, 0)))
                    return acc[...]

                part = pl.run_scoped(fresh, plgpu.ACC((HALF, WAVE), jnp.float32))
                if len(added) == len(waves) - 1:
                    plgpu.barrier_arrive(refs.empty.at[slot])
                added.append(total + part * lax.broadcast_in_dim(factor, (HALF, WAVE), [0]))
            return tuple(added), following

        zeros = plgpu.layout_cast(jnp.zeros((HALF, WAVE), jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, steps, step, ((zeros,) * len(waves), scales.load(0)))[0]

    def store(self, results: list[tuple[Any, jax.Array]], begin: Any, tile: _Tile) -> None:
        """Stores results [HALF, WAVE], by their columns, of rows from `begin` on: those that are the group's."""
        slots = self.problem.tiling.slots

        @pl.when(tile.end - tile.start >= HALF)
        def whole() -> None:
            self.each_piece(results, slots - 1, lambda *piece: self.copy_piece(begin, *piece))

        @pl.when(tile.end - tile.start < HALF)
        def short() -> None:
            self.each_piece(results, 0, lambda *piece: self.copy_some_rows(begin, tile, *piece))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def each_piece(self, results: list[tuple[Any, jax.Array]], wait: int, copy: Callable[..., None]) -> None:
        """copy(slot, column, piece) for each PIECE of the columns that there are, once all but `wait` copies have ended."""
        for column, result in results:
            for piece in range(WAVE // PIECE):
                at = column + piece * PIECE

                @pl.when(at < self.problem.width)
                def _(result: Any = result, piece: int = piece, at: Any = at) -> None:
                    plgpu.wait_smem_to_gmem(wait, wait_read_only=True)
                    part = result[:, piece * PIECE : (piece + 1) * PIECE].astype(jnp.bfloat16)
                    copy(piece % self.problem.tiling.slots, at, part)

    def copy_piece(self, begin: Any, slot: int, column: Any, piece: jax.Array) -> None:
        refs = self.refs
        refs.result_tiles[self.warpgroup, slot] = piece
        plgpu.commit_smem()
        target = refs.out.at[pl.ds(begin, HALF), pl.ds(column, PIECE)]
        plgpu.copy_smem_to_gmem(refs.result_lines.at[self.warpgroup, slot], target)

    def copy_some_rows(self, begin: Any, tile: _Tile, slot: int, column: Any, piece: jax.Array) -> None:
        """Copies the rows of a group of fewer than HALF, by whichever slot."""
        del slot
        refs, count = self.refs, tile.end - tile.start
        refs.result_plain[self.warpgroup] = piece
        plgpu.commit_smem()
        # A copy has a fixed number of rows: one copy for every bit of how many there are.
        row, length = tile.start, HALF // 2
        while length:

            @pl.when(count & length != 0)
            def _(row: Any = row, length: int = length) -> None:
                target = refs.out.at[pl.ds(row, length), pl.ds(column, PIECE)]
                plgpu.copy_smem_to_gmem(refs.result_plain.at[self.warpgroup, pl.ds(row - begin, length)], target)

            row = row + (count & length)
            length //= 2

    def store_directly(self, result: jax.Array, begin: Any, tile: _Tile) -> None:
        """Stores a single result as `store` does, from registers to memory."""
        out = self.refs.out
        if not self.interpret:
            return registers.store_rows(out, result, begin, tile.start, tile.end, tile.column)
        row = begin + lax.iota(jnp.int32, HALF)
        inside = ((row >= tile.start) & (row < tile.end))[:, None]
        for piece in range(0, WAVE, PIECE):
            places = pl.ds(begin, HALF), pl.ds(tile.column + piece, PIECE)

            @pl.when(tile.column + piece < self.problem.width)
            def _(piece: int = piece, places: Any = places) -> None:
                new = result[:, piece : piece + PIECE].astype(out.dtype)
                out[places] = jnp.where(inside, new, out[places])

    def store_codes(self, result: jax.Array, begin: Any, tile: _Tile) -> None:
        """Stores a result as `store_directly` does, in 8 bits, and its scales."""
        scales = row_scales(jnp.max(jnp.abs(result), axis=1))
        self.store_directly(result * lax.broadcast_in_dim(1.0 / scales, (HALF, WAVE), [0]), begin, tile)
        place, out = lax.div(tile.column, WAVE) * self.problem.m + begin, self.refs.out_scales
        if not self.interpret:
            return registers.store_some(out, scales, place, tile.start - begin, tile.end - begin)
        row = begin + lax.iota(jnp.int32, HALF)
        places = pl.ds(place, HALF)
        out[places] = jnp.where((row >= tile.start) & (row < tile.end), scales, out[places])


def multiply(
    problem: Problem, rows: Scaled, matrices: Scaled, tiles: jax.Array, count: jax.Array, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """The tiles of rows [M, K], M at least HALF, times matrices [E, N, K] -> [M, N], gated [M, N / 2].

    tiles [3 + 2, tiles], count [1]: as `tiles_of` makes them. rows.scales [K / 128, M], matrices.scales [E, N / 128, K / 128].
    With coded results also their scales [N / 256 * M].
    """
    p, tiling = problem, problem.tiling
    out_types = [jax.ShapeDtypeStruct((p.m, p.width), CODES if tiling.coded else jnp.bfloat16)]
    if tiling.coded:
        out_types.append(jax.ShapeDtypeStruct((p.width // WAVE * p.m,), jnp.float32))

    def parts(references: tuple[Any, ...], warpgroup: Any) -> tuple[Part, Part]:
        refs = Refs.of(p, references, interpret)
        of_block = p, refs, Work.of(p, refs, tiling.columns, BLOCK_K), warpgroup, interpret
        return _Copies(*of_block), _Math(*of_block)

    operands = tiles, count, rows.codes, rows.scales, matrices.codes, matrices.scales.reshape(-1)
    return call_kernel("grouped_matmul_codes", p, parts, _scratch(p), tuple(out_types), operands, interpret)
