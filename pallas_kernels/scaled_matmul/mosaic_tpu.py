"""scaled_matmul on TPU: the kernel of grouped_matmul with one group."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.grouped_matmul import mosaic_tpu_codes
from pallas_kernels.quant import Scaled, single_group


def why_not(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> str | None:
    return mosaic_tpu_codes.why_not(rows, *single_group(rows, matrix))


def scaled_matmul(rows: jax.Array | Scaled, matrix: Scaled, dtype: Any = None) -> jax.Array:
    return mosaic_tpu_codes.multiply(rows, *single_group(rows, matrix), dtype=dtype)
