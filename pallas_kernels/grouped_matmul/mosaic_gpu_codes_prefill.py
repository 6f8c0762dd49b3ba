"""grouped_matmul on Hopper of rows and matrices in 8 bits, where groups have many rows.

Tiles, warpgroups and copies are those of mosaic_gpu_prefill. The sums of wgmma over 8-bit floats keep too few bits for a whole
row, so each of them is over BLOCK_K = 128 codes, which share their scales, and begins at zero; float32 registers add up the
scaled sums. A warpgroup multiplies WAVE columns at a time: while it scales and adds those, the other warpgroup multiplies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill import HALF, REGISTERS, SHARED_MEMORY, Work, tiles_of
from pallas_kernels.quant import BLOCK, Scaled, float_scales, row_scales

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


def multiply(
    rows: Scaled, matrices: Scaled, tiles: jax.Array, count: jax.Array, tiling: Tiling, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """The tiles of rows [M, K], M at least HALF, times matrices [E, N, K] -> [M, N], gated [M, N / 2].

    rows.scales [K / 128, M], matrices.scales [E, N / 128, K / 128]. With coded results also their scales [N / 256, M].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.grouped_matmul import mosaic_gpu_registers as registers

    (m, k), stages, slots, cluster = rows.shape, tiling.stages, tiling.slots, tiling.cluster
    gated, coded = tiling.gated, tiling.coded
    width = matrices.shape[1] // (1 + gated)  # of the result
    columns, steps = pl.cdiv(width, tiling.columns * cluster), k // BLOCK_K  # columns of a cluster
    blocks = min(hopper.NUM_SMS // cluster, tiles.shape[1] * columns)
    down = matrices.scales.shape[1]  # blocks of a matrix's rows
    out_types = [jax.ShapeDtypeStruct((m, width), CODES if coded else jnp.bfloat16)]
    if coded:
        out_types.append(jax.ShapeDtypeStruct((width // WAVE * m,), jnp.float32))

    def smem(shape, dtype, line_rows=8):
        line = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((line_rows, line)), plgpu.SwizzleTransform(128)))

    # 128 codes of a line are the same in memory whether 8 lines or 1 make a tile, as in mosaic_gpu_prefill.
    row_shape, result_shape = (stages, 2, HALF, BLOCK_K), (2, slots, HALF, PIECE)

    def grouped_matmul_codes(
        # Input
        tile_gmem,  # [3 + 2, tiles]
        count_gmem,  # [1]
        row_gmem,  # [M, K]
        row_scale_gmem,  # [K / BLOCK_K, M]
        matrix_gmem,  # [E, N, K]
        matrix_scale_gmem,  # [E * N / WAVE * K / BLOCK_K]
        # Output
        out_gmem,  # [M, width]
        *others,
        # coded: out_scale_gmem [width / WAVE * M]
        # Scratch: row_smems [stages, 2, HALF, BLOCK_K], as tiles and as lines; matrix_smem [stages, WAVES, WAVE, BLOCK_K];
        #   result_smems [2, slots, HALF, PIECE], as tiles and as lines, and [2, HALF, PIECE]; None where gated
        # Barriers: full, empty
    ):
        *out_scale_gmem, (row_smem, row_lines), matrix_smem, result_smems, full, empty = others
        if interpret:
            row_lines = row_smem
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        mine = lax.div(count_gmem[0] * columns - block + (blocks - 1), blocks)
        sizes = blocks, cluster, columns, tiling.columns, steps, BLOCK_K, stages
        work = Work(block, mine, *sizes, tile_gmem, row_gmem, row_lines, full, empty)

        def in_matrix(wave, column):
            """Where a wave of a tile's columns begins in a matrix."""
            return column + wave * (width if gated else WAVE)

        @pl.when(warpgroup == 2)
        def _copy():
            def copy_matrices(slot, group, column, depth):
                for wave in range(WAVES):
                    source = matrix_gmem.at[group, pl.ds(in_matrix(wave, column), WAVE), depth]
                    plgpu.copy_gmem_to_smem(source, matrix_smem.at[slot, wave], full.at[slot])

            work.copy(copy_matrices)

        def product(i, half, waves, group, begin, column):
            """A [HALF, WAVE] float32 of each of `waves` and the rows from `begin` on, half `half` of the block's tile i."""

            def scale_index(wave):
                # A tile may extend beyond the columns.
                return (group * down + jnp.minimum(lax.div(in_matrix(wave, column), WAVE), down - 1)) * steps

            indices = [scale_index(wave) for wave in (waves if len(waves) == WAVES else (waves[0], 1 - waves[0]))]
            of_lane: Any = None if interpret else registers.alternate(*indices)

            def scales(j):
                of_rows = plgpu.load(row_scale_gmem.at[j, pl.ds(begin, HALF)], layout=registers.BY_ROW, optimized=False)
                if interpret:
                    return of_rows, [matrix_scale_gmem[index + j] for index in indices]
                return of_rows, registers.load(matrix_scale_gmem, of_lane, j)

            def step(j, carry):
                sums, (of_rows, of_blocks) = carry
                factors = [of_rows * x for x in of_blocks] if interpret else registers.products(of_rows, of_blocks)
                following = scales(jnp.minimum(j + 1, steps - 1))  # in time for the next step
                slot = lax.rem(i * steps + j, stages)
                plgpu.barrier_wait(full.at[slot])
                left = row_smem.at[slot, half]
                if gated and not interpret:  # read once for both waves; the interpreter knows no operand in registers
                    left = plgpu.load(left, layout=plgpu.Layout.WGMMA_8BIT)
                added: list[jax.Array] = []
                for wave, total, factor in zip(waves, sums, factors, strict=False):

                    def fresh(acc, wave=wave):
                        # Nothing may come between the zeros and wgmma: then no register is zeroed.
                        plgpu.wgmma(acc, left, matrix_smem.at[slot, wave].transpose((1, 0)))
                        return acc[...]

                    part = pl.run_scoped(fresh, plgpu.ACC((HALF, WAVE), jnp.float32))
                    if len(added) == len(waves) - 1:
                        plgpu.barrier_arrive(empty.at[slot])
                    added.append(total + part * lax.broadcast_in_dim(factor, (HALF, WAVE), [0]))
                return tuple(added), following

            zeros = plgpu.layout_cast(jnp.zeros((HALF, WAVE), jnp.float32), plgpu.Layout.WGMMA)
            return lax.fori_loop(0, steps, step, ((zeros,) * len(waves), scales(0)))[0]

        def store(results, begin, start, end):
            """Results [HALF, WAVE], by column, of rows from `begin` on, of which the group has those from start to end."""
            result_smem, result_lines, result_plain = result_smems
            if interpret:
                result_lines = result_smem

            def each_piece(wait, run):
                for column, result in results:
                    for piece in range(WAVE // PIECE):
                        at = column + piece * PIECE

                        @pl.when(at < width)
                        def _(result=result, piece=piece, at=at):
                            plgpu.wait_smem_to_gmem(wait, wait_read_only=True)
                            run(piece % slots, at, result[:, piece * PIECE : (piece + 1) * PIECE].astype(jnp.bfloat16))

            def copy(slot, at, part):
                result_smem[warpgroup, slot] = part
                plgpu.commit_smem()
                target = out_gmem.at[pl.ds(begin, HALF), pl.ds(at, PIECE)]
                plgpu.copy_smem_to_gmem(result_lines.at[warpgroup, slot], target)

            def copy_some(_, at, part):
                result_plain[warpgroup] = part
                plgpu.commit_smem()
                # A copy has a fixed number of rows: one copy for every bit of how many there are.
                row, length = start, HALF // 2
                while length:

                    @pl.when((end - start) & length != 0)
                    def _(row=row, length=length):
                        target = out_gmem.at[pl.ds(row, length), pl.ds(at, PIECE)]
                        plgpu.copy_smem_to_gmem(result_plain.at[warpgroup, pl.ds(row - begin, length)], target)

                    row = row + ((end - start) & length)
                    length //= 2

            @pl.when(end - start >= HALF)
            def whole():
                each_piece(slots - 1, copy)

            @pl.when(end - start < HALF)
            def short():
                each_piece(0, copy_some)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store_directly(result, begin, start, end, column):
            """Stores a single result as `store` does, from registers to memory."""
            if not interpret:
                return registers.store_rows(out_gmem, result, begin, start, end, column)
            row = begin + lax.iota(jnp.int32, HALF)
            inside = ((row >= start) & (row < end))[:, None]
            for piece in range(0, WAVE, PIECE):
                places = pl.ds(begin, HALF), pl.ds(column + piece, PIECE)

                @pl.when(column + piece < width)
                def _(piece=piece, places=places):
                    new = result[:, piece : piece + PIECE].astype(out_gmem.dtype)
                    out_gmem[places] = jnp.where(inside, new, out_gmem[places])

        def store_codes(result, begin, start, end, column):
            """Stores a result as `store_directly` does, in 8 bits, and its scales."""
            scales = row_scales(jnp.max(jnp.abs(result), axis=1))
            store_directly(result * lax.broadcast_in_dim(1.0 / scales, (HALF, WAVE), [0]), begin, start, end, column)
            place = lax.div(column, WAVE) * m + begin
            if not interpret:
                return registers.store_some(out_scale_gmem[0], scales, place, start - begin, end - begin)
            row = begin + lax.iota(jnp.int32, HALF)
            places = pl.ds(place, HALF)
            out_scale_gmem[0][places] = jnp.where((row >= start) & (row < end), scales, out_scale_gmem[0][places])

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(REGISTERS.worker, action="increase")

            def one_tile(i, nothing):
                tile, column = work.place(i)
                group, first, second, start, end = (tile_gmem[j, tile] for j in range(5))

                def take(half, begin, waves):
                    results = product(i, half, waves, group, begin, column)
                    if not gated:
                        columns_of = [column + wave * WAVE for wave in waves]
                        return store(list(zip(columns_of, results, strict=True)), begin, start, end)
                    gate, up = results
                    (store_codes if coded else store_directly)(gate / (1.0 + jnp.exp(-gate)) * up, begin, start, end, column)

                if not gated:

                    @pl.when(second < 0)
                    def share_half():
                        take(0, first, (warpgroup,))

                @pl.when((second >= 0) | ((warpgroup == 0) & gated))
                def take_half():
                    take(warpgroup, jnp.where(warpgroup == 0, first, second), (0, 1))

                if gated:

                    @pl.when((second < 0) & (warpgroup == 1))
                    def sit_out():
                        work.skip(i)

            work.for_each(one_tile)
            if not gated:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        grouped_matmul_codes,
        out_type=tuple(out_types),
        scratch_types=[
            plgpu.RefUnion(smem(row_shape, CODES), smem(row_shape, CODES, 1)),
            smem((stages, WAVES, WAVE, BLOCK_K), CODES),
            None
            if gated
            else plgpu.RefUnion(
                smem(result_shape, jnp.bfloat16),
                smem(result_shape, jnp.bfloat16, 1),
                plgpu.SMEM((2, HALF, PIECE), jnp.bfloat16),
            ),
            plgpu.Barrier(num_arrivals=2 + WAVES, num_barriers=stages),
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
    return kernel(tiles, count, rows.codes, rows.scales, matrices.codes, matrices.scales.reshape(-1))


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
    m = rows.shape[0]
    tiling = tiling or tiling_for(matrices.shape[1] // (1 + gated), gated, coded)
    tiles, count = tiles_of(group_sizes, max(m, HALF))
    codes, scales = (jnp.pad(x, ((0, max(HALF - m, 0)), (0, 0))) for x in (rows.codes, rows.scales))
    in_float32 = Scaled(matrices.codes, float_scales(matrices.scales))
    out, *out_scales = multiply(Scaled(codes, scales.T), in_float32, tiles, count, tiling, interpret)
    if not tiling.coded:
        return out[:m]
    return Scaled(out[:m], out_scales[0].reshape(-1, max(m, HALF)).T[:m])
