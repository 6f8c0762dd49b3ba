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
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.softmax import LAZY, LOG2E, MASKED, START

ROW_BYTES = 2 * WIDTH
TILE = 64  # query rows of a tile, keys of a block
PAIR = 2 * TILE  # keys per step: one block for each computing warpgroup
OWNER_SHIFT = 24  # a packed entry is key | owners << OWNER_SHIFT
MAX_PACKED = 8 - 1  # owners fit the bits above the key, without the sign
MAX_SPLITS = 8  # blocks of a cluster
# What `attend` can leave out, for measuring what it costs; "all but gather" leaves the slots' filling and emptying.
STAGES = ("gather", "softmax", "values", "all but gather")

REGISTERS = hopper.RegisterSplit(workers=2, worker=216, helper=72)  # spills none

# The kernel's own barriers, 8 bytes each: full[slot][half], empty[slot][half], mask_ready[slot], queries, p_ready[slot].
FULL, EMPTY, MASK_READY, QUERIES, P_READY, BARRIER_WORDS = 0, 32, 64, 80, 88, 32
LIST_SCAN_BARRIER = 12  # first of three named barriers, one per warpgroup, used by _pairs_to_visit

_SCALAR = plgpu.Layout.WG_SPLAT(())
_REF = plgpu.RefType()
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_TILED_REF = plgpu.RefType(_TRANSFORMS)
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """How B x S queries of H heads become tiles, and tiles tasks.

    packed queries share a tile and one list of entries key | owners << 24 (bit p: query p of the tile selected the key);
    with packed 1 a list holds one query's keys, -1 where empty. A list's `pairs` blocks of 128 entries are divided evenly
    among `splits` tasks, which the blocks of a cluster do at the same time and combine.
    """

    batch: int
    queries: int
    heads: int
    keys: int
    pairs: int
    packed: int = 1
    splits: int = 1

    def __post_init__(self) -> None:
        if self.heads > TILE and self.heads % TILE:
            raise ValueError(f"more than {TILE} heads must be a multiple of {TILE}, not {self.heads}")
        if not 1 <= self.packed <= MAX_PACKED or (self.packed > 1 and self.packed * self.heads > TILE):
            raise ValueError(f"{self.packed} queries of {self.heads} heads do not fit a tile of {TILE} rows")
        if self.packed > 1 and self.splits > 1:
            raise ValueError(f"lists of {self.packed} queries are not split, here into {self.splits}")
        if self.packed > 1 and self.keys > 1 << OWNER_SHIFT:
            raise ValueError(f"{self.keys} keys do not fit the {OWNER_SHIFT} bits of a packed entry")
        if not 1 <= self.splits <= MAX_SPLITS or self.pairs < 1 or self.pairs % self.splits:
            raise ValueError(
                f"{self.pairs} pairs of key blocks do not divide into {self.splits} of at most {MAX_SPLITS} splits"
            )

    @property
    def rows(self) -> int:
        """Query rows, B * S * H."""
        return self.batch * self.queries * self.heads

    @property
    def rows_per_tile(self) -> int:
        return min(TILE, self.packed * self.heads)

    @property
    def tiles_per_list(self) -> int:
        return max(1, self.heads // TILE)

    @property
    def tiles_per_batch(self) -> int:
        return -(-self.queries * self.heads // self.rows_per_tile)

    @property
    def lists(self) -> int:
        return self.batch * self.tiles_per_batch // self.tiles_per_list

    @property
    def count(self) -> int:
        return self.batch * self.tiles_per_batch * self.splits

    @property
    def blocks(self) -> int:
        """Of the grid: persistent ones, or one for each task of a cluster."""
        return self.count if self.splits > 1 else min(hopper.NUM_SMS, self.count)


def _per_row(values: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(values, like.shape, [0])


def _per_column(values: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(values, like.shape, [1])


def _row_vector(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((TILE,), value, jnp.float32), _BY_ROW)


def _opaque(x: jax.Array) -> jax.Array:
    """x, hidden from loop-invariant code motion: else 72 wgmma descriptors leave the loop and are spilled."""

    @plgpu.inline_mgpu(arg_types=(_SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR))
    def move(ctx, x):
        return mgpu.FragmentedArray.splat(ptx.opaque(ptx.scalar(x)), (), is_signed=True)

    return move(x)


def _rescale(x: jax.Array, factors: jax.Array) -> jax.Array:
    """x [64, n] * factors [64], skipped by a warp whose factors are all 1."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, _BY_ROW),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
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
        branch = scf.IfOp(ptx.compare("ne", voted, 0), [r.type for r in registers], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.YieldOp(list((x * factors.broadcast_in_dim(x.shape, (0,), x.layout)).registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.YieldOp(registers)
        results = np.array(list(branch.results), dtype=object).reshape(x.registers.shape)
        return mgpu.FragmentedArray(_registers=results, _layout=x.layout, _is_signed=None)

    return rescale(x, factors)


def _init_barriers(barriers) -> None:
    @plgpu.inline_mgpu(arg_types=(_REF,))
    def init(ctx, barriers):
        base = ptx.shared_address(barriers)
        with ptx.when(ptx.compare("eq", ptx.thread(), 0)):
            for i in range(4):
                ptx.barrier_init(ptx.add(base, FULL + 8 * i), 128)  # every gathering thread
                ptx.barrier_init(ptx.add(base, EMPTY + 8 * i), 128)  # every thread of the half's warpgroup
            for slot in range(2):
                ptx.barrier_init(ptx.add(base, MASK_READY + 8 * slot), 16)  # the gathering threads that hold entries
                ptx.barrier_init(ptx.add(base, P_READY + 8 * slot), 128)  # every thread of the slot's warpgroup
            ptx.barrier_init(ptx.add(base, QUERIES), 256)  # every computing thread
            ptx.barrier_init_done()
        ptx.block_barrier()

    init(barriers)


def _wait(barriers, kind: int, slot, half, parity, *, fence: bool) -> None:
    """A computing warpgroup waits for full[slot][half], marked[slot] or weighed[slot].

    What cp.async wrote reaches wgmma, which reads through another proxy, after a fence.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _SCALAR, _SCALAR))
    def wait(ctx, barriers, slot, half, parity):
        base = ptx.add(ptx.shared_address(barriers), kind)
        if kind == FULL:
            base = ptx.add(base, ptx.shift_left(ptx.scalar(slot), 4), ptx.shift_left(ptx.scalar(half), 3))
        else:
            base = ptx.add(base, ptx.shift_left(ptx.scalar(slot), 3))
        ptx.barrier_wait(base, ptx.scalar(parity))
        if fence:
            ptx.proxy_fence()

    wait(barriers, slot, half, parity)


def _pairs_to_visit(lists, which, pairs: int):
    """Pairs of key blocks of a list up to the last one with an entry that is set, at least 1: a warpgroup looks together."""
    thread = ptx.thread()
    at = ptx.offset(ptx.global_address(lists), ptx.add(ptx.mul(which, pairs), pairs - 1), 4 * PAIR)
    at = ptx.offset(at, ptx.bit_and(thread, 127), 4)
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


def _pairs_of_list(lists, which, pairs: int) -> jax.Array:
    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR))
    def find(ctx, lists, which):
        return mgpu.FragmentedArray.splat(_pairs_to_visit(lists, ptx.scalar(which), pairs), (), is_signed=True)

    return find(lists, which)


