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
- The weights of a block, in one of two buffers, with the factors by which the values so far are rescaled, and after the last
  block the sums of the weights: p_ready[buffer] and p_free[buffer], arrivals of every thread.

The maximum that weights refer to is a head's largest so far up to LAZY powers of two, as in hopper/columns.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, quant
from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.columns import KEYS, MAXIMA_BARRIER, PIECE, ColumnSoftmax, Ring, Thread, copied_line, in_tiles
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.softmax import LOG2E, START
from pallas_kernels.sparse_mla.mosaic_gpu_scaled_tasks import HALVES, PIECES, Memory, Tasks
from pallas_kernels.sparse_mla.mosaic_gpu_scaled_values import Shared, Summer, Task, for_each_task, sit_out_combine

SMALLEST = 2.0**-60  # largest magnitude that a head's queries count as having

# Registers of a thread of the four warpgroups, by whether tasks are wide.
REGISTERS = {False: (184, 144, 144, 40), True: (136, 168, 168, 40)}

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
Values = list[Any]  # registers


# ---- the gathering warpgroup


@dataclasses.dataclass(frozen=True)
class _Gatherer:
    """A thread of the fourth warpgroup: 8 lanes copy 128 bytes of a row with cp.async into the tiles that wgmma reads."""

    tasks: Tasks
    shared: Shared
    chunk: ptx.Word  # this thread's, of a line
    to: ptx.Word  # where it is in a matrix of tiles
    to_scale: ptx.Word  # each of 8 lanes knows the entries of 4 rows; the first four copy a row's scale each
    own_entry: ptx.Address
    codes: ptx.Address
    rotary: ptx.Address
    scales: ptx.Address
    counts: ptx.Address | None

    @staticmethod
    def of(tasks: Tasks, memory: Memory, codes, rotary, scales, lists, ref, counts=None) -> _Gatherer:
        shared = Shared.of(memory, ref)
        chunk, row = copied_line(ptx.thread() & 127)
        to = in_tiles(row, chunk)
        to_scale = (row << 2) + (chunk << 6)
        own_entry = ptx.offset(ptx.global_address(lists), row, 4)
        codes_at, rotary_at = (ptx.offset(ptx.global_address(x), chunk, 16) for x in (codes, rotary))
        scales_at = ptx.global_address(scales)
        counts_at = None if counts is None else ptx.global_address(counts)
        return _Gatherer(tasks, shared, chunk, to, to_scale, own_entry, codes_at, rotary_at, scales_at, counts_at)

    def run(self, block: ptx.Word) -> None:
        first = Task.of(self.tasks, block)
        blocks = first.blocks(self.tasks, self.counts)
        carry = [blocks, *self.shared.start().carry, *self._entries(first.first_block, ptx.constant(0))]
        for_each_task(self.tasks, block, carry, self._task)
        ptx.copies_done()
        sit_out_combine(self.tasks)

    def _entries(self, first_block: ptx.Word, key_block: ptx.Word) -> Values:
        """The entries of this thread's four rows of a key block: row `row`, + 16, + 32 and + 48."""
        at = ptx.offset(self.own_entry, first_block + key_block, 4 * KEYS)
        return [ptx.load_global(ptx.offset(at, ptx.constant(i), 64)) for i in range(4)]

    def _task(self, number: ptx.Word, carry: Values) -> Values:
        tasks = self.tasks
        task = Task.of(tasks, number)
        following = Task.of(tasks, ptx.min_s32(number + tasks.grid, tasks.count - 1))
        first_key = task.query // tasks.queries * tasks.keys
        blocks, blocks_after = carry[0], following.blocks(tasks, self.counts)

        def one_block(b, carry):
            ring, current = self.shared.ring(carry[:2]), carry[2:]
            is_last = (b + 1).equals(blocks)
            next_block = ptx.select(is_last, following.first_block, task.first_block + (b + 1))
            after = self._entries(next_block, ptx.constant(0))
            self._copy_block(ring, first_key, current)
            return [*ring.next().carry, *after]

        return [blocks_after, *ptx.loop(blocks, carry[1:], one_block)]

    def _copy_block(self, ring: Ring, first_key: ptx.Word, entries: Values) -> None:
        rows = []  # (key, 1 if it counts else 0)
        for entry in entries:
            used = ptx.select(entry.signed >= 0, 1, 0)
            key = ptx.min_s32(ptx.max_s32(entry, 0), self.tasks.keys - 1)
            rows.append((first_key + key, used))
        for half in range(HALVES):
            ptx.barrier_wait(self.shared.empty(ring, half), ring.parity ^ 1)
            if half == 0:  # what is overwritten was copied `slots` blocks ago
                ptx.copies_done(pending=self.shared.memory.slots - 1)
            self._copy_half(ring, half, rows)
            if half == HALVES - 1:
                self._copy_rotary_and_scales(ring, rows)
            ptx.barrier_arrive_after_copies(self.shared.full(ring, half))
        ptx.copies_commit()

    def _copy_half(self, ring: Ring, half: int, rows: list[tuple[ptx.Word, ptx.Word]]) -> None:
        target = self.shared.codes(ring) + self.to + half * PIECES // HALVES * PIECE
        for j, (key, used) in enumerate(rows):
            at = ptx.offset(ptx.offset(self.codes, key, VALUE_DIM), ptx.constant(half), VALUE_DIM // HALVES)
            size = used << 4
            ptx.copy_async(target + 2048 * j, at, size, PIECES // HALVES, PIECE, 128)

    def _copy_rotary_and_scales(self, ring: Ring, rows: list[tuple[ptx.Word, ptx.Word]]) -> None:
        target = self.shared.rotary(ring) + self.to
        for j, (key, used) in enumerate(rows):
            at = ptx.offset(self.rotary, key, 2 * ROTARY)
            ptx.copy_async(target + 2048 * j, at, used << 4, 1, 0, 0)
        key, used = rows[3]
        for i in range(3):
            mine = self.chunk.equals(i)
            key, used = ptx.select(mine, rows[i][0], key), ptx.select(mine, rows[i][1], used)
        with ptx.when(self.chunk.signed < 4):
            at = ptx.offset(self.scales, key, 4)
            ptx.copy_async_word(self.shared.scales(ring) + self.to_scale, at, used << 2)


# ---- the warpgroup of logits and weights


@dataclasses.dataclass(frozen=True)
class _Block:
    """What the first warpgroup has of a key block and of those before it, as values of a loop's carry."""

    ring: Ring
    done: ptx.Word  # blocks before this one, of all tasks
    scales: Values  # of this thread's two keys
    logits: Values
    tops: Values  # running maxima, by column
    totals: Values  # sums of weights, by column

    @property
    def carry(self) -> Values:
        return [*self.ring.carry, self.done, *self.scales, *self.logits, *self.tops, *self.totals]

    @staticmethod
    def of(size: int, groups: int, carry: Values) -> _Block:
        tops, totals = 5 + 4 * groups, 5 + 6 * groups
        return _Block(Ring(size, *carry[:2]), carry[2], carry[3:5], carry[5:tops], carry[tops:totals], carry[totals:])


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Base-2 logarithms of a block's weights times scales, and what they refer to: `_Weigher._prepare`."""

    scaled: Values
    inverses: Values  # of this thread's two scales, 0 for keys that do not count
    tops: Values
    totals: Values


@dataclasses.dataclass(frozen=True)
class _Softmax(ColumnSoftmax):
    """Keeps the address of this thread's first two columns in a register."""

    own_columns: ptx.Word

    def row_at(self, kind: int, row: ptx.Word | int = 0) -> ptx.Word:
        row = ptx.constant(row) if isinstance(row, int) else row
        return self.own_columns + kind + row * (4 * self.layout.columns)

    def rows_at(self, kind: int) -> Callable[[ptx.Word | int], ptx.Word]:
        return functools.partial(self.row_at, kind)


@dataclasses.dataclass(frozen=True)
class _Weigher:
    """A thread of the first warpgroup: logits and weights."""

    tasks: Tasks
    shared: Shared
    softmax: _Softmax
    to_logits: float
    own_scale: ptx.Word
    queries: ptx.Address
    counts: ptx.Address | None

    @staticmethod
    def of(tasks: Tasks, memory: Memory, scale: float, queries, ref, counts=None) -> _Weigher:
        shared, thread = Shared.of(memory, ref), Thread.of(ptx.thread())
        speaks = thread.row.equals(0)
        own_scale = ((thread.warp << 4) + thread.row) << 2
        own_columns = shared.base + (thread.column << 2)
        softmax = _Softmax(shared.buffers, thread, speaks, own_columns)
        queries_at = ptx.global_address(queries)
        counts_at = None if counts is None else ptx.global_address(counts)
        return _Weigher(tasks, shared, softmax, scale * LOG2E, own_scale, queries_at, counts_at)

    @property
    def groups(self) -> int:
        return self.softmax.groups

    def run(self, block: ptx.Word) -> None:
        self._prefetch_queries(block)
        for_each_task(self.tasks, block, [*self.shared.start().carry, ptx.constant(0)], self._task)
        sit_out_combine(self.tasks)

    def _task(self, number: ptx.Word, carry: Values) -> Values:
        task = Task.of(self.tasks, number)
        ring, done = self.shared.ring(carry[:2]), carry[2]
        blocks = task.blocks(self.tasks, self.counts)
        self._load_queries(task)
        self._prefetch_queries(number + self.tasks.grid)
        begun, scales = self._issue(ring)
        logits = self._finish(begun)

        def one_block(b, carry):
            block = self._block(carry)
            ring = block.ring.next()
            weights = self._prepare(block)
            begun, scales = self._issue(ring)  # are made while the weights are
            totals = self._publish(weights, block.done)
            return _Block(ring, block.done + 1, scales, self._finish(begun), weights.tops, totals).carry

        tops, totals = ([ptx.number(x)] * (2 * self.groups) for x in (START, 0.0))
        first = _Block(ring, done, scales, logits, tops, totals)
        last = self._block(ptx.loop(blocks - 1, first.carry, one_block))
        weights = self._prepare(last)
        self._publish(weights, last.done, last=True)
        if self.tasks.splits > 1:
            self._store_logs(weights.tops, last.done & 1)
        return [*last.ring.next().carry, last.done + 1]

    def _block(self, carry: Values) -> _Block:
        return _Block.of(self.shared.memory.slots, self.groups, carry)

    def _prefetch_queries(self, number: ptx.Word) -> None:
        task = Task.of(self.tasks, ptx.min_s32(number, self.tasks.count - 1))
        mine = self.softmax.thread.index.equals(0)
        size = task.heads * (2 * WIDTH)
        ptx.prefetch(ptx.offset(self.queries, task.first_row, 2 * WIDTH), size, mine)

    def _load_queries(self, task: Task) -> None:
        """Divided by a power of two for every head, and all but the rotary columns as sums of two e4m3 numbers."""
        columns = self.tasks.columns
        chunk, line = copied_line(ptx.opaque(ptx.thread()) & 127)
        source = ptx.offset(ptx.offset(self.queries, task.first_row, 2 * WIDTH), chunk, 16)
        in_chunk = (chunk & 1) << 3
        for first in range(0, columns, 16):
            here = line + first
            counts = ptx.select(here.signed < task.heads, 1, 0)
            # A line that does not count is not read, but its address has to be one of the array.
            at = ptx.offset(source, ptx.min_s32(here, task.heads - 1), 2 * WIDTH)
            loaded = [
                ptx.load_global_words_or_zeros(ptx.offset(at, ptx.constant(i), 128), counts, 4) for i in range(WIDTH // 64)
            ]
            power = _power_of(loaded[:-1])
            inverse = ptx.float_of((254 << 23) - power)
            with ptx.when(here.signed < columns):
                self._store_query(here, chunk, in_chunk, loaded, inverse)
                with ptx.when(chunk.equals(0)):
                    ptx.store_shared(self.shared.base + self.shared.memory.query_scales + (here << 2), power)
        ptx.proxy_fence()
        ptx.barrier(MAXIMA_BARRIER, 128)

    def _store_query(
        self, line: ptx.Word, chunk: ptx.Word, in_chunk: ptx.Word, loaded: list[Values], inverse: ptx.Float
    ) -> None:
        """This thread's 16 bytes of each 128 of a head's query."""
        base, memory = self.shared.base, self.shared.memory
        for i, words in enumerate(loaded[:-1]):
            high, low = ptx.to_e4m3_sum(words, inverse)
            to_chunk = (chunk >> 1) + 4 * (i % 2)
            to = base + (memory.queries + i // 2 * memory.query_piece) + in_tiles(line, to_chunk) + in_chunk
            ptx.store_shared_pair(to, high)
            ptx.store_shared_pair(to + memory.query_part, low)
        pairs = [[x * inverse for x in ptx.from_bfloat16_pair(word)] for word in loaded[-1]]
        to = base + memory.rotary_queries + in_tiles(line, chunk)
        ptx.store_shared_words(to, [ptx.to_bfloat16_pair(*pair) for pair in pairs])

    def _issue(self, ring: Ring) -> tuple[list[Values], Values]:
        """Starts the logits of a block, and ends with its scales of this thread's two keys."""
        shared, memory, columns, base = self.shared, self.shared.memory, self.tasks.columns, self.shared.base
        matrix = ptx.matrix(base + memory.queries)
        codes = ptx.matrix(shared.codes(ring))
        for half in range(HALVES):
            ptx.barrier_wait(shared.full(ring, half), ring.parity)
        ptx.proxy_fence()
        rotary, rotary_queries = ptx.matrix(shared.rotary(ring)), ptx.matrix(base + memory.rotary_queries)
        steps = [(0, 32 * i, 32 * i) for i in range(4)]
        zeros = [ptx.number(0.0)] * (4 * self.groups)
        (sums,) = ptx.multiply([zeros], rotary, rotary_queries, steps, fresh=True, columns=columns, transposed=False)
        # The queries' two parts are columns of one product or, where their sums take too many registers, added in turn, the
        # smaller ones first: every step of the tensor cores in e4m3 cuts what is added to the size of the sum.
        steps = [(0, piece * PIECE + 32 * i, piece * memory.query_piece + 32 * i) for piece in range(PIECES) for i in range(4)]
        multiply = functools.partial(ptx.multiply, transposed=False, kind="e4m3")
        if self.tasks.is_wide:
            smaller = ptx.matrix(base + (memory.queries + memory.query_part))
            (sums,) = multiply([sums], codes, smaller, steps, fresh=False, columns=columns)
            codes = ptx.matrix(ptx.uniform(shared.codes(ring)))  # else 16 addresses are kept for their second use
            (sums,) = multiply([sums], codes, matrix, steps, fresh=False, columns=columns)
            logits = [sums]
        else:
            (both,) = multiply([[*zeros, *zeros]], codes, matrix, steps, fresh=True, columns=2 * columns)
            logits = [sums, both[: 4 * self.groups], both[4 * self.groups :]]
        ptx.multiply_commit()
        scales = [ptx.load_shared_float(shared.scales(ring) + self.own_scale + 32 * i) for i in range(2)]
        return logits, scales

    def _finish(self, logits: list[Values]) -> Values:
        return [ptx.total(parts) if len(parts) > 1 else parts[0] for parts in zip(*ptx.multiplied(logits), strict=True)]

    def _prepare(self, block: _Block) -> _Weights:
        """What the weights of a block are made of. All branches are here, so that products may be under way in `_publish`."""
        softmax, buffer, turn = self.softmax, block.done & 1, block.done >> 1
        counted = [x > 0.0 for x in block.scales]
        logs = [ptx.log2(x) for x in block.scales]  # minus infinity for keys that do not count
        inverses = [ptx.select(c, ptx.exp2(ptx.number(0.0) - x), ptx.number(0.0)) for c, x in zip(counted, logs, strict=True)]
        by_row = [x * self.to_logits for x in block.scales]
        scaled = []
        for j in range(self.groups):
            by_column = ptx.load_shared_floats(softmax.row_at(self.shared.memory.query_scales) + 32 * j)
            for i in range(4):
                factor = by_row[i // 2] * by_column[i % 2]
                scaled.append(ptx.fma(block.logits[4 * j + i], factor, logs[i // 2]))
        tops, totals = softmax.update_maxima(scaled, block.tops, block.totals, buffer, turn)
        return _Weights(scaled, inverses, tops, totals)

    def _publish(self, prepared: _Weights, done: ptx.Word, last: bool = False) -> Values:
        """The weights of a block, the `done`-th of all, for the values' warpgroups; returns the sums of weights so far."""
        softmax, buffer, totals = self.softmax, done & 1, list(prepared.totals)
        weights = softmax.weights(prepared.scaled, prepared.tops)  # times the keys' scales
        for i, x in enumerate(weights):
            column = softmax.column(i)
            totals[column] = ptx.fma(x, prepared.inverses[i % 4 // 2], totals[column])
        softmax.store_weights(weights, buffer, ptx.to_float16_pair)
        if last:
            softmax.store_sums(totals, buffer)
        softmax.publish(buffer)
        return totals

    def _store_logs(self, tops: Values, buffer: ptx.Word) -> None:
        """What the blocks of a cluster weigh their results by."""
        softmax, memory = self.softmax, self.shared.memory
        ptx.barrier(MAXIMA_BARRIER, 128)  # all warps' sums are there
        with ptx.when(softmax.thread.index.signed < 4):
            for j in range(self.groups):
                at = softmax.row_at(memory.sums, buffer << 2) + 32 * j
                by_warp = [ptx.load_shared_floats(at + 4 * self.tasks.columns * w) for w in range(4)]
                totals = [ptx.total(parts) for parts in zip(*by_warp, strict=True)]
                logs = [
                    ptx.select(total > 0.0, top + ptx.log2(total), ptx.number(START))
                    for total, top in zip(totals, tops[2 * j : 2 * j + 2], strict=True)
                ]
                ptx.store_shared_floats(softmax.row_at(memory.logs) + 32 * j, logs)


def _power_of(loaded: list[Values]) -> ptx.Word:
    """The bits of the power of two that the codes of a head's query are divided by; 8 lanes have a query."""
    largest = functools.reduce(ptx.larger_magnitudes, [word for words in loaded for word in words])
    magnitude = ptx.max_f32(*ptx.from_bfloat16_pair(largest))
    for distance in (1, 2, 4):
        magnitude = ptx.max_f32(magnitude, ptx.lane_distant(magnitude, distance))
    bits = ptx.bits_of(ptx.max_f32(magnitude, ptx.number(SMALLEST)) * (1 / quant.E4M3_MAX))
    return (bits + 0x7FFFFF) & 0x7F800000  # rounded up to a power of two


# ---- the kernel


def _init_barriers(memory: Memory, ref: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(ctx, ref):
        shared = Shared.of(memory, ref)
        with ptx.when(ptx.thread().equals(0)):
            shared.init_barriers()
            ptx.barrier_init_done()
        ptx.block_barrier()

    init(ref)


def _limit_registers(tasks: Tasks, warpgroup: int) -> None:
    registers = REGISTERS[tasks.is_wide][warpgroup]
    at_launch = hopper.REGISTER_FILE // (hopper.WARPGROUP * (2 + HALVES))
    plgpu.set_max_registers(registers, action="increase" if registers > at_launch else "decrease")


@dataclasses.dataclass(frozen=True, eq=False)
class Refs:
    """The kernel's references."""

    # Input
    queries: Any  # [B * S * H, 576] bfloat16
    codes: Any  # [B * T, 512] float8_e4m3fn
    rotary: Any  # [B * T, 64] bfloat16
    scales: Any  # [B * T] float32
    lists: Any  # [B * S, tasks.blocks * 64] int32
    counts: tuple[Any, ...]  # ([B * S] int32,), or ()
    # Output
    out: Any  # [B * S * H, 512] bfloat16
    # Scratch and barriers
    shared: Any  # `Memory`


def _run_warpgroup(tasks: Tasks, memory: Memory, scale: float, refs: Refs, block: Any, warpgroup: Any) -> None:
    """What the warpgroup does that this is."""
    optional = [_REF for _ in refs.counts]

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, *optional))
    def weigh(ctx, block, *refs):
        _Weigher.of(tasks, memory, scale, *refs).run(ptx.scalar(block))

    @pl.when(warpgroup == 0)
    def _():
        _limit_registers(tasks, 0)
        weigh(block, refs.queries, refs.shared, *refs.counts)

    for half in range(HALVES):

        @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, *optional))
        def sum_values(ctx, block, *refs, half=half):
            Summer.of(tasks, memory, half, ptx.scalar(block), *refs).run()

        @pl.when(warpgroup == 1 + half)
        def _(half=half, sum_values=sum_values):
            _limit_registers(tasks, 1 + half)
            sum_values(block, refs.shared, refs.out, *refs.counts)

    @plgpu.inline_mgpu(arg_types=(_SCALAR, *[_REF] * 5, *optional))
    def gather(ctx, block, *refs):
        _Gatherer.of(tasks, memory, *refs).run(ptx.scalar(block))

    @pl.when(warpgroup == 1 + HALVES)
    def _():
        _limit_registers(tasks, 1 + HALVES)
        gather(block, refs.codes, refs.rotary, refs.scales, refs.lists, refs.shared, *refs.counts)


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
        *counts, out, shared = others
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        _init_barriers(memory, shared)
        refs = Refs(queries, codes, rotary, scales, lists, tuple(counts), out, shared)
        _run_warpgroup(tasks, memory, scale, refs, block, warpgroup)

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
