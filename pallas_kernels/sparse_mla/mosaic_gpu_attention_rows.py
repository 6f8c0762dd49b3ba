"""How rows come and go in mosaic_gpu_attention.py: barriers, the gathering warpgroup, query tiles and results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.tiles import TILED, WGMMA
from pallas_kernels.latents import VALUE_DIM, WIDTH
from pallas_kernels.softmax import MASKED
from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import OWNER_SHIFT, PAIR, TILE, Tasks

ROW_BYTES = 2 * WIDTH
HALF_ROW_BYTES = VALUE_DIM  # of the half of the value columns that a warpgroup owns
# Bytes of shared memory: of a half of 64 rows, of 8 rows of it, of the rotary columns of 64 rows, of 8 rows of these.
HALF, HALF_TILE, ROTARY_PART, ROTARY_TILE = 32768, 4096, 8192, 1024
LIST_SCAN_BARRIER = 12  # first of three named barriers, one per warpgroup, used by _pairs_to_visit

SCALAR = plgpu.Layout.WG_SPLAT(())
_REF, _TILED_REF = plgpu.RefType(), plgpu.RefType(TILED)


@dataclasses.dataclass(frozen=True)
class Barriers:
    """The kernel's mbarriers by name: their addresses in shared memory, 8 bytes each.

    slot and half are numbers, or values of a register.
    """

    WORDS: ClassVar[int] = 32

    base: ptx.Word

    @staticmethod
    def of(ref: Any) -> Barriers:
        return Barriers(ptx.shared_address(ref))

    def full(self, slot: ptx.Word | int, half: ptx.Word | int) -> ptx.Word:
        """Latents were gathered: an arrival of every gathering thread after its copies."""
        return self._at(0, (slot, 4), (half, 3))

    def empty(self, slot: ptx.Word | int, half: ptx.Word | int) -> ptx.Word:
        """Half of a slot may be overwritten, with what belongs to it: an arrival of every thread of the half's warpgroup."""
        return self._at(32, (slot, 4), (half, 3))

    def mask_ready(self, slot: ptx.Word | int) -> ptx.Word:
        """An arrival of the gathering threads that hold entries."""
        return self._at(64, (slot, 3))

    def queries_ready(self) -> ptx.Word:
        """An arrival of every computing thread."""
        return self._at(80)

    def p_ready(self, slot: ptx.Word | int) -> ptx.Word:
        """The softmax weights of a block: an arrival of every thread of the slot's warpgroup."""
        return self._at(88, (slot, 3))

    def init(self) -> None:
        for slot in range(2):
            for half in range(2):
                ptx.barrier_init(self.full(slot, half), 128)
                ptx.barrier_init(self.empty(slot, half), 128)
        for slot in range(2):
            ptx.barrier_init(self.mask_ready(slot), 16)
            ptx.barrier_init(self.p_ready(slot), 128)
        ptx.barrier_init(self.queries_ready(), 256)

    def _at(self, first: int, *indices: tuple[ptx.Word | int, int]) -> ptx.Word:
        """`indices` are (number, shift by which it becomes bytes)."""
        numbers = [index << shift for index, shift in indices if isinstance(index, int)]
        if len(numbers) == len(indices):
            return self.base + (first + sum(numbers))
        at = self.base + first
        for index, shift in indices:
            at = at + (index << shift)
        return at


def init_barriers(barriers: Any) -> None:
    """Initialises the barriers of the block, in thread 0."""

    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(ctx, barriers):
        named = Barriers.of(barriers)
        with ptx.when(ptx.thread().equals(0)):
            named.init()
            ptx.barrier_init_done()
        ptx.block_barrier()

    init(barriers)


def wait(barriers: Any, which: Callable[..., ptx.Word], *index: Any, parity: Any, fence: bool = False) -> None:
    """A computing warpgroup waits for a barrier, such as Barriers.full, slot, half.

    fence: what cp.async wrote reaches wgmma, which reads through another proxy, after one.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, *[SCALAR for _ in index], SCALAR))
    def run(ctx, barriers, *scalars):
        *index, parity = map(ptx.scalar, scalars)
        ptx.barrier_wait(which(Barriers.of(barriers), *index), parity)
        if fence:
            ptx.proxy_fence()

    run(barriers, *index, parity)


def arrive(barriers: Any, which: Callable[..., ptx.Word], *index: Any, fence: bool = False) -> None:
    """Every thread of a computing warpgroup arrives.

    racecheck does not see that one arrival a warp, after a warp barrier, stands for the other lanes.
    fence: what this thread wrote to shared memory before is seen by wgmma.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, *[SCALAR for _ in index]))
    def run(ctx, barriers, *index):
        address = which(Barriers.of(barriers), *map(ptx.scalar, index))
        if fence:
            ptx.proxy_fence()
        ptx.barrier_arrive(address)

    run(barriers, *index)


