"""The attention kernel of sparse_mla for Hopper where a query has at most 32 heads: keys are the rows of wgmma's tiles.

wgmma takes 64 rows. As rows of logits, 20 heads would leave two thirds of a tile empty; here the rows are keys and value
columns, and the heads, rounded up to a multiple of 8, are the columns, of which wgmma takes any such number:

    logits^T [64 keys, heads] = latents [64 keys, 576] queries^T [576, heads]
    out^T [512, heads] += latents^T [512, 64 keys] weights^T [64 keys, heads]

Both read the gathered latents from shared memory as they lie there, the second one with their lines along the rows.

A task is a query, its list is visited in blocks of 64 keys. A block of the grid is persistent, one on
each SM, and has three warpgroups, one for each stage: the first makes the logits and weights of a key block, the
second multiplies the values of the block before, the third gathers those after. What they hand on:

- Units of 128 value columns of a key block, 16 KB, in a ring of 10 or 11, so that 2 1/2 key blocks are there or on their
  way: full[unit], an arrival of every gathering thread after its copies; empty[unit], one of every thread of the
  values' warpgroup after its wgmma on it has ended. The rotary columns of a block have one of two buffers and come with its
  last unit: the ring is so short that the buffer is free by then, see `Memory`.
- The weights of a block, in one of two buffers, with the factors by which the values so far are rescaled, and after the
  last block the sums of the weights: p_ready[buffer] and p_free[buffer], arrivals of every thread.

Arrivals are every thread's and copies are waited for once a key block, because compute-sanitizer's racecheck takes sparser
forms for races; docs/kernels.md has the times of both and what limits the kernel.

The maximum that weights refer to is a head's largest logit so far up to LAZY powers of two: only where a block has a
larger one do the warps of the first warpgroup exchange maxima, and does the second one rescale.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.columns import (
    KEYS,
    MAXIMA_BARRIER,
    PIECE,
    Buffers,
    ColumnSoftmax,
    Ring,
    Thread,
    copied_line,
    in_tiles,
    inverses_of,
    times_by_column,
)
from pallas_kernels.latents import VALUE_DIM, WIDTH
from pallas_kernels.softmax import LOG2E, MASKED, START
from pallas_kernels.sparse_mla.mosaic_gpu_few_heads_tasks import (
    ROW_BYTES,
    UNIT,
    UNIT_PIECES,
    UNITS,
    Memory,
    Tasks,
)

TILES = VALUE_DIM // 64  # of 64 value columns

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
Values = list[Any]  # registers


@dataclasses.dataclass(frozen=True)
class _Shared:
    """The addresses of what is in shared memory."""

    memory: Memory
    base: ptx.Word

    @staticmethod
    def of(memory: Memory, ref: Any) -> _Shared:
        return _Shared(memory, ptx.shared_address(ref))

    @property
    def buffers(self) -> Buffers:
        return Buffers(self.memory, self.base)

    def unit(self, ring: Ring) -> ptx.Word:
        return self.base + ring.place * UNIT + self.memory.units

    def rotary(self, buffer: ptx.Word) -> ptx.Word:
        return self.base + self.memory.rotary + buffer * PIECE

    def full(self, ring: Ring) -> ptx.Word:
        """An arrival of every gathering thread after its copies."""
        return self.base + self.memory.full + (ring.place << 3)

    def empty(self, ring: Ring) -> ptx.Word:
        """An arrival of every thread of the values' warpgroup after its products."""
        return self.base + self.memory.empty + (ring.place << 3)

    def init_barriers(self) -> None:
        for i in range(self.memory.ring):
            ptx.barrier_init(self.base + (self.memory.full + 8 * i), 128)
            ptx.barrier_init(self.base + (self.memory.empty + 8 * i), 128)
        self.buffers.init(consumers=128)


