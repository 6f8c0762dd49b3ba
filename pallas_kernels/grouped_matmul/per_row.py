"""grouped_matmul for a few rows: every row times the matrix of its group, read in place.

A decode step has fewer rows than experts, and what counts is how many matrices are read. XLA fuses the choice of the
matrix into the sum, so this reads one for every row, where XLA's own ragged product reads the matrices of groups without
rows as well. XLA's sum down the columns is slow, so Hopper's kernel is preferred (docs/kernels.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.quant import Scaled, dequantise


def why_not(rows: jax.Array | Scaled, matrices: jax.Array | Scaled, group_sizes: jax.Array) -> str | None:
    if device.platform() == "tpu":
        return "on a TPU XLA would copy the matrices first"
    if 4 * rows.shape[0] > matrices.shape[0]:
        return f"{rows.shape[0]} rows are too many for {matrices.shape[0]} matrices: it reads one for every row"
    return None


def _group_of_row(group_sizes: jax.Array, rows: int) -> jax.Array:
    ends = jnp.cumsum(group_sizes)
    group = jnp.sum(ends <= jnp.arange(rows)[:, None], axis=1)  # one fused step, not a search
    return jnp.minimum(group, group_sizes.shape[0] - 1)


def grouped_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    own = matrices[_group_of_row(group_sizes, rows.shape[0])].astype(jnp.float32)
    return jnp.sum(rows.astype(jnp.float32)[:, :, None] * own, axis=1).astype(rows.dtype)


def grouped_matmul_of_codes(rows: jax.Array | Scaled, matrices: Scaled, group_sizes: jax.Array) -> jax.Array:
    """As `grouped_matmul`, matrices [E, N, K] in 8 bits."""
    dtype = jnp.bfloat16 if isinstance(rows, Scaled) else rows.dtype
    wide = dequantise(rows, jnp.float32) if isinstance(rows, Scaled) else rows.astype(jnp.float32)
    group = _group_of_row(group_sizes, rows.shape[0])
    own = dequantise(jax.tree.map(lambda stack: stack[group], matrices), jnp.float32)
    return jnp.sum(wide[:, None, :] * own, axis=2).astype(dtype)
