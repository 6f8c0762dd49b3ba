"""The attention kernel of sparse_mla for Hopper over latents in 8 bits (`quant.Latents`): e4m3 codes, one scale a token.

The codes are never decoded in memory. Keys are the rows of wgmma's tiles and heads, rounded up to a multiple of 8, its columns:

    logits^T [64 keys, heads] = codes [64 keys, 512] queries^T [512, heads]          e4m3 by e4m3
                              + rotary [64 keys, 64] queries^T [64, heads]           bfloat16
    out^T [512, heads] += codes^T [512, 64 keys] weights^T [64 keys, heads]          float16, codes from registers

A token's scale factors out of all: it multiplies the token's logits, and its weight. So

- the first product takes codes as they lie. A bfloat16 query, scaled by a power of two, is the sum of two e4m3 numbers: exactly
  down to 2**-10 of its head's largest number, below within 2**-20 of that. Both parts are columns of the same product, and
  their logits are added;
- the last one needs codes with their lines along the columns, which wgmma reads from shared memory in 16 bits only. Here a
  warp loads them transposed, two columns a register, and makes float16 of them, exactly. The weights carry the scales, and
  refer to the largest product of weight and scale, so float16 holds them; their sum is without scales.

A task is up to 64 heads of a query, its list is visited in blocks of 64 keys. A block of the grid is persistent, one on each
SM, or one of a cluster whose blocks share a list and combine what they have. It has four warpgroups: the first makes logits
and weights, the next block's logits while it makes a block's weights; the second and the third multiply 256 value columns
each; the fourth gathers by cp.async. What they hand on:

- Codes of a key block and their scales, in a ring of 3 to 5 slots, by halves of 256 columns; the rotary columns and the scales
  come with the second one. full[slot][half]: an arrival of every gathering thread after its copies; empty[slot][half]: one of
  every thread of the half's warpgroup, once the codes are in its registers.
- The weights of a block, in one of two places, with the factors by which the values so far are rescaled, and after the last
  block the sums of the weights: ready[place] and free[place], arrivals of every thread.

The maximum that weights refer to is a head's largest so far up to LAZY powers of two, as in mosaic_gpu_few_heads.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, quant
from pallas_kernels.hopper import ptx
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.softmax import LAZY, LOG2E, START

KEYS = 64  # of a block
MAX_COLUMNS = 64
MAX_SPLITS = 8  # blocks of a cluster
MAX_SLOTS = 6
PIECE = KEYS * 128  # bytes of 128 columns of a key block
PIECES = VALUE_DIM // 128
HALVES = 2  # of a slot, one for each values' warpgroup
TILES = VALUE_DIM // HALVES // 64  # of 64 value columns, of a values' warpgroup
STAGED_LINE = 2 * VALUE_DIM + 16  # bytes of a head's staged result; 16 more, so that a warp's stores meet no bank twice
SHARED_BYTES = 226 * 1024  # a block may have 227 KB, but Mosaic rounds up to whole KB and adds a static byte
SMALLEST = 2.0**-60  # largest magnitude that a head's queries count as having
VOTE_BARRIER, MAXIMA_BARRIER = 8, 9  # named barriers of the first warpgroup

# Registers of a thread of the four warpgroups, by whether tasks are wide.
REGISTERS = {False: (184, 144, 144, 40), True: (136, 168, 168, 40)}

FRAGMENTS = {False: 2, True: 1}  # of 16 keys and 64 value columns that are multiplied together; True for wide tasks

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Tasks:
    """B x S queries of H heads over T keys each, with lists of `blocks` key blocks.

    Where `splits` is more than 1, a task is that of a cluster: all but its last block have `share` key blocks of the list, the
    last one has what is left.
    """

    batch: int
    queries: int
    heads: int
    keys: int
    blocks: int
    splits: int = 1

    def __post_init__(self) -> None:
        if min(self.heads, self.blocks) < 1:
            raise ValueError(f"there is no task of {self.heads} heads and {self.blocks} key blocks")
        if not 1 <= self.splits <= MAX_SPLITS or (self.splits - 1) * self.share >= self.blocks:
            raise ValueError(f"{self.blocks} key blocks do not divide into {self.splits} of at most {MAX_SPLITS} splits")

    @property
    def tiles(self) -> int:
        """Into how many tasks the heads of a query are divided."""
        return -(-self.heads // MAX_COLUMNS)

    @property
    def heads_per_tile(self) -> int:
        """Of every tile but perhaps the last."""
        return -(-self.heads // self.tiles)

    @property
    def columns(self) -> int:
        return -(-self.heads_per_tile // 8) * 8

    @property
    def is_wide(self) -> bool:
        """Whether the accumulators need more than a warpgroup's even share of registers."""
        return self.columns > MAX_COLUMNS // 2

    @property
    def count(self) -> int:
        """Tasks, or clusters that share one."""
        return self.batch * self.queries * self.tiles

    @property
    def grid(self) -> int:
        """Persistent blocks, or clusters of one task each."""
        return self.count if self.splits > 1 else min(hopper.NUM_SMS, self.count)

    @property
    def share(self) -> int:
        """Key blocks of a task, at most."""
        return -(-self.blocks // self.splits)


# How many clusters of so many blocks run at a time for sure: a cluster lies within a group of 14 to 18 of the 132
# multiprocessors. One cluster too many takes as long as twice as many (docs/kernels.md).
RESIDENT_CLUSTERS = {8: 13, 4: 29, 2: 66}


def splits_of(tiles: int, blocks: int) -> int:
    """Into how many parts lists of `blocks` key blocks are split, so that the device is full and all run at once."""
    fitting = (n for n, most in RESIDENT_CLUSTERS.items() if tiles <= most and (n - 1) * -(-blocks // n) < blocks)
    return max(fitting, default=1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where things are in shared memory, in bytes. Matrices come first and are tiles of 8 lines of 128 bytes."""

    columns: int
    slots: int
    codes: int  # [slots][4 pieces][64 keys][128]
    rotary: int  # [slots][64 keys][64] bfloat16
    queries: int  # [4 pieces][2 parts][columns][128]; in the end the results of a cluster's block, [columns][STAGED_LINE]
    rotary_queries: int  # [columns][64] bfloat16
    weights: int  # [2][columns][64] float16
    scales: int  # [slots][64] float32, of keys; zero for entries that do not count
    query_scales: int  # [columns] float32
    factors: int  # [2][columns] float32
    sums: int  # [2][4 warps][columns] float32
    logs: int  # [columns] float32, log2 of the sum of the weights of a cluster's block
    maxima: int  # [4 warps][columns] float32
    raised: int  # [2], whether factors are to be applied
    full: int  # barriers, [slots][2]
    empty: int
    ready: int
    free: int
    end: int

    @staticmethod
    def of(columns: int) -> Memory:
        for slots in range(MAX_SLOTS, 1, -1):
            row, barriers = 4 * columns, 16 * slots
            sizes = [slots * PIECES * PIECE, slots * PIECE, PIECES * 256 * columns, 128 * columns, 256 * columns]
            sizes += [4 * KEYS * slots, row, 2 * row, 8 * row, row, 4 * row, 8, barriers, barriers, 16, 16]
            if sum(sizes) <= SHARED_BYTES:
                break
        return Memory(columns, slots, *itertools.accumulate([0, *sizes]))

    @property
    def query_part(self) -> int:
        return 128 * self.columns

    @property
    def query_piece(self) -> int:
        return 2 * self.query_part

    @property
    def of_weights(self) -> int:
        return 128 * self.columns


@dataclasses.dataclass(frozen=True)
class _Ring:
    """A slot of the ring and how often the ring went round, as values of a loop's carry."""

    memory: Memory
    slot: ptx.Value
    round: ptx.Value

    @property
    def carry(self) -> list[ptx.Value]:
        return [self.slot, self.round]

    def codes(self, base: ptx.Value) -> ptx.Value:
        return ptx.add(base, self.memory.codes, ptx.mul(self.slot, PIECES * PIECE))

    def rotary(self, base: ptx.Value) -> ptx.Value:
        return ptx.add(base, self.memory.rotary, ptx.mul(self.slot, PIECE))

    def scales(self, base: ptx.Value) -> ptx.Value:
        return ptx.add(base, self.memory.scales, ptx.mul(self.slot, 4 * KEYS))

    def barrier(self, base: ptx.Value, kind: int, half: int) -> ptx.Value:
        return ptx.add(base, kind + 8 * half, ptx.shift_left(self.slot, 4))

    def next(self) -> _Ring:
        following = ptx.add(self.slot, 1)
        around = ptx.compare("eq", following, self.memory.slots)
        round_ = ptx.select(around, ptx.bit_xor(self.round, 1), self.round)
        return _Ring(self.memory, ptx.select(around, 0, following), round_)


def _start(memory: Memory) -> _Ring:
    return _Ring(memory, ptx.constant(0), ptx.constant(0))


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a task is about."""

    query: ptx.Value
    split: ptx.Value
    first_head: ptx.Value
    heads: ptx.Value
    first_row: ptx.Value  # of the [B * S * H] query rows
    first_block: ptx.Value  # of the [B * S * blocks] key blocks

    @staticmethod
    def of(tasks: Tasks, number: ptx.Value) -> _Task:
        query, tile = ptx.div(number, tasks.tiles), ptx.rem(number, tasks.tiles)
        split = ptx.cluster_rank() if tasks.splits > 1 else ptx.constant(0)
        first_head = ptx.mul(tile, tasks.heads_per_tile)
        return _Task(
            query,
            split,
            first_head,
            ptx.minimum(ptx.sub(tasks.heads, first_head), tasks.heads_per_tile),
            ptx.add(ptx.mul(query, tasks.heads), first_head),
            ptx.add(ptx.mul(query, tasks.blocks), ptx.mul(split, tasks.share)),
        )

    def blocks(self, tasks: Tasks, counts_at: ptx.Value | None) -> ptx.Value:
        """How many key blocks to visit."""
        if counts_at is not None:
            return ptx.load_global(ptx.offset(counts_at, self.query, 4))
        rest = ptx.sub(tasks.blocks, ptx.mul(self.split, tasks.share))
        return ptx.opaque(ptx.minimum(rest, tasks.share))  # a constant would cost registers


def _line(thread: ptx.Value) -> tuple[ptx.Value, ptx.Value]:
    """(16-byte chunk of a line, line) of a thread whose warpgroup copies 16 lines at once."""
    return ptx.bit_and(thread, 7), ptx.shift_right(thread, 3)


def _in_tiles(line: ptx.Value, chunk: ptx.Value) -> ptx.Value:
    """Where a chunk of a line is in a matrix of swizzled tiles."""
    within = ptx.bit_and(line, 7)
    return ptx.add(ptx.shift_left(line, 7), ptx.shift_left(ptx.bit_xor(chunk, within), 4))


def _address_of(optional: tuple) -> ptx.Value | None:
    """Of an array that may be missing."""
    return ptx.global_address(optional[0]) if optional else None


def _for_each_task(tasks: Tasks, block: ptx.Value, carry: list, body) -> None:
    """carry = body(number of a task, carry) for the tasks of a block of the grid."""
    if tasks.splits > 1:
        body(block, carry)
        return
    count = ptx.div(ptx.sub(tasks.count + tasks.grid - 1, block), tasks.grid)
    ptx.loop(count, carry, lambda i, carry: body(ptx.add(block, ptx.mul(i, tasks.grid)), carry))


def _init_barriers(memory: Memory, ref) -> None:
    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(ctx, ref):
        base = ptx.shared_address(ref)
        with ptx.when(ptx.compare("eq", ptx.thread(), 0)):
            for i in range(HALVES * memory.slots):
                ptx.barrier_init(ptx.add(base, memory.full + 8 * i), 128)
                ptx.barrier_init(ptx.add(base, memory.empty + 8 * i), 128)
            for place in range(2):
                ptx.barrier_init(ptx.add(base, memory.ready + 8 * place), 128)
                ptx.barrier_init(ptx.add(base, memory.free + 8 * place), 128 * HALVES)
            ptx.barrier_init_done()
        ptx.block_barrier()

    init(ref)


def _meet_cluster(tasks: Tasks) -> None:
    """Warpgroups that do not combine take part in the barriers of those that do."""
    if tasks.splits > 1:
        ptx.cluster_barrier()
        ptx.cluster_barrier()


def _gather(tasks: Tasks, memory: Memory, codes, rotary, scales, lists, counts, ref, block) -> None:
    """The fourth warpgroup: 8 lanes copy 128 bytes of a row with cp.async into the tiles that wgmma reads."""

    optional = () if counts is None else (counts,)

    @plgpu.inline_mgpu(arg_types=(_SCALAR, *[_REF] * 5, *[_REF for _ in optional]))
    def gather(ctx, block, codes, rotary, scales, lists, ref, *optional):
        base = ptx.shared_address(ref)
        chunk, row = _line(ptx.bit_and(ptx.thread(), 127))
        to = _in_tiles(row, chunk)
        # Each of 8 lanes knows the entries of rows `row`, + 16, + 32 and + 48; the first four copy a row's scale each.
        to_scale = ptx.add(ptx.shift_left(row, 2), ptx.shift_left(chunk, 6))
        own_entry = ptx.offset(ptx.global_address(lists), row, 4)
        codes_at, rotary_at = (ptx.offset(ptx.global_address(x), chunk, 16) for x in (codes, rotary))
        scales_at, counts_at = ptx.global_address(scales), _address_of(optional)
        block = ptx.scalar(block)

        def entries(task: _Task, key_block):
            """Of this thread's four rows of a key block."""
            at = ptx.offset(own_entry, ptx.add(task.first_block, key_block), 4 * KEYS)
            return [ptx.load_global(ptx.offset(at, ptx.constant(i), 64)) for i in range(4)]

        def one_task(number, carry):
            task = _Task.of(tasks, number)
            following = _Task.of(tasks, ptx.minimum(ptx.add(number, tasks.grid), tasks.count - 1))
            first_key = ptx.mul(ptx.div(task.query, tasks.queries), tasks.keys)
            blocks, blocks_after = carry[0], following.blocks(tasks, counts_at)

            def one_block(b, carry):
                ring, current = _Ring(memory, *carry[:2]), carry[2:]
                is_last = ptx.compare("eq", ptx.add(b, 1), blocks)
                next_block = ptx.select(is_last, following.first_block, ptx.add(task.first_block, ptx.add(b, 1)))
                after = entries(dataclasses.replace(task, first_block=next_block), ptx.constant(0))
                rows = []  # (key, 1 if it counts else 0)
                for entry in current:
                    used = ptx.select(ptx.compare("sge", entry, 0), 1, 0)
                    key = ptx.minimum(ptx.maximum(entry, 0), tasks.keys - 1)
                    rows.append((ptx.add(first_key, key), used))

                def copy_half(half: int) -> None:
                    target = ptx.add(ring.codes(base), to, half * PIECES // HALVES * PIECE)
                    for j, (key, used) in enumerate(rows):
                        at = ptx.offset(ptx.offset(codes_at, key, VALUE_DIM), ptx.constant(half), VALUE_DIM // HALVES)
                        size = ptx.shift_left(used, 4)
                        ptx.copy_async(ptx.add(target, 2048 * j), at, size, PIECES // HALVES, PIECE, 128)

                def copy_rotary_and_scales() -> None:
                    target = ptx.add(ring.rotary(base), to)
                    for j, (key, used) in enumerate(rows):
                        at = ptx.offset(rotary_at, key, 2 * ROTARY)
                        ptx.copy_async(ptx.add(target, 2048 * j), at, ptx.shift_left(used, 4), 1, 0, 0)
                    key, used = rows[3]
                    for i in range(3):
                        mine = ptx.compare("eq", chunk, i)
                        key, used = ptx.select(mine, rows[i][0], key), ptx.select(mine, rows[i][1], used)
                    with ptx.when(ptx.compare("slt", chunk, 4)):
                        at = ptx.offset(scales_at, key, 4)
                        ptx.copy_async_word(ptx.add(ring.scales(base), to_scale), at, ptx.shift_left(used, 2))

                for half in range(HALVES):
                    ptx.barrier_wait(ring.barrier(base, memory.empty, half), ptx.bit_xor(ring.round, 1))
                    if half == 0:  # what is overwritten was copied `slots` blocks ago
                        ptx.copies_done(pending=memory.slots - 1)
                    copy_half(half)
                    if half == HALVES - 1:
                        copy_rotary_and_scales()
                    ptx.barrier_arrive_after_copies(ring.barrier(base, memory.full, half))
                ptx.copies_commit()
                return [*ring.next().carry, *after]

            return [blocks_after, *ptx.loop(blocks, carry[1:], one_block)]

        first = _Task.of(tasks, block)
        carry = [first.blocks(tasks, counts_at), *_start(memory).carry, *entries(first, ptx.constant(0))]
        _for_each_task(tasks, block, carry, one_task)
        ptx.copies_done()
        _meet_cluster(tasks)

    gather(block, codes, rotary, scales, lists, ref, *optional)


def _weigh(tasks: Tasks, memory: Memory, scale: float, queries, counts, ref, block) -> None:
    """The first warpgroup: logits and weights.

    A thread has rows g and g + 8 of its warp's 16 keys, g = lane / 4, and columns 2 (lane % 4) and the next of every 8.
    """
    groups = tasks.columns // 8  # of 8 columns, 4 logits a thread each: two columns of row g, the same of g + 8
    to_logits = scale * LOG2E

    optional = () if counts is None else (counts,)

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, *[_REF for _ in optional]))
    def weigh(ctx, block, queries, ref, *optional):
        base = ptx.shared_address(ref)
        thread = ptx.bit_and(ptx.thread(), 127)
        lane, warp = ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)
        in_group = ptx.shift_right(lane, 2)
        first_column = ptx.shift_left(ptx.bit_and(lane, 3), 1)
        speaks = ptx.compare("eq", in_group, 0)  # for its columns, where all lanes have the same
        own_scale = ptx.shift_left(ptx.add(ptx.shift_left(warp, 4), in_group), 2)
        own_columns = ptx.add(base, ptx.shift_left(first_column, 2))
        block = ptx.scalar(block)
        queries_at, counts_at = ptx.global_address(queries), _address_of(optional)

        def load_queries(task: _Task) -> None:
            """Divided by a power of two for every head, and all but the rotary columns as sums of two e4m3 numbers."""
            chunk, line = _line(ptx.bit_and(ptx.opaque(ptx.thread()), 127))
            source = ptx.offset(ptx.offset(queries_at, task.first_row, 2 * WIDTH), chunk, 16)
            in_chunk = ptx.shift_left(ptx.bit_and(chunk, 1), 3)
            for first in range(0, tasks.columns, 16):
                here = ptx.add(line, first)
                counts_ = ptx.select(ptx.compare("slt", here, task.heads), 1, 0)
                # A line that does not count is not read, but its address has to be one of the array.
                at = ptx.offset(source, ptx.minimum(here, ptx.sub(task.heads, 1)), 2 * WIDTH)
                loaded = [ptx.load_words_or_zeros(ptx.offset(at, ptx.constant(i), 128), counts_, 4) for i in range(WIDTH // 64)]
                largest = functools.reduce(ptx.larger_magnitudes, [word for words in loaded[:-1] for word in words])
                magnitude = ptx.larger(*ptx.from_bfloat16_pair(largest))
                for distance in (1, 2, 4):
                    magnitude = ptx.larger(magnitude, ptx.lane_distant(magnitude, distance))
                bits = ptx.bits_of(ptx.times(ptx.larger(magnitude, ptx.number(SMALLEST)), ptx.number(1 / quant.E4M3_MAX)))
                power = ptx.bit_and(ptx.add(bits, 0x7FFFFF), 0x7F800000)  # rounded up to a power of two
                inverse = ptx.float_of(ptx.sub(254 << 23, power))
                with ptx.when(ptx.compare("slt", here, tasks.columns)):
                    for i, words in enumerate(loaded[:-1]):
                        high, low = ptx.to_e4m3_sum(words, inverse)
                        to_chunk = ptx.add(ptx.shift_right(chunk, 1), 4 * (i % 2))
                        to = ptx.add(base, memory.queries + i // 2 * memory.query_piece, _in_tiles(here, to_chunk), in_chunk)
                        ptx.store_shared_pair(to, high)
                        ptx.store_shared_pair(ptx.add(to, memory.query_part), low)
                    pairs = [[ptx.times(x, inverse) for x in ptx.from_bfloat16_pair(word)] for word in loaded[-1]]
                    to = ptx.add(base, memory.rotary_queries, _in_tiles(here, chunk))
                    ptx.store_shared_words(to, [ptx.to_bfloat16_pair(*pair) for pair in pairs])
                    with ptx.when(ptx.compare("eq", chunk, 0)):
                        ptx.store_shared(ptx.add(base, memory.query_scales, ptx.shift_left(here, 2)), power)
            ptx.proxy_fence()
            ptx.barrier(MAXIMA_BARRIER, 128)

        def prefetch_queries(number) -> None:
            task = _Task.of(tasks, ptx.minimum(number, tasks.count - 1))
            mine = ptx.compare("eq", thread, 0)
            size = ptx.mul(task.heads, 2 * WIDTH)
            ptx.prefetch(ptx.offset(queries_at, task.first_row, 2 * WIDTH), size, mine)

        def of_columns(kind: int, row: ptx.Value | int = 0) -> ptx.Value:
            """Address of this thread's first two columns of a row of float32."""
            row = ptx.constant(row) if isinstance(row, int) else row
            return ptx.add(own_columns, kind, ptx.mul(row, 4 * tasks.columns))

        def issue(ring: _Ring):
            """Starts the logits of a block, and ends with its scales of this thread's two keys."""
            matrix = ptx.matrix(ptx.add(base, memory.queries))
            codes = ptx.matrix(ring.codes(base))
            for half in range(HALVES):
                ptx.barrier_wait(ring.barrier(base, memory.full, half), ring.round)
            ptx.proxy_fence()
            rotary, rotary_queries = ptx.matrix(ring.rotary(base)), ptx.matrix(ptx.add(base, memory.rotary_queries))
            steps = [(0, 32 * i, 32 * i) for i in range(4)]
            zeros = [ptx.number(0.0)] * (4 * groups)
            (sums,) = ptx.multiply([zeros], rotary, rotary_queries, steps, fresh=True, columns=tasks.columns, transposed=False)
            # The queries' two parts are columns of one product or, where their sums take too many registers, added in turn, the
            # smaller ones first: every step of the tensor cores in e4m3 cuts what is added to the size of the sum.
            steps = [
                (0, piece * PIECE + 32 * i, piece * memory.query_piece + 32 * i) for piece in range(PIECES) for i in range(4)
            ]
            multiply = functools.partial(ptx.multiply, transposed=False, kind="e4m3")
            if tasks.is_wide:
                smaller = ptx.matrix(ptx.add(base, memory.queries + memory.query_part))
                (sums,) = multiply([sums], codes, smaller, steps, fresh=False, columns=tasks.columns)
                codes = ptx.matrix(ptx.uniform(ring.codes(base)))  # else 16 addresses are kept for their second use
                (sums,) = multiply([sums], codes, matrix, steps, fresh=False, columns=tasks.columns)
                logits = [sums]
            else:
                (both,) = multiply([[*zeros, *zeros]], codes, matrix, steps, fresh=True, columns=2 * tasks.columns)
                logits = [sums, both[: 4 * groups], both[4 * groups :]]
            ptx.multiply_commit()
            scales = [ptx.load_shared_float(ptx.add(ring.scales(base), own_scale, 32 * i)) for i in range(2)]
            return logits, scales

        def finish(logits):
            return [ptx.plus(*parts) if len(parts) > 1 else parts[0] for parts in zip(*ptx.multiplied(logits), strict=True)]

        def raise_maxima(scaled, tops, totals, place):
            """New maxima where a block's are too far above, and what follows from them."""
            own = [ptx.larger(scaled[4 * j + c], scaled[4 * j + 2 + c]) for j in range(groups) for c in range(2)]
            for distance in (4, 8, 16):
                own = [ptx.larger(x, ptx.lane_distant(x, distance)) for x in own]
            with ptx.when(speaks):
                for j in range(groups):
                    ptx.store_shared_floats(ptx.add(of_columns(memory.maxima, warp), 32 * j), own[2 * j : 2 * j + 2])
            ptx.barrier(MAXIMA_BARRIER, 128)
            new_tops, factors = [], []
            for j in range(groups):
                by_warp = [ptx.load_shared_floats(ptx.add(of_columns(memory.maxima, w), 32 * j)) for w in range(4)]
                for c in range(2):
                    top = tops[2 * j + c]
                    block_top = functools.reduce(ptx.larger, [pair[c] for pair in by_warp])
                    exceeds = ptx.above(block_top, ptx.plus(top, ptx.number(LAZY)))
                    new_tops.append(ptx.either(exceeds, block_top, top))
                    factors.append(ptx.exp2(ptx.minus(top, new_tops[-1])))
            with ptx.when(ptx.compare("slt", thread, 4)):
                for j in range(groups):
                    ptx.store_shared_floats(ptx.add(of_columns(memory.factors, place), 32 * j), factors[2 * j : 2 * j + 2])
            return [*new_tops, *map(ptx.times, totals, factors)]

        def prepare(logits, scales, tops, totals, done):
            """Base-2 logarithms of a block's weights times scales, and the maxima and sums that they refer to.

            All branches are here, so that products may be under way in `publish`.
            """
            place, turn = ptx.bit_and(done, 1), ptx.shift_right(done, 1)
            counted = [ptx.above(x, ptx.number(0.0)) for x in scales]
            logs = [ptx.log2(x) for x in scales]  # minus infinity for keys that do not count
            inverses = [  # of scales that count
                ptx.either(c, ptx.exp2(ptx.minus(ptx.number(0.0), x)), ptx.number(0.0))
                for c, x in zip(counted, logs, strict=True)
            ]
            by_row = [ptx.times(x, ptx.number(to_logits)) for x in scales]
            scaled = []
            for j in range(groups):
                by_column = ptx.load_shared_floats(ptx.add(of_columns(memory.query_scales), 32 * j))
                for i in range(4):
                    factor = ptx.times(by_row[i // 2], by_column[i % 2])
                    scaled.append(ptx.times_plus(logits[4 * j + i], factor, logs[i // 2]))
            column = [i // 4 * 2 + i % 2 for i in range(4 * groups)]
            over = [ptx.minus(x, tops[column[i]]) for i, x in enumerate(scaled)]
            exceeds = ptx.above(functools.reduce(ptx.larger, over), ptx.number(LAZY))
            ptx.barrier_wait(ptx.add(base, memory.free, ptx.shift_left(place, 3)), ptx.bit_xor(ptx.bit_and(turn, 1), 1))
            raised = ptx.barrier_any(VOTE_BARRIER, 128, exceeds)
            changed = ptx.choose(
                ptx.compare("ne", raised, 0), lambda: raise_maxima(scaled, tops, totals, place), [*tops, *totals]
            )
            tops, totals = changed[: 2 * groups], changed[2 * groups :]
            with ptx.when(ptx.compare("eq", thread, 0)):
                ptx.store_shared(ptx.add(base, memory.raised, ptx.shift_left(place, 2)), raised)
            return scaled, inverses, tops, totals

        def publish(scaled, inverses, tops, totals, done, last=False):
            """The weights of a block, the `done`-th of all, for the values' warpgroups."""
            place = ptx.bit_and(done, 1)
            column = [i // 4 * 2 + i % 2 for i in range(4 * groups)]
            totals = list(totals)
            weights = [ptx.exp2(ptx.minus(x, tops[column[i]])) for i, x in enumerate(scaled)]  # times the keys' scales
            for i, x in enumerate(weights):
                totals[column[i]] = ptx.times_plus(x, inverses[i % 4 // 2], totals[column[i]])
            # Lines of the stored matrix are heads, 16 bytes of them 8 keys.
            block_of_8 = ptx.add(ptx.shift_left(warp, 1), ptx.bit_and(ptx.shift_right(lane, 3), 1))
            to = ptx.add(base, memory.weights, ptx.mul(place, memory.of_weights), _in_tiles(ptx.bit_and(lane, 7), block_of_8))
            for j in range(groups):
                a, b, c, d = weights[4 * j : 4 * j + 4]
                ptx.store_shared_transposed(ptx.add(to, 1024 * j), [ptx.to_float16_pair(a, b), ptx.to_float16_pair(c, d)])
            if last:
                sums = totals
                for distance in (4, 8, 16):
                    sums = [ptx.plus(x, ptx.lane_distant(x, distance)) for x in sums]
                to = of_columns(memory.sums, ptx.add(ptx.shift_left(place, 2), warp))
                with ptx.when(speaks):
                    for j in range(groups):
                        ptx.store_shared_floats(ptx.add(to, 32 * j), sums[2 * j : 2 * j + 2])
            ptx.proxy_fence()
            ptx.barrier_arrive(ptx.add(base, memory.ready, ptx.shift_left(place, 3)))
            return totals

        def store_logs(tops, place) -> None:
            """What the blocks of a cluster weigh their results by."""
            ptx.barrier(MAXIMA_BARRIER, 128)  # all warps' sums are there
            with ptx.when(ptx.compare("slt", thread, 4)):
                for j in range(groups):
                    at = ptx.add(of_columns(memory.sums, ptx.shift_left(place, 2)), 32 * j)
                    by_warp = [ptx.load_shared_floats(ptx.add(at, 4 * tasks.columns * w)) for w in range(4)]
                    totals = [functools.reduce(ptx.plus, parts) for parts in zip(*by_warp, strict=True)]
                    logs = [
                        ptx.either(ptx.above(total, ptx.number(0.0)), ptx.plus(top, ptx.log2(total)), ptx.number(START))
                        for total, top in zip(totals, tops[2 * j : 2 * j + 2], strict=True)
                    ]
                    ptx.store_shared_floats(ptx.add(of_columns(memory.logs), 32 * j), logs)

        def one_task(number, carry):
            task = _Task.of(tasks, number)
            ring, done = _Ring(memory, *carry[:2]), carry[2]
            blocks = task.blocks(tasks, counts_at)
            load_queries(task)
            prefetch_queries(ptx.add(number, tasks.grid))
            begun, scales = issue(ring)
            logits = finish(begun)

            def one_block(b, carry):
                ring, done, scales = _Ring(memory, *carry[:2]), carry[2], carry[3:5]
                logits = carry[5 : 5 + 4 * groups]
                tops, totals = carry[5 + 4 * groups : 5 + 6 * groups], carry[5 + 6 * groups :]
                ring = ring.next()
                scaled, inverses, tops, totals = prepare(logits, scales, tops, totals, done)
                begun, scales_after = issue(ring)  # are made while the weights are
                totals = publish(scaled, inverses, tops, totals, done)
                return [*ring.carry, ptx.add(done, 1), *scales_after, *finish(begun), *tops, *totals]

            start = [ptx.number(START)] * (2 * groups) + [ptx.number(0.0)] * (2 * groups)
            carry = ptx.loop(ptx.sub(blocks, 1), [*ring.carry, done, *scales, *logits, *start], one_block)
            ring, done, scales = _Ring(memory, *carry[:2]), carry[2], carry[3:5]
            logits = carry[5 : 5 + 4 * groups]
            tops, totals = carry[5 + 4 * groups : 5 + 6 * groups], carry[5 + 6 * groups :]
            scaled, inverses, tops, totals = prepare(logits, scales, tops, totals, done)
            publish(scaled, inverses, tops, totals, done, last=True)
            if tasks.splits > 1:
                store_logs(tops, ptx.bit_and(done, 1))
            return [*ring.next().carry, ptx.add(done, 1)]

        prefetch_queries(block)
        _for_each_task(tasks, block, [*_start(memory).carry, ptx.constant(0)], one_task)
        _meet_cluster(tasks)

    weigh(block, queries, ref, *optional)


def _sum_values(tasks: Tasks, memory: Memory, counts, ref, out, block, half: int) -> None:
    """The second and the third warpgroup: values times weights, 4 tiles of 64 value columns each.

    Row g of a warp's 16 rows of a tile is its value column 2 g, row g + 8 the next one.
    """
    groups = tasks.columns // 8

    optional = () if counts is None else (counts,)

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, *[_REF for _ in optional]))
    def sum_values(ctx, block, ref, out, *optional):
        base = ptx.shared_address(ref)
        thread = ptx.bit_and(ptx.thread(), 127)
        lane, warp = ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)
        block = ptx.scalar(block)
        counts_at = _address_of(optional)
        # A lane has the address of a key's 16 columns, its warp's of a tile of 64; of every second tile 64 bytes further on.
        to_columns = [_in_tiles(lane, ptx.add(warp, 4 * odd)) for odd in range(2)]

        def of_columns(kind: int, row, j: int) -> list[ptx.Value]:
            """This thread's two of the j-th 8 columns of a row of float32."""
            own = ptx.shift_left(ptx.bit_and(ptx.opaque(ptx.thread()), 3), 3)
            return ptx.load_shared_floats(ptx.add(base, kind + 32 * j, ptx.mul(row, 4 * tasks.columns), own))

        def by_column(values, factors):
            return [ptx.times(x, factors[i % (4 * groups) // 4 * 2 + i % 2]) for i, x in enumerate(values)]

        def add_block(ring: _Ring, place, by_tile):
            """Starts the products of a block, and frees its codes."""
            weights = ptx.matrix(ptx.add(base, memory.weights, ptx.mul(place, memory.of_weights)))
            codes, together = ring.codes(base), FRAGMENTS[tasks.is_wide]

            def load(step: int) -> list[ptx.Value]:
                """Four words: of 32 keys, two columns of two keys each."""
                tile, keys = divmod(step, 2)
                piece = half * PIECES // HALVES + tile // 2
                return ptx.load_shared_transposed(ptx.add(codes, to_columns[tile % 2], piece * PIECE + 4096 * keys))

            words = load(0)
            for step in range(2 * TILES):
                tile, keys = divmod(step, 2)
                pairs = [ptx.float16_from_e4m3(word) for word in words]
                fragments = [[*pairs[i], *pairs[i + 1]] for i in (0, 2)]
                if step + 1 < 2 * TILES:
                    words = load(step + 1)
                else:  # all codes are in registers
                    ptx.barrier_arrive(ring.barrier(base, memory.empty, half))
                for first in range(0, 2, together):
                    these = range(first, first + together)
                    by_tile[tile] = ptx.multiply_fragments(
                        by_tile[tile],
                        [fragments[i] for i in these],
                        weights,
                        [64 * keys + 32 * i for i in these],
                        columns=tasks.columns,
                    )
                    ptx.multiply_commit()
                    ptx.multiply_wait(1)  # the registers of the fragments before are free
            return by_tile

        def one_task(number, carry):
            blocks = _Task.of(tasks, number).blocks(tasks, counts_at)

            def one_block(b, carry):
                ring, done = _Ring(memory, *carry[:2]), carry[2]
                sums = carry[3:]
                place, turn = ptx.bit_and(done, 1), ptx.shift_right(done, 1)
                ptx.barrier_wait(ring.barrier(base, memory.full, half), ring.round)
                ptx.barrier_wait(ptx.add(base, memory.ready, ptx.shift_left(place, 3)), ptx.bit_and(turn, 1))
                raised = ptx.load_shared(ptx.add(base, memory.raised, ptx.shift_left(place, 2)))

                def rescaled():
                    return by_column(sums, [x for j in range(groups) for x in of_columns(memory.factors, place, j)])

                sums = ptx.choose(ptx.compare("ne", raised, 0), rescaled, sums)
                by_tile = add_block(ring, place, [sums[i : i + 4 * groups] for i in range(0, len(sums), 4 * groups)])
                sums = [x for tile in ptx.multiplied(by_tile) for x in tile]
                with ptx.when(ptx.compare("ne", ptx.add(b, 1), blocks)):
                    ptx.barrier_arrive(ptx.add(base, memory.free, ptx.shift_left(place, 3)))
                return [*ring.next().carry, ptx.add(done, 1), *sums]

            carry = ptx.loop(blocks, [*carry, *[ptx.number(0.0)] * (4 * TILES * groups)], one_block)
            # Else what the following needs is kept in registers through the loop.
            task = _Task.of(tasks, ptx.opaque(number))
            thread = ptx.bit_and(ptx.opaque(ptx.thread()), 127)
            lane, warp = ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)
            in_group, pair = ptx.shift_right(lane, 2), ptx.shift_left(ptx.bit_and(lane, 3), 1)
            place = ptx.bit_and(ptx.sub(carry[2], 1), 1)
            totals = []
            for j in range(groups):
                by_warp = [of_columns(memory.sums, ptx.add(ptx.shift_left(place, 2), w), j) for w in range(4)]
                totals += [functools.reduce(ptx.plus, parts) for parts in zip(*by_warp, strict=True)]
            ptx.barrier_arrive(ptx.add(base, memory.free, ptx.shift_left(place, 3)))
            zero = ptx.number(0.0)
            inverses = [ptx.either(ptx.above(x, zero), ptx.inverse(x), zero) for x in totals]
            sums = by_column(carry[3:], inverses)
            column = ptx.add(ptx.shift_left(warp, 4), ptx.shift_left(in_group, 1))  # of a tile, and the next one
            if tasks.splits > 1:
                to = ptx.add(base, memory.queries, ptx.mul(pair, STAGED_LINE), ptx.shift_left(column, 1))
            else:
                to = ptx.offset(ptx.global_address(out), ptx.add(task.first_row, pair), 2 * VALUE_DIM)
                to = ptx.offset(to, column, 2)
            for j in range(groups):
                for c in range(2):
                    head = 8 * j + c
                    counts_ = ptx.compare("slt", ptx.add(pair, head), task.heads)
                    for tile in range(TILES):
                        of_tile = sums[4 * (tile * groups + j) :]
                        word = ptx.to_bfloat16_pair(of_tile[c], of_tile[2 + c])
                        first = 128 * (TILES * half + tile)
                        if tasks.splits > 1:
                            ptx.store_shared(ptx.add(to, STAGED_LINE * head + first), word)
                        else:
                            ptx.store_global(ptx.offset(to, ptx.constant(1), 2 * VALUE_DIM * head + first), word, counts_)
            if tasks.splits > 1:
                _combine(tasks, memory, base, out, task, half)
            return carry[:3]

        _for_each_task(tasks, block, [*_start(memory).carry, ptx.constant(0)], one_task)

    sum_values(block, ref, out, *optional)


def _combine(tasks: Tasks, memory: Memory, base, out, task: _Task, half: int) -> None:
    """The blocks of a cluster combine their parts: each writes an even share of the heads, from all blocks' shared memory."""
    share = -(-tasks.heads_per_tile // tasks.splits)
    ptx.cluster_barrier()
    thread = ptx.add(ptx.bit_and(ptx.opaque(ptx.thread()), 127), 128 * half)
    to = ptx.offset(ptx.global_address(out), task.first_row, 2 * VALUE_DIM)
    chunk = ptx.bit_and(thread, 63)

    def four_heads(i, carry):  # 256 threads take 64 chunks of 16 bytes of each
        within = ptx.add(ptx.shift_right(thread, 6), ptx.shift_left(i, 2))
        head = ptx.add(ptx.mul(task.split, share), within)
        here = ptx.minimum(head, tasks.columns - 1)
        part_at = ptx.add(base, memory.queries, ptx.mul(here, STAGED_LINE), ptx.shift_left(chunk, 4))
        log_at = ptx.add(base, memory.logs, ptx.shift_left(here, 2))
        logs = [ptx.load_peer_float(ptx.peer_address(log_at, peer)) for peer in range(tasks.splits)]
        parts = [ptx.load_peer_words(ptx.peer_address(part_at, peer)) for peer in range(tasks.splits)]
        top = functools.reduce(ptx.larger, logs)
        weights = [ptx.exp2(ptx.minus(log, top)) for log in logs]
        inverse = ptx.inverse(ptx.plus(*weights))
        words = []
        for word in range(4):
            low, high = zip(*(ptx.from_bfloat16_pair(part[word]) for part in parts), strict=True)
            sums = [ptx.plus(*map(ptx.times, values, weights)) for values in (low, high)]
            words.append(ptx.to_bfloat16_pair(*(ptx.times(x, inverse) for x in sums)))
        counts = ptx.both(ptx.compare("slt", within, share), ptx.compare("slt", head, task.heads))
        ptx.store_global_words(ptx.offset(ptx.offset(to, here, 2 * VALUE_DIM), chunk, 16), words, counts)
        return carry

    ptx.loop(ptx.opaque(ptx.constant(-(-share // 4))), [], four_heads)  # unrolled, it would take too many registers
    ptx.cluster_barrier()  # no block leaves while others read its memory


def attend(
    queries: jax.Array,
    codes: jax.Array,
    rotary: jax.Array,
    scales: jax.Array,
    lists: jax.Array,
    counts: jax.Array | None,
    tasks: Tasks,
    *,
    scale: float,
) -> jax.Array:
    """Attention of every query.

    Args:
      queries: [B * S * H, 576] bfloat16.
      codes: [B * T, 512] float8_e4m3fn. rotary: [B * T, 64] bfloat16. scales: [B * T] float32, positive.
      lists: [B * S, tasks.blocks * 64] int32, -1 where empty.
      counts: [B * S] int32, how many key blocks to visit, at least 1; None, as where lists are split, for all of them.

    Returns:
      [B * S * H, 512] bfloat16; zeros where no key counts.
    """
    if counts is not None and tasks.splits > 1:
        raise ValueError(f"lists that are split into {tasks.splits} have no counts")
    memory = Memory.of(tasks.columns)

    def sparse_mla_scaled(queries, codes, rotary, scales, lists, *others):
        counts, out, ref = others if len(others) == 3 else (None, *others)
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        _init_barriers(memory, ref)

        def limit_registers(number: int) -> None:
            registers = REGISTERS[tasks.is_wide][number]
            at_launch = hopper.REGISTER_FILE // (hopper.WARPGROUP * (2 + HALVES))
            plgpu.set_max_registers(registers, action="increase" if registers > at_launch else "decrease")

        @pl.when(warpgroup == 0)
        def _():
            limit_registers(0)
            _weigh(tasks, memory, scale, queries, counts, ref, block)

        for half in range(HALVES):

            @pl.when(warpgroup == 1 + half)
            def _(half=half):
                limit_registers(1 + half)
                _sum_values(tasks, memory, counts, ref, out, block, half)

        @pl.when(warpgroup == 1 + HALVES)
        def _():
            limit_registers(1 + HALVES)
            _gather(tasks, memory, codes, rotary, scales, lists, counts, ref, block)

    is_split = tasks.splits > 1
    kernel = plgpu.kernel(
        sparse_mla_scaled,
        out_type=jax.ShapeDtypeStruct((tasks.batch * tasks.queries * tasks.heads, VALUE_DIM), jnp.bfloat16),
        scratch_types=(plgpu.SMEM((memory.end // 4,), jnp.uint32),),
        grid=(tasks.grid,),
        grid_names=("block",),
        cluster=(tasks.splits,) if is_split else (),
        cluster_names=("split",) if is_split else (),
        num_threads=2 + HALVES,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    return kernel(*(x for x in (queries, codes, rotary, scales, lists, counts) if x is not None))
