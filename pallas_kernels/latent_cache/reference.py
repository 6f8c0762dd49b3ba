"""The reference of append_latents: norm, rotation, quant.quantise_latents, and a scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Latents, quantise_latents
from pallas_kernels.quantised.reference import normalised, rotated


def append_latents(
    cache: Latents,
    product: jax.Array,
    norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    *,
    start: int,
    eps: float,
) -> Latents:
    values, width = norm.shape[0], cache.shape[-1]
    compressed = normalised(product[..., start:], norm, eps)
    rope = rotated(product[..., start + values : start + width], cos, sin).astype(norm.dtype)
    new = quantise_latents(jnp.concatenate([compressed, rope], axis=-1), values)
    rows, columns = jnp.arange(cache.shape[0])[:, None], jnp.where(positions < 0, cache.shape[1], positions)
    return jax.tree.map(lambda kept, x: kept.at[rows, columns].set(x.astype(kept.dtype), mode="drop"), cache, new)
