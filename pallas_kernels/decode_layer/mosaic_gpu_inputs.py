"""The stages before an attention: from a layer's input to its queries and the token's place in the caches.

norm and the projections down | latent norms, the token's cache rows, the projections up | absorption, rope, index queries

The projections of one stage lie below each other, so that a thread block has an even share of all their rows. What is no
product is small: one thread block writes the caches and applies rope to the queries, another one makes the index queries, and
these two take no rows (ROPE_BLOCK, INDEX_BLOCK), or the whole grid would wait for them. A share of the absorbed queries is of
one head or two, so a thread block needs no other head's query.
"""

from __future__ import annotations

import functools

from pallas_kernels.decode_layer.mosaic_gpu_arrays import INDEX_WIDTH, InputArrays, InputSizes
from pallas_kernels.decode_layer.mosaic_gpu_codes import Codes
from pallas_kernels.decode_layer.mosaic_gpu_products import Product
from pallas_kernels.decode_layer.mosaic_gpu_stages import (
    MatrixProduct,
    Stage,
    bfloat16_pair,
    float32_sink,
    load_float32,
    rounded_sink,
    write_bfloat16,
)
from pallas_kernels.decode_layer.mosaic_gpu_token import Token, rotate_front, rotate_pair, store_index_vector
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import BlockRows, SharedMemory, Thread
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH

# Thread blocks, counted from the last, that apply rope or make index queries instead of taking rows of a matrix.
ROPE_BLOCK, INDEX_BLOCK = 1, 2


