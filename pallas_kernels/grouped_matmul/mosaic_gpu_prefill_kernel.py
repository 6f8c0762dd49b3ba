"""The kernel of mosaic_gpu_prefill, where its algorithm is told: what the three warpgroups of a block do.

One copies; each of the two others multiplies a half of a tile's rows and stores the result by way of shared memory. `Work` and
`call_kernel` are those of mosaic_gpu_codes_prefill too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill import BLOCK_K, HALF, PIECE, Problem

REGISTERS = hopper.RegisterSplit(workers=2, worker=232, helper=40)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a thread block of either kernel for many rows has to do: its tiles, and the copies that bring their operands.

    depth: of a step in K; columns: how many tiles of `width` columns a cluster has side by side of one tile of rows.
    """

    block: Any
    mine: Any  # how many tiles this block has
    blocks: int
    cluster: int
    columns: int
    width: int
    steps: int
    depth: int
    stages: int
    # Input
    tile_gmem: Any  # [3 + 2, tiles] int32, as `tiles_of` makes them
    row_gmem: Any  # [M, K]
    # Scratch
    row_lines: Any  # [stages, 2, HALF, depth]
    # Barriers, of every stage
    full: Any  # its operands are there
    empty: Any  # both warpgroups have read them

    @staticmethod
    def of(problem: Any, refs: Any, width: int, depth: int) -> Work:
        """That of the block that asks; problem, refs: of either kernel."""
        p, block = problem, lax.axis_index("block")
        mine = lax.div(refs.count[0] * p.columns - block + (p.blocks - 1), p.blocks)
        sizes = p.blocks, p.tiling.cluster, p.columns, width, p.steps, depth, p.tiling.stages
        return Work(block, mine, *sizes, refs.tiles, refs.rows, refs.row_lines, refs.full, refs.empty)

    def place(self, i: Any) -> tuple[Any, Any]:
        """The tile of rows of this block's tile i, and its first column."""
        index = self.block + i * self.blocks
        tile = lax.div(index, self.columns)
        column = index - tile * self.columns
        return tile, (column * self.cluster + lax.axis_index("member") if self.cluster > 1 else column) * self.width

    def for_each(self, one_tile: Callable[..., Any]) -> None:
        lax.fori_loop(0, self.mine, one_tile, None)

    def copy(self, copy_matrices: Callable[..., None]) -> None:
        """The copying warpgroup's part; copy_matrices(slot, group, column, depth) starts as many copies as there are parts."""
        plgpu.set_max_registers(REGISTERS.helper, action="decrease")
        shared = "member" if self.cluster > 1 else None

        def one_tile(i, nothing):
            tile, column = self.place(i)
            group, first, second = (self.tile_gmem[j, tile] for j in range(3))

            def step(j, nothing):
                done = i * self.steps + j
                slot = lax.rem(done, self.stages)

                @pl.when(done >= self.stages)
                def await_free():
                    plgpu.barrier_wait(self.empty.at[slot])

                depth = pl.ds(j * self.depth, self.depth)

                def copy_rows(half, begin):
                    source, target = self.row_gmem.at[pl.ds(begin, HALF), depth], self.row_lines.at[slot, half]
                    plgpu.copy_gmem_to_smem(source, target, self.full.at[slot], collective_axes=shared)

                copy_rows(0, first)

                @pl.when(second >= 0)
                def copy_second():
                    copy_rows(1, second)

                @pl.when(second < 0)
                def leave_second():
                    plgpu.barrier_arrive(self.full.at[slot])  # in place of the copy

                copy_matrices(slot, group, column, depth)

            lax.fori_loop(0, self.steps, step, None)

        self.for_each(one_tile)

        def drain(done, nothing):
            plgpu.barrier_wait(self.empty.at[lax.rem(done, self.stages)])

        all_steps = self.mine * self.steps
        lax.fori_loop(jnp.maximum(all_steps - self.stages, 0), all_steps, drain, None)

    def skip(self, i: Any) -> None:
        """A multiplying warpgroup's part in a tile that has no rows for it."""

        def step(j, nothing):
            slot = lax.rem(i * self.steps + j, self.stages)
            plgpu.barrier_wait(self.full.at[slot])
            if self.cluster > 1:  # one thread arrives: no warp may be left behind by a whole round of the slots
                plgpu.commit_smem()
            plgpu.barrier_arrive(self.empty.at[slot])

        lax.fori_loop(0, self.steps, step, None)


class Part(Protocol):
    """What a warpgroup does."""

    def run(self) -> None: ...


