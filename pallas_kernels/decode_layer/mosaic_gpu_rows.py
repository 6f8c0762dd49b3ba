"""What stands between the projections of few rows and their attention on Hopper, but for the projections up.

`latents_of_rows` is between the projections down and up: a thread block normalises a row and puts its token into the caches,
for which XLA takes ten kernels, most of them scatters. `absorbed_queries` follows the projection up: a warp multiplies the rows
of a head with 16 columns of its key matrix, which no other warp reads, by tensor cores and without shared memory. All its
loads are under way at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer.arrays import AttentionWeights, latents_of
from pallas_kernels.decode_layer.mosaic_gpu_arrays import INDEX_WIDTH, TokenArrays, TokenSizes
from pallas_kernels.decode_layer.mosaic_gpu_token import Token, rotate_pair
from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import SharedMemory, Thread
from pallas_kernels.hopper.ptx import Address, Float, Predicate, Word
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.quant import Latents

ABSORB_THREADS = 128
ABSORB_COLUMNS = 16 * ABSORB_THREADS // 32  # of a head's key matrix, that a thread block has
ABSORB_BLOCKS = VALUE_DIM // ABSORB_COLUMNS

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RowArrays(TokenArrays):
    """Global addresses of what the thread block of a row reads and writes: the row's part of arrays that have one."""

    # Output
    q_latents: Any  # [R] bfloat16

    @staticmethod
    def of(p: TokenSizes, addresses: Mapping[str, Address], row: Word) -> RowArrays:
        """Of all rows' arrays, by name, those of number `row`."""
        key_bytes = INDEX_WIDTH if p.index_scaled else 2 * INDEX_WIDTH
        row_bytes = {
            "down_out": 4 * p.down,
            "q_latents": 2 * p.q_rank,
            "position": 4,
            "cos": 2 * ROTARY,
            "sin": 2 * ROTARY,
            "latents": 2 * WIDTH * p.max_len,
            "latent_codes": VALUE_DIM * p.max_len,
            "latent_rotary": 2 * ROTARY * p.max_len,
            "latent_scales": 4 * p.max_len,
            "index_keys": key_bytes * p.max_len,
            "index_scales": 4 * p.max_len,
        }
        return RowArrays(**{n: ptx.offset(a, row, row_bytes[n]) if n in row_bytes else a for n, a in addresses.items()})


