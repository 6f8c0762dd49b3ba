"""Index scores on Hopper: I = key_scale_t * sum_h w_h relu(q_h . k_t), and the maxima of every 16 of them.

One thread block per SM stays for the whole kernel: `math` warpgroups and one that copies. The keys are the
rows of the matrix product (64 a warpgroup), queries x heads its columns (128: 4 queries of 32 heads, 2 of 64), so the
sum over heads runs along a row of the accumulator, whose columns 4 lanes share, every fourth pair each. The columns are in
such an order that a lane has those of one query: all of them in a tile of 4 queries, where no lane needs what another one
has, a half or a quarter in a tile of 2 or 1. Four parts of the heads are added in the same order in each of these tiles,
so a score depends on its query and key alone.

A unit of work is as many tiles of queries as there are math warpgroups, one for each, and a run of key tiles, which all of
them multiply: the queries and their weights stay (shared memory and registers) while keys stream past. Units run through
all queries of a batch row before the next run of keys, so that all SMs read the same keys at the same time,
from L2. Key tiles that no query of the unit sees are skipped; their scores stay unwritten. Where a tile is cut by what a
query sees, the hidden scores are -inf, and NaN becomes -inf too, so that the maxima are those of the visible scores. Few
queries have fewer tiles in a unit, whose warpgroups then divide larger key tiles.

Why these blocks: 64 keys and 128 columns give each of 4 math warpgroups 112 registers (64 of them accumulators), which
keeps the tensor cores busy while other warpgroups are in the epilogue. The kernel runs at the power limit of the GPU, so
what costs energy costs time: a unit is of four tiles of queries, because these read the fewest keys from L2 (docs/kernels.md).
The epilogue limits 8-bit inputs before the product does. relu (a maximum) uses the integer pipe at half rate,
so for 8-bit inputs half of the relus are saturating multiplications on the other pipe: exact, because |q . k| is below 2^25.
Both operands arrive by TMA and are only read by wgmma, so no fence stands between them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from pallas_kernels import hopper
from pallas_kernels.indexer_topk.mosaic_gpu_select import BLOCK

WIDTH = 128  # Di of the kernel
HEADS = (8, 16, 32, 64)  # Hi of the kernel
KEYS = 64  # of a warpgroup
COLUMNS = 128  # queries x heads of a full tile
MAX_RUN = 128  # key tiles
SHARED_BYTES = 224_000  # for keys and queries, of 232448
# What a launch can leave out, for measuring what it costs.
STAGES = ("product", "epilogue", "stores", "copies")
# By math warpgroups; the copying one helps.
_REGISTERS = {split.workers: split for split in map(hopper.RegisterSplit, (2, 3, 4), (240, 160, 112), (24, 32, 32))}
_ACC = plgpu.Layout.WGMMA
_LOW = float("-inf")


@dataclasses.dataclass(frozen=True)
class ScoresConfig:
    """math: warpgroups that multiply; queries: of a tile; tiles: of queries in a unit, each of math / tiles warpgroups;
    stages: key tiles in flight; query_slots: units whose queries are in flight; run: most key tiles of a unit; saturate:
    half of the relus by saturation (8-bit inputs only).

    leave_out: only for measuring what stages cost, one of STAGES; the scores are without meaning then. Barriers are waited
    for and arrived at as ever. "product" takes a warpgroup's first accumulator for every tile, "epilogue" makes nothing of
    the accumulators, "stores" finds scores and maxima but does not write them, "copies" leaves the first key tiles in their
    slots for good.
    """

    queries: int
    tiles: int = 1
    math: int = 4
    stages: int = 4
    query_slots: int = 2
    run: int = 24
    saturate: bool = False
    leave_out: str = ""

    def __post_init__(self) -> None:
        if self.queries not in (1, 2, 4):
            raise ValueError(f"ScoresConfig: queries {self.queries} is not 1, 2 or 4")
        if self.math not in _REGISTERS:
            raise ValueError(f"ScoresConfig: math {self.math} is not one of {sorted(_REGISTERS)}")
        if self.tiles < 1 or self.math % self.tiles:
            raise ValueError(f"ScoresConfig: {self.math} math warpgroups are not divided evenly by {self.tiles} tiles")
        if min(self.stages, self.query_slots, self.run) < 1:
            raise ValueError(f"ScoresConfig: stages, query_slots and run must be positive: {self}")
        if self.leave_out not in ("", *STAGES):
            raise ValueError(f"ScoresConfig: leave_out {self.leave_out!r} is not one of {STAGES}")

    @property
    def keys(self) -> int:
        """Of a key tile."""
        return KEYS * self.math // self.tiles

    @property
    def unit_queries(self) -> int:
        return self.queries * self.tiles


def best_run(key_tiles: int, other_units: int) -> int:
    """Key tiles of a unit such that the SM with most units ends first; a unit costs about half a tile extra."""

    def last_to_end(run: int) -> float:
        units = other_units * -(-key_tiles // run)
        return -(-units // hopper.NUM_SMS) * (run + 0.5)

    return min(range(1, min(key_tiles, MAX_RUN) + 1), key=last_to_end)


def default_config(batch: int, queries: int, heads: int, keys: int, dtype: jnp.dtype) -> ScoresConfig:
    """Tiles of up to 128 columns, up to one for each warpgroup, and what of keys in flight shared memory holds."""
    itemsize = jnp.dtype(dtype).itemsize
    tile = max(n for n in (1, 2, 4) if n <= queries and n * heads <= COLUMNS)
    tiles = max(n for n in (1, 2, 4) if n == 1 or n * tile <= queries)
    config = ScoresConfig(queries=tile, tiles=tiles, query_slots=2 // itemsize, saturate=itemsize == 1 and queries >= 4)
    row_bytes = WIDTH * itemsize + 4  # of a query's head with its weight, or of a key with its scale
    room = SHARED_BYTES - config.query_slots * config.unit_queries * heads * row_bytes
    stages = room // (config.keys * row_bytes)
    return dataclasses.replace(
        config,
        stages=stages if stages < 4 else 8 if stages >= 8 else 4,  # the slots of a power of two are counted cheaply
        run=best_run(-(-keys // config.keys), batch * -(-queries // config.unit_queries)),
    )


# ---- the epilogue, on the registers of one thread


def _i32(x: int) -> Any:
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, x))


def _f32(x: float) -> Any:
    kind = ir.F32Type.get()
    return arith.constant(kind, ir.FloatAttr.get(kind, x))


def _element(x: Any, i: int) -> Any:
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _lane_bit(lane: Any, bit: int) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, _i32(bit)), _i32(0))


def _lane_and_warp() -> tuple[Any, Any]:
    thread = utils.thread_idx()
    return arith.andi(thread, _i32(31)), arith.andi(arith.shrui(thread, _i32(5)), _i32(3))


def _saturates(column_tile: int) -> bool:
    return column_tile % 4 < 2


def _scaled_for_saturation(weights: Any) -> Any:
    """relu(x) = 2^25 saturate(2^-25 x): the weights of the columns treated so carry the 2^25."""
    kind = ir.VectorType.get((2,), ir.F32Type.get())
    scale = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get(ir.F32Type.get(), 2.0**25)))
    registers = weights.registers.copy().reshape(-1)
    for tile in range(registers.shape[0]):
        if _saturates(tile):
            registers[tile] = arith.mulf(registers[tile], scale)
    return fragmented_array.FragmentedArray(
        _registers=registers.reshape(weights.registers.shape), _layout=weights.layout, _is_signed=weights.is_signed
    )


def _relu(x: Any, saturate: bool) -> Any:
    if saturate:
        return utils.inline_ptx("mul.rn.sat.f32 $0, $1, 0f33000000;", x, result_types=x.type)  # 2^-25
    return arith.maximumf(x, _f32(0.0))  # NaN stays


def _sums_of_lane(acc: Any, weights: Any, queries: int, saturate: bool, lane: Any) -> list[Any]:
    """The head sums that are this lane's; `_Place` tells which, of its query in the two rows 8 apart that it has.

    Heads 8 i + 2 part + (0, 1) are a part of four, the parts (0 + 2) + (1 + 3) are the sum.
    """
    tiles = acc.shape[1] // 8
    products = acc.registers.reshape(tiles, 2)
    columns = [[_element(w, e) for e in range(2)] for w in weights.registers.reshape(tiles)]

    sums = []
    for half in range(2):
        parts = []
        for first in range(queries):
            total = None
            for tile in range(first, tiles, queries):
                for e in range(2):
                    x = _relu(_element(products[tile, half], e), saturate and _saturates(tile))
                    x = fragmented_array.mulf(x, columns[tile][e])
                    total = x if total is None else fragmented_array.addf(total, x)
            parts.append(total)
        while (n := len(parts) // 2) > 0:
            parts = [fragmented_array.addf(parts[i], parts[n + i]) for i in range(n)]
        sums += parts
    for step in {4: (), 2: (1,), 1: (2, 1)}[queries]:  # the distance of lanes that have other heads of the same query
        if len(sums) == 1:
            sums = [fragmented_array.addf(sums[0], utils.shfl_bfly(sums[0], step))]
        else:  # a row for each of the two lanes
            upper, (low, high) = _lane_bit(lane, step), sums
            mine, other = arith.select(upper, high, low), arith.select(upper, low, high)
            sums = [fragmented_array.addf(mine, utils.shfl_bfly(other, step))]
    return sums


@dataclasses.dataclass(frozen=True)
class _Place:
    """Which query and row half the sums of `_sums_of_lane` belong to."""

    queries: int

    def query(self, lane: Any) -> Any:
        shift = {4: 0, 2: 1, 1: 2}[self.queries]
        return arith.shrui(arith.andi(lane, _i32(3)), _i32(shift))

    def half(self, lane: Any) -> Any:
        """Of the lane's first sum; with 4 queries there are two sums, of halves 0 and 1."""
        if self.queries == 4:
            return _i32(0)
        return arith.andi(arith.shrui(lane, _i32(self.queries == 1)), _i32(1))

    @property
    def lanes_of_block(self) -> list[int]:
        """The lane distances over which the scores of a query's 16 keys lie."""
        return {4: [], 2: [1], 1: [2]}[self.queries] + [4, 8, 16]

    def is_first(self, lane: Any) -> Any:
        """Whether the lane comes first among those that hold the same query's keys."""
        others = sum(self.lanes_of_block) | (self.queries == 1)
        return arith.cmpi(arith.CmpIPredicate.eq, arith.andi(lane, _i32(others)), _i32(0))