def _publish(barriers, slot) -> None:
    """The weights of the block in a slot are in shared memory, where wgmma sees them."""

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR))
    def publish(ctx, barriers, slot):
        address = ptx.add(ptx.shared_address(barriers), P_READY, ptx.shift_left(ptx.scalar(slot), 3))
        ptx.proxy_fence()
        ptx.barrier_arrive(address)

    publish(barriers, slot)


def _free(barriers, slot, half) -> None:
    """Half of a slot may be overwritten, with what belongs to it: an arrival of every thread, after its wgmma has ended.

    racecheck does not see that one arrival a warp, after a warp barrier, stands for the other lanes.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR, _SCALAR))
    def free(ctx, barriers, slot, half):
        base = ptx.add(ptx.shared_address(barriers), EMPTY)
        address = ptx.add(base, ptx.shift_left(ptx.scalar(slot), 4), ptx.shift_left(ptx.scalar(half), 3))
        ptx.barrier_arrive(address)

    free(barriers, slot, half)


def _line(thread):
    """(16-byte chunk of a 128-byte line, row, row & 7) of a thread of a warpgroup whose 8 lanes take a row, 16 rows at once."""
    chunk, row = ptx.bit_and(thread, 7), ptx.shift_right(thread, 3)
    return chunk, row, ptx.bit_and(row, 7)


def _in_line(row_in_tile, chunk):
    """Where a chunk of a row is in its tile of 8 rows of 128 bytes, which wgmma reads swizzled."""
    return ptx.add(ptx.shift_left(row_in_tile, 7), ptx.shift_left(ptx.bit_xor(chunk, row_in_tile), 4))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How the gathering warpgroup moves latents: cp.async, so that nothing waits for them in registers."""

    source: ptx.Value  # of the batch row, at this thread's chunk
    to_columns: ptx.Value
    to_rotary: ptx.Value

    @staticmethod
    def place(latents, columns, rotary, batch, keys: int) -> _Rows:
        chunk, row, in_tile = _line(ptx.bit_and(ptx.thread(), 127))
        tile, swizzled = ptx.shift_right(row, 3), _in_line(in_tile, chunk)
        return _Rows(
            ptx.offset(ptx.offset(ptx.global_address(latents), chunk, 16), batch, keys * ROW_BYTES),
            ptx.add(ptx.shared_address(columns), ptx.shift_left(tile, 12), swizzled),  # 8 rows of a half: 4 KB
            ptx.add(ptx.shared_address(rotary), ptx.shift_left(tile, 10), swizzled),
        )

    def copy(self, rows, slot: int, half: int, with_rotary: bool) -> None:
        for i, (key, used) in enumerate(rows):
            source, size = ptx.offset(self.source, key, ROW_BYTES), ptx.shift_left(used, 4)
            target = ptx.add(self.to_columns, (slot * 2 + half) * 32768 + i * 8192)
            ptx.copy_async(target, ptx.offset(source, ptx.constant(half), 512), size, 4, 1024, 128)
            if with_rotary:
                target = ptx.add(self.to_rotary, slot * 8192 + i * 2048)
                ptx.copy_async(target, ptx.offset(source, ptx.constant(1), 2 * VALUE_DIM), size, 1, 0, 0)


