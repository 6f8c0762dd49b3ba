"""The stages after an attention: from a layer's input and the attention's context to its output.

value projection | output projection and residual | norm, router and shared experts' first matrix | the chosen experts' first
matrices | their second ones, the shared experts' and residual; or, of a dense layer, its first matrix | its second and residual

The router's rows and those of the shared experts' first matrix are shared out together, but a thread block has rows of one of
the two, so that a lane keeps the registers of one product. The stages of experts are in `mosaic_gpu_experts` and, with
matrices in codes, in `mosaic_gpu_experts_codes`. Nothing of the experts can be loaded before they are chosen, so the stage
that chooses them copies the next layer's matrices to L2 meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from pallas_kernels.decode_layer.mosaic_gpu_arrays import InputArrays, InputSizes, OutputArrays, OutputSizes
from pallas_kernels.decode_layer.mosaic_gpu_codes import Codes, CodesProduct, GroupedVector, TileSplit, to_groups
from pallas_kernels.decode_layer.mosaic_gpu_experts import ExpertsFirst, ExpertsSecond, activated
from pallas_kernels.decode_layer.mosaic_gpu_experts_codes import ExpertsFirstInCodes, ExpertsSecondInCodes
from pallas_kernels.decode_layer.mosaic_gpu_inputs import Absorb, Down, Up, input_stages, input_vectors
from pallas_kernels.decode_layer.mosaic_gpu_products import Product
from pallas_kernels.decode_layer.mosaic_gpu_stages import (
    MatrixProduct,
    Stage,
    bfloat16_pair,
    float32_sink,
    load_bfloat16,
    write_bfloat16,
)
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import BlockRows, SharedMemory, Thread
from pallas_kernels.hopper.ptx import Float, Predicate, Word
from pallas_kernels.latents import VALUE_DIM

# Loads and pieces of codes that a lane and a warp have in flight where a stage has a matrix in bfloat16 and one in codes.
MIXED_LOADS, MIXED_PIECES = 8, 2


class Values(Stage):
    """Each head's context times its value matrix -> values [H dv] float32."""

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory):
        self.p = p
        self.vectors = shared.allocate(2 * 2 * VALUE_DIM)

    def prepare(self) -> None:
        rows = self.p.heads * self.p.value
        self.first, end = persistent.block_share(self.thread, rows)
        self.product = Product(self.thread, self.a.v_up, VALUE_DIM, self.first, end, persistent.largest_block_share(rows))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p = self.p
        # A share has at most `value` rows, so it is of one head or two.
        head = ptx.min_s32(self.first // p.value, p.heads - 1)
        last = p.heads * VALUE_DIM // 2 - 1
        sink = persistent.to_shared(self.vectors)
        for i, exists in persistent.indices_of_thread(self.thread, VALUE_DIM):
            word = ptx.min_s32(head * (VALUE_DIM // 2) + i, last)
            sink(i, ptx.load_global(ptx.offset(self.a.context, word, 4)), exists)
        ptx.block_barrier()

        def vector(row: Word) -> Word:
            local = ptx.min_s32(row // p.value - head, 1)
            return self.vectors + local * (2 * VALUE_DIM)

        self.product.finish(vector, float32_sink(self.a.values))


class Out(Stage):
    """x + the output projection -> middle [D] bfloat16."""

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory):
        self.p = p
        most = persistent.largest_block_share(p.hidden)
        self.product = MatrixProduct(shared, p.heads * p.value, most, codes=p.out_codes)

    def prepare(self) -> None:
        a, thread = self.a, self.thread
        self.product.take_rows(thread, a.out, a.out_scales, *persistent.block_share(thread, self.p.hidden))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a = self.p, self.a
        write_bfloat16(self.thread, p.heads * p.value // 2, persistent.fresh_pair(a.values), self.product.sink(self.thread))
        ptx.block_barrier()

        def load(row: Word) -> Float:
            return load_bfloat16(a.x, ptx.min_s32(row, p.hidden - 1), ptx.load_global)

        self.product.add_to(load, a.middle)


class First(Stage):
    """norm(middle) times the router and the shared experts' first matrix, or a dense layer's -> first float32.

    vector, groups: norm(middle) in shared memory as bfloat16 and for codes, where this stage or the next one needs it.
    """

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory):
        self.p = p
        self.counts = [count for count in (p.experts, 2 * p.shared) if count]
        self.vector: Any = shared.allocate(2 * p.hidden) if p.experts or not p.mlp_codes else None
        self.sums = shared.allocate(64)
        self.groups = GroupedVector.allocate(shared, p.hidden) if p.mlp_codes else None
        self.row_bytes = (2 * p.hidden, p.hidden) if p.mlp_codes else (1, 1)
        self.most = persistent.largest_block_shares(self.counts, row_bytes=self.row_bytes)
        self.split = TileSplit(p.hidden, self.most[-1]) if p.mlp_codes and p.shared else None
        self.codes_sums: Any = shared.allocate(self.split.sums_bytes) if self.split else None

    def prepare(self) -> None:
        p, a, thread, split = self.p, self.a, self.thread, self.split
        matrices = [matrix for matrix, count in ((a.router, p.experts), (a.shared_gate_up, p.shared)) if count]
        self.rows = rows = BlockRows.of(thread, list(zip(matrices, self.counts, strict=True)), row_bytes=self.row_bytes)
        self.of_bfloat16: Product | None = None
        self.of_codes: CodesProduct | None = None
        if split is None:
            self.of_bfloat16 = Product(thread, rows.matrix, p.hidden, rows.first, rows.end, rows.most)
        elif not p.experts:
            matrix = Codes(rows.matrix, a.shared_gate_up_scales, p.hidden)
            self.of_codes = CodesProduct(thread, matrix, split, rows.first, rows.end, self.codes_sums)
        else:  # a thread block has rows of one of the two; fewer loads in flight leave registers for both
            end = ptx.select(rows.is_first, rows.end, rows.first)
            self.of_bfloat16 = Product(thread, a.router, p.hidden, rows.first, end, self.most[0], MIXED_LOADS)
            end = ptx.select(rows.is_first, rows.first, rows.end)
            matrix = Codes(a.shared_gate_up, a.shared_gate_up_scales, p.hidden)
            self.of_codes = CodesProduct(thread, matrix, split, rows.first, end, self.codes_sums, MIXED_PIECES)
        self.products = [product for product in (self.of_bfloat16, self.of_codes) if product is not None]

    def begin(self) -> None:
        for product in self.products:
            product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        sinks = [] if self.vector is None else [persistent.to_shared(self.vector)]
        if self.groups is not None:
            sinks.append(to_groups(thread, self.groups))

        def sink(i: Word, word: Word, exists: Predicate) -> None:
            for keep in sinks:
                keep(i, word, exists)

        pair = bfloat16_pair(a.middle, ptx.load_fresh)
        persistent.normalise(thread, p.hidden // 2, pair, a.mlp_norm, p.eps, self.sums, sink, in_bfloat16=True)
        ptx.block_barrier()
        emit = float32_sink(ptx.offset(a.first, self.rows.offset, 4))
        is_first = self.rows.is_first
        if self.of_bfloat16 is not None:
            with contextlib.nullcontext() if self.of_codes is None else ptx.when(is_first):
                self.of_bfloat16.finish(lambda row: self.vector, emit)
        if self.of_codes is not None:
            assert self.groups is not None
            is_second = None if self.of_bfloat16 is None else ptx.select(is_first, 1, 0).equals(0)
            with contextlib.nullcontext() if is_second is None else ptx.when(is_second):
                self.of_codes.finish(self.groups, emit)


class DenseSecond(Stage):
    """middle + a dense layer's second matrix -> y [D] bfloat16."""

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory):
        self.p = p
        self.product = MatrixProduct(shared, p.shared, persistent.largest_block_share(p.hidden), codes=p.mlp_codes)

    def prepare(self) -> None:
        a, thread = self.a, self.thread
        self.product.take_rows(thread, a.shared_down, a.shared_down_scales, *persistent.block_share(thread, self.p.hidden))

    def begin(self) -> None:
        self.product.begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        write_bfloat16(thread, p.shared // 2, activated(a.first, p.shared), self.product.sink(thread))
        ptx.block_barrier()

        def load(row: Word) -> Float:
            return load_bfloat16(a.middle, ptx.min_s32(row, p.hidden - 1), ptx.load_fresh)

        self.product.add_to(load, a.y)


def output_stages(
    p: OutputSizes,
    a: OutputArrays | None,
    next_sizes: InputSizes | None,
    next_arrays: InputArrays | None,
    thread: Thread | None,
    shared: SharedMemory,
) -> list[Stage]:
    """The stages of a layer, followed by the next layer's `input_stages` where it has sizes."""
    values, out = Values(p, shared).bound(a, thread), Out(p, shared).bound(a, thread)
    first = First(p, shared).bound(a, thread)
    mlp, products = _mlp_stages(p, a, thread, shared, first)
    inputs: list[Down | Up | Absorb] = []
    if next_sizes is not None:
        inputs = input_stages(next_sizes, next_arrays, thread, shared, is_first_kernel=False)
    if a is not None and thread is not None:
        vectors = [(a.mlp_norm, 2 * p.hidden)]
        if p.experts:
            vectors.append((a.router_bias, 4 * p.experts))
        if next_sizes is not None and next_arrays is not None:
            vectors += input_vectors(next_sizes, next_arrays)
        values.prefetches = [functools.partial(product.prefetch, thread) for product in (*first.products, *products)]
        values.prefetches.append(functools.partial(persistent.prefetch_vectors, thread, vectors))
        # While the experts are being chosen nothing of this layer can stream.
        mlp[0].prefetches = [functools.partial(stage.product.prefetch, thread) for stage in inputs]
    return [values, out, first, *mlp, *inputs]


def _mlp_stages(
    p: OutputSizes, a: OutputArrays | None, thread: Thread | None, shared: SharedMemory, first: First
) -> tuple[list[Stage], Sequence[Product | CodesProduct | MatrixProduct]]:
    """The stages after `first`, and the products of the last one whose matrices are known before the experts are."""
    if not p.experts:
        dense = DenseSecond(p, shared).bound(a, thread)
        return [dense], [dense.product]
    if p.mlp_codes:
        assert first.groups is not None
        codes_first = ExpertsFirstInCodes(p, shared, first.groups).bound(a, thread)
        codes_second = ExpertsSecondInCodes(p, shared, codes_first).bound(a, thread)
        return [codes_first, codes_second], [codes_second.of_shared] if codes_second.of_shared else []
    experts_first = ExpertsFirst(p, shared, first.vector).bound(a, thread)
    experts_second = ExpertsSecond(p, shared, experts_first).bound(a, thread)
    return [experts_first, experts_second], experts_second.products