def _limit_of_lane(place: _Place, limits: list[Any]) -> Any:
    """How many keys the lane's query sees, of the tile's queries' numbers."""
    lane, _ = _lane_and_warp()
    query = place.query(lane)
    limit = limits[0]
    for i in range(1, len(limits)):
        limit = arith.select(arith.cmpi(arith.CmpIPredicate.eq, query, _i32(i)), limits[i], limit)
    return limit


def _never(x: Any) -> Any:
    """False for whatever is computed here, which the compiler cannot know: it keeps all that x depends on."""
    return arith.cmpf(arith.CmpFPredicate.OEQ, x, _f32(-1e30))


def _finish(
    acc: Any, weights: Any, key_scales: Any, limit: Any, first: Any, scores: Any, maxima: Any, config: ScoresConfig
) -> None:
    """acc [64, queries * heads] of keys `first` on -> scores [queries, 64], maxima [queries, 4]."""
    index = ir.IndexType.get()
    if config.leave_out == "epilogue":
        used, zero = _element(acc.registers.reshape(-1)[0], 0), arith.constant(index, 0)
        with utils.when(_never(used)):
            memref.store(used, scores, [zero, zero])
        return
    place = _Place(config.queries)
    lane, warp = _lane_and_warp()
    sums = _sums_of_lane(acc, weights, config.queries, config.saturate, lane)
    query, half = place.query(lane), place.half(lane)
    row = arith.addi(arith.addi(arith.shli(warp, _i32(4)), arith.shrui(lane, _i32(2))), arith.shli(half, _i32(3)))
    seen = arith.subi(limit, arith.addi(first, row))  # keys from this one on that the query sees
    best = None
    for i, score in enumerate(sums):
        if key_scales is not None:
            low, high = (_element(x, 0) for x in key_scales.registers.reshape(2))
            scale = (low, high)[i] if len(sums) == 2 else arith.select(_lane_bit(half, 1), high, low)
            score = fragmented_array.mulf(score, scale)
        score = arith.maxnumf(score, _f32(_LOW))
        score = arith.select(arith.cmpi(arith.CmpIPredicate.sgt, seen, _i32(8 * i)), score, _f32(_LOW))
        column = arith.addi(row, _i32(8 * i))
        if config.leave_out != "stores":
            memref.store(score, scores, [arith.index_castui(index, query), arith.index_castui(index, column)])
        best = score if best is None else arith.maxnumf(best, score)
    for distance in place.lanes_of_block:
        best = arith.maxnumf(best, utils.shfl_bfly(best, distance))
    with utils.when(_never(best) if config.leave_out == "stores" else place.is_first(lane)):
        memref.store(best, maxima, [arith.index_castui(index, query), arith.index_castui(index, warp)])


