"""Index queries and keys in int8, for chips without 8-bit floats (TPU v5): one float32 scale a vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX = 127.0
TINY = 1e-4  # smallest magnitude a vector is scaled for


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., Di] -> int8 [..., Di] and scales [...] float32, whose product is within half a scale of x.

    A scale is max(|x|, 1e-4) / 127; a vector that is not finite gets NaN, so that its scores count as the lowest.
    """
    wide = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), TINY) / MAX
    scales = jnp.where(jnp.all(jnp.isfinite(wide), axis=-1), scales, jnp.nan)
    return jnp.clip(jnp.round(wide / scales[..., None]), -MAX, MAX).astype(jnp.int8), scales
