"""Products of matrices of e4m3 codes and a vector by a thread block.

Codes are half the bytes of bfloat16, so a lane has no time to decode and multiply them one by one: tensor cores do. A warp
decodes 16 rows x 128 codes to float16, which is exact, and multiplies them by the same part of the vector; of the product's
8 columns it needs one, but nothing else is as quick. The vector is float16 with a power-of-two factor for every 64 numbers
(`GroupedVector`), because float16 alone has too little range. Sums are multiplied by the factors, then by the codes' scales,
in float32.

The warps of a block divide rows and columns so that all have the same number of pieces, or nearly (`TileSplit`). A warp
loads pieces ahead into registers, as many as these hold, the first of them before the vector is known (`begin`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import WARPS, Emit, SharedMemory, Sink, Thread
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word

SCALE_BLOCK = 128  # rows and columns of codes that share a scale
TILE_ROWS = 16  # of codes, that a warp multiplies at once
GROUP = 64  # numbers of a vector in float16 that share a factor
PIECES_IN_FLIGHT = 4  # of 16 x 128 codes, by a warp: 72 registers of a lane


def prefetch_scales(thread: Thread, scales: Address, row_bytes: int, first: Word, end: Word, most: int) -> None:
    """Copies the scales of rows first .. end - 1, at most `most`, of a matrix of codes to L2."""
    first_byte = first // SCALE_BLOCK * row_bytes
    end_byte = (end + (SCALE_BLOCK - 1)) // SCALE_BLOCK * row_bytes
    for i, exists in persistent.indices_of_thread(thread, -(-(-(-most // SCALE_BLOCK) + 1) * row_bytes // 128)):
        at = first_byte + (i << 7)
        ptx.prefetch_line(ptx.offset(scales, at, 1), exists & (at.signed < end_byte))


@dataclasses.dataclass(frozen=True)
class GroupedVector:
    """A vector in shared memory, to be multiplied by codes: numbers in float16 and a float32 factor for every 64 of them.

    The factors are powers of two, those of `ptx.float16_scale`.
    """

    numbers: Word
    factors: Word

    @staticmethod
    def allocate(shared: SharedMemory, size: int) -> GroupedVector:
        return GroupedVector(shared.allocate(2 * size), shared.allocate(4 * (size // GROUP)))


def to_groups(thread: Thread, vector: GroupedVector) -> Sink:
    """A sink that keeps word i, two bfloat16, as numbers 2 i and 2 i + 1 of `vector`. A warp has 32 neighbouring words."""

    def sink(i: Word, word: Word, exists: Predicate) -> None:
        pair = ptx.from_bfloat16_pair(word)
        scale, factor = ptx.float16_scale(ptx.reduce_warp("max", ptx.max_s32(*map(ptx.magnitude_bits, pair))))
        with ptx.when(exists):
            scaled = ptx.to_float16_pair(*(x * scale for x in pair))
            ptx.store_shared(vector.numbers + (i << 2), scaled)
            with ptx.when(thread.lane.equals(0)):
                ptx.store_shared(vector.factors + ((i >> 5) << 2), ptx.bits_of(factor))

    return sink


class CodeRows(Protocol):
    """Rows of codes in global memory."""

    def piece(self, row: Word, piece: Word, step: int) -> tuple[Address, Address]:
        """Where codes 128 (piece + step) and following of a row begin, and where their scale is."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix [N, width] of e4m3 codes and its scales [ceil(N / 128), width / 128] in float32: their addresses."""

    address: Address
    scales: Address
    width: int

    def piece(self, row: Word, piece: Word, step: int) -> tuple[Address, Address]:
        pieces = self.width // SCALE_BLOCK
        codes = ptx.offset(ptx.offset(self.address, row, self.width), piece, SCALE_BLOCK)
        scales = ptx.offset(ptx.offset(self.scales, row // SCALE_BLOCK, 4 * pieces), piece, 4)
        return ptx.offset(codes, ptx.constant(step), SCALE_BLOCK), ptx.offset(scales, ptx.constant(step), 4)

    def prefetch(self, thread: Thread, first: Word, end: Word, most: int) -> None:
        """Copies rows first .. end - 1, at most `most`, to L2."""
        persistent.prefetch(thread, self.address, self.width, first, end)
        prefetch_scales(thread, self.scales, 4 * self.width // SCALE_BLOCK, first, end, most)


@dataclasses.dataclass(frozen=True)
class TileSplit:
    """How the warps of a thread block divide up to `most` rows of `width` codes into pieces of 16 rows x 128 codes.

    across: how many warps share a row; the others take other tiles of 16 rows.
    """

    width: int
    most: int

    @property
    def pieces(self) -> int:
        return self.width // SCALE_BLOCK

    @property
    def tiles(self) -> int:
        return -(-self.most // TILE_ROWS)

    def rounds(self, across: int) -> tuple[int, int]:
        """Tiles and pieces of a tile that a warp takes."""
        return -(-self.tiles // (WARPS // across)), -(-self.pieces // across)

    @property
    def across(self) -> int:
        def pieces_of_warp(across: int) -> int:
            tiles, pieces = self.rounds(across)
            return tiles * pieces

        return min((1, 2, 4, 8, 16), key=pieces_of_warp)

    @property
    def sums_bytes(self) -> int:
        """The shared memory for the warps' sums."""
        return 4 * TILE_ROWS * self.across * self.tiles


class CodesProduct:
    """Rows first .. end - 1 of matrices of codes times a vector: `begin` starts, `finish` ends it.

    A warp multiplies 16 rows x 128 codes at once. Its lane l loads 16 codes of rows l / 4 and l / 4 + 8, from code
    16 (l % 4) and from 64 codes further: in which order a tensor core sums them does not matter. Sums of the warps that share
    rows are added through shared memory.

    matrix: where the codes and scales of its rows are, as `Codes` says it.
    sums: shared memory for `split.sums_bytes`.
    in_flight: how many pieces a warp loads ahead; `begin` may be told to load fewer.
    """

    def __init__(
        self,
        thread: Thread,
        matrix: CodeRows,
        split: TileSplit,
        first: Word,
        end: Word,
        sums: Word,
        in_flight: int = PIECES_IN_FLIGHT,
    ):
        self.thread, self.matrix, self.split, self.first, self.end, self.sums = thread, matrix, split, first, end, sums
        self.depth, self.across = in_flight, split.across
        self.piece = thread.warp & (self.across - 1)  # of the first step
        self.tile = thread.warp // self.across
        self.quad_lane = thread.lane & 3
        tiles, pieces = split.rounds(self.across)
        self.steps = [(tile * (WARPS // self.across), step * self.across) for tile in range(tiles) for step in range(pieces)]
        self.in_flight: list[tuple[list[list[Word]], list[Float]]] = []

    def row(self, tile: int, half: int) -> Word:
        local = ((self.tile + tile) << 4) + (self.thread.lane >> 2) + 8 * half
        return self.first + local

    def _is_whole(self, step: int) -> bool:
        """Whether every warp has a piece in this step."""
        return step + self.across <= self.split.pieces

    def _load(self, tile: int, step: int) -> tuple[list[list[Word]], list[Float]]:
        """The codes of row l / 4, then l / 4 + 8, and the two rows' scales."""
        codes, scales = [], []
        for half in range(2):
            row = self.row(tile, half)
            exists = row.signed < self.end
            if not self._is_whole(step):
                exists = exists & (self.piece.signed < self.split.pieces - step)
            reads = ptx.select(exists, 1, 0)
            address, scale = self.matrix.piece(row, self.piece, step)
            address = ptx.offset(address, self.quad_lane, 16)
            codes += [ptx.load_global_words_or_zeros(ptx.offset(address, ptx.constant(i), GROUP), reads, 4) for i in range(2)]
            scales.append(ptx.load_global_float_or_zero(scale, reads))
        return codes, scales

    def begin(self, pieces: int | None = None) -> None:
        self.in_flight = [self._load(*step) for step in self.steps[: pieces or self.depth]]

    def prefetch(self, thread: Thread) -> None:
        """Copies the rows to L2, where a later `begin` finds them."""
        assert isinstance(self.matrix, Codes)
        self.matrix.prefetch(thread, self.first, self.end, self.split.most)

    def _sums(self, step: int, codes: list[list[Word]], vector: GroupedVector) -> list[Float]:
        """The sums over 128 codes of the two rows, without their scales."""
        piece = self.piece + step
        if not self._is_whole(step):
            piece = ptx.min_s32(piece, self.split.pieces - 1)
        factors = ptx.load_shared_floats(vector.factors + (piece << 3))
        numbers = vector.numbers + (piece << 8) + (self.quad_lane << 5)
        totals = []
        for i, factor in enumerate(factors):
            words = [word for at in (0, 16) for word in ptx.load_shared_words(numbers + (2 * GROUP * i + at))]
            totals.append([x * factor for x in ptx.products_of_codes(codes[i], codes[2 + i], words)])
        return [ptx.total(halves) for halves in zip(*totals, strict=True)]

    def finish(self, vector: GroupedVector, emit: Emit) -> None:
        """Sums the rows' products and passes them on; all threads of the block take part."""
        for (row, exists), total in zip(self.rows_of_thread(), self.totals(vector), strict=True):
            emit(row, total, exists)

    def rows_of_thread(self) -> list[tuple[Word, Predicate]]:
        """(row, whether it exists) of the rows whose sums this thread has at the end."""
        rows = []
        for i, exists in persistent.indices_of_thread(self.thread, TILE_ROWS * self.split.tiles):
            row = self.first + i
            rows.append((row, exists & (row.signed < self.end)))
        return rows

    def totals(self, vector: GroupedVector) -> list[Float]:
        """The sums of `rows_of_thread`."""
        totals, last = [ptx.number(0.0)] * 2, self.split.rounds(self.across)[1] - 1
        self.in_flight += [self._load(*step) for step in self.steps[len(self.in_flight) : self.depth]]
        for n, (tile, step) in enumerate(self.steps):
            codes, scales = self.in_flight.pop(0)
            sums = self._sums(step, codes, vector)
            totals = [ptx.fma(x, scale, total) for x, scale, total in zip(sums, scales, totals, strict=True)]
            if n + self.depth < len(self.steps):
                self.in_flight.append(self._load(*self.steps[n + self.depth]))
            if step == last * self.across:
                self._store(tile, totals)
                totals = [ptx.number(0.0)] * 2
        ptx.block_barrier()
        return [self._total(i) for i, _ in persistent.indices_of_thread(self.thread, TILE_ROWS * self.split.tiles)]

    def _at(self, tile: Word, warp: Word | int, row: Word) -> Word:
        """Where the sum of a row of a tile over the pieces of one of the warps that share it is kept."""
        return self.sums + (((tile * self.across + warp) * TILE_ROWS + row) << 2)

    def _store(self, tile: int, totals: Sequence[Float]) -> None:
        tile_of_warp = self.tile + tile
        stores = self.quad_lane.equals(0) & (tile_of_warp.signed < self.split.tiles)
        at = self._at(tile_of_warp, self.piece, self.thread.lane >> 2)
        with ptx.when(stores):
            for half, total in enumerate(totals):
                ptx.store_shared(at + 4 * 8 * half, ptx.bits_of(total))

    def _total(self, i: Word) -> Float:
        tile, row = i >> 4, i & (TILE_ROWS - 1)
        first = self._at(tile, 0, row)
        return ptx.total(ptx.float_of(ptx.load_shared(first + 4 * TILE_ROWS * warp)) for warp in range(self.across))