class Row:
    """The row with the number of the thread block: its query latent, and its token in the caches if its position is in them."""

    def __init__(self, p: TokenSizes, shared: SharedMemory):
        self.p = p
        self.sums, self.token = shared.allocate(64), Token(p, shared)

    def run(self, a: RowArrays, thread: Thread) -> None:
        p = self.p

        def sink(i: Word, word: Word, exists: Predicate) -> None:
            ptx.store_global(ptx.offset(a.q_latents, i, 4), word, exists)

        pair = persistent.fresh_pair(a.down_out)
        persistent.normalise(thread, p.q_rank // 2, pair, a.q_norm, p.latent_eps, self.sums, sink, in_bfloat16=False)
        position = ptx.load_global(a.position)
        with ptx.when((position.signed >= 0) & (position.signed < p.max_len)):
            self.token.write(a, thread, position)


@dataclasses.dataclass(frozen=True)
class Absorption:
    """Sizes of `absorbed_queries`."""

    rows: int
    heads: int
    nope: int

    @property
    def head_dim(self) -> int:
        return self.nope + ROTARY


@dataclasses.dataclass(frozen=True, eq=False)
class AbsorptionArrays:
    """Global addresses of what `absorbed_queries` reads and writes."""

    # Input
    product: Any  # [N, H (dn + 64)] bfloat16
    k_up: Any  # [H, 512, dn] bfloat16
    cos: Any  # [N, 32] float32
    sin: Any  # [N, 32] float32
    # Output
    queries: Any  # [N, H, 576] bfloat16


class Absorb:
    """A head's queries [N, 576]: its part without rope times ABSORB_COLUMNS columns of its key matrix; the rotated part.

    Thread blocks of a head follow one another, and the first of them has the rotated part too.
    """

    def __init__(self, p: Absorption, a: AbsorptionArrays, thread: Thread):
        self.p, self.a, self.thread = p, a, thread
        self.head, self.part = thread.block // ABSORB_BLOCKS, thread.block % ABSORB_BLOCKS
        self.row_of_8, self.quad_lane = thread.lane >> 2, thread.lane & 3

    def run(self) -> None:
        p = self.p
        first = self.part * ABSORB_COLUMNS + (self.thread.warp << 4)
        columns = [[self._column(first + 8 * tile, i) for i in range(p.nope // 32)] for tile in range(2)]
        for start in range(0, p.rows, 16):
            halves = [[self._row(start + 8 * half, i) for i in range(p.nope // 32)] for half in range(2)]
            for tile, of_tile in enumerate(columns):
                sums = [ptx.number(0.0)] * 4
                for row, other, column in zip(*halves, of_tile, strict=True):
                    sums = ptx.add_products(sums, row, other, column)
                for half in range(2):
                    self._store(start + 8 * half, first + 8 * tile, sums[2 * half : 2 * half + 2])
        with ptx.when(self.part.equals(0)):
            self._rotate()

    def _column(self, first: Word, i: int) -> list[Word]:
        """Eight numbers of column first + l / 4 of the head's matrix, from number 32 i + 8 (l % 4) on, in lane l."""
        column = self.head * VALUE_DIM + first + self.row_of_8
        address = ptx.offset(ptx.offset(self.a.k_up, column, 2 * self.p.nope), self.quad_lane, 16)
        return ptx.load_global_words(ptx.offset(address, ptx.constant(i), 64))

    def _row(self, first: int, i: int) -> list[Word]:
        """The same numbers of row first + l / 4, zeros where there is no such row."""
        p = self.p
        row = self.row_of_8 + first
        exists = ptx.select(row.signed < p.rows, 1, 0)
        at = ptx.min_s32(row, p.rows - 1) * p.heads + self.head
        address = ptx.offset(ptx.offset(self.a.product, at, 2 * p.head_dim), self.quad_lane, 16)
        return ptx.load_global_words_or_zeros(ptx.offset(address, ptx.constant(i), 64), exists, 4)

    def _store(self, first_row: int, first: Word, pair: Sequence[Float]) -> None:
        p, row = self.p, self.row_of_8 + first_row
        at = ptx.offset(self.a.queries, row * p.heads + self.head, 2 * WIDTH)
        at = ptx.offset(at, (first >> 1) + self.quad_lane, 4)
        ptx.store_global(at, ptx.to_bfloat16_pair(*pair), row.signed < p.rows)

    def _rotate(self) -> None:
        p, a = self.p, self.a
        count = p.rows * ROTARY // 2
        for start in range(0, count, ABSORB_THREADS):
            i = self.thread.index + start
            exists, i = i.signed < count, ptx.min_s32(i, count - 1)
            row, j = i // (ROTARY // 2), i % (ROTARY // 2)
            at = row * p.heads + self.head
            word = ptx.load_global(ptx.offset(ptx.offset(a.product, at, 2 * p.head_dim), j + p.nope // 2, 4))
            cos, sin = (ptx.offset(angles, row, 2 * ROTARY) for angles in (a.cos, a.sin))
            rotated = rotate_pair(cos, sin, j, *ptx.from_bfloat16_pair(word))
            target = ptx.offset(ptx.offset(a.queries, at, 2 * WIDTH), j + VALUE_DIM // 2, 4)
            ptx.store_global(target, ptx.to_bfloat16_pair(*rotated), exists)


def sizes(product: jax.Array, layer: AttentionWeights) -> TokenSizes:
    full, q_rank = layer.index_keys is not None, layer.weights["q_norm"].shape[0]
    return TokenSizes(
        q_rank=q_rank,
        max_len=layer.latents.shape[1],
        latent_eps=layer.latent_eps,
        index_heads=product.shape[-1] - q_rank - WIDTH - INDEX_WIDTH if full else 0,
        index_interleaved=layer.index_interleaved,
        index_scaled=layer.index_scales is not None,
        latents_scaled="latents" not in layer.caches(),
    )


def operands(product: jax.Array, layer: AttentionWeights) -> dict[str, Any]:
    """What the kernel reads, and as references what it writes to, by name."""
    cos, sin = layer.cos_sin
    vectors = [name for name in ("q_norm", "kv_norm", "key_norm", "key_norm_bias") if name in layer.weights]
    return {
        "down_out": product,
        "position": layer.position,
        "cos": cos,
        "sin": sin,
        **{name: layer.weights[name] for name in vectors},
        **{name: jax.new_ref(array) for name, array in layer.caches().items()},
    }


def latents_of_rows(
    product: jax.Array, layer: AttentionWeights
) -> tuple[jax.Array, jax.Array | Latents, jax.Array | None, jax.Array | None]:
    p, given = sizes(product, layer), operands(product, layer)
    counted = SharedMemory()
    Row(p, counted)
    names = [*given, "q_latents"]

    def latents_of_rows(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *arrays, memory, block = values
            addresses = {n: ptx.global_address(v) for n, v in zip(names, arrays, strict=True)}
            thread, shared = Thread.current(ptx.scalar(block)), SharedMemory(ptx.shared_address(memory))
            a = RowArrays.of(p, addresses, thread.block)
            Row(p, shared).run(a, thread)

        program(*refs, jax.lax.axis_index("block"))

    rows = product.shape[0]
    kernel = plgpu.kernel(
        latents_of_rows,
        out_type=(jax.ShapeDtypeStruct((rows, 1, p.q_rank), jnp.bfloat16),),
        scratch_types=(plgpu.SMEM((counted.used // 4,), jnp.int32),),
        grid=(rows,),
        grid_names=("block",),
        num_threads=persistent.THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    (q_latents,) = kernel(*given.values())
    caches = {name: jax.freeze(given[name]) for name in layer.caches()}
    return q_latents, latents_of(caches), caches.get("index_keys"), caches.get("index_scales")


def absorbed_queries(product: jax.Array, k_up: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    rows, (heads, _, nope) = product.shape[0], k_up.shape
    p = Absorption(rows, heads, nope)

    def absorbed_queries_of_rows(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *arrays, block = values
            a = AbsorptionArrays(*map(ptx.global_address, arrays))
            Absorb(p, a, Thread.current(ptx.scalar(block))).run()

        program(*refs, jax.lax.axis_index("block"))

    kernel = plgpu.kernel(
        absorbed_queries_of_rows,
        out_type=(jax.ShapeDtypeStruct((rows, 1, heads, WIDTH), jnp.bfloat16),),
        grid=(heads * ABSORB_BLOCKS,),
        grid_names=("block",),
        num_threads=ABSORB_THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    (queries,) = kernel(product, k_up, *cos_sin)
    return queries
