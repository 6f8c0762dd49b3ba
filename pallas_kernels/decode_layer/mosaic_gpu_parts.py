"""The parts of the decode kernels: what all threads of a block, or of a warp, do together, written in `ptx` words.

One vector times a matrix costs what reading the matrix costs, if enough of it is under way. So the loads of a product are
issued together, 16 bytes a lane, as many as registers hold; the first of them before the vector is known (`begin`), while
the grid meets and the vector is made. The vector is in shared memory as bfloat16, which every input of a product is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels import hopper, ptx

BLOCKS = hopper.NUM_SMS  # one on each, so that the grid can meet
WARPS = 16
THREADS = 32 * WARPS
LOADS = 20  # 16 bytes each that a lane has under way: 80 of its 128 registers
PIECE = 8192  # bytes brought to L2 by one instruction
PIECES = 256  # of a matrix, at most, by one block
COLUMN_LOADS = 16  # where 8 sums need registers too

Value = Any


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this thread is."""

    block: Value
    thread: Value
    lane: Value
    warp: Value

    @staticmethod
    def here(block: Value) -> Place:
        thread = ptx.thread()
        return Place(block, thread, ptx.bit_and(thread, 31), ptx.shift_right(thread, 5))

    def is_block_before_end(self, number: int) -> Value:
        """1 for the last block."""
        return ptx.compare("eq", self.block, BLOCKS - number)


