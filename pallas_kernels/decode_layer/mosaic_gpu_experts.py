"""A token's experts: which they are, and the stages of their matrices in bfloat16.

Every warp chooses the experts for itself from the router's logits, a lane the scores of every 32nd expert, so that no barrier
stands between the choice and the loads that depend on it. Matrices are stored [inputs, outputs], so a result is a sum down a
column. A unit of work is all rows of a few columns: 32 columns of an expert's first matrix, 16 of the second matrices of all
the token's experts, which are one sum. They are so narrow because there must be about as many units as thread blocks, or
more, and so wide because 64 or 32 bytes of a row are read at once.

The second stage multiplies the shared experts' rows that belong to its columns too, and adds the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pallas_kernels.decode_layer.mosaic_gpu_arrays import OutputArrays, OutputSizes
from pallas_kernels.decode_layer.mosaic_gpu_products import (
    Columns,
    Product,
    WeightedRows,
    load_column_sum,
    store_column_sums,
)
from pallas_kernels.decode_layer.mosaic_gpu_stages import Stage, half_of, load_bfloat16, load_float32, write_bfloat16
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import Pair, SharedMemory, Thread
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word
from pallas_kernels.routing.mosaic_gpu_choice import choose

EXPERT_LANES, OUTPUT_LANES = 4, 2  # lanes across the columns of a unit: 32 of the experts' first, 16 of their second matrix

Register = TypeVar("Register", Word, Float)


class RoutedExperts:
    """The token's experts and their weights, computed by every warp for itself."""

    def __init__(self, p: OutputSizes, a: OutputArrays, thread: Thread):
        def bias(number: Word) -> Float:
            return ptx.float_of(ptx.load_global(ptx.offset(a.router_bias, number, 4)))

        assert p.choice is not None
        self.experts, self.weights = choose(thread, p.choice, lambda number: load_float32(a.first, number), bias)


def select_value(number: Word, values: Sequence[Register]) -> Register:
    """values[number], by selects."""
    selected = values[0]
    for i, value in enumerate(values[1:], 1):
        selected = ptx.select(number.equals(i), value, selected)
    return selected


