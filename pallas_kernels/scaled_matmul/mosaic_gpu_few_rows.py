"""Up to 16 rows times a matrix in 8 bits on Hopper, in about the time of reading the matrix.

XLA would write the decoded matrix to memory and read it again. Here codes become float16 in registers, which is exact, and are
wgmma's first operand: a tile is 128 rows of the matrix, so the product is that of the matrix and the rows' transpose. The
rows lie in shared memory as float16 with a power-of-two factor for every 128 numbers; factors and the codes' scales are
applied in float32 to the sums over 128 codes. Rows are not quantised.

Every lane copies its own codes to shared memory several pieces ahead, where only it reads them: of loads to registers the
compiler keeps no more than one piece in flight.

Tiles alone are too few for all SMs, so the blocks of a cluster divide K and add their sums through each other's shared
memory, always in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import float16_rows, ptx
from pallas_kernels.quant import BLOCK, Scaled, dequantise, float_scales

MAX_ROWS = 16  # with more, writing them to shared memory in every block takes longer than reading the codes
WARPGROUPS = 2
THREADS = WARPGROUPS * hopper.WARPGROUP
WARPS = THREADS // 32
TILE = 64 * WARPGROUPS  # rows of the matrix
CLUSTERS = {1: hopper.NUM_SMS, 2: hopper.NUM_SMS // 2, 4: 32, 8: 16}  # blocks of one, and how many run at once
PIECES_IN_FLIGHT = 6  # of 128 x 128 codes
PIECE_BYTES = TILE * BLOCK
ROW_LOADS = 2  # of 2 x 16 bytes, by a lane, of the rows
SHARED_BYTES = 224 * 1024
# For the choice of clusters, as measured: bytes a microsecond that an SM and all of them read, and microseconds of a block
# besides, most of them for the barriers of a cluster.
BYTES_OF_SM, BYTES_OF_MEMORY = 45e3, 4.2e6
OVERHEAD = {1: 3.0, 2: 4.0, 4: 4.5, 8: 6.0}
SUMS_PITCH = TILE + 4  # numbers from one column's sums to the next one's: no two lanes use the same bank

Value = Any


@dataclasses.dataclass(frozen=True)
class Split:
    """How a product of `rows` rows and a matrix [outputs, width] is divided.

    cluster: how many blocks divide K. A block has its pieces of 128 one after the other, `phase` of them at a time in shared
    memory.
    """

    rows: int
    outputs: int
    width: int
    cluster: int

    @property
    def columns(self) -> int:
        """Rows of the product, padded to what wgmma takes."""
        return -(-self.rows // 8) * 8

    @property
    def tiles(self) -> int:
        return -(-self.outputs // TILE)

    @property
    def all_pieces(self) -> int:
        return self.width // BLOCK

    @property
    def pieces(self) -> int:
        return -(-self.all_pieces // self.cluster)

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece of the rows in shared memory: two chunks of 64 numbers a row, and factors."""
        return (2 * BLOCK + 4) * self.columns

    @property
    def sums_bytes(self) -> int:
        return 4 * SUMS_PITCH * self.columns

    @property
    def in_flight(self) -> int:
        return min(self.pieces, PIECES_IN_FLIGHT)

    @property
    def other_bytes(self) -> int:
        """All shared memory but that of the rows, which begin at a multiple of 1024."""
        return 1024 + self.in_flight * PIECE_BYTES + self.sums_bytes + -(-self.pieces // 4) * 16

    @property
    def phases(self) -> int:
        return -(-self.pieces // ((SHARED_BYTES - self.other_bytes) // self.piece_bytes))

    @property
    def phase(self) -> int:
        return -(-self.pieces // self.phases)

    @property
    def shared_bytes(self) -> int:
        return self.other_bytes + self.phase * self.piece_bytes

    @property
    def time(self) -> float:
        """About how many microseconds the product takes."""
        at_once = min(self.tiles, CLUSTERS[self.cluster]) * self.cluster
        of_piece = PIECE_BYTES * max(1 / BYTES_OF_SM, at_once / BYTES_OF_MEMORY)
        return -(-self.tiles // CLUSTERS[self.cluster]) * (OVERHEAD[self.cluster] + self.pieces * of_piece)


def split_of(rows: int, outputs: int, width: int) -> Split:
    """The division that ends first."""
    return min((Split(rows, outputs, width, cluster) for cluster in CLUSTERS), key=lambda split: split.time)


def why_not(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> str | None:
    if reason := hopper.why_not():
        return reason
    if isinstance(rows, Scaled) or rows.dtype != jnp.bfloat16 or dtype not in (None, jnp.bfloat16):
        return "it takes and returns rows in bfloat16"
    if not 1 <= rows.shape[0] <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} rows, not {rows.shape[0]}"
    if matrix.codes.dtype != jnp.float8_e4m3fn:
        return f"it reads codes in float8_e4m3fn, not {matrix.codes.dtype}"
    if matrix.by_row:
        return f"it takes a scale for every {BLOCK} x {BLOCK} codes, not for every row"
    if matrix.shape[1] % BLOCK:
        return f"it reads pieces of {BLOCK} codes, K is {matrix.shape[1]}"
    return None


def few_rows(rows: jax.Array, matrix: Scaled, dtype: Any = None) -> jax.Array:
    """rows [M, K] bfloat16, M up to 16, times a matrix [N, K] in 8 bits -> [M, N] bfloat16.

    Sums of products with the decoded numbers in float32, rounded once. The matrix has no gradient.
    """
    del dtype
    return _product(rows, matrix)


@jax.custom_vjp
def _product(rows: jax.Array, matrix: Scaled) -> jax.Array:
    return multiply(rows, matrix, split_of(rows.shape[0], *matrix.shape))


def _backward(matrix: Scaled, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return cotangent @ dequantise(matrix, cotangent.dtype), None


_product.defvjp(lambda rows, matrix: (_product(rows, matrix), matrix), _backward)


def multiply(rows: jax.Array, matrix: Scaled, split: Split) -> jax.Array:
    """The product of `few_rows`, divided as `split` says."""
    reference, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    def scaled_matmul_few_rows(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(reference,) * 5 + (number,) * 2)
        def program(ctx: Any, rows: Any, codes: Any, scales: Any, out: Any, memory: Any, tile: Any, rank: Any) -> None:
            of_rows, of_codes, of_scales, of_out = map(ptx.global_address, (rows, codes, scales, out))
            shared = ptx.shared_address(memory)
            block = Block(split, of_rows, of_codes, of_scales, of_out, shared, ptx.scalar(tile), ptx.scalar(rank))
            for stage in stages(block):
                stage()

        rank = jax.lax.axis_index("rank") if split.cluster > 1 else jnp.int32(0)
        program(*refs, jax.lax.axis_index("tile"), rank)

    kernel = plgpu.kernel(
        scaled_matmul_few_rows,
        out_type=jax.ShapeDtypeStruct((split.rows, split.outputs), jnp.bfloat16),
        scratch_types=(plgpu.SMEM((split.shared_bytes // 4,), jnp.int32),),
        grid=(split.tiles,),
        grid_names=("tile",),
        cluster=(split.cluster,) if split.cluster > 1 else (),
        cluster_names=("rank",) if split.cluster > 1 else (),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    return kernel(rows, matrix.codes, float_scales(matrix.scales))


def stages(block: Block) -> list[Callable[[], None]]:
    """What a block does up to a barrier of its cluster, and after it."""

    def add_up() -> None:
        if block.split.cluster > 1:
            ptx.cluster_barrier()
        else:
            ptx.block_barrier()
        block.add_sums()
        if block.split.cluster > 1:
            ptx.cluster_exit()

    return [block.multiply, add_up]


class Block:
    """A thread block: rank `rank` of the cluster that computes a tile."""

    def __init__(
        self, split: Split, rows: Value, codes: Value, scales: Value, out: Value, memory: Value, tile: Value, rank: Value
    ):
        self.split, self.rows, self.codes, self.scales, self.out = split, rows, codes, scales, out
        self.tile, self.rank = tile, rank
        thread = ptx.thread()
        self.thread, self.lane, self.warp = thread, thread & 31, thread >> 5
        self.quad_lane, self.row_of_8 = self.lane & 3, self.lane >> 2
        self.numbers = (memory + 1023) & -1024
        codes_in_flight = self.numbers + 2 * BLOCK * split.columns * split.phase
        self.own_codes = codes_in_flight + (self.warp << 11) + (self.lane << 4)
        self.factors = codes_in_flight + PIECE_BYTES * split.in_flight
        self.sums = self.factors + 4 * split.columns * split.phase
        self.own_scales = self.sums + split.sums_bytes
        self.first_piece = rank * split.pieces

    def piece(self, i: Value) -> Value:
        """The i-th piece of this block; beyond the last of all, that one."""
        return ptx.min_s32(self.first_piece + i, self.split.all_pieces - 1)

    def exists(self, i: Value) -> Value:
        return (i.signed < self.split.pieces) & ((self.first_piece + i).signed < self.split.all_pieces)

    # ---- the rows

    def write_rows(self, first: Value) -> None:
        """Writes pieces first .. first + phase - 1 of all rows to shared memory, in the order that `multiply_codes` reads.

        A warp takes a piece of four rows at a time; eight lanes have 16 bytes each of either 64 numbers of a row.
        """
        fours = self.split.columns // 4
        tasks = fours * self.split.phase

        def some(step: Value, _: Sequence[Value]) -> Sequence[Value]:
            starts = [step * (ROW_LOADS * WARPS) + self.warp + i * WARPS for i in range(ROW_LOADS)]
            loaded = [self._load_row(task, first, fours) for task in starts]
            for row, piece, exists, halves in loaded:
                with ptx.when(exists):
                    float16_rows.write_piece(self.lane, row, piece, halves, self.split.columns, self.numbers, self.factors)
            return []

        ptx.loop(ptx.constant(-(-tasks // (ROW_LOADS * WARPS))), [], some)

    def _load_row(self, task: Value, first: Value, fours: int) -> tuple[Value, Value, Value, list[list[Value]]]:
        split = self.split
        piece, four = task // fours, task % fours
        row = (four << 2) + (self.lane >> 3)
        exists = piece.signed < split.phase
        loads = ptx.select(exists & (row.signed < split.rows), 1, 0)
        source = self.piece(first + piece)
        address = ptx.offset(ptx.offset(self.rows, row, 2 * split.width), source, 2 * BLOCK)
        address = ptx.offset(address, self.lane & 7, 16)
        halves = [ptx.load_global_words_or_zeros(ptx.offset(address, ptx.constant(i), BLOCK), loads, 4) for i in range(2)]
        return row, piece, exists, halves

    # ---- the matrix

    def copy_codes(self, i: Value, slot: Value) -> None:
        """Starts copying this lane's codes of piece i, zeros if it does not exist."""
        split = self.split
        piece, exists = self.piece(i), self.exists(i)
        slot_at = self.own_codes + slot * PIECE_BYTES
        for quarter in range(4):
            half, other = divmod(quarter, 2)
            local = (self.warp << 4) + self.row_of_8 + 8 * other
            row = self.tile * TILE + local
            size = ptx.select(exists & (row.signed < split.outputs), 16, 0)
            row = ptx.min_s32(row, split.outputs - 1)
            source = ptx.offset(ptx.offset(ptx.offset(self.codes, row, split.width), piece, BLOCK), self.quad_lane, 16)
            ptx.copy_async(slot_at + 512 * quarter, ptx.offset(source, ptx.constant(half), 64), size, 1, 0, 0)
        ptx.copies_commit()

    def write_scales(self) -> None:
        """The scales of the tile's pieces, zero of those that do not exist, to shared memory."""
        split = self.split
        for start in range(0, split.pieces, THREADS):
            i = self.thread + start
            piece = self.first_piece + i
            exists = (i.signed < split.pieces) & (piece.signed < split.all_pieces)
            at = ptx.offset(self.scales, self.tile * split.all_pieces + piece, 4)
            scale = ptx.load_global_float_or_zero(at, ptx.select(exists, 1, 0))
            with ptx.when(i.signed < split.pieces):
                ptx.store_shared(self.own_scales + (i << 2), ptx.bits_of(scale))

    def multiply(self) -> None:
        """The tile's sums over this block's pieces, to shared memory."""
        split, columns = self.split, self.split.columns
        for i in range(split.in_flight):
            self.copy_codes(ptx.constant(i), ptx.constant(i))
        self.write_scales()

        def one_phase(number: Value, carry: list[Value]) -> list[Value]:
            first = number * split.phase
            ptx.block_barrier()  # the rows of the phase before are not needed any more
            self.write_rows(first)
            ptx.proxy_fence()
            ptx.block_barrier()
            count = ptx.min_s32(split.pieces - first, split.phase)

            def one_piece(i: Value, carry: list[Value]) -> list[Value]:
                slot, *totals = carry
                totals = self.add_piece(i, first + i, slot, totals)
                self.copy_codes(first + i + split.in_flight, slot)
                following = slot + 1
                return [ptx.select(following.equals(split.in_flight), 0, following), *totals]

            return ptx.loop(count, carry, one_piece)

        _, *totals = ptx.loop(ptx.constant(split.phases), [ptx.constant(0), *[ptx.number(0.0)] * (columns // 2)], one_phase)
        for eight in range(columns // 8):
            for at in range(4):
                row = (self.warp << 4) + self.row_of_8 + 8 * (at // 2)
                column = (self.quad_lane << 1) + (8 * eight + at % 2)
                ptx.store_shared(self._sum_at(row, column), ptx.bits_of(totals[4 * eight + at]))

    def add_piece(self, of_phase: Value, i: Value, slot: Value, totals: list[Value]) -> list[Value]:
        """totals + the product of piece i, which is number `of_phase` of its phase, and whose codes are in `slot`."""
        columns = self.split.columns
        ptx.copies_done(self.split.in_flight - 1)
        own_codes = self.own_codes + slot * PIECE_BYTES
        codes = [ptx.load_shared_words(own_codes + 512 * quarter) for quarter in range(4)]
        scale = ptx.float_of(ptx.load_shared(self.own_scales + (i << 2)))
        b = ptx.matrix(self.numbers + of_phase * (2 * BLOCK * columns))
        sums = ptx.multiply_codes(codes, b, BLOCK * columns, columns)
        factors_at = self.factors + of_phase * (4 * columns) + (self.quad_lane << 3)
        new = []
        for eight in range(columns // 8):
            factors = ptx.load_shared_floats(factors_at + 32 * eight)
            for at, factor in enumerate(factors * 2, 4 * eight):
                # The product of a factor and a scale might be too small for a float32.
                new.append(ptx.fma(sums[at] * factor, scale, totals[at]))
        return new

    def _sum_at(self, row: Value, column: Value) -> Value:
        return self.sums + ((column * SUMS_PITCH + row) << 2)

    def add_sums(self) -> None:
        """Adds the cluster's sums and writes this block's share of the tile's rows."""
        split = self.split
        share = TILE // split.cluster
        for start in range(0, share * split.rows, THREADS):
            i = self.thread + start
            column, row = ptx.min_s32(i // share, split.rows - 1), self.rank * share + i % share
            at = self._sum_at(row, column)
            if split.cluster > 1:
                sums = [ptx.load_peer_float(ptx.peer_address(at, rank)) for rank in range(split.cluster)]
            else:
                sums = [ptx.float_of(ptx.load_shared(at))]
            output = self.tile * TILE + row
            stores = (i.signed < share * split.rows) & (output.signed < split.outputs)
            target = ptx.offset(ptx.offset(self.out, column, 2 * split.outputs), output, 2)
            ptx.store_global_bfloat16(target, ptx.total(sums), stores)
