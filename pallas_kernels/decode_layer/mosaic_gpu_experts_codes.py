"""The stages of a token's experts with matrices in codes.

Codes are stored [outputs, inputs], so results are rows, and tensor cores multiply them as in `mosaic_gpu_codes`. The first
matrices of the token's experts are taken as one matrix whose rows lie below each other, which the thread blocks share evenly.
The second ones are taken as one matrix whose columns lie beside each other: a row's sum over them is the sum over the
experts, since each expert's part of the vector is multiplied by its weight, through the factors of its groups of 64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from pallas_kernels.decode_layer.mosaic_gpu_arrays import OutputArrays, OutputSizes
from pallas_kernels.decode_layer.mosaic_gpu_codes import (
    PIECES_IN_FLIGHT,
    SCALE_BLOCK,
    Codes,
    CodesProduct,
    GroupedVector,
    TileSplit,
    to_groups,
)
from pallas_kernels.decode_layer.mosaic_gpu_experts import RoutedExperts, activated, hidden_of_experts, select_value
from pallas_kernels.decode_layer.mosaic_gpu_stages import Stage, float32_sink, load_bfloat16, write_bfloat16
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import SharedMemory
from pallas_kernels.hopper.ptx import Address, Word


@dataclasses.dataclass(frozen=True)
class RowsOfExperts:
    """The matrices of some experts below each other, `rows` rows of each; `all_matrices`: those of all experts."""

    all_matrices: Codes
    rows: int
    experts: Sequence[Word]

    def piece(self, row: Word, piece: Word, step: int) -> tuple[Address, Address]:
        expert = select_value(row // self.rows, self.experts)
        return self.all_matrices.piece(expert * self.rows + row % self.rows, piece, step)


@dataclasses.dataclass(frozen=True)
class ColumnsOfExperts:
    """The matrices of some experts beside each other, `rows` rows in all."""

    all_matrices: Codes
    rows: int
    experts: Sequence[Word]

    def piece(self, row: Word, piece: Word, step: int) -> tuple[Address, Address]:
        pieces, piece = self.all_matrices.width // SCALE_BLOCK, piece + step
        expert = select_value(piece // pieces, self.experts)
        return self.all_matrices.piece(expert * self.rows + row, piece % pieces, 0)


class ExpertsFirstInCodes(Stage):
    """Does what `ExpertsFirst` does, with matrices [E, 2, I, D] in codes. `vector`: norm(middle), from `First`."""

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory, vector: GroupedVector):
        self.p, self.vector = p, vector
        self.rows = p.num_experts_per_token * 2 * p.width
        self.split = TileSplit(p.hidden, persistent.largest_block_share(self.rows))
        self.sums = shared.allocate(self.split.sums_bytes)

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        self.routed = RoutedExperts(p, a, thread)
        matrices = RowsOfExperts(Codes(a.gate_up, a.gate_up_scales, p.hidden), 2 * p.width, self.routed.experts)
        product = CodesProduct(thread, matrices, self.split, *persistent.block_share(thread, self.rows), self.sums)
        product.begin()
        product.finish(self.vector, float32_sink(a.hidden))


class ExpertsSecondInCodes(Stage):
    """Does what `ExpertsSecond` does, with matrices in codes: [E, D, I] of the experts, [D, Is] of the shared ones."""

    a: OutputArrays

    def __init__(self, p: OutputSizes, shared: SharedMemory, experts_first: ExpertsFirstInCodes):
        self.p, self.before = p, experts_first
        most = persistent.largest_block_share(p.hidden)
        self.split = TileSplit(p.num_experts_per_token * p.width, most)
        self.vector, self.sums = GroupedVector.allocate(shared, self.split.width), shared.allocate(self.split.sums_bytes)
        self.of_shared: CodesProduct | None = None
        if p.shared:
            self.shared_split = TileSplit(p.shared, most)
            self.shared_vector = GroupedVector.allocate(shared, p.shared)
            self.shared_sums = shared.allocate(self.shared_split.sums_bytes)

    def prepare(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        self.first, self.end = persistent.block_share(thread, p.hidden)
        if p.shared:
            matrix = Codes(a.shared_down, a.shared_down_scales, p.shared)
            self.of_shared = CodesProduct(thread, matrix, self.shared_split, self.first, self.end, self.shared_sums)

    def begin(self) -> None:
        """The experts are known before the barrier, what they multiply is not."""
        p, a = self.p, self.a
        matrices = ColumnsOfExperts(Codes(a.expert_down, a.expert_down_scales, p.width), p.hidden, self.before.routed.experts)
        self.product = CodesProduct(self.thread, matrices, self.split, self.first, self.end, self.sums)
        self.product.begin(PIECES_IN_FLIGHT - 1)
        if self.of_shared:
            self.of_shared.begin(1)

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread
        if self.of_shared:
            gate = ptx.offset(a.first, ptx.constant(p.experts), 4)
            write_bfloat16(thread, p.shared // 2, activated(gate, p.shared), to_groups(thread, self.shared_vector))
        self.write_hidden()
        ptx.block_barrier()
        rows = self.product.rows_of_thread()
        before = [load_bfloat16(a.middle, ptx.min_s32(row, p.hidden - 1), ptx.load_fresh) for row, _ in rows]
        totals = [ptx.rounded(total) for total in self.product.totals(self.vector)]
        if self.of_shared:
            of_shared = self.of_shared.totals(self.shared_vector)
            totals = [ptx.rounded(x + ptx.rounded(y)) for x, y in zip(totals, of_shared, strict=True)]
        for (row, exists), x, total in zip(rows, before, totals, strict=True):
            ptx.store_global_bfloat16(ptx.offset(a.y, row, 2), x + total, exists)

    def write_hidden(self) -> None:
        """silu(gate) * up of the experts, one after the other, each multiplied by the expert's weight: by its factors."""
        p, thread = self.p, self.thread
        for i, exists in persistent.indices_of_thread(thread, self.split.width // 4):
            slot, hidden = hidden_of_experts(p, self.a, i)
            top = functools.reduce(ptx.max_s32, map(ptx.magnitude_bits, hidden))
            scale, factor = ptx.float16_scale(ptx.reduce_warp("max", top))
            factor = factor * select_value(slot, self.before.routed.weights)
            with ptx.when(exists):
                for half in range(2):
                    pair = [x * scale for x in hidden[2 * half : 2 * half + 2]]
                    at = self.vector.numbers + (i << 3) + 4 * half
                    ptx.store_shared(at, ptx.to_float16_pair(*pair))
                with ptx.when(thread.lane.signed < 2):  # 128 numbers of a warp are two groups
                    group = ((i >> 5) << 1) + thread.lane
                    ptx.store_shared(self.vector.factors + (group << 2), ptx.bits_of(factor))
