"""The parts of the decode kernels: what all threads of a thread block, or of a warp, do together, written with `ptx`.

A vector times a matrix takes the time of reading the matrix, if enough loads are in flight. So the loads of a product are
issued together, 16 bytes a lane, as many as registers hold; the first of them before the vector is known (`begin`), while
the thread blocks wait at the grid barrier and compute the vector. The vector lies in shared memory as bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pallas_kernels import hopper
from pallas_kernels.hopper import ptx

BLOCKS = hopper.NUM_SMS  # one on each SM, so that all reach the grid barrier
WARPS = 16
THREADS = 32 * WARPS
LOADS_IN_FLIGHT = 20  # of 16 bytes, by a lane: 80 of its 128 registers
PREFETCH_BYTES = 8192  # copied to L2 by one instruction
MAX_PREFETCHES = 256  # instructions of a thread block for one matrix
COLUMN_LOADS_IN_FLIGHT = 16  # fewer, because 8 sums need registers too
SCALE_BLOCK = 128  # rows and columns of codes that share a scale
TILE_ROWS = 16  # of codes, that a warp multiplies at once
GROUP = 64  # numbers of a vector in float16 that share a factor
PIECES_IN_FLIGHT = 4  # of 16 x 128 codes, by a warp: 72 registers of a lane

Value = Any


@dataclasses.dataclass(frozen=True)
class Thread:
    """Which thread this is: its block, its index in the block, its lane and its warp."""

    block: Value
    index: Value
    lane: Value
    warp: Value

    @staticmethod
    def current(block: Value) -> Thread:
        thread = ptx.thread()
        return Thread(block, thread, thread & 31, thread >> 5)

    def is_block_from_end(self, number: int) -> Value:
        """Whether this thread is of the block with this number counted from the end, 1 for the last."""
        return self.block.equals(BLOCKS - number)


class SharedMemory:
    """Allocates shared memory from `base` on; without `base` it only adds up the sizes, in `used`."""

    def __init__(self, base: Value | None = None):
        self.base, self.used = base, 0

    def allocate(self, size: int) -> Value:
        start, self.used = self.used, self.used + -(-size // 16) * 16
        return None if self.base is None else self.base + start


def block_share(thread: Thread, count: int, spared: int = 0) -> tuple[Value, Value]:
    """The rows first .. end - 1 of `count` that this thread block takes: even shares, none for the last `spared` blocks."""
    blocks = BLOCKS - spared
    first = thread.block * count // blocks
    end = (thread.block + 1) * count // blocks
    return ptx.min_s32(first, count), ptx.min_s32(end, count)


@dataclasses.dataclass(frozen=True)
class BlockRows:
    """The rows first .. end - 1 of `matrix` that this thread block takes.

    They are the rows `offset` + first, ... of all matrices laid below each other; no thread block takes more than `most`.
    Of two matrices, `is_first` says whether it is the first.
    """

    matrix: Value
    first: Value
    end: Value
    offset: Value
    most: int
    is_first: Value = None

    @staticmethod
    def of(
        thread: Thread, matrices: Sequence[tuple[Value, int]], spared: int = 0, row_bytes: tuple[int, int] = (1, 1)
    ) -> BlockRows:
        """Shares the rows of one or two matrices, given as addresses and numbers of rows, among all but the last blocks.

        Every thread block takes rows of one matrix, so that two cost a lane no more registers than one does. `row_bytes`: of
        two matrices, how long their rows are, at least in proportion.
        """
        (address, count), *second = matrices
        blocks = BLOCKS - spared
        if not second:
            return BlockRows(address, *block_share(thread, count, spared), ptx.constant(0), largest_block_share(count, spared))
        ((address2, count2),) = second
        border, most = _border((count, count2), blocks, row_bytes)
        is_first = thread.block.signed < border
        block = ptx.select(is_first, thread.block, thread.block - border)
        rows, sharing = ptx.select(is_first, count, count2), ptx.select(is_first, border, blocks - border)
        first, end = (ptx.min_s32((block + i) * rows // sharing, rows) for i in range(2))
        matrix, offset = ptx.select(is_first, address, address2), ptx.select(is_first, 0, count)
        return BlockRows(matrix, first, end, offset, max(most), is_first)


def largest_block_share(count: int, spared: int = 0) -> int:
    return -(-count // (BLOCKS - spared))


def _border(counts: tuple[int, int], blocks: int, row_bytes: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """How many thread blocks take rows of the first of two matrices, and the most rows that one takes of either."""

    def most(border: int) -> tuple[int, int]:
        return -(-counts[0] // border), -(-counts[1] // (blocks - border))

    border = min(range(1, blocks), key=lambda border: max(n * size for n, size in zip(most(border), row_bytes, strict=True)))
    return border, most(border)


def largest_block_shares(counts: Sequence[int], spared: int = 0, row_bytes: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
    """The most rows that a thread block takes of each of one or two matrices, as `BlockRows.of` shares them."""
    if len(counts) == 1:
        return (largest_block_share(counts[0], spared),)
    first, second = counts
    return _border((first, second), BLOCKS - spared, row_bytes)[1]


def warp_sum(x: Value, lanes: int = 32) -> Value:
    """The sum over groups of `lanes` neighbouring lanes, in every lane of the group, always added in the same order."""
    distance = lanes // 2
    while distance:
        x = x + ptx.lane_distant(x, distance)
        distance //= 2
    return x


def block_sum(thread: Thread, x: Value, sums: Value) -> Value:
    """The sum over all threads of a block, in every thread. `sums`: 64 bytes of shared memory that nothing else uses."""
    total = ptx.bits_of(warp_sum(x))
    with ptx.when(thread.lane.equals(0)):
        ptx.store_shared(sums + (thread.warp << 2), total)
    ptx.block_barrier()
    parts = [ptx.float_of(word) for i in range(WARPS // 4) for word in ptx.load_shared_words(sums + 16 * i)]
    return ptx.total(parts)


def block_maximum(thread: Thread, xs: Sequence[Value], sizes: Value) -> Value:
    """The largest |x| of all threads of a block, NaN where one is. `sizes`: 64 bytes of shared memory only for this."""
    top = ptx.reduce_warp("max", functools.reduce(ptx.max_s32, map(ptx.magnitude_bits, xs)))
    with ptx.when(thread.lane.equals(0)):
        ptx.store_shared(sizes + (thread.warp << 2), top)
    ptx.block_barrier()
    tops = [word for i in range(WARPS // 4) for word in ptx.load_shared_words(sizes + 16 * i)]
    return ptx.float_of(functools.reduce(ptx.max_s32, tops))


def indices_of_thread(thread: Thread, count: int) -> list[tuple[Value, Value]]:
    """(i, whether i < count) of the indices that this thread takes: thread t takes t, t + THREADS, ..."""
    indices = []
    for start in range(0, count, THREADS):
        index = thread.index + start
        indices.append((ptx.min_s32(index, count - 1), index.signed < count))
    return indices


def normalise(
    thread: Thread,
    pairs: int,
    pair: Callable[[Value], tuple[Value, Value]],
    weights: Value,
    eps: float,
    sums: Value,
    sink: Callable[[Value, Value, Value], None],
    *,
    in_bfloat16: bool,
) -> None:
    """RMSNorm of 2 `pairs` numbers; sink(i, word, exists) receives the i-th pair as two bfloat16 in a word.

    With `in_bfloat16` the normalised number is rounded before its weight is applied, as activations in bfloat16 are.
    """
    mine = [(i, exists, *pair(i)) for i, exists in indices_of_thread(thread, pairs)]
    total = ptx.number(0.0)
    for _, exists, low, high in mine:
        square = low * low + high * high
        total = total + ptx.select(exists, square, ptx.number(0.0))
    mean = block_sum(thread, total, sums) * (1 / (2 * pairs))
    factor = ptx.rsqrt(mean + eps)
    for i, exists, *numbers in mine:
        of_pair = ptx.from_bfloat16_pair(ptx.load_global(ptx.offset(weights, i, 4)))
        scaled = [x * factor for x in numbers]
        if in_bfloat16:
            scaled = [ptx.rounded(x) for x in scaled]
        low, high = (x * w for x, w in zip(scaled, of_pair, strict=True))
        sink(i, ptx.to_bfloat16_pair(low, high), exists)


def to_shared(address: Value) -> Callable[[Value, Value, Value], None]:
    """A sink that stores word i at word i of the shared memory at `address`."""

    def sink(i: Value, word: Value, exists: Value) -> None:
        with ptx.when(exists):
            ptx.store_shared(address + (i << 2), word)

    return sink


def fresh_pair(base: Value) -> Callable[[Value], tuple[Value, Value]]:
    """pair(i) loads numbers 2 i and 2 i + 1 of float32 numbers at `base` that another thread block wrote in this kernel."""

    def pair(i: Value) -> tuple[Value, Value]:
        low, high = ptx.load_fresh_pair(ptx.offset(base, i, 8))
        return ptx.float_of(low), ptx.float_of(high)

    return pair


def silu(x: Value) -> Value:
    return x * sigmoid(x)


def sigmoid(x: Value) -> Value:
    powers = ptx.exp2(x * -1.4426950408889634)
    return ptx.div_rn(ptx.number(1.0), powers + 1.0)


def prefetch(thread: Thread, matrix: Value, row_bytes: int, first: Value, end: Value) -> None:
    """Copies rows first .. end - 1 of a matrix to L2, where a later stage or kernel finds them."""
    size = (end - first) * row_bytes
    start = ptx.min_s32(thread.index, MAX_PREFETCHES) * PREFETCH_BYTES
    piece = ptx.min_s32(size - start, PREFETCH_BYTES)
    exists = (piece.signed > 0) & (thread.index.signed < MAX_PREFETCHES)
    ptx.prefetch(ptx.offset(ptx.offset(matrix, first, row_bytes), ptx.max_s32(start, 0), 1), piece, exists)


def prefetch_vectors(thread: Thread, vectors: Sequence[tuple[Value, int]]) -> None:
    """The first thread block copies short arrays, given as addresses and bytes, to L2."""
    with ptx.when(thread.block.equals(0)):
        for address, size in vectors:
            for i, exists in indices_of_thread(thread, -(-size // 128)):
                ptx.prefetch_line(ptx.offset(address, i, 128), exists)


class Product:
    """Rows first .. end - 1 (at most `most`) of a matrix [N, K] times a vector: `begin` starts, `finish` ends it.

    A row is read by as many lanes as its length divides into 16 bytes each, up to a whole warp.
    """

    def __init__(
        self,
        thread: Thread,
        matrix: Value,
        width: int,
        first: Value,
        end: Value,
        most: int,
        loads_in_flight: int = LOADS_IN_FLIGHT,
    ):
        self.lanes = next((lanes for lanes in (32, 16, 8, 4) if width % (8 * lanes) == 0), 0)
        if not self.lanes:
            raise ValueError(f"rows of {width} numbers do not divide into pieces of 32")
        self.matrix, self.width, self.first, self.end = matrix, width, first, end
        self.chunks = width // (8 * self.lanes)
        of_warp = 32 // self.lanes
        self.rounds = -(-most // (WARPS * of_warp))
        self.lane = thread.lane & (self.lanes - 1)
        self.first_row = first + thread.warp * of_warp + thread.lane // self.lanes
        self.rows = WARPS * of_warp  # of a round
        self.lane_matrix = ptx.offset(matrix, self.lane, 16)
        pieces = [(r, chunk) for r in range(self.rounds) for chunk in range(self.chunks)]
        self.batches = [pieces[i : i + loads_in_flight] for i in range(0, len(pieces), loads_in_flight)]
        self.in_flight: list[list[Value]] = []

    def row(self, r: int) -> Value:
        return self.first_row + r * self.rows

    def _load(self, batch: int) -> list[list[Value]]:
        loaded = []
        for r, chunk in self.batches[batch]:
            row = self.row(r)
            exists = ptx.select(row.signed < self.end, 1, 0)
            address = ptx.offset(ptx.offset(self.lane_matrix, row, 2 * self.width), ptx.constant(chunk), 16 * self.lanes)
            loaded.append(ptx.load_global_words_or_zeros(address, exists, 4))
        return loaded

    def begin(self) -> None:
        self.in_flight = self._load(0)

    def prefetch(self, thread: Thread) -> None:
        """Copies the rows to L2, where a later `begin` finds them."""
        prefetch(thread, self.matrix, 2 * self.width, self.first, self.end)

    def finish(self, vector: Callable[[Value], Value], emit: Callable[[Value, Value, Value], None]) -> None:
        """Sums the rows' products and passes them on.

        vector(row): the shared address of the vector that this row is multiplied by.
        emit(row, sum, stores): receives a row's sum in every lane; `stores` is set in the one lane that is to store it.
        """
        leads = ptx.select(self.lane.equals(0), 1, 0)
        total = ptx.number(0.0)
        for batch, pieces in enumerate(self.batches):
            words = self.in_flight if batch == 0 else self._load(batch)
            for (r, chunk), piece in zip(pieces, words, strict=True):
                row = self.row(r)
                if chunk == 0:
                    total = ptx.number(0.0)
                at = vector(row) + ((self.lane + chunk * self.lanes) << 4)
                total = ptx.add_dot(total, piece, ptx.load_shared_words(at))
                if chunk == self.chunks - 1:
                    stores = leads & ptx.select(row.signed < self.end, 1, 0)
                    emit(row, warp_sum(total, self.lanes), stores.differs(0))
        self.in_flight = []


# ---- matrices of e4m3 codes


def prefetch_scales(thread: Thread, scales: Value, row_bytes: int, first: Value, end: Value, most: int) -> None:
    """Copies the scales of rows first .. end - 1, at most `most`, of a matrix of codes to L2."""
    first_byte = first // SCALE_BLOCK * row_bytes
    end_byte = (end + (SCALE_BLOCK - 1)) // SCALE_BLOCK * row_bytes
    for i, exists in indices_of_thread(thread, -(-(-(-most // SCALE_BLOCK) + 1) * row_bytes // 128)):
        at = first_byte + (i << 7)
        ptx.prefetch_line(ptx.offset(scales, at, 1), exists & (at.signed < end_byte))


@dataclasses.dataclass(frozen=True)
class GroupedVector:
    """A vector in shared memory, to be multiplied by codes: numbers in float16 and a float32 factor for every 64 of them.

    The factors are powers of two, those of `ptx.float16_scale`.
    """

    numbers: Value
    factors: Value

    @staticmethod
    def allocate(shared: SharedMemory, size: int) -> GroupedVector:
        return GroupedVector(shared.allocate(2 * size), shared.allocate(4 * (size // GROUP)))


def to_groups(thread: Thread, vector: GroupedVector) -> Callable[[Value, Value, Value], None]:
    """A sink that keeps word i, two bfloat16, as numbers 2 i and 2 i + 1 of `vector`. A warp has 32 neighbouring words."""

    def sink(i: Value, word: Value, exists: Value) -> None:
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

    def piece(self, row: Value, piece: Value, step: int) -> tuple[Value, Value]:
        """Where codes 128 (piece + step) and following of a row begin, and where their scale is."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix [N, width] of e4m3 codes and its scales [ceil(N / 128), width / 128] in float32: their addresses."""

    address: Value
    scales: Value
    width: int

    def piece(self, row: Value, piece: Value, step: int) -> tuple[Value, Value]:
        pieces = self.width // SCALE_BLOCK
        codes = ptx.offset(ptx.offset(self.address, row, self.width), piece, SCALE_BLOCK)
        scales = ptx.offset(ptx.offset(self.scales, row // SCALE_BLOCK, 4 * pieces), piece, 4)
        return ptx.offset(codes, ptx.constant(step), SCALE_BLOCK), ptx.offset(scales, ptx.constant(step), 4)

    def prefetch(self, thread: Thread, first: Value, end: Value, most: int) -> None:
        """Copies rows first .. end - 1, at most `most`, to L2."""
        prefetch(thread, self.address, self.width, first, end)
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
        first: Value,
        end: Value,
        sums: Value,
        in_flight: int = PIECES_IN_FLIGHT,
    ):
        self.thread, self.matrix, self.split, self.first, self.end, self.sums = thread, matrix, split, first, end, sums
        self.depth, self.across = in_flight, split.across
        self.piece = thread.warp & (self.across - 1)  # of the first step
        self.tile = thread.warp // self.across
        self.quad_lane = thread.lane & 3
        tiles, pieces = split.rounds(self.across)
        self.steps = [(tile * (WARPS // self.across), step * self.across) for tile in range(tiles) for step in range(pieces)]
        self.in_flight: list[tuple[list[list[Value]], list[Value]]] = []

    def row(self, tile: int, half: int) -> Value:
        local = ((self.tile + tile) << 4) + (self.thread.lane >> 2) + 8 * half
        return self.first + local

    def _is_whole(self, step: int) -> bool:
        """Whether every warp has a piece in this step."""
        return step + self.across <= self.split.pieces

    def _load(self, tile: int, step: int) -> tuple[list[list[Value]], list[Value]]:
        """The codes of row l / 4, then l / 4 + 8, and the two rows' scales."""
        codes, scales = [], []
        for half in range(2):
            row = self.row(tile, half)
            exists = row.signed < self.end
            if not self._is_whole(step):
                exists = exists & (self.piece.signed < self.split.pieces - step)
            exists = ptx.select(exists, 1, 0)
            address, scale = self.matrix.piece(row, self.piece, step)
            address = ptx.offset(address, self.quad_lane, 16)
            codes += [ptx.load_global_words_or_zeros(ptx.offset(address, ptx.constant(i), GROUP), exists, 4) for i in range(2)]
            scales.append(ptx.load_global_float_or_zero(scale, exists))
        return codes, scales

    def begin(self, pieces: int | None = None) -> None:
        self.in_flight = [self._load(*step) for step in self.steps[: pieces or self.depth]]

    def prefetch(self, thread: Thread) -> None:
        """Copies the rows to L2, where a later `begin` finds them."""
        assert isinstance(self.matrix, Codes)
        self.matrix.prefetch(thread, self.first, self.end, self.split.most)

    def _sums(self, step: int, codes: list[list[Value]], vector: GroupedVector) -> list[Value]:
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

    def finish(self, vector: GroupedVector, emit: Callable[[Value, Value, Value], None]) -> None:
        """Sums the rows' products and passes them on; all threads of the block take part.

        emit(row, sum, stores): receives the sum of one row in every thread; `stores` is set in the one that is to store it.
        """
        for (row, exists), total in zip(self.rows_of_thread(), self.totals(vector), strict=True):
            emit(row, total, exists)

    def rows_of_thread(self) -> list[tuple[Value, Value]]:
        """(row, whether it exists) of the rows whose sums this thread has at the end."""
        rows = []
        for i, exists in indices_of_thread(self.thread, TILE_ROWS * self.split.tiles):
            row = self.first + i
            rows.append((row, exists & (row.signed < self.end)))
        return rows

    def totals(self, vector: GroupedVector) -> list[Value]:
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
        return [self._total(i) for i, _ in indices_of_thread(self.thread, TILE_ROWS * self.split.tiles)]

    def _at(self, tile: Value, warp: Value | int, row: Value) -> Value:
        """Where the sum of a row of a tile over the pieces of one of the warps that share it is kept."""
        return self.sums + (((tile * self.across + warp) * TILE_ROWS + row) << 2)

    def _store(self, tile: int, totals: Sequence[Value]) -> None:
        tile_of_warp = self.tile + tile
        stores = self.quad_lane.equals(0) & (tile_of_warp.signed < self.split.tiles)
        at = self._at(tile_of_warp, self.piece, self.thread.lane >> 2)
        with ptx.when(stores):
            for half, total in enumerate(totals):
                ptx.store_shared(at + 4 * 8 * half, ptx.bits_of(total))

    def _total(self, i: Value) -> Value:
        tile, row = i >> 4, i & (TILE_ROWS - 1)
        first = self._at(tile, 0, row)
        return ptx.total(ptx.float_of(ptx.load_shared(first + 4 * TILE_ROWS * warp)) for warp in range(self.across))


# ---- sums down the columns of bfloat16 matrices


@dataclasses.dataclass(frozen=True)
class WeightedRows:
    """Some rows of a column sum: where the columns of the first one begin, and what row i is multiplied by."""

    base: Value
    factor: Callable[[Value], Value]


class Columns:
    """The sum over all rows of factor * row, 8 `lanes` columns wide: `begin` starts it, `finish` ends it.

    Every element of `matrices` has `rows` rows, `row_bytes` from one to the next. `lanes` lanes read a row, a warp reads
    32 / lanes neighbouring rows.
    """

    def __init__(self, thread: Thread, matrices: Sequence[WeightedRows], rows: int, row_bytes: int, lanes: int):
        at_once = THREADS // lanes
        if rows % at_once:
            raise ValueError(f"{rows} rows are not a multiple of {at_once}")
        self.first_row = thread.warp * (32 // lanes) + thread.lane // lanes
        self.row_bytes = row_bytes
        steps = []
        for matrix in matrices:
            address = ptx.offset(ptx.offset(matrix.base, self.first_row, row_bytes), thread.lane & (lanes - 1), 16)
            steps += [(address, matrix.factor, start) for start in range(0, rows, at_once)]
        self.batches = [steps[i : i + COLUMN_LOADS_IN_FLIGHT] for i in range(0, len(steps), COLUMN_LOADS_IN_FLIGHT)]
        self.in_flight: list[list[Value]] = []

    def _load(self, batch: int) -> list[list[Value]]:
        starts = [(address, ptx.constant(start)) for address, _, start in self.batches[batch]]
        return [ptx.load_global_words(ptx.offset(address, start, self.row_bytes)) for address, start in starts]

    def begin(self) -> None:
        self.in_flight = self._load(0)

    def finish(self) -> list[Value]:
        """This lane's 8 sums."""
        totals = [ptx.number(0.0)] * 8
        for i, batch in enumerate(self.batches):
            words = self.in_flight if i == 0 and self.in_flight else self._load(i)
            for (_, factor, start), piece in zip(batch, words, strict=True):
                totals = ptx.add_multiples(totals, piece, factor(self.first_row + start))
        return totals


def store_column_sums(thread: Thread, totals: Sequence[Value], lanes: int, target: Value) -> None:
    """Adds what the lanes of a warp have for the same columns and stores the warp's 8 `lanes` sums in its part of `target`."""
    totals = list(totals)
    distance = 16
    while distance >= lanes:
        totals = [x + ptx.lane_distant(x, distance) for x in totals]
        distance //= 2
    address = target + thread.warp * (32 * lanes) + (thread.lane << 5)
    with ptx.when(thread.lane.signed < lanes):
        for half in range(2):
            words = [ptx.bits_of(x) for x in totals[4 * half : 4 * half + 4]]
            ptx.store_shared_words(address + 16 * half, words)


def load_column_sum(column: Value, lanes: int, source: Value) -> Value:
    """The sum of a column over the warps' sums that `store_column_sums` stored at `source`; needs a barrier between them."""
    address = source + (column << 2)
    parts = [ptx.float_of(ptx.load_shared(address + 32 * lanes * warp)) for warp in range(WARPS)]
    return ptx.total(parts)


def largest_keys(thread: Thread, keys: Sequence[Value], count: int) -> list[Value]:
    """The numbers of the `count` largest keys of a warp, largest first; `keys` of lane l belong to numbers l, l + 32, ...

    Keys are unsigned and above 0; of equal ones the lowest number comes first.
    """
    keys, numbers = list(keys), []
    for _ in range(count):
        top = ptx.reduce_warp("max", _largest(keys))
        number = ptx.constant(0x7FFFFFFF)
        for i, key in reversed(list(enumerate(keys))):
            number = ptx.select(key.equals(top), thread.lane + 32 * i, number)
        number = ptx.reduce_warp("min", number)
        keys = [ptx.select((thread.lane + 32 * i).equals(number), 0, key) for i, key in enumerate(keys)]
        numbers.append(number)
    return numbers


def _largest(keys: Sequence[Value]) -> Value:
    top = keys[0]
    for key in keys[1:]:
        top = ptx.select(top < key, key, top)
    return top


def sortable_bits(x: Value) -> Value:
    """An unsigned number above 0 for a float32, so that both are ordered alike; that of NaN is the largest."""
    bits = ptx.bits_of(x)
    negative = bits.signed < 0
    return ptx.select(negative, bits ^ -1, bits ^ -0x80000000)
