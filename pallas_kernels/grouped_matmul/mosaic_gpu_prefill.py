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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper

HALF = 64  # rows of a warpgroup, what one wgmma takes
BLOCK_K = 64  # 128 bytes, one swizzled line
PIECE = 64  # columns stored by one copy
WIDTHS, GATED_WIDTHS = (256, 192, 128, 64), (128, 64)  # of a tile; the widest that divides the columns of the result
SHARED_MEMORY = 232448 - 2048  # bytes, less what barriers, alignment and the compiler take
REGISTERS = hopper.RegisterSplit(workers=2, worker=232, helper=40)


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
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

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
        from jax.experimental.pallas import mosaic_gpu as plgpu

        def step(j, nothing):
            slot = lax.rem(i * self.steps + j, self.stages)
            plgpu.barrier_wait(self.full.at[slot])
            if self.cluster > 1:  # one thread arrives: no warp may be left behind by a whole round of the slots
                plgpu.commit_smem()
            plgpu.barrier_arrive(self.empty.at[slot])

        lax.fori_loop(0, self.steps, step, None)


def multiply(
    rows: jax.Array, matrices: jax.Array, tiles: jax.Array, count: jax.Array, tiling: Tiling, interpret: Any = False
) -> jax.Array:
    """The tiles of rows [M, K], M at least HALF, times matrices [E, K, N] -> [M, N], gated [M, N / 2]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (m, k), dtype = rows.shape, rows.dtype
    n, stages, slots, gated = tiling.n, tiling.stages, tiling.slots, tiling.gated
    width = matrices.shape[2] // (1 + gated)  # of the result
    cluster = tiling.cluster
    columns, steps = width // (n * cluster), k // BLOCK_K  # columns of a cluster
    blocks = min(hopper.NUM_SMS // cluster, tiles.shape[1] * columns)
    parts = 1 + gated  # of the columns of a tile in a matrix

    def smem(shape, line_rows=8):
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((line_rows, 64)), plgpu.SwizzleTransform(128)))

    # 64 columns of 16 bits are the same in memory whether 8 lines or 1 make a tile. wgmma takes the first form; a copy of
    # the first form would begin at multiples of 8 rows only. The interpreter keeps such names apart, but copies from any row.
    row_shape, out_shape = (stages, 2, HALF, BLOCK_K), (2, slots, HALF, PIECE)

    def grouped_matmul_prefill(
        # Input
        tile_gmem,  # [3 + 2, tiles]
        count_gmem,  # [1]
        row_gmem,  # [M, K]
        matrix_gmem,  # [E, K, N]
        # Output
        out_gmem,  # [M, width]
        # Scratch
        row_smems,  # [stages, 2, HALF, BLOCK_K], as tiles and as lines
        matrix_smem,  # [stages, parts, BLOCK_K, n]
        out_smems,  # [2, slots, HALF, PIECE], as tiles and as lines; [HALF, PIECE]
        # Barriers
        full,
        empty,
    ):
        row_smem, row_lines = row_smems
        out_smem, out_lines, out_plain = out_smems
        if interpret:
            row_lines, out_lines = row_smem, out_smem
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        mine = lax.div(count_gmem[0] * columns - block + (blocks - 1), blocks)
        sizes = blocks, cluster, columns, n, steps, BLOCK_K, stages
        work = Work(block, mine, *sizes, tile_gmem, row_gmem, row_lines, full, empty)

        @pl.when(warpgroup == 2)
        def _copy():
            def copy_matrices(slot, group, column, depth):
                for part in range(parts):
                    source = matrix_gmem.at[group, depth, pl.ds(part * width + column, n)]
                    plgpu.copy_gmem_to_smem(source, matrix_smem.at[slot, part], full.at[slot])

            work.copy(copy_matrices)

        def product(i):
            """This warpgroup's half of its block's tile i: [HALF, n] float32."""

            def scope(*accs):
                def step(j, nothing):
                    done = i * steps + j
                    slot = lax.rem(done, stages)
                    plgpu.barrier_wait(full.at[slot])
                    for part, acc in enumerate(accs):
                        plgpu.wgmma(acc, row_smem.at[slot, warpgroup], matrix_smem.at[slot, part])
                    plgpu.wgmma_wait(parts)  # the step before has ended

                    @pl.when(j > 0)
                    def free_last():
                        plgpu.barrier_arrive(empty.at[lax.rem(done - 1, stages)])

                lax.fori_loop(0, steps, step, None)
                products = [acc[...] for acc in accs]
                plgpu.barrier_arrive(empty.at[lax.rem(i * steps + steps - 1, stages)])
                if not gated:
                    return products[0]
                gate, up = products
                return gate / (1.0 + jnp.exp(-gate)) * up

            return pl.run_scoped(scope, *[plgpu.ACC((HALF, n), jnp.float32)] * parts)

        def store(result, begin, column):
            for piece in range(n // PIECE):
                slot = piece % slots
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                out_smem[warpgroup, slot] = result[:, piece * PIECE : (piece + 1) * PIECE].astype(dtype)
                plgpu.commit_smem()
                target = out_gmem.at[pl.ds(begin, HALF), pl.ds(column + piece * PIECE, PIECE)]
                plgpu.copy_smem_to_gmem(out_lines.at[warpgroup, slot], target)

        def store_some(result, begin, start, size, column):
            """Of a group of fewer than HALF rows; always the first warpgroup, whose first slot out_plain is."""
            for piece in range(n // PIECE):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_plain[...] = result[:, piece * PIECE : (piece + 1) * PIECE].astype(dtype)
                plgpu.commit_smem()
                # A copy has a fixed number of rows: one copy for every bit of how many there are.
                row, length = start, HALF // 2
                while length:

                    @pl.when(size & length != 0)
                    def _(row=row, length=length, piece=piece):
                        target = out_gmem.at[pl.ds(row, length), pl.ds(column + piece * PIECE, PIECE)]
                        plgpu.copy_smem_to_gmem(out_plain.at[pl.ds(row - begin, length)], target)

                    row = row + (size & length)
                    length //= 2
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(REGISTERS.worker, action="increase")

            def one_tile(i, nothing):
                tile, column = work.place(i)
                begin, start, end = tile_gmem[1 + warpgroup, tile], tile_gmem[3, tile], tile_gmem[4, tile]

                @pl.when(begin < 0)
                def sit_out():
                    work.skip(i)

                @pl.when(begin >= 0)
                def take_part():
                    result = product(i)

                    @pl.when(end - start >= HALF)
                    def whole():
                        store(result, begin, column)

                    @pl.when(end - start < HALF)
                    def short():
                        store_some(result, begin, start, end - start, column)

            work.for_each(one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        grouped_matmul_prefill,
        out_type=jax.ShapeDtypeStruct((m, width), dtype),
        scratch_types=[
            plgpu.RefUnion(smem(row_shape), smem(row_shape, 1)),
            smem((stages, parts, BLOCK_K, n)),
            plgpu.RefUnion(smem(out_shape), smem(out_shape, 1), plgpu.SMEM((HALF, PIECE), dtype)),
            plgpu.Barrier(num_arrivals=2 + parts, num_barriers=stages),
            # Rows arrive in the slots of all blocks of a cluster, once all of them are free.
            plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=2, num_barriers=stages)
            if cluster > 1
            else plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("member",) if cluster > 1 else (),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
    )
    return kernel(tiles, count, rows, matrices)


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
    width = matrices.shape[2] // (1 + gated)
    tiling = tiling or tiling_for(width, gated)
    if width % (tiling.n * tiling.cluster):
        raise ValueError(f"{tiling} does not divide {width} columns")
    return multiply(rows, matrices, *tiles_of(group_sizes, rows.shape[0]), tiling, interpret)