def _init_barriers(memory: Memory, scratch: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(ctx, scratch):
        shared = _Shared.of(memory, scratch)
        with ptx.when(ptx.thread().equals(0)):
            shared.init_barriers()
            ptx.barrier_init_done()
        ptx.block_barrier()

    init(scratch)


# ---- the gathering warpgroup


@dataclasses.dataclass(frozen=True)
class _Gatherer:
    """A thread of the third warpgroup: 8 lanes copy 128 bytes of a row with cp.async into the tiles that wgmma reads."""

    tasks: Tasks
    shared: _Shared
    to: ptx.Word  # this thread's chunk of a tile, from the start of shared memory
    source: ptx.Address  # the same of the latents
    own_entry: ptx.Address
    counts: ptx.Address

    @staticmethod
    def of(tasks: Tasks, memory: Memory, latents, lists, counts, scratch) -> _Gatherer:
        shared = _Shared.of(memory, scratch)
        chunk, row = copied_line(ptx.thread() & 127)
        to = shared.base + in_tiles(row, chunk)
        source = ptx.offset(ptx.global_address(latents), chunk, 16)
        own_entry = ptx.offset(ptx.global_address(lists), row, 4)
        return _Gatherer(tasks, shared, to, source, own_entry, ptx.global_address(counts))

    def run(self, block: ptx.Word) -> None:
        num_tasks = self.tasks.of_block(block)
        first = ptx.load_global(ptx.offset(self.counts, block, 4))
        start = Ring.start(self.shared.memory.ring)
        carry = [first, *start.carry, ptx.constant(0), *self._entries(block, ptx.constant(0))]
        ptx.loop(num_tasks, carry, lambda i, carry: self._task(block + i * self.tasks.grid, carry))
        ptx.copies_done()

    def _entries(self, task: ptx.Word, key_block: ptx.Word) -> Values:
        """The entries of this thread's four rows of a key block."""
        at = ptx.offset(self.own_entry, task * self.tasks.blocks + key_block, 4 * KEYS)
        return [ptx.load_global(ptx.offset(at, ptx.constant(i), 64)) for i in range(4)]

    def _task(self, task: ptx.Word, carry: Values) -> Values:
        tasks = self.tasks
        following = ptx.min_s32(task + tasks.grid, tasks.count - 1)
        rows_at = ptx.offset(self.source, task // tasks.queries, tasks.keys * ROW_BYTES)
        blocks = carry[0]
        blocks_after = ptx.load_global(ptx.offset(self.counts, following, 4))

        def one_block(b, carry):
            ring, done, current = Ring(self.shared.memory.ring, *carry[:2]), carry[2], carry[3:]
            is_last = (b + 1).equals(blocks)
            after = self._entries(ptx.select(is_last, following, task), ptx.select(is_last, 0, b + 1))
            ring = self._copy_block(ring, done, rows_at, current)
            return [*ring.carry, done + 1, *after]

        return [blocks_after, *ptx.loop(blocks, carry[1:], one_block)]

    def _copy_block(self, ring: Ring, done: ptx.Word, rows_at: ptx.Address, entries: Values) -> Ring:
        """The `done`-th block of all; returns the ring after it."""
        memory = self.shared.memory
        rows = []
        for entry in entries:
            used = ptx.select(entry.signed >= 0, 16, 0)
            key = ptx.min_s32(ptx.max_s32(entry, 0), self.tasks.keys - 1)
            rows.append((ptx.offset(rows_at, key, ROW_BYTES), used))
        rotary = self.to + memory.rotary + (done & 1) * PIECE
        for unit in range(UNITS):
            ptx.barrier_wait(self.shared.empty(ring), ring.parity ^ 1)
            if unit == memory.ring - 2 * UNITS:  # what is overwritten from here on was copied two blocks ago
                ptx.copies_done(pending=1)
            target = self.to + ring.place * UNIT + memory.units
            for j, (at, used) in enumerate(rows):
                at_unit = ptx.offset(at, ptx.constant(unit), 128 * UNIT_PIECES)
                ptx.copy_async(target + 2048 * j, at_unit, used, UNIT_PIECES, PIECE, 128)
                if unit == UNITS - 1:
                    at_rotary = ptx.offset(at, ptx.constant(1), 2 * VALUE_DIM)
                    ptx.copy_async(rotary + 2048 * j, at_rotary, used, 1, 0, 0)
            ptx.barrier_arrive_after_copies(self.shared.full(ring))
            ring = ring.next()
        ptx.copies_commit()
        return ring


# ---- the warpgroup of logits and weights


@dataclasses.dataclass(frozen=True)
class _Block:
    """What the first warpgroup has of a key block and of those before it, as values of a loop's carry."""

    ring: Ring
    done: ptx.Word  # blocks before this one, of all tasks
    marks: Values  # entries of this thread's two keys
    logits: Values
    tops: Values  # running maxima, by column
    totals: Values  # sums of weights, by column

    @property
    def carry(self) -> Values:
        return [*self.ring.carry, self.done, *self.marks, *self.logits, *self.tops, *self.totals]

    @staticmethod
    def of(size: int, groups: int, carry: Values) -> _Block:
        tops, totals = 5 + 4 * groups, 5 + 6 * groups
        return _Block(Ring(size, *carry[:2]), carry[2], carry[3:5], carry[5:tops], carry[tops:totals], carry[totals:])


@dataclasses.dataclass(frozen=True)
class _Weigher:
    """A thread of the first warpgroup: logits and weights."""

    tasks: Tasks
    shared: _Shared
    softmax: ColumnSoftmax
    to_logits: float
    block: ptx.Word
    num_tasks: ptx.Word
    queries: Any
    counts: Any
    own_entry: ptx.Address
    query_matrix: Any

    @staticmethod
    def of(tasks: Tasks, memory: Memory, scale: float, block, queries, lists, counts, scratch) -> _Weigher:
        shared, thread = _Shared.of(memory, scratch), Thread.of(ptx.thread())
        softmax = ColumnSoftmax.of(shared.buffers, thread)
        own_entry = ptx.offset(ptx.global_address(lists), (thread.warp << 4) + thread.row, 4)
        num_tasks = tasks.of_block(block)
        matrix = ptx.matrix(shared.base + memory.queries)
        return _Weigher(tasks, shared, softmax, scale * LOG2E, block, num_tasks, queries, counts, own_entry, matrix)

    @property
    def groups(self) -> int:
        return self.softmax.groups

    def run(self) -> None:
        self._load_queries(self.block)
        carry = [*Ring.start(self.shared.memory.ring).carry, ptx.constant(0)]
        grid = self.tasks.grid
        ptx.loop(self.num_tasks, carry, lambda i, carry: self._task(self.block + i * grid, carry))

    def _load_queries(self, task: ptx.Word) -> None:
        """Loads queries by cp.async, because a TMA copy into tiles of 8 lines would have to start at a multiple of 8."""
        tasks = self.tasks
        chunk, line = copied_line(self.softmax.thread.index)
        queries_at = ptx.offset(ptx.global_address(self.queries), chunk, 16)
        to = self.shared.base + self.shared.memory.queries + in_tiles(line, chunk)
        for first in range(0, tasks.columns, 16):
            here = line + first
            size = ptx.select(here.signed < tasks.heads, 16, 0)
            # A line that does not count is not read, but its address has to be one of the array.
            head = task * tasks.heads + ptx.min_s32(here, tasks.heads - 1)
            at = ptx.offset(queries_at, head, ROW_BYTES)
            with ptx.when(here.signed < tasks.columns):
                ptx.copy_async(to + 128 * first, at, size, WIDTH // 64, tasks.columns * 128, 128)

    def _task(self, task: ptx.Word, carry: Values) -> Values:
        ring, done = Ring(self.shared.memory.ring, *carry[:2]), carry[2]
        blocks = ptx.load_global(ptx.offset(ptx.global_address(self.counts), task, 4))
        marks = self._entries(task, ptx.constant(0))
        ptx.copies_done()
        ptx.proxy_fence()
        ptx.barrier(MAXIMA_BARRIER, 128)  # all of the query is there
        begun, ring = self._issue(ring, done)
        (logits,) = ptx.multiplied(begun)
        tops, totals = ([ptx.number(x)] * (2 * self.groups) for x in (START, 0.0))

        def one_block(b, carry):
            block = self._block(carry)
            following = block.done + 1
            tops, totals = self._publish(block)
            begun, ring = self._issue(block.ring, following)
            marks = self._entries(task, b + 1)  # not sooner: a fence would wait for it
            (logits,) = ptx.multiplied(begun)
            return _Block(ring, following, marks, logits, tops, totals).carry

        first = _Block(ring, done, marks, logits, tops, totals)
        last = self._block(ptx.loop(blocks - 1, first.carry, one_block))

        def load_next():
            """All warps' logits have been made: the query's place is free."""
            following = task + self.tasks.grid
            with ptx.when(following.signed < self.tasks.count):
                self._load_queries(following)

        self._publish(last, load_next)
        return [*last.ring.carry, last.done + 1]

    def _block(self, carry: Values) -> _Block:
        return _Block.of(self.shared.memory.ring, self.groups, carry)

    def _entries(self, task: ptx.Word, key_block: ptx.Word) -> Values:
        at = ptx.offset(self.own_entry, task * self.tasks.blocks + key_block, 4 * KEYS)
        return [ptx.load_global(ptx.offset(at, ptx.constant(i), 32)) for i in range(2)]

    def _issue(self, ring: Ring, done: ptx.Word) -> tuple[list[Values], Ring]:
        """Starts the logits of a block, the `done`-th of all."""
        columns = self.tasks.columns
        multiply = functools.partial(ptx.multiply, columns=columns, transposed=False)
        logits = [[ptx.number(0.0)] * (4 * self.groups)]
        for unit in range(UNITS):
            ptx.barrier_wait(self.shared.full(ring), ring.parity)
            ptx.proxy_fence()
            steps = [
                (0, piece * PIECE + 32 * i, (unit * UNIT_PIECES + piece) * columns * 128 + 32 * i)
                for piece in range(UNIT_PIECES)
                for i in range(4)
            ]
            latents = ptx.matrix(self.shared.unit(ring))
            logits = multiply(logits, latents, self.query_matrix, steps, fresh=unit == 0)
            if unit == UNITS - 1:
                rotary = ptx.matrix(self.shared.rotary(done & 1))
                steps = [(0, 32 * i, VALUE_DIM // 64 * columns * 128 + 32 * i) for i in range(4)]
                logits = multiply(logits, rotary, self.query_matrix, steps, fresh=False)
            ring = ring.next()
        ptx.multiply_commit()
        return logits, ring

    def _publish(self, block: _Block, load_next: Any = None) -> tuple[Values, Values]:
        """The weights of a block for the second warpgroup; after a list's last block, for which load_next is, also the sums.

        Returns the maxima and sums so far.
        """
        softmax, buffer, turn = self.softmax, block.done & 1, block.done >> 1
        masks = [
            ptx.select(mark.signed < 0, ptx.number(MASKED), ptx.number(0.0)) for mark in block.marks
        ]  # of rows g and g + 8
        scaled = [ptx.fma(x, ptx.number(self.to_logits), masks[i % 4 // 2]) for i, x in enumerate(block.logits)]
        tops, totals = softmax.update_maxima(scaled, block.tops, block.totals, buffer, turn, load_next)
        weights = softmax.weights(scaled, tops)
        totals = [total + (weights[i // 2 * 4 + i % 2] + weights[i // 2 * 4 + 2 + i % 2]) for i, total in enumerate(totals)]
        softmax.store_weights(weights, buffer, ptx.to_bfloat16_pair)
        if load_next is not None:
            softmax.store_sums(totals, buffer)
        softmax.publish(buffer)
        return tops, totals


# ---- the values' warpgroup


@dataclasses.dataclass(frozen=True)
class _Summer:
    """A thread of the second warpgroup: values times weights, in 8 tiles of 64 value columns."""

    tasks: Tasks
    shared: _Shared
    thread: Thread
    counts: Any
    out: Any

    @staticmethod
    def of(tasks: Tasks, memory: Memory, counts, scratch, out) -> _Summer:
        return _Summer(tasks, _Shared.of(memory, scratch), Thread.of(ptx.thread()), counts, out)

    @property
    def groups(self) -> int:
        return self.tasks.columns // 8

    def run(self, block: ptx.Word) -> None:
        tasks, num_tasks = self.tasks, self.tasks.of_block(block)
        carry = [*Ring.start(self.shared.memory.ring).carry, ptx.constant(0)]
        ptx.loop(num_tasks, carry, lambda i, carry: self._task(block + i * tasks.grid, carry))

    def _task(self, task: ptx.Word, carry: Values) -> Values:
        groups = self.groups
        blocks = ptx.load_global(ptx.offset(ptx.global_address(self.counts), task, 4))
        zeros = [ptx.number(0.0)] * ((2 + 4 * TILES) * groups)
        carry = ptx.loop(blocks, [*carry, *zeros], lambda b, carry: self._add_block(b, blocks, carry))
        totals, sums = carry[3 : 3 + 2 * groups], carry[3 + 2 * groups :]
        self._store(task, times_by_column(sums, inverses_of(totals)))
        return carry[:3]

    def _row(self, kind: int, row: ptx.Word) -> Values:
        """This thread's two of every 8 columns of a row of float32."""
        at = self.shared.base + kind + row * (4 * self.tasks.columns) + (self.thread.column << 2)
        return [x for j in range(self.groups) for x in ptx.load_shared_floats(at + 32 * j)]

    def _add_block(self, number: ptx.Word, blocks: ptx.Word, carry: Values) -> Values:
        """Adds a block's weighted values to the sums, and after a list's last one reads the sums of weights."""
        groups, memory, buffers = self.groups, self.shared.memory, self.shared.buffers
        ring, done = Ring(memory.ring, *carry[:2]), carry[2]
        totals, sums = carry[3 : 3 + 2 * groups], carry[3 + 2 * groups :]
        buffer, turn = done & 1, done >> 1
        ptx.barrier_wait(buffers.p_ready(buffer), turn & 1)
        ptx.proxy_fence()
        raised = ptx.load_shared(buffers.raised(buffer))
        sums = ptx.choose(raised.differs(0), lambda: times_by_column(sums, self._row(memory.factors, buffer)), sums)
        by_tile = [sums[i : i + 4 * groups] for i in range(0, len(sums), 4 * groups)]
        by_tile, ring = self._multiply(by_tile, ring, buffer)
        sums = [x for tile in by_tile for x in tile]

        def add_totals():
            by_warp = [self._row(memory.sums, (buffer << 2) + w) for w in range(4)]
            return [ptx.total(parts) for parts in zip(*by_warp, strict=True)]

        totals = ptx.choose((number + 1).equals(blocks), add_totals, totals)
        ptx.barrier_arrive(buffers.p_free(buffer))
        return [*ring.carry, done + 1, *totals, *sums]

    def _multiply(self, by_tile: list[Values], ring: Ring, buffer: ptx.Word) -> tuple[list[Values], Ring]:
        """Adds the products of a block's values and weights, and frees its units."""
        weights = ptx.matrix(self.shared.buffers.weights(buffer))
        steps = [(j, j * PIECE + 2048 * k, 32 * k) for k in range(4) for j in range(UNIT_PIECES)]
        emptied = []
        for unit in range(UNITS):
            tiles_of_unit = slice(unit * UNIT_PIECES, (unit + 1) * UNIT_PIECES)
            latents = ptx.matrix(self.shared.unit(ring))
            by_tile[tiles_of_unit] = ptx.multiply(
                by_tile[tiles_of_unit], latents, weights, steps, fresh=False, columns=self.tasks.columns, transposed=True
            )
            ptx.multiply_commit()
            emptied.append(self.shared.empty(ring))
            ring = ring.next()
        for unit, address in enumerate(emptied):
            ptx.multiply_wait(UNITS - 1 - unit)
            ptx.barrier_arrive(address)
        return ptx.multiplied(by_tile), ring

    def _store(self, task: ptx.Word, sums: Values) -> None:
        """After a transposition a thread has head lane / 4 of every 8, and two of 8 value columns side by side."""
        tasks, thread = self.tasks, self.thread
        to = ptx.offset(ptx.global_address(self.out), task * tasks.heads + thread.row, 2 * VALUE_DIM)
        to = ptx.offset(to, (thread.warp << 4) + thread.column, 2)
        for j in range(self.groups):
            counts = (thread.row + 8 * j).signed < tasks.heads
            for tile in range(TILES):
                for half in range(2):  # rows g and g + 8 of the warp's 16
                    x, y = sums[4 * (tile * self.groups + j) + 2 * half :][:2]
                    word = ptx.transposed_block(ptx.to_bfloat16_pair(x, y))
                    at = ptx.offset(to, ptx.constant(1), 16 * VALUE_DIM * j + 128 * tile + 16 * half)
                    ptx.store_global(at, word, counts)


def attend(
    queries: jax.Array, latents: jax.Array, lists: jax.Array, counts: jax.Array, tasks: Tasks, *, scale: float
) -> jax.Array:
    """Attention of every query.

    Args:
      queries: [B * S * H, 576] bfloat16.
      latents: [B * T, 576] bfloat16.
      lists: [B * S, tasks.blocks * 64] int32, -1 where empty.
      counts: [B * S] int32, how many key blocks to visit, at least 1.

    Returns:
      [B * S * H, 512] bfloat16; zeros where no key counts.
    """
    memory = Memory.of(tasks.columns)

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, _REF, _REF))
    def weigh(ctx, block, queries, lists, counts, scratch):
        _Weigher.of(tasks, memory, scale, ptx.scalar(block), queries, lists, counts, scratch).run()

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, _REF))
    def sum_values(ctx, block, counts, scratch, out):
        _Summer.of(tasks, memory, counts, scratch, out).run(ptx.scalar(block))

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, _REF, _REF))
    def gather(ctx, block, latents, lists, counts, scratch):
        _Gatherer.of(tasks, memory, latents, lists, counts, scratch).run(ptx.scalar(block))

    def sparse_mla_few_heads(
        # Input
        queries,  # [B * S * H, 576] bfloat16
        latents,  # [B * T, 576] bfloat16
        lists,  # [B * S, tasks.blocks * 64] int32
        counts,  # [B * S] int32
        # Output
        out,  # [B * S * H, 512] bfloat16
        # Scratch and barriers
        scratch,  # `Memory`
    ):
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        _init_barriers(memory, scratch)

        @pl.when(warpgroup == 0)
        def _():
            weigh(block, queries, lists, counts, scratch)

        @pl.when(warpgroup == 1)
        def _():
            sum_values(block, counts, scratch, out)

        @pl.when(warpgroup == 2)
        def _():
            gather(block, latents, lists, counts, scratch)

    kernel = plgpu.kernel(
        sparse_mla_few_heads,
        out_type=jax.ShapeDtypeStruct((tasks.count * tasks.heads, VALUE_DIM), jnp.bfloat16),
        scratch_types=(plgpu.SMEM((memory.end // 4,), jnp.uint32),),
        grid=(tasks.grid,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    return kernel(queries, latents, lists, counts)
