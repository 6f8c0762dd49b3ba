"""What kernels of one large thread block an SM are made of: this thread, shared memory, shares of rows, sums, a norm.

All threads of a thread block, or of a warp, do these things together. Thread blocks of 16 warps take even shares of a matrix's
rows; their threads take the indices of a vector in turn. A sum over a block is one over each warp by shuffles, then over the
warps through shared memory, always in the same order. Vectors go to where they are multiplied through a `Sink`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels import hopper
from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word

BLOCKS = hopper.NUM_SMS  # one on each SM, so that all reach the grid barrier
WARPS = 16
THREADS = 32 * WARPS
PREFETCH_BYTES = 8192  # copied to L2 by one instruction
MAX_PREFETCHES = 256  # instructions of a thread block for one matrix

Pair = Callable[[Word], tuple[Float, Float]]  # pair(i): numbers 2 i and 2 i + 1 of a vector
Sink = Callable[[Word, Word, Predicate], None]  # sink(i, word, exists) receives the i-th pair of a vector as bfloat16
# emit(row, sum, stores) receives the sum of a row in several threads; `stores` is set in the one that is to store it.
Emit = Callable[[Word, Float, Predicate], None]


@dataclasses.dataclass(frozen=True)
class Thread:
    """Which thread this is: its block, its index in the block, its lane and its warp."""

    block: Word
    index: Word
    lane: Word
    warp: Word

    @staticmethod
    def current(block: Word) -> Thread:
        thread = ptx.thread()
        return Thread(block, thread, thread & 31, thread >> 5)

    def is_block_from_end(self, number: int) -> Predicate:
        """Whether this thread is of the block with this number counted from the end, 1 for the last."""
        return self.block.equals(BLOCKS - number)


class SharedMemory:
    """Allocates shared memory from `base` on; without `base` it only adds up the sizes, in `used`."""

    def __init__(self, base: Word | None = None):
        self.base, self.used = base, 0

    def allocate(self, size: int) -> Any:
        start, self.used = self.used, self.used + -(-size // 16) * 16
        return None if self.base is None else self.base + start


def block_share(thread: Thread, count: int, spared: int = 0) -> tuple[Word, Word]:
    """The rows first .. end - 1 of `count` that this thread block takes: even shares, none for the last `spared` blocks."""
    blocks = BLOCKS - spared
    first = thread.block * count // blocks
    end = (thread.block + 1) * count // blocks
    return ptx.min_s32(first, count), ptx.min_s32(end, count)


@dataclasses.dataclass(frozen=True)
class BlockRows:
    """The rows first .. end - 1 of `matrix` that this thread block takes.

    They are the rows `offset` + first, ... of all matrices laid below each other; no thread block takes more than `most`.
    Of two matrices, `is_first`, a predicate, says whether it is the first.
    """

    matrix: Address
    first: Word
    end: Word
    offset: Word
    most: int
    is_first: Any = None

    @staticmethod
    def of(
        thread: Thread, matrices: Sequence[tuple[Address, int]], spared: int = 0, row_bytes: tuple[int, int] = (1, 1)
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
    """The most rows of `count` that a thread block takes of those that `block_share` deals out."""
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


def warp_sum(x: Float, lanes: int = 32) -> Float:
    """The sum over groups of `lanes` neighbouring lanes, in every lane of the group, always added in the same order."""
    distance = lanes // 2
    while distance:
        x = x + ptx.lane_distant(x, distance)
        distance //= 2
    return x


def block_sum(thread: Thread, x: Float, sums: Word) -> Float:
    """The sum over all threads of a block, in every thread. `sums`: 64 bytes of shared memory that nothing else uses."""
    total = ptx.bits_of(warp_sum(x))
    with ptx.when(thread.lane.equals(0)):
        ptx.store_shared(sums + (thread.warp << 2), total)
    ptx.block_barrier()
    parts = [ptx.float_of(word) for i in range(WARPS // 4) for word in ptx.load_shared_words(sums + 16 * i)]
    return ptx.total(parts)


def block_maximum(thread: Thread, xs: Sequence[Float], sizes: Word) -> Float:
    """The largest |x| of all threads of a block, NaN where one is. `sizes`: 64 bytes of shared memory only for this."""
    top = ptx.reduce_warp("max", functools.reduce(ptx.max_s32, map(ptx.magnitude_bits, xs)))
    with ptx.when(thread.lane.equals(0)):
        ptx.store_shared(sizes + (thread.warp << 2), top)
    ptx.block_barrier()
    tops = [word for i in range(WARPS // 4) for word in ptx.load_shared_words(sizes + 16 * i)]
    return ptx.float_of(functools.reduce(ptx.max_s32, tops))


def indices_of_thread(thread: Thread, count: int) -> list[tuple[Word, Predicate]]:
    """(i, whether i < count) of the indices that this thread takes: thread t takes t, t + THREADS, ..."""
    indices = []
    for start in range(0, count, THREADS):
        index = thread.index + start
        indices.append((ptx.min_s32(index, count - 1), index.signed < count))
    return indices


def normalise(
    thread: Thread,
    pairs: int,
    pair: Pair,
    weights: Address,
    eps: float,
    sums: Word,
    sink: Sink,
    *,
    in_bfloat16: bool,
) -> None:
    """RMSNorm of 2 `pairs` numbers; `sums`: 64 bytes of shared memory that nothing else uses.

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