class ExpertsFirst(Stage):
    """norm(middle) times the chosen experts' first matrices -> hidden [k 2I] float32. `vector`: norm(middle), from `First`."""

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory, vector: Word):
        self.p, self.vector = p, vector
        self.columns = 8 * EXPERT_LANES
        self.units = p.num_experts_per_token * 2 * p.width // self.columns
        self.rounds = -(-self.units // persistent.BLOCKS)
        self.sums = shared.allocate(self.rounds * persistent.WARPS * 32 * EXPERT_LANES)

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        self.routed = RoutedExperts(p, a, thread)
        experts = self.routed.experts
        of_expert, row_bytes = 2 * p.width // self.columns, 2 * 2 * p.width
        round_bytes = persistent.WARPS * 32 * EXPERT_LANES  # bytes of sums

        def factor(row: Word) -> Float:
            return half_of(ptx.load_shared(self.vector + ((row >> 1) << 2)), row)

        def sum_unit(unit: Word, sums: Word) -> None:
            expert = select_value(unit // of_expert, experts)
            base = ptx.offset(a.gate_up, expert, p.hidden * row_bytes)
            base = ptx.offset(base, unit % of_expert, 2 * self.columns)
            columns = Columns(thread, [WeightedRows(base, factor)], p.hidden, row_bytes, EXPERT_LANES)
            store_column_sums(thread, columns.finish(), EXPERT_LANES, sums)

        for r in range(self.rounds):
            unit = thread.block + r * persistent.BLOCKS
            with ptx.when(unit.signed < self.units):
                sum_unit(unit, self.sums + r * round_bytes)
        ptx.block_barrier()
        for column, exists in persistent.indices_of_thread(thread, self.rounds * self.columns):
            which, local = column // self.columns, column % self.columns
            unit = thread.block + which * persistent.BLOCKS
            total = load_column_sum(local, EXPERT_LANES, self.sums + which * round_bytes)
            stores = exists & (unit.signed < self.units)
            at = unit * self.columns + local
            ptx.store_global(ptx.offset(a.hidden, at, 4), ptx.bits_of(total), stores)


class ExpertsSecond(Stage):
    """middle + experts + shared experts -> y [D] bfloat16. A thread block computes 16 columns of it."""

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory, experts_first: ExpertsFirst):
        self.p, self.before = p, experts_first
        self.width = 8 * OUTPUT_LANES
        self.units = p.hidden // self.width
        self.rounds = -(-self.units // persistent.BLOCKS)
        self.vector = shared.allocate(4 * p.num_experts_per_token * p.width)
        self.shared_vector = shared.allocate(2 * max(8, p.shared))
        self.sums, self.shared_sums = shared.allocate(persistent.WARPS * 32 * OUTPUT_LANES), shared.allocate(4 * self.width)
        self.products: list[Product] = []

    def prepare(self) -> None:
        if self.p.shared:
            self.products = [self.product(r) for r in range(self.rounds)]

    def first(self, r: int) -> Word:
        """The first column of the block's 16 in round r; blocks without any read the last ones."""
        unit = self.thread.block + r * persistent.BLOCKS
        return ptx.min_s32(unit, self.units - 1) * self.width

    def exists(self, r: int) -> Predicate:
        return (self.thread.block + r * persistent.BLOCKS).signed < self.units

    def product(self, r: int) -> Product:
        first = self.first(r)
        end = ptx.select(self.exists(r), first + self.width, first)
        return Product(self.thread, self.a.shared_down, self.p.shared, first, end, self.width)

    def columns(self, r: int) -> Columns:
        p, pieces = self.p, []
        for slot, expert in enumerate(self.before.routed.experts):
            base = ptx.offset(self.a.expert_down, expert, 2 * p.width * p.hidden)
            vector = self.vector + 4 * p.width * slot

            def factor(row: Word, vector: Word = vector) -> Float:
                return ptx.float_of(ptx.load_shared(vector + (row << 2)))

            pieces.append(WeightedRows(ptx.offset(base, self.first(r), 2), factor))
        return Columns(self.thread, pieces, p.width, 2 * p.hidden, OUTPUT_LANES)

    def begin(self) -> None:
        """The experts are known before the barrier, what they multiply is not."""
        self.first_columns = self.columns(0)
        self.first_columns.begin()
        if self.products:
            self.products[0].begin()

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        if p.shared:
            gate = ptx.offset(a.first, ptx.constant(p.experts), 4)
            write_bfloat16(thread, p.shared // 2, activated(gate, p.shared), persistent.to_shared(self.shared_vector))
        for i, exists in persistent.indices_of_thread(thread, p.num_experts_per_token * p.width // 4):
            slot, hidden = hidden_of_experts(p, a, i)
            weight = select_value(slot, self.before.routed.weights)
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
        store_column_sums(thread, columns.finish(), OUTPUT_LANES, self.sums)
        if p.shared:

            def emit(row: Word, total: Float, stores: Predicate) -> None:
                with ptx.when(stores):
                    at = self.shared_sums + ((row - first) << 2)
                    ptx.store_shared(at, ptx.bits_of(ptx.rounded(total)))

            if r:
                self.products[r].begin()
            self.products[r].finish(lambda row: self.shared_vector, emit)
        ptx.block_barrier()
        with ptx.when(exists & (thread.index.signed < self.width)):
            total = ptx.rounded(load_column_sum(thread.index, OUTPUT_LANES, self.sums))
            if p.shared:
                at = self.shared_sums + (thread.index << 2)
                total = ptx.rounded(total + ptx.float_of(ptx.load_shared(at)))
            row = first + thread.index
            total = load_bfloat16(a.middle, row, ptx.load_fresh) + total
            ptx.store_global_bfloat16(ptx.offset(a.y, row, 2), total, exists)
        if r + 1 < self.rounds:
            ptx.block_barrier()


def hidden_of_experts(p: OutputSizes, a: OutputArrays, i: Word) -> tuple[Word, list[Float]]:
    """The i-th four of silu(gate) * up of the token's experts, and whose they are, by number among the token's experts."""
    slot, four = i // (p.width // 4), i % (p.width // 4)
    at = ptx.offset(ptx.offset(a.hidden, slot, 8 * p.width), four, 16)
    gates = [ptx.rounded(ptx.float_of(word)) for word in ptx.load_fresh_words(at)]
    words = ptx.load_fresh_words(ptx.offset(at, ptx.constant(1), 4 * p.width))
    ups = [ptx.rounded(ptx.float_of(word)) for word in words]
    return slot, [ptx.rounded(persistent.silu(g) * u) for g, u in zip(gates, ups, strict=True)]


def activated(gate: Address, width: int) -> Pair:
    """pair(i) is silu(gate) * up at 2 i and 2 i + 1; `up` lies `width` float32 numbers after `gate`."""

    def pair(i: Word) -> tuple[Float, Float]:
        gates, ups = persistent.fresh_pair(gate)(i), persistent.fresh_pair(ptx.offset(gate, ptx.constant(width), 4))(i)
        low, high = (persistent.silu(ptx.rounded(g)) * ptx.rounded(u) for g, u in zip(gates, ups, strict=True))
        return low, high

    return pair
