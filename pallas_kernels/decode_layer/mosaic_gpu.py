"""The dense parts of a decoder layer for one token on Hopper: two kernels around the attention.

With one token a layer reads its weights once and computes next to nothing, so its time is the number of launches, each of
which drains the device, and how fast weights stream. Here one block of threads stays on every multiprocessor for a whole
kernel, and its stages are separated by meetings of the grid (`ptx.grid_arrive`, `ptx.grid_wait`): a stage's first weights
are loaded before the meeting, which does not decide them, so that they stream while the blocks wait for each other and
build the stage's input, and every block builds all of it for itself.

`attention_inputs`: norm and the projections down | latent norms, rope, cache, the projections up | absorption, index
queries. `layer_outputs`: value projection | output projection and residual | norm, router and shared experts' first
matrix | choice and first matrices of the experts | second matrices and residual; or the three of a dense layer.

What passes between the stages are the vectors themselves, float32, through L2. No sum is split between blocks, so the
results do not depend on the order in which blocks run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx
from pallas_kernels.decode_layer import mosaic_gpu_parts as parts
from pallas_kernels.decode_layer.arrays import Before, Ready
from pallas_kernels.decode_layer.mosaic_gpu_parts import Place, Product, Rows, Shared, Value

WIDTH, VALUE_DIM, ROTARY = 576, 512, 64  # of a latent
INDEX_WIDTH = 128
ROTATES, INDEXES = 1, 2  # the blocks, counted from the last, that do the small things of a stage, and no rows of it
EXPERT_LANES, OUTPUT_LANES = 4, 2  # lanes across the columns of a unit: 32 of the experts' first, 16 of their second matrix

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Sizes of `attention_inputs`."""

    hidden: int
    q_rank: int
    heads: int
    nope: int
    value: int
    max_len: int
    eps: float
    latent_eps: float
    index_heads: int = 0
    index_scale: float = 0.0
    index_interleaved: bool = True
    index_scaled: bool = False  # keys in 8 bits with scales

    @property
    def latent_end(self) -> int:
        return self.q_rank + WIDTH

    @property
    def down(self) -> int:
        return self.latent_end + (INDEX_WIDTH + self.index_heads if self.index_heads else 0)

    @property
    def head_dim(self) -> int:
        return self.nope + ROTARY

    @property
    def up(self) -> int:
        return self.heads * self.head_dim + self.index_heads * INDEX_WIDTH


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Sizes of `layer_outputs`. experts 0: a dense layer, whose width is `shared`."""

    hidden: int
    heads: int
    value: int
    eps: float
    shared: int
    experts: int = 0
    chosen: int = 0
    width: int = 0  # of an expert
    normalised: bool = True
    scale: float = 1.0

    @property
    def first(self) -> int:
        return self.experts + 2 * self.shared


# ---- what the stages are made of


class Stage:
    """`begin` may load what no other block writes in this kernel, `run` is the work after the grid has met.

    `ahead` brings to L2 what later stages or kernels read, at this stage's beginning.
    """

    ahead: Sequence[Callable[[], None]] = ()

    def begin(self) -> None: ...

    def run(self) -> None: ...


def _in_sequence(stages: Sequence[Stage], counter: Value) -> None:
    for i, stage in enumerate(stages):
        target = ptx.grid_arrive(counter, parts.BLOCKS) if i else None
        stage.begin()
        for bring in stage.ahead:
            bring()
        if target is not None:
            ptx.grid_wait(counter, target)
        stage.run()


def _store_number(base: Value) -> Callable[[Value, Value, Value], None]:
    return lambda row, total, stores: ptx.store_global(ptx.offset(base, row, 4), ptx.bits_of(total), stores)


def _store_rounded(base: Value) -> Callable[[Value, Value, Value], None]:
    return lambda row, total, stores: ptx.store_global(ptx.offset(base, row, 4), ptx.bits_of(ptx.rounded(total)), stores)


def _bfloat16_pair(base: Value, load: Callable[[Value], Value]) -> Callable[[Value], tuple[Value, Value]]:
    return lambda i: ptx.from_bfloat16_pair(load(ptx.offset(base, i, 4)))


def _half_of(word: Value, i: Value) -> Value:
    low, high = ptx.from_bfloat16_pair(word)
    return ptx.select(ptx.compare("eq", ptx.bit_and(i, 1), 0), low, high)


def _bfloat16_at(base: Value, i: Value, load: Callable[[Value], Value]) -> Value:
    return _half_of(load(ptx.offset(base, ptx.shift_right(i, 1), 4)), i)


def _number_at(base: Value, i: Value) -> Value:
    return ptx.float_of(ptx.load_fresh(ptx.offset(base, i, 4)))


def _pack(place: Place, pairs: int, pair: Callable[[Value], tuple[Value, Value]], target: Value) -> None:
    sink = parts.to_shared(target)
    for i, exists in parts.in_turn(place, pairs):
        sink(i, ptx.to_bfloat16_pair(*pair(i)), exists)


# ---- attention_inputs


class Down(Stage):
    """norm(x) times the projections down -> down [Nd] float32."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], place: Place, shared: Shared):
        self.p, self.a, self.place = p, a, place
        self.vector, self.sums = shared.take(2 * p.hidden), shared.take(64)
        if a:
            first, end = parts.share(place, p.down)
            self.product = Product(place, Rows([(a["down"], p.down)]), p.hidden, first, end, parts.largest_share(p.down))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        pair = _bfloat16_pair(self.a["x"], ptx.load_fresh)
        sink = parts.to_shared(self.vector)
        eps = self.p.eps
        parts.normalise(self.place, self.p.hidden // 2, pair, self.a["norm"], eps, self.sums, sink, in_bfloat16=True)
        ptx.block_barrier()
        self.product.finish(lambda row: self.vector, _store_number(self.a["down_out"]))


class Up(Stage):
    """The query latent times the projections up -> up [Nu] float32; one block writes the token to the caches."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], place: Place, shared: Shared):
        self.p, self.a, self.place = p, a, place
        self.vector, self.sums, self.own_sums = shared.take(2 * p.q_rank), shared.take(64), shared.take(64)
        if a:
            first, end = parts.share(place, p.up, ROTATES)
            matrices = [(a["up"], p.heads * p.head_dim)]
            if p.index_heads:
                matrices.append((a["index_up"], p.index_heads * INDEX_WIDTH))
            self.product = Product(place, Rows(matrices), p.q_rank, first, end, parts.largest_share(p.up, ROTATES))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, place = self.p, self.a, self.place
        pair, sink = parts.fresh_pair(a["down_out"]), parts.to_shared(self.vector)
        parts.normalise(place, p.q_rank // 2, pair, a["q_norm"], p.latent_eps, self.sums, sink, in_bfloat16=False)
        ptx.block_barrier()
        self.product.finish(lambda row: self.vector, _store_rounded(a["up_out"]))
        with ptx.when(place.is_block_before_end(ROTATES)):
            self.remember()

    def remember(self) -> None:
        p, a, place = self.p, self.a, self.place
        position = ptx.minimum(ptx.load_global(a["position"]), p.max_len - 1)
        row = ptx.offset(a["latents"], position, 2 * WIDTH)
        latent = ptx.offset(a["down_out"], ptx.constant(p.q_rank), 4)

        def sink(i: Value, word: Value, exists: Value) -> None:
            ptx.store_global(ptx.offset(row, i, 4), word, exists)

        pair = parts.fresh_pair(latent)
        parts.normalise(place, VALUE_DIM // 2, pair, a["kv_norm"], p.latent_eps, self.own_sums, sink, in_bfloat16=False)
        with ptx.when(ptx.compare("eq", place.warp, 0)):
            turned = _turned_pair(a, place.lane, *pair(ptx.add(place.lane, VALUE_DIM // 2)))
            word = ptx.to_bfloat16_pair(*turned)
            at = ptx.offset(row, ptx.add(place.lane, VALUE_DIM // 2), 4)
            ptx.store_global(at, word, ptx.compare("sge", place.lane, 0))
        if p.index_heads:
            with ptx.when(ptx.compare("eq", place.warp, parts.WARPS - 1)):
                self.remember_key(position)

    def remember_key(self, position: Value) -> None:
        p, a, lane = self.p, self.a, self.place.lane
        at = ptx.offset(ptx.offset(a["down_out"], ptx.constant(p.latent_end), 4), lane, 16)
        key = [ptx.float_of(word) for word in ptx.load_fresh_words(at)]
        mean = ptx.times(parts.sum_of_warp(ptx.plus(*key)), ptx.number(1 / INDEX_WIDTH))
        key = [ptx.minus(x, mean) for x in key]
        squares = ptx.plus(*(ptx.times(x, x) for x in key))
        variance = ptx.times(parts.sum_of_warp(squares), ptx.number(1 / INDEX_WIDTH))
        factor = ptx.rsqrt(ptx.plus(variance, ptx.number(1e-6)))
        weights, biases = _four(a["key_norm"], lane), _four(a["key_norm_bias"], lane)
        key = [ptx.plus(ptx.times(ptx.times(x, factor), w), b) for x, w, b in zip(key, weights, biases, strict=True)]
        key = _turned_front(p, a, lane, key)
        _store_index_vector(p, key, lane, a["index_keys"], position, a.get("index_scales"))


class Absorb(Stage):
    """Queries [H, 576]: each head's part without rope times its key matrix, and the rotated part; index queries."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], place: Place, shared: Shared):
        self.p, self.a, self.place = p, a, place
        self.vectors = shared.take(2 * 2 * p.nope)
        if a:
            rows = p.heads * VALUE_DIM
            self.first, end = parts.share(place, rows, INDEXES)
            self.product = Product(
                place, Rows([(a["k_up"], rows)]), p.nope, self.first, end, parts.largest_share(rows, INDEXES)
            )

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, place = self.p, self.a, self.place
        # A share is below VALUE_DIM rows, so it is of one head or two.
        head = ptx.minimum(ptx.div(self.first, VALUE_DIM), p.heads - 1)
        pairs = p.nope // 2

        def pair(i: Value) -> tuple[Value, Value]:
            which = ptx.minimum(ptx.add(head, ptx.div(i, pairs)), p.heads - 1)
            return parts.fresh_pair(a["up_out"])(ptx.add(ptx.mul(which, p.head_dim // 2), ptx.rem(i, pairs)))

        _pack(place, 2 * pairs, pair, self.vectors)
        ptx.block_barrier()

        def vector(row: Value) -> Value:
            local = ptx.minimum(ptx.sub(ptx.div(row, VALUE_DIM), head), 1)
            return ptx.add(self.vectors, ptx.mul(local, 2 * p.nope))

        def emit(row: Value, total: Value, stores: Value) -> None:
            at = ptx.add(row, ptx.mul(ptx.div(row, VALUE_DIM), ROTARY))
            ptx.store_global_bfloat16(ptx.offset(a["queries"], at, 2), total, stores)

        self.product.finish(vector, emit)
        with ptx.when(place.is_block_before_end(ROTATES)):
            self.rotate()
        if p.index_heads:
            with ptx.when(place.is_block_before_end(INDEXES)):
                self.index_queries()

    def rotate(self) -> None:
        p, a = self.p, self.a
        for i, exists in parts.in_turn(self.place, p.heads * ROTARY // 2):
            head, j = ptx.shift_right(i, 5), ptx.bit_and(i, 31)
            source = ptx.add(ptx.mul(head, p.head_dim // 2), p.nope // 2, j)
            turned = _turned_pair(a, j, *parts.fresh_pair(a["up_out"])(source))
            target = ptx.add(ptx.mul(head, WIDTH // 2), VALUE_DIM // 2, j)
            ptx.store_global(ptx.offset(a["queries"], target, 4), ptx.to_bfloat16_pair(*turned), exists)

    def index_queries(self) -> None:
        p, a, place = self.p, self.a, self.place
        queries = ptx.offset(a["up_out"], ptx.constant(p.heads * p.head_dim), 4)
        weights = ptx.offset(a["down_out"], ptx.constant(p.latent_end + INDEX_WIDTH), 4)
        for turn in range(-(-p.index_heads // parts.WARPS)):
            head = ptx.add(place.warp, turn * parts.WARPS)
            with ptx.when(ptx.compare("slt", head, p.index_heads)):
                at = ptx.offset(ptx.offset(queries, head, 4 * INDEX_WIDTH), place.lane, 16)
                query = [ptx.float_of(word) for word in ptx.load_fresh_words(at)]
                query = _turned_front(p, a, place.lane, query)
                scale = _store_index_vector(p, query, place.lane, a["index_queries"], head, None)
                weight = ptx.times(_number_at(weights, head), ptx.number(p.index_scale))
                if scale is not None:
                    weight = ptx.times(weight, scale)
                leads = ptx.compare("eq", place.lane, 0)
                ptx.store_global(ptx.offset(a["index_weights"], head, 4), ptx.bits_of(weight), leads)


def _four(base: Value, lane: Value) -> list[Value]:
    """The lane's four of bfloat16 numbers, of which a lane has four."""
    words = [ptx.load_global(ptx.offset(base, ptx.add(ptx.shift_left(lane, 1), i), 4)) for i in range(2)]
    return [x for word in words for x in ptx.from_bfloat16_pair(word)]


def _angle(a: Mapping[str, Value], j: Value) -> tuple[Value, Value]:
    cos, sin = (ptx.load_global(ptx.offset(a[name], j, 4)) for name in ("cos", "sin"))
    return ptx.float_of(cos), ptx.float_of(sin)


def _turned(first: Value, second: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    turned = ptx.minus(ptx.times(first, cos), ptx.times(second, sin))
    return turned, ptx.plus(ptx.times(second, cos), ptx.times(first, sin))


def _turned_pair(a: Mapping[str, Value], j: Value, first: Value, second: Value) -> tuple[Value, Value]:
    return _turned(first, second, *_angle(a, j))


def _turned_front(p: Inputs, a: Mapping[str, Value], lane: Value, vector: Sequence[Value]) -> list[Value]:
    """A vector of 128 numbers, four a lane, with its first 64 rotated and all rounded to bfloat16."""
    rotated = ptx.compare("slt", lane, ROTARY // 4)
    out: list[Value] = []
    if p.index_interleaved:
        for i in range(2):
            j = ptx.bit_and(ptx.add(ptx.shift_left(lane, 1), i), ROTARY // 2 - 1)
            out += _turned_pair(a, j, *vector[2 * i : 2 * i + 2])
    else:
        in_front = ptx.compare("eq", ptx.bit_and(lane, ROTARY // 8), 0)
        for i, x in enumerate(vector):
            other = ptx.lane_distant(x, ROTARY // 8)
            j = ptx.bit_and(ptx.add(ptx.shift_left(lane, 2), i), ROTARY // 2 - 1)
            cos, sin = _angle(a, j)
            before, after = _turned(x, other, cos, sin)[0], _turned(other, x, cos, sin)[1]
            out.append(ptx.select(in_front, before, after))
    return [ptx.rounded(ptx.select(rotated, new, old)) for new, old in zip(out, vector, strict=True)]


def _store_index_vector(
    p: Inputs, vector: Sequence[Value], lane: Value, base: Value, row: Value, scales: Value | None
) -> Value | None:
    """Row `row` of [.., 128] as the index cache keeps it; returns its scale where it has one."""
    always = ptx.compare("sge", lane, 0)
    if not p.index_scaled:
        for i in range(2):
            at = ptx.offset(ptx.offset(base, row, 2 * INDEX_WIDTH), ptx.add(ptx.shift_left(lane, 1), i), 4)
            ptx.store_global(at, ptx.to_bfloat16_pair(*vector[2 * i : 2 * i + 2]), always)
        return None
    # As quant.quantise_index does: max(|x|, 1e-4) / 448 rounded up to a power of two.
    sizes = [ptx.bit_and(ptx.bits_of(x), 0x7FFFFFFF) for x in vector]
    top = ptx.reduce_warp("max", ptx.maximum(ptx.maximum(sizes[0], sizes[1]), ptx.maximum(sizes[2], sizes[3])))
    finite = ptx.compare("slt", top, 0x7F800000)
    largest = ptx.maximum_floats(ptx.float_of(top), ptx.number(1e-4))
    bits = ptx.bit_and(ptx.add(ptx.bits_of(ptx.divide_floats(largest, ptx.number(448.0))), 0x7FFFFF), 0x7F800000)
    scale = ptx.float_of(ptx.select(finite, bits, 0x7FC00000))
    inverse = ptx.float_of(ptx.select(finite, ptx.sub(254 << 23, bits), 0x7FC00000))
    word = ptx.to_e4m3_word([ptx.times(x, inverse) for x in vector])
    ptx.store_global(ptx.offset(ptx.offset(base, row, INDEX_WIDTH), lane, 4), word, always)
    if scales is not None:
        ptx.store_global(ptx.offset(scales, row, 4), ptx.bits_of(scale), ptx.compare("eq", lane, 0))
    return scale


# ---- layer_outputs


class Values(Stage):
    """Each head's context times its value matrix -> values [H dv] float32."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], place: Place, shared: Shared):
        self.p, self.a, self.place = p, a, place
        self.vectors = shared.take(2 * 2 * VALUE_DIM)
        if a:
            rows = p.heads * p.value
            self.first, end = parts.share(place, rows)
            self.product = Product(place, Rows([(a["v_up"], rows)]), VALUE_DIM, self.first, end, parts.largest_share(rows))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p = self.p
        # A share has at most `value` rows, so it is of one head or two.
        head = ptx.minimum(ptx.div(self.first, p.value), p.heads - 1)
        last = p.heads * VALUE_DIM // 2 - 1
        sink = parts.to_shared(self.vectors)
        for i, exists in parts.in_turn(self.place, VALUE_DIM):
            word = ptx.minimum(ptx.add(ptx.mul(head, VALUE_DIM // 2), i), last)
            sink(i, ptx.load_global(ptx.offset(self.a["context"], word, 4)), exists)
        ptx.block_barrier()

        def vector(row: Value) -> Value:
            local = ptx.minimum(ptx.sub(ptx.div(row, p.value), head), 1)
            return ptx.add(self.vectors, ptx.mul(local, 2 * VALUE_DIM))

        self.product.finish(vector, _store_number(self.a["values"]))


class Out(Stage):
    """x + the output projection -> middle [D] bfloat16."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], place: Place, shared: Shared):
        self.p, self.a, self.place = p, a, place
        self.vector = shared.take(2 * p.heads * p.value)
        if a:
            first, end = parts.share(place, p.hidden)
            most = parts.largest_share(p.hidden)
            self.product = Product(place, Rows([(a["out"], p.hidden)]), p.heads * p.value, first, end, most)

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a = self.p, self.a
        _pack(self.place, p.heads * p.value // 2, parts.fresh_pair(a["values"]), self.vector)
        ptx.block_barrier()

        def emit(row: Value, total: Value, stores: Value) -> None:
            x = _bfloat16_at(a["x"], ptx.minimum(row, p.hidden - 1), ptx.load_global)
            ptx.store_global_bfloat16(ptx.offset(a["middle"], row, 2), ptx.plus(x, ptx.rounded(total)), stores)

        self.product.finish(lambda row: self.vector, emit)


class First(Stage):
    """norm(middle) times the router and the shared experts' first matrix, or a dense layer's -> first float32."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], place: Place, shared: Shared):
        self.p, self.a, self.place = p, a, place
        self.vector, self.sums = shared.take(2 * p.hidden), shared.take(64)
        if a:
            begin, end = parts.share(place, p.first)
            counts = {"router": p.experts, "shared_gate_up": 2 * p.shared}
            rows = Rows([(a[name], count) for name, count in counts.items() if count])
            self.product = Product(place, rows, p.hidden, begin, end, parts.largest_share(p.first))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a = self.p, self.a
        pair, sink = _bfloat16_pair(a["middle"], ptx.load_fresh), parts.to_shared(self.vector)
        parts.normalise(self.place, p.hidden // 2, pair, a["mlp_norm"], p.eps, self.sums, sink, in_bfloat16=True)
        ptx.block_barrier()
        self.product.finish(lambda row: self.vector, _store_number(a["first"]))


class Choice:
    """The experts of the token, the same in every warp that asks."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], place: Place):
        scores, keys = [], []
        for start in range(0, p.experts, 32):
            number = ptx.add(place.lane, start)
            score = parts.sigmoid(_number_at(a["first"], number))
            bias = ptx.float_of(ptx.load_global(ptx.offset(a["router_bias"], number, 4)))
            scores.append(score)
            keys.append(parts.ordered(ptx.plus(score, bias)))
        self.experts = parts.best(place, keys, p.chosen)
        self.weights = []
        for expert in self.experts:
            bits = ptx.constant(0)
            for i, score in enumerate(scores):
                is_it = ptx.compare("eq", ptx.add(place.lane, 32 * i), expert)
                bits = ptx.select(is_it, ptx.bits_of(score), bits)
            self.weights.append(ptx.float_of(ptx.reduce_warp("or", bits)))
        if p.normalised:
            total = ptx.plus(*self.weights, ptx.number(1e-20))
            self.weights = [ptx.divide_floats(w, total) for w in self.weights]
        self.weights = [ptx.times(w, ptx.number(p.scale)) for w in self.weights]


def _one_of(number: Value, values: Sequence[Value]) -> Value:
    """values[number]."""
    found = values[0]
    for i, value in enumerate(values[1:], 1):
        found = ptx.select(ptx.compare("eq", number, i), value, found)
    return found


class ExpertsFirst(Stage):
    """norm(middle), as `First` left it in shared memory, times the chosen experts' first matrices -> gate_up [k 2I] float32."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], place: Place, shared: Shared, vector: Value):
        self.p, self.a, self.place, self.vector = p, a, place, vector
        self.columns = 8 * EXPERT_LANES
        self.units = p.chosen * 2 * p.width // self.columns
        self.turns = -(-self.units // parts.BLOCKS)
        self.sums = shared.take(self.turns * parts.WARPS * 32 * EXPERT_LANES)

    def run(self) -> None:
        p, a, place = self.p, self.a, self.place
        self.choice = Choice(p, a, place)
        experts = self.choice.experts
        of_expert, row_bytes = 2 * p.width // self.columns, 2 * 2 * p.width
        of_turn = parts.WARPS * 32 * EXPERT_LANES  # bytes of sums

        def factor(row: Value) -> Value:
            return _half_of(ptx.load_shared(ptx.add(self.vector, ptx.shift_left(ptx.shift_right(row, 1), 2))), row)

        def one(unit: Value, sums: Value) -> None:
            expert = _one_of(ptx.div(unit, of_expert), experts)
            base = ptx.offset(a["gate_up"], expert, p.hidden * row_bytes)
            base = ptx.offset(base, ptx.rem(unit, of_expert), 2 * self.columns)
            columns = parts.Columns(place, [parts.Piece(base, factor)], p.hidden, row_bytes, EXPERT_LANES)
            parts.sum_of_columns(place, columns.finish(), EXPERT_LANES, sums)

        for turn in range(self.turns):
            unit = ptx.add(place.block, turn * parts.BLOCKS)
            with ptx.when(ptx.compare("slt", unit, self.units)):
                one(unit, ptx.add(self.sums, turn * of_turn))
        ptx.block_barrier()
        for column, exists in parts.in_turn(place, self.turns * self.columns):
            which, local = ptx.div(column, self.columns), ptx.rem(column, self.columns)
            unit = ptx.add(place.block, ptx.mul(which, parts.BLOCKS))
            total = parts.sum_of_warps(local, EXPERT_LANES, ptx.add(self.sums, ptx.mul(which, of_turn)))
            stores = ptx.both(exists, ptx.compare("slt", unit, self.units))
            at = ptx.add(ptx.mul(unit, self.columns), local)
            ptx.store_global(ptx.offset(a["hidden"], at, 4), ptx.bits_of(total), stores)


class ExpertsSecond(Stage):
    """middle + experts + shared experts -> y [D] bfloat16. A block has 16 columns of it, a warp one of the shared part."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], place: Place, shared: Shared, experts_first: ExpertsFirst):
        self.p, self.a, self.place, self.before = p, a, place, experts_first
        self.width = 8 * OUTPUT_LANES
        self.units = p.hidden // self.width
        self.turns = -(-self.units // parts.BLOCKS)
        self.vector, self.shared_vector = shared.take(4 * p.chosen * p.width), shared.take(2 * max(8, p.shared))
        self.sums, self.shared_sums = shared.take(parts.WARPS * 32 * OUTPUT_LANES), shared.take(4 * self.width)
        if a:
            self.products = [self.product(turn) for turn in range(self.turns)] if p.shared else []

    def first(self, turn: int) -> Value:
        """The first column of a turn's unit; blocks without one read the last one's."""
        unit = ptx.add(self.place.block, turn * parts.BLOCKS)
        return ptx.mul(ptx.minimum(unit, self.units - 1), self.width)

    def exists(self, turn: int) -> Value:
        return ptx.compare("slt", ptx.add(self.place.block, turn * parts.BLOCKS), self.units)

    def product(self, turn: int) -> Product:
        first = self.first(turn)
        end = ptx.select(self.exists(turn), ptx.add(first, self.width), first)
        return Product(self.place, Rows([(self.a["shared_down"], self.p.hidden)]), self.p.shared, first, end, self.width)

    def columns(self, turn: int) -> parts.Columns:
        p, pieces = self.p, []
        for slot, expert in enumerate(self.before.choice.experts):
            base = ptx.offset(self.a["expert_down"], expert, 2 * p.width * p.hidden)
            vector = ptx.add(self.vector, 4 * p.width * slot)

            def factor(row: Value, vector: Value = vector) -> Value:
                return ptx.float_of(ptx.load_shared(ptx.add(vector, ptx.shift_left(row, 2))))

            pieces.append(parts.Piece(ptx.offset(base, self.first(turn), 2), factor))
        return parts.Columns(self.place, pieces, p.width, 2 * p.hidden, OUTPUT_LANES)

    def begin(self) -> None:
        """The experts are known already, what they multiply is not."""
        self.first_columns = self.columns(0)
        self.first_columns.begin()
        if self.products:
            self.products[0].begin()

    def run(self) -> None:
        p, a, place = self.p, self.a, self.place
        if p.shared:
            gate = ptx.offset(a["first"], ptx.constant(p.experts), 4)
            _pack(place, p.shared // 2, _activated(gate, p.shared), self.shared_vector)
        for i, exists in parts.in_turn(place, p.chosen * p.width // 4):
            slot, four = ptx.div(i, p.width // 4), ptx.rem(i, p.width // 4)
            at = ptx.offset(ptx.offset(a["hidden"], slot, 8 * p.width), four, 16)
            gates = [ptx.rounded(ptx.float_of(word)) for word in ptx.load_fresh_words(at)]
            ups = ptx.load_fresh_words(ptx.offset(at, ptx.constant(1), 4 * p.width))
            ups = [ptx.rounded(ptx.float_of(word)) for word in ups]
            weight = _one_of(slot, self.before.choice.weights)
            hidden = [ptx.rounded(ptx.times(parts.silu(g), u)) for g, u in zip(gates, ups, strict=True)]
            words = [ptx.bits_of(ptx.times(x, weight)) for x in hidden]
            with ptx.when(exists):
                ptx.store_shared_words(ptx.add(self.vector, ptx.shift_left(i, 4)), words)
        ptx.block_barrier()
        for turn in range(self.turns):
            self.unit(turn)

    def unit(self, turn: int) -> None:
        p, a, place = self.p, self.a, self.place
        first, exists = self.first(turn), self.exists(turn)
        columns = self.columns(turn) if turn else self.first_columns
        parts.sum_of_columns(place, columns.finish(), OUTPUT_LANES, self.sums)
        if p.shared:

            def emit(row: Value, total: Value, stores: Value) -> None:
                with ptx.when(stores):
                    at = ptx.add(self.shared_sums, ptx.shift_left(ptx.sub(row, first), 2))
                    ptx.store_shared(at, ptx.bits_of(ptx.rounded(total)))

            if turn:
                self.products[turn].begin()
            self.products[turn].finish(lambda row: self.shared_vector, emit)
        ptx.block_barrier()
        with ptx.when(ptx.both(exists, ptx.compare("slt", place.thread, self.width))):
            total = ptx.rounded(parts.sum_of_warps(place.thread, OUTPUT_LANES, self.sums))
            if p.shared:
                at = ptx.add(self.shared_sums, ptx.shift_left(place.thread, 2))
                total = ptx.rounded(ptx.plus(total, ptx.float_of(ptx.load_shared(at))))
            row = ptx.add(first, place.thread)
            total = ptx.plus(_bfloat16_at(a["middle"], row, ptx.load_fresh), total)
            ptx.store_global_bfloat16(ptx.offset(a["y"], row, 2), total, exists)
        if turn + 1 < self.turns:
            ptx.block_barrier()


class DenseSecond(Stage):
    """middle + a dense layer's second matrix -> out [D] bfloat16."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], place: Place, shared: Shared):
        self.p, self.a, self.place = p, a, place
        self.vector = shared.take(2 * p.shared)
        if a:
            first, end = parts.share(place, p.hidden)
            self.product = Product(
                place, Rows([(a["shared_down"], p.hidden)]), p.shared, first, end, parts.largest_share(p.hidden)
            )

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a = self.p, self.a
        _pack(self.place, p.shared // 2, _activated(a["first"], p.shared), self.vector)
        ptx.block_barrier()

        def emit(row: Value, total: Value, stores: Value) -> None:
            x = _bfloat16_at(a["middle"], ptx.minimum(row, p.hidden - 1), ptx.load_fresh)
            ptx.store_global_bfloat16(ptx.offset(a["y"], row, 2), ptx.plus(x, ptx.rounded(total)), stores)

        self.product.finish(lambda row: self.vector, emit)


def _activated(gate: Value, width: int) -> Callable[[Value], tuple[Value, Value]]:
    """silu(gate) * up of two neighbours; `up` stands `width` float32 numbers after `gate`."""

    def pair(i: Value) -> tuple[Value, Value]:
        gates, ups = parts.fresh_pair(gate)(i), parts.fresh_pair(ptx.offset(gate, ptx.constant(width), 4))(i)
        low, high = (ptx.times(parts.silu(ptx.rounded(g)), ptx.rounded(u)) for g, u in zip(gates, ups, strict=True))
        return low, high

    return pair


# ---- the kernels


def _input_stages(p: Inputs, a: Mapping[str, Value], place: Any, shared: Shared, *, alone: bool) -> list[Down | Up | Absorb]:
    """`alone`: no stages of another layer before have brought the matrices."""
    down, up, absorb = Down(p, a, place, shared), Up(p, a, place, shared), Absorb(p, a, place, shared)
    if a:
        if alone:
            down.ahead = [lambda: up.product.bring(place), lambda: absorb.product.bring(place)]
        # While few multiprocessors attend, what comes after streams from memory.
        absorb.ahead = [
            lambda: parts.bring(place, a["next_v_up"], 2 * VALUE_DIM, *parts.share(place, p.heads * p.value)),
            lambda: parts.bring(place, a["next_out"], 2 * p.heads * p.value, *parts.share(place, p.hidden)),
        ]
    return [down, up, absorb]


def _output_stages(p: Outputs, following: Inputs | None, a: Mapping[str, Value], place: Any, shared: Shared) -> list[Stage]:
    values, out, first = Values(p, a, place, shared), Out(p, a, place, shared), First(p, a, place, shared)
    stages: list[Stage] = [values, out, first]
    second: Stage
    if p.experts:
        experts_first = ExpertsFirst(p, a, place, shared, first.vector)
        stages.append(experts_first)
        second = experts = ExpertsSecond(p, a, place, shared, experts_first)
        products = experts.products if a else []
    else:
        second = dense = DenseSecond(p, a, place, shared)
        products = [dense.product] if a else []
    stages.append(second)
    after: list[Down | Up | Absorb] = []
    if following is not None:
        after = _input_stages(following, {**a, "x": a["y"]} if a else a, place, shared, alone=False)
    if a:
        values.ahead = [functools.partial(product.bring, place) for product in (first.product, *products)]
        # While the experts are chosen nothing of this layer can stream.
        stages[3].ahead = [functools.partial(stage.product.bring, place) for stage in after]
    return [*stages, *after]


def _launch(
    name: str,
    stages: Callable[[Mapping[str, Value], Any, Shared], Sequence[Stage]],
    operands: Mapping[str, Any],
    outs: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Runs stages over named arrays; `outs` is what they write. Of the operands, references are written too."""
    counted = Shared()
    stages({}, None, counted)
    names = [*operands, *outs, "shared"]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *references, block = values
            *given, memory = references
            addresses = {n: ptx.global_address(v) for n, v in zip(names[:-1], given, strict=True)}
            place = Place.here(ptx.scalar(block))
            _in_sequence(stages(addresses, place, Shared(ptx.shared_address(memory))), addresses["counter"])

        program(*refs, jax.lax.axis_index("block"))

    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=(plgpu.SMEM((counted.used // 4,), jnp.int32),),
        grid=(parts.BLOCKS,),
        grid_names=("block",),
        num_threads=parts.THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return dict(zip(outs, kernel(*operands.values()), strict=True))


def _inputs(hidden: int, given: Before, after: Mapping[str, jax.Array]) -> tuple[Inputs, dict[str, Any], dict[str, Any]]:
    """Sizes, operands and outputs of the stages before an attention; `after` are the weights of those behind it."""
    w = given.weights
    full, scaled = given.index_keys is not None, given.index_scales is not None
    p = Inputs(
        hidden=hidden,
        q_rank=w["q_norm"].size,
        heads=w["k_up"].shape[0],
        nope=w["k_up"].shape[2],
        value=after["v_up"].shape[1],
        max_len=given.latents.size // WIDTH,
        eps=given.eps,
        latent_eps=given.latent_eps,
        index_heads=w["down"].shape[0] - w["q_norm"].size - WIDTH - INDEX_WIDTH if full else 0,
        index_scale=given.index_scale,
        index_interleaved=given.index_interleaved,
        index_scaled=scaled,
    )
    cos, sin = given.angles
    operands: dict[str, Any] = {
        "position": given.position,
        "cos": cos,
        "sin": sin,
        "next_v_up": after["v_up"],
        "next_out": after["out"],
        **w,
    }
    for name, array in given.caches().items():
        operands[name] = jax.new_ref(array)
    outs = {
        "down_out": jax.ShapeDtypeStruct((p.down,), jnp.float32),
        "up_out": jax.ShapeDtypeStruct((p.up,), jnp.float32),
        "queries": jax.ShapeDtypeStruct((1, 1, p.heads, WIDTH), jnp.bfloat16),
    }
    if full:
        kind = jnp.float8_e4m3fn if scaled else jnp.bfloat16
        outs["index_queries"] = jax.ShapeDtypeStruct((1, 1, p.index_heads, INDEX_WIDTH), kind)
        outs["index_weights"] = jax.ShapeDtypeStruct((1, 1, p.index_heads), jnp.float32)
    return p, operands, outs


def _made(given: Before, operands: Mapping[str, Any], outs: Mapping[str, jax.Array]) -> Ready:
    caches = {name: jax.freeze(operands[name]) for name in given.caches()}
    return Ready(
        outs["queries"],
        caches["latents"],
        outs.get("index_queries"),
        outs.get("index_weights"),
        caches.get("index_keys"),
        caches.get("index_scales"),
    )


def attention_inputs(
    x: jax.Array, given: Before, after: Mapping[str, jax.Array], counter: jax.Array
) -> tuple[Ready, jax.Array]:
    p, operands, outs = _inputs(x.size, given, after)
    operands |= {"x": x, "counter": jax.new_ref(counter)}

    def stages(a: Mapping[str, Value], place: Any, shared: Shared) -> Sequence[Stage]:
        return _input_stages(p, a, place, shared, alone=True)

    made = _launch("decode_inputs", stages, operands, outs)
    return _made(given, operands, made), jax.freeze(operands["counter"])


def layer_outputs(
    x: jax.Array,
    context: jax.Array,
    weights: Mapping[str, jax.Array],
    counter: jax.Array,
    *,
    eps: float,
    chosen: int,
    normalised: bool,
    scale: float,
    following: Before | None,
    after: Mapping[str, jax.Array] | None,
) -> tuple[jax.Array, Ready | None, jax.Array]:
    heads, value, _ = weights["v_up"].shape
    routed = "gate_up" in weights
    experts = weights["router_bias"].size if routed else 0
    shared_width = weights["shared_gate_up"].shape[0] // 2 if "shared_gate_up" in weights else 0
    width = weights["expert_down"].shape[1] if routed else 0
    p = Outputs(x.size, heads, value, eps, shared_width, experts, chosen if routed else 0, width, normalised, scale)
    operands: dict[str, Any] = {"x": x, "context": context, **weights, "counter": jax.new_ref(counter)}
    outs: dict[str, Any] = {
        "values": jax.ShapeDtypeStruct((heads * value,), jnp.float32),
        "middle": jax.ShapeDtypeStruct((p.hidden,), jnp.bfloat16),
        "first": jax.ShapeDtypeStruct((p.first,), jnp.float32),
        "y": jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
    }
    if routed:
        outs["hidden"] = jax.ShapeDtypeStruct((p.chosen * 2 * width,), jnp.float32)
    then: Inputs | None = None
    if following is not None:
        assert after is not None
        then, more_operands, more_outs = _inputs(x.size, following, after)
        operands, outs = operands | more_operands, outs | more_outs

    def stages(a: Mapping[str, Value], place: Any, shared: Shared) -> list[Stage]:
        return _output_stages(p, then, a, place, shared)

    made = _launch("decode_outputs" if then is None else "decode_outputs_inputs", stages, operands, outs)
    ready = None if following is None else _made(following, operands, made)
    return made["y"], ready, jax.freeze(operands["counter"])
