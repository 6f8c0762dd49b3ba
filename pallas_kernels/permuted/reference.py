"""The reference of permuted rows: gathers, and weighted sums of gathers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Scaled


def gather_rows(rows: jax.Array | Scaled, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[index], rows)


def sum_rows(
    rows: jax.Array, places: jax.Array, weights: jax.Array, added: tuple[jax.Array, ...] = (), dtype: Any = jnp.float32
) -> jax.Array:
    chosen = rows[places.reshape(-1)].reshape(*places.shape, -1).astype(jnp.float32)
    total = jnp.sum(chosen * weights[..., None], axis=1)
    for other in added:
        total = total + other.astype(jnp.float32)
    return total.astype(dtype)
