"""indexer_topk on TPU: scores and exact selection in one kernel, no score ever in HBM.

One program takes a block of queries. It streams the keys that any of them sees, 1024 at a time and double-buffered;
scores of all heads come from one matrix product and are added up head by head, as in the reference. The sums, as int32 in
the order of the floats, stay in VMEM: 4 bytes a query and key, 26 MB for 32 queries of 200K keys, from which `rows_for`
takes the number of queries.

The k-th best is then found by counting: bounds of the threshold are kept per query, and a pass over VMEM counts what is
at least a guess between them. Guesses alternate between interpolating the logarithm of the count, which nearly straightens
the tail of a smooth distribution, and halving the integers between the bounds, which ends after 32 halvings whatever the
scores are: on average 12 passes for 2048 of 128K Gaussian scores, 22 by halving alone. A query is done once its count is
k, or its bounds are neighbours: then what equals the threshold is cut by position, which is found by halving too.

What is selected becomes bits, and the bits an ascending list (tpu/sets.py): nothing is sorted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.tpu import LANES, SUBLANES, sets

KEYS = sets.SPAN  # of a block: one row of bits
MAX_QUERIES = 32  # of a block: 32 x 32 heads fill the matrix unit, and keys are read once for 32 queries
HEADS = 8  # whose products exist at a time
SCORE_BYTES = 2**28  # of all scores, which are in HBM where those of the selection are asked for
DTYPES = (jnp.bfloat16, jnp.float32, jnp.int8)
LOWEST = jnp.iinfo(jnp.int32).min  # of what may not be seen, below the image of -inf
EXPONENT_AND_MANTISSA = 0x7FFFFFFF


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def vmem_bytes(rows: int, heads: int, keys: int, k_select: int) -> int:
    """About what a program with `rows` queries holds: scores, bits, and what the compiler keeps of products and lists."""
    spans = _rounded(-(-keys // KEYS), LANES)
    scores, bits = 4 * rows * _rounded(keys, KEYS), 4 * rows * spans * LANES
    products = 4 * rows * KEYS * (HEADS + 8)
    queries = 2 * 4 * rows * heads * LANES
    lists = 4 * _rounded(k_select, LANES) * (3 * spans + 6 * LANES + 2 * rows)
    return scores + bits + products + queries + lists + 4 * KEYS * LANES * 4


def rows_for(queries: int, heads: int, keys: int, k_select: int, vmem: int) -> int:
    """Queries of a program: as many as fit three quarters of VMEM, 0 where not even 8 do."""
    rows = min(MAX_QUERIES, _rounded(queries, SUBLANES))
    while rows and vmem_bytes(rows, heads, keys, k_select) > vmem * 3 // 4:
        rows -= SUBLANES
    return rows


def why_not(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    *,
    k_select: int,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    key_scales: jax.Array | None = None,
    return_scores: bool = False,
) -> str | None:
    if reason := tpu.why_not():
        return reason
    if queries.dtype != keys.dtype or keys.dtype not in DTYPES:
        return f"it takes queries and keys in bfloat16, float32 or int8, not {queries.dtype} and {keys.dtype}"
    if 0 in queries.shape or 0 in keys.shape:
        return "there is nothing to select from"
    if k_select > sets.MAX_PLACES:
        return f"it selects up to {sets.MAX_PLACES} keys, not {k_select}"
    score_bytes = 4 * _rounded(queries.shape[1], SUBLANES) * queries.shape[0] * _rounded(keys.shape[1], KEYS)
    if return_scores and score_bytes > SCORE_BYTES:
        return f"it would write all scores, {score_bytes} bytes, which is above {SCORE_BYTES}"
    if not rows_for(queries.shape[1], queries.shape[2], keys.shape[1], k_select, tpu.chip().vmem):
        return f"the scores of 8 queries of {keys.shape[1]} keys do not fit the VMEM of a {tpu.chip().name}"
    return None


def _ordered(scores: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order (-0 below 0, so callers replace it), and, with int32 bits given, back."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return bits ^ ((bits >> 31) & EXPONENT_AND_MANTISSA)


def _value(ordered: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(ordered ^ ((ordered >> 31) & EXPONENT_AND_MANTISSA), jnp.float32)


def _halfway(low: jax.Array, high: jax.Array) -> jax.Array:
    return (low & high) + ((low ^ high) >> 1)  # low + high may overflow


def _score(query_ref: Any, keys: jax.Array, weights: jax.Array, scales: jax.Array | None, rows: int) -> jax.Array:
    """query_ref [H * rows, D], head by head, keys [KEYS, D], weights [rows, >= H] -> [rows, KEYS] float32."""
    heads = query_ref.shape[0] // rows
    exact = keys.dtype == jnp.int8
    total = jnp.zeros((rows, KEYS), jnp.float32)
    for first in range(0, heads, HEADS):
        last = min(first + HEADS, heads)
        dots = jax.lax.dot_general(
            query_ref[first * rows : last * rows],
            keys,
            (((1,), (1,)), ((), ())),
            precision=tpu.precision(keys.dtype),
            preferred_element_type=jnp.int32 if exact else jnp.float32,
        )
        for head in range(first, last):
            dot = dots[(head - first) * rows : (head - first + 1) * rows]
            total += weights[:, head : head + 1] * jnp.maximum(dot.astype(jnp.float32), 0.0)
    return total if scales is None else total * scales


def _lane_sum(mask: jax.Array) -> jax.Array:
    """How many of each LANES-th column of mask [rows, KEYS] hold: [rows, LANES] int32, whole registers added."""
    total = jnp.zeros((mask.shape[0], LANES), jnp.int32)
    for first in range(0, mask.shape[1], LANES):
        total += jnp.where(mask[:, first : first + LANES], 1, 0)
    return total


@dataclasses.dataclass(frozen=True, eq=False)
class Refs:
    """The kernel's references. H: heads, R: queries of a program, J: key blocks, D: width of keys, padded."""

    # Input
    blocks: Any  # [B, blocks] int32, in SMEM: key blocks that any query of a block sees
    queries: Any  # [1, 1, H * R, D], head by head
    weights: Any  # [1, 1, R, >= H] float32
    seen: Any  # [1, 1, R, LANES] int32: keys that each query sees
    keys: Any  # [B, J * KEYS, D], in HBM
    scales: Any  # [B, J, 1, KEYS] float32, in HBM; None for keys without
    # Output
    positions: Any  # [1, 1, R, >= k] int32
    all_ordered: Any  # [B, blocks, J, R, KEYS] int32, in HBM; None where the scores are not asked for
    # Scratch
    ordered: Any  # [J, R, KEYS] int32: scores in their order
    bits: Any  # [>= J, R, LANES] int32: the selection
    block_keys: Any  # [2, KEYS, D]
    block_scales: Any  # [2, 1, KEYS] float32, None for keys without
    semaphores: Any  # [3, 2]: of copied keys, scales, and the scores that are kept

    @staticmethod
    def of(refs: tuple[Any, ...], *, scaled: bool, kept: bool) -> Refs:
        """The references in the kernel's order, in which there are none of what is not."""
        blocks, queries, weights, seen, keys, *others = refs
        scales, block_scales = (others.pop(0), others.pop(-2)) if scaled else (None, None)
        all_ordered = others.pop(1) if kept else None
        positions, ordered, bits, block_keys, semaphores = others
        inputs, outputs = (blocks, queries, weights, seen, keys, scales), (positions, all_ordered)
        return Refs(*inputs, *outputs, ordered, bits, block_keys, block_scales, semaphores)


