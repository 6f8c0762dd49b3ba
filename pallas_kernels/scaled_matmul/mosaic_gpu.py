"""scaled_matmul on Hopper: codes by codes, the kernel of grouped_matmul with one group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import mosaic_gpu_codes
from pallas_kernels.quant import Scaled, dequantise

MIN_ROWS = 128  # fewer do not fill the tiles


def why_not(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> str | None:
    if reason := mosaic_gpu_codes.why_not_codes(rows, matrix):
        return reason
    if dtype not in (None, jnp.bfloat16):
        return f"its result is bfloat16, not {jnp.dtype(dtype)}"
    if rows.shape[0] < MIN_ROWS:
        return f"{rows.shape[0]} rows do not fill its tiles"
    return None


def scaled_matmul(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> jax.Array:
    del dtype
    return _multiply(rows, matrix)


@jax.custom_vjp
def _multiply(rows: jax.Array | Scaled, matrix: Scaled) -> jax.Array:
    group_sizes = jnp.full((1,), rows.shape[0], jnp.int32)
    return mosaic_gpu_codes.grouped_matmul(rows, jax.tree.map(lambda x: x[None], matrix), group_sizes)


def _backward(matrix: Scaled, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return cotangent @ dequantise(matrix, cotangent.dtype), None


_multiply.defvjp(lambda rows, matrix: (_multiply(rows, matrix), matrix), _backward)