class Shared:
    """Shared memory, given out piece by piece; without an address it only counts."""

    def __init__(self, base: Value | None = None):
        self.base, self.used = base, 0

    def take(self, size: int) -> Value:
        start, self.used = self.used, self.used + -(-size // 16) * 16
        return None if self.base is None else ptx.add(self.base, start)


def share(place: Place, count: int, spared: int = 0) -> tuple[Value, Value]:
    """The part first .. end - 1 of `count` things that is this block's, as even as can be; the last `spared` have none."""
    blocks = BLOCKS - spared
    first = ptx.div(ptx.mul(place.block, count), blocks)
    end = ptx.div(ptx.mul(ptx.add(place.block, 1), count), blocks)
    return ptx.minimum(first, count), ptx.minimum(end, count)


def largest_share(count: int, spared: int = 0) -> int:
    return -(-count // (BLOCKS - spared))


def sum_of_warp(x: Value, lanes: int = 32) -> Value:
    """The sum over groups of `lanes` neighbouring lanes, for all of them, always in the same order."""
    distance = lanes // 2
    while distance:
        x = ptx.plus(x, ptx.lane_distant(x, distance))
        distance //= 2
    return x


def sum_of_block(place: Place, x: Value, sums: Value) -> Value:
    """The sum over all threads, for all of them. `sums`: 16 floats of shared memory of its own."""
    total = ptx.bits_of(sum_of_warp(x))
    with ptx.when(ptx.compare("eq", place.lane, 0)):
        ptx.store_shared(ptx.add(sums, ptx.shift_left(place.warp, 2)), total)
    ptx.block_barrier()
    parts = [ptx.float_of(word) for i in range(WARPS // 4) for word in ptx.load_shared_words(ptx.add(sums, 16 * i))]
    return ptx.plus(*parts)


def in_turn(place: Place, count: int) -> list[tuple[Value, Value]]:
    """(index, whether it exists) of the things that are this thread's, which the threads take side by side."""
    found = []
    for start in range(0, count, THREADS):
        index = ptx.add(place.thread, start)
        found.append((ptx.minimum(index, count - 1), ptx.compare("slt", index, count)))
    return found


def normalise(
    place: Place,
    pairs: int,
    pair: Callable[[Value], tuple[Value, Value]],
    weights: Value,
    eps: float,
    sums: Value,
    sink: Callable[[Value, Value, Value], None],
    *,
    in_bfloat16: bool,
) -> None:
    """RMSNorm of 2 `pairs` numbers. sink(i, word, exists) takes the i-th pair as bfloat16.

    With `in_bfloat16` the normalised number is rounded before its weight is applied, as activations in bfloat16 are.
    """
    mine = [(i, exists, *pair(i)) for i, exists in in_turn(place, pairs)]
    total = ptx.number(0.0)
    for _, exists, low, high in mine:
        square = ptx.plus(ptx.times(low, low), ptx.times(high, high))
        total = ptx.plus(total, ptx.select(exists, square, ptx.number(0.0)))
    mean = ptx.times(sum_of_block(place, total, sums), ptx.number(1 / (2 * pairs)))
    factor = ptx.rsqrt(ptx.plus(mean, ptx.number(eps)))
    for i, exists, *numbers in mine:
        of_pair = ptx.from_bfloat16_pair(ptx.load_global(ptx.offset(weights, i, 4)))
        scaled = [ptx.times(x, factor) for x in numbers]
        if in_bfloat16:
            scaled = [ptx.rounded(x) for x in scaled]
        low, high = (ptx.times(x, w) for x, w in zip(scaled, of_pair, strict=True))
        sink(i, ptx.to_bfloat16_pair(low, high), exists)


def to_shared(address: Value) -> Callable[[Value, Value, Value], None]:
    """A sink that puts word i at its place from the shared address on."""

    def sink(i: Value, word: Value, exists: Value) -> None:
        with ptx.when(exists):
            ptx.store_shared(ptx.add(address, ptx.shift_left(i, 2)), word)

    return sink


def fresh_pair(base: Value) -> Callable[[Value], tuple[Value, Value]]:
    """The i-th two of float32 numbers of another block."""

    def pair(i: Value) -> tuple[Value, Value]:
        low, high = ptx.load_fresh_pair(ptx.offset(base, i, 8))
        return ptx.float_of(low), ptx.float_of(high)

    return pair


def silu(x: Value) -> Value:
    return ptx.times(x, sigmoid(x))


def sigmoid(x: Value) -> Value:
    powers = ptx.exp2(ptx.times(x, ptx.number(-1.4426950408889634)))
    return ptx.divide_floats(ptx.number(1.0), ptx.plus(powers, ptx.number(1.0)))


def bring(place: Place, matrix: Value, row_bytes: int, first: Value, end: Value) -> None:
    """Rows first .. end - 1 of a matrix to L2, for a stage or a kernel to come; a thread a piece."""
    size = ptx.mul(ptx.sub(end, first), row_bytes)
    start = ptx.mul(ptx.minimum(place.thread, PIECES), PIECE)
    piece = ptx.minimum(ptx.sub(size, start), PIECE)
    there = ptx.both(ptx.compare("sgt", piece, 0), ptx.compare("slt", place.thread, PIECES))
    ptx.prefetch(ptx.offset(ptx.offset(matrix, first, row_bytes), ptx.maximum(start, 0), 1), piece, there)


class Rows:
    """The rows of one matrix, or of two with equally long rows, numbered as if the second stood below the first."""

    def __init__(self, matrices: Sequence[tuple[Value, int]]):
        """matrices: the address of each, and how many rows it has."""
        (self.address, self.count), *second = matrices
        self.second = second[0][0] if second else None

    def at(self, row: Value, row_bytes: int) -> Value:
        """The address of a row. A select between the two matrices, so that neighbouring lanes may read different ones."""
        if self.second is None:
            return ptx.offset(self.address, row, row_bytes)
        in_first = ptx.compare("slt", row, self.count)
        matrix = ptx.select(in_first, self.address, self.second)
        return ptx.offset(matrix, ptx.select(in_first, row, ptx.sub(row, self.count)), row_bytes)

    def moved(self, index: Value, scale: int) -> Rows:
        """The same rows, `index` * `scale` bytes further on."""
        matrices = [(ptx.offset(self.address, index, scale), self.count)]
        return Rows(matrices if self.second is None else [*matrices, (ptx.offset(self.second, index, scale), 0)])

    def bring(self, place: Place, row_bytes: int, first: Value, end: Value) -> None:
        """Rows first .. end - 1 to L2."""
        if self.second is None:
            return bring(place, self.address, row_bytes, first, end)
        bring(place, self.address, row_bytes, *(ptx.minimum(x, self.count) for x in (first, end)))
        bring(place, self.second, row_bytes, *(ptx.sub(ptx.maximum(x, self.count), self.count) for x in (first, end)))


class Product:
    """Rows first .. end - 1 (at most `most`) of matrices [N, K] times a vector: `begin` starts, `finish` ends it.

    A row is read by as many lanes as its length divides into 16 bytes each, up to a whole warp.
    """

    def __init__(self, place: Place, rows: Rows, width: int, first: Value, end: Value, most: int):
        self.lanes = next((lanes for lanes in (32, 16, 8, 4) if width % (8 * lanes) == 0), 0)
        if not self.lanes:
            raise ValueError(f"rows of {width} numbers do not divide into pieces of 32")
        self.matrix, self.width, self.first, self.end = rows, width, first, end
        self.chunks = width // (8 * self.lanes)
        of_warp = 32 // self.lanes
        self.rounds = -(-most // (WARPS * of_warp))
        self.lane = ptx.bit_and(place.lane, self.lanes - 1)
        self.own = ptx.add(first, ptx.mul(place.warp, of_warp), ptx.div(place.lane, self.lanes))
        self.rows = WARPS * of_warp  # of a round
        self.own_part = rows.moved(self.lane, 16)
        pieces = [(turn, chunk) for turn in range(self.rounds) for chunk in range(self.chunks)]
        self.batches = [pieces[i : i + LOADS] for i in range(0, len(pieces), LOADS)]
        self.under_way: list[list[Value]] = []

    def row(self, turn: int) -> Value:
        return ptx.add(self.own, turn * self.rows)

    def _load(self, batch: int) -> list[list[Value]]:
        found = []
        for turn, chunk in self.batches[batch]:
            row = self.row(turn)
            exists = ptx.select(ptx.compare("slt", row, self.end), 1, 0)
            address = ptx.offset(self.own_part.at(row, 2 * self.width), ptx.constant(chunk), 16 * self.lanes)
            found.append(ptx.load_words_or_zeros(address, exists, 4))
        return found

    def begin(self) -> None:
        self.under_way = self._load(0)

    def bring(self, place: Place) -> None:
        """The same rows to L2, for a `begin` much later."""
        self.matrix.bring(place, 2 * self.width, self.first, self.end)

    def finish(self, vector: Callable[[Value], Value], emit: Callable[[Value, Value, Value], None]) -> None:
        """`vector`: where a row's vector is in shared memory. emit(row, sum, whether this lane is to store it)."""
        leads = ptx.select(ptx.compare("eq", self.lane, 0), 1, 0)
        total = ptx.number(0.0)
        for batch, pieces in enumerate(self.batches):
            words = self.under_way if batch == 0 else self._load(batch)
            for (turn, chunk), piece in zip(pieces, words, strict=True):
                row = self.row(turn)
                if chunk == 0:
                    total = ptx.number(0.0)
                at = ptx.add(vector(row), ptx.shift_left(ptx.add(self.lane, chunk * self.lanes), 4))
                total = ptx.add_dot(total, piece, ptx.load_shared_words(at))
                if chunk == self.chunks - 1:
                    stores = ptx.bit_and(leads, ptx.select(ptx.compare("slt", row, self.end), 1, 0))
                    emit(row, sum_of_warp(total, self.lanes), ptx.compare("ne", stores, 0))
        self.under_way = []


@dataclasses.dataclass(frozen=True)
class Piece:
    """`rows` rows of a column sum: where the first one's columns begin, and what row i is multiplied by."""

    base: Value
    factor: Callable[[Value], Value]


class Columns:
    """The sum over all rows of factor * row, 8 `lanes` columns wide: `begin` starts it, `finish` ends it.

    Every piece has `rows` rows, `row_bytes` from one to the next. `lanes` lanes read a row, a warp 32 / lanes rows next to
    each other.
    """

    def __init__(self, place: Place, pieces: Sequence[Piece], rows: int, row_bytes: int, lanes: int):
        at_once = THREADS // lanes
        if rows % at_once:
            raise ValueError(f"{rows} rows are not a multiple of {at_once}")
        self.own = ptx.add(ptx.mul(place.warp, 32 // lanes), ptx.div(place.lane, lanes))
        self.row_bytes = row_bytes
        steps = []
        for piece in pieces:
            address = ptx.offset(ptx.offset(piece.base, self.own, row_bytes), ptx.bit_and(place.lane, lanes - 1), 16)
            steps += [(address, piece.factor, start) for start in range(0, rows, at_once)]
        self.batches = [steps[i : i + COLUMN_LOADS] for i in range(0, len(steps), COLUMN_LOADS)]
        self.under_way: list[list[Value]] = []

    def _load(self, batch: int) -> list[list[Value]]:
        starts = [(address, ptx.constant(start)) for address, _, start in self.batches[batch]]
        return [ptx.load_words(ptx.offset(address, start, self.row_bytes)) for address, start in starts]

    def begin(self) -> None:
        self.under_way = self._load(0)

    def finish(self) -> list[Value]:
        """This lane's 8 sums."""
        totals = [ptx.number(0.0)] * 8
        for i, batch in enumerate(self.batches):
            words = self.under_way if i == 0 and self.under_way else self._load(i)
            for (_, factor, start), piece in zip(batch, words, strict=True):
                totals = ptx.add_multiples(totals, piece, factor(ptx.add(self.own, start)))
        return totals


def sum_of_columns(place: Place, totals: Sequence[Value], lanes: int, target: Value) -> None:
    """Adds the lanes of a warp that have the same columns; puts the warp's 8 `lanes` sums at a shared address of its own."""
    totals = list(totals)
    distance = 16
    while distance >= lanes:
        totals = [ptx.plus(x, ptx.lane_distant(x, distance)) for x in totals]
        distance //= 2
    address = ptx.add(target, ptx.mul(place.warp, 32 * lanes), ptx.shift_left(place.lane, 5))
    with ptx.when(ptx.compare("slt", place.lane, lanes)):
        for half in range(2):
            words = [ptx.bits_of(x) for x in totals[4 * half : 4 * half + 4]]
            ptx.store_shared_words(ptx.add(address, 16 * half), words)


def sum_of_warps(column: Value, lanes: int, source: Value) -> Value:
    """One column's sum over what the warps put at `source`, after a barrier."""
    address = ptx.add(source, ptx.shift_left(column, 2))
    parts = [ptx.float_of(ptx.load_shared(ptx.add(address, 32 * lanes * warp))) for warp in range(WARPS)]
    return ptx.plus(*parts)


def best(place: Place, keys: Sequence[Value], count: int) -> list[Value]:
    """The numbers of the `count` largest keys of a warp, whose lane l has those of numbers l, l + 32, ...

    Keys are unsigned and above 0; of equal ones the lowest number comes first.
    """
    keys, found = list(keys), []
    for _ in range(count):
        top = ptx.reduce_warp("max", _largest(keys))
        number = ptx.constant(0x7FFFFFFF)
        for i, key in reversed(list(enumerate(keys))):
            number = ptx.select(ptx.compare("eq", key, top), ptx.add(place.lane, 32 * i), number)
        number = ptx.reduce_warp("min", number)
        keys = [ptx.select(ptx.compare("eq", ptx.add(place.lane, 32 * i), number), 0, key) for i, key in enumerate(keys)]
        found.append(number)
    return found


def _largest(keys: Sequence[Value]) -> Value:
    top = keys[0]
    for key in keys[1:]:
        top = ptx.select(ptx.compare("ult", top, key), key, top)
    return top


def ordered(x: Value) -> Value:
    """A float32's order as unsigned numbers above 0, NaN above all."""
    bits = ptx.bits_of(x)
    negative = ptx.compare("slt", bits, 0)
    return ptx.select(negative, ptx.bit_xor(bits, -1), ptx.bit_xor(bits, -0x80000000))
