"""The experts of a decode step's rows on Hopper, in about the time of reading the matrices of those that are chosen.

One kernel of two stages: the experts' first matrices and the activation, and their second matrices. Between them is a
barrier of all thread blocks, of which one is on every SM; meanwhile the first codes of the second matrices are on their way.

A tile is 64 rows of an expert's matrix; the tiles of all chosen experts, and of the shared ones, are one list of which every
thread block has an even and contiguous share. The warpgroups of a block divide the columns of a tile, and their sums are added
through shared memory, always in the same order. Codes become float16 in registers, which is exact, and are wgmma's first
operand, so a product is that of the matrix and the rows' transpose. A product has a column for every row of the step, whether
or not it chose the expert: columns cost little beside the codes, and nothing is sorted or gathered. Rows are float16 in shared
memory with a power-of-two factor for every 128 numbers, applied in float32 with the codes' scales.

Every lane copies its own codes to shared memory several pieces of 128 ahead, beyond the end of a tile too, so that memory
is read at all times.

The first stage has all rows in shared memory from the start. Where their width is too large for that, it has parts of them in
turn: a block goes through its tiles once for every part, and meanwhile keeps their sums in L2, which are a few hundredths of
the codes. In the second one an expert's rows are what the first one made for it; they are written to shared memory before the
block's first tile of the expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device, hopper
from pallas_kernels.hopper import float16_rows, persistent, ptx
from pallas_kernels.hopper.persistent import SharedMemory, Thread
from pallas_kernels.quant import BLOCK, Scaled, float_scales
from pallas_kernels.routed_mlp.api import MAX_ROWS
from pallas_kernels.routing.arrays import Routes

BLOCKS = hopper.NUM_SMS
WARPGROUPS = persistent.THREADS // hopper.WARPGROUP
TILE = 64  # rows of a matrix
PIECES_BYTES = WARPGROUPS * TILE * BLOCK  # of the pieces of 128 codes of a tile's rows that the warpgroups have at a time
IN_FLIGHT = range(2, 7)  # so many of these are copied ahead, at least and at most
MAX_PARTS = 4  # of the rows, that are in shared memory one after the other
ROW_LOADS = 2  # of 2 x 16 bytes, by a lane, of the rows
SHARED_BYTES = 226 * 1024  # Mosaic needs some of a block's 227 KB
SUMS_PITCH = TILE + 4  # numbers from one column's sums to the next one's: no two lanes use the same bank

Value = Any
_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Sizes:
    """rows: of the step. hidden, width: D and I. experts: E, without the shared one, whose number it is. choices: of a row."""

    rows: int
    hidden: int
    width: int
    experts: int
    choices: int

    @property
    def columns(self) -> int:
        """Rows of the step, padded to what wgmma takes."""
        return -(-self.rows // 8) * 8

    @property
    def groups(self) -> int:
        return self.experts + 1

    @property
    def most_groups(self) -> int:
        """How many groups can have rows."""
        return min(self.experts, self.rows * self.choices) + 1

    @property
    def slots(self) -> int:
        """Pairs of a row and an expert, the shared one included."""
        return self.rows * (self.choices + 1)


class Rows:
    """Rows in shared memory as wgmma's second operand: `pieces` of 128 numbers of `columns` rows, and their factors."""

    def __init__(self, shared: SharedMemory, columns: int, pieces: int):
        self.columns, self.pieces = columns, pieces
        self.numbers, self.factors = shared.allocate(2 * BLOCK * columns * pieces), shared.allocate(4 * columns * pieces)

    def operand(self, piece: Value) -> Value:
        return ptx.matrix(self.numbers + piece * (2 * BLOCK * self.columns))

    def write(
        self,
        thread: Thread,
        source: Callable[[Value], tuple[Value, Value]],
        load: Callable[[Value], Sequence[Value]],
        pieces: int | None = None,
    ) -> None:
        """Writes all rows in the order that `ptx.multiply_codes` reads; load(address): 16 bytes of a row.

        source(row): the address of a row, of some row also where it does not exist, and whether it exists. pieces: so many
        of every row, by default all that there is room for.

        A warp takes a piece of four rows at a time; eight lanes have 16 bytes each of either 64 numbers of a row.
        """
        pieces = pieces or self.pieces
        fours = self.columns // 4
        tasks = fours * pieces

        def some(step: Value, _: Sequence[Value]) -> Sequence[Value]:
            starts = [step * (ROW_LOADS * persistent.WARPS) + thread.warp + i * persistent.WARPS for i in range(ROW_LOADS)]
            loaded = []
            for task in starts:
                piece, four = task // fours, task % fours
                row = (four << 2) + (thread.lane >> 3)
                exists = piece.signed < pieces
                address, has_row = source(row)
                address = ptx.offset(ptx.offset(address, ptx.min_s32(piece, pieces - 1), 2 * BLOCK), thread.lane & 7, 16)
                words = [load(ptx.offset(address, ptx.constant(i), BLOCK)) for i in range(2)]
                halves = [[ptx.select(has_row, word, 0) for word in half] for half in words]
                loaded.append((row, piece, exists, halves))
            for row, piece, exists, halves in loaded:
                with ptx.when(exists):
                    float16_rows.write_piece(thread.lane, row, piece, halves, self.columns, self.numbers, self.factors)
            return []

        ptx.loop(ptx.constant(-(-tasks // (ROW_LOADS * persistent.WARPS))), [], some)


class Tiles:
    """This thread block's tiles of matrices [E, `rows`, `width`] in codes and of a shared one: `each` goes through them.

    Tile t of all is tile t % `of_group` of group number `groups[t / of_group]`. matrix_row(tile, warp): the row of the matrix
    with which the 16 of one of a warpgroup's warps begin. in_flight: of IN_FLIGHT. parts_of_rows: in how many parts, one after
    the other, the rows are in shared memory; with several the tiles' sums over the parts so far are kept in the array
    `{name}_sums`.
    """

    def __init__(
        self,
        sizes: Sizes,
        a: Mapping[str, Value],
        thread: Thread,
        shared: SharedMemory,
        in_flight: int,
        name: str,
        rows: int,
        width: int,
        of_group: int,
        matrix_row: Callable[[Value, Value], Value],
        parts_of_rows: int = 1,
    ):
        self.sizes, self.a, self.thread, self.in_flight = sizes, a, thread, in_flight
        self.name, self.rows, self.width, self.of_group, self.matrix_row = name, rows, width, of_group, matrix_row
        self.pieces, self.parts = width // BLOCK, parts_of_rows
        self.pieces_of_part = -(-self.pieces // self.parts)
        self.steps = -(-self.pieces_of_part // WARPGROUPS)  # pieces of a tile that a warpgroup has at a time
        self.codes, self.scales = shared.allocate(in_flight * PIECES_BYTES), shared.allocate(in_flight * 4 * persistent.THREADS)
        self.groups = shared.allocate(4 * sizes.groups)
        self.sums = shared.allocate(4 * SUMS_PITCH * sizes.columns * WARPGROUPS)
        self.kept: Value | None = None  # where the current tile's sums over earlier parts of the rows are
        if a:
            self.warpgroup, self.warp_of_tile = thread.warp >> 2, thread.warp & 3
            self.quad_lane, self.row_of_8 = thread.lane & 3, thread.lane >> 2
            self.own_codes = self.codes + (thread.warp << 11) + (thread.lane << 4)
            self.own_scales = self.scales + (thread.index << 2)

    def begin(self) -> None:
        """Starts the first copies."""
        a, thread = self.a, self.thread
        for i, exists in persistent.indices_of_thread(thread, self.sizes.groups):
            with ptx.when(exists):
                ptx.store_shared(self.groups + (i << 2), ptx.load_global(ptx.offset(a["groups"], i, 4)))
        total = ptx.load_global(a["num_groups"]) * self.of_group
        self.first, end = ((thread.block + i) * total // BLOCKS for i in range(2))
        self.count = end - self.first
        ptx.block_barrier()
        for ahead in range(self.in_flight):
            self._copy(ptx.constant(ahead), ptx.constant(ahead))

    def group_and_tile(self, number: Value) -> tuple[ptx.Word, ptx.Word]:
        """The group, an expert's number, of this block's tile with that number, and the tile's number in the group."""
        tile = self.first + number
        place = ptx.min_s32(tile // self.of_group, self.sizes.groups - 1)
        return ptx.load_shared(self.groups + (place << 2)), tile % self.of_group

    def _piece(self, step: Value) -> Value:
        return step * WARPGROUPS + self.warpgroup

    def _copy(self, i: Value, slot: Value) -> None:
        """Starts copying this lane's codes of the warpgroup's piece i and their scale; zeros where there is none."""
        a, width = self.a, self.width
        number, piece = i // self.steps, self._piece(i % self.steps)
        exists = piece.signed < self.pieces_of_part
        for _ in range(1, self.parts):
            is_later = number.signed >= self.count
            number, piece = (
                ptx.select(is_later, number - self.count, number),
                ptx.select(is_later, piece + self.pieces_of_part, piece),
            )
        exists = exists & (number.signed < self.count) & (piece.signed < self.pieces)
        size, piece = ptx.select(exists, 16, 0), ptx.min_s32(piece, self.pieces - 1)
        group, tile = self.group_and_tile(ptx.min_s32(number, ptx.max_s32(self.count - 1, 0)))
        is_shared = group.equals(self.sizes.experts)
        # A list of no groups has no first one.
        group = ptx.select(is_shared, 0, ptx.min_s32(ptx.max_s32(group, 0), self.sizes.experts - 1))
        codes, scales = (
            ptx.select(is_shared, a[f"shared_{self.name}{kind}"], a[f"{self.name}{kind}"]) for kind in ("", "_scales")
        )
        first = group * self.rows + self.matrix_row(tile, self.warp_of_tile)
        source = ptx.offset(ptx.offset(ptx.offset(codes, first + self.row_of_8, width), piece, BLOCK), self.quad_lane, 16)
        target = self.own_codes + slot * PIECES_BYTES
        for quarter in range(4):
            half, other = divmod(quarter, 2)
            own = ptx.offset(source, ptx.constant(1), 8 * other * width + half * BLOCK // 2)
            ptx.copy_async(target + 512 * quarter, own, size, 1, 0, 0)
        scale = ptx.offset(ptx.offset(scales, first // BLOCK, 4 * self.pieces), piece, 4)
        ptx.copy_async_word(self.own_scales + slot * (4 * persistent.THREADS), scale, size >> 2)
        ptx.copies_commit()

    def each(
        self,
        rows: Rows,
        start: Callable[[Value, Value], Sequence[Value]],
        end: Callable[[Value, Sequence[Value]], None],
        write_part: Callable[[int], None] = lambda part: None,
    ) -> None:
        """For every tile start(group, is_new), its sums with all of `rows`, and end(tile, what `start` returned).

        is_new: whether it is another group than the last tile's. `end` reads the sums by `pair`. write_part(part): writes that
        part of the rows to shared memory, where they have several.
        """
        slot = ptx.constant(0)
        for part in range(self.parts):
            write_part(part)
            slot = self._each_of_part(part, slot, rows, start, end)

    def _each_of_part(
        self,
        part: int,
        slot: Value,
        rows: Rows,
        start: Callable[[Value, Value], Sequence[Value]],
        end: Callable[[Value, Sequence[Value]], None],
    ) -> Value:
        """`each` for a part of the rows; `slot`, and what is returned: where the next piece of codes is."""
        columns, is_last = self.sizes.columns, part + 1 == self.parts
        pieces = self.pieces_in(part)

        def one_tile(number: Value, carry: list[Value]) -> list[Value]:
            last, *carry = carry
            group, tile = self.group_and_tile(number)
            loaded = start(group, group.differs(last)) if is_last else []
            following_tiles = number + self.count * part

            def one_piece(step: Value, carry: list[Value]) -> list[Value]:
                slot, *totals = carry
                piece = ptx.min_s32(self._piece(step), pieces - 1)
                totals = self._add_piece(rows, piece, slot, totals)
                self._copy(following_tiles * self.steps + step + self.in_flight, slot)
                following = slot + 1
                return [ptx.select(following.equals(self.in_flight), 0, following), *totals]

            zeros = [ptx.number(0.0)] * (columns // 2)
            slot, *totals = ptx.loop(ptx.constant(self.steps), [*carry, *zeros], one_piece)
            for eight in range(columns // 8):
                for at in range(4):
                    row = (self.warp_of_tile << 4) + self.row_of_8 + 8 * (at // 2)
                    column = (self.quad_lane << 1) + (8 * eight + at % 2)
                    ptx.store_shared(self._sum_at(self.warpgroup, row, column), ptx.bits_of(totals[4 * eight + at]))
            ptx.block_barrier()
            self.kept = self._kept(number) if part else None
            if is_last:
                end(tile, loaded)
            else:
                self._keep(number)
            ptx.block_barrier()
            return [group, slot]

        return ptx.loop(self.count, [ptx.constant(-1), slot], one_tile)[1]

    def pieces_in(self, part: int) -> int:
        return min(self.pieces_of_part, self.pieces - part * self.pieces_of_part)

    def _kept(self, number: Value) -> Value:
        """Where the sums of this block's tile with that number are kept, those of a column side by side."""
        return ptx.offset(self.a[f"{self.name}_sums"], self.first + number, 4 * TILE * self.sizes.columns)

    def _keep(self, number: Value) -> None:
        """Stores a tile's sums so far, four of a column by a thread."""
        fours = TILE // 4
        for i, exists in persistent.indices_of_thread(self.thread, self.sizes.rows * fours):
            column, row = i // fours, (i % fours) << 2
            words = [ptx.bits_of(x) for two in range(2) for x in self.pair(row + 2 * two, column)]
            ptx.store_global_words(ptx.offset(self._kept(number), column * TILE + row, 4), words, exists)

    def _sum_at(self, warpgroup: Value | int, row: Value, column: Value) -> Value:
        """Where the sum of one of the tile's rows and a column over a warpgroup's pieces is in shared memory."""
        columns = column + (ptx.constant(warpgroup) if isinstance(warpgroup, int) else warpgroup) * self.sizes.columns
        return self.sums + ((columns * SUMS_PITCH + row) << 2)

    def pair(self, row: Value, column: Value) -> list[Value]:
        """The sums of a row of the tile and of the next one, those over earlier parts of the rows added."""
        pairs = [ptx.load_shared_floats(self._sum_at(ptx.constant(i), row, column)) for i in range(WARPGROUPS)]
        if self.kept is not None:
            kept = ptx.load_fresh_pair(ptx.offset(self.kept, column * TILE + row, 4))
            pairs.insert(0, [ptx.float_of(word) for word in kept])
        return [ptx.total(sums) for sums in zip(*pairs, strict=True)]

    def _add_piece(self, rows: Rows, piece: Value, slot: Value, totals: list[Value]) -> list[Value]:
        columns = rows.columns
        ptx.copies_done(self.in_flight - 1)
        own_codes = self.own_codes + slot * PIECES_BYTES
        codes = [ptx.load_shared_words(own_codes + 512 * quarter) for quarter in range(4)]
        scale = ptx.float_of(ptx.load_shared(self.own_scales + slot * (4 * persistent.THREADS)))
        sums = ptx.multiply_codes(codes, rows.operand(piece), BLOCK * columns, columns)
        factors_at = rows.factors + piece * (4 * columns) + (self.quad_lane << 3)
        new = []
        for eight in range(columns // 8):
            factors = ptx.load_shared_floats(factors_at + 32 * eight)
            for at, factor in enumerate(factors * 2, 4 * eight):
                # The product of a factor and a scale might be too small for a float32.
                new.append(ptx.fma(sums[at] * factor, scale, totals[at]))
        return new


class First:
    """silu(gate) * up of every row and its experts -> hidden [slots, I] bfloat16. Half of a tile's rows are of the gate."""

    def __init__(
        self, sizes: Sizes, a: Mapping[str, Value], thread: Any, shared: SharedMemory, in_flight: int, parts_of_rows: int
    ):
        self.sizes, self.a, self.thread = sizes, a, thread
        half = TILE // 2

        def matrix_row(tile: Value, warp: Value) -> Value:
            part, within = warp >> 1, warp & 1
            return part * sizes.width + tile * half + (within << 4)

        self.rows = Rows(shared, sizes.columns, -(-sizes.hidden // BLOCK // parts_of_rows))
        tiles, shape = sizes.width // half, (2 * sizes.width, sizes.hidden)
        self.tiles = Tiles(sizes, a, thread, shared, in_flight, "gate_up", *shape, tiles, matrix_row, parts_of_rows)

    def run(self) -> None:
        sizes, a = self.sizes, self.a
        self.tiles.begin()

        def write(part: int) -> None:
            before = 2 * BLOCK * self.rows.pieces * part

            def source(row: Value) -> tuple[Value, Value]:
                address = ptx.offset(a["rows"], ptx.min_s32(row, sizes.rows - 1), 2 * sizes.hidden)
                return ptx.offset(address, ptx.constant(before), 1), row.signed < sizes.rows

            self.rows.write(self.thread, source, ptx.load_global_words, self.tiles.pieces_in(part))
            ptx.proxy_fence()
            ptx.block_barrier()

        self.tiles.each(self.rows, lambda group, is_new: _slots(sizes, a, self.thread, group, TILE // 4), self.store, write)
        ptx.copies_done()  # those of no tile write zeros to what the next stage uses otherwise

    def store(self, tile: Value, slots: Sequence[Value]) -> None:
        width, half = self.sizes.width, TILE // 2
        for column, row, slot, stores in _pairs(self.sizes, self.thread, half // 2, slots):
            gates, ups = (self.tiles.pair(row + part * half, column) for part in range(2))
            word = ptx.to_bfloat16_pair(*(persistent.silu(g) * u for g, u in zip(gates, ups, strict=True)))
            at = slot * width + tile * half + row
            ptx.store_global(ptx.offset(self.a["hidden"], at, 2), word, stores)


class Second:
    """The second products of every row and its experts -> out [slots, D] bfloat16."""

    def __init__(self, sizes: Sizes, a: Mapping[str, Value], thread: Any, shared: SharedMemory, in_flight: int):
        self.sizes, self.a, self.thread = sizes, a, thread
        self.rows = Rows(shared, sizes.columns, sizes.width // BLOCK)

        def matrix_row(tile: Value, warp: Value) -> Value:
            return tile * TILE + (warp << 4)

        of_group = sizes.hidden // TILE
        self.tiles = Tiles(sizes, a, thread, shared, in_flight, "down", sizes.hidden, sizes.width, of_group, matrix_row)

    def begin(self) -> None:
        self.tiles.begin()

    def run(self) -> None:
        self.tiles.each(self.rows, self.start, self.store)

    def start(self, group: Value, is_new: Value) -> Sequence[Value]:
        sizes, a = self.sizes, self.a

        def source(row: Value) -> tuple[Value, Value]:
            slot = _slot(sizes, a, group, ptx.min_s32(row, sizes.rows - 1))
            exists = (row.signed < sizes.rows) & (slot.signed >= 0)
            return ptx.offset(a["hidden"], ptx.max_s32(slot, 0), 2 * sizes.width), exists

        with ptx.when(is_new):
            self.rows.write(self.thread, source, ptx.load_fresh_words)
            ptx.proxy_fence()
            ptx.block_barrier()
        return _slots(sizes, a, self.thread, group, TILE // 2)

    def store(self, tile: Value, slots: Sequence[Value]) -> None:
        for column, row, slot, stores in _pairs(self.sizes, self.thread, TILE // 2, slots):
            word = ptx.to_bfloat16_pair(*self.tiles.pair(row, column))
            at = slot * self.sizes.hidden + tile * TILE + row
            ptx.store_global(ptx.offset(self.a["out"], at, 2), word, stores)


def _slot(sizes: Sizes, a: Mapping[str, Value], group: Value, row: Value) -> Value:
    """The number of the pair of a row and a group, -1 where the row did not choose the group."""
    return ptx.load_global(ptx.offset(a["slots"], group * sizes.rows + row, 4))


def _slots(sizes: Sizes, a: Mapping[str, Value], thread: Thread, group: Value, pairs: int) -> list[Value]:
    """The number of the pair of a row and the group, for each column of which this thread has one of `pairs` pairs of rows."""
    return [_slot(sizes, a, group, i // pairs) for i, _ in persistent.indices_of_thread(thread, sizes.rows * pairs)]


def _pairs(sizes: Sizes, thread: Thread, pairs: int, slots: Sequence[Value]) -> list[tuple[Value, Value, Value, Value]]:
    """(column, first row of a pair, number of the column's pair, whether it exists) of this thread's pairs of rows."""
    found = []
    for (i, exists), slot in zip(persistent.indices_of_thread(thread, sizes.rows * pairs), slots, strict=True):
        stores = exists & (slot.signed >= 0)
        found.append((i // pairs, (i % pairs) << 1, ptx.max_s32(slot, 0), stores))
    return found


# ---- the kernel


def _shared_bytes(stage: Callable[..., First | Second], *sizes: Any) -> int:
    """The shared memory that a stage of these `sizes` needs. They follow the arguments that all stages have."""
    counted = SharedMemory()
    of_step, *others = sizes
    stage(of_step, {}, None, counted, *others)
    return counted.used + 1024  # for the rows to begin at a multiple of 1024


def _in_flight(stage: Callable[..., First | Second], sizes: Sizes, *parts_of_rows: int) -> int:
    """The most of IN_FLIGHT for which there is shared memory, 0 for none."""
    return max((n for n in IN_FLIGHT if _shared_bytes(stage, sizes, n, *parts_of_rows) <= SHARED_BYTES), default=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of IN_FLIGHT the stages have, 0 where one does not fit, and how many parts of the rows the first one has."""

    first: int
    parts_of_rows: int
    second: int

    @staticmethod
    def of(sizes: Sizes) -> Plan:
        by_parts = {n: _in_flight(First, sizes, n) for n in range(1, MAX_PARTS + 1)}
        parts_of_rows = next((n for n, in_flight in by_parts.items() if in_flight), 1)
        return Plan(by_parts[parts_of_rows], parts_of_rows, _in_flight(Second, sizes))


def shared_bytes(sizes: Sizes) -> int:
    p = Plan.of(sizes)
    return max(_shared_bytes(First, sizes, p.first, p.parts_of_rows), _shared_bytes(Second, sizes, p.second))


def stages(sizes: Sizes, a: Mapping[str, Value], thread: Thread, memory: Value) -> tuple[First, Second]:
    """Both use the same shared memory, one after the other."""
    p = Plan.of(sizes)
    first = First(sizes, a, thread, aligned(memory), p.first, p.parts_of_rows)
    return first, Second(sizes, a, thread, aligned(memory), p.second)


def _call(sizes: Sizes, operands: Mapping[str, jax.Array], outs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Calls the kernel: its outputs by name."""
    names = [*operands, *outs]

    def routed_mlp(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *arrays, memory, block = values
            a = {n: ptx.global_address(v) for n, v in zip(names, arrays, strict=True)}
            thread = Thread.current(ptx.scalar(block))
            first, second = stages(sizes, a, thread, ptx.shared_address(memory))
            first.run()
            target = ptx.grid_arrive(a["barrier_count"], BLOCKS)
            second.begin()
            ptx.grid_wait(a["barrier_count"], target)
            second.run()

        program(*refs, jax.lax.axis_index("block"))

    kernel = plgpu.kernel(
        routed_mlp,
        out_type=tuple(outs.values()),
        scratch_types=(plgpu.SMEM((shared_bytes(sizes) // 4,), jnp.int32),),
        grid=(BLOCKS,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    given = {**operands, "barrier_count": jax.new_ref(operands["barrier_count"])}
    return dict(zip(outs, kernel(*given.values()), strict=True))


def aligned(address: Value) -> SharedMemory:
    return SharedMemory((address + 1023) & -1024)


def _matrices(name: str, matrix: Scaled, shared: Scaled | None) -> dict[str, jax.Array]:
    shared = matrix if shared is None else shared
    arrays = {name: matrix.codes, f"{name}_scales": float_scales(matrix.scales)}
    return arrays | {f"shared_{name}": shared.codes, f"shared_{name}_scales": float_scales(shared.scales)}


def sizes_of(rows: jax.Array, routes: Routes, gate_up: Scaled) -> Sizes:
    experts, _, width, hidden = gate_up.shape
    return Sizes(rows.shape[0], hidden, width, experts, routes.experts.shape[1])


def routed_mlp(
    rows: jax.Array, routes: Routes, gate_up: Scaled, down: Scaled, shared_gate_up: Scaled | None, shared_down: Scaled | None
) -> tuple[jax.Array, jax.Array | None]:
    sizes = sizes_of(rows, routes, gate_up)
    tables = {name: getattr(routes, name) for name in ("groups", "num_groups", "slots", "barrier_count")}
    matrices = _matrices("gate_up", gate_up, shared_gate_up) | _matrices("down", down, shared_down)
    outs = {
        "hidden": jax.ShapeDtypeStruct((sizes.slots, sizes.width), jnp.bfloat16),
        "out": jax.ShapeDtypeStruct((sizes.slots, sizes.hidden), jnp.bfloat16),
    }
    if Plan.of(sizes).parts_of_rows > 1:
        tiles = sizes.most_groups * 2 * sizes.width // TILE
        outs["gate_up_sums"] = jax.ShapeDtypeStruct((tiles, sizes.columns, TILE), jnp.float32)
    products = _call(sizes, {"rows": rows, **tables, **matrices}, outs)["out"]
    pairs = sizes.rows * sizes.choices
    of_experts = products[:pairs].reshape(sizes.rows, sizes.choices, -1).astype(jnp.float32)
    # Of experts that other devices have nothing was written.
    of_experts = jnp.where((routes.experts >= 0)[..., None], of_experts, 0.0)
    out = jnp.sum(of_experts * routes.weights[..., None], axis=1)
    return out, None if shared_down is None else products[pairs:].astype(jnp.float32)


def why_not(
    rows: jax.Array, routes: Routes, gate_up: Scaled, down: Scaled, shared_gate_up: Scaled | None, shared_down: Scaled | None
) -> str | None:
    if reason := hopper.why_not():
        return reason
    if (count := device.num_sms() or BLOCKS) < BLOCKS:
        return f"it needs {BLOCKS} SMs at once, this device has {count}"
    if rows.shape[0] > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} rows, not {rows.shape[0]}"
    if rows.dtype != jnp.bfloat16:
        return f"it takes rows in bfloat16, not in {rows.dtype}"
    matrices = {"gate_up": gate_up, "down": down, "shared_gate_up": shared_gate_up, "shared_down": shared_down}
    for name, matrix in matrices.items():
        if matrix is None:
            continue
        if not isinstance(matrix, Scaled) or matrix.dtype != jnp.float8_e4m3fn or matrix.by_row:
            return f"it reads codes in float8_e4m3fn with a scale for {BLOCK} x {BLOCK}, {name} is not such a matrix"
    sizes = sizes_of(rows, routes, gate_up)
    if shared_down is not None and shared_down.shape != (sizes.hidden, sizes.width):
        return f"it takes shared experts as wide as one routed expert, {sizes.width}, not of {shared_down.shape[1]}"
    if sizes.hidden % BLOCK or sizes.width % BLOCK:
        return f"it takes hidden sizes and widths in multiples of {BLOCK}, not {sizes.hidden} and {sizes.width}"
    plan = Plan.of(sizes)
    if not (plan.first and plan.second):
        return f"{sizes.rows} rows of {sizes.hidden} and {sizes.width} numbers do not fit shared memory"
    return None
