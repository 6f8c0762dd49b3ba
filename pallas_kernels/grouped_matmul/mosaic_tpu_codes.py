"""Rows times matrices in 8 bits on TPU: codes are decoded in VMEM, so HBM gives one byte for a number.

Rows are sorted by group. A visit is a tile of rows and a group that has rows in it: at most one for every tile and one for
every further group that is not empty, listed before the kernel starts and read as scalars. For a block of columns the kernel
makes all visits in turn, so the result of a tile stays in VMEM from its first group to its last, each of which writes its own
rows; groups without rows are not read. A block of codes is decoded to the dtype of the rows with the scales of its blocks of
128 x 128, which are scalars, and multiplied at once over all of its depth.

A block of 512 x 2048 codes is a MiB, whose transfer takes some three times what a step of the grid costs. Up to 512 rows of a
tile hide the decoding, some eight vector operations a code, behind the matrix units; with few rows it is about as long as the
transfer. A SwiGLU layer's two matrices [E, 2, I, K] are two blocks of the same visit, since a slice of one would be a copy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quant import BLOCK, Scaled, dequantise, float_scales

TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 512, 512, 2048
ROW_TILE = 16  # bfloat16 rows of a TPU tile


def why_not(rows: jax.Array | Scaled, matrices: Scaled, group_sizes: jax.Array) -> str | None:
    """For matrices [E, N, K] or pairs of them [E, 2, N, K]."""
    if reason := tpu.why_not():
        return reason
    if rows.shape[0] == 0:
        return "there are no rows"
    if matrices.by_row:
        return "matrices have a scale for 128 codes of a row, not for a block of 128 x 128"
    if rows.shape[1] % BLOCK:
        return f"K = {rows.shape[1]} is not a multiple of {BLOCK}"
    return None


def _depth(k: int) -> int:
    """The largest multiple of 128 up to TILE_DEPTH that divides k."""
    blocks = k // BLOCK
    return BLOCK * max(d for d in range(1, TILE_DEPTH // BLOCK + 1) if blocks % d == 0)


def visits(group_sizes: jax.Array, num_rows: int, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tile and the group of every visit [V] int32, and how many visits there are, [1]; further ones repeat the last."""
    groups, tiles = group_sizes.shape[0], -(-num_rows // tile)
    ends = jnp.cumsum(group_sizes)
    first = (ends - group_sizes) // tile
    of_group = jnp.where(group_sizes > 0, (ends - 1) // tile - first + 1, 0)
    until = jnp.cumsum(of_group)
    number = jnp.minimum(jnp.arange(tiles + min(groups, num_rows) - 1), until[-1] - 1)
    group = jnp.clip(jnp.sum(until <= number[:, None], axis=1), 0, groups - 1)
    tile_of = jnp.clip(first[group] + number - (until - of_group)[group], 0, tiles - 1)
    return tile_of.astype(jnp.int32), group.astype(jnp.int32), until[-1:].astype(jnp.int32)


def _kernel(
    tiles: Any, groups: Any, count: Any, ends: Any, x: Any, *refs: Any, parts: int, size: tuple[int, int], columns: int
) -> None:
    scales, codes, (out, decoded, *sums) = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
    block, visit, step = (pl.program_id(axis) for axis in range(3))

    @pl.when(visit < count[0])
    def _() -> None:
        @pl.when(step == 0)
        def _() -> None:
            for total in sums:
                total[...] = jnp.zeros_like(total)

        for part in range(parts):
            for n in range(0, size[0], BLOCK):
                row = jnp.minimum(block * (size[0] // BLOCK) + n // BLOCK, (columns - 1) // BLOCK)
                for k in range(0, size[1], BLOCK):
                    scale = scales[part][0, row, step * (size[1] // BLOCK) + k // BLOCK]
                    at = pl.ds(n, BLOCK), pl.ds(k, BLOCK)
                    decoded[at] = (codes[part][0, *at].astype(jnp.float32) * scale).astype(decoded.dtype)
            sums[part][...] += jax.lax.dot_general(
                x[...],
                decoded[...],
                (((1,), (1,)), ((), ())),
                precision=tpu.precision(decoded.dtype),
                preferred_element_type=jnp.float32,
            )

        @pl.when(step == pl.num_programs(2) - 1)
        def _() -> None:
            total = sums[0][...]
            if parts == 2:
                total = total * jax.nn.sigmoid(total) * sums[1][...]
            rows = tiles[visit] * out.shape[0] + jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
            group = groups[visit]
            begin = jnp.where(group == 0, 0, ends[jnp.maximum(group - 1, 0)])
            own = (rows >= begin) & (rows < ends[group])
            out[...] = jnp.where(own, total, out[...].astype(jnp.float32)).astype(out.dtype)


def _forward(rows: jax.Array, matrices: Scaled, group_sizes: jax.Array, parts: int, dtype: Any) -> jax.Array:
    m, k, n = *rows.shape, matrices.shape[-2]
    tile = min(TILE_ROWS, -(-m // ROW_TILE) * ROW_TILE)
    width, depth = min(TILE_COLUMNS, -(-n // BLOCK) * BLOCK), _depth(k)
    rows = jnp.pad(rows, ((0, -m % tile), (0, 0)))
    codes = matrices.codes.reshape(-1, n, k)  # both matrices of a pair after each other
    scales = float_scales(matrices.scales).reshape(-1, *matrices.scales.shape[-2:])
    order = visits(group_sizes, m, tile)

    def depth_of(visit: Any, step: Any, count: Any) -> Any:
        """The block of depth; of a visit after the last one the block that is there already, so that nothing is fetched."""
        return jnp.where(visit < count[0], step, k // depth - 1)

    def of_rows(column: Any, visit: Any, step: Any, tiles: Any, groups: Any, count: Any, ends: Any) -> tuple[Any, ...]:
        return tiles[visit], depth_of(visit, step, count)

    def stack(part: int, *, whole: bool) -> Any:
        def index(column: Any, visit: Any, step: Any, tiles: Any, groups: Any, count: Any, ends: Any) -> tuple[Any, ...]:
            return parts * groups[visit] + part, *((0, 0) if whole else (column, depth_of(visit, step, count)))

        return index

    def scales_spec(part: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *scales.shape[1:]), stack(part, whole=True), memory_space=pltpu.SMEM)

    out = pl.pallas_call(
        functools.partial(_kernel, parts=parts, size=(width, depth), columns=n),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(n, width), order[0].shape[0], k // depth),
            in_specs=[
                pl.BlockSpec((tile, depth), of_rows),
                *(scales_spec(part) for part in range(parts)),
                *(pl.BlockSpec((1, width, depth), stack(part, whole=False)) for part in range(parts)),
            ],
            out_specs=pl.BlockSpec((tile, width), lambda column, visit, step, tiles, *_: (tiles[visit], column)),
            scratch_shapes=[
                pltpu.VMEM((width, depth), rows.dtype),
                *(pltpu.VMEM((tile, width), jnp.float32) for _ in range(parts)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], n), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tpu.chip().vmem * 3 // 4
        ),
        cost_estimate=pl.CostEstimate(  # as if every group had rows
            flops=2 * m * n * k * parts,
            bytes_accessed=parts * min(m, group_sizes.shape[0]) * n * k + pl.cdiv(n, width) * m * k * rows.dtype.itemsize,
            transcendentals=m * n * (parts - 1),
        ),
        name="codes_matmul",
    )(*order, jnp.cumsum(group_sizes).astype(jnp.int32), rows, *[scales] * parts, *[codes] * parts)
    return out[:m]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _multiply(rows: jax.Array, matrices: Scaled, group_sizes: jax.Array, parts: int, dtype: Any) -> jax.Array:
    return _forward(rows, matrices, group_sizes, parts, dtype)


def _forward_and_keep(rows: jax.Array, matrices: Scaled, group_sizes: jax.Array, parts: int, dtype: Any) -> Any:
    return _forward(rows, matrices, group_sizes, parts, dtype), (rows, matrices, group_sizes)


def _backward(parts: int, dtype: Any, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    rows, matrices, group_sizes = residuals

    def by_decoded(rows: jax.Array) -> jax.Array:
        def multiply(rows: Any, matrices: Scaled, group_sizes: jax.Array) -> jax.Array:
            return jax.lax.ragged_dot(rows, jnp.swapaxes(dequantise(matrices, rows.dtype), 1, 2), group_sizes)

        product = multiply if parts == 1 else functools.partial(reference.scaled_swiglu_of, multiply)
        return product(rows, matrices, group_sizes).astype(dtype)

    return *jax.vjp(by_decoded, rows)[1](cotangent), None, None


_multiply.defvjp(_forward_and_keep, _backward)


def multiply(
    rows: jax.Array | Scaled, matrices: Scaled, group_sizes: jax.Array, parts: int = 1, dtype: Any = None
) -> jax.Array:
    """rows [M, K] by matrices [E, N, K] -> [M, N] in `dtype`; with two parts by gate and up [E, 2, N, K], activated."""
    if isinstance(rows, Scaled):
        rows = dequantise(rows, jnp.bfloat16)
    return _multiply(rows, matrices, group_sizes, parts, jnp.dtype(dtype or rows.dtype))


def grouped_matmul(rows: jax.Array | Scaled, matrices: Scaled, group_sizes: jax.Array) -> jax.Array:
    return multiply(rows, matrices, group_sizes)


def grouped_swiglu(rows: jax.Array | Scaled, gate_up: Scaled, group_sizes: jax.Array) -> jax.Array:
    return multiply(rows, gate_up, group_sizes, parts=2)
