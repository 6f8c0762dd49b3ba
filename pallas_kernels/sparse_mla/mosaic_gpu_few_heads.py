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
  values' warpgroup after its wgmma on it has ended. The rotary columns of a block have one of two places and come with its
  last unit: the ring is so short that the place is free by then, see `Memory`.
- The weights of a block, in one of two places, with the factors by which the values so far are rescaled, and after the
  last block the sums of the weights: ready[place] and free[place], arrivals of every thread.

Arrivals are every thread's and copies are waited for once a key block, because compute-sanitizer's racecheck takes sparser
forms for races; docs/kernels.md has the times of both and what limits the kernel.

The maximum that weights refer to is a head's largest logit so far up to LAZY powers of two: only where a block has a
larger one do the warps of the first warpgroup exchange maxima, and does the second one rescale.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ptx
from pallas_kernels.latents import VALUE_DIM, WIDTH
from pallas_kernels.softmax import LAZY, LOG2E, MASKED, START

ROW_BYTES = 2 * WIDTH
KEYS = 64  # of a block
MAX_HEADS = 32
PIECE = KEYS * 128  # bytes of 64 columns of a key block
UNIT_PIECES = 2  # 128 bytes wide pieces of a unit
UNITS = VALUE_DIM // (64 * UNIT_PIECES)  # of a key block
UNIT = UNIT_PIECES * PIECE
SHARED_BYTES = 226 * 1024  # a block may have 227 KB, but Mosaic rounds up to whole KB and adds a static byte
VOTE_BARRIER, MAXIMA_BARRIER = 8, 9  # named barriers of the first warpgroup

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Tasks:
    """B x S queries of H heads over T keys each, with lists of `blocks` key blocks."""

    batch: int
    queries: int
    heads: int
    keys: int
    blocks: int

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= MAX_HEADS:
            raise ValueError(f"between 1 and {MAX_HEADS} heads fit, not {self.heads}")

    @property
    def columns(self) -> int:
        return -(-self.heads // 8) * 8

    @property
    def count(self) -> int:
        return self.batch * self.queries

    @property
    def grid(self) -> int:
        return min(hopper.NUM_SMS, self.count)


MOST_UNITS = 3 * UNITS - 1  # of the ring: `Memory` says why


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where things are in shared memory, in bytes. Matrices come first and are tiles of 8 lines of 128 bytes.

    ring: how many units there are. Few enough for two places of rotary columns: when the gathering warpgroup fills the last
    unit of block b + 2, the first one of block b or a later one is free, so the logits of b have been made.
    """

    columns: int
    ring: int
    units: int  # [ring][UNIT]
    rotary: int  # [2][PIECE]
    queries: int  # [9][columns][64] bfloat16
    weights: int  # [2][columns][64] bfloat16
    factors: int  # [2][columns] float32
    sums: int  # [2][4 warps][columns] float32
    maxima: int  # [4 warps][columns] float32
    raised: int  # [2], whether factors are to be applied
    full: int  # barriers
    empty: int
    ready: int
    free: int
    end: int

    @staticmethod
    def of(columns: int) -> Memory:
        row, barriers = 4 * columns, 8 * MOST_UNITS
        rest = [2 * PIECE, ROW_BYTES * columns, 2 * 128 * columns, 2 * row, 8 * row, 4 * row, 8, barriers, barriers, 16, 16]
        ring = min((SHARED_BYTES - sum(rest)) // UNIT, MOST_UNITS)
        return Memory(columns, ring, *itertools.accumulate([0, ring * UNIT, *rest]))

    @property
    def of_weights(self) -> int:
        return 128 * self.columns


class _Ring:
    """A place in the ring of units and how often the ring went round, as values of a loop's carry."""

    def __init__(self, memory: Memory, place: ptx.Value, round_: ptx.Value):
        self.memory, self.place, self.round = memory, place, round_

    @property
    def carry(self) -> list[ptx.Value]:
        return [self.place, self.round]

    def unit(self, base: ptx.Value) -> ptx.Value:
        return ptx.add(base, ptx.mul(self.place, UNIT))

    def barrier(self, base: ptx.Value, kind: int) -> ptx.Value:
        return ptx.add(base, kind, ptx.shift_left(self.place, 3))

    def next(self) -> _Ring:
        following = ptx.add(self.place, 1)
        around = ptx.compare("eq", following, self.memory.ring)
        round_ = ptx.select(around, ptx.bit_xor(self.round, 1), self.round)
        return _Ring(self.memory, ptx.select(around, 0, following), round_)


def _start(memory: Memory) -> _Ring:
    return _Ring(memory, ptx.constant(0), ptx.constant(0))


def _line(thread: ptx.Value) -> tuple[ptx.Value, ptx.Value]:
    """(16-byte chunk of a line, line) of a thread whose warpgroup copies 16 lines at once."""
    return ptx.bit_and(thread, 7), ptx.shift_right(thread, 3)


def _in_tiles(line: ptx.Value, chunk: ptx.Value) -> ptx.Value:
    """Where a chunk of a line is in a matrix of swizzled tiles."""
    within = ptx.bit_and(line, 7)
    return ptx.add(ptx.shift_left(line, 7), ptx.shift_left(ptx.bit_xor(chunk, within), 4))


def _init_barriers(memory: Memory, ref) -> None:
    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(ctx, ref):
        base = ptx.shared_address(ref)
        with ptx.when(ptx.compare("eq", ptx.thread(), 0)):
            for i in range(memory.ring):
                ptx.barrier_init(ptx.add(base, memory.full + 8 * i), 128)
                ptx.barrier_init(ptx.add(base, memory.empty + 8 * i), 128)
            for place in range(2):
                ptx.barrier_init(ptx.add(base, memory.ready + 8 * place), 128)
                ptx.barrier_init(ptx.add(base, memory.free + 8 * place), 128)
            ptx.barrier_init_done()
        ptx.block_barrier()

    init(ref)


def _gather(tasks: Tasks, memory: Memory, latents, lists, counts, ref, block) -> None:
    """The third warpgroup: 8 lanes copy 128 bytes of a row with cp.async into the tiles that wgmma reads."""

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, _REF, _REF))
    def gather(ctx, block, latents, lists, counts, ref):
        base = ptx.shared_address(ref)
        chunk, row = _line(ptx.bit_and(ptx.thread(), 127))
        to = ptx.add(base, _in_tiles(row, chunk))
        source = ptx.offset(ptx.global_address(latents), chunk, 16)
        own_entry = ptx.offset(ptx.global_address(lists), row, 4)
        count_at = ptx.global_address(counts)
        block = ptx.scalar(block)
        num_tasks = _tasks_of(tasks, block)

        def entries(task, key_block):
            """Of this thread's four rows of a key block."""
            at = ptx.offset(own_entry, ptx.add(ptx.mul(task, tasks.blocks), key_block), 4 * KEYS)
            return [ptx.load_global(ptx.offset(at, ptx.constant(i), 64)) for i in range(4)]

        def one_task(i, carry):
            task = ptx.add(block, ptx.mul(i, tasks.grid))
            following = ptx.minimum(ptx.add(task, tasks.grid), tasks.count - 1)
            rows_at = ptx.offset(source, ptx.div(task, tasks.queries), tasks.keys * ROW_BYTES)
            blocks = carry[0]
            blocks_after = ptx.load_global(ptx.offset(count_at, following, 4))

            def one_block(b, carry):
                ring, done, current = _Ring(memory, *carry[:2]), carry[2], carry[3:]
                is_last = ptx.compare("eq", ptx.add(b, 1), blocks)
                after = entries(ptx.select(is_last, following, task), ptx.select(is_last, 0, ptx.add(b, 1)))
                rows = []
                for entry in current:
                    used = ptx.select(ptx.compare("sge", entry, 0), 16, 0)
                    key = ptx.minimum(ptx.maximum(entry, 0), tasks.keys - 1)
                    rows.append((ptx.offset(rows_at, key, ROW_BYTES), used))
                rotary = ptx.add(to, memory.rotary, ptx.mul(ptx.bit_and(done, 1), PIECE))
                for unit in range(UNITS):
                    ptx.barrier_wait(ring.barrier(base, memory.empty), ptx.bit_xor(ring.round, 1))
                    if unit == memory.ring - 2 * UNITS:  # what is overwritten from here on was copied two blocks ago
                        ptx.copies_done(pending=1)
                    target = ptx.add(ring.unit(to), memory.units)
                    for j, (at, used) in enumerate(rows):
                        at_unit = ptx.offset(at, ptx.constant(unit), 128 * UNIT_PIECES)
                        ptx.copy_async(ptx.add(target, 2048 * j), at_unit, used, UNIT_PIECES, PIECE, 128)
                        if unit == UNITS - 1:
                            at_rotary = ptx.offset(at, ptx.constant(1), 2 * VALUE_DIM)
                            ptx.copy_async(ptx.add(rotary, 2048 * j), at_rotary, used, 1, 0, 0)
                    ptx.barrier_arrive_after_copies(ring.barrier(base, memory.full))
                    ring = ring.next()
                ptx.copies_commit()
                return [*ring.carry, ptx.add(done, 1), *after]

            return [blocks_after, *ptx.loop(blocks, carry[1:], one_block)]

        first = ptx.load_global(ptx.offset(count_at, block, 4))
        carry = [first, *_start(memory).carry, ptx.constant(0), *entries(block, ptx.constant(0))]
        ptx.loop(num_tasks, carry, one_task)
        ptx.copies_done()

    gather(block, latents, lists, counts, ref)


