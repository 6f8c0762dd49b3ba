"""scaled_matmul on Hopper: the kernels of grouped_matmul with one group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import mosaic_gpu_codes
from pallas_kernels.grouped_matmul.mosaic_gpu_prefill import serves
from pallas_kernels.quant import Scaled, dequantise, single_group


def why_not(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> str | None:
    if dtype not in (None, jnp.bfloat16):
        return f"its result is bfloat16, not {jnp.dtype(dtype)}"
    return mosaic_gpu_codes.why_not(rows, *single_group(rows, matrix))


def quantises(rows: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return serves(rows.shape[0], 1)


def scaled_matmul(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> jax.Array:
    del dtype
    return _multiply(rows, matrix)


@jax.custom_vjp
def _multiply(rows: jax.Array | Scaled, matrix: Scaled) -> jax.Array:
    return mosaic_gpu_codes.grouped_matmul(rows, *single_group(rows, matrix))


def _forward_and_keep(rows: jax.Array | Scaled, matrix: Scaled) -> tuple[jax.Array, Scaled]:
    if isinstance(rows, Scaled):
        raise NotImplementedError("scaled_matmul: rows in 8 bits have no gradient")
    return _multiply(rows, matrix), matrix


def _backward(matrix: Scaled, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return cotangent @ dequantise(matrix, cotangent.dtype), None


_multiply.defvjp(_forward_and_keep, _backward)
