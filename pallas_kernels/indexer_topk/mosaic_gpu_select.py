"""Exact top-k of score rows on Hopper: no sort, one read of the part of a row that can matter.

A group of threads owns a row and keeps the row's best candidates, (score, position) in position order, in shared memory:

1. Threshold. With block maxima (of every 16 scores) it is a value that at least k maxima reach, hence at least k scores;
   it comes from a histogram over the maxima. Without them, or where the row is too short for that to cut much, it is
   a guess from 4096 sampled scores, low enough that fewer than k pass only if the sample misleads.
2. List. The blocks whose maximum reaches the threshold, in order: only they are read. At 120K keys that is a quarter of the
   row, so the whole selection costs less than one read of it.
3. Stream. Each thread copies its own 16-byte pieces of the next chunks to shared memory (cp.async) while it works on the
   ones that have come; one packed scan per warp and one barrier per chunk give every score that reaches the threshold its
   position in the buffer. Before the buffer would overflow it is compacted to its best k and
   the threshold rises to the worst of them: nothing is lost, however the scores lie. Should fewer than k scores have passed
   (the sample misled), the row is streamed once more with no threshold.
4. The k-th best is found by histograms over what remains of the range, 11 bits of the ordered integer image of the
   floats a pass, until a whole bin is needed or the range is one value; ties are cut lowest position first.
5. One ordered pass writes the chosen positions.

A row that fits into all this shared memory at once (some 20000 scores) is read whole instead, and step 4 and 5 run over it.

Atomics only count, so the result does not depend on timing. NaN counts as -inf and -0 as 0. A row that sees at most
k keys takes them all.

Two rows of 512 threads share a thread block because the compiler then keeps to 64 registers and all 1024 fit on a
SM. Scores in flight wait in shared memory, because registers for them would spill. Few rows (decoding)
get 1024 threads each, which shortens the chain of dependent loads that bounds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ptx

BLOCK = 16  # scores per block maximum
MAX_K = 4096
MAX_KEYS = 2**20  # block numbers are 16 bits
KEY_OF_INFINITY = 0xFF800000
KEY_OF_LOWEST = 0x007FFFFF  # of -inf
NO_VALUE = 0x7FFFFFFF  # a NaN: it reaches no threshold
KEY_OF_NONE = 0xFFFFFFFF  # its key, above every range
_LOG_BINS = 11
_BINS = 1 << _LOG_BINS
_SAMPLE = 4096  # scores the threshold is guessed from, in lines of 32
_SLACK = 256  # blocks too many that end the search for the threshold
_SAMPLE_MARGIN = 32  # sampled scores, with a quarter of those expected above the k-th best: the guess is that much lower
SHARED_BYTES = 228_000  # of 232448, less what Mosaic reserves
_WARP_SUMS = 32  # words: one for each warp

Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """threads: of one row; rows: of one thread block; loads: 16-byte loads of a thread in one chunk.

    leave_out: only for measuring what stages cost, the positions are without meaning then. "search" ends a row after its
    stream, "append" reads and compares in the stream but keeps nothing.
    """

    threads: int = 512
    rows: int = 2
    loads: int = 2
    leave_out: str = ""

    def __post_init__(self) -> None:
        if self.threads not in (128, 256, 512, 1024):
            raise ValueError(f"SelectConfig: threads {self.threads} is not one of 128, 256, 512, 1024")
        if not 1 <= self.rows * self.threads <= 1024:
            raise ValueError(f"SelectConfig: {self.rows} rows of {self.threads} threads exceed a thread block of 1024")
        if self.loads not in (1, 2, 3, 4):
            raise ValueError(f"SelectConfig: loads {self.loads} is not within 1 to 4")
        if self.leave_out not in ("", "search", "append"):
            raise ValueError(f"SelectConfig: leave_out {self.leave_out!r} is neither 'search' nor 'append'")


def default_config(rows: int) -> SelectConfig:
    """Few rows leave SMs idle either way, so each gets as many threads as there can be."""
    return SelectConfig() if rows > 132 else SelectConfig(threads=1024, rows=1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of a launch, and where a row's shared memory holds what (in bytes from the row's start).

    rows of `batch_rows` queries each share a length; `pitch` rows of scores lie between two batches.
    width: scores in a row of the buffer, of which `keys` are some key's.
    clean: no score is NaN, and hidden ones in a row's last block are -inf.
    """

    rows: int
    batch_rows: int
    pitch: int
    width: int
    keys: int
    k: int
    has_maxima: bool
    clean: bool
    config: SelectConfig

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_K:
            raise ValueError(f"top-k: k {self.k} is not within 1 to {MAX_K}")
        if self.width % (4 * BLOCK) or not 0 < self.width <= MAX_KEYS:
            raise ValueError(f"top-k: row width {self.width} is not a multiple of {4 * BLOCK} up to {MAX_KEYS}")

        if not 1 <= self.keys <= self.width:
            raise ValueError(f"top-k: {self.keys} keys are not within a row of {self.width}")

    @property
    def chunk(self) -> int:
        """Scores read between two barriers."""
        return self.config.threads * 4 * self.config.loads

    @property
    def capacity(self) -> int:
        """Candidates the buffer holds: k and one chunk, and enough for what a sampled threshold lets pass."""
        return -(-max(self.k + self.chunk, 2 * self.k, _SAMPLE) // self.config.threads) * self.config.threads

    @property
    def list_capacity(self) -> int:
        """Entries of 2 bytes, in whole pieces of 16: what comes after them arrives in such pieces."""
        return -(-(2 * self.k + 2 * _SLACK) // 8) * 8 if self.has_maxima else 0

    @property
    def keeps_values(self) -> bool:
        """Whether the block maxima of a row fit where the candidates go later; else each pass reads them again."""
        room = self._room - self._fixed_bytes - 16 * self.config.threads - self.stage_bytes
        return 4 * self.width // BLOCK <= room

    @property
    def _room(self) -> int:
        """Bytes of shared memory for one row."""
        return SHARED_BYTES // self.config.rows // 16 * 16

    @property
    def _fixed_bytes(self) -> int:
        return 4 * _BINS + 2 * self.list_capacity + 4 * 8 * _WARP_SUMS

    @property
    def buffer_bytes(self) -> int:
        """Candidates of 8 bytes; before there are any, the values the threshold is found from."""
        values = max(_SAMPLE, self.width // BLOCK) if self.keeps_values else 0
        round = 4 * self.config.threads  # all threads read whole rounds
        return max(8 * self.capacity, 4 * -(-values // round) * round)

    # The histogram comes first, then eight lines of one word per warp (0 and 1 alternate in ordered passes, the others
    # serve searches), then the buffer, the list and where chunks under way arrive.

    @property
    def sums(self) -> int:
        return 4 * _BINS

    @property
    def buffer(self) -> int:
        return self.sums + 4 * 8 * _WARP_SUMS

    @property
    def block_list(self) -> int:
        return self.buffer + self.buffer_bytes

    @property
    def staging(self) -> int:
        return self.block_list + 2 * self.list_capacity

    @property
    def stage_bytes(self) -> int:
        return 4 * self.chunk

    @property
    def stages(self) -> int:
        """Chunks under way at the same time, a power of two: as many as there is room for."""
        fitting = (self._room - self.staging) // self.stage_bytes
        return next(stages for stages in (4, 2, 1) if stages <= max(1, fitting))

    @property
    def resident(self) -> int:
        """Scores of a row that is read whole: what fits where buffer, list and chunks are, in whole rounds of 16 bytes for
        each thread. Of a row long enough for its block maxima less is read."""
        fitting = (self.row_bytes - self.buffer) // (16 * self.config.threads) * 4 * self.config.threads
        return min(fitting, BLOCK * self.fewest_maxima) if self.has_maxima else fitting

    @property
    def fewest_maxima(self) -> int:
        """With no more maxima the k-th largest would let most of the row pass."""
        return self.k + self.k // 4

    @property
    def row_bytes(self) -> int:
        return self.staging + self.stages * self.stage_bytes


class _Row:
    """One row's program."""

    def __init__(self, p: Problem, shared: Any, thread: Any):
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

    # -- small parts

    def barrier(self) -> None:
        ptx.barrier_aligned(self.number, self.threads)

    def line(self, number: int) -> Any:
        return self.sums + 4 * _WARP_SUMS * number

    def rounds(self, count: Any) -> Any:
        """How many times all threads together go over `count` items."""
        return (count + (self.threads - 1)) >> self.log_threads

    def warp_sums(self, line: Any) -> Any:
        """Lane i gets what warp i stored, 0 where there is none."""
        stored = ptx.load_shared(line + ((self.lane & (self.warps - 1)) << 2))
        return ptx.select(self.lane < self.warps, stored, 0)

    def before_and_total(self, line: Any, mine: Any) -> Pair:
        """Each warp brings a number: the sum of the earlier warps', and of all. One barrier."""
        with ptx.when(self.lane.equals(0)):
            ptx.store_shared(line + (self.warp << 2), mine)
        self.barrier()
        sums = self.warp_sums(line)
        return ptx.reduce_warp("add", ptx.select(self.lane < self.warp, sums, 0)), ptx.reduce_warp("add", sums)

    def key(self, bits: Any) -> Any:
        """float32 bits -> unsigned integers in the same order; -0 and 0 are equal."""
        bits = ptx.select(bits.equals(0x80000000), 0, bits)
        return bits ^ ((bits.signed >> 31) | 0x80000000)

    def number_of_key(self, key: Any) -> Any:
        return ptx.float_of(key ^ (((key.signed >> 31) ^ 0xFFFFFFFF) | 0x80000000))

    # -- the search for the value of a rank

    def narrow(self, visit_keys: Callable[[Callable[..., None]], None], lo: Any, hi: Any, rank: Any, slack: Any) -> list[Any]:
        """Narrows keys [lo, hi] to a range whose members, taken in whole, are at most `slack` more than are needed.

        `visit_keys(add)` calls add(key, valid) for every key. Returns lo, hi and how many of the range's members the
        `rank` largest keys take, given that all keys above it are taken.
        """
        per_thread = _BINS // self.threads

        def one(carry: list[Any]) -> tuple[list[Any], list[Any], Any]:
            lo, hi, need = carry
            width = hi - lo
            used = ptx.constant(32) - ptx.leading_zeros(width)
            shift = ptx.select(used > _LOG_BINS, used - _LOG_BINS, 0)
            for j in range(per_thread):
                ptx.store_shared(self.histogram + ((self.thread + j * self.threads) << 2), 0)
            self.barrier()

            def add(key: Any, valid: Any = None) -> None:
                below = hi - key  # wraps for keys above the range, so one comparison sees both ends
                inside = below <= width
                inside = inside if valid is None else valid & inside
                ptx.increment_shared(self.histogram + ((below >> shift) << 2), inside)

            visit_keys(add)
            self.barrier()
            mine = self.histogram + self.thread * (4 * per_thread)
            counts = [ptx.load_shared(mine + 4 * j) for j in range(per_thread)]
            total = ptx.total(counts)
            scanned = ptx.sum_of_lanes_up_to(total)
            with ptx.when(self.lane.equals(31)):
                ptx.store_shared(self.line(2) + (self.warp << 2), scanned)
            self.barrier()
            sums = self.warp_sums(self.line(2))
            before = ptx.reduce_warp("add", ptx.select(self.lane < self.warp, sums, 0)) + scanned - total
            for j, count in enumerate(counts):
                hit = (before < need) & (before + count >= need)
                ptx.store_shared(self.line(3), self.thread * per_thread + j, hit)
                ptx.store_shared(self.line(3) + 4, before, hit)
                ptx.store_shared(self.line(3) + 8, count, hit)
                before = before + count
            self.barrier()
            number, above, members = (ptx.load_shared(self.line(3) + 4 * i) for i in range(3))
            new_hi = hi - (number << shift)
            bin_width = ptx.constant(1) << shift
            new_lo = ptx.select(new_hi - lo < bin_width, lo, new_hi - (bin_width - 1))
            need = need - above
            more = (shift > 0) & (members - need > slack)
            return [new_lo, new_hi, need], [], more

        return ptx.repeat([lo, hi, rank], one, 0)

    # -- 1. threshold

    def load_values(self, index: Any, count: Any, address: Any) -> list[Any]:
        """Four values of the sample or the maxima, NO_VALUE from `count` on."""
        xs = ptx.load_global_floats_or_nan(address, index < count)
        if not self.p.clean:
            xs = [ptx.number_or_lowest(x) for x in xs]
        return [ptx.float_of(ptx.select(index + e < count, ptx.bits_of(x), NO_VALUE)) for e, x in enumerate(xs)]

    def fold_values(
        self,
        count: Any,
        address: Callable[[Any], Any],
        carry: list[Any],
        visit: Callable[[Any, list[Any], list[Any]], list[Any]],
    ) -> list[Any]:
        """carry = visit(index, four values, carry) over all values, a thread's in the same order each time."""

        def step(i: Any, carry: list[Any]) -> list[Any]:
            index = (i * self.threads + self.thread) << 2
            if self.p.keeps_values:
                return visit(index, ptx.load_shared_floats(self.buffer + (index << 2), 4), carry)
            return visit(index, self.load_values(index, count, address(index)), carry)

        return ptx.loop(self.rounds((count + 3) >> 2), carry, step)

    def keep_values(self, count: Any, address: Callable[[Any], Any]) -> None:
        """Copies the values into the buffer. A thread reads back what it wrote itself, so there is no barrier."""

        def step(i: Any, carry: list[Any]) -> list[Any]:
            index = (i * self.threads + self.thread) << 2
            ptx.store_shared_floats(self.buffer + (index << 2), self.load_values(index, count, address(index)))
            return carry

        if self.p.keeps_values:
            ptx.loop(self.rounds((count + 3) >> 2), [], step)

    def range_of_values(self, count: Any, address: Callable[[Any], Any]) -> Pair:

        def visit(index: Any, xs: list[Any], carry: list[Any]) -> list[Any]:
            least, most = carry
            for x in xs:
                key = self.key(ptx.bits_of(x))
                least, most = ptx.min_u32(least, key), ptx.max_u32(most, ptx.select(key.equals(KEY_OF_NONE), 0, key))
            return [least, most]

        least, most = self.fold_values(count, address, [ptx.constant(KEY_OF_NONE), ptx.constant(0)], visit)
        least, most = ptx.reduce_warp("min", least), ptx.reduce_warp("max", most)
        with ptx.when(self.lane.equals(0)):
            ptx.store_shared(self.line(4) + (self.warp << 2), least)
            ptx.store_shared(self.line(5) + (self.warp << 2), most)
        self.barrier()
        there = (self.lane & (self.warps - 1)) << 2
        least, most = ptx.load_shared(self.line(4) + there), ptx.load_shared(self.line(5) + there)
        return ptx.reduce_warp("min", least), ptx.reduce_warp("max", most)

    def threshold(self, count: Any, rank: Any, slack: Any, address: Callable[[Any], Any]) -> list[Any]:
        """A key that at least `rank` of the values reach, at most about `slack` more, and the largest value's key."""
        self.keep_values(count, address)
        least, most = self.range_of_values(count, address)

        def visit_keys(add: Callable[..., None]) -> None:
            def visit(index: Any, xs: list[Any], carry: list[Any]) -> list[Any]:
                for x in xs:
                    add(self.key(ptx.bits_of(x)))
                return carry

            self.fold_values(count, address, [], visit)

        return [self.narrow(visit_keys, least, most, rank, slack)[0], most]

    # -- 2. list

    def list_blocks(self, count: Any, threshold: Any, address: Callable[[Any], Any]) -> Any:
        """Lists, in order, the blocks whose maximum reaches the threshold, as far as the list goes; returns how many."""
        limit = self.number_of_key(threshold)

        def visit(index: Any, xs: list[Any], carry: list[Any]) -> list[Any]:
            listed, line = carry
            hits = [x >= limit for x in xs]
            mine = ptx.total([ptx.as_number(hit) for hit in hits])
            scanned = ptx.sum_of_lanes_up_to(mine)
            before, total = self.before_and_total(self.sums + (line << 7), ptx.from_lane(scanned, 31))
            place = listed + before + scanned - mine
            for e, hit in enumerate(hits):
                fits = hit & (place < self.p.list_capacity)
                ptx.store_shared_short(self.list + (place << 1), index + e, fits)
                place = place + ptx.as_number(hit)
            return [listed + total, line ^ 1]

        return self.fold_values(count, address, [ptx.constant(0), ptx.constant(0)], visit)[0]

    # -- 3. stream

    def visit_buffer(self, count: Any) -> Callable[[Callable[..., None]], None]:

        def visit_keys(add: Callable[..., None]) -> None:
            def step(i: Any, carry: list[Any]) -> list[Any]:
                place = i * self.threads + self.thread
                add(self.key(ptx.load_shared(self.buffer + (place << 3))), place < count)
                return carry

            ptx.loop(self.rounds(count), [], step)

        return visit_keys

    def largest(self, count: Any) -> Any:
        """The largest key in the buffer."""

        def step(i: Any, carry: list[Any]) -> list[Any]:
            place = i * self.threads + self.thread
            return [ptx.max_u32(carry[0], ptx.select(place < count, self.key(ptx.load_shared(self.buffer + (place << 3))), 0))]

        mine = ptx.reduce_warp("max", ptx.loop(self.rounds(count), [ptx.constant(0)], step)[0])
        with ptx.when(self.lane.equals(0)):
            ptx.store_shared(self.line(4) + (self.warp << 2), mine)
        self.barrier()
        return ptx.reduce_warp("max", ptx.load_shared(self.line(4) + ((self.lane & (self.warps - 1)) << 2)))

    def in_order(self, count: Any, lo: Any, hi: Any, room: Any, sink: Callable[[Any, Any, Any, Any], None]) -> None:
        """sink(chosen, rank, score bits, position) over the buffer: chosen are the candidates above `hi` and the first
        `room` within [lo, hi], ranks count them in order."""

        def step(i: Any, carry: list[Any]) -> list[Any]:
            above_before, within_before, line = carry
            place = i * self.threads + self.thread
            score, position = ptx.load_shared_pair(self.buffer + (place << 3))
            key = self.key(score)
            real = place < count
            above, within = real & (key > hi), real & (key >= lo) & (key <= hi)
            lanes_above, lanes_within = ptx.ballot(above), ptx.ballot(within)
            mine = ptx.population(lanes_above) | (ptx.population(lanes_within) << 16)
            before, total = self.before_and_total(self.sums + (line << 7), mine)
            rank_above = above_before + (before & 0xFFFF) + ptx.population(lanes_above & self.earlier_lanes)
            rank_within = within_before + (before >> 16) + ptx.population(lanes_within & self.earlier_lanes)
            chosen = above | (within & (rank_within < room))
            sink(chosen, rank_above + ptx.min_u32(rank_within, room), score, position)
            return [above_before + (total & 0xFFFF), within_before + (total >> 16), line ^ 1]

        ptx.loop(self.rounds(count), [ptx.constant(0), ptx.constant(0), ptx.constant(0)], step)

    def compact(self, count: Any, threshold: Any, top: Any) -> list[Any]:
        """Keeps the best k of a full buffer. Returns how many are in it and the threshold a score now has to reach."""
        self.barrier()
        lo, hi, room = self.narrow(self.visit_buffer(count), self.below(threshold), top, ptx.constant(self.p.k), 0)

        def sink(chosen: Any, rank: Any, score: Any, position: Any) -> None:
            # Ranks are at most the place read, and in_order's barrier stands between this round's reads and the writes.
            ptx.store_shared_pair(self.buffer + (rank << 3), (score, position), chosen)

        self.in_order(count, lo, hi, room, sink)
        self.barrier()
        # Of a single value the first ones were kept, and later ones cannot replace them.
        return [ptx.constant(self.p.k), ptx.select(lo.equals(hi), lo + 1, lo)]

    def below(self, threshold: Any) -> Any:
        """A bound of the keys in the buffer: after compaction its worst may sit one below the threshold."""
        return threshold - ptx.as_number(threshold > 0)

    # -- a row in shared memory

    def choose_resident(self, visible: Any, scores: Any, out: Any) -> None:
        """The result of a row of more than k scores that lies in the buffer and what follows it, whole."""
        pieces = (visible + 3) >> 2  # of 16 bytes; a thread reads back what it copied itself, so there is no barrier

        def bring(i: Any, carry: list[Any]) -> list[Any]:
            piece = i * self.threads + self.thread
            real = piece < pieces
            ptx.copy_async_where(self.buffer + (piece << 4), ptx.offset(scores, piece << 2, 4), real)
            return carry

        ptx.loop(self.rounds(pieces), [], bring)
        ptx.copies_commit()
        ptx.copies_done(0)

        def keys_of(i: Any) -> tuple[Any, list[Any], list[Any]]:
            """First position, keys and whether there are such of a thread's piece in round i."""
            piece = i * self.threads + self.thread
            position, xs = piece << 2, ptx.load_shared_floats(self.buffer + (piece << 4), 4)
            if not self.p.clean:
                xs = [ptx.number_or_lowest(x) for x in xs]
            return position, [self.key(ptx.bits_of(x)) for x in xs], [position + e < visible for e in range(4)]

        def visit_keys(add: Callable[..., None]) -> None:
            def step(i: Any, carry: list[Any]) -> list[Any]:
                _, keys, real = keys_of(i)
                for key, valid in zip(keys, real, strict=True):
                    add(key, valid)
                return carry

            ptx.loop(self.rounds(pieces), [], step)

        lo, hi, room = self.narrow(
            visit_keys, ptx.constant(KEY_OF_LOWEST), ptx.constant(KEY_OF_INFINITY), ptx.constant(self.p.k), 0
        )

        def write(i: Any, carry: list[Any]) -> list[Any]:
            above_before, within_before, line = carry
            position, keys, real = keys_of(i)
            above = [valid & (key > hi) for key, valid in zip(keys, real, strict=True)]
            within = [valid & (key >= lo) & (key <= hi) for key, valid in zip(keys, real, strict=True)]
            counts = [ptx.as_number(a) | (ptx.as_number(w) << 16) for a, w in zip(above, within, strict=True)]
            mine = ptx.total(counts)
            scanned = ptx.sum_of_lanes_up_to(mine)
            before, total = self.before_and_total(self.sums + (line << 7), ptx.from_lane(scanned, 31))
            before = before + scanned - mine
            for e, (a, w, count) in enumerate(zip(above, within, counts, strict=True)):
                rank_within = within_before + (before >> 16)
                rank = above_before + (before & 0xFFFF) + ptx.min_u32(rank_within, room)
                chosen = a | (w & (rank_within < room))
                ptx.store_global(ptx.offset(out, rank, 4), position + e, chosen)
                before = before + count
            return [above_before + (total & 0xFFFF), within_before + (total >> 16), line ^ 1]

        ptx.loop(self.rounds(pieces), [ptx.constant(0), ptx.constant(0), ptx.constant(0)], write)

    # -- the whole

    def take_all(self, visible: Any, out: Any) -> None:
        """Writes 0, 1, ... visible - 1, then -1."""

        def step(i: Any, carry: list[Any]) -> list[Any]:
            place = i * self.threads + self.thread
            value = ptx.select(place < visible, place, 0xFFFFFFFF)
            real = place < self.p.k
            ptx.store_global(ptx.offset(out, place, 4), value, real)
            return carry

        ptx.loop(self.rounds(ptx.constant(self.p.k)), [], step)

    def choose(self, visible: Any, scores: Any, maxima: Any, out: Any) -> None:
        """Steps 1 to 5 of a row that sees more than k keys and is too long for shared memory."""
        p = self.p
        blocks = (visible + (BLOCK - 1)) >> (BLOCK.bit_length() - 1)
        if not p.has_maxima:  # what is read is known, so it may already come while a threshold is looked for
            stream = _Stream(self, scores, visible, None, blocks)
            stream.begin()
        by_maxima = blocks > p.fewest_maxima if p.has_maxima else visible < 0
        stride = (visible >> 7) & 0xFFFFFFF8  # between the sample's lines of 32 scores

        def address(index: Any) -> Any:
            of_sample = ptx.offset(scores, (index >> 5) * stride + (index & 31), 4)
            if not p.has_maxima:
                return of_sample
            return ptx.select(by_maxima, ptx.offset(maxima, index, 4), of_sample)

        # The whole row fits into the buffer, or a threshold is needed.
        count = ptx.select(by_maxima, blocks, _SAMPLE)
        expected = ((visible - 1) + _SAMPLE * p.k) // visible
        guess = ptx.min_u32(expected * 2, expected + (expected >> 2) + _SAMPLE_MARGIN)
        slack = ptx.constant(_SAMPLE * (p.capacity // 8)) // visible
        rank, slack = ptx.select(by_maxima, p.k, guess), ptx.select(by_maxima, _SLACK, slack)
        needed = by_maxima | (visible > p.capacity)
        start = [ptx.constant(KEY_OF_LOWEST), ptx.constant(KEY_OF_INFINITY)]
        threshold, most = ptx.choose(needed, lambda: self.threshold(count, rank, slack, address), start)
        top = ptx.select(by_maxima, most, KEY_OF_INFINITY)

        if p.has_maxima:
            found = ptx.choose(by_maxima, lambda: [self.list_blocks(count, threshold, address)], [blocks])[0]
            listed = by_maxima & (found <= p.list_capacity)  # a plateau may exceed the list: the whole row is read then
            self.barrier()  # the list is complete
            stream = _Stream(self, scores, visible, listed, ptx.select(listed, found, blocks))
            stream.begin()
        self.barrier()  # the values make way for candidates

        def attempt(carry: list[Any]) -> tuple[list[Any], list[Any], Any]:
            limit, again = carry
            ptx.branch(again > 0, stream.begin)
            count, reached = stream.fill(limit, top)
            return [ptx.constant(KEY_OF_LOWEST), ptx.constant(1)], [count, reached], (count < p.k) & again.equals(0)

        if p.config.leave_out:
            count = stream.fill(threshold, top)[0]
            leads = self.thread.equals(0)
            ptx.store_global(ptx.offset(out, self.thread, 4), count, leads)
            return
        count, threshold = ptx.repeat([threshold, ptx.constant(0)], attempt, 2)[2:]
        if not p.has_maxima:
            top = self.largest(count)  # a closer bound than infinity saves a pass
        lo, hi, room = self.narrow(self.visit_buffer(count), self.below(threshold), top, ptx.constant(p.k), 0)

        def sink(chosen: Any, rank: Any, score: Any, position: Any) -> None:
            ptx.store_global(ptx.offset(out, rank, 4), position, chosen)

        self.in_order(count, lo, hi, room, sink)


class _Stream:
    """Step 3 of a row. `begin` starts the copies of the first chunks, `fill` works them off and starts the others.

    blocks: how many to read: the listed ones, or without `listed` all of the row.
    """

    def __init__(self, row: _Row, scores: Any, visible: Any, listed: Any, blocks: Any):
        self.row, self.p = row, row.p
        self.scores, self.visible, self.listed, self.blocks = scores, visible, listed, blocks
        blocks_per_load = 128 // BLOCK  # of a warp: 32 lanes, 4 scores each
        self.loads, self.lanes_per_block = self.p.config.loads, BLOCK // 4
        log_lanes = self.lanes_per_block.bit_length() - 1
        self.slots = [
            row.warp * (self.loads * blocks_per_load) + (row.lane >> log_lanes) + load * blocks_per_load
            for load in range(self.loads)
        ]
        self.within_block = (row.lane & (self.lanes_per_block - 1)) << 2

    def place(self, chunk: Any, load: int) -> Pair:
        """Whether there is anything for this thread's load in a chunk, and its first position."""
        slot = chunk * (self.p.chunk // BLOCK) + self.slots[load]
        real, block = slot < self.blocks, slot
        if self.p.has_maxima:
            in_list = real & self.listed
            entry = ptx.load_shared_short(self.row.list + (slot << 1), in_list)
            block = ptx.select(self.listed, entry, slot)
        return real, block * BLOCK + self.within_block

    def arrival(self, stage: Any, load: int) -> Any:
        return self.row.staging + stage + load * 16 * self.row.threads

    def fetch(self, chunk: Any, stage: Any) -> None:
        for load in range(self.loads):
            real, position = self.place(chunk, load)
            ptx.copy_async_where(self.arrival(stage, load), ptx.offset(self.scores, position, 4), real)
        ptx.copies_commit()

    def begin(self) -> None:
        for ahead in range(self.p.stages):
            self.fetch(ptx.constant(ahead), ptx.constant(ahead * self.p.stage_bytes))

    def arrived(self, stage: Any, load: int, position: Any) -> list[Any]:
        xs = ptx.load_shared_floats(self.arrival(stage, load), 4)
        if self.p.clean:
            return xs
        keys = [
            ptx.select(position + e < self.visible, ptx.bits_of(ptx.number_or_lowest(x)), NO_VALUE) for e, x in enumerate(xs)
        ]
        return [ptx.float_of(key) for key in keys]

    def until_full(self, chunk: Any, count: Any, chunks: Any, limit: Any) -> list[Any]:
        """Appends chunks until one does not fit or all have: [the next one's number, how many scores there are]."""
        row, loads, stages = self.row, self.loads, self.p.stages

        def one(carry: list[Any]) -> tuple[list[Any], list[Any], Any]:
            chunk, count = carry
            stage = (chunk & (stages - 1)) * self.p.stage_bytes
            ptx.copies_done(stages - 1)
            places = [self.place(chunk, load) for load in range(loads)]
            values = [self.arrived(stage, load, position) for load, (_, position) in enumerate(places)]
            limits = [ptx.float_of(ptx.select(real, ptx.bits_of(limit), NO_VALUE)) for real, _ in places]
            packed = ptx.constant(0)  # a byte per load, at most 4 x 32 lanes each
            for load in range(loads):
                packed = ptx.count_at_least(values[load], limits[load], packed, 1 << (8 * load))
            if self.p.config.leave_out == "append":
                self.fetch(chunk + stages, stage)
                chunk = chunk + 1
                return [chunk, count + packed], [], chunk < chunks
            scanned = ptx.sum_of_lanes_up_to(packed)
            of_warp, before_lane = ptx.from_lane(scanned, 31), scanned - packed
            parts = [(of_warp >> (8 * load)) & 255 for load in range(loads)]
            mine = ptx.total(parts)
            before, total = row.before_and_total(row.sums + ((chunk & 1) << 7), mine)
            fits = count + total <= self.p.capacity

            def append() -> None:
                self.fetch(chunk + stages, stage)
                first = count + before
                for load in range(loads):
                    address = row.buffer + ((first + ((before_lane >> (8 * load)) & 255)) << 3)
                    ptx.append_at_least(values[load], limits[load], address, places[load][1])
                    first = first + parts[load]

            ptx.branch(fits, append)
            chunk, count = chunk + ptx.as_number(fits), ptx.select(fits, count + total, count)
            return [chunk, count], [], fits & (chunk < chunks)

        return ptx.repeat([chunk, count], one, 0)

    def fill(self, threshold: Any, top: Any) -> list[Any]:
        """Fills the buffer with the scores that reach the threshold: how many, and the new threshold. No key is above `top`.

        Compaction stands outside the loop over chunks: rare as it is, within it it would cost registers.
        """
        row = self.row
        blocks_per_chunk = self.p.chunk // BLOCK
        chunks = (self.blocks + (blocks_per_chunk - 1)) // blocks_per_chunk

        def fill_and_compact(carry: list[Any]) -> tuple[list[Any], list[Any], Any]:
            chunk, count, threshold = carry
            chunk, count = self.until_full(chunk, count, chunks, row.number_of_key(threshold))
            left = chunk < chunks
            count, threshold = ptx.choose(left, lambda: row.compact(count, threshold, top), [count, threshold])
            return [chunk, count, threshold], [], left

        count, threshold = ptx.repeat([ptx.constant(0), ptx.constant(0), threshold], fill_and_compact, 0)[1:]
        ptx.copies_done(0)  # of the groups that found nothing left to copy
        row.barrier()
        return [count, threshold]


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Global addresses of the arrays of `select`; maxima may be None."""

    scores: Any
    maxima: Any
    positions: Any
    lengths: Any
    out: Any


def select_rows(p: Problem, block: ptx.Word, arrays: Arrays, shared: ptx.Word) -> None:
    """The program of one thread block, from its number and the address of its shared memory."""
    row_program = _Row(p, shared, ptx.thread())
    row = block * p.config.rows + row_program.group

    def program() -> None:
        batch = row // p.batch_rows
        last = ptx.load_global(ptx.offset(arrays.positions, row, 4)) + 1
        length = ptx.load_global(ptx.offset(arrays.lengths, batch, 4))
        visible = ptx.min_u32(ptx.max_s32(ptx.min_s32(last, length), 0), p.keys)
        score_row = batch * p.pitch + (row - batch * p.batch_rows)
        scores = ptx.offset(arrays.scores, score_row, 4 * p.width)
        maxima = ptx.offset(arrays.maxima, score_row, 4 * p.width // BLOCK) if p.has_maxima else None
        out = ptx.offset(arrays.out, row, 4 * p.k)
        ptx.branch(visible <= p.k, lambda: row_program.take_all(visible, out))
        ptx.branch((visible > p.k) & (visible <= p.resident), lambda: row_program.choose_resident(visible, scores, out))
        ptx.branch((visible > p.k) & (visible > p.resident), lambda: row_program.choose(visible, scores, maxima, out))

    ptx.branch(row < p.rows, program)


def select(
    scores: jax.Array,
    maxima: jax.Array | None,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    k: int,
    *,
    clean: bool,
    keys: int | None = None,
    config: SelectConfig | None = None,
) -> jax.Array:
    """The k best positions of each row among those it sees, ascending, then -1.

    Args:
      scores: [B, S', T'] float32, of which the first S rows count; T' is a multiple of 64.
      maxima: [B, S', T' / 16] float32, of the visible scores of each block of 16, or None.
      q_positions: [B, S] int32 and kv_lengths [B] int32: the row sees keys t <= position and t < length.
      clean: no visible score is NaN, and the others in the last visible block of a row are -inf.
      keys: T, how many of a row's scores are of keys; None for T'.

    Returns:
      [B, S, k] int32.
    """
    b, s = q_positions.shape
    problem = Problem(
        rows=b * s,
        batch_rows=s,
        pitch=scores.shape[1],
        width=scores.shape[2],
        keys=scores.shape[2] if keys is None else keys,
        k=k,
        has_maxima=maxima is not None,
        clean=clean,
        config=config or default_config(b * s),
    )
    config = problem.config

    def indexer_select(*refs: Any) -> None:
        ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

        @plgpu.inline_mgpu(arg_types=(ref,) * len(refs) + (scalar,))
        def program(ctx: Any, *values: Any) -> None:
            *inputs, out, shared, block = values
            scores, *given, positions, lengths = (ptx.global_address(x) for x in inputs)
            arrays = Arrays(scores, given[0] if given else None, positions, lengths, ptx.global_address(out))
            select_rows(problem, ptx.scalar(block), arrays, ptx.shared_address(shared))

        program(*refs, jax.lax.axis_index("block"))

    kernel = plgpu.kernel(
        indexer_select,
        out_type=jax.ShapeDtypeStruct((b, s, k), jnp.int32),
        scratch_types=[plgpu.SMEM((config.rows * problem.row_bytes // 4,), jnp.int32)],
        grid=(-(-problem.rows // config.rows),),
        grid_names=("block",),
        num_threads=config.rows * config.threads // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return kernel(*(x for x in (scores, maxima, q_positions, kv_lengths) if x is not None))