def to_shared(address: Word) -> Sink:
    """A sink that stores word i at word i of the shared memory at `address`."""

    def sink(i: Word, word: Word, exists: Predicate) -> None:
        with ptx.when(exists):
            ptx.store_shared(address + (i << 2), word)

    return sink


def fresh_pair(base: Address) -> Pair:
    """pair(i) loads numbers 2 i and 2 i + 1 of float32 numbers at `base` that another thread block wrote in this kernel."""

    def pair(i: Word) -> tuple[Float, Float]:
        low, high = ptx.load_fresh_pair(ptx.offset(base, i, 8))
        return ptx.float_of(low), ptx.float_of(high)

    return pair


def silu(x: Float) -> Float:
    """x sigmoid(x), in float32."""
    return x * sigmoid(x)


def sigmoid(x: Float) -> Float:
    """1 / (1 + exp(-x)), in float32; the division is rounded to nearest."""
    powers = ptx.exp2(x * -1.4426950408889634)
    return ptx.div_rn(ptx.number(1.0), powers + 1.0)


def prefetch(thread: Thread, matrix: Address, row_bytes: int, first: Word, end: Word) -> None:
    """Copies rows first .. end - 1 of a matrix to L2, where a later stage or kernel finds them."""
    size = (end - first) * row_bytes
    start = ptx.min_s32(thread.index, MAX_PREFETCHES) * PREFETCH_BYTES
    piece = ptx.min_s32(size - start, PREFETCH_BYTES)
    exists = (piece.signed > 0) & (thread.index.signed < MAX_PREFETCHES)
    ptx.prefetch(ptx.offset(ptx.offset(matrix, first, row_bytes), ptx.max_s32(start, 0), 1), piece, exists)


def prefetch_vectors(thread: Thread, vectors: Sequence[tuple[Address, int]]) -> None:
    """The first thread block copies short arrays, given as addresses and bytes, to L2."""
    with ptx.when(thread.block.equals(0)):
        for address, size in vectors:
            for i, exists in indices_of_thread(thread, -(-size // 128)):
                ptx.prefetch_line(ptx.offset(address, i, 128), exists)


def largest_keys(thread: Thread, keys: Sequence[Word], count: int) -> list[Word]:
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


def _largest(keys: Sequence[Word]) -> Word:
    top = keys[0]
    for key in keys[1:]:
        top = ptx.select(top < key, key, top)
    return top


def sortable_bits(x: Float) -> Word:
    """An unsigned number above 0 for a float32, so that both are ordered alike; that of NaN is the largest."""
    bits = ptx.bits_of(x)
    negative = bits.signed < 0
    return ptx.select(negative, bits ^ -1, bits ^ -0x80000000)
