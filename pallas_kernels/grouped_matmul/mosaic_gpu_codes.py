"""grouped_matmul on Hopper of matrices in 8 bits.

Where groups have many rows, those are quantised too and codes multiply codes (mosaic_gpu_codes_prefill); where they have few,
16-bit rows multiply converted codes (mosaic_gpu_codes_few_rows). Matrices are constants: only rows have gradients, by way of
the decoded matrices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import mosaic_gpu_codes_few_rows, mosaic_gpu_codes_prefill, reference
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill import serves
from pallas_kernels.quant import BLOCK, Scaled, dequantise
from pallas_kernels.quantised.api import quantise_rows

COLUMNS = 64  # those of a matrix are a multiple
Rows = jax.Array | Scaled


def why_not(rows: Rows, matrices: Scaled, group_sizes: jax.Array) -> str | None:
    if reason := hopper.why_not():
        return reason
    if matrices.dtype != jnp.float8_e4m3fn:
        return f"it multiplies by matrices in float8_e4m3fn, not {matrices.dtype}"
    if not isinstance(rows, Scaled) and rows.dtype != jnp.bfloat16:
        return f"it multiplies rows in bfloat16 or 8 bits, not {rows.dtype}"
    if matrices.by_row:
        return "the matrices have scales of single rows, not of blocks"
    *_, n, k = matrices.shape
    if k % BLOCK or n % COLUMNS:
        return f"K and N must be multiples of {BLOCK} and {COLUMNS}, they are {k} and {n}"
    return None if rows.shape[0] else "there are no rows"


def _in_codes(rows: Rows) -> Scaled:
    return rows if isinstance(rows, Scaled) else quantise_rows(rows)


@jax.custom_vjp
def grouped_matmul(rows: Rows, matrices: Scaled, group_sizes: jax.Array) -> jax.Array:
    if serves(rows.shape[0], matrices.shape[0]):
        return mosaic_gpu_codes_prefill.forward(_in_codes(rows), matrices, group_sizes)
    return mosaic_gpu_codes_few_rows.forward(rows, matrices, group_sizes)


def _forward_and_keep(rows: Rows, matrices: Scaled, group_sizes: jax.Array) -> Any:
    if isinstance(rows, Scaled):
        raise NotImplementedError("grouped_matmul: rows in 8 bits have no gradient")
    return grouped_matmul(rows, matrices, group_sizes), (matrices, group_sizes)


def _backward(residuals: tuple[Scaled, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    matrices, group_sizes = residuals
    return jax.lax.ragged_dot(cotangent, dequantise(matrices, cotangent.dtype), group_sizes), None, None


grouped_matmul.defvjp(_forward_and_keep, _backward)


def why_not_swiglu(rows: Rows, gate_up: Scaled, group_sizes: jax.Array) -> str | None:
    if gate_up.shape[2] % BLOCK:
        return f"gate and up must have a multiple of {BLOCK} columns, they have {gate_up.shape[2]}"
    return why_not(rows, gate_up, group_sizes)


def _swiglu(rows: Rows, gate_up: Scaled, group_sizes: jax.Array, coded: bool) -> Any:
    side_by_side = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, x.shape[-1]), gate_up)
    if serves(rows.shape[0], gate_up.shape[0]):
        return mosaic_gpu_codes_prefill.forward(_in_codes(rows), side_by_side, group_sizes, gated=True, coded=coded)
    gate, up = jnp.split(mosaic_gpu_codes_few_rows.forward(rows, side_by_side, group_sizes), 2, axis=1)
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def grouped_swiglu(rows: Rows, gate_up: Scaled, group_sizes: jax.Array) -> jax.Array:
    return _swiglu(rows, gate_up, group_sizes, coded=False)


def _in_two_products(rows: jax.Array, gate_up: Scaled, group_sizes: jax.Array) -> jax.Array:
    return reference.scaled_swiglu_of(grouped_matmul, rows, gate_up, group_sizes)


def _backward_swiglu(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    rows, *others = residuals
    _, pull = jax.vjp(lambda rows: _in_two_products(rows, *others), rows)
    return *pull(cotangent), None, None


grouped_swiglu.defvjp(lambda *args: (grouped_swiglu(*args), args), _backward_swiglu)


def why_not_mlp(rows: Rows, gate_up: Any, down: Any, group_sizes: jax.Array) -> str | None:
    if not (isinstance(gate_up, Scaled) and isinstance(down, Scaled)):
        return "it multiplies by matrices in 8 bits"
    return why_not_swiglu(rows, gate_up, group_sizes) or why_not(rows, down, group_sizes)


@jax.custom_vjp
def grouped_mlp(rows: Rows, gate_up: Scaled, down: Scaled, group_sizes: jax.Array) -> jax.Array:
    return grouped_matmul(_swiglu(rows, gate_up, group_sizes, coded=True), down, group_sizes)


def _backward_mlp(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None, None, None]:
    rows, gate_up, down, group_sizes = residuals
    _, pull = jax.vjp(lambda rows: grouped_matmul(grouped_swiglu(rows, gate_up, group_sizes), down, group_sizes), rows)
    return *pull(cotangent), None, None, None


grouped_mlp.defvjp(lambda *args: (grouped_mlp(*args), args), _backward_mlp)