def _pairs_to_visit(lists: Any, which: ptx.Word, pairs: int) -> ptx.Word:
    """Pairs of key blocks of a list up to the last one with an entry that is set, at least 1: a warpgroup looks together."""
    thread = ptx.thread()
    at = ptx.offset(ptx.global_address(lists), which * pairs + (pairs - 1), 4 * PAIR)
    at = ptx.offset(at, thread & 127, 4)
    # The shuffle tells the compiler that the number is the same in a warp; loops over wgmma would be very slow without it.
    return ptx.asm(
        "{\n.reg .pred p;\n.reg .b32 entry, id, n;\n.reg .b64 a;\n"
        f"mov.b32 n, {pairs};\nmov.b64 a, $1;\nshr.u32 id, $2, 7;\nadd.u32 id, id, {LIST_SCAN_BARRIER};\n"
        "LOOK:\n"
        "setp.eq.s32 p, n, 1;\n@p bra FOUND;\n"
        "ld.global.nc.b32 entry, [a];\nsetp.ge.s32 p, entry, 0;\nbarrier.cta.red.or.pred p, id, 128, p;\n@p bra FOUND;\n"
        f"sub.s32 n, n, 1;\nsub.s64 a, a, {4 * PAIR};\nbra LOOK;\n"
        "FOUND:\nshfl.sync.idx.b32 $0, n, 0, 31, 0xffffffff;\n}",
        [at, thread],
        "=r,l,r",
        ptx.i32(),
    )


