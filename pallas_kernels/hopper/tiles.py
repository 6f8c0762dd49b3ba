"""What the Mosaic GPU kernels of attention with a selection share: tiles, products and masks of two warpgroups.

A thread block is two warpgroups of ROWS rows each and one that copies. Importing this needs JAX's Mosaic GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bits import WORD_BITS

ROWS, WARPGROUPS = 64, 2
TILE = ROWS * WARPGROUPS  # what queries and keys are padded to
SWIZZLE_COLUMNS = 64  # bfloat16 elements of one 128-byte swizzled row; widths are padded to a multiple
MEMORY_REGISTERS = 24

WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def smem(*shape: int) -> Any:
    """Shared memory for bfloat16 tiles of this shape, in the layout that wgmma reads."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)


def streamed(rows: int, width: int, index_map: Any) -> Any:
    """Blocks [rows, width] that `stream` copies to shared memory, in the layout that wgmma reads."""
    return plgpu.BlockSpec((rows, width), index_map, transforms=TILED)


def by_row(vector: jax.Array, columns: int) -> jax.Array:
    """A number for each row, [ROWS], in all columns of a tile [ROWS, columns]."""
    return lax.broadcast_in_dim(vector, (ROWS, columns), [0])


def by_column(vector: jax.Array) -> jax.Array:
    """A number for each column, [columns], in all rows of a tile [ROWS, columns]."""
    return lax.broadcast_in_dim(vector, (ROWS, vector.shape[0]), [1])


def filled(shape: tuple[int, ...], value: float, layout: Any = WGMMA) -> jax.Array:
    """A float32 array in registers that holds one value, by default in the layout of an accumulator."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def product(a: Any, b: Any, rows: int, columns: int) -> jax.Array:
    """a @ b as a fresh [rows, columns] float32."""

    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((rows, columns), jnp.float32))


def add_products(totals: tuple[jax.Array, jax.Array], first: tuple[Any, Any], second: tuple[Any, Any]) -> Any:
    """Two `add_product`, computed at the same time."""

    def run(refs: Any) -> None:
        plgpu.wgmma(refs[0], *first)
        plgpu.wgmma(refs[1], *second)

    return pl.run_state(run)(tuple(map(plgpu.ACC.init, totals)))


def add_product(total: jax.Array, a: Any, b: Any) -> jax.Array:
    """total + a @ b."""

    def run(acc: Any) -> None:
        plgpu.wgmma(acc, a, b)

    return pl.run_state(run)(plgpu.ACC.init(total))


def selected_by_row(words: Any, first: Any, columns: int) -> jax.Array:
    """The mask [ROWS, columns] of ROWS queries from `first` on and all keys of words [columns / 32, queries]."""
    key = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 1, layout=WGMMA)
    *others, word_of_key = (
        by_row(vector(words.at[i, pl.ds(first, ROWS)], BY_ROW), columns) for i in range(columns // WORD_BITS)
    )
    for i, word in reversed(list(enumerate(others))):
        word_of_key = jnp.where(key < (i + 1) * WORD_BITS, word, word_of_key)
    return lax.shift_right_logical(word_of_key, key & (WORD_BITS - 1)) & 1 != 0


def selected_by_column(words: Any, first_word: Any, columns: int) -> jax.Array:
    """The mask [ROWS, columns] of ROWS keys, whose words begin at `first_word`, and all queries of words [:, columns]."""
    key = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=WGMMA)
    low, high = (by_column(vector(words.at[first_word + i], BY_COLUMN)) for i in range(ROWS // WORD_BITS))
    return lax.shift_right_logical(jnp.where(key < WORD_BITS, low, high), key & (WORD_BITS - 1)) & 1 != 0


def call_kernel(
    body: Any,
    outputs: Any,
    grid: tuple[int, ...],
    names: tuple[str, ...],
    scratch: Any,
    interpret: Any,
    copies: bool = True,
) -> Any:
    """A kernel of WARPGROUPS warpgroups a thread block, and one more that copies for `stream` unless `copies` is False."""
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=grid,
        grid_names=names,
        num_threads=WARPGROUPS + 1 if copies else WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def stream(body: Any, context: Any, steps: Any, specs: list[Any], stages: int) -> Any:
    """Runs `body` in the two warpgroups for each of the grid `steps` of streamed blocks; `context` calls this loop and holds
    what stays in registers."""
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=steps,
        max_concurrent_steps=stages,
        num_compute_wgs=WARPGROUPS,
        memory_registers=MEMORY_REGISTERS,
        wg_axis="warpgroup",
        compute_context=context,
        in_specs=specs,
    )


def vector(ref: Any, layout: Any) -> jax.Array:
    """Loads a vector from shared memory in the layout of a tile's rows (BY_ROW) or columns (BY_COLUMN)."""
    return plgpu.load(ref, layout=layout, optimized=False)


def to_tiles(x: jax.Array, axis: int, multiple: int = TILE) -> jax.Array:
    """x padded with zeros along the axis to a multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def tiles_seen(q_positions: jax.Array | None, queries: int, keys: int) -> jax.Array:
    """How many tiles of keys, from the first on, the queries of each tile see: [ceil(queries / TILE)] int32.

    q_positions [queries] int32, ascending; None for 0 .. queries - 1. keys: how many there are.
    """
    if q_positions is None:
        q_positions = jnp.arange(queries, dtype=jnp.int32)
    lasts = jnp.append(q_positions[TILE - 1 : queries - 1 : TILE], q_positions[-1])
    return jnp.clip(lasts // TILE + 1, 0, -(-keys // TILE)).astype(jnp.int32)


def first_seeing(seen: jax.Array, keys: int) -> jax.Array:
    """The first tile of queries that sees each tile of keys, [ceil(keys / TILE)] int32, by what `tiles_seen` returned.

    The number of tiles of queries where none does.
    """
    return jnp.sum(seen <= jnp.arange(-(-keys // TILE), dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