def _gather(tasks: Tasks, latents, lists, counts, columns, rotary, marks, barriers, block, num_tasks, leave_out: str) -> None:
    """The gathering warpgroup: every listed latent of every task into its slot, and what the entries say into `marks`."""
    share = tasks.pairs // tasks.splits
    optional = () if counts is None else (counts,)
    types = (_REF, _REF, _TILED_REF, _TILED_REF, _REF, _REF, *(_REF for _ in optional))

    @plgpu.inline_mgpu(arg_types=(_SCALAR, _SCALAR, *types))
    def gather(ctx, block, num_tasks, latents, lists, columns, rotary, marks, barriers, *optional):
        base = ptx.shared_address(barriers)
        chunk, row, _ = _line(ptx.bit_and(ptx.thread(), 127))
        to_marks = ptx.add(ptx.shared_address(marks), ptx.shift_left(row, 2))
        holds_entries = ptx.compare("eq", chunk, 0)
        from_lists = ptx.offset(ptx.global_address(lists), row, 4)

        def read(entry):
            """((latent row, 1 if it counts else 0), mark) of an entry."""
            if tasks.packed > 1:
                used = ptx.compare("ne", ptx.shift_right(entry, OWNER_SHIFT), 0)
                key, mark = ptx.bit_and(entry, (1 << OWNER_SHIFT) - 1), entry
            else:
                used = ptx.compare("sge", entry, 0)
                key = ptx.minimum(ptx.maximum(entry, 0), tasks.keys - 1)
                mark = ptx.select(used, 0, int(np.float32(MASKED).view(np.int32)))
            return (key, ptx.select(used, 1, 0)), mark

        def one_task(i, carry):
            task = ptx.add(ptx.scalar(block), ptx.mul(i, tasks.blocks))
            tile, split = ptx.div(task, tasks.splits), ptx.rem(task, tasks.splits)
            which = ptx.div(tile, tasks.tiles_per_list)
            batch = ptx.div(tile, tasks.tiles_per_batch)
            rows = _Rows.place(latents, columns, rotary, batch, tasks.keys)
            entries_at = ptx.offset(ptx.offset(from_lists, which, 4 * PAIR * tasks.pairs), split, 4 * PAIR * share)

            def entries(pair):
                at = ptx.offset(entries_at, pair, 4 * PAIR)
                return [ptx.load_global(ptx.offset(at, ptx.constant(i), 64)) for i in range(8)]

            def step(pair, carry):
                done, *current = carry
                following = entries(ptx.minimum(ptx.add(pair, 1), ptx.sub(pairs, 1)))
                parity = ptx.bit_xor(ptx.bit_and(done, 1), 1)
                where, labels = zip(*map(read, current), strict=True)
                # The order in which the computing warpgroups need the halves. With the first half of a slot to become
                # free, its warpgroup has also read the marks and the rotary part.
                for slot, half in ((0, 0), (0, 1), (1, 1), (1, 0)):
                    ptx.barrier_wait(ptx.add(base, EMPTY + 16 * slot + 8 * half), parity)
                    if slot == half:
                        with ptx.when(holds_entries):
                            for i in range(4):
                                ptx.store_shared(ptx.add(to_marks, 256 * slot + 64 * i), labels[4 * slot + i])
                        ptx.barrier_arrive(ptx.add(base, MASK_READY + 8 * slot), holds_entries)
                    full = ptx.add(base, FULL + 16 * slot + 8 * half)
                    if leave_out != "gather":
                        rows.copy(where[4 * slot : 4 * slot + 4], slot, half, slot != half)
                    ptx.barrier_arrive_after_copies(full)
                return [ptx.add(done, 1), *following]

            first = entries(ptx.constant(0))  # comes while the list's end is looked at
            if optional:
                pairs = ptx.load_global(ptx.offset(ptx.global_address(optional[0]), which, 4))
            else:
                pairs = ptx.constant(share) if tasks.splits > 1 else _pairs_to_visit(lists, which, share)
            return ptx.loop(pairs, [carry[0], *first], step)[:1]

        ptx.loop(ptx.scalar(num_tasks), [ptx.constant(0)], one_task)
        ptx.copies_done()
        if tasks.splits > 1:  # takes part in the two barriers of _combine
            ptx.cluster_barrier()
            ptx.cluster_barrier()

    gather(block, num_tasks, latents, lists, columns, rotary, marks, barriers, *optional)