# ---- the kernel


def _build(batch: int, queries: int, heads: int, keys: int, dtype: jnp.dtype, take_all: int, config: ScoresConfig) -> Any:
    """f(queries [B, S * Hi, Di], keys [B, T, Di], weights [B, S * Hi], positions [B, S], lengths [B], key scales [B, T])."""
    itemsize = jnp.dtype(dtype).itemsize
    scaled = itemsize == 1
    columns, tile_keys = config.queries * heads, config.keys
    if config.tiles > 1 and columns % 32:  # TMA writes a tile's weights to a multiple of 128 bytes
        raise ValueError(f"ScoresConfig: {config.tiles} tiles of {columns} columns, which is not a multiple of 32")
    query_groups, key_tiles = -(-queries // config.unit_queries), -(-keys // tile_keys)
    runs = -(-key_tiles // config.run)
    units = batch * runs * query_groups
    blocks = min(hopper.NUM_SMS, units)
    transforms = (plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128))
    place = _Place(config.queries)
    per_thread = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT(())
    registers = _REGISTERS[config.math]

    def indexer_scores(*refs: Any) -> None:
        q_gm, k_gm, w_gm, positions_gm, lengths_gm = refs[:5]
        scales_gm: Any = None
        scales_gm, refs = (refs[5], refs[6:]) if scaled else (None, refs[5:])
        scores_gm, maxima_gm, q_sm, k_sm, w_sm, scales_sm, q_full, q_empty, k_full, k_empty = refs
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        # The tile of queries and the keys of a key tile that are the warpgroup's.
        own_tile, own_keys = lax.rem(warpgroup, config.tiles), lax.div(warpgroup, config.tiles) * KEYS

        def slot_of(tiles: Any) -> Any:
            power = config.stages & (config.stages - 1) == 0
            return tiles & (config.stages - 1) if power else lax.rem(tiles, config.stages)

        def limits(b: Any, query: Any, number: int) -> list[Any]:
            """How many keys each of so many queries sees; the last one's if they are beyond it."""
            length = jnp.minimum(lengths_gm[b], keys)
            positions = (positions_gm[b, jnp.minimum(query + i, queries - 1)] for i in range(number))
            return [jnp.minimum(position + 1, length) for position in positions]

        def for_units(start: Any, work: Any) -> None:
            """carry = work(batch row, first query, first key tile, key tiles, carry) for units that see keys."""

            def unit(u: Any, carry: Any) -> Any:
                number = block + u * blocks
                group, rest = lax.rem(number, query_groups), lax.div(number, query_groups)
                run, b = lax.rem(rest, runs), lax.div(rest, runs)
                query = group * config.unit_queries
                furthest = functools.reduce(jnp.maximum, limits(b, query, config.unit_queries))
                first = run * config.run
                seen = lax.div(furthest + (tile_keys - 1), tile_keys)
                count = jnp.minimum(seen - first, config.run)
                # A query that sees no more keys than it may take needs no scores.
                needed = jnp.logical_and(furthest > take_all, count > 0)
                return lax.cond(
                    needed,
                    lambda carry: work(b, query, first, count, carry),
                    lambda carry: carry,
                    carry,
                )

            lax.fori_loop(0, lax.div(units - 1 - block, blocks) + 1, unit, start)

        def limit_of_thread(limits: list[Any]) -> Any:
            @plgpu.inline_mgpu(
                arg_types=(scalar,) * len(limits), return_type=plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=per_thread)
            )
            def run(ctx: Any, *limits: Any) -> Any:
                limit = _limit_of_lane(place, [x.registers.item() for x in limits])
                one = vector.broadcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), limit)
                registers = np.empty((1,), dtype=object)
                registers[0] = one
                return fragmented_array.FragmentedArray(_registers=registers, _layout=per_thread.to_mgpu(), _is_signed=True)

            return run(*limits)

        def weights_for_epilogue(weights: Any) -> Any:
            if not config.saturate:
                return weights

            @plgpu.inline_mgpu(
                arg_types=(_ACC.reduce(0),),
                return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=_ACC.reduce(0)),
            )
            def run(ctx: Any, weights: Any) -> Any:
                return _scaled_for_saturation(weights)

            return run(weights)

        def epilogue(acc: Any, weights: Any, scales: Any, limit: Any, b: Any, query: Any, key: Any) -> None:
            scores = scores_gm.at[b, pl.ds(query, config.queries), pl.ds(key, KEYS)]
            maxima = maxima_gm.at[b, pl.ds(query, config.queries), pl.ds(lax.div(key, BLOCK), KEYS // BLOCK)]
            ref = plgpu.RefType()
            kinds = (_ACC, _ACC.reduce(0), *((_ACC.reduce(1),) if scaled else ()), per_thread, scalar, ref, ref)

            @plgpu.inline_mgpu(arg_types=kinds)
            def run(ctx: Any, acc: Any, weights: Any, *rest: Any) -> None:
                scales = rest[0] if scaled else None
                limit, first, scores, maxima = rest[-4:]
                limit = _element(limit.registers.reshape(-1)[0], 0)
                _finish(acc, weights, scales, limit, first.registers.item(), scores, maxima, config)

            run(acc, weights, *((scales,) if scaled else ()), limit, key, scores, maxima)

        @pl.when(warpgroup < config.math)
        def _multiply() -> None:
            plgpu.set_max_registers(registers.worker, action="increase")
            rows, own_columns = pl.ds(own_keys, KEYS), pl.ds(own_tile * columns, columns)

            def work(b: Any, query: Any, first: Any, count: Any, carry: Any) -> Any:
                done, tiles, kept = carry
                q_slot = lax.rem(done, config.query_slots)
                plgpu.barrier_wait(q_full.at[q_slot])
                weights = plgpu.load(w_sm.at[q_slot, own_columns], layout=_ACC.reduce(0), optimized=False)
                weights = weights_for_epilogue(weights)
                query += own_tile * config.queries
                limit = limit_of_thread(limits(b, query, config.queries))

                def step(t: Any, carry: Any) -> Any:
                    tiles, kept = carry
                    slot = slot_of(tiles)
                    plgpu.barrier_wait(k_full.at[slot])
                    scales = plgpu.load(scales_sm.at[slot, rows], layout=_ACC.reduce(1), optimized=False) if scaled else None

                    # With nothing between the fresh accumulator and wgmma the compiler drops its zeroing.
                    def product(acc: Any) -> Any:
                        plgpu.wgmma(acc, k_sm.at[slot, rows], q_sm.at[q_slot, own_columns].transpose((1, 0)))
                        return acc[...]

                    acc_type = plgpu.ACC((KEYS, columns), jnp.float32)
                    if config.leave_out == "product":
                        acc = kept = lax.cond(tiles == 0, lambda: pl.run_scoped(product, acc_type), lambda: kept)
                    else:
                        acc = pl.run_scoped(product, acc_type)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    epilogue(acc, weights, scales, limit, b, query, (first + t) * tile_keys + own_keys)
                    return tiles + 1, kept

                tiles, kept = lax.fori_loop(0, count, step, (tiles, kept))
                plgpu.barrier_arrive(q_empty.at[q_slot])
                return done + 1, tiles, kept

            kept = None
            if config.leave_out == "product":  # carried, else its sums would leave the loop
                kept = plgpu.layout_cast(jnp.zeros((KEYS, columns), jnp.float32), _ACC)
            for_units((jnp.int32(0), jnp.int32(0), kept), work)

        @pl.when(warpgroup == config.math)
        def _copy() -> None:
            plgpu.set_max_registers(registers.helper, action="decrease")

            def work(b: Any, query: Any, first: Any, count: Any, carry: Any) -> Any:
                done, tiles = carry
                q_slot = lax.rem(done, config.query_slots)

                @pl.when(done >= config.query_slots)
                def _() -> None:
                    plgpu.barrier_wait(q_empty.at[q_slot])

                for tile in range(config.tiles):
                    rows, to = pl.ds(query * heads + tile * columns, columns), pl.ds(tile * columns, columns)
                    plgpu.copy_gmem_to_smem(q_gm.at[b, rows], q_sm.at[q_slot, to], q_full.at[q_slot])
                    plgpu.copy_gmem_to_smem(w_gm.at[b, rows], w_sm.at[q_slot, to], q_full.at[q_slot])

                def step(t: Any, tiles: Any) -> Any:
                    slot = slot_of(tiles)

                    @pl.when(tiles >= config.stages)
                    def _() -> None:
                        plgpu.barrier_wait(k_empty.at[slot])

                    def copy() -> None:
                        rows = pl.ds((first + t) * tile_keys, tile_keys)
                        plgpu.copy_gmem_to_smem(k_gm.at[b, rows], k_sm.at[slot], k_full.at[slot])
                        if scaled:
                            plgpu.copy_gmem_to_smem(scales_gm.at[b, rows], scales_sm.at[slot], k_full.at[slot])

                    def only_arrive() -> None:
                        for _ in range(1 + scaled):
                            plgpu.barrier_arrive(k_full.at[slot])

                    if config.leave_out == "copies":
                        lax.cond(tiles < config.stages, copy, only_arrive)
                    else:
                        copy()
                    return tiles + 1

                return done + 1, lax.fori_loop(0, count, step, tiles)

            for_units((jnp.int32(0), jnp.int32(0)), work)

    rows, width = query_groups * config.unit_queries, key_tiles * tile_keys
    return plgpu.kernel(
        indexer_scores,
        out_type=[
            jax.ShapeDtypeStruct((batch, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, rows, width // BLOCK), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((config.query_slots, config.tiles * columns, WIDTH), dtype, transforms=transforms),
            plgpu.SMEM((config.stages, tile_keys, WIDTH), dtype, transforms=transforms),
            plgpu.SMEM((config.query_slots, config.tiles * columns), jnp.float32),
            plgpu.SMEM((config.stages, tile_keys), jnp.float32) if scaled else None,
            plgpu.Barrier(num_arrivals=2 * config.tiles, num_barriers=config.query_slots),
            plgpu.Barrier(num_arrivals=config.math, num_barriers=config.query_slots),
            plgpu.Barrier(num_arrivals=1 + scaled, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.math, num_barriers=config.stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=config.math + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=512),
    )


def _in_columns(x: jax.Array, queries: int, multiple: int = 1) -> jax.Array:
    """[B, S, Hi, ...] -> [B, S' * Hi, ...], as the columns of tiles of `queries`, S' whole multiples of so many tiles.

    Of every 8 columns each query has 8 / queries, neighbouring heads: with 4 queries, column 8 t + 2 i + e is head 2 t + e of
    query i.
    """
    b, s, heads, *rest = x.shape
    x = jnp.pad(x, [(0, -s % (queries * multiple) if axis == 1 else 0) for axis in range(x.ndim)])
    x = x.reshape(b, -1, queries, heads * queries // 8, 8 // queries, *rest)
    return jnp.swapaxes(x, 2, 3).reshape(b, -1, *rest)


def scores(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    key_scales: jax.Array | None,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    *,
    take_all: int = 0,
    config: ScoresConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The scores of all visible keys and the maxima of every 16.

    Args:
      queries: [B, S, Hi, 128] bfloat16 or float8_e4m3fn, Hi one of HEADS.
      keys: [B, T, 128] of the same dtype, T a multiple of 8 and at least 256.
      head_weights: [B, S, Hi] float32.
      key_scales: [B, T] float32 for 8-bit keys, else None.
      q_positions: [B, S] int32 and kv_lengths [B] int32: a query sees keys t <= position and t < length.
      take_all: queries that see at most so many keys may be left out.
      config: None for the default.

    Returns:
      [B, S', T'] float32 and [B, S', T' / 16] float32, S' >= S rounded up to whole units, T' >= T to whole key tiles.
      In the key tile where a unit's last visible key lies, hidden ones are -inf; beyond, and in rows from S on, nothing is
      written. NaN is -inf.
    """
    (b, s, heads, _), t = queries.shape, keys.shape[1]
    config = config or default_config(b, s, heads, t, queries.dtype)
    if config.saturate:  # saturation makes 0 of a NaN
        is_nan = jnp.any(lax.bitcast_convert_type(queries, jnp.uint8) & 0x7F == 0x7F, axis=-1)
        head_weights = jnp.where(is_nan, jnp.nan, head_weights)
    kernel = _build(b, s, heads, t, queries.dtype, take_all, config)
    arguments = (
        _in_columns(queries, config.queries, config.tiles),
        keys,
        _in_columns(head_weights, config.queries, config.tiles),
        q_positions,
        kv_lengths,
        *((key_scales,) if key_scales is not None else ()),
    )
    return kernel(*arguments)
