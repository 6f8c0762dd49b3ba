"""The dense parts of a decoder layer for one token on Hopper: two kernels around the attention.

With one token a layer reads its weights once and computes next to nothing, so its time is the number of kernel calls, each
of which drains the device, and how fast weights stream. Here one thread block stays on every SM for a whole kernel, and its
stages are separated by grid barriers (`ptx.grid_arrive`, `ptx.grid_wait`). A stage's first weights do not depend on what the
barrier waits for, so they are loaded before it and stream while the thread blocks wait for each other and compute the stage's
input, which every thread block computes whole for itself.

`attention_inputs`: norm and the projections down | latent norms, rope, cache, the projections up | absorption, index
queries. `layer_outputs`: value projection | output projection and residual | norm, router and shared experts' first
matrix | choice and first matrices of the experts | second matrices and residual; or the three of a dense layer.

Stages pass float32 vectors to each other through L2. No sum is split between thread blocks, so the results do not depend on
the order in which they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import quant
from pallas_kernels.decode_layer import mosaic_gpu_parts as parts
from pallas_kernels.decode_layer.arrays import AttentionOperands, AttentionWeights, latents_of
from pallas_kernels.decode_layer.mosaic_gpu_parts import (
    BlockRows,
    Codes,
    CodesProduct,
    GroupedVector,
    Product,
    SharedMemory,
    Thread,
    TileSplit,
    Value,
)
from pallas_kernels.hopper import ptx
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.quant import Scaled
from pallas_kernels.routing.choice import Choice
from pallas_kernels.routing.mosaic_gpu_choice import choose

INDEX_WIDTH = 128
# Thread blocks, counted from the last, that apply rope or make index queries instead of taking rows of a matrix.
ROPE_BLOCK, INDEX_BLOCK = 1, 2
EXPERT_LANES, OUTPUT_LANES = 4, 2  # lanes across the columns of a unit: 32 of the experts' first, 16 of their second matrix
# Loads and pieces of codes that a lane and a warp have in flight where a stage has a matrix in bfloat16 and one in codes.
MIXED_LOADS, MIXED_PIECES = 8, 2

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
    latents_scaled: bool = False  # latents in 8 bits with scales
    codes: bool = False  # whether the projections up are in 8 bits

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
    """Sizes of `layer_outputs`. choice None: a dense layer, whose width is `shared`."""

    hidden: int
    heads: int
    value: int
    eps: float
    shared: int
    choice: Choice | None = None
    width: int = 0  # of an expert
    out_codes: bool = False  # whether the output projection, and the matrices of the MLP, are in 8 bits
    mlp_codes: bool = False

    @property
    def experts(self) -> int:
        return self.choice.experts if self.choice else 0

    @property
    def num_experts_per_token(self) -> int:
        return self.choice.choices if self.choice else 0

    @property
    def first(self) -> int:
        return self.experts + 2 * self.shared


# ---- what the stages are results of


class Stage:
    """The work between two grid barriers: `begin` before the first of them, `run` after it.

    `begin` may load only what no thread block writes in this kernel. `prefetches` run after it: they copy to L2 what later
    stages or kernels read.
    """

    prefetches: Sequence[Callable[[], None]] = ()

    def begin(self) -> None: ...

    def run(self) -> None: ...


def _in_sequence(stages: Sequence[Stage], barrier_count: Value) -> None:
    for i, stage in enumerate(stages):
        target = ptx.grid_arrive(barrier_count, parts.BLOCKS) if i else None
        stage.begin()
        for prefetch in stage.prefetches:
            prefetch()
        if target is not None:
            ptx.grid_wait(barrier_count, target)
        stage.run()


def _float32_sink(base: Value) -> Callable[[Value, Value, Value], None]:
    return lambda row, total, stores: ptx.store_global(ptx.offset(base, row, 4), ptx.bits_of(total), stores)


def _rounded_sink(base: Value) -> Callable[[Value, Value, Value], None]:
    return lambda row, total, stores: ptx.store_global(ptx.offset(base, row, 4), ptx.bits_of(ptx.rounded(total)), stores)


def _bfloat16_pair(base: Value, load: Callable[[Value], Value]) -> Callable[[Value], tuple[Value, Value]]:
    return lambda i: ptx.from_bfloat16_pair(load(ptx.offset(base, i, 4)))


def _half_of(word: Value, i: Value) -> Value:
    low, high = ptx.from_bfloat16_pair(word)
    return ptx.select((i & 1).equals(0), low, high)


def _load_bfloat16(base: Value, i: Value, load: Callable[[Value], Value]) -> Value:
    return _half_of(load(ptx.offset(base, i >> 1, 4)), i)


def _load_float32(base: Value, i: Value) -> Value:
    return ptx.float_of(ptx.load_fresh(ptx.offset(base, i, 4)))


def _write_bfloat16(
    thread: Thread,
    pairs: int,
    pair: Callable[[Value], tuple[Value, Value]],
    sink: Callable[[Value, Value, Value], None],
) -> None:
    for i, exists in parts.indices_of_thread(thread, pairs):
        sink(i, ptx.to_bfloat16_pair(*pair(i)), exists)


class MatrixProduct:
    """Rows of a matrix [N, width], bfloat16 or codes, times a vector in shared memory; a thread block takes at most `most`.

    It is made with the shared memory that it needs, and `of` says which rows it takes.
    """

    def __init__(self, shared: SharedMemory, width: int, most: int, *, codes: bool):
        self.split, self.codes = TileSplit(width, most), codes
        self.vector = GroupedVector.allocate(shared, width) if codes else shared.allocate(2 * width)
        self.sums = shared.allocate(self.split.sums_bytes) if codes else None

    def of(self, thread: Thread, matrix: Value, scales: Value | None, first: Value, end: Value) -> None:
        """Takes rows first .. end - 1 of the matrix at address `matrix`, codes with the scales at `scales`."""
        width, most = self.split.width, self.split.most
        self.product: Product | CodesProduct
        if self.codes:
            self.product = CodesProduct(thread, Codes(matrix, scales, width), self.split, first, end, self.sums)
        else:
            self.product = Product(thread, matrix, width, first, end, most)

    def sink(self, thread: Thread) -> Callable[[Value, Value, Value], None]:
        """What receives the vector as pairs of bfloat16."""
        return parts.to_groups(thread, self.vector) if self.codes else parts.to_shared(self.vector)

    def begin(self) -> None:
        self.product.begin()

    def prefetch(self, thread: Thread) -> None:
        self.product.prefetch(thread)

    def finish(self, emit: Callable[[Value, Value, Value], None]) -> None:
        if isinstance(self.product, CodesProduct):
            self.product.finish(self.vector, emit)
        else:
            self.product.finish(lambda row: self.vector, emit)

    def add_to(self, load: Callable[[Value], Value], target: Value) -> None:
        """Stores load(row) + sum, in bfloat16, as number `row` at `target`; codes load before they sum."""

        def store(row: Value, x: Value, total: Value, stores: Value) -> None:
            ptx.store_global_bfloat16(ptx.offset(target, row, 2), x + ptx.rounded(total), stores)

        if isinstance(self.product, CodesProduct):
            rows = self.product.rows_of_thread()
            loaded = [load(row) for row, _ in rows]
            for (row, exists), x, total in zip(rows, loaded, self.product.totals(self.vector), strict=True):
                store(row, x, total, exists)
        else:
            self.product.finish(lambda row: self.vector, lambda row, total, stores: store(row, load(row), total, stores))


def _scales_of(a: Mapping[str, Value], names: Sequence[str], rows: BlockRows) -> Value | None:
    """The address of the scales of that of one or two matrices that `rows` are of, None if they are not codes."""
    scales = [a[f"{name}_scales"] for name in names if f"{name}_scales" in a]
    return ptx.select(rows.is_first, *scales) if len(scales) == 2 else next(iter(scales), None)


# ---- attention_inputs


class Down(Stage):
    """norm(x) times the projections down -> down [Nd] float32."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        self.vector, self.sums = shared.allocate(2 * p.hidden), shared.allocate(64)
        if a:
            first, end = parts.block_share(thread, p.down)
            self.product = Product(thread, a["down"], p.hidden, first, end, parts.largest_block_share(p.down))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        pair = _bfloat16_pair(self.a["x"], ptx.load_fresh)
        sink = parts.to_shared(self.vector)
        eps = self.p.eps
        parts.normalise(self.thread, self.p.hidden // 2, pair, self.a["norm"], eps, self.sums, sink, in_bfloat16=True)
        ptx.block_barrier()
        self.product.finish(lambda row: self.vector, _float32_sink(self.a["down_out"]))


class Up(Stage):
    """The query latent times the projections up -> up [Nu] float32; one thread block writes the token to the caches."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        counts = {"up": p.heads * p.head_dim, "index_up": p.index_heads * INDEX_WIDTH}
        names = [name for name, count in counts.items() if count]
        most = max(parts.largest_block_shares([counts[name] for name in names], ROPE_BLOCK))
        self.product = MatrixProduct(shared, p.q_rank, most, codes=p.codes)
        self.sums, self.token = shared.allocate(64), Token(p, a, thread, shared)
        if a:
            self.rows = rows = BlockRows.of(thread, [(a[name], counts[name]) for name in names], ROPE_BLOCK)
            self.product.of(thread, rows.matrix, _scales_of(a, names, rows), rows.first, rows.end)

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        pair, sink = parts.fresh_pair(a["down_out"]), self.product.sink(thread)
        parts.normalise(thread, p.q_rank // 2, pair, a["q_norm"], p.latent_eps, self.sums, sink, in_bfloat16=False)
        ptx.block_barrier()
        self.product.finish(_rounded_sink(ptx.offset(a["up_out"], self.rows.offset, 4)))
        with ptx.when(thread.is_block_from_end(ROPE_BLOCK)):
            self.token.write(ptx.min_s32(ptx.load_global(a["position"]), p.max_len - 1))


class Token:
    """A token's place in the caches of a layer. down_out: the projections down of the token alone."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        self.sums = shared.allocate(64)
        self.sizes = shared.allocate(64) if p.latents_scaled else None

    def write(self, position: Value) -> None:
        """Stores what the projections down made of the token; all threads of the block take part."""
        p, a, thread = self.p, self.a, self.thread
        pair = parts.fresh_pair(ptx.offset(a["down_out"], ptx.constant(p.q_rank), 4))
        words: list[tuple[Value, Value, Value]] = []  # (i, numbers 2 i and 2 i + 1, whether it exists) of this thread

        def sink(i: Value, word: Value, exists: Value) -> None:
            words.append((i, word, exists))

        parts.normalise(thread, VALUE_DIM // 2, pair, a["kv_norm"], p.latent_eps, self.sums, sink, in_bfloat16=False)
        scale = self.write_codes(words, position) if p.latents_scaled else None
        if scale is None:
            row, rotary = ptx.offset(a["latents"], position, 2 * WIDTH), VALUE_DIM // 2
            for i, word, exists in words:
                ptx.store_global(ptx.offset(row, i, 4), word, exists)
        else:
            row, rotary = ptx.offset(a["latent_rotary"], position, 2 * ROTARY), 0
        with ptx.when(thread.warp.equals(0)):
            rotated_pair = rotate_pair(a, thread.lane, *pair(thread.lane + VALUE_DIM // 2))
            word = ptx.to_bfloat16_pair(*rotated_pair)
            if scale is not None:
                word = ptx.to_bfloat16_pair(*(ptx.div_full(x, scale) for x in ptx.from_bfloat16_pair(word)))
            at = ptx.offset(row, thread.lane + rotary, 4)
            ptx.store_global(at, word, thread.lane.signed >= 0)
        if p.index_heads:
            with ptx.when(thread.warp.equals(parts.WARPS - 1)):
                self.write_index_key(position)

    def write_codes(self, words: Sequence[tuple[Value, Value, Value]], position: Value) -> Value:
        """Stores a latent's first 512 numbers and its scale as quant.quantise_latents makes them; returns the scale."""
        a, thread = self.a, self.thread
        pairs = [ptx.from_bfloat16_pair(word) for _, word, _ in words]
        largest = parts.block_maximum(thread, [x for pair in pairs for x in pair], self.sizes)
        # XLA multiplies by the inverse of a constant that it divides by.
        scale = ptx.max_nan_f32(largest, ptx.number(quant.MIN_MAGNITUDE)) * (1 / quant.E4M3_MAX)
        is_even = (thread.lane & 1).equals(0)
        row = ptx.offset(a["latent_codes"], position, VALUE_DIM)
        for (i, _, exists), pair in zip(words, pairs, strict=True):
            four = [ptx.div_full(x, scale) for x in (*pair, *(ptx.lane_distant(x, 1) for x in pair))]
            ptx.store_global(ptx.offset(row, i >> 1, 4), ptx.to_e4m3_word(four), exists & is_even)
        is_first = thread.index.equals(0)
        ptx.store_global(ptx.offset(a["latent_scales"], position, 4), ptx.bits_of(scale), is_first)
        return scale

    def write_index_key(self, position: Value) -> None:
        p, a, lane = self.p, self.a, self.thread.lane
        at = ptx.offset(ptx.offset(a["down_out"], ptx.constant(p.latent_end), 4), lane, 16)
        key = [ptx.float_of(word) for word in ptx.load_fresh_words(at)]
        mean = parts.warp_sum(ptx.total(key)) * (1 / INDEX_WIDTH)
        key = [x - mean for x in key]
        squares = ptx.total(x * x for x in key)
        variance = parts.warp_sum(squares) * (1 / INDEX_WIDTH)
        factor = ptx.rsqrt(variance + 1e-6)
        weights, biases = _load_lane_values(a["key_norm"], lane), _load_lane_values(a["key_norm_bias"], lane)
        key = [x * factor * w + b for x, w, b in zip(key, weights, biases, strict=True)]
        key = _rotate_front(p, a, lane, key)
        _store_index_vector(p, key, lane, a["index_keys"], position, a.get("index_scales"))


class Absorb(Stage):
    """Queries [H, 576]: each head's part without rope times its key matrix, and the rotated part; index queries."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        self.vectors = shared.allocate(2 * 2 * p.nope)
        if a:
            rows = p.heads * VALUE_DIM
            self.first, end = parts.block_share(thread, rows, INDEX_BLOCK)
            self.product = Product(thread, a["k_up"], p.nope, self.first, end, parts.largest_block_share(rows, INDEX_BLOCK))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        # A share is below VALUE_DIM rows, so it is of one head or two.
        head = ptx.min_s32(self.first // VALUE_DIM, p.heads - 1)
        pairs = p.nope // 2

        def pair(i: Value) -> tuple[Value, Value]:
            which = ptx.min_s32(head + i // pairs, p.heads - 1)
            return parts.fresh_pair(a["up_out"])(which * (p.head_dim // 2) + i % pairs)

        _write_bfloat16(thread, 2 * pairs, pair, parts.to_shared(self.vectors))
        ptx.block_barrier()

        def vector(row: Value) -> Value:
            local = ptx.min_s32(row // VALUE_DIM - head, 1)
            return self.vectors + local * (2 * p.nope)

        def emit(row: Value, total: Value, stores: Value) -> None:
            at = row + row // VALUE_DIM * ROTARY
            ptx.store_global_bfloat16(ptx.offset(a["queries"], at, 2), total, stores)

        self.product.finish(vector, emit)
        with ptx.when(thread.is_block_from_end(ROPE_BLOCK)):
            self.rotate()
        if p.index_heads:
            with ptx.when(thread.is_block_from_end(INDEX_BLOCK)):
                self.index_queries()

    def rotate(self) -> None:
        p, a = self.p, self.a
        for i, exists in parts.indices_of_thread(self.thread, p.heads * ROTARY // 2):
            head, j = i >> 5, i & 31
            source = head * (p.head_dim // 2) + p.nope // 2 + j
            rotated_pair = rotate_pair(a, j, *parts.fresh_pair(a["up_out"])(source))
            target = head * (WIDTH // 2) + VALUE_DIM // 2 + j
            ptx.store_global(ptx.offset(a["queries"], target, 4), ptx.to_bfloat16_pair(*rotated_pair), exists)

    def index_queries(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        queries = ptx.offset(a["up_out"], ptx.constant(p.heads * p.head_dim), 4)
        weights = ptx.offset(a["down_out"], ptx.constant(p.latent_end + INDEX_WIDTH), 4)
        for r in range(-(-p.index_heads // parts.WARPS)):
            head = thread.warp + r * parts.WARPS
            with ptx.when(head.signed < p.index_heads):
                at = ptx.offset(ptx.offset(queries, head, 4 * INDEX_WIDTH), thread.lane, 16)
                query = [ptx.float_of(word) for word in ptx.load_fresh_words(at)]
                query = _rotate_front(p, a, thread.lane, query)
                scale = _store_index_vector(p, query, thread.lane, a["index_queries"], head, None)
                weight = _load_float32(weights, head) * p.index_scale
                if scale is not None:
                    weight = weight * scale
                leads = thread.lane.equals(0)
                ptx.store_global(ptx.offset(a["index_weights"], head, 4), ptx.bits_of(weight), leads)


def _load_lane_values(base: Value, lane: Value) -> list[Value]:
    """The four bfloat16 values of this lane, elements 4 lane .. 4 lane + 3, as float32."""
    words = [ptx.load_global(ptx.offset(base, (lane << 1) + i, 4)) for i in range(2)]
    return [x for word in words for x in ptx.from_bfloat16_pair(word)]


def _load_cos_sin(a: Mapping[str, Value], j: Value) -> tuple[Value, Value]:
    cos, sin = (ptx.load_global(ptx.offset(a[name], j, 4)) for name in ("cos", "sin"))
    return ptx.float_of(cos), ptx.float_of(sin)


def _rotate(first: Value, second: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    rotated_pair = first * cos - second * sin
    return rotated_pair, second * cos + first * sin


def rotate_pair(a: Mapping[str, Value], j: Value, first: Value, second: Value) -> tuple[Value, Value]:
    return _rotate(first, second, *_load_cos_sin(a, j))


def _rotate_front(p: Inputs, a: Mapping[str, Value], lane: Value, vector: Sequence[Value]) -> list[Value]:
    """Rope on the first 64 of a vector's 128 numbers, of which a lane has four; all are rounded to bfloat16."""
    rotated = lane.signed < ROTARY // 4
    out: list[Value] = []
    if p.index_interleaved:
        for i in range(2):
            j = ((lane << 1) + i) & (ROTARY // 2 - 1)
            out += rotate_pair(a, j, *vector[2 * i : 2 * i + 2])
    else:
        in_front = (lane & (ROTARY // 8)).equals(0)
        for i, x in enumerate(vector):
            other = ptx.lane_distant(x, ROTARY // 8)
            j = ((lane << 2) + i) & (ROTARY // 2 - 1)
            cos, sin = _load_cos_sin(a, j)
            first, second = _rotate(x, other, cos, sin)[0], _rotate(other, x, cos, sin)[1]
            out.append(ptx.select(in_front, first, second))
    return [ptx.rounded(ptx.select(rotated, new, old)) for new, old in zip(out, vector, strict=True)]


def _store_index_vector(
    p: Inputs, vector: Sequence[Value], lane: Value, base: Value, row: Value, scales: Value | None
) -> Value | None:
    """Stores a vector as row `row` of [.., 128], in the index cache's format; returns its scale if that is e4m3."""
    always = lane.signed >= 0
    if not p.index_scaled:
        for i in range(2):
            at = ptx.offset(ptx.offset(base, row, 2 * INDEX_WIDTH), (lane << 1) + i, 4)
            ptx.store_global(at, ptx.to_bfloat16_pair(*vector[2 * i : 2 * i + 2]), always)
        return None
    # As quant.quantise_index does: max(|x|, 1e-4) / 448 rounded up to a power of two.
    sizes = [ptx.bits_of(x) & 0x7FFFFFFF for x in vector]
    top = ptx.reduce_warp("max", ptx.max_s32(ptx.max_s32(sizes[0], sizes[1]), ptx.max_s32(sizes[2], sizes[3])))
    finite = top.signed < 0x7F800000
    largest = ptx.max_nan_f32(ptx.float_of(top), ptx.number(1e-4))
    bits = (ptx.bits_of(ptx.div_rn(largest, ptx.number(448.0))) + 0x7FFFFF) & 0x7F800000
    scale = ptx.float_of(ptx.select(finite, bits, 0x7FC00000))
    inverse = ptx.float_of(ptx.select(finite, (254 << 23) - bits, 0x7FC00000))
    word = ptx.to_e4m3_word([x * inverse for x in vector])
    ptx.store_global(ptx.offset(ptx.offset(base, row, INDEX_WIDTH), lane, 4), word, always)
    if scales is not None:
        ptx.store_global(ptx.offset(scales, row, 4), ptx.bits_of(scale), lane.equals(0))
    return scale


# ---- layer_outputs


class Values(Stage):
    """Each head's context times its value matrix -> values [H dv] float32."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        self.vectors = shared.allocate(2 * 2 * VALUE_DIM)
        if a:
            rows = p.heads * p.value
            self.first, end = parts.block_share(thread, rows)
            self.product = Product(thread, a["v_up"], VALUE_DIM, self.first, end, parts.largest_block_share(rows))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p = self.p
        # A share has at most `value` rows, so it is of one head or two.
        head = ptx.min_s32(self.first // p.value, p.heads - 1)
        last = p.heads * VALUE_DIM // 2 - 1
        sink = parts.to_shared(self.vectors)
        for i, exists in parts.indices_of_thread(self.thread, VALUE_DIM):
            word = ptx.min_s32(head * (VALUE_DIM // 2) + i, last)
            sink(i, ptx.load_global(ptx.offset(self.a["context"], word, 4)), exists)
        ptx.block_barrier()

        def vector(row: Value) -> Value:
            local = ptx.min_s32(row // p.value - head, 1)
            return self.vectors + local * (2 * VALUE_DIM)

        self.product.finish(vector, _float32_sink(self.a["values"]))


class Out(Stage):
    """x + the output projection -> middle [D] bfloat16."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        most = parts.largest_block_share(p.hidden)
        self.product = MatrixProduct(shared, p.heads * p.value, most, codes=p.out_codes)
        if a:
            self.product.of(thread, a["out"], a.get("out_scales"), *parts.block_share(thread, p.hidden))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a = self.p, self.a
        _write_bfloat16(self.thread, p.heads * p.value // 2, parts.fresh_pair(a["values"]), self.product.sink(self.thread))
        ptx.block_barrier()

        def load(row: Value) -> Value:
            return _load_bfloat16(a["x"], ptx.min_s32(row, p.hidden - 1), ptx.load_global)

        self.product.add_to(load, a["middle"])


class First(Stage):
    """norm(middle) times the router and the shared experts' first matrix, or a dense layer's -> first float32.

    vector, groups: norm(middle) in shared memory as bfloat16 and for codes, where this stage or the next one needs it.
    """

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        counts = {"router": p.experts, "shared_gate_up": 2 * p.shared}
        names = [name for name, count in counts.items() if count]
        self.vector = shared.allocate(2 * p.hidden) if p.experts or not p.mlp_codes else None
        self.sums = shared.allocate(64)
        self.groups = GroupedVector.allocate(shared, p.hidden) if p.mlp_codes else None
        row_bytes = (2 * p.hidden, p.hidden) if p.mlp_codes else (1, 1)
        most = parts.largest_block_shares([counts[name] for name in names], row_bytes=row_bytes)
        split = TileSplit(p.hidden, most[-1]) if p.mlp_codes and p.shared else None
        sums = shared.allocate(split.sums_bytes) if split else None
        if a:
            matrices = [(a[name], counts[name]) for name in names]
            self.rows = rows = BlockRows.of(thread, matrices, row_bytes=row_bytes)
            self.of_bfloat16: Product | None = None
            self.of_codes: CodesProduct | None = None
            if split is None:
                self.of_bfloat16 = Product(thread, rows.matrix, p.hidden, rows.first, rows.end, rows.most)
            elif not p.experts:
                self.of_codes = CodesProduct(
                    thread, Codes(rows.matrix, a["shared_gate_up_scales"], p.hidden), split, rows.first, rows.end, sums
                )
            else:  # a thread block has rows of one of the two; fewer loads in flight leave registers for both
                end = ptx.select(rows.is_first, rows.end, rows.first)
                self.of_bfloat16 = Product(thread, a["router"], p.hidden, rows.first, end, most[0], MIXED_LOADS)
                matrix, end = (
                    Codes(a["shared_gate_up"], a["shared_gate_up_scales"], p.hidden),
                    ptx.select(rows.is_first, rows.first, rows.end),
                )
                self.of_codes = CodesProduct(thread, matrix, split, rows.first, end, sums, MIXED_PIECES)
            self.products = [product for product in (self.of_bfloat16, self.of_codes) if product is not None]

    def begin(self) -> None:
        for product in self.products:
            product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        sinks = [] if self.vector is None else [parts.to_shared(self.vector)]
        if self.groups is not None:
            sinks.append(parts.to_groups(thread, self.groups))

        def sink(i: Value, word: Value, exists: Value) -> None:
            for keep in sinks:
                keep(i, word, exists)

        pair = _bfloat16_pair(a["middle"], ptx.load_fresh)
        parts.normalise(thread, p.hidden // 2, pair, a["mlp_norm"], p.eps, self.sums, sink, in_bfloat16=True)
        ptx.block_barrier()
        emit = _float32_sink(ptx.offset(a["first"], self.rows.offset, 4))
        is_first = self.rows.is_first
        if self.of_bfloat16 is not None:
            with contextlib.nullcontext() if self.of_codes is None else ptx.when(is_first):
                self.of_bfloat16.finish(lambda row: self.vector, emit)
        if self.of_codes is not None:
            assert self.groups is not None
            is_second = None if self.of_bfloat16 is None else ptx.select(is_first, 1, 0).equals(0)
            with contextlib.nullcontext() if is_second is None else ptx.when(is_second):
                self.of_codes.finish(self.groups, emit)


class RoutedExperts:
    """The token's experts and their weights, computed by every warp for itself."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread):
        def bias(number: Value) -> Value:
            return ptx.float_of(ptx.load_global(ptx.offset(a["router_bias"], number, 4)))

        assert p.choice is not None
        self.experts, self.weights = choose(thread, p.choice, lambda number: _load_float32(a["first"], number), bias)


def _select_value(number: Value, values: Sequence[Value]) -> Value:
    """values[number], by selects."""
    selected = values[0]
    for i, value in enumerate(values[1:], 1):
        selected = ptx.select(number.equals(i), value, selected)
    return selected


class ExpertsFirst(Stage):
    """norm(middle) times the chosen experts' first matrices -> hidden [k 2I] float32. `vector`: norm(middle), from `First`."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory, vector: Value):
        self.p, self.a, self.thread, self.vector = p, a, thread, vector
        self.columns = 8 * EXPERT_LANES
        self.units = p.num_experts_per_token * 2 * p.width // self.columns
        self.rounds = -(-self.units // parts.BLOCKS)
        self.sums = shared.allocate(self.rounds * parts.WARPS * 32 * EXPERT_LANES)

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        self.routed = RoutedExperts(p, a, thread)
        experts = self.routed.experts
        of_expert, row_bytes = 2 * p.width // self.columns, 2 * 2 * p.width
        round_bytes = parts.WARPS * 32 * EXPERT_LANES  # bytes of sums

        def factor(row: Value) -> Value:
            return _half_of(ptx.load_shared(self.vector + ((row >> 1) << 2)), row)

        def sum_unit(unit: Value, sums: Value) -> None:
            expert = _select_value(unit // of_expert, experts)
            base = ptx.offset(a["gate_up"], expert, p.hidden * row_bytes)
            base = ptx.offset(base, unit % of_expert, 2 * self.columns)
            columns = parts.Columns(thread, [parts.WeightedRows(base, factor)], p.hidden, row_bytes, EXPERT_LANES)
            parts.store_column_sums(thread, columns.finish(), EXPERT_LANES, sums)

        for r in range(self.rounds):
            unit = thread.block + r * parts.BLOCKS
            with ptx.when(unit.signed < self.units):
                sum_unit(unit, self.sums + r * round_bytes)
        ptx.block_barrier()
        for column, exists in parts.indices_of_thread(thread, self.rounds * self.columns):
            which, local = column // self.columns, column % self.columns
            unit = thread.block + which * parts.BLOCKS
            total = parts.load_column_sum(local, EXPERT_LANES, self.sums + which * round_bytes)
            stores = exists & (unit.signed < self.units)
            at = unit * self.columns + local
            ptx.store_global(ptx.offset(a["hidden"], at, 4), ptx.bits_of(total), stores)


class ExpertsSecond(Stage):
    """middle + experts + shared experts -> y [D] bfloat16. A thread block computes 16 columns of it."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory, experts_first: ExpertsFirst):
        self.p, self.a, self.thread, self.before = p, a, thread, experts_first
        self.width = 8 * OUTPUT_LANES
        self.units = p.hidden // self.width
        self.rounds = -(-self.units // parts.BLOCKS)
        self.vector, self.shared_vector = (
            shared.allocate(4 * p.num_experts_per_token * p.width),
            shared.allocate(2 * max(8, p.shared)),
        )
        self.sums, self.shared_sums = shared.allocate(parts.WARPS * 32 * OUTPUT_LANES), shared.allocate(4 * self.width)
        if a:
            self.products = [self.product(r) for r in range(self.rounds)] if p.shared else []

    def first(self, r: int) -> Value:
        """The first column of the block's 16 in round r; blocks without any read the last ones."""
        unit = self.thread.block + r * parts.BLOCKS
        return ptx.min_s32(unit, self.units - 1) * self.width

    def exists(self, r: int) -> Value:
        return (self.thread.block + r * parts.BLOCKS).signed < self.units

    def product(self, r: int) -> Product:
        first = self.first(r)
        end = ptx.select(self.exists(r), first + self.width, first)
        return Product(self.thread, self.a["shared_down"], self.p.shared, first, end, self.width)

    def columns(self, r: int) -> parts.Columns:
        p, pieces = self.p, []
        for slot, expert in enumerate(self.before.routed.experts):
            base = ptx.offset(self.a["expert_down"], expert, 2 * p.width * p.hidden)
            vector = self.vector + 4 * p.width * slot

            def factor(row: Value, vector: Value = vector) -> Value:
                return ptx.float_of(ptx.load_shared(vector + (row << 2)))

            pieces.append(parts.WeightedRows(ptx.offset(base, self.first(r), 2), factor))
        return parts.Columns(self.thread, pieces, p.width, 2 * p.hidden, OUTPUT_LANES)

    def begin(self) -> None:
        """The experts are known before the barrier, what they multiply is not."""
        self.first_columns = self.columns(0)
        self.first_columns.begin()
        if self.products:
            self.products[0].begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        if p.shared:
            gate = ptx.offset(a["first"], ptx.constant(p.experts), 4)
            _write_bfloat16(thread, p.shared // 2, _activated(gate, p.shared), parts.to_shared(self.shared_vector))
        for i, exists in parts.indices_of_thread(thread, p.num_experts_per_token * p.width // 4):
            slot, hidden = _hidden_of_experts(p, a, i)
            weight = _select_value(slot, self.before.routed.weights)
            words = [ptx.bits_of(x * weight) for x in hidden]
            with ptx.when(exists):
                ptx.store_shared_words(self.vector + (i << 4), words)
        ptx.block_barrier()
        for r in range(self.rounds):
            self.unit(r)

    def unit(self, r: int) -> None:
        p, a, thread = self.p, self.a, self.thread
        first, exists = self.first(r), self.exists(r)
        columns = self.columns(r) if r else self.first_columns
        parts.store_column_sums(thread, columns.finish(), OUTPUT_LANES, self.sums)
        if p.shared:

            def emit(row: Value, total: Value, stores: Value) -> None:
                with ptx.when(stores):
                    at = self.shared_sums + ((row - first) << 2)
                    ptx.store_shared(at, ptx.bits_of(ptx.rounded(total)))

            if r:
                self.products[r].begin()
            self.products[r].finish(lambda row: self.shared_vector, emit)
        ptx.block_barrier()
        with ptx.when(exists & (thread.index.signed < self.width)):
            total = ptx.rounded(parts.load_column_sum(thread.index, OUTPUT_LANES, self.sums))
            if p.shared:
                at = self.shared_sums + (thread.index << 2)
                total = ptx.rounded(total + ptx.float_of(ptx.load_shared(at)))
            row = first + thread.index
            total = _load_bfloat16(a["middle"], row, ptx.load_fresh) + total
            ptx.store_global_bfloat16(ptx.offset(a["y"], row, 2), total, exists)
        if r + 1 < self.rounds:
            ptx.block_barrier()


class ExpertsFirstInCodes(Stage):
    """Does what `ExpertsFirst` does, with matrices [E, 2, I, D] in codes. `vector`: norm(middle), from `First`."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory, vector: GroupedVector):
        self.p, self.a, self.thread, self.vector = p, a, thread, vector
        self.rows = p.num_experts_per_token * 2 * p.width
        self.split = TileSplit(p.hidden, parts.largest_block_share(self.rows))
        self.sums = shared.allocate(self.split.sums_bytes)

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        self.routed = RoutedExperts(p, a, thread)
        matrices = RowsOfExperts(Codes(a["gate_up"], a["gate_up_scales"], p.hidden), 2 * p.width, self.routed.experts)
        product = CodesProduct(thread, matrices, self.split, *parts.block_share(thread, self.rows), self.sums)
        product.begin()
        product.finish(self.vector, _float32_sink(a["hidden"]))


@dataclasses.dataclass(frozen=True)
class RowsOfExperts:
    """The matrices of some experts below each other, `rows` rows of each; `all_matrices`: those of all experts."""

    all_matrices: Codes
    rows: int
    experts: Sequence[Value]

    def piece(self, row: Value, piece: Value, step: int) -> tuple[Value, Value]:
        expert = _select_value(row // self.rows, self.experts)
        return self.all_matrices.piece(expert * self.rows + row % self.rows, piece, step)


@dataclasses.dataclass(frozen=True)
class ColumnsOfExperts:
    """The matrices of some experts beside each other, `rows` rows in all."""

    all_matrices: Codes
    rows: int
    experts: Sequence[Value]

    def piece(self, row: Value, piece: Value, step: int) -> tuple[Value, Value]:
        pieces, piece = self.all_matrices.width // parts.SCALE_BLOCK, piece + step
        expert = _select_value(piece // pieces, self.experts)
        return self.all_matrices.piece(expert * self.rows + row, piece % pieces, 0)


class ExpertsSecondInCodes(Stage):
    """Does what `ExpertsSecond` does, with matrices in codes: [E, D, I] of the experts, [D, Is] of the shared ones."""

    def __init__(
        self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory, experts_first: ExpertsFirstInCodes
    ):
        self.p, self.a, self.thread, self.before = p, a, thread, experts_first
        most = parts.largest_block_share(p.hidden)
        self.split = TileSplit(p.num_experts_per_token * p.width, most)
        self.vector, self.sums = GroupedVector.allocate(shared, self.split.width), shared.allocate(self.split.sums_bytes)
        self.of_shared: CodesProduct | None = None
        if p.shared:
            split = TileSplit(p.shared, most)
            self.shared_vector, sums = GroupedVector.allocate(shared, p.shared), shared.allocate(split.sums_bytes)
        if a:
            self.first, self.end = parts.block_share(thread, p.hidden)
            if p.shared:
                matrix = Codes(a["shared_down"], a["shared_down_scales"], p.shared)
                self.of_shared = CodesProduct(thread, matrix, split, self.first, self.end, sums)

    def begin(self) -> None:
        """The experts are known before the barrier, what they multiply is not."""
        p, a = self.p, self.a
        matrices = ColumnsOfExperts(
            Codes(a["expert_down"], a["expert_down_scales"], p.width), p.hidden, self.before.routed.experts
        )
        self.product = CodesProduct(self.thread, matrices, self.split, self.first, self.end, self.sums)
        self.product.begin(parts.PIECES_IN_FLIGHT - 1)
        if self.of_shared:
            self.of_shared.begin(1)

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        if self.of_shared:
            gate = ptx.offset(a["first"], ptx.constant(p.experts), 4)
            _write_bfloat16(thread, p.shared // 2, _activated(gate, p.shared), parts.to_groups(thread, self.shared_vector))
        self.write_hidden()
        ptx.block_barrier()
        rows = self.product.rows_of_thread()
        before = [_load_bfloat16(a["middle"], ptx.min_s32(row, p.hidden - 1), ptx.load_fresh) for row, _ in rows]
        totals = [ptx.rounded(total) for total in self.product.totals(self.vector)]
        if self.of_shared:
            of_shared = self.of_shared.totals(self.shared_vector)
            totals = [ptx.rounded(x + ptx.rounded(y)) for x, y in zip(totals, of_shared, strict=True)]
        for (row, exists), x, total in zip(rows, before, totals, strict=True):
            ptx.store_global_bfloat16(ptx.offset(a["y"], row, 2), x + total, exists)

    def write_hidden(self) -> None:
        """silu(gate) * up of the experts, one after the other, each multiplied by the expert's weight: by its factors."""
        p, thread = self.p, self.thread
        for i, exists in parts.indices_of_thread(thread, self.split.width // 4):
            slot, hidden = _hidden_of_experts(p, self.a, i)
            top = functools.reduce(ptx.max_s32, map(ptx.magnitude_bits, hidden))
            scale, factor = ptx.float16_scale(ptx.reduce_warp("max", top))
            factor = factor * _select_value(slot, self.before.routed.weights)
            with ptx.when(exists):
                for half in range(2):
                    pair = [x * scale for x in hidden[2 * half : 2 * half + 2]]
                    at = self.vector.numbers + (i << 3) + 4 * half
                    ptx.store_shared(at, ptx.to_float16_pair(*pair))
                with ptx.when(thread.lane.signed < 2):  # 128 numbers of a warp are two groups
                    group = ((i >> 5) << 1) + thread.lane
                    ptx.store_shared(self.vector.factors + (group << 2), ptx.bits_of(factor))


def _hidden_of_experts(p: Outputs, a: Mapping[str, Value], i: Value) -> tuple[Value, list[Value]]:
    """The i-th four of silu(gate) * up of the token's experts, and whose they are, by number among the token's experts."""
    slot, four = i // (p.width // 4), i % (p.width // 4)
    at = ptx.offset(ptx.offset(a["hidden"], slot, 8 * p.width), four, 16)
    gates = [ptx.rounded(ptx.float_of(word)) for word in ptx.load_fresh_words(at)]
    words = ptx.load_fresh_words(ptx.offset(at, ptx.constant(1), 4 * p.width))
    ups = [ptx.rounded(ptx.float_of(word)) for word in words]
    return slot, [ptx.rounded(parts.silu(g) * u) for g, u in zip(gates, ups, strict=True)]


class DenseSecond(Stage):
    """middle + a dense layer's second matrix -> out [D] bfloat16."""

    def __init__(self, p: Outputs, a: Mapping[str, Value], thread: Thread, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        self.product = MatrixProduct(shared, p.shared, parts.largest_block_share(p.hidden), codes=p.mlp_codes)
        if a:
            self.product.of(thread, a["shared_down"], a.get("shared_down_scales"), *parts.block_share(thread, p.hidden))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        _write_bfloat16(thread, p.shared // 2, _activated(a["first"], p.shared), self.product.sink(thread))
        ptx.block_barrier()

        def load(row: Value) -> Value:
            return _load_bfloat16(a["middle"], ptx.min_s32(row, p.hidden - 1), ptx.load_fresh)

        self.product.add_to(load, a["y"])


def _activated(gate: Value, width: int) -> Callable[[Value], tuple[Value, Value]]:
    """pair(i) is silu(gate) * up at 2 i and 2 i + 1; `up` lies `width` float32 numbers after `gate`."""

    def pair(i: Value) -> tuple[Value, Value]:
        gates, ups = parts.fresh_pair(gate)(i), parts.fresh_pair(ptx.offset(gate, ptx.constant(width), 4))(i)
        low, high = (parts.silu(ptx.rounded(g)) * ptx.rounded(u) for g, u in zip(gates, ups, strict=True))
        return low, high

    return pair


# ---- the kernels


def _input_stages(
    p: Inputs, a: Mapping[str, Value], thread: Any, shared: SharedMemory, *, is_first_kernel: bool
) -> list[Down | Up | Absorb]:
    """`is_first_kernel`: no earlier layer's stages have prefetched the matrices."""
    down, up, absorb = Down(p, a, thread, shared), Up(p, a, thread, shared), Absorb(p, a, thread, shared)
    if a:
        if is_first_kernel:
            vectors = functools.partial(parts.prefetch_vectors, thread, _input_vectors(p, a))
            down.prefetches = [vectors, lambda: up.product.prefetch(thread), lambda: absorb.product.prefetch(thread)]
        # The attention between the kernels leaves SMs idle: meanwhile its outputs' first matrices stream to L2.
        absorb.prefetches = [
            lambda: parts.prefetch(thread, a["next_v_up"], 2 * VALUE_DIM, *parts.block_share(thread, p.heads * p.value)),
            functools.partial(_prefetch_out, p, a, thread),
        ]
    return [down, up, absorb]


def _input_vectors(p: Inputs, a: Mapping[str, Value]) -> list[tuple[Value, int]]:
    """Addresses and bytes of the vectors that the stages before an attention read."""
    sizes = {"norm": 2 * p.hidden, "q_norm": 2 * p.q_rank, "kv_norm": 2 * VALUE_DIM, "cos": 2 * ROTARY, "sin": 2 * ROTARY}
    if p.index_heads:
        sizes |= {"key_norm": 2 * INDEX_WIDTH, "key_norm_bias": 2 * INDEX_WIDTH}
    return [(a[name], size) for name, size in sizes.items()]


def _prefetch_out(p: Inputs, a: Mapping[str, Value], thread: Thread) -> None:
    first, end = parts.block_share(thread, p.hidden)
    width = p.heads * p.value
    if "next_out_scales" in a:
        Codes(a["next_out"], a["next_out_scales"], width).prefetch(thread, first, end, parts.largest_block_share(p.hidden))
    else:
        parts.prefetch(thread, a["next_out"], 2 * width, first, end)


def _output_stages(
    p: Outputs, next_layer: Inputs | None, a: Mapping[str, Value], thread: Any, shared: SharedMemory
) -> list[Stage]:
    values, out, first = Values(p, a, thread, shared), Out(p, a, thread, shared), First(p, a, thread, shared)
    stages: list[Stage] = [values, out, first]
    products: Sequence[Product | CodesProduct | MatrixProduct]
    if p.experts and p.mlp_codes:
        assert first.groups is not None
        codes_first = ExpertsFirstInCodes(p, a, thread, shared, first.groups)
        codes_second = ExpertsSecondInCodes(p, a, thread, shared, codes_first)
        stages += [codes_first, codes_second]
        products = [codes_second.of_shared] if codes_second.of_shared else []
    elif p.experts:
        experts_first = ExpertsFirst(p, a, thread, shared, first.vector)
        experts = ExpertsSecond(p, a, thread, shared, experts_first)
        stages += [experts_first, experts]
        products = experts.products if a else []
    else:
        dense = DenseSecond(p, a, thread, shared)
        stages.append(dense)
        products = [dense.product]
    inputs: list[Down | Up | Absorb] = []
    if next_layer is not None:
        inputs = _input_stages(next_layer, {**a, "x": a["y"]} if a else a, thread, shared, is_first_kernel=False)
    if a:
        vectors = [(a["mlp_norm"], 2 * p.hidden)]
        if p.experts:
            vectors.append((a["router_bias"], 4 * p.experts))
        if next_layer is not None:
            vectors += _input_vectors(next_layer, a)
        values.prefetches = [functools.partial(product.prefetch, thread) for product in (*first.products, *products)]
        values.prefetches.append(functools.partial(parts.prefetch_vectors, thread, vectors))
        # While the experts are num_experts_per_token nothing of this layer can stream.
        stages[3].prefetches = [functools.partial(stage.product.prefetch, thread) for stage in inputs]
    return [*stages, *inputs]


def _call_kernel(
    name: str,
    stages: Callable[[Mapping[str, Value], Any, SharedMemory], Sequence[Stage]],
    operands: Mapping[str, Any],
    outs: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Calls a kernel whose `stages` read `operands` and write `outs` and the operands that are references, all by name."""
    sizes = SharedMemory()
    stages({}, None, sizes)
    names = [*operands, *outs, "shared"]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *references, block = values
            *arrays, memory = references
            addresses = {n: ptx.global_address(v) for n, v in zip(names[:-1], arrays, strict=True)}
            thread = Thread.current(ptx.scalar(block))
            _in_sequence(stages(addresses, thread, SharedMemory(ptx.shared_address(memory))), addresses["barrier_count"])

        program(*refs, jax.lax.axis_index("block"))

    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=(plgpu.SMEM((sizes.used // 4,), jnp.int32),),
        grid=(parts.BLOCKS,),
        grid_names=("block",),
        num_threads=parts.THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return dict(zip(outs, kernel(*operands.values()), strict=True))


def _arrays(weights: Mapping[str, jax.Array | Scaled]) -> dict[str, jax.Array]:
    """The weights' arrays by name; a matrix in codes is one of codes and NAME_scales in float32."""
    arrays: dict[str, jax.Array] = {}
    for name, w in weights.items():
        if isinstance(w, Scaled):
            arrays |= {name: w.codes, f"{name}_scales": quant.float_scales(w.scales)}
        else:
            arrays[name] = w
    return arrays


def _inputs(
    hidden: int, layer: AttentionWeights, outputs: Mapping[str, jax.Array | Scaled]
) -> tuple[Inputs, dict[str, Any], dict[str, Any]]:
    """Sizes, operands and outputs of the stages before an attention; `outputs`: the layer's weights for `layer_outputs`."""
    w = layer.weights
    full, scaled = layer.index_keys is not None, layer.index_scales is not None
    p = Inputs(
        hidden=hidden,
        q_rank=w["q_norm"].shape[0],
        heads=w["k_up"].shape[0],
        nope=w["k_up"].shape[2],
        value=outputs["v_up"].shape[1],
        max_len=layer.latents.shape[1],
        eps=layer.eps,
        latent_eps=layer.latent_eps,
        index_heads=w["down"].shape[0] - w["q_norm"].shape[0] - WIDTH - INDEX_WIDTH if full else 0,
        index_scale=layer.index_scale,
        index_interleaved=layer.index_interleaved,
        index_scaled=scaled,
        latents_scaled=isinstance(layer.latents, quant.Latents),
        codes=isinstance(w["up"], Scaled),
    )
    cos, sin = layer.cos_sin
    operands: dict[str, Any] = {
        "position": layer.position,
        "cos": cos,
        "sin": sin,
        **_arrays({"next_v_up": outputs["v_up"], "next_out": outputs["out"], **w}),
    }
    for name, array in layer.caches().items():
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


def _attention_operands(
    layer: AttentionWeights, operands: Mapping[str, Any], outs: Mapping[str, jax.Array]
) -> AttentionOperands:
    caches = {name: jax.freeze(operands[name]) for name in layer.caches()}
    return AttentionOperands(
        outs["queries"],
        latents_of(caches),
        outs.get("index_queries"),
        outs.get("index_weights"),
        caches.get("index_keys"),
        caches.get("index_scales"),
    )


def attention_inputs(
    x: jax.Array, layer: AttentionWeights, outputs: Mapping[str, jax.Array | Scaled], barrier_count: jax.Array
) -> tuple[AttentionOperands, jax.Array]:
    p, operands, outs = _inputs(x.size, layer, outputs)
    operands |= {"x": x, "barrier_count": jax.new_ref(barrier_count)}

    def stages(a: Mapping[str, Value], thread: Any, shared: SharedMemory) -> Sequence[Stage]:
        return _input_stages(p, a, thread, shared, is_first_kernel=True)

    results = _call_kernel("decode_inputs", stages, operands, outs)
    return _attention_operands(layer, operands, results), jax.freeze(operands["barrier_count"])


def layer_outputs(
    x: jax.Array,
    context: jax.Array,
    outputs: Mapping[str, jax.Array | Scaled],
    barrier_count: jax.Array,
    *,
    eps: float,
    choice: Choice | None,
    next_layer: AttentionWeights | None,
    next_outputs: Mapping[str, jax.Array | Scaled] | None,
) -> tuple[jax.Array, AttentionOperands | None, jax.Array]:
    heads, value, _ = outputs["v_up"].shape
    routed = "gate_up" in outputs
    shared_width = outputs["shared_gate_up"].shape[0] // 2 if "shared_gate_up" in outputs else 0
    mlp_codes = isinstance(outputs["gate_up" if routed else "shared_gate_up"], Scaled)
    width = outputs["expert_down"].shape[2 if mlp_codes else 1] if routed else 0
    p = Outputs(
        x.size,
        heads,
        value,
        eps,
        shared_width,
        choice,
        width,
        out_codes=isinstance(outputs["out"], Scaled),
        mlp_codes=mlp_codes,
    )
    operands: dict[str, Any] = {"x": x, "context": context, **_arrays(outputs), "barrier_count": jax.new_ref(barrier_count)}
    outs: dict[str, Any] = {
        "values": jax.ShapeDtypeStruct((heads * value,), jnp.float32),
        "middle": jax.ShapeDtypeStruct((p.hidden,), jnp.bfloat16),
        "first": jax.ShapeDtypeStruct((p.first,), jnp.float32),
        "y": jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
    }
    if routed:
        outs["hidden"] = jax.ShapeDtypeStruct((p.num_experts_per_token * 2 * width,), jnp.float32)
    next_sizes: Inputs | None = None
    if next_layer is not None:
        assert next_outputs is not None
        next_sizes, more_operands, more_outs = _inputs(x.size, next_layer, next_outputs)
        operands, outs = operands | more_operands, outs | more_outs

    def stages(a: Mapping[str, Value], thread: Any, shared: SharedMemory) -> list[Stage]:
        return _output_stages(p, next_sizes, a, thread, shared)

    results = _call_kernel("decode_outputs" if next_sizes is None else "decode_outputs_inputs", stages, operands, outs)
    attention = None if next_layer is None else _attention_operands(next_layer, operands, results)
    return results["y"], attention, jax.freeze(operands["barrier_count"])