def _kernel(*refs: Any, rows: int, queries: int, k: int, scaled: bool, kept: bool) -> None:
    """One block of `rows` queries of one batch row.

    kept: all of `ordered` goes to HBM, of which the blocks that were not scored mean nothing.
    """
    given = Refs.of(refs, scaled=scaled, kept=kept)
    b, i = pl.program_id(0), pl.program_id(1)
    block = _Block(given, rows, b, given.blocks[b, i], given.seen[0, 0][:, :1])
    least, most = block.score()
    if kept:
        keep = pltpu.make_async_copy(given.ordered, given.all_ordered.at[b, i], given.semaphores.at[2, 0])
        keep.start()
    wanted, none = jnp.minimum(block.seen, k), jnp.zeros((rows, 1), jnp.int32)
    low, at_low, at_high = block.threshold(wanted, least, most, none)
    block.select(low, block.cut(wanted, low, at_low, at_high, none))
    block.list_positions(jnp.minimum(rows, queries - i * rows))
    if kept:
        keep.wait()


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A block of `rows` queries of batch row `b`, of which any sees `blocks` key blocks and each `seen` [rows, 1] keys."""

    refs: Refs
    rows: int
    b: jax.Array
    blocks: jax.Array
    seen: jax.Array

    # -- scores

    def copies(self, j: jax.Array | int, slot: jax.Array | int) -> Iterator[Any]:
        """The copies of a block's keys and scales."""
        refs, b = self.refs, self.b
        keys = refs.keys.at[b, pl.ds(j * KEYS, KEYS)]
        yield pltpu.make_async_copy(keys, refs.block_keys.at[slot], refs.semaphores.at[0, slot])
        if refs.scales is not None:
            yield pltpu.make_async_copy(refs.scales.at[b, j], refs.block_scales.at[slot], refs.semaphores.at[1, slot])

    def fetch(self, j: jax.Array | int, slot: jax.Array | int) -> None:
        for copy in self.copies(j, slot):
            copy.start()

    def score(self) -> tuple[jax.Array, jax.Array]:
        """Keeps all scores in their order, and returns each query's least and largest one, [rows, 1] int32 both."""

        @pl.when(self.blocks > 0)
        def _() -> None:
            self.fetch(0, 0)

        least = jnp.full((self.rows, 1), -(LOWEST + 1), jnp.int32)
        return jax.lax.fori_loop(0, self.blocks, self.score_block, (least, jnp.full((self.rows, 1), LOWEST, jnp.int32)))

    def score_block(self, j: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        refs, slot = self.refs, j % 2

        @pl.when(j + 1 < self.blocks)
        def _() -> None:
            self.fetch(j + 1, (j + 1) % 2)

        for copy in self.copies(j, slot):
            copy.wait()
        keys, weights = refs.block_keys[slot], refs.weights[0, 0]
        scales = None if refs.scales is None else refs.block_scales[slot]
        scores = _score(refs.queries.at[0, 0], keys, weights, scales, self.rows)
        scores = jnp.where(scores == 0, 0.0, jnp.where(jnp.isnan(scores), -jnp.inf, scores))
        visible = j * KEYS + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < self.seen
        ordered = jnp.where(visible, _ordered(scores), LOWEST)
        refs.ordered[j] = ordered
        least, most = bounds
        least = jnp.minimum(least, jnp.min(jnp.where(visible, ordered, -(LOWEST + 1)), axis=1, keepdims=True))
        return least, jnp.maximum(most, jnp.max(ordered, axis=1, keepdims=True))

    # -- the k-th best, and where those that equal it are cut

    def count(self, condition: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        """How many keys of each query hold it: condition(ordered [rows, KEYS], first position) -> [rows, 1] int32."""

        def add(j: jax.Array, total: jax.Array) -> jax.Array:
            return total + _lane_sum(condition(self.refs.ordered[j], j * KEYS))

        total = jax.lax.fori_loop(0, self.blocks, add, jnp.zeros((self.rows, LANES), jnp.int32))
        return jnp.sum(total.astype(jnp.float32), axis=1, keepdims=True).astype(jnp.int32)  # below 2^24

    def threshold(
        self, wanted: jax.Array, least: jax.Array, most: jax.Array, none: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The k-th best, how many keys are not below it and, where these are more than `wanted`, how many are above it.

        All [rows, 1] int32; none: zeros.
        """

        # At least `wanted` keys are >= low, fewer are >= high.
        def undecided(low: jax.Array, high: jax.Array, at_low: jax.Array) -> jax.Array:
            return (at_low != wanted) & (high != low + 1)

        def narrow(state: tuple[Any, ...]) -> tuple[Any, ...]:
            step, low, high, at_low, at_high, _ = state
            guess = _guess(step, low, high, at_low, at_high, wanted)
            counted = self.count(lambda ordered, first: ordered >= guess)
            enough = counted >= wanted
            going = undecided(low, high, at_low)
            low, at_low = jnp.where(going & enough, guess, low), jnp.where(going & enough, counted, at_low)
            high, at_high = jnp.where(going & ~enough, guess, high), jnp.where(going & ~enough, counted, at_high)
            return step + 1, low, high, at_low, at_high, jnp.max(jnp.where(undecided(low, high, at_low), 1.0, 0.0))

        start = jnp.max(jnp.where(undecided(least, most + 1, self.seen), 1.0, 0.0))
        _, low, _, at_low, at_high, _ = jax.lax.while_loop(
            lambda state: state[-1] > 0, narrow, (0, least, most + 1, self.seen, none, start)
        )
        return low, at_low, at_high

    def cut(self, wanted: jax.Array, low: jax.Array, at_low: jax.Array, at_high: jax.Array, none: jax.Array) -> jax.Array:
        """The position before which the keys equal to `low` are taken: the first ones."""
        ties = wanted - at_high
        all_taken = at_low == wanted

        def undecided(few: jax.Array, many: jax.Array) -> jax.Array:
            return ~all_taken & (many != few + 1)

        def narrow(state: tuple[Any, ...]) -> tuple[Any, ...]:
            few, many, _ = state
            middle = _halfway(few, many)

            def tied(ordered: jax.Array, first: jax.Array) -> jax.Array:
                return (ordered == low) & (first + jax.lax.broadcasted_iota(jnp.int32, ordered.shape, 1) < middle)

            enough = self.count(tied) >= ties
            few, many = jnp.where(enough, few, middle), jnp.where(enough, middle, many)
            return few, many, jnp.max(jnp.where(undecided(few, many), 1.0, 0.0))

        start = jnp.max(jnp.where(undecided(none, self.seen), 1.0, 0.0))
        _, cut, _ = jax.lax.while_loop(lambda state: state[-1] > 0, narrow, (none, self.seen, start))
        return cut

    # -- the selection

    def select(self, low: jax.Array, cut: jax.Array) -> None:
        """Writes the bits of the keys above `low`, and of those equal to it before `cut`."""
        refs = self.refs
        refs.bits[...] = jnp.zeros_like(refs.bits)

        def to_bits(j: jax.Array, _: int) -> int:
            ordered = refs.ordered[j]
            position = j * KEYS + jax.lax.broadcasted_iota(jnp.int32, ordered.shape, 1)
            taken = (ordered > low) | ((ordered == low) & (position < cut))
            refs.bits[j] = sets.pack(taken)
            return 0

        jax.lax.fori_loop(0, self.blocks, to_bits, 0)

    def list_positions(self, count: jax.Array) -> None:
        """Writes the selections of the first `count` queries as ascending lists, then -1."""
        refs = self.refs

        def to_list(row: jax.Array, _: int) -> int:
            listed, number = sets.positions(refs.bits[:, row], refs.positions.shape[-1])
            place = jax.lax.broadcasted_iota(jnp.int32, listed.shape, 1)
            refs.positions[0, 0, pl.ds(row, 1)] = jnp.where(place < number, listed, -1)
            return 0

        jax.lax.fori_loop(0, count, to_list, 0)


def _guess(
    step: jax.Array, low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array, wanted: jax.Array
) -> jax.Array:
    """Between the bounds: in even steps where the logarithm of the count, interpolated, is that of `wanted`, else halfway."""
    middle = _halfway(low, high)
    upper, lower = jnp.log(at_low.astype(jnp.float32)), jnp.log(jnp.maximum(at_high.astype(jnp.float32), 0.5))
    fraction = (upper - jnp.log(wanted.astype(jnp.float32))) / (upper - lower)
    guess = _value(low) + (_value(high - 1) - _value(low)) * fraction
    usable = jnp.abs(guess) < jnp.inf  # also False for NaN
    guess = _ordered(jnp.where(usable, guess, 0.0))
    guess = jnp.minimum(jnp.maximum(guess, low + 1), high - 1)
    return jnp.where(usable & (step % 2 == 0), guess, middle)


def _scores_of(positions: jax.Array, ordered: jax.Array) -> jax.Array:
    """The scores of positions [B, S, k] from ordered [B, blocks, key blocks, rows, KEYS], -inf where a position is -1."""
    b, s, _ = positions.shape
    rows, query, at = ordered.shape[3], jnp.arange(s)[:, None], jnp.maximum(positions, 0)
    chosen = ordered[jnp.arange(b)[:, None, None], query // rows, at // KEYS, query % rows, at % KEYS]
    return jnp.where(positions < 0, -jnp.inf, _value(chosen))


def indexer_topk(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    *,
    k_select: int,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    key_scales: jax.Array | None = None,
    return_scores: bool = False,
    rows: int | None = None,
) -> Any:
    """As the operation of that name; `rows` (a multiple of 8) overrules how many queries a program takes."""
    b, s, heads, width = queries.shape
    t, chip = keys.shape[1], tpu.chip()
    rows = rows or rows_for(s, heads, t, k_select, chip.vmem)
    blocks, key_blocks = -(-s // rows), -(-t // KEYS)
    wide, padded_t, places = _rounded(width, LANES), key_blocks * KEYS, _rounded(k_select, LANES)

    def padded(x: jax.Array, *ends: int) -> jax.Array:
        return jnp.pad(x, [(0, end - size) for size, end in zip(x.shape, ends, strict=True)]) if x.shape != ends else x

    seen = jnp.clip(jnp.minimum(q_positions + 1, kv_lengths[:, None]), 0, t)
    seen = padded(seen, b, blocks * rows).reshape(b, blocks, rows)
    # [B, blocks, H * rows, D]: the queries of one head lie together.
    by_head = padded(queries, b, blocks * rows, heads, wide).reshape(b, blocks, rows, heads, wide)
    by_head = by_head.swapaxes(2, 3).reshape(b, blocks, heads * rows, wide)
    weights = padded(head_weights, b, blocks * rows, _rounded(heads, LANES)).reshape(b, blocks, rows, -1)
    arrays = [
        -(-jnp.max(seen, axis=2) // KEYS),
        by_head,
        weights,
        jnp.broadcast_to(seen[..., None], (*seen.shape, LANES)),
        padded(keys, b, padded_t, wide),
    ]

    def per_block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *shape), lambda b, i, *_: (b, i, 0, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [per_block(heads * rows, wide), per_block(rows, weights.shape[-1]), per_block(rows, LANES), anywhere]
    scratch = [
        pltpu.VMEM((key_blocks, rows, KEYS), jnp.int32),
        pltpu.VMEM((_rounded(key_blocks, LANES), rows, LANES), jnp.int32),
        pltpu.VMEM((2, KEYS, wide), keys.dtype),
    ]
    if key_scales is not None:
        arrays.append(padded(key_scales, b, padded_t).reshape(b, key_blocks, 1, KEYS))
        in_specs.append(anywhere)
        scratch.append(pltpu.VMEM((2, 1, KEYS), jnp.float32))
    out_specs, out_shape = [per_block(rows, places)], [jax.ShapeDtypeStruct((b, blocks, rows, places), jnp.int32)]
    if return_scores:
        out_specs.append(anywhere)
        out_shape.append(jax.ShapeDtypeStruct((b, blocks, key_blocks, rows, KEYS), jnp.int32))
    out, *ordered = pl.pallas_call(
        functools.partial(_kernel, rows=rows, queries=s, k=k_select, scaled=key_scales is not None, kept=return_scores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[*scratch, pltpu.SemaphoreType.DMA((3, 2))],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=chip.vmem * 7 // 8),
        cost_estimate=pl.CostEstimate(  # as if all keys were visible
            flops=2 * b * blocks * rows * heads * padded_t * wide,
            transcendentals=0,
            bytes_accessed=b * blocks * padded_t * wide * keys.dtype.itemsize + 4 * b * blocks * rows * places,
        ),
        name="indexer_topk",
    )(*arrays)
    positions = out.reshape(b, blocks * rows, places)[:, :s, :k_select]
    return (positions, _scores_of(positions, ordered[0])) if return_scores else positions
