"""A decode kernel as stages that all thread blocks go through together, with a barrier of the whole grid between any two.

A stage computes one vector from the one before: every thread block makes the stage's input whole for itself in shared memory
and multiplies its share of a matrix's rows by it. The first loads of the matrix do not depend on what the barrier waits for:
`begin` issues them before it, and they stream while the thread blocks wait and compute the input. Memory so is read at all
times, and nothing but the barriers stands between the stages.

Stages pass vectors to each other through L2, in arrays that only the kernel uses. A thread block's shared memory is divided
among all stages, so that none has to wait until another one has left it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer.mosaic_gpu_codes import Codes, CodesProduct, GroupedVector, TileSplit, to_groups
from pallas_kernels.decode_layer.mosaic_gpu_products import Product
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import Emit, Pair, SharedMemory, Sink, Thread
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

Arrays = TypeVar("Arrays")


class Stage:
    """The work between two grid barriers: `begin` before the first of them, `run` after it.

    It is made with the shared memory that it needs, and in the kernel told of the arrays and the thread. `begin` may load only
    what no thread block writes in this kernel. `prefetches` run after it: they copy to L2 what later stages or kernels read.
    """

    a: Any
    thread: Thread
    prefetches: Sequence[Callable[[], None]] = ()

    def bound(self, a: Any, thread: Thread | None) -> Self:
        """The stage of one thread, which finds arrays at the addresses `a`. Without these it only counts its shared memory."""
        if a is not None:
            assert thread is not None
            self.a, self.thread = a, thread
            self.prepare()
        return self

    def prepare(self) -> None:
        """Makes what `begin` and `run` use of the arrays and the thread."""

    def begin(self) -> None: ...

    def run(self) -> None: ...


Stages = Callable[[Mapping[str, Address], Thread | None, SharedMemory], Sequence[Stage]]


def _run_in_sequence(stages: Sequence[Stage], barrier_count: Address) -> None:
    for i, stage in enumerate(stages):
        target = ptx.grid_arrive(barrier_count, persistent.BLOCKS) if i else None
        stage.begin()
        for prefetch in stage.prefetches:
            prefetch()
        if target is not None:
            ptx.grid_wait(barrier_count, target)
        stage.run()


def arrays_of(kind: type[Arrays], addresses: Mapping[str, Address]) -> Arrays | None:
    """The record of these of the addresses that it has fields for; None without any addresses."""
    names = inspect.signature(kind).parameters
    return kind(**{name: addresses[name] for name in names if name in addresses}) if addresses else None


def call_kernel(
    name: str, stages: Stages, operands: Mapping[str, Any], outs: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Calls a kernel whose stages read `operands` and write `outs` and the operands that are references, all by name.

    stages: makes a thread's stages from the arrays' addresses by name; without addresses they count their shared memory.
    """
    counted = SharedMemory()
    stages({}, None, counted)
    names = [*operands, *outs]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *arrays, memory, block = values
            addresses = {n: ptx.global_address(v) for n, v in zip(names, arrays, strict=True)}
            thread = Thread.current(ptx.scalar(block))
            shared = SharedMemory(ptx.shared_address(memory))
            _run_in_sequence(stages(addresses, thread, shared), addresses["barrier_count"])

        program(*refs, jax.lax.axis_index("block"))

    body.__name__ = name
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=(plgpu.SMEM((counted.used // 4,), jnp.int32),),
        grid=(persistent.BLOCKS,),
        grid_names=("block",),
        num_threads=persistent.THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return dict(zip(outs, kernel(*operands.values()), strict=True))


# ---- vectors between stages


def float32_sink(base: Address) -> Emit:
    """Stores sums as float32 numbers at `base`."""
    return lambda row, total, stores: ptx.store_global(ptx.offset(base, row, 4), ptx.bits_of(total), stores)


def rounded_sink(base: Address) -> Emit:
    """Stores sums, rounded to bfloat16, as float32 numbers at `base`."""
    return lambda row, total, stores: ptx.store_global(ptx.offset(base, row, 4), ptx.bits_of(ptx.rounded(total)), stores)


def bfloat16_pair(base: Address, load: Callable[[Address], Word]) -> Pair:
    return lambda i: ptx.from_bfloat16_pair(load(ptx.offset(base, i, 4)))


def half_of(word: Word, i: Word) -> Float:
    """Number i of a vector whose numbers 2 (i / 2) and the next are the bfloat16 halves of `word`."""
    low, high = ptx.from_bfloat16_pair(word)
    return ptx.select((i & 1).equals(0), low, high)


def load_bfloat16(base: Address, i: Word, load: Callable[[Address], Word]) -> Float:
    return half_of(load(ptx.offset(base, i >> 1, 4)), i)


def load_float32(base: Address, i: Word) -> Float:
    """Number i of float32 numbers that another thread block wrote in this kernel."""
    return ptx.float_of(ptx.load_fresh(ptx.offset(base, i, 4)))


def write_bfloat16(thread: Thread, pairs: int, pair: Pair, sink: Sink) -> None:
    """Passes the pairs of a vector to `sink` as bfloat16."""
    for i, exists in persistent.indices_of_thread(thread, pairs):
        sink(i, ptx.to_bfloat16_pair(*pair(i)), exists)


# ---- a matrix, whichever format it is in


class MatrixProduct:
    """Rows of a matrix [N, width], bfloat16 or codes, times a vector in shared memory; a thread block takes at most `most`.

    It is made with the shared memory that it needs, and `take_rows` says which rows it multiplies.
    """

    def __init__(self, shared: SharedMemory, width: int, most: int, *, codes: bool):
        self.split, self.codes = TileSplit(width, most), codes
        self.vector: Any = GroupedVector.allocate(shared, width) if codes else shared.allocate(2 * width)
        self.sums: Any = shared.allocate(self.split.sums_bytes) if codes else None

    def take_rows(self, thread: Thread, matrix: Address, scales: Address | None, first: Word, end: Word) -> None:
        """Takes rows first .. end - 1 of the matrix at address `matrix`, codes with the scales at `scales`."""
        width, most = self.split.width, self.split.most
        self.product: Product | CodesProduct
        if self.codes:
            assert scales is not None
            self.product = CodesProduct(thread, Codes(matrix, scales, width), self.split, first, end, self.sums)
        else:
            self.product = Product(thread, matrix, width, first, end, most)

    def sink(self, thread: Thread) -> Sink:
        """What receives the vector as pairs of bfloat16."""
        return to_groups(thread, self.vector) if self.codes else persistent.to_shared(self.vector)

    def begin(self) -> None:
        self.product.begin()

    def prefetch(self, thread: Thread) -> None:
        self.product.prefetch(thread)

    def finish(self, emit: Emit) -> None:
        if isinstance(self.product, CodesProduct):
            self.product.finish(self.vector, emit)
        else:
            self.product.finish(lambda row: self.vector, emit)

    def add_to(self, load: Callable[[Word], Float], target: Address) -> None:
        """Stores load(row) + sum, in bfloat16, as number `row` at `target`; codes load before they sum."""

        def store(row: Word, x: Float, total: Float, stores: Predicate) -> None:
            ptx.store_global_bfloat16(ptx.offset(target, row, 2), x + ptx.rounded(total), stores)

        if isinstance(self.product, CodesProduct):
            rows = self.product.rows_of_thread()
            loaded = [load(row) for row, _ in rows]
            for (row, exists), x, total in zip(rows, loaded, self.product.totals(self.vector), strict=True):
                store(row, x, total, exists)
        else:
            self.product.finish(lambda row: self.vector, lambda row, total, stores: store(row, load(row), total, stores))
