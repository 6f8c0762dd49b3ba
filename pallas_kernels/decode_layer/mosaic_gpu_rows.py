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

from pallas_kernels.decode_layer import mosaic_gpu_parts as parts
from pallas_kernels.decode_layer.arrays import AttentionWeights, latents_of
from pallas_kernels.decode_layer.mosaic_gpu import INDEX_WIDTH, Inputs, Token, rotate_pair
from pallas_kernels.decode_layer.mosaic_gpu_parts import SharedMemory, Thread, Value
from pallas_kernels.hopper import ptx
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.quant import Latents

ABSORB_THREADS = 128
ABSORB_COLUMNS = 16 * ABSORB_THREADS // 32  # of a head's key matrix, that a thread block has
ABSORB_BLOCKS = VALUE_DIM // ABSORB_COLUMNS

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


class Row:
    """The row with the number of the thread block: its query latent, and its token in the caches if its position is in them."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], thread: Any, shared: SharedMemory):
        self.p, self.thread = p, thread
        self.a = {name: self._of_row(name, address) for name, address in a.items()}
        self.sums, self.token = shared.allocate(64), Token(p, self.a, thread, shared)

    def _of_row(self, name: str, address: Value) -> Value:
        """Where the row's part of an array begins."""
        p = self.p
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
        return ptx.offset(address, self.thread.block, row_bytes[name]) if name in row_bytes else address

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread

        def sink(i: Value, word: Value, exists: Value) -> None:
            ptx.store_global(ptx.offset(a["q_latents"], i, 4), word, exists)

        pair = parts.fresh_pair(a["down_out"])
        parts.normalise(thread, p.q_rank // 2, pair, a["q_norm"], p.latent_eps, self.sums, sink, in_bfloat16=False)
        position = ptx.load_global(a["position"])
        with ptx.when((position.signed >= 0) & (position.signed < p.max_len)):
            self.token.write(position)


@dataclasses.dataclass(frozen=True)
class Absorption:
    """Sizes of `absorbed_queries`."""

    rows: int
    heads: int
    nope: int

    @property
    def head_dim(self) -> int:
        return self.nope + ROTARY


class Absorb:
    """A head's queries [N, 576]: its part without rope times ABSORB_COLUMNS columns of its key matrix; the rotated part.

    Thread blocks of a head follow one another, and the first of them has the rotated part too.
    """

    def __init__(self, p: Absorption, a: Mapping[str, Value], thread: Thread):
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

    def _column(self, first: Value, i: int) -> list[Value]:
        """Eight numbers of column first + l / 4 of the head's matrix, from number 32 i + 8 (l % 4) on, in lane l."""
        column = self.head * VALUE_DIM + first + self.row_of_8
        address = ptx.offset(ptx.offset(self.a["k_up"], column, 2 * self.p.nope), self.quad_lane, 16)
        return ptx.load_global_words(ptx.offset(address, ptx.constant(i), 64))

    def _row(self, first: int, i: int) -> list[Value]:
        """The same numbers of row first + l / 4, zeros where there is no such row."""
        p = self.p
        row = self.row_of_8 + first
        exists = ptx.select(row.signed < p.rows, 1, 0)
        at = ptx.min_s32(row, p.rows - 1) * p.heads + self.head
        address = ptx.offset(ptx.offset(self.a["product"], at, 2 * p.head_dim), self.quad_lane, 16)
        return ptx.load_global_words_or_zeros(ptx.offset(address, ptx.constant(i), 64), exists, 4)

    def _store(self, first_row: int, first: Value, pair: Sequence[Value]) -> None:
        p, row = self.p, self.row_of_8 + first_row
        at = ptx.offset(self.a["queries"], row * p.heads + self.head, 2 * WIDTH)
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
            word = ptx.load_global(ptx.offset(ptx.offset(a["product"], at, 2 * p.head_dim), j + p.nope // 2, 4))
            angles = {name: ptx.offset(a[name], row, 2 * ROTARY) for name in ("cos", "sin")}
            rotated = rotate_pair(angles, j, *ptx.from_bfloat16_pair(word))
            target = ptx.offset(ptx.offset(a["queries"], at, 2 * WIDTH), j + VALUE_DIM // 2, 4)
            ptx.store_global(target, ptx.to_bfloat16_pair(*rotated), exists)


def sizes(product: jax.Array, layer: AttentionWeights) -> Inputs:
    full, q_rank = layer.index_keys is not None, layer.weights["q_norm"].shape[0]
    return Inputs(
        hidden=0,
        q_rank=q_rank,
        heads=0,
        nope=0,
        value=0,
        max_len=layer.latents.shape[1],
        eps=layer.eps,
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
    Row(p, {}, None, counted)
    names = [*given, "q_latents"]

    def latents_of_rows(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *arrays, memory, block = values
            a = {n: ptx.global_address(v) for n, v in zip(names, arrays, strict=True)}
            thread = Thread.current(ptx.scalar(block))
            Row(p, a, thread, SharedMemory(ptx.shared_address(memory))).run()

        program(*refs, jax.lax.axis_index("block"))

    rows = product.shape[0]
    kernel = plgpu.kernel(
        latents_of_rows,
        out_type=(jax.ShapeDtypeStruct((rows, 1, p.q_rank), jnp.bfloat16),),
        scratch_types=(plgpu.SMEM((counted.used // 4,), jnp.int32),),
        grid=(rows,),
        grid_names=("block",),
        num_threads=parts.THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    (q_latents,) = kernel(*given.values())
    caches = {name: jax.freeze(given[name]) for name in layer.caches()}
    return q_latents, latents_of(caches), caches.get("index_keys"), caches.get("index_scales")


def absorbed_queries(product: jax.Array, k_up: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    rows, (heads, _, nope) = product.shape[0], k_up.shape
    p, names = Absorption(rows, heads, nope), ("product", "k_up", "cos", "sin", "queries")

    def absorbed_queries_of_rows(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *arrays, block = values
            a = {n: ptx.global_address(v) for n, v in zip(names, arrays, strict=True)}
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
