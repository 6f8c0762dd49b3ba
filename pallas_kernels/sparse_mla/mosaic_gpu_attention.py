"""The attention kernel of sparse_mla for Hopper: tiles of 64 query rows over lists of selected latents.

A task is one tile of 64 rows [64, 576] (the heads of one query, or of several) and one list of key entries, visited in
blocks of 64 keys. A block of the grid is persistent, one on each SM, and has three warpgroups. The third one
gathers: 8 lanes copy 128 bytes of a row with cp.async straight into the tiled and swizzled layout that wgmma reads, so
that no instruction touches the latents in between. The two others compute. Key block b sits in slot b % 2, and warpgroup
b % 2 makes its logits and its softmax weights P; every warpgroup owns 256 of the 512 value columns of all blocks, so P
goes to the other one through shared memory, over the 64 rotary columns of its own block, which nobody needs any more.
While one warpgroup is in its softmax the other one multiplies. Slots are freed and refilled by halves of 256 columns.

For a pair of blocks warpgroup 0 makes its logits, its weights, its values, and then its values of the other block.
Warpgroup 1 makes its logits and their maxima while the other one makes its weights, whose running maximum it needs; then its
weights, while its values of the other block are under way, and its own values. The next task's queries are loaded as soon as
the last logits are made, while the last values are multiplied, and results go from registers to global memory, so that
they need no shared memory of their own and leave the latents in L2 alone.

What orders whom: gathered latents by full[slot][half], an arrival of every gathering thread after its copies, and a fence of
the reader's before wgmma; masks by mask_ready[slot]; the weights of a block by p_ready[slot]; slots for reuse by
empty[slot][half], an arrival of every thread of the half's warpgroup after its wgmma has ended, which for the slot's own
warpgroup includes its mask, and for the other one the weights. The query tile of a cluster's block, whose shared memory its
results take for other blocks to read, comes through registers, because compute-sanitizer's racecheck takes cp.async there
for a race (docs/kernels.md).

The running maximum is exact up to LAZY powers of two: weights grow to at most 2**LAZY before the accumulator, 64 x 256
float32 in the registers of a warpgroup, is rescaled, and a warp whose rows all kept their maximum skips the rescaling.

Why these blocks: wgmma takes 64 rows; two slots of 64 keys (147 KB) and one query tile (74 KB) fill shared memory; the
accumulators take 128 of 216 registers. docs/kernels.md says what was tried and what limits the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from pallas_kernels import hopper
from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.tiles import BY_COLUMN, BY_ROW, TILED, WGMMA, by_column, by_row, filled
from pallas_kernels.latents import ROTARY, VALUE_DIM
from pallas_kernels.softmax import LAZY, LOG2E, MASKED, START
from pallas_kernels.sparse_mla.mosaic_gpu_attention_rows import (
    SCALAR,
    Barriers,
    arrive,
    await_queries,
    combine,
    gather,
    init_barriers,
    load_queries,
    pairs_of_list,
    store_rows,
    wait,
)
from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import OWNER_SHIFT, TILE, Tasks

HALF = VALUE_DIM // 2  # value columns that a warpgroup owns
# What `attend` can leave out, for measuring what it costs; "all but gather" leaves the slots' filling and emptying.
STAGES = ("gather", "softmax", "values", "all but gather")

REGISTERS = hopper.RegisterSplit(workers=2, worker=216, helper=72)  # spills none

Carry = tuple[jax.Array, jax.Array, jax.Array]  # values so far [64, 256], running maximum [64] and sum of weights [64]


def _opaque(x: jax.Array) -> jax.Array:
    """x, hidden from loop-invariant code motion: else 72 wgmma descriptors leave the loop and are spilled."""

    @plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def move(ctx, x):
        return mgpu.FragmentedArray.splat(ptx.opaque(ptx.scalar(x)), (), is_signed=True)

    return move(x)


def _rescale(x: jax.Array, factors: jax.Array) -> jax.Array:
    """x [64, n] * factors [64], skipped by a warp whose factors are all 1."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, BY_ROW),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def rescale(ctx, x, factors):
        one = arith.constant(ir.F32Type.get(), 1.0)
        lanes = []
        for register in factors.registers.flat:
            if isinstance(register.type, ir.VectorType):
                lanes += [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]
            else:
                lanes.append(register)
        changed = functools.reduce(arith.ori, [arith.cmpf(arith.CmpFPredicate.UNE, lane, one) for lane in lanes])
        voted = ptx.asm(
            "{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\nvote.sync.any.pred p, p, 0xffffffff;\nselp.b32 $0, 1, 0, p;\n}",
            [arith.extui(ptx.i32(), changed)],
            "=r,r",
            ptx.i32(),
        )
        registers = list(x.registers.flat)
        branch = scf.IfOp(voted.differs(0), [r.type for r in registers], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.YieldOp(list((x * factors.broadcast_in_dim(x.shape, (0,), x.layout)).registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.YieldOp(registers)
        results = np.array(list(branch.results), dtype=object).reshape(x.registers.shape)
        return mgpu.FragmentedArray(_registers=results, _layout=x.layout, _is_signed=None)

    return rescale(x, factors)


def _warpgroup_sync() -> None:
    """A barrier of the threads of a warpgroup."""

    @plgpu.inline_mgpu()
    def sync(ctx):
        utils.warpgroup_barrier()

    sync()


@dataclasses.dataclass(frozen=True, eq=False)
class Refs:
    """The kernel's references."""

    # Input
    queries: Any  # [rows, 576] bfloat16
    latents: Any  # [B * T, 576] bfloat16
    lists: Any  # [tasks.lists, tasks.pairs * 128] int32
    counts: Any  # [tasks.lists] int32, None where lists are not packed
    # Output
    out: Any  # [rows, 512] bfloat16
    # Scratch
    query_columns: Any  # [2 halves, 64, 256] bfloat16; in the end a cluster's results
    query_rotary: Any  # [1, 64, 64] bfloat16
    columns: Any  # [2 slots, 2 halves, 64, 256] bfloat16
    rotary: Any  # [2 slots, 64, 64] bfloat16; then the block's softmax weights P
    stats: Any  # [3, 2, 64] float32, of both warpgroups: running maxima, sums of weights, logarithms of these
    marks: Any  # [2 slots, 64] of a block's keys: float32 to add to logits, or int32 packed entries
    # Barriers
    barriers: Any  # [32] uint32: `Barriers`
    sums_ready: Any  # [2]: a warpgroup's sum of weights is in stats


def _scratch(packed: int) -> tuple[Any, ...]:
    return (
        plgpu.SMEM((2, TILE, HALF), jnp.bfloat16, transforms=TILED),
        plgpu.SMEM((1, TILE, ROTARY), jnp.bfloat16, transforms=TILED),
        plgpu.SMEM((2, 2, TILE, HALF), jnp.bfloat16, transforms=TILED),
        plgpu.SMEM((2, TILE, ROTARY), jnp.bfloat16, transforms=TILED),
        plgpu.SMEM((3, 2, TILE), jnp.float32),
        plgpu.SMEM((2, TILE), jnp.float32 if packed == 1 else jnp.int32),
        plgpu.SMEM((Barriers.WORDS,), jnp.uint32),
        plgpu.Barrier(num_barriers=2),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Worker:
    """A computing warpgroup: 0 makes the logits and weights of blocks in slot 0, 1 of those in slot 1."""

    tasks: Tasks
    scale: float
    leave_out: str
    refs: Refs
    warpgroup: jax.Array

    def load_queries(self, task: Any, half: Any) -> None:
        refs, (row, rows, _) = self.refs, self._place(task)
        load_queries(
            refs.queries, refs.query_columns, refs.query_rotary, row, rows, half, through_registers=self.tasks.splits > 1
        )

    def task(self, task: Any, index: Any, num_tasks: Any, visited: Any) -> Any:
        """The `index`-th task of this block of the grid, `task` of all. `visited` pairs of key blocks went before it.

        Returns how many have then.
        """
        tasks, refs, warpgroup = self.tasks, self.refs, self.warpgroup
        row, rows, which = self._place(task)
        if refs.counts is not None:
            pairs = refs.counts[which]
        else:
            share = tasks.pairs_per_task
            pairs = share if tasks.splits > 1 else pairs_of_list(refs.lists, which, share)
        await_queries(refs.barriers, index & 1)

        def load_next_queries():
            @pl.when(index + 1 < num_tasks)
            def _():
                for half in range(2):
                    self.load_queries(task + tasks.blocks, jnp.int32(half))

        o, top, total = self._all_pairs(pairs, visited, load_next_queries)

        refs.stats[1, warpgroup] = total
        plgpu.barrier_arrive(refs.sums_ready.at[warpgroup])
        plgpu.barrier_wait(refs.sums_ready.at[1 - warpgroup])
        total = total + plgpu.load(refs.stats.at[1, 1 - warpgroup], layout=BY_ROW)
        o = o * by_row(jnp.where(total > 0, 1.0 / total, 0.0), HALF)
        if tasks.splits == 1:
            store_rows(o, refs.out, row, rows, warpgroup)
        else:  # other blocks read the result in the place of the queries, which both are done with now
            refs.query_columns[warpgroup] = o.astype(jnp.bfloat16)
            refs.stats[2, warpgroup] = jnp.where(total > 0, top + jnp.log2(total), START)
            plgpu.commit_smem()
            logs, split = refs.stats.at[2, warpgroup], task % tasks.splits
            combine(refs.query_columns, logs, refs.out, tasks, row, rows, split, warpgroup)
        return visited + pairs

    def _place(self, task: Any) -> tuple[Any, Any, Any]:
        """(first row, rows that count, list) of a task."""
        tasks = self.tasks
        tile = task // tasks.splits
        batch, local = tile // tasks.tiles_per_batch, tile % tasks.tiles_per_batch
        batch_rows = tasks.queries * tasks.heads
        row = batch * batch_rows + local * tasks.rows_per_tile
        rows = jnp.minimum(tasks.rows_per_tile, batch_rows - local * tasks.rows_per_tile)
        return row, rows, tile // tasks.tiles_per_list

    def _all_pairs(self, pairs: Any, visited: Any, then: Callable[[], None]) -> Carry:
        """The carry after all pairs of a list; `visited` pairs went before, which says the barriers' parity.

        Warpgroup 0 calls then() once nobody reads the queries any more.
        """

        def loop(step: Callable[[Any, Carry], Carry]) -> Callable[[Carry], Carry]:
            return lambda carry: jax.lax.fori_loop(0, pairs, step, carry)

        carry = (filled((TILE, HALF), 0.0), filled((TILE,), START, BY_ROW), filled((TILE,), 0.0, BY_ROW))
        if self.leave_out == "all but gather":
            return loop(lambda i, carry: self._only_free((visited + i) & 1, carry))(carry)
        first = loop(lambda i, carry: self._first_of_pair((visited + i) & 1, lambda: pl.when(i == pairs - 1)(then), carry))
        second = loop(lambda i, carry: self._second_of_pair((visited + i) & 1, carry))
        return jax.lax.cond(self.warpgroup == 0, first, second, carry)

    def _first_of_pair(self, parity: Any, then: Callable[[], None], carry: Carry) -> Carry:
        """What warpgroup 0 does for a pair of blocks: its own, then its values of the other's, and then()."""

        def scope(s_ref, o_ref):
            zero, (o, top, total) = _opaque(jnp.int32(0)), carry
            own, other = zero, zero + 1
            self._issue_logits(s_ref, own, zero, parity)
            s, block_top = self._masked_logits(s_ref, own, parity)
            p16, factors, top, total = self._publish_p(s, block_top, top, total, own)
            o = self._own_values(o, p16, factors, o_ref, own)
            top, total = self._issue_other_values(o, top, total, o_ref, own, other, parity)
            then()
            return self._other_values(o, o_ref, own, other), top, total

        return pl.run_scoped(scope, _LOGITS, _VALUES)

    def _second_of_pair(self, parity: Any, carry: Carry) -> Carry:
        """What warpgroup 1 does: its logits while the other one makes its weights, whose maximum it has to know."""

        def scope(s_ref, o_ref):
            zero, (o, top, total) = _opaque(jnp.int32(0)), carry
            own, other = zero + 1, zero
            self._issue_logits(s_ref, own, zero, parity)
            s, block_top = self._masked_logits(s_ref, own, parity)
            top, total = self._issue_other_values(o, top, total, o_ref, own, other, parity)
            p16, factors, top, total = self._publish_p(s, block_top, top, total, own)
            o = self._other_values(o, o_ref, own, other)
            return self._own_values(o, p16, factors, o_ref, own), top, total

        return pl.run_scoped(scope, _LOGITS, _VALUES)

    def _only_free(self, parity: Any, carry: Carry) -> Carry:
        for slot in range(2):
            self._wait(Barriers.full, jnp.int32(slot), self.warpgroup, parity=parity)
            self._arrive(Barriers.empty, jnp.int32(slot), self.warpgroup)
        return carry

    def _issue_logits(self, s_ref: Any, slot: Any, zero: Any, parity: Any) -> None:
        """Starts queries times keys of the block in `slot`."""
        refs = self.refs
        self._wait(Barriers.full, slot, zero, parity=parity, fence=True)
        plgpu.wgmma(s_ref, refs.query_columns.at[zero], refs.columns.at[slot, zero].transpose((1, 0)))
        self._wait(Barriers.full, slot, zero + 1, parity=parity, fence=True)
        plgpu.wgmma(s_ref, refs.query_columns.at[zero + 1], refs.columns.at[slot, zero + 1].transpose((1, 0)))
        plgpu.wgmma(s_ref, refs.query_rotary.at[zero], refs.rotary.at[slot].transpose((1, 0)))

    def _masked_logits(self, s_ref: Any, slot: Any, parity: Any) -> tuple[jax.Array, jax.Array]:
        """Base-2 logits [64, 64] of the block in `slot`, and the largest of each row."""
        packed = self.tasks.packed
        self._wait(Barriers.mask_ready, slot, parity=parity)
        mark = plgpu.load(self.refs.marks.at[slot], layout=BY_COLUMN)
        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=0) * (self.scale * LOG2E)
        if packed == 1:
            s = s + by_column(mark)
        else:
            query = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=WGMMA) // self.tasks.heads
            owner = jnp.minimum(query, packed - 1)
            s = jnp.where((by_column(mark) >> (owner + OWNER_SHIFT)) & 1 == 1, s, MASKED)
        return s, filled((TILE,), 0.0, BY_ROW) if self.leave_out == "softmax" else s.max(axis=1)

    def _publish_p(self, s: Any, block_top: Any, top: Any, total: Any, slot: Any) -> tuple[Any, Any, Any, Any]:
        """The weights of a block, for the other warpgroup too, and how they change the running maximum and sum."""
        if self.leave_out == "softmax":
            new_top, p, factors = top, s, filled((TILE,), 1.0, BY_ROW)
        else:
            new_top = jnp.where(block_top > top + LAZY, block_top, top)
            p = jnp.exp2(s - by_row(new_top, TILE))
            factors = jnp.exp2(top - new_top)
            self.refs.stats[0, slot] = new_top
            total = total * factors + p.sum(axis=1)
        p16 = p.astype(jnp.bfloat16)
        _warpgroup_sync()  # all warps' logits are there: none reads rotary columns any more
        self.refs.rotary[slot] = p16
        self._arrive(Barriers.p_ready, slot, fence=True)
        return p16, factors, new_top, total

    def _own_values(self, o: Any, p16: Any, factors: Any, o_ref: Any, slot: Any) -> jax.Array:
        """This warpgroup's value columns of the block in its own slot."""
        if self.leave_out != "values":
            o_ref[...] = _rescale(o, factors)
            plgpu.wgmma(o_ref, p16, self.refs.columns.at[slot, slot])
            o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
        self._arrive(Barriers.empty, slot, slot)
        return o

    def _issue_other_values(
        self, o: Any, top: Any, total: Any, o_ref: Any, own: Any, other: Any, parity: Any
    ) -> tuple[Any, Any]:
        """Starts this warpgroup's value columns of the block in the other one's slot, once it has its weights."""
        self._wait(Barriers.p_ready, other, parity=parity)
        new_top, factors = top, filled((TILE,), 1.0, BY_ROW)
        if self.leave_out != "softmax":
            new_top = plgpu.load(self.refs.stats.at[0, other], layout=BY_ROW)
            factors = jnp.exp2(top - new_top)
        if self.leave_out != "values":
            o_ref[...] = _rescale(o, factors)
            plgpu.wgmma(o_ref, self.refs.rotary.at[other], self.refs.columns.at[other, own])
        return new_top, total * factors

    def _other_values(self, o: Any, o_ref: Any, own: Any, other: Any) -> jax.Array:
        if self.leave_out != "values":
            o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
        self._arrive(Barriers.empty, other, own)
        return o

    def _wait(self, which: Callable[..., Any], *index: Any, parity: Any, fence: bool = False) -> None:
        wait(self.refs.barriers, which, *index, parity=parity, fence=fence)

    def _arrive(self, which: Callable[..., Any], *index: Any, fence: bool = False) -> None:
        arrive(self.refs.barriers, which, *index, fence=fence)


_LOGITS, _VALUES = plgpu.ACC((TILE, TILE), jnp.float32), plgpu.ACC((TILE, HALF), jnp.float32)


def attend(
    queries: jax.Array,
    latents: jax.Array,
    lists: jax.Array,
    counts: jax.Array | None,
    tasks: Tasks,
    *,
    scale: float,
    leave_out: str = "",
) -> jax.Array:
    """Attention of every task.

    Args:
      queries: [rows, 576] bfloat16.
      latents: [B * T, 576] bfloat16.
      lists: [tasks.lists, tasks.pairs * 128] int32.
      counts: [tasks.lists] int32, how many pairs of key blocks of a packed list to visit, at least 1. None where queries have
        lists of their own: all of one that is split, for a decode step has full lists or short contexts, else up to the last
        pair with an entry set, which the kernel finds.
      leave_out: one of STAGES; the result is without meaning then.

    Returns:
      [rows, 512] bfloat16; zeros where no key counts.
    """
    if (counts is None) != (tasks.packed == 1):
        raise ValueError(f"packed lists have counts and others do not: {tasks.packed} queries a tile, counts {counts}")
    if leave_out not in ("", *STAGES):
        raise ValueError(f"leave_out {leave_out!r} is not one of {STAGES}")
    splits, blocks = tasks.splits, tasks.blocks

    def sparse_mla_attention(*given):
        refs = Refs(*(given if counts is not None else (*given[:3], None, *given[3:])))
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        if splits > 1:
            block = block * splits + jax.lax.axis_index("split")
        num_tasks = (tasks.count - block + blocks - 1) // blocks
        init_barriers(refs.barriers)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(REGISTERS.helper, action="decrease")
            gather(tasks, refs, block, jnp.int32(num_tasks), copies=leave_out != "gather")

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(REGISTERS.worker, action="increase")
            worker = _Worker(tasks, scale, leave_out, refs, warpgroup)
            worker.load_queries(block, warpgroup)

            def task(i, visited):
                return worker.task(block + i * blocks, i, num_tasks, visited)

            jax.lax.fori_loop(0, num_tasks, task, jnp.int32(0))

    kernel = plgpu.kernel(
        sparse_mla_attention,
        out_type=jax.ShapeDtypeStruct((tasks.rows, VALUE_DIM), jnp.bfloat16),
        scratch_types=_scratch(tasks.packed),
        grid=(blocks // splits,),
        grid_names=("block",),
        cluster=(splits,) if splits > 1 else (),
        cluster_names=("split",) if splits > 1 else (),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=1024),
    )
    return kernel(*(x for x in (queries, latents, lists, counts) if x is not None))