def pairs_of_list(lists: Any, which: Any, pairs: int) -> jax.Array:
    """`_pairs_to_visit` for a computing warpgroup."""

    @plgpu.inline_mgpu(arg_types=(_REF, SCALAR), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def find(ctx, lists, which):
        return mgpu.FragmentedArray.splat(_pairs_to_visit(lists, ptx.scalar(which), pairs), (), is_signed=True)

    return find(lists, which)


def _line(thread: ptx.Word) -> tuple[ptx.Word, ptx.Word, ptx.Word]:
    """(16-byte chunk of a 128-byte line, row, row & 7) of a thread of a warpgroup whose 8 lanes take a row, 16 rows at once."""
    chunk, row = thread & 7, thread >> 3
    return chunk, row, row & 7


def _in_line(row_in_tile: ptx.Word, chunk: ptx.Word) -> ptx.Word:
    """Where a chunk of a row is in its tile of 8 rows of 128 bytes, which wgmma reads swizzled."""
    return (row_in_tile << 7) + ((chunk ^ row_in_tile) << 4)


# ---- latents


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How the gathering warpgroup moves latents: cp.async, so that nothing waits for them in registers."""

    source: ptx.Address  # of the batch row, at this thread's chunk
    to_columns: ptx.Word
    to_rotary: ptx.Word

    @staticmethod
    def place(latents: Any, columns: Any, rotary: Any, batch: ptx.Word, keys: int) -> _Rows:
        chunk, row, in_tile = _line(ptx.thread() & 127)
        tile, swizzled = row >> 3, _in_line(in_tile, chunk)
        return _Rows(
            ptx.offset(ptx.offset(ptx.global_address(latents), chunk, 16), batch, keys * ROW_BYTES),
            ptx.shared_address(columns) + (tile << 12) + swizzled,  # 8 rows of a half: 4 KB
            ptx.shared_address(rotary) + (tile << 10) + swizzled,
        )

    def copy(self, rows: Sequence[tuple[ptx.Word, ptx.Word]], slot: int, half: int, with_rotary: bool) -> None:
        """rows: four of (latent row, 1 if it counts else 0)."""
        for i, (key, used) in enumerate(rows):
            source, size = ptx.offset(self.source, key, ROW_BYTES), used << 4
            target = self.to_columns + ((slot * 2 + half) * HALF + i * 2 * HALF_TILE)
            ptx.copy_async(target, ptx.offset(source, ptx.constant(half), HALF_ROW_BYTES), size, 4, 1024, 128)
            if with_rotary:
                target = self.to_rotary + (slot * ROTARY_PART + i * 2 * ROTARY_TILE)
                ptx.copy_async(target, ptx.offset(source, ptx.constant(1), 2 * VALUE_DIM), size, 1, 0, 0)


@dataclasses.dataclass(frozen=True)
class _Gatherer:
    """A thread of the gathering warpgroup."""

    tasks: Tasks
    copies: bool  # False leaves the copies out
    latents: Any
    lists: Any
    counts: Any
    columns: Any
    rotary: Any
    barriers: Barriers
    to_marks: ptx.Word
    holds_entries: ptx.Predicate
    from_lists: ptx.Address  # at this thread's row

    @staticmethod
    def of(tasks: Tasks, copies: bool, latents, lists, columns, rotary, marks, barriers, counts=None) -> _Gatherer:
        named = Barriers.of(barriers)
        chunk, row, _ = _line(ptx.thread() & 127)
        to_marks = ptx.shared_address(marks) + (row << 2)
        holds_entries = chunk.equals(0)
        from_lists = ptx.offset(ptx.global_address(lists), row, 4)
        return _Gatherer(tasks, copies, latents, lists, counts, columns, rotary, named, to_marks, holds_entries, from_lists)

    def task(self, task: ptx.Word, carry: list[Any]) -> list[Any]:
        """All latents of a task. The carry is how many pairs of key blocks were gathered."""
        tasks, per_task = self.tasks, self.tasks.pairs_per_task
        tile, split = task // tasks.splits, task % tasks.splits
        which = tile // tasks.tiles_per_list
        batch = tile // tasks.tiles_per_batch
        rows = _Rows.place(self.latents, self.columns, self.rotary, batch, tasks.keys)
        entries_at = ptx.offset(ptx.offset(self.from_lists, which, 4 * PAIR * tasks.pairs), split, 4 * PAIR * per_task)
        first = self._entries(entries_at, ptx.constant(0))  # comes while the list's end is looked at
        if self.counts is not None:
            pairs = ptx.load_global(ptx.offset(ptx.global_address(self.counts), which, 4))
        else:
            pairs = ptx.constant(per_task) if tasks.splits > 1 else _pairs_to_visit(self.lists, which, per_task)

        def step(pair, carry):
            done, *current = carry
            following = self._entries(entries_at, ptx.min_s32(pair + 1, pairs - 1))
            self._fill(rows, current, (done & 1) ^ 1)
            return [done + 1, *following]

        return ptx.loop(pairs, [carry[0], *first], step)[:1]

    def _entries(self, at: ptx.Address, pair: ptx.Word) -> list[Any]:
        """This thread's 8 of a pair."""
        at = ptx.offset(at, pair, 4 * PAIR)
        return [ptx.load_global(ptx.offset(at, ptx.constant(i), 64)) for i in range(8)]

    def _read(self, entry: ptx.Word) -> tuple[tuple[ptx.Word, ptx.Word], ptx.Word]:
        """((latent row, 1 if it counts else 0), mark) of an entry."""
        if self.tasks.packed > 1:
            used = (entry >> OWNER_SHIFT).differs(0)
            key, mark = entry & ((1 << OWNER_SHIFT) - 1), entry
        else:
            used = entry.signed >= 0
            key = ptx.min_s32(ptx.max_s32(entry, 0), self.tasks.keys - 1)
            mark = ptx.select(used, 0, int(np.float32(MASKED).view(np.int32)))
        return (key, ptx.select(used, 1, 0)), mark

    def _fill(self, rows: _Rows, entries: Sequence[ptx.Word], parity: ptx.Word) -> None:
        """Fills both slots by the entries of a pair.

        In the order in which the computing warpgroups need the halves. With the first half of a slot to become free, its
        warpgroup has also read the marks and the rotary part.
        """
        where, labels = zip(*map(self._read, entries), strict=True)
        for slot, half in ((0, 0), (0, 1), (1, 1), (1, 0)):
            ptx.barrier_wait(self.barriers.empty(slot, half), parity)
            if slot == half:
                with ptx.when(self.holds_entries):
                    for i in range(4):
                        ptx.store_shared(self.to_marks + (4 * TILE * slot + 64 * i), labels[4 * slot + i])
                ptx.barrier_arrive(self.barriers.mask_ready(slot), self.holds_entries)
            full = self.barriers.full(slot, half)
            if self.copies:
                rows.copy(where[4 * slot : 4 * slot + 4], slot, half, slot != half)
            ptx.barrier_arrive_after_copies(full)


def gather(tasks: Tasks, refs: Any, block: Any, num_tasks: Any, *, copies: bool) -> None:
    """The gathering warpgroup: every listed latent of every task into its slot, and what the entries say into `marks`."""
    optional = () if refs.counts is None else (refs.counts,)
    types = (_REF, _REF, _TILED_REF, _TILED_REF, _REF, _REF, *(_REF for _ in optional))

    @plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, *types))
    def run(ctx, block, num_tasks, *refs):
        gatherer, block = _Gatherer.of(tasks, copies, *refs), ptx.scalar(block)

        def task(i, carry):
            return gatherer.task(block + i * tasks.blocks, carry)

        ptx.loop(ptx.scalar(num_tasks), [ptx.constant(0)], task)
        ptx.copies_done()
        if tasks.splits > 1:  # takes part in the two barriers of combine
            ptx.cluster_barrier()
            ptx.cluster_barrier()

    run(block, num_tasks, refs.latents, refs.lists, refs.columns, refs.rotary, refs.marks, refs.barriers, *optional)