def _warpgroup_sync() -> None:
    """A barrier of the threads of a warpgroup."""

    @plgpu.inline_mgpu()
    def sync(ctx):
        utils.warpgroup_barrier()

    sync()


def _load_queries(queries, columns, rotary, row, rows, half, *, through_registers: bool) -> None:
    """A half of the query tile, 256 columns and 32 rows of the rotary ones: `rows` query rows from `row` on, then zeros.

    Each computing warpgroup loads a half of the first tile, and warpgroup 0 both of the following ones. By cp.async, or
    through registers for a cluster, whose results other blocks read in this place. A TMA copy into tiles of 8 rows would have
    to start at a multiple of 8.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _TILED_REF, _TILED_REF, _SCALAR, _SCALAR, _SCALAR))
    def load(ctx, queries, columns, rotary, row, rows, half):
        # Else all these addresses are kept in registers through the loop over a list, at whose end the next tile is loaded.
        thread, half = ptx.bit_and(ptx.opaque(ptx.thread()), 127), ptx.scalar(half)
        chunk, line, in_tile = _line(thread)
        tile, swizzled = ptx.shift_right(line, 3), _in_line(in_tile, chunk)
        source = ptx.offset(ptx.offset(ptx.global_address(queries), ptx.scalar(row), ROW_BYTES), chunk, 16)

        def place(here):
            """(address, 1 if it counts else 0) of a row; one that does not is not read, but its address is of the array."""
            counts = ptx.select(ptx.compare("slt", here, ptx.scalar(rows)), 1, 0)
            return ptx.offset(source, ptx.select(ptx.compare("ne", counts, 0), here, 0), ROW_BYTES), counts

        runs = []  # (target, source, 1 if it counts else 0, pieces of 16 bytes), the pieces 1024 and 128 bytes apart
        to_columns = ptx.add(ptx.shared_address(columns), ptx.shift_left(half, 15), ptx.shift_left(tile, 12), swizzled)
        for i in range(4):
            at, counts = place(ptx.add(line, 16 * i))
            runs.append((ptx.add(to_columns, 8192 * i), ptx.offset(at, half, 512), counts, 4))
        to_rotary = ptx.add(ptx.shared_address(rotary), ptx.shift_left(half, 12), ptx.shift_left(tile, 10), swizzled)
        for i in range(2):
            at, counts = place(ptx.add(line, ptx.shift_left(half, 5), 16 * i))
            runs.append((ptx.add(to_rotary, 2048 * i), ptx.offset(at, ptx.constant(1), 2 * VALUE_DIM), counts, 1))

        if through_registers:
            loaded = []  # all of it is under way before the first is stored
            for target, at, counts, pieces in runs:
                for i in range(pieces):
                    words = ptx.load_words_or_zeros(ptx.offset(at, ptx.constant(i), 128), counts, 4)
                    loaded.append((ptx.add(target, 1024 * i), words))
            for target, words in loaded:
                ptx.store_shared_words(target, words)
        else:
            for target, at, counts, pieces in runs:
                ptx.copy_async(target, at, ptx.shift_left(counts, 4), pieces, 1024, 128)

    load(queries, columns, rotary, row, rows, half)


def _await_queries(barriers, parity) -> None:
    """Until both computing warpgroups have what they loaded of the query tile, and wgmma may read it."""

    @plgpu.inline_mgpu(arg_types=(_REF, _SCALAR))
    def wait(ctx, barriers, parity):
        address = ptx.add(ptx.shared_address(barriers), QUERIES)
        ptx.copies_done()
        ptx.proxy_fence()
        ptx.barrier_arrive(address)
        ptx.barrier_wait(address, ptx.scalar(parity))

    wait(barriers, parity)


def _store_rows(values, out, row, rows, column) -> None:
    """Rows below `rows` of values [64, 256] into out [.., 512] from `row` and `column` * 256 on, in bfloat16, by a warpgroup.

    Four lanes share a row, each with two of every 8 columns. Of every 32 columns they exchange theirs, so that each has 8 that
    lie side by side and a row gets 64 bytes at once.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, _REF, _SCALAR, _SCALAR, _SCALAR))
    def store(ctx, values, out, row, rows, column):
        by_column_tile = values.registers.reshape(VALUE_DIM // 16, 2)
        thread = ptx.bit_and(ptx.thread(), 127)
        lane, warp = ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)
        to = ptx.offset(ptx.global_address(out), ptx.scalar(row), 2 * VALUE_DIM)
        to = ptx.offset(ptx.offset(to, ptx.scalar(column), 512), ptx.bit_and(lane, 3), 16)
        for half in range(2):
            here = ptx.add(ptx.shift_left(warp, 4), ptx.shift_right(lane, 2), 8 * half)
            inside, line = ptx.compare("slt", here, ptx.scalar(rows)), ptx.offset(to, here, 2 * VALUE_DIM)
            for first in range(0, VALUE_DIM // 16, 4):
                words = []
                for pair in by_column_tile[first : first + 4, half]:
                    words.append(ptx.to_bfloat16_pair(*(vector.extract(pair, [], [e]) for e in range(2))))
                at = ptx.offset(line, ptx.constant(first), 16)
                ptx.store_global_words(at, ptx.transposed_among_lanes(words, lane), inside, passing=True)

    store(values, out, row, rows, column)


def _combine(staged, sums, out, tasks: Tasks, row, rows, split, warpgroup) -> None:
    """The blocks of a cluster combine their parts: each writes an even share of the rows, from all blocks' shared memory.

    staged [2, 64, 256] is a block's normalised result, sums [64] the base-2 logarithm of its sum of weights.
    """
    share = -(-TILE // tasks.splits)  # rows a block

    @plgpu.inline_mgpu(arg_types=(_TILED_REF, _REF, _REF, _SCALAR, _SCALAR, _SCALAR, _SCALAR))
    def combine(ctx, staged, sums, out, row, rows, split, warpgroup):
        ptx.cluster_barrier()
        thread = ptx.add(ptx.bit_and(ptx.thread(), 127), ptx.shift_left(ptx.scalar(warpgroup), 7))
        parts_at, sums_at = ptx.shared_address(staged), ptx.shared_address(sums)
        to = ptx.offset(ptx.global_address(out), ptx.scalar(row), 2 * VALUE_DIM)
        for i in range(-(-share // 4)):  # 256 threads take 4 rows of 64 chunks of 16 bytes at a time
            within = ptx.add(ptx.shift_right(thread, 6), 4 * i)
            chunk = ptx.bit_and(thread, 63)
            here = ptx.minimum(ptx.add(ptx.mul(ptx.scalar(split), share), within), TILE - 1)
            line, column_tile = ptx.bit_and(here, 7), ptx.shift_right(chunk, 3)
            part_at = ptx.add(
                parts_at,
                ptx.shift_left(ptx.shift_right(column_tile, 2), 15),
                ptx.shift_left(ptx.shift_right(here, 3), 12),
                ptx.shift_left(ptx.bit_and(column_tile, 3), 10),
                ptx.shift_left(line, 7),
                ptx.shift_left(ptx.bit_xor(ptx.bit_and(chunk, 7), line), 4),
            )
            sum_at = ptx.add(sums_at, ptx.shift_left(here, 2))
            logs = [ptx.load_peer_float(ptx.peer_address(sum_at, peer)) for peer in range(tasks.splits)]
            parts = [ptx.load_peer_words(ptx.peer_address(part_at, peer)) for peer in range(tasks.splits)]
            top = functools.reduce(arith.maximumf, logs)
            weights = [ptx.exp2(arith.subf(log, top)) for log in logs]
            total = functools.reduce(arith.addf, weights)
            words = []
            for word in range(4):
                low, high = zip(*(ptx.from_bfloat16_pair(part[word]) for part in parts), strict=True)
                halves = [
                    arith.divf(functools.reduce(arith.addf, map(arith.mulf, values, weights)), total) for values in (low, high)
                ]
                words.append(ptx.to_bfloat16_pair(*halves))
            counts = ptx.bit_and(
                ptx.select(ptx.compare("slt", within, share), 1, 0),
                ptx.select(ptx.compare("slt", ptx.add(ptx.mul(ptx.scalar(split), share), within), ptx.scalar(rows)), 1, 0),
            )
            target = ptx.offset(ptx.offset(to, here, 2 * VALUE_DIM), chunk, 16)
            ptx.store_global_words(target, words, ptx.compare("ne", counts, 0))
        ptx.cluster_barrier()  # no block leaves while others read its memory

    combine(staged, sums, out, row, rows, split, warpgroup)


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
    packed, splits, blocks = tasks.packed, tasks.splits, tasks.blocks
    share = tasks.pairs // splits
    f32, bf16 = jnp.float32, jnp.bfloat16

    def sparse_mla_attention(*given):
        refs = list(given)
        count_ref = refs.pop(3) if counts is not None else None
        q_gmem, kv_gmem, list_gmem, out, q_columns, q_rotary, columns, rotary, stats, marks, barriers = refs[:11]
        (sums_ready,) = refs[11:]
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        if splits > 1:
            block = block * splits + jax.lax.axis_index("split")
        num_tasks = (tasks.count - block + blocks - 1) // blocks
        _init_barriers(barriers)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(REGISTERS.helper, action="decrease")
            slots = (columns, rotary, marks, barriers)
            _gather(tasks, kv_gmem, list_gmem, count_ref, *slots, block, jnp.int32(num_tasks), leave_out)

        def place(task):
            """(first row, rows that count, list) of a task."""
            tile = task // splits
            batch, local = tile // tasks.tiles_per_batch, tile % tasks.tiles_per_batch
            batch_rows = tasks.queries * tasks.heads
            row = batch * batch_rows + local * tasks.rows_per_tile
            rows = jnp.minimum(tasks.rows_per_tile, batch_rows - local * tasks.rows_per_tile)
            return row, rows, tile // tasks.tiles_per_list

        def load_queries(task, half):
            row, rows, _ = place(task)
            _load_queries(q_gmem, q_columns, q_rotary, row, rows, half, through_registers=splits > 1)

        def issue_logits(s_ref, slot, zero, parity):
            """Starts queries times keys of the block in `slot`."""
            _wait(barriers, FULL, slot, zero, parity, fence=True)
            plgpu.wgmma(s_ref, q_columns.at[zero], columns.at[slot, zero].transpose((1, 0)))
            _wait(barriers, FULL, slot, zero + 1, parity, fence=True)
            plgpu.wgmma(s_ref, q_columns.at[zero + 1], columns.at[slot, zero + 1].transpose((1, 0)))
            plgpu.wgmma(s_ref, q_rotary.at[zero], rotary.at[slot].transpose((1, 0)))

        def masked_logits(s_ref, slot, zero, parity):
            """Base-2 logits [64, 64] of the block in `slot`, and the largest of each row."""
            _wait(barriers, MASK_READY, slot, zero, parity, fence=False)
            mark = plgpu.load(marks.at[slot], layout=_BY_COLUMN)
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=0) * (scale * LOG2E)
            if packed == 1:
                s = s + _per_column(mark, s)
            else:
                query = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=plgpu.Layout.WGMMA) // tasks.heads
                owner = jnp.minimum(query, packed - 1)
                s = jnp.where((_per_column(mark, s) >> (owner + OWNER_SHIFT)) & 1 == 1, s, MASKED)
            return s, _row_vector(0.0) if leave_out == "softmax" else s.max(axis=1)

        def publish_weights(s, block_top, top, total, slot):
            """The weights of a block, for the other warpgroup too, and how they change the running maximum and sum."""
            if leave_out == "softmax":
                new_top, p, factors = top, s, _row_vector(1.0)
            else:
                new_top = jnp.where(block_top > top + LAZY, block_top, top)
                p = jnp.exp2(s - _per_row(new_top, s))
                factors = jnp.exp2(top - new_top)
                stats[0, slot] = new_top
                total = total * factors + p.sum(axis=1)
            p16 = p.astype(bf16)
            _warpgroup_sync()  # all warps' logits are there: none reads rotary columns any more
            rotary[slot] = p16
            _publish(barriers, slot)
            return p16, factors, new_top, total

        def own_values(o, p16, factors, o_ref, slot):
            """This warpgroup's value columns of the block in its own slot."""
            if leave_out != "values":
                o_ref[...] = _rescale(o, factors)
                plgpu.wgmma(o_ref, p16, columns.at[slot, slot])
                o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
            _free(barriers, slot, slot)
            return o

        def issue_other_values(o, top, total, o_ref, own, other, zero, parity):
            """Starts this warpgroup's value columns of the block in the other one's slot, once it has its weights."""
            _wait(barriers, P_READY, other, zero, parity, fence=False)
            new_top, factors = top, _row_vector(1.0)
            if leave_out != "softmax":
                new_top = plgpu.load(stats.at[0, other], layout=_BY_ROW)
                factors = jnp.exp2(top - new_top)
            if leave_out != "values":
                o_ref[...] = _rescale(o, factors)
                plgpu.wgmma(o_ref, rotary.at[other], columns.at[other, own])
            return new_top, total * factors

        def other_values(o, o_ref, own, other):
            if leave_out != "values":
                o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
            _free(barriers, other, own)
            return o

        def first_of_pair(parity, then, carry):
            """What warpgroup 0 does for a pair of blocks: its own, then its values of the other's, and then()."""

            def scope(s_ref, o_ref):
                zero, (o, top, total) = _opaque(jnp.int32(0)), carry
                own, other = zero, zero + 1
                issue_logits(s_ref, own, zero, parity)
                s, block_top = masked_logits(s_ref, own, zero, parity)
                p16, factors, top, total = publish_weights(s, block_top, top, total, own)
                o = own_values(o, p16, factors, o_ref, own)
                top, total = issue_other_values(o, top, total, o_ref, own, other, zero, parity)
                then()
                return other_values(o, o_ref, own, other), top, total

            return pl.run_scoped(scope, s_type, o_type)

        def second_of_pair(parity, carry):
            """What warpgroup 1 does: its logits while the other one makes its weights, whose maximum it has to know."""

            def scope(s_ref, o_ref):
                zero, (o, top, total) = _opaque(jnp.int32(0)), carry
                own, other = zero + 1, zero
                issue_logits(s_ref, own, zero, parity)
                s, block_top = masked_logits(s_ref, own, zero, parity)
                top, total = issue_other_values(o, top, total, o_ref, own, other, zero, parity)
                p16, factors, top, total = publish_weights(s, block_top, top, total, own)
                o = other_values(o, o_ref, own, other)
                return own_values(o, p16, factors, o_ref, own), top, total

            return pl.run_scoped(scope, s_type, o_type)

        def only_free(parity, carry):
            for slot in range(2):
                _wait(barriers, FULL, jnp.int32(slot), warpgroup, parity, fence=False)
                _free(barriers, jnp.int32(slot), warpgroup)
            return carry

        s_type, o_type = plgpu.ACC((TILE, TILE), f32), plgpu.ACC((TILE, VALUE_DIM // 2), f32)

        def all_pairs(pairs, visited, then):
            """The carry after all pairs of a list; `visited` pairs went before, which says the barriers' parity.

            Warpgroup 0 calls then() once nobody reads the queries any more.
            """
            nothing = plgpu.layout_cast(jnp.zeros((TILE, VALUE_DIM // 2), f32), plgpu.Layout.WGMMA)
            carry = (nothing, _row_vector(START), _row_vector(0.0))

            def firsts(carry):
                def step(i, carry):
                    return first_of_pair((visited + i) & 1, lambda: pl.when(i == pairs - 1)(then), carry)

                return jax.lax.fori_loop(0, pairs, step, carry)

            def seconds(carry):
                return jax.lax.fori_loop(0, pairs, lambda i, carry: second_of_pair((visited + i) & 1, carry), carry)

            if leave_out == "all but gather":
                return jax.lax.fori_loop(0, pairs, lambda i, carry: only_free((visited + i) & 1, carry), carry)
            return jax.lax.cond(warpgroup == 0, firsts, seconds, carry)

        def one_task(i, visited):
            task = block + i * blocks
            row, rows, which = place(task)
            if count_ref is not None:
                pairs = count_ref[which]
            else:
                pairs = share if splits > 1 else _pairs_of_list(list_gmem, which, share)
            _await_queries(barriers, i & 1)

            def load_next_queries():
                @pl.when(i + 1 < num_tasks)
                def _():
                    for half in range(2):
                        load_queries(task + blocks, jnp.int32(half))

            o, top, total = all_pairs(pairs, visited, load_next_queries)

            stats[1, warpgroup] = total
            plgpu.barrier_arrive(sums_ready.at[warpgroup])
            plgpu.barrier_wait(sums_ready.at[1 - warpgroup])
            total = total + plgpu.load(stats.at[1, 1 - warpgroup], layout=_BY_ROW)
            o = o * _per_row(jnp.where(total > 0, 1.0 / total, 0.0), o)
            if splits == 1:
                _store_rows(o, out, row, rows, warpgroup)
            else:  # other blocks read the result in the place of the queries, which both are done with now
                q_columns[warpgroup] = o.astype(bf16)
                stats[2, warpgroup] = jnp.where(total > 0, top + jnp.log2(total), START)
                plgpu.commit_smem()
                _combine(q_columns, stats.at[2, warpgroup], out, tasks, row, rows, task % splits, warpgroup)
            return visited + pairs

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(REGISTERS.worker, action="increase")
            load_queries(block, warpgroup)
            jax.lax.fori_loop(0, num_tasks, one_task, jnp.int32(0))

    kernel = plgpu.kernel(
        sparse_mla_attention,
        out_type=jax.ShapeDtypeStruct((tasks.rows, VALUE_DIM), bf16),
        scratch_types=(
            plgpu.SMEM((2, TILE, 256), bf16, transforms=_TRANSFORMS),
            plgpu.SMEM((1, TILE, ROTARY), bf16, transforms=_TRANSFORMS),
            plgpu.SMEM((2, 2, TILE, 256), bf16, transforms=_TRANSFORMS),
            plgpu.SMEM((2, TILE, ROTARY), bf16, transforms=_TRANSFORMS),
            plgpu.SMEM((3, 2, TILE), f32),
            plgpu.SMEM((2, TILE), f32 if packed == 1 else jnp.int32),
            plgpu.SMEM((BARRIER_WORDS,), jnp.uint32),
            plgpu.Barrier(num_barriers=2),
        ),
        grid=(blocks // splits,),
        grid_names=("block",),
        cluster=(splits,) if splits > 1 else (),
        cluster_names=("split",) if splits > 1 else (),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=1024),
    )
    return kernel(*(x for x in (queries, latents, lists, counts) if x is not None))
