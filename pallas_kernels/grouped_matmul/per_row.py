"""grouped_matmul for a few rows: every row times the matrix of its group, read in place.

A decode step has fewer rows than experts, and what counts is how many matrices are read. XLA fuses the choice of the
matrix into the sum, so this reads one for every row, where XLA's own ragged product reads the matrices of groups without
rows as well. XLA's sum down the columns is slow, so Hopper's kernel is preferred (docs/kernels.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import device


def why_not(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> str | None:
    if device.platform() == "tpu":
        return "on a TPU XLA would copy the matrices first"
    if 4 * rows.shape[0] > matrices.shape[0]:
        return f"{rows.shape[0]} rows are too many for {matrices.shape[0]} matrices: it reads one for every row"
    return None


def grouped_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    ends = jnp.cumsum(group_sizes)
    group_of_row = jnp.sum(ends <= jnp.arange(rows.shape[0])[:, None], axis=1)  # one fused step, not a search
    products = rows.astype(jnp.float32)[:, :, None] * matrices[group_of_row].astype(jnp.float32)
    return jnp.sum(products, axis=1).astype(rows.dtype)
