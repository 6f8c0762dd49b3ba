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
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill import HALF, tiles_of
from pallas_kernels.quant import BLOCK, E4M3_MAX, MIN_MAGNITUDE, Scaled, float_scales

BLOCK_K = BLOCK  # 128 bytes, one swizzled line, and the codes that share a scale
WAVE = BLOCK  # columns that share scales
PIECE = 64  # the columns of a matrix are a multiple of it
CODES = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Tiling:
    """waves: of WAVE columns of a matrix that a tile reads; stages: steps of BLOCK_K in flight; slots: pieces of a warpgroup
    on their way out; cluster: blocks that take the columns next to each other of one tile at the same time and share the
    copies of its rows.
    """

    tall: int = 1
    stages: int = 4
    slots: int = 2
    cluster: int = 1
    gated: bool = False
    coded: bool = False
    split: bool = True
    ordered: bool = False
    in_registers: bool = False
    worker: int = 232
    leave_out: str = ""
    pair: bool = False

    @property
    def waves(self) -> int:
        return 2 // self.tall

    @property
    def columns(self) -> int:
        """Of the result that a tile has."""
        return WAVE if self.gated else self.waves * WAVE

    @property
    def shared_memory(self) -> int:
        return self.stages * BLOCK_K * (2 * self.tall * HALF + self.waves * WAVE) + 2 * 2 * self.slots * HALF * PIECE


