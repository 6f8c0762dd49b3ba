"""What every implementation of grouped_matmul is asked, and the answer in plain NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

# group sizes: even, with empty groups, all in one group, one row each, fewer rows than groups
SIZES = {
    "even": [32] * 4,
    "ragged": [0, 37, 1, 0, 90, 5, 0],
    "one group": [0, 0, 77],
    "single rows": [1] * 6,
    "decode": [0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
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