def _tasks_of(tasks: Tasks, block: ptx.Value) -> ptx.Value:
    """How many tasks a block of the grid has."""
    return ptx.div(ptx.sub(tasks.count + tasks.grid - 1, block), tasks.grid)


def _weigh(tasks: Tasks, memory: Memory, scale: float, queries, lists, counts, ref, block) -> None:
    """The first warpgroup: logits and weights.

    A thread has rows g and g + 8 of its warp's 16 keys, g = lane / 4, and columns 2 (lane % 4) and the next of every 8.
    """
    groups = tasks.columns // 8  # of 8 columns, 4 logits a thread each: two columns of row g, the same of g + 8
    to_logits = scale * LOG2E

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, _REF, _REF))
    def weigh(ctx, block, queries, lists, counts, ref):
        base = ptx.shared_address(ref)
        thread = ptx.bit_and(ptx.thread(), 127)
        lane, warp = ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)
        in_group = ptx.shift_right(lane, 2)
        first_column = ptx.shift_left(ptx.bit_and(lane, 3), 1)
        speaks = ptx.compare("eq", in_group, 0)  # for its columns, where all lanes have the same
        own_entry = ptx.offset(ptx.global_address(lists), ptx.add(ptx.shift_left(warp, 4), in_group), 4)
        block = ptx.scalar(block)
        num_tasks = _tasks_of(tasks, block)
        query_matrix = ptx.matrix(ptx.add(base, memory.queries))

        chunk, line = _line(thread)
        queries_at = ptx.offset(ptx.global_address(queries), chunk, 16)
        to_queries = ptx.add(base, memory.queries, _in_tiles(line, chunk))

        def load_queries(task) -> None:
            """By cp.async, because a TMA copy into tiles of 8 lines would have to start at a multiple of 8."""
            for first in range(0, tasks.columns, 16):
                here = ptx.add(line, first)
                size = ptx.select(ptx.compare("slt", here, tasks.heads), 16, 0)
                # A line that does not count is not read, but its address has to be one of the array.
                head = ptx.add(ptx.mul(task, tasks.heads), ptx.minimum(here, tasks.heads - 1))
                at = ptx.offset(queries_at, head, ROW_BYTES)
                with ptx.when(ptx.compare("slt", here, tasks.columns)):
                    ptx.copy_async(ptx.add(to_queries, 128 * first), at, size, WIDTH // 64, tasks.columns * 128, 128)

        def entries(task, key_block):
            at = ptx.offset(own_entry, ptx.add(ptx.mul(task, tasks.blocks), key_block), 4 * KEYS)
            return [ptx.load_global(ptx.offset(at, ptx.constant(i), 32)) for i in range(2)]

        def issue(ring: _Ring, done):
            """Starts the logits of a block, the `done`-th of all."""
            logits = [[ptx.number(0.0)] * (4 * groups)]
            for unit in range(UNITS):
                ptx.barrier_wait(ring.barrier(base, memory.full), ring.round)
                ptx.proxy_fence()
                steps = [
                    (0, piece * PIECE + 32 * i, (unit * UNIT_PIECES + piece) * tasks.columns * 128 + 32 * i)
                    for piece in range(UNIT_PIECES)
                    for i in range(4)
                ]
                latents = ptx.matrix(ptx.add(ring.unit(base), memory.units))
                logits = ptx.multiply(
                    logits, latents, query_matrix, steps, fresh=unit == 0, columns=tasks.columns, transposed=False
                )
                if unit == UNITS - 1:
                    rotary = ptx.matrix(ptx.add(base, memory.rotary, ptx.mul(ptx.bit_and(done, 1), PIECE)))
                    steps = [(0, 32 * i, VALUE_DIM // 64 * tasks.columns * 128 + 32 * i) for i in range(4)]
                    logits = ptx.multiply(
                        logits, rotary, query_matrix, steps, fresh=False, columns=tasks.columns, transposed=False
                    )
                ring = ring.next()
            ptx.multiply_commit()
            return logits, ring

        def raise_maxima(scaled, tops, totals, place):
            """New maxima where a block's are too far above, and what follows from them."""
            own = [ptx.larger(scaled[4 * j + c], scaled[4 * j + 2 + c]) for j in range(groups) for c in range(2)]
            for distance in (4, 8, 16):
                own = [ptx.larger(x, ptx.lane_distant(x, distance)) for x in own]
            maxima = ptx.add(base, memory.maxima, ptx.shift_left(first_column, 2))
            with ptx.when(speaks):
                for j in range(groups):
                    at = ptx.add(maxima, ptx.mul(warp, 4 * tasks.columns), 32 * j)
                    ptx.store_shared_floats(at, own[2 * j : 2 * j + 2])
            ptx.barrier(MAXIMA_BARRIER, 128)
            new_tops, factors = [], []
            for j in range(groups):
                by_warp = [ptx.load_shared_floats(ptx.add(maxima, 4 * tasks.columns * w + 32 * j)) for w in range(4)]
                for c in range(2):
                    top = tops[2 * j + c]
                    block_top = functools.reduce(ptx.larger, [pair[c] for pair in by_warp])
                    exceeds = ptx.above(block_top, ptx.plus(top, ptx.number(LAZY)))
                    new_tops.append(ptx.either(exceeds, block_top, top))
                    factors.append(ptx.exp2(ptx.minus(top, new_tops[-1])))
            with ptx.when(ptx.compare("slt", thread, 4)):
                to = ptx.add(base, memory.factors, ptx.mul(place, 4 * tasks.columns), ptx.shift_left(first_column, 2))
                for j in range(groups):
                    ptx.store_shared_floats(ptx.add(to, 32 * j), factors[2 * j : 2 * j + 2])
            return [*new_tops, *map(ptx.times, totals, factors)]

        def publish(logits, marks, tops, totals, done, after_meeting=None, last=False):
            """The weights of a block, the `done`-th of all, for the second warpgroup."""
            place, turn = ptx.bit_and(done, 1), ptx.shift_right(done, 1)
            masks = [
                ptx.either(ptx.compare("slt", mark, 0), ptx.number(MASKED), ptx.number(0.0)) for mark in marks
            ]  # of rows g and g + 8
            scaled = [ptx.times_plus(x, ptx.number(to_logits), masks[i % 4 // 2]) for i, x in enumerate(logits)]
            column = [i // 4 * 2 + i % 2 for i in range(4 * groups)]
            over = [ptx.minus(x, tops[column[i]]) for i, x in enumerate(scaled)]
            exceeds = ptx.above(functools.reduce(ptx.larger, over), ptx.number(LAZY))
            ptx.barrier_wait(ptx.add(base, memory.free, ptx.shift_left(place, 3)), ptx.bit_xor(ptx.bit_and(turn, 1), 1))
            raised = ptx.barrier_any(VOTE_BARRIER, 128, exceeds)
            if after_meeting is not None:
                after_meeting()
            found = ptx.choose(
                ptx.compare("ne", raised, 0), lambda: raise_maxima(scaled, tops, totals, place), [*tops, *totals]
            )
            tops, totals = found[: 2 * groups], found[2 * groups :]
            with ptx.when(ptx.compare("eq", thread, 0)):
                ptx.store_shared(ptx.add(base, memory.raised, ptx.shift_left(place, 2)), raised)
            weights = [ptx.exp2(ptx.minus(x, tops[column[i]])) for i, x in enumerate(scaled)]
            totals = [
                ptx.plus(total, ptx.plus(weights[i // 2 * 4 + i % 2], weights[i // 2 * 4 + 2 + i % 2]))
                for i, total in enumerate(totals)
            ]
            # Lines of the stored matrix are heads, 16 bytes of them 8 keys.
            block_of_8 = ptx.add(ptx.shift_left(warp, 1), ptx.bit_and(ptx.shift_right(lane, 3), 1))
            to = ptx.add(base, memory.weights, ptx.mul(place, memory.of_weights), _in_tiles(ptx.bit_and(lane, 7), block_of_8))
            for j in range(groups):
                a, b, c, d = weights[4 * j : 4 * j + 4]
                words = [ptx.to_bfloat16_pair(a, b), ptx.to_bfloat16_pair(c, d)]
                ptx.store_shared_transposed(ptx.add(to, 1024 * j), words)
            if last:
                sums = totals
                for distance in (4, 8, 16):
                    sums = [ptx.plus(x, ptx.lane_distant(x, distance)) for x in sums]
                to = ptx.add(
                    base,
                    memory.sums,
                    ptx.mul(ptx.add(ptx.shift_left(place, 2), warp), 4 * tasks.columns),
                    ptx.shift_left(first_column, 2),
                )
                with ptx.when(speaks):
                    for j in range(groups):
                        ptx.store_shared_floats(ptx.add(to, 32 * j), sums[2 * j : 2 * j + 2])
            ptx.proxy_fence()
            ptx.barrier_arrive(ptx.add(base, memory.ready, ptx.shift_left(place, 3)))
            return tops, totals

        def one_task(i, carry):
            task = ptx.add(block, ptx.mul(i, tasks.grid))
            ring, done = _Ring(memory, *carry[:2]), carry[2]
            blocks = ptx.load_global(ptx.offset(ptx.global_address(counts), task, 4))
            marks = entries(task, ptx.constant(0))
            ptx.copies_done()
            ptx.proxy_fence()
            ptx.barrier(MAXIMA_BARRIER, 128)  # all of the query is there
            logits, ring = issue(ring, done)
            (logits,) = ptx.multiplied(logits)

            def one_block(b, carry):
                ring, done, marks = _Ring(memory, *carry[:2]), carry[2], carry[3:5]
                logits = carry[5 : 5 + 4 * groups]
                tops, totals = carry[5 + 4 * groups : 5 + 6 * groups], carry[5 + 6 * groups :]
                following = ptx.add(done, 1)
                tops, totals = publish(logits, marks, tops, totals, done)
                begun, ring = issue(ring, following)
                marks_after = entries(task, ptx.add(b, 1))  # not sooner: a fence would wait for it
                (logits,) = ptx.multiplied(begun)
                return [*ring.carry, following, *marks_after, *logits, *tops, *totals]

            start = [ptx.number(START)] * (2 * groups) + [ptx.number(0.0)] * (2 * groups)
            carry = ptx.loop(ptx.sub(blocks, 1), [*ring.carry, done, *marks, *logits, *start], one_block)
            ring, done, marks = carry[:2], carry[2], carry[3:5]
            logits = carry[5 : 5 + 4 * groups]
            tops, totals = carry[5 + 4 * groups : 5 + 6 * groups], carry[5 + 6 * groups :]

            def load_next():
                """All warps' logits have been made: the query's place is free."""
                following = ptx.add(task, tasks.grid)
                with ptx.when(ptx.compare("slt", following, tasks.count)):
                    load_queries(following)

            publish(logits, marks, tops, totals, done, after_meeting=load_next, last=True)
            return [*ring, ptx.add(done, 1)]

        load_queries(block)
        ptx.loop(num_tasks, [*_start(memory).carry, ptx.constant(0)], one_task)

    weigh(block, queries, lists, counts, ref)


def _sum_values(tasks: Tasks, memory: Memory, counts, ref, out, block) -> None:
    """The second warpgroup: values times weights, in 8 tiles of 64 value columns."""
    groups, tiles = tasks.columns // 8, VALUE_DIM // 64

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _REF, _REF, _REF))
    def sum_values(ctx, block, counts, ref, out):
        base = ptx.shared_address(ref)
        thread = ptx.bit_and(ptx.thread(), 127)
        lane, warp = ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)
        in_group = ptx.shift_right(lane, 2)
        pair = ptx.shift_left(ptx.bit_and(lane, 3), 1)
        block = ptx.scalar(block)
        num_tasks = _tasks_of(tasks, block)

        def of_columns(kind: int, row) -> list[ptx.Value]:
            """This thread's two of every 8 columns of a row of float32."""
            at = ptx.add(base, kind, ptx.mul(row, 4 * tasks.columns), ptx.shift_left(pair, 2))
            return [x for j in range(groups) for x in ptx.load_shared_floats(ptx.add(at, 32 * j))]

        def by_column(values, factors):
            return [ptx.times(x, factors[i % (4 * groups) // 4 * 2 + i % 2]) for i, x in enumerate(values)]

        def one_task(i, carry):
            task = ptx.add(block, ptx.mul(i, tasks.grid))
            blocks = ptx.load_global(ptx.offset(ptx.global_address(counts), task, 4))

            def one_block(b, carry):
                ring, done = _Ring(memory, *carry[:2]), carry[2]
                totals, sums = carry[3 : 3 + 2 * groups], carry[3 + 2 * groups :]
                place, turn = ptx.bit_and(done, 1), ptx.shift_right(done, 1)
                ptx.barrier_wait(ptx.add(base, memory.ready, ptx.shift_left(place, 3)), ptx.bit_and(turn, 1))
                ptx.proxy_fence()
                raised = ptx.load_shared(ptx.add(base, memory.raised, ptx.shift_left(place, 2)))
                sums = ptx.choose(
                    ptx.compare("ne", raised, 0), lambda: by_column(sums, of_columns(memory.factors, place)), sums
                )
                by_tile = [sums[i : i + 4 * groups] for i in range(0, len(sums), 4 * groups)]
                weights = ptx.matrix(ptx.add(base, memory.weights, ptx.mul(place, memory.of_weights)))
                steps = [(j, j * PIECE + 2048 * k, 32 * k) for k in range(4) for j in range(UNIT_PIECES)]
                emptied = []
                for unit in range(UNITS):
                    tiles_of_unit = slice(unit * UNIT_PIECES, (unit + 1) * UNIT_PIECES)
                    latents = ptx.matrix(ptx.add(ring.unit(base), memory.units))
                    by_tile[tiles_of_unit] = ptx.multiply(
                        by_tile[tiles_of_unit], latents, weights, steps, fresh=False, columns=tasks.columns, transposed=True
                    )
                    ptx.multiply_commit()
                    emptied.append(ring.barrier(base, memory.empty))
                    ring = ring.next()
                for unit, address in enumerate(emptied):
                    ptx.multiply_wait(UNITS - 1 - unit)
                    ptx.barrier_arrive(address)
                sums = [x for tile in ptx.multiplied(by_tile) for x in tile]

                def add_totals():
                    by_warp = [of_columns(memory.sums, ptx.add(ptx.shift_left(place, 2), w)) for w in range(4)]
                    return [functools.reduce(ptx.plus, parts) for parts in zip(*by_warp, strict=True)]

                totals = ptx.choose(ptx.compare("eq", ptx.add(b, 1), blocks), add_totals, totals)
                ptx.barrier_arrive(ptx.add(base, memory.free, ptx.shift_left(place, 3)))
                return [*ring.carry, ptx.add(done, 1), *totals, *sums]

            zeros = [ptx.number(0.0)] * ((2 + 4 * tiles) * groups)
            carry = ptx.loop(blocks, [*carry, *zeros], one_block)
            totals, sums = carry[3 : 3 + 2 * groups], carry[3 + 2 * groups :]
            zero = ptx.number(0.0)
            inverses = [ptx.either(ptx.above(x, zero), ptx.inverse(x), zero) for x in totals]
            sums = by_column(sums, inverses)
            # After a transposition a thread has head lane / 4 of every 8, and two of 8 value columns side by side.
            to = ptx.offset(ptx.global_address(out), ptx.add(ptx.mul(task, tasks.heads), in_group), 2 * VALUE_DIM)
            to = ptx.offset(to, ptx.add(ptx.shift_left(warp, 4), pair), 2)
            for j in range(groups):
                counts_ = ptx.compare("slt", ptx.add(in_group, 8 * j), tasks.heads)
                for tile in range(tiles):
                    for half in range(2):  # rows g and g + 8 of the warp's 16
                        x, y = sums[4 * (tile * groups + j) + 2 * half :][:2]
                        word = ptx.transposed_block(ptx.to_bfloat16_pair(x, y))
                        at = ptx.offset(to, ptx.constant(1), 16 * VALUE_DIM * j + 128 * tile + 16 * half)
                        ptx.store_global(at, word, counts_)
            return carry[:3]

        ptx.loop(num_tasks, [*_start(memory).carry, ptx.constant(0)], one_task)

    sum_values(block, counts, ref, out)


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

    def sparse_mla_few_heads(queries, latents, lists, counts, out, ref):
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        _init_barriers(memory, ref)

        @pl.when(warpgroup == 0)
        def _():
            _weigh(tasks, memory, scale, queries, lists, counts, ref, block)

        @pl.when(warpgroup == 1)
        def _():
            _sum_values(tasks, memory, counts, ref, out, block)

        @pl.when(warpgroup == 2)
        def _():
            _gather(tasks, memory, latents, lists, counts, ref, block)

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
