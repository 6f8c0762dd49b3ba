"""What every implementation of grouped_matmul is asked, and the answer in plain NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant import Scaled, dequantise, quantise_matrix

# group sizes: even, with empty groups, all in one group, one row each, fewer rows than groups
SIZES = {
    "even": [32] * 4,
    "ragged": [0, 37, 1, 0, 90, 5, 0],
    "one group": [0, 0, 77],
    "single rows": [1] * 6,
    "decode": [0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
}

# enough rows a group for tiles of 128: whole ones, ragged, short and empty groups, all rows in one group, M not a multiple of 8
MANY_ROWS = {
    "whole": [128, 256],
    "ragged": [200, 0, 70, 37, 1, 129, 512],
    "short groups": [5, 63, 64, 65, 127, 540, 32],
    "short at the end": [700, 3, 0, 50],
    "one group": [0, 0, 399],
    "single row": [1, 300, 100],
}


def inputs(sizes, k: int, n: int, dtype=jnp.bfloat16):
    rng = np.random.default_rng(sum(sizes))
    rows = jnp.asarray(rng.normal(size=(sum(sizes), k)), dtype)
    return rows, jnp.asarray(rng.normal(size=(len(sizes), k, n)), dtype), jnp.asarray(sizes, jnp.int32)


def numpy_products(rows, matrices, sizes) -> np.ndarray:
    rows, matrices = np.asarray(rows, np.float64), np.asarray(matrices, np.float64)
    starts = np.cumsum([0, *sizes])
    return np.concatenate(
        [rows[start : start + size] @ matrices[i] for i, (start, size) in enumerate(zip(starts, sizes, strict=False))]
    )


def numpy_swiglu(rows, gate_up, sizes) -> np.ndarray:
    gate, up = (numpy_products(rows, gate_up[:, :, i], sizes) for i in range(2))
    return gate / (1 + np.exp(-gate)) * up


def scaled_inputs(sizes, k: int, n: int, dtype=jnp.bfloat16):
    """As `inputs`, with matrices in 8 bits [E, N, K]."""
    rows, _, group_sizes = inputs(sizes, k, 1, dtype)
    drawn = np.random.default_rng(k + n).normal(size=(len(sizes), n, k))
    return rows, quantise_matrix(jnp.asarray(drawn, jnp.float32)), group_sizes


def scaled_swiglu_inputs(sizes, k: int, width: int, dtype=jnp.bfloat16):
    """As `scaled_inputs`, with gate and up in 8 bits [E, 2, I, K]."""
    rows, _, group_sizes = scaled_inputs(sizes, k, 1, dtype)
    drawn = np.random.default_rng(width).normal(size=(len(sizes), 2, width, k)) / k**0.5
    return rows, quantise_matrix(jnp.asarray(drawn, jnp.float32)), group_sizes


def decoded(x) -> np.ndarray:
    """What codes and scales stand for, in float64; an array as it is."""
    return np.asarray(dequantise(x, jnp.float32) if isinstance(x, Scaled) else x, np.float64)


def numpy_scaled_products(rows, matrices, sizes) -> np.ndarray:
    """matrices [E, N, K] in 8 bits; rows may be."""
    return numpy_products(decoded(rows), decoded(matrices).swapaxes(1, 2), sizes)


def numpy_scaled_swiglu(rows, gate_up, sizes) -> np.ndarray:
    """gate_up [E, 2, I, K] in 8 bits; rows may be."""
    return numpy_swiglu(decoded(rows), np.moveaxis(decoded(gate_up), 3, 1), sizes)