class Down(Stage):
    """norm(x) times the projections down -> down_out [Nd] float32."""

    a: InputArrays

    def __init__(self, p: InputSizes, shared: SharedMemory):
        self.p = p
        self.vector, self.sums = shared.allocate(2 * p.hidden), shared.allocate(64)

    def prepare(self) -> None:
        count = self.p.down
        first, end = persistent.block_share(self.thread, count)
        most = persistent.largest_block_share(count)
        self.product = Product(self.thread, self.a.down, self.p.hidden, first, end, most)

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        pair = bfloat16_pair(self.a.x, ptx.load_fresh)
        sink = persistent.to_shared(self.vector)
        eps = self.p.eps
        persistent.normalise(self.thread, self.p.hidden // 2, pair, self.a.norm, eps, self.sums, sink, in_bfloat16=True)
        ptx.block_barrier()
        self.product.finish(lambda row: self.vector, float32_sink(self.a.down_out))


class Up(Stage):
    """The query latent times the projections up -> up_out [Nu] float32; one thread block writes the token to the caches."""

    a: InputArrays

    def __init__(self, p: InputSizes, shared: SharedMemory):
        self.p = p
        self.counts = [count for count in (p.heads * p.head_dim, p.index_heads * INDEX_WIDTH) if count]
        most = max(persistent.largest_block_shares(self.counts, ROPE_BLOCK))
        self.product = MatrixProduct(shared, p.q_rank, most, codes=p.codes)
        self.sums, self.token = shared.allocate(64), Token(p, shared)

    def prepare(self) -> None:
        a, thread = self.a, self.thread
        self.rows = rows = BlockRows.of(thread, list(zip((a.up, a.index_up), self.counts, strict=False)), ROPE_BLOCK)
        scales = a.up_scales
        if self.p.codes and rows.is_first is not None:
            scales = ptx.select(rows.is_first, scales, a.index_up_scales)
        self.product.take_rows(thread, rows.matrix, scales, rows.first, rows.end)

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        pair, sink = persistent.fresh_pair(a.down_out), self.product.sink(thread)
        persistent.normalise(thread, p.q_rank // 2, pair, a.q_norm, p.latent_eps, self.sums, sink, in_bfloat16=False)
        ptx.block_barrier()
        self.product.finish(rounded_sink(ptx.offset(a.up_out, self.rows.offset, 4)))
        with ptx.when(thread.is_block_from_end(ROPE_BLOCK)):
            self.token.write(a, thread, ptx.min_s32(ptx.load_global(a.position), p.max_len - 1))


class Absorb(Stage):
    """Queries [H, 576]: each head's part without rope times its key matrix, and the rotated part; index queries."""

    a: InputArrays

    def __init__(self, p: InputSizes, shared: SharedMemory):
        self.p = p
        self.vectors = shared.allocate(2 * 2 * p.nope)

    def prepare(self) -> None:
        rows = self.p.heads * VALUE_DIM
        self.first, end = persistent.block_share(self.thread, rows, INDEX_BLOCK)
        most = persistent.largest_block_share(rows, INDEX_BLOCK)
        self.product = Product(self.thread, self.a.k_up, self.p.nope, self.first, end, most)

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        # A share is below VALUE_DIM rows, so it is of one head or two.
        head = ptx.min_s32(self.first // VALUE_DIM, p.heads - 1)
        pairs = p.nope // 2

        def pair(i: Word) -> tuple[Float, Float]:
            which = ptx.min_s32(head + i // pairs, p.heads - 1)
            return persistent.fresh_pair(a.up_out)(which * (p.head_dim // 2) + i % pairs)

        write_bfloat16(thread, 2 * pairs, pair, persistent.to_shared(self.vectors))
        ptx.block_barrier()

        def vector(row: Word) -> Word:
            local = ptx.min_s32(row // VALUE_DIM - head, 1)
            return self.vectors + local * (2 * p.nope)

        def emit(row: Word, total: Float, stores: Predicate) -> None:
            at = row + row // VALUE_DIM * ROTARY
            ptx.store_global_bfloat16(ptx.offset(a.queries, at, 2), total, stores)

        self.product.finish(vector, emit)
        with ptx.when(thread.is_block_from_end(ROPE_BLOCK)):
            self.rotate()
        if p.index_heads:
            with ptx.when(thread.is_block_from_end(INDEX_BLOCK)):
                self.index_queries()

    def rotate(self) -> None:
        p, a = self.p, self.a
        for i, exists in persistent.indices_of_thread(self.thread, p.heads * ROTARY // 2):
            head, j = i >> 5, i & 31
            source = head * (p.head_dim // 2) + p.nope // 2 + j
            rotated_pair = rotate_pair(a.cos, a.sin, j, *persistent.fresh_pair(a.up_out)(source))
            target = head * (WIDTH // 2) + VALUE_DIM // 2 + j
            ptx.store_global(ptx.offset(a.queries, target, 4), ptx.to_bfloat16_pair(*rotated_pair), exists)

    def index_queries(self) -> None:
        """Rope on the index queries, a warp each, and their heads' weights with the scales of queries in 8 bits."""
        p, a, thread = self.p, self.a, self.thread
        queries = ptx.offset(a.up_out, ptx.constant(p.heads * p.head_dim), 4)
        weights = ptx.offset(a.down_out, ptx.constant(p.latent_end + INDEX_WIDTH), 4)
        for r in range(-(-p.index_heads // persistent.WARPS)):
            head = thread.warp + r * persistent.WARPS
            with ptx.when(head.signed < p.index_heads):
                at = ptx.offset(ptx.offset(queries, head, 4 * INDEX_WIDTH), thread.lane, 16)
                query = [ptx.float_of(word) for word in ptx.load_fresh_words(at)]
                query = rotate_front(p, a, thread.lane, query)
                scale = store_index_vector(p, query, thread.lane, a.index_queries, head, None)
                weight = load_float32(weights, head) * p.index_scale
                if scale is not None:
                    weight = weight * scale
                leads = thread.lane.equals(0)
                ptx.store_global(ptx.offset(a.index_weights, head, 4), ptx.bits_of(weight), leads)


def input_stages(
    p: InputSizes, a: InputArrays | None, thread: Thread | None, shared: SharedMemory, *, is_first_kernel: bool
) -> list[Down | Up | Absorb]:
    """The stages before an attention, with what they prefetch once arrays and thread are known.

    is_first_kernel: no earlier layer's stages have prefetched the matrices.
    """
    down, up = Down(p, shared).bound(a, thread), Up(p, shared).bound(a, thread)
    absorb = Absorb(p, shared).bound(a, thread)
    if a is not None and thread is not None:
        if is_first_kernel:
            vectors = functools.partial(persistent.prefetch_vectors, thread, input_vectors(p, a))
            down.prefetches = [vectors, lambda: up.product.prefetch(thread), lambda: absorb.product.prefetch(thread)]
        # The attention between the kernels leaves SMs idle: meanwhile its outputs' first matrices stream to L2.
        share = functools.partial(persistent.block_share, thread)
        absorb.prefetches = [
            lambda: persistent.prefetch(thread, a.next_v_up, 2 * VALUE_DIM, *share(p.heads * p.value)),
            functools.partial(_prefetch_out, p, a, thread),
        ]
    return [down, up, absorb]


def input_vectors(p: InputSizes, a: InputArrays) -> list[tuple[Address, int]]:
    """Addresses and bytes of the vectors that these stages read."""
    vectors = [(a.norm, 2 * p.hidden), (a.q_norm, 2 * p.q_rank), (a.kv_norm, 2 * VALUE_DIM)]
    vectors += [(a.cos, 2 * ROTARY), (a.sin, 2 * ROTARY)]
    if p.index_heads:
        vectors += [(a.key_norm, 2 * INDEX_WIDTH), (a.key_norm_bias, 2 * INDEX_WIDTH)]
    return vectors


def _prefetch_out(p: InputSizes, a: InputArrays, thread: Thread) -> None:
    first, end = persistent.block_share(thread, p.hidden)
    width = p.heads * p.value
    if a.next_out_scales is not None:
        Codes(a.next_out, a.next_out_scales, width).prefetch(thread, first, end, persistent.largest_block_share(p.hidden))
    else:
        persistent.prefetch(thread, a.next_out, 2 * width, first, end)
