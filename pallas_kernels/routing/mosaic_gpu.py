"""The routes of few rows in one thread block on Hopper, where XLA takes a dozen kernels.

A warp has a row at a time and chooses its experts as mosaic_gpu_choice does. Then every pair of a row and an expert is written
to the tables through shared memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import SharedMemory, Thread
from pallas_kernels.routing.arrays import Routes
from pallas_kernels.routing.choice import LANES, Choice
from pallas_kernels.routing.mosaic_gpu_choice import choose

MAX_ROWS = 64

Value = Any
_REF = plgpu.RefType()


@dataclasses.dataclass(frozen=True)
class Options:
    """rows: of the step. experts: that the device has. shared: whether there are shared ones too."""

    rows: int
    choice: Choice
    experts: int
    shared: bool

    @property
    def choices(self) -> int:
        return self.choice.choices


def choice_of(thread: Any, choice: Choice, logits: Value, bias: Value, row: Value) -> tuple[list[Value], list[Value]]:
    """The experts of a row of logits [N, E], and their weights, in all lanes of the warp that computes them."""

    def load(base: Value, i: Value) -> Value:
        return ptx.float_of(ptx.load_global(ptx.offset(base, i, 4)))

    first = row * choice.experts
    return choose(thread, choice, lambda expert: load(logits, first + expert), lambda expert: load(bias, expert))


class Program:
    """What the kernel's one thread block does. a: addresses of the inputs and of `outputs`, by name.

    used: shared memory with a word for every expert that the device has, padded to whole warps: whether a row chose it.
    """

    def __init__(self, p: Options, a: Mapping[str, Value], thread: Any, shared: SharedMemory):
        self.p, self.a, self.thread = p, a, thread
        self.num_used = -(-p.experts // LANES) * LANES
        self.used = shared.allocate(4 * self.num_used)

    def run(self) -> None:
        p, thread = self.p, self.thread
        for i, exists in persistent.indices_of_thread(thread, self.num_used):
            with ptx.when(exists):
                ptx.store_shared(self.used + (i << 2), ptx.constant(0))
        for i, exists in persistent.indices_of_thread(thread, p.experts * p.rows):
            ptx.store_global(ptx.offset(self.a["slots"], i, 4), ptx.constant(-1), exists)
        for i, exists in persistent.indices_of_thread(thread, p.experts + 1):
            ptx.store_global(ptx.offset(self.a["groups"], i, 4), ptx.constant(-1), exists)
        ptx.block_barrier()
        for start in range(0, p.rows, persistent.WARPS):
            row = thread.warp + start
            with ptx.when(row.signed < p.rows):
                self.choose(row)
        ptx.block_barrier()
        with ptx.when(thread.warp.equals(0)):
            self.list_groups()
        for i, exists in persistent.indices_of_thread(thread, p.rows):
            place = i + p.rows * p.choices if p.shared else ptx.constant(-1)
            ptx.store_global(ptx.offset(self.a["slots"], i + p.experts * p.rows, 4), place, exists)

    def choose(self, row: Value) -> None:
        p, a, lane = self.p, self.a, self.thread.lane
        experts, weights = choice_of(self.thread, p.choice, a["logits"], a["bias"], row)
        leads, first = lane.equals(0), ptx.load_global(a["first"])
        for j, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            place, expert = row * p.choices + j, expert - first
            is_own = expert < p.experts  # unsigned: below 0 is far above
            ptx.store_global(ptx.offset(a["experts"], place, 4), ptx.select(is_own, expert, -1), leads)
            expert = ptx.select(is_own, expert, 0)
            ptx.store_global(ptx.offset(a["weights"], place, 4), ptx.bits_of(weight), leads)
            stores = leads & is_own
            ptx.store_global(ptx.offset(a["slots"], expert * p.rows + row, 4), place, stores)
            with ptx.when(stores):
                ptx.store_shared(self.used + (expert << 2), ptx.constant(1))

    def list_groups(self) -> None:
        """Lists, in the first warp, the groups that have rows: ascending, after that of the shared experts."""
        p, a, lane = self.p, self.a, self.thread.lane
        leads = lane.equals(0)
        count = ptx.constant(1 if p.shared else 0)
        if p.shared:
            ptx.store_global(a["groups"], ptx.constant(p.experts), leads)
        for start in range(0, self.num_used, LANES):
            number = lane + start
            used = ptx.load_shared(self.used + (number << 2))
            at = count + ptx.sum_of_lanes_below(used)
            ptx.store_global(ptx.offset(a["groups"], at, 4), number, used.differs(0))
            count = count + ptx.sum_of_warp(used)
        ptx.store_global(a["num_groups"], count, leads)
        ptx.store_global(a["barrier_count"], ptx.constant(0), leads)


def outputs(p: Options) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of `Routes`, by the names of its fields."""
    shapes = {
        "experts": (p.rows, p.choices),
        "weights": (p.rows, p.choices),
        "groups": (p.experts + 1,),
        "num_groups": (1,),
        "barrier_count": (1,),
        "slots": (p.experts + 1, p.rows),
    }
    kinds = {"weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.int32)) for name, shape in shapes.items()}


def route(logits: jax.Array, bias: jax.Array, first: jax.Array, *, num_own: int, shared: bool, **of_choice: Any) -> Routes:
    p = Options(logits.shape[0], Choice(logits.shape[1], **of_choice), num_own, shared)
    outs, counted = outputs(p), SharedMemory()
    Program(p, {}, None, counted)
    names = ["logits", "bias", "first", *outs]

    def routes_of_few_rows(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs))
        def program(ctx: Any, *arrays: Any) -> None:
            *others, memory = arrays
            a = {n: ptx.global_address(v) for n, v in zip(names, others, strict=True)}
            Program(p, a, Thread.current(ptx.constant(0)), SharedMemory(ptx.shared_address(memory))).run()

        program(*refs)

    kernel = plgpu.kernel(
        routes_of_few_rows,
        out_type=tuple(outs.values()),
        scratch_types=(plgpu.SMEM((counted.used // 4,), jnp.int32),),
        grid=(1,),
        grid_names=("block",),
        num_threads=persistent.THREADS // hopper.WARPGROUP,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    return Routes(**dict(zip(outs, kernel(logits, bias, first), strict=True)))


def why_not(
    logits: jax.Array, bias: jax.Array, first: jax.Array, *, num_own: int, shared: bool, **of_choice: Any
) -> str | None:
    if reason := hopper.why_not():
        return reason
    rows, experts = logits.shape
    if rows > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} rows, not {rows}"
    return Choice(experts, **of_choice).why_not()
