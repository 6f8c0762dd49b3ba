"""The reference scaled_matmul: the decoded matrix, multiplied."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Scaled, dequantise


def scaled_matmul(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> jax.Array:
    if isinstance(rows, Scaled):
        rows, dtype = dequantise(rows, jnp.float32), dtype or jnp.bfloat16
    exact = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    product = jnp.dot(rows, dequantise(matrix, rows.dtype).T, precision=exact, preferred_element_type=jnp.float32)
    return product.astype(dtype or rows.dtype)
