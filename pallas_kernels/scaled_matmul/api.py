"""scaled_matmul: rows times a matrix in 8 bits with a scale a block."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.quant import Scaled
from pallas_kernels.scaled_matmul import mosaic_gpu, mosaic_tpu, reference

BACKENDS = {
    "mosaic_gpu_few_rows": dispatch.hopper_backend("pallas_kernels.scaled_matmul.mosaic_gpu_few_rows", "few_rows"),
    "mosaic_gpu": dispatch.Backend(mosaic_gpu.scaled_matmul, mosaic_gpu.why_not),
    "mosaic_tpu": dispatch.Backend(mosaic_tpu.scaled_matmul, mosaic_tpu.why_not),
    "xla": dispatch.Backend(reference.scaled_matmul),
}


def scaled_matmul(
    rows: jax.Array | Scaled, matrix: Scaled, *, dtype: Any = None, implementation: str | None = None
) -> jax.Array:
    """rows [M, K] times matrix [N, K] -> [M, N] in `dtype`, by default that of `rows`, bfloat16 for rows in 8 bits.

    Products are accumulated in float32. `implementation` None picks the best for the backend: on Hopper
    "mosaic_gpu_few_rows" for up to 16 rows and "mosaic_gpu", which quantises many bfloat16 rows first (quantise_rows),
    on TPU "mosaic_tpu", which decodes the matrix as it reads it, else "xla", the reference. The matrix is a constant
    without a gradient. Raises ValueError for shapes that do not fit, NotImplementedError where a named implementation
    cannot serve.
    """
    if rows.ndim != 2 or matrix.ndim != 2 or rows.shape[1] != matrix.shape[1]:
        raise ValueError(f"scaled_matmul: expected rows [M, K] and a matrix [N, K], got {rows.shape} and {matrix.shape}")
    matrix = jax.lax.stop_gradient(matrix)
    return dispatch.call("scaled_matmul", BACKENDS, implementation, rows, matrix, dtype=dtype)


def quantises(rows: jax.Array | jax.ShapeDtypeStruct, matrix: Scaled, dtype: Any = None) -> bool:
    """Whether scaled_matmul would quantise rows [M, K], as codes that several products may share."""
    return dispatch.best(BACKENDS, rows, matrix, dtype=dtype) == "mosaic_gpu" and mosaic_gpu.quantises(rows)
