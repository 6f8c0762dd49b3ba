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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels import hopper
from pallas_kernels.hopper import ptx
from pallas_kernels.indexer_topk import mosaic_gpu_scores_columns as of_codes
from pallas_kernels.indexer_topk import mosaic_gpu_scores_epilogue as epilogue
from pallas_kernels.indexer_topk.mosaic_gpu_select_problem import BLOCK

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
_BY_ROW, _BY_COLUMN = _ACC.reduce(1), _ACC.reduce(0)
_PER_THREAD, _SCALAR = plgpu.Layout.WG_STRIDED((128,), vec_size=1), plgpu.Layout.WG_SPLAT(())


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
        """Keys of a key tile."""
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


# ---- the kernel


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of a launch. take_all: queries that see at most so many keys need no scores."""

    batch: int
    queries: int
    heads: int
    keys: int
    dtype: jnp.dtype
    take_all: int
    config: ScoresConfig

    def __post_init__(self) -> None:
        if self.config.tiles > 1 and self.columns % 32:  # TMA writes a tile's weights to a multiple of 128 bytes
            raise ValueError(
                f"ScoresConfig: {self.config.tiles} tiles of {self.columns} columns, which is not a multiple of 32"
            )

    @property
    def scaled(self) -> bool:
        """Whether keys and queries have 8 bits, and keys scales."""
        return jnp.dtype(self.dtype).itemsize == 1

    @property
    def columns(self) -> int:
        """Columns of a tile of queries: queries x heads."""
        return self.config.queries * self.heads

    @property
    def query_groups(self) -> int:
        """Units' queries: how many groups of them a batch row has."""
        return -(-self.queries // self.config.unit_queries)

    @property
    def key_tiles(self) -> int:
        return -(-self.keys // self.config.keys)

    @property
    def runs(self) -> int:
        return -(-self.key_tiles // self.config.run)

    @property
    def units(self) -> int:
        return self.batch * self.runs * self.query_groups

    @property
    def blocks(self) -> int:
        """Thread blocks of the grid."""
        return min(hopper.NUM_SMS, self.units)


@dataclasses.dataclass(frozen=True, eq=False)
class Refs:
    """The kernel's references. C: columns of a tile, U: tiles of a unit, K: keys of a key tile."""

    # Input
    queries: Any  # [B, S' * Hi, 128], `in_columns`
    keys: Any  # [B, T, 128]
    weights: Any  # [B, S' * Hi] float32, `in_columns`
    positions: Any  # [B, S] int32
    lengths: Any  # [B] int32
    key_scales: Any  # [B, T] float32, None for bfloat16
    # Output
    scores: Any  # [B, S', T'] float32
    maxima: Any  # [B, S', T' / 16] float32
    # Scratch
    unit_queries: Any  # [query_slots, U * C, 128]
    tile_keys: Any  # [stages, K, 128]
    unit_weights: Any  # [query_slots, U * C] float32
    tile_scales: Any  # [stages, K] float32, None for bfloat16
    # Barriers
    queries_full: Any  # [query_slots]: a unit's queries and weights have come
    queries_empty: Any  # [query_slots]: all math warpgroups have done with them
    keys_full: Any  # [stages]: a tile's keys and scales have come
    keys_empty: Any  # [stages]: all math warpgroups have multiplied by them

    @staticmethod
    def of(p: Problem, refs: tuple[Any, ...]) -> Refs:
        """The references in the kernel's order, in which keys in bfloat16 have no scales."""
        inputs, others = (refs[:6], refs[6:]) if p.scaled else ((*refs[:5], None), refs[5:])
        return Refs(*inputs, *others)


def _scratch(p: Problem) -> list[Any]:
    """Scratch and barriers in the order of `Refs`."""
    config, itemsize = p.config, jnp.dtype(p.dtype).itemsize
    transforms = (plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128))
    return [
        plgpu.SMEM((config.query_slots, config.tiles * p.columns, WIDTH), p.dtype, transforms=transforms),
        plgpu.SMEM((config.stages, config.keys, WIDTH), p.dtype, transforms=transforms),
        plgpu.SMEM((config.query_slots, config.tiles * p.columns), jnp.float32),
        plgpu.SMEM((config.stages, config.keys), jnp.float32) if p.scaled else None,
        plgpu.Barrier(num_arrivals=2 * config.tiles, num_barriers=config.query_slots),
        plgpu.Barrier(num_arrivals=config.math, num_barriers=config.query_slots),
        plgpu.Barrier(num_arrivals=1 + p.scaled, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=config.math, num_barriers=config.stages),
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Unit:
    """Queries from `query` on of batch row `row`, and key tiles `first` .. `first + count - 1`."""

    row: Any
    query: Any
    first: Any
    count: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A block of the grid, as one of its warpgroups has it."""

    p: Problem
    refs: Refs
    block: Any

    @property
    def config(self) -> ScoresConfig:
        return self.p.config

    def slot_of(self, tiles: Any) -> Any:
        """Where the key tile lies before which so many have come."""
        power = self.config.stages & (self.config.stages - 1) == 0
        return tiles & (self.config.stages - 1) if power else lax.rem(tiles, self.config.stages)

    def limits(self, row: Any, query: Any, number: int) -> list[Any]:
        """How many keys each of so many queries sees; the last one's if they are beyond it."""
        length = jnp.minimum(self.refs.lengths[row], self.p.keys)
        positions = (self.refs.positions[row, jnp.minimum(query + i, self.p.queries - 1)] for i in range(number))
        return [jnp.minimum(position + 1, length) for position in positions]

    def for_units(self, start: Any, work: Callable[[_Unit, Any], Any]) -> None:
        """carry = work(unit, carry) for the block's units that see keys."""
        p, config = self.p, self.config

        def one(u: Any, carry: Any) -> Any:
            number = self.block + u * p.blocks
            group, rest = lax.rem(number, p.query_groups), lax.div(number, p.query_groups)
            run, row = lax.rem(rest, p.runs), lax.div(rest, p.runs)
            query = group * config.unit_queries
            furthest = functools.reduce(jnp.maximum, self.limits(row, query, config.unit_queries))
            first = run * config.run
            seen = lax.div(furthest + (config.keys - 1), config.keys)
            count = jnp.minimum(seen - first, config.run)
            # A query that sees no more keys than it may take needs no scores.
            needed = jnp.logical_and(furthest > p.take_all, count > 0)
            unit = _Unit(row, query, first, count)
            return lax.cond(needed, lambda carry: work(unit, carry), lambda carry: carry, carry)

        lax.fori_loop(0, lax.div(p.units - 1 - self.block, p.blocks) + 1, one, start)


@dataclasses.dataclass(frozen=True, eq=False)
class _Copies(_Block):
    """The warpgroup that copies queries, weights, keys and scales to shared memory."""

    def run(self) -> None:
        self.for_units((jnp.int32(0), jnp.int32(0)), self.copy_unit)

    def copy_unit(self, unit: _Unit, carry: Any) -> Any:
        done, tiles = carry
        self.copy_queries(unit, done)
        return done + 1, lax.fori_loop(0, unit.count, lambda t, tiles: self.copy_keys(unit, t, tiles), tiles)

    def copy_queries(self, unit: _Unit, done: Any) -> None:
        refs, columns = self.refs, self.p.columns
        slot = lax.rem(done, self.config.query_slots)

        @pl.when(done >= self.config.query_slots)
        def _() -> None:
            plgpu.barrier_wait(refs.queries_empty.at[slot])

        for tile in range(self.config.tiles):
            rows, to = pl.ds(unit.query * self.p.heads + tile * columns, columns), pl.ds(tile * columns, columns)
            full = refs.queries_full.at[slot]
            plgpu.copy_gmem_to_smem(refs.queries.at[unit.row, rows], refs.unit_queries.at[slot, to], full)
            plgpu.copy_gmem_to_smem(refs.weights.at[unit.row, rows], refs.unit_weights.at[slot, to], full)

    def copy_keys(self, unit: _Unit, t: Any, tiles: Any) -> Any:
        """Copies the unit's t-th key tile, before which `tiles` have come in all; returns that number afterwards."""
        refs, config = self.refs, self.config
        slot = self.slot_of(tiles)

        @pl.when(tiles >= config.stages)
        def _() -> None:
            plgpu.barrier_wait(refs.keys_empty.at[slot])

        def copy() -> None:
            rows = pl.ds((unit.first + t) * config.keys, config.keys)
            plgpu.copy_gmem_to_smem(refs.keys.at[unit.row, rows], refs.tile_keys.at[slot], refs.keys_full.at[slot])
            if self.p.scaled:
                full = refs.keys_full.at[slot]
                plgpu.copy_gmem_to_smem(refs.key_scales.at[unit.row, rows], refs.tile_scales.at[slot], full)

        def only_arrive() -> None:
            for _ in range(1 + self.p.scaled):
                plgpu.barrier_arrive(refs.keys_full.at[slot])

        if config.leave_out == "copies":
            lax.cond(tiles < config.stages, copy, only_arrive)
        else:
            copy()
        return tiles + 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Math(_Block):
    """A warpgroup that multiplies: own_tile of a unit's tiles of queries by the keys from own_keys on of every key tile."""

    own_tile: Any
    own_keys: Any
    own_columns: Any  # of the unit's queries
    own_rows: Any  # of a key tile

    def run(self) -> None:
        kept = None
        if self.config.leave_out == "product":  # carried, else its sums would leave the loop
            kept = plgpu.layout_cast(jnp.zeros((KEYS, self.p.columns), jnp.float32), _ACC)
        self.for_units((jnp.int32(0), jnp.int32(0), kept), self.multiply_unit)

    def multiply_unit(self, unit: _Unit, carry: Any) -> Any:
        refs = self.refs
        done, tiles, kept = carry
        query_slot = lax.rem(done, self.config.query_slots)
        plgpu.barrier_wait(refs.queries_full.at[query_slot])
        weights = plgpu.load(refs.unit_weights.at[query_slot, self.own_columns], layout=_BY_COLUMN, optimized=False)
        weights = self.weights_for_epilogue(weights)
        query = unit.query + self.own_tile * self.config.queries
        limit = self.limit_of_thread(self.limits(unit.row, query, self.config.queries))

        def step(t: Any, carry: Any) -> Any:
            tiles, kept = carry
            slot, scales = self.slot_of(tiles), None
            plgpu.barrier_wait(refs.keys_full.at[slot])
            if self.p.scaled:
                scales = plgpu.load(refs.tile_scales.at[slot, self.own_rows], layout=_BY_ROW, optimized=False)
            acc = kept = self.product(slot, query_slot, tiles, kept)
            plgpu.barrier_arrive(refs.keys_empty.at[slot])
            key = (unit.first + t) * self.config.keys + self.own_keys
            self.finish(acc, weights, scales, limit, unit.row, query, key)
            return tiles + 1, kept if self.config.leave_out == "product" else None

        tiles, kept = lax.fori_loop(0, unit.count, step, (tiles, kept))
        plgpu.barrier_arrive(refs.queries_empty.at[query_slot])
        return done + 1, tiles, kept

    def product(self, slot: Any, query_slot: Any, tiles: Any, kept: Any) -> jax.Array:
        """[KEYS, columns] float32 of the key tile and the queries in these slots."""

        # With nothing between the fresh accumulator and wgmma the compiler drops its zeroing.
        def multiply(acc: Any) -> Any:
            queries = self.refs.unit_queries.at[query_slot, self.own_columns].transpose((1, 0))
            plgpu.wgmma(acc, self.refs.tile_keys.at[slot, self.own_rows], queries)
            return acc[...]

        accumulator = plgpu.ACC((KEYS, self.p.columns), jnp.float32)
        if self.config.leave_out == "product":
            return lax.cond(tiles == 0, lambda: pl.run_scoped(multiply, accumulator), lambda: kept)
        return pl.run_scoped(multiply, accumulator)

    # -- registers

    def limit_of_thread(self, limits: list[Any]) -> Any:
        """How many keys this thread's query sees, [128] int32."""

        @plgpu.inline_mgpu(
            arg_types=(_SCALAR,) * len(limits), return_type=plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=_PER_THREAD)
        )
        def run(ctx: Any, *limits: Any) -> Any:
            limit = epilogue.limit_of_lane(epilogue.Place(self.config.queries), [ptx.scalar(x) for x in limits])
            one = vector.broadcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), limit)
            registers = np.empty((1,), dtype=object)
            registers[0] = one
            return fragmented_array.FragmentedArray(_registers=registers, _layout=_PER_THREAD.to_mgpu(), _is_signed=True)

        return run(*limits)

    def weights_for_epilogue(self, weights: Any) -> Any:
        if not self.config.saturate:
            return weights

        @plgpu.inline_mgpu(
            arg_types=(_BY_COLUMN,),
            return_type=plgpu.ShapeDtypeStruct((self.p.columns,), jnp.float32, layout=_BY_COLUMN),
        )
        def run(ctx: Any, weights: Any) -> Any:
            return epilogue.scaled_for_saturation(weights)

        return run(weights)

    def finish(self, acc: Any, weights: Any, scales: Any, limit: Any, row: Any, query: Any, key: Any) -> None:
        """Writes the scores of an accumulator, whose first key is `key`, and their maxima."""
        config, ref = self.config, plgpu.RefType()
        scores = self.refs.scores.at[row, pl.ds(query, config.queries), pl.ds(key, KEYS)]
        maxima = self.refs.maxima.at[row, pl.ds(query, config.queries), pl.ds(lax.div(key, BLOCK), KEYS // BLOCK)]
        kinds = (_ACC, _BY_COLUMN, *((_BY_ROW,) if self.p.scaled else ()), _PER_THREAD, _SCALAR, ref, ref)

        @plgpu.inline_mgpu(arg_types=kinds)
        def run(ctx: Any, acc: Any, weights: Any, *rest: Any) -> None:
            scales = rest[0] if self.p.scaled else None
            limit, first, scores, maxima = rest[-4:]
            limit = ptx.Word(epilogue.element(limit.registers.reshape(-1)[0], 0))
            epilogue.finish(
                acc,
                weights,
                scales,
                limit,
                ptx.scalar(first),
                scores,
                maxima,
                queries=config.queries,
                saturate=config.saturate,
                leave_out=config.leave_out,
            )

        run(acc, weights, *((scales,) if self.p.scaled else ()), limit, key, scores, maxima)


def _kernel(p: Problem) -> Any:
    """f(*inputs of `Refs`) -> scores, maxima."""
    config, registers = p.config, _REGISTERS[p.config.math]

    def indexer_scores(*refs: Any) -> None:
        given, warpgroup = Refs.of(p, refs), lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        own_tile, own_keys = lax.rem(warpgroup, config.tiles), lax.div(warpgroup, config.tiles) * KEYS

        @pl.when(warpgroup < config.math)
        def _multiply() -> None:
            plgpu.set_max_registers(registers.worker, action="increase")
            own_columns = pl.ds(own_tile * p.columns, p.columns)
            _Math(p, given, block, own_tile, own_keys, own_columns, pl.ds(own_keys, KEYS)).run()

        @pl.when(warpgroup == config.math)
        def _copy() -> None:
            plgpu.set_max_registers(registers.helper, action="decrease")
            _Copies(p, given, block).run()

    rows, width = p.query_groups * config.unit_queries, p.key_tiles * config.keys
    return plgpu.kernel(
        indexer_scores,
        out_type=[
            jax.ShapeDtypeStruct((p.batch, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((p.batch, rows, width // BLOCK), jnp.float32),
        ],
        scratch_types=_scratch(p),
        grid=(p.blocks,),
        grid_names=("block",),
        num_threads=config.math + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=512),
    )


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
    kernel = _kernel(Problem(b, s, heads, t, queries.dtype, take_all, config))
    if config.saturate:  # makes 0 of a NaN, so that the weights have to say where one is
        queries, head_weights = of_codes.in_columns(queries, head_weights, config.queries, config.tiles)
    else:
        queries, head_weights = (epilogue.in_columns(x, config.queries, config.tiles) for x in (queries, head_weights))
    scales = () if key_scales is None else (key_scales,)
    return kernel(queries, keys, head_weights, q_positions, kv_lengths, *scales)