def call_kernel(
    name: str,
    problem: Any,
    parts: Callable[[tuple[Any, ...], Any], tuple[Part, Part]],
    scratch: Sequence[Any],
    out_type: Any,
    operands: Sequence[jax.Array],
    interpret: Any,
) -> Any:
    """Calls either kernel for many rows: blocks of three warpgroups, of which the last copies and the others multiply.

    parts(references, warpgroup): the copying and the multiplying part of the warpgroup that asks.
    """
    cluster = problem.tiling.cluster

    def body(*references: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        copies, products = parts(references, warpgroup)

        @pl.when(warpgroup == 2)
        def _copy() -> None:
            copies.run()

        @pl.when(warpgroup < 2)
        def _multiply() -> None:
            plgpu.set_max_registers(REGISTERS.worker, action="increase")
            products.run()

    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(problem.blocks,),
        grid_names=("block",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("member",) if cluster > 1 else (),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
    )
    return kernel(*operands)


@dataclasses.dataclass(frozen=True, eq=False)
class Refs:
    """The kernel's references. `width`: columns of the result, of which a tile has `n`."""

    # Input
    tiles: Any  # [3 + 2, tiles] int32, as `tiles_of` makes them
    count: Any  # [1] int32: how many tiles there are
    rows: Any  # [M, K]
    matrices: Any  # [E, K, N]
    # Output
    out: Any  # [M, width]
    # Scratch
    row_tiles: Any  # [stages, 2, HALF, BLOCK_K]
    row_lines: Any  # the same memory
    matrix_tiles: Any  # [stages, parts, BLOCK_K, n]
    out_tiles: Any  # [2, slots, HALF, PIECE]
    out_lines: Any  # the same memory
    out_plain: Any  # [HALF, PIECE] of the same memory
    # Barriers, of every stage
    full: Any  # its operands are there
    empty: Any  # both warpgroups have read them

    @staticmethod
    def of(refs: tuple[Any, ...], interpret: Any) -> Refs:
        """The references in the kernel's order, in which names of the same memory are together."""
        *inputs_and_output, (row_tiles, row_lines), matrix_tiles, (tiles, lines, plain), full, empty = refs
        if interpret:  # it keeps such names apart, but copies from any row
            row_lines, lines = row_tiles, tiles
        return Refs(*(*inputs_and_output, row_tiles, row_lines, matrix_tiles, tiles, lines, plain, full, empty))


def _scratch(problem: Problem) -> list[Any]:
    """Scratch and barriers in the order of `Refs`."""
    tiling, dtype = problem.tiling, problem.dtype

    def smem(shape: tuple[int, ...], line_rows: int = 8) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((line_rows, 64)), plgpu.SwizzleTransform(128)))

    # 64 columns of 16 bits are the same in memory whether 8 lines or 1 make a tile. wgmma takes the first form; a copy of
    # the first form would begin at multiples of 8 rows only.
    row_shape, out_shape = (tiling.stages, 2, HALF, BLOCK_K), (2, tiling.slots, HALF, PIECE)
    return [
        plgpu.RefUnion(smem(row_shape), smem(row_shape, 1)),
        smem((tiling.stages, problem.parts, BLOCK_K, tiling.n)),
        plgpu.RefUnion(smem(out_shape), smem(out_shape, 1), plgpu.SMEM((HALF, PIECE), dtype)),
        plgpu.Barrier(num_arrivals=2 + problem.parts, num_barriers=tiling.stages),
        # Rows arrive in the slots of all blocks of a cluster, once all of them are free.
        plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=2, num_barriers=tiling.stages)
        if tiling.cluster > 1
        else plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A block of the grid, as one of its warpgroups has it."""

    problem: Problem
    refs: Refs
    work: Work
    warpgroup: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Copies(_Block):
    """The warpgroup that copies rows and matrices to shared memory."""

    def run(self) -> None:
        self.work.copy(self.copy_matrices)

    def copy_matrices(self, slot: Any, group: Any, column: Any, depth: Any) -> None:
        p, refs = self.problem, self.refs
        for part in range(p.parts):
            source = refs.matrices.at[group, depth, pl.ds(part * p.width + column, p.tiling.n)]
            plgpu.copy_gmem_to_smem(source, refs.matrix_tiles.at[slot, part], refs.full.at[slot])


@dataclasses.dataclass(frozen=True, eq=False)
class _Math(_Block):
    """A warpgroup that multiplies."""

    def run(self) -> None:
        self.work.for_each(self.one_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def one_tile(self, i: Any, nothing: Any) -> None:
        """This warpgroup's half of the block's tile i, if it has one."""
        tiles = self.refs.tiles
        tile, column = self.work.place(i)
        begin, start, end = tiles[1 + self.warpgroup, tile], tiles[3, tile], tiles[4, tile]

        @pl.when(begin < 0)
        def sit_out() -> None:
            self.work.skip(i)

        @pl.when(begin >= 0)
        def take_part() -> None:
            result = self.product(i)

            @pl.when(end - start >= HALF)
            def whole() -> None:
                self.store(result, begin, column)

            @pl.when(end - start < HALF)
            def short() -> None:
                self.store_some_rows(result, begin, start, end - start, column)

    def product(self, i: Any) -> jax.Array:
        """The product of this warpgroup's half of tile i: [HALF, n] float32."""
        p, refs = self.problem, self.refs
        steps, stages = p.steps, p.tiling.stages

        def scope(*accs: Any) -> Any:
            def step(j: Any, nothing: Any) -> None:
                done = i * steps + j
                slot = lax.rem(done, stages)
                plgpu.barrier_wait(refs.full.at[slot])
                for part, acc in enumerate(accs):
                    plgpu.wgmma(acc, refs.row_tiles.at[slot, self.warpgroup], refs.matrix_tiles.at[slot, part])
                plgpu.wgmma_wait(p.parts)  # the step before has ended

                @pl.when(j > 0)
                def free_last() -> None:
                    plgpu.barrier_arrive(refs.empty.at[lax.rem(done - 1, stages)])

            lax.fori_loop(0, steps, step, None)
            products = [acc[...] for acc in accs]
            plgpu.barrier_arrive(refs.empty.at[lax.rem(i * steps + steps - 1, stages)])
            if not p.tiling.gated:
                return products[0]
            gate, up = products
            return gate / (1.0 + jnp.exp(-gate)) * up

        return pl.run_scoped(scope, *[plgpu.ACC((HALF, p.tiling.n), jnp.float32)] * p.parts)

    def store(self, result: jax.Array, begin: Any, column: Any) -> None:
        """Stores a result [HALF, n] to rows from `begin` on and columns from `column` on."""
        refs, slots = self.refs, self.problem.tiling.slots
        for piece in range(self.problem.tiling.n // PIECE):
            slot = piece % slots
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            refs.out_tiles[self.warpgroup, slot] = result[:, piece * PIECE : (piece + 1) * PIECE].astype(self.problem.dtype)
            plgpu.commit_smem()
            target = refs.out.at[pl.ds(begin, HALF), pl.ds(column + piece * PIECE, PIECE)]
            plgpu.copy_smem_to_gmem(refs.out_lines.at[self.warpgroup, slot], target)

    def store_some_rows(self, result: jax.Array, begin: Any, start: Any, size: Any, column: Any) -> None:
        """Stores the rows from `start` on of a group of `size` < HALF: as the first warpgroup, in whose slots out_plain is."""
        refs = self.refs
        for piece in range(self.problem.tiling.n // PIECE):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs.out_plain[...] = result[:, piece * PIECE : (piece + 1) * PIECE].astype(self.problem.dtype)
            plgpu.commit_smem()
            # A copy has a fixed number of rows: one copy for every bit of how many there are.
            row, length = start, HALF // 2
            while length:

                @pl.when(size & length != 0)
                def _(row: Any = row, length: int = length, piece: int = piece) -> None:
                    target = refs.out.at[pl.ds(row, length), pl.ds(column + piece * PIECE, PIECE)]
                    plgpu.copy_smem_to_gmem(refs.out_plain.at[pl.ds(row - begin, length)], target)

                row = row + (size & length)
                length //= 2
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def multiply(
    problem: Problem, rows: jax.Array, matrices: jax.Array, tiles: jax.Array, count: jax.Array, interpret: Any = False
) -> jax.Array:
    """The tiles of rows [M, K], M at least HALF, times matrices [E, K, N] -> [M, N], gated [M, N / 2].

    tiles [3 + 2, tiles], count [1]: as `tiles_of` makes them.
    """
    p = problem

    def parts(references: tuple[Any, ...], warpgroup: Any) -> tuple[Part, Part]:
        refs = Refs.of(references, interpret)
        of_block = p, refs, Work.of(p, refs, p.tiling.n, BLOCK_K), warpgroup
        return _Copies(*of_block), _Math(*of_block)

    out_type, operands = jax.ShapeDtypeStruct((p.m, p.width), p.dtype), (tiles, count, rows, matrices)
    return call_kernel("grouped_matmul_prefill", p, parts, _scratch(p), out_type, operands, interpret)