# ---- queries


def load_queries(queries: Any, columns: Any, rotary: Any, row: Any, rows: Any, half: Any, *, through_registers: bool) -> None:
    """A half of the query tile, 256 columns and 32 rows of the rotary ones: `rows` query rows from `row` on, then zeros.

    Each computing warpgroup loads a half of the first tile, and warpgroup 0 both of the following ones. By cp.async, or
    through registers for a cluster, whose results other blocks read in this place. A TMA copy into tiles of 8 rows would have
    to start at a multiple of 8.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _TILED_REF, _TILED_REF, SCALAR, SCALAR, SCALAR))
    def load(ctx, queries, columns, rotary, row, rows, half):
        # Else all these addresses are kept in registers through the loop over a list, at whose end the next tile is loaded.
        thread, half = ptx.opaque(ptx.thread()) & 127, ptx.scalar(half)
        chunk, line, in_tile = _line(thread)
        tile, swizzled = line >> 3, _in_line(in_tile, chunk)
        source = ptx.offset(ptx.offset(ptx.global_address(queries), ptx.scalar(row), ROW_BYTES), chunk, 16)

        def place(here):
            """(address, 1 if it counts else 0) of a row; one that does not is not read, but its address is of the array."""
            counts = ptx.select(here.signed < ptx.scalar(rows), 1, 0)
            return ptx.offset(source, ptx.select(counts.differs(0), here, 0), ROW_BYTES), counts

        runs = []  # (target, source, 1 if it counts else 0, pieces of 16 bytes), the pieces 1024 and 128 bytes apart
        to_columns = ptx.shared_address(columns) + (half << 15) + (tile << 12) + swizzled
        for i in range(4):
            at, counts = place(line + 16 * i)
            runs.append((to_columns + 2 * HALF_TILE * i, ptx.offset(at, half, HALF_ROW_BYTES), counts, 4))
        to_rotary = ptx.shared_address(rotary) + (half << 12) + (tile << 10) + swizzled
        for i in range(2):
            at, counts = place(line + (half << 5) + 16 * i)
            runs.append((to_rotary + 2 * ROTARY_TILE * i, ptx.offset(at, ptx.constant(1), 2 * VALUE_DIM), counts, 1))

        if through_registers:
            _copy_through_registers(runs)
        else:
            for target, at, counts, pieces in runs:
                ptx.copy_async(target, at, counts << 4, pieces, 1024, 128)

    load(queries, columns, rotary, row, rows, half)


def _copy_through_registers(runs: Sequence[tuple[ptx.Word, ptx.Address, ptx.Word, int]]) -> None:
    """Copies what ptx.copy_async would: all of it is under way before the first is stored."""
    loaded = []
    for target, at, counts, pieces in runs:
        for i in range(pieces):
            words = ptx.load_global_words_or_zeros(ptx.offset(at, ptx.constant(i), 128), counts, 4)
            loaded.append((target + 1024 * i, words))
    for target, words in loaded:
        ptx.store_shared_words(target, words)


def await_queries(barriers: Any, parity: Any) -> None:
    """Waits until both computing warpgroups have what they loaded of the query tile, and wgmma may read it."""

    @plgpu.inline_mgpu(arg_types=(_REF, SCALAR))
    def run(ctx, barriers, parity):
        ready = Barriers.of(barriers).queries_ready()
        ptx.copies_done()
        ptx.proxy_fence()
        ptx.barrier_arrive(ready)
        ptx.barrier_wait(ready, ptx.scalar(parity))

    run(barriers, parity)


# ---- results


def store_rows(values: jax.Array, out: Any, row: Any, rows: Any, column: Any) -> None:
    """Rows below `rows` of values [64, 256] into out [.., 512] from `row` and `column` * 256 on, in bfloat16, by a warpgroup.

    Four lanes share a row, each with two of every 8 columns. Of every 32 columns they exchange theirs, so that each has 8 that
    lie side by side and a row gets 64 bytes at once.
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, _REF, SCALAR, SCALAR, SCALAR))
    def store(ctx, values, out, row, rows, column):
        by_column_tile = values.registers.reshape(VALUE_DIM // 16, 2)
        thread = ptx.thread() & 127
        lane, warp = thread & 31, thread >> 5
        to = ptx.offset(ptx.global_address(out), ptx.scalar(row), 2 * VALUE_DIM)
        to = ptx.offset(ptx.offset(to, ptx.scalar(column), HALF_ROW_BYTES), lane & 3, 16)
        for half in range(2):
            here = (warp << 4) + (lane >> 2) + 8 * half
            inside, line = here.signed < ptx.scalar(rows), ptx.offset(to, here, 2 * VALUE_DIM)
            for first in range(0, VALUE_DIM // 16, 4):
                words = []
                for pair in by_column_tile[first : first + 4, half]:
                    words.append(ptx.to_bfloat16_pair(*(vector.extract(pair, [], [e]) for e in range(2))))
                at = ptx.offset(line, ptx.constant(first), 16)
                ptx.store_global_words(at, ptx.transposed_among_lanes(words, lane), inside, passing=True)

    store(values, out, row, rows, column)


def combine(staged: Any, sums: Any, out: Any, tasks: Tasks, row: Any, rows: Any, split: Any, warpgroup: Any) -> None:
    """The blocks of a cluster combine their parts: each writes an even share of the rows, from all blocks' shared memory.

    staged [2, 64, 256] is a block's normalised result, sums [64] the base-2 logarithm of its sum of weights.
    """
    share = -(-TILE // tasks.splits)  # rows a block

    @plgpu.inline_mgpu(arg_types=(_TILED_REF, _REF, _REF, SCALAR, SCALAR, SCALAR, SCALAR))
    def run(ctx, staged, sums, out, row, rows, split, warpgroup):
        ptx.cluster_barrier()
        thread = (ptx.thread() & 127) + (ptx.scalar(warpgroup) << 7)
        parts_at, sums_at = ptx.shared_address(staged), ptx.shared_address(sums)
        to = ptx.offset(ptx.global_address(out), ptx.scalar(row), 2 * VALUE_DIM)
        for i in range(-(-share // 4)):  # 256 threads take 4 rows of 64 chunks of 16 bytes at a time
            within = (thread >> 6) + 4 * i
            chunk = thread & 63
            here = ptx.min_s32(ptx.scalar(split) * share + within, TILE - 1)
            words = _combined_words(tasks.splits, _staged_chunk(parts_at, here, chunk), sums_at + (here << 2))
            counts = ptx.select(within.signed < share, 1, 0) & ptx.select(
                (ptx.scalar(split) * share + within).signed < ptx.scalar(rows), 1, 0
            )
            target = ptx.offset(ptx.offset(to, here, 2 * VALUE_DIM), chunk, 16)
            ptx.store_global_words(target, words, counts.differs(0))
        ptx.cluster_barrier()  # no block leaves while others read its memory

    run(staged, sums, out, row, rows, split, warpgroup)


def _staged_chunk(staged: ptx.Word, row: ptx.Word, chunk: ptx.Word) -> ptx.Word:
    """The address of 16 bytes, of 64, of a row of a staged result."""
    line, column_tile = row & 7, chunk >> 3
    return (
        staged
        + ((column_tile >> 2) << 15)
        + ((row >> 3) << 12)
        + ((column_tile & 3) << 10)
        + (line << 7)
        + (((chunk & 7) ^ line) << 4)
    )


def _combined_words(splits: int, part: ptx.Word, log: ptx.Word) -> list[Any]:
    """8 numbers of all blocks' results, weighed by their sums of weights; part and log are addresses in this block."""
    logs = [ptx.load_peer_float(ptx.peer_address(log, peer)) for peer in range(splits)]
    parts = [ptx.load_peer_words(ptx.peer_address(part, peer)) for peer in range(splits)]
    top = functools.reduce(arith.maximumf, logs)
    weights = [ptx.exp2(arith.subf(log, top)) for log in logs]
    total = functools.reduce(arith.addf, weights)
    words = []
    for word in range(4):
        low, high = zip(*(ptx.from_bfloat16_pair(part[word]) for part in parts), strict=True)
        halves = [arith.divf(functools.reduce(arith.addf, map(arith.mulf, values, weights)), total) for values in (low, high)]
        words.append(ptx.to_bfloat16_pair(*halves))
    return words
