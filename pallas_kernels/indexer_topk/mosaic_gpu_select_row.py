"""What the threads of a row do together, and the search for the value of a rank.

Scores are compared as keys: unsigned integers in the order of the floats. The k-th largest of them is found by histograms of
2048 bins over what remains of the range, 11 bits a pass, until a whole bin is needed or the range is one value. A pass is one
atomic addition a key in shared memory; then a thread sums neighbouring bins, the warps scan these sums, and the thread whose
bins hold the rank says so to all. Atomics only count, so the result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.ptx import Float, Predicate, Word
from pallas_kernels.indexer_topk.mosaic_gpu_select_problem import BINS, LOG_BINS, WARP_SUMS, Problem

KEY_OF_INFINITY = 0xFF800000
KEY_OF_LOWEST = 0x007FFFFF  # of -inf
# The lines of one word a warp: 0 and 1 alternate in ordered passes, the others serve searches.
SUMS_OF_BINS, FOUND_BIN, LEAST, MOST = 2, 3, 4, 5


class Add(Protocol):
    """Counts a key, if it is valid."""

    def __call__(self, key: Word, valid: Predicate | None = None) -> None: ...


VisitKeys = Callable[[Add], None]  # visit_keys(add) calls `add` for every key


class Row:
    """The threads of one row: who they are, where their shared memory is, and what they do together."""

    def __init__(self, p: Problem, shared: Word, thread: Word):
        self.p, self.threads = p, p.config.threads
        self.log_threads = self.threads.bit_length() - 1
        self.warps = self.threads // 32
        group = thread >> self.log_threads
        self.group = group
        self.number = group + 1  # of the row's barrier; barrier 0 is the whole block's
        self.thread = thread & (self.threads - 1)
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.earlier_lanes = (ptx.constant(1) << self.lane) - 1
        shared = shared + group * p.row_bytes
        self.buffer, self.histogram = shared + p.buffer, shared
        self.list, self.sums = shared + p.block_list, shared + p.sums
        self.staging = shared + p.staging + (self.thread << 4)  # this thread's part of the first load

    def barrier(self) -> None:
        ptx.barrier_aligned(self.number, self.threads)

    def line(self, number: int) -> Word:
        return self.sums + 4 * WARP_SUMS * number

    def rounds(self, count: Word) -> Word:
        """How many times all threads together go over `count` items."""
        return (count + (self.threads - 1)) >> self.log_threads

    def warp_sums(self, line: Word) -> Word:
        """Lane i gets what warp i stored, 0 where there is none."""
        stored = ptx.load_shared(line + ((self.lane & (self.warps - 1)) << 2))
        return ptx.select(self.lane < self.warps, stored, 0)

    def before_and_total(self, line: Word, mine: Word) -> tuple[Word, Word]:
        """The sum of `mine`, a number of each warp, over the earlier warps of the row, and over all; it passes one barrier."""
        with ptx.when(self.lane.equals(0)):
            ptx.store_shared(line + (self.warp << 2), mine)
        self.barrier()
        sums = self.warp_sums(line)
        return ptx.reduce_warp("add", ptx.select(self.lane < self.warp, sums, 0)), ptx.reduce_warp("add", sums)

    def key(self, bits: Word) -> Word:
        """float32 bits -> unsigned integers in the same order; -0 and 0 are equal."""
        bits = ptx.select(bits.equals(0x80000000), 0, bits)
        return bits ^ ((bits.signed >> 31) | 0x80000000)

    def number_of_key(self, key: Word) -> Float:
        return ptx.float_of(key ^ (((key.signed >> 31) ^ 0xFFFFFFFF) | 0x80000000))

    # -- the search for the value of a rank

    def narrow(self, visit_keys: VisitKeys, lo: Word, hi: Word, rank: Word, slack: Word | int) -> list[Word]:
        """Narrows keys [lo, hi] to a range whose members, taken in whole, are at most `slack` more than are needed.

        Returns lo, hi and how many of the range's members the `rank` largest keys take, given that all keys above it are taken.
        """

        def one(carry: list[Word]) -> tuple[list[Word], list[Word], Predicate]:
            lo, hi, need = carry
            width = hi - lo
            used = ptx.constant(32) - ptx.leading_zeros(width)
            shift = ptx.select(used > LOG_BINS, used - LOG_BINS, 0)
            self.count_in_bins(visit_keys, hi, width, shift)
            number, above, members = self.bin_of_rank(need)
            new_hi = hi - (number << shift)
            bin_width = ptx.constant(1) << shift
            new_lo = ptx.select(new_hi - lo < bin_width, lo, new_hi - (bin_width - 1))
            need = need - above
            more = (shift > 0) & (members - need > slack)
            return [new_lo, new_hi, need], [], more

        return ptx.repeat([lo, hi, rank], one, 0)

    def count_in_bins(self, visit_keys: VisitKeys, hi: Word, width: Word, shift: Word) -> None:
        """Makes the histogram of the keys from hi - width to hi: bin i counts those that are i << shift or more below hi."""
        for j in range(BINS // self.threads):
            ptx.store_shared(self.histogram + ((self.thread + j * self.threads) << 2), 0)
        self.barrier()

        def add(key: Word, valid: Predicate | None = None) -> None:
            below = hi - key  # wraps for keys above the range, so one comparison sees both ends
            inside = below <= width
            inside = inside if valid is None else valid & inside
            ptx.increment_shared(self.histogram + ((below >> shift) << 2), inside)

        visit_keys(add)
        self.barrier()

    def bin_of_rank(self, rank: Word) -> list[Word]:
        """The bin that the `rank`-th key of the histogram is in, how many keys the bins before it have, and how many it has."""
        per_thread = BINS // self.threads
        mine = self.histogram + self.thread * (4 * per_thread)
        counts = [ptx.load_shared(mine + 4 * j) for j in range(per_thread)]
        total = ptx.total(counts)
        scanned = ptx.sum_of_lanes_up_to(total)
        with ptx.when(self.lane.equals(31)):
            ptx.store_shared(self.line(SUMS_OF_BINS) + (self.warp << 2), scanned)
        self.barrier()
        sums = self.warp_sums(self.line(SUMS_OF_BINS))
        before = ptx.reduce_warp("add", ptx.select(self.lane < self.warp, sums, 0)) + scanned - total
        for j, count in enumerate(counts):
            hit = (before < rank) & (before + count >= rank)
            ptx.store_shared(self.line(FOUND_BIN), self.thread * per_thread + j, hit)
            ptx.store_shared(self.line(FOUND_BIN) + 4, before, hit)
            ptx.store_shared(self.line(FOUND_BIN) + 8, count, hit)
            before = before + count
        self.barrier()
        return [ptx.load_shared(self.line(FOUND_BIN) + 4 * i) for i in range(3)]