def tiling_for(columns: int, gated: bool = False, coded: bool = False) -> Tiling:
    """The fastest tiling for a result of so many columns; docs/kernels.md has the measurements."""
    width = WAVE if gated else 2 * WAVE
    cluster = 1 if -(-columns // width) % 2 else 2
    return Tiling(cluster=cluster, gated=gated, coded=coded)


def _scales(largest: jax.Array) -> jax.Array:
    """Of rows whose largest magnitudes these are; NaN where they are not finite."""
    return jnp.where(largest < jnp.inf, jnp.maximum(largest, MIN_MAGNITUDE) / E4M3_MAX, jnp.nan)


def multiply(
    rows: jax.Array,
    row_scales: jax.Array,
    matrices: jax.Array,
    matrix_scales: jax.Array,
    tiles: jax.Array,
    count: jax.Array,
    tiling: Tiling,
    dtype: Any,
    interpret: Any = False,
) -> Any:
    """The tiles of rows [M, K], M at least HALF, times matrices [E, N, K] -> [M, N], gated [M, N / 2].

    Both are codes; row_scales [K / 128, M], matrix_scales [E, N / 128, K / 128].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.grouped_matmul import mosaic_gpu_registers as registers

    (m, k), waves, stages = rows.shape, tiling.waves, tiling.stages
    tall, pieces = tiling.tall, 2 * tiling.tall
    pair = tiling.pair
    gated, coded, cluster = tiling.gated, tiling.coded, tiling.cluster
    width = matrices.shape[1] // (1 + gated)  # of the result
    columns, steps = pl.cdiv(width, tiling.columns * (1 if pair else cluster)), k // BLOCK_K  # columns of a cluster
    blocks = min(hopper.NUM_SMS // cluster, tiles.shape[1] * columns)
    shared = "member" if cluster > 1 else None
    across = pl.cdiv(matrices.shape[1], WAVE)  # blocks of a matrix's columns
    splits = tiling.split and not gated and tall == 1
    layout = plgpu.Layout.WGMMA
    by_row = layout.reduce(1)
    out_dtype = CODES if coded else dtype

    def smem(shape, dtype, line_rows=8):
        line = 128 // jnp.dtype(dtype).itemsize
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((line_rows, line)), plgpu.SwizzleTransform(128)))

    row_shape = (stages, pieces, HALF, BLOCK_K)

    def kernel(tile_gmem, count_gmem, row_gmem, row_scale_gmem, matrix_gmem, matrix_scale_gmem, *others):
        if coded:
            out_gmem, out_scale_gmem, *others = others
        else:
            out_gmem, *others = others
        row_smems, matrix_smem, full, empty, turn = others
        row_smem, row_lines = row_smems
        if interpret:
            row_lines = row_smem
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        mine = lax.div(count_gmem[0] * columns - block + (blocks - 1), blocks)  # how many tiles this block has

        def place(i):
            index = block + i * blocks
            tile = lax.div(index, columns)
            column = index - tile * columns
            return tile, (column * cluster + lax.axis_index("member") if cluster > 1 and not pair else column) * tiling.columns

        def begins_of(tile):
            if not pair:
                return [tile_gmem[1 + j, tile] for j in range(pieces)]
            first = lax.axis_index("member") == 0
            return [jnp.where(first, tile_gmem[1 + j, tile], tile_gmem[3 + j, tile]) for j in range(2)]

        start_row = 1 + (4 if pair else pieces)

        def column_of(wave, column):
            """Of a matrix."""
            return wave * width + column if gated else wave * WAVE + column

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(40 if tiling.worker <= 232 else 24, action="decrease")

            def one_tile(i, nothing):
                tile, column = place(i)
                group, begins = tile_gmem[0, tile], begins_of(tile)

                def step(j, nothing):
                    done = i * steps + j
                    slot = lax.rem(done, stages)

                    @pl.when(done >= stages)
                    def await_free():
                        plgpu.barrier_wait(empty.at[slot])

                    depth = pl.ds(j * BLOCK_K, BLOCK_K)

                    def copy_rows(half, begin):
                        source = row_gmem.at[pl.ds(begin, HALF), depth]
                        axes = None if pair else shared
                        plgpu.copy_gmem_to_smem(source, row_lines.at[slot, half], full.at[slot], collective_axes=axes)

                    if not pair:
                        copy_rows(0, begins[0])
                    for piece, begin in enumerate(begins[0 if pair else 1 :], 0 if pair else 1):

                        @pl.when(begin >= 0)
                        def copy(piece=piece, begin=begin):
                            copy_rows(piece, begin)

                        @pl.when(begin < 0)
                        def leave():
                            plgpu.barrier_arrive(full.at[slot])  # in place of the copy

                    for wave in range(waves):
                        source = matrix_gmem.at[group, pl.ds(column_of(wave, column), WAVE), depth]
                        axes = shared if pair else None
                        plgpu.copy_gmem_to_smem(source, matrix_smem.at[slot, wave], full.at[slot], collective_axes=axes)

                lax.fori_loop(0, steps, step, None)

            lax.fori_loop(0, mine, one_tile, None)

            def drain(done, nothing):
                plgpu.barrier_wait(empty.at[lax.rem(done, stages)])

            lax.fori_loop(jnp.maximum(mine * steps - stages, 0), mine * steps, drain, None)

        def product(i, own, begins, group, column):
            """A [HALF, WAVE] float32 for each of `own` pieces of rows and waves of the block's tile i."""

            def place_of(wave):
                block = jnp.minimum(lax.div(column_of(wave, column), WAVE), across - 1)  # a tile may extend beyond the columns
                return (group * across + block) * steps

            own_waves = [wave for _, wave in own]
            places = [place_of(wave) for wave in own_waves]
            if tall > 1:
                places = [places[0], jnp.maximum(places[0] - steps, 0)]
            elif len(own) == 1:
                places = [places[0], place_of(1 - own_waves[0])]
            if not interpret:
                place = registers.alternate(*places)

            def scales(j):
                of_rows = [
                    plgpu.load(row_scale_gmem.at[j, pl.ds(begin, HALF)], layout=by_row, optimized=False) for begin in begins
                ]
                if interpret:
                    return of_rows, tuple(matrix_scale_gmem[place + j] for place in places)
                return of_rows, registers.load(matrix_scale_gmem, place, j)

            def factors(of_rows, of_blocks):
                def of(row):
                    return [row * of_block for of_block in of_blocks] if interpret else registers.products(row, of_blocks)

                return [of(row)[0] for row in of_rows] if tall > 1 else of(of_rows[0])

            def step(j, carry):
                sums, (of_rows, of_blocks) = carry
                factor = factors(of_rows, of_blocks)
                following = scales(jnp.minimum(j + 1, steps - 1))  # in time for the next step
                done = i * steps + j
                slot = lax.rem(done, stages)
                plgpu.barrier_wait(full.at[slot])
                held = None
                if tiling.in_registers and len(own) == 2:
                    held = plgpu.load(row_smem.at[slot, own[0][0]], layout=plgpu.Layout.WGMMA_8BIT)
                added = []
                for which, ((piece, wave), total) in enumerate(zip(own, sums, strict=True)):

                    def fresh(acc, piece=piece, wave=wave):
                        # Nothing may come between the zeros and wgmma: then no register is zeroed.
                        left = row_smem.at[slot, piece] if held is None else held
                        plgpu.wgmma(acc, left, matrix_smem.at[slot, wave].transpose((1, 0)))
                        if tiling.ordered:
                            plgpu.barrier_arrive(turn.at[1 - warpgroup])
                        return acc[...]

                    if tiling.ordered:
                        plgpu.barrier_wait(turn.at[warpgroup])

                    part = pl.run_scoped(fresh, plgpu.ACC((HALF, WAVE), jnp.float32))
                    if which == len(own) - 1:
                        plgpu.barrier_arrive(empty.at[slot])
                    if tiling.leave_out == "promotion":
                        added.append(part)
                        continue
                    added.append(total + part * lax.broadcast_in_dim(factor[which], (HALF, WAVE), [0]))
                return tuple(added), following

            zeros = plgpu.layout_cast(jnp.zeros((HALF, WAVE), jnp.float32), layout)
            return lax.fori_loop(0, steps, step, ((zeros,) * len(own), scales(0)))[0]

        def skip(i):
            def step(j, nothing):
                slot = lax.rem(i * steps + j, stages)
                plgpu.barrier_wait(full.at[slot])
                if cluster > 1:  # one thread arrives: no warp may be left behind by a whole round of the slots
                    plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])

            lax.fori_loop(0, steps, step, None)

        def store_scales(scales, begin, start, end, column):
            """Of the rows from start to end."""
            place = lax.div(column, WAVE) * m + begin
            if interpret:
                row = begin + lax.iota(jnp.int32, HALF)
                kept = out_scale_gmem[pl.ds(place, HALF)]
                out_scale_gmem[pl.ds(place, HALF)] = jnp.where((row >= start) & (row < end), scales, kept)
            else:
                registers.store_some(out_scale_gmem, scales, place, start - begin, end - begin)

        def store(result, begin, start, end, column):
            """result [HALF, WAVE], of rows from `begin` on, to those from start to end."""
            if not interpret:
                return registers.store_rows(out_gmem, result, begin, start, end, column)
            row = begin + lax.iota(jnp.int32, HALF)
            inside = ((row >= start) & (row < end))[:, None]
            for piece in range(0, WAVE, PIECE):
                places = pl.ds(begin, HALF), pl.ds(column + piece, PIECE)

                @pl.when(column + piece < width)
                def _(piece=piece, places=places):
                    new = result[:, piece : piece + PIECE].astype(out_dtype)
                    out_gmem[places] = jnp.where(inside, new, out_gmem[places])

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(tiling.worker, action="increase")
            if tiling.ordered:

                @pl.when(warpgroup == 1)
                def first_turn():
                    plgpu.barrier_arrive(turn.at[0])

            def one_tile(i, nothing):
                tile, column = place(i)
                group, begins = tile_gmem[0, tile], begins_of(tile)
                start, end = tile_gmem[start_row, tile], tile_gmem[start_row + 1, tile]

                def finish(results, waves, begins):
                    if gated:
                        gate, up = results
                        results, waves = [gate / (1.0 + jnp.exp(-gate)) * up], [0]
                    if coded:
                        (result,) = results
                        scales = _scales(jnp.max(jnp.abs(result), axis=1))
                        store_scales(scales, begins[0], start, end, column)
                        results = [result * lax.broadcast_in_dim(1.0 / scales, (HALF, WAVE), [0])]
                    stored = zip(results, waves, begins * len(waves) if tall == 1 else begins, strict=True)

                    for result, wave, begin in stored:
                        store(result, begin, start, end, column + wave * WAVE)

                def run(own, begins):
                    finish(product(i, own, begins, group, column), [wave for _, wave in own], begins)

                own_begins = [jnp.where(warpgroup == 0, begins[2 * j], begins[2 * j + 1]) for j in range(tall)]
                present = own_begins[-1] >= 0
                if tall > 1:

                    @pl.when((own_begins[0] >= 0) & (own_begins[1] < 0))
                    def one_piece():
                        run([(warpgroup, 0)], own_begins[:1])

                    missing = own_begins[0] < 0
                else:
                    missing = own_begins[0] < 0

                if splits:
                    present = begins[1] >= 0

                    if pair:

                        @pl.when(begins[0] < 0)
                        def sit_out():
                            skip(i)

                    @pl.when((begins[0] >= 0) & (begins[1] < 0))
                    def share():
                        run([(0, warpgroup)], begins[:1])

                else:

                    @pl.when(missing)
                    def sit_out():
                        skip(i)

                @pl.when(present)
                def take_part():
                    if tall == 1:
                        run([(warpgroup, 0), (warpgroup, 1)], own_begins)
                    else:
                        run([(warpgroup, 0), (warpgroup + 2, 0)], own_begins)

            lax.fori_loop(0, mine, one_tile, None)

    out_type = jax.ShapeDtypeStruct((m, width), out_dtype)
    run = plgpu.kernel(
        kernel,
        out_type=(out_type, jax.ShapeDtypeStruct((width // WAVE * m,), jnp.float32)) if coded else out_type,
        scratch_types=[
            plgpu.RefUnion(smem(row_shape, CODES), smem(row_shape, CODES, 1)),
            smem((stages, waves, WAVE, BLOCK_K), CODES),
            plgpu.Barrier(num_arrivals=pieces + waves, num_barriers=stages),
            # Rows arrive in the slots of all blocks of a cluster, once all of them are free.
            plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=2, num_barriers=stages)
            if cluster > 1
            else plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=2),
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
    return run(tiles, count, rows, row_scales, matrices, matrix_scales.reshape(-1))


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
    """
    m = rows.shape[0]
    tiling = tiling or tiling_for(matrices.shape[1] // (1 + gated), gated, coded)
    tiles, count = tiles_of(group_sizes, max(m, HALF), 4 if tiling.pair else 2 * tiling.tall)
    missing = max(HALF - m, 0)
    codes, scales = (jnp.pad(x, ((0, missing), (0, 0))) for x in (rows.codes, rows.scales))
    out = multiply(
        codes, scales.T, matrices.codes, float_scales(matrices.scales), tiles, count, tiling, jnp.bfloat16, interpret
    )
    if not tiling.coded:
        return out[:m]
    codes, scales = out
    return Scaled(codes[:m], scales.reshape(-1, max(m, HALF)).T[:m])
