"""Latents, index keys and index queries in 8 bits: a vector of codes and one float32 scale, whose product is the vector.

What a cache keeps and what operations take. Kernels that quantise on registers give the same codes and scales.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

E4M3_MAX = 448.0  # the largest finite float8_e4m3fn
INT8_MAX = 127.0
MIN_MAGNITUDE = 1e-4  # a vector's largest magnitude counts as at least this, so that zeros have a scale
INDEX_GROUP = 128  # elements that share a scale in published index caches: one index head


def quantise_index(x: jax.Array, *, rotate: bool = False) -> tuple[jax.Array, jax.Array]:
    """Index queries or keys in e4m3 with one power-of-two scale a vector, as DeepSeek-V3.2 serves them.

    Args:
      x: [..., Di].
      rotate: first multiply x by the Hadamard matrix, which spreads outliers. Scores stay the same if queries and keys both
        are rotated.

    Returns:
      float8_e4m3fn [..., Di] and scales [...] float32: max(|x|, 1e-4) / 448 rounded up to a power of two; NaN for a vector
      that is not finite, so that its scores count as the lowest.

    Raises:
      ValueError for Di above 128, and with `rotate` for a Di that is no power of two.
    """
    width = x.shape[-1]
    if width > INDEX_GROUP:
        raise ValueError(f"quantise_index: width {width} is above the {INDEX_GROUP} elements that share a scale")
    wide = x.astype(jnp.float32)
    if rotate:
        wide = jnp.matmul(wide, hadamard(width), precision=jax.lax.Precision.HIGHEST)
    mantissa, exponent = jnp.frexp(jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), MIN_MAGNITUDE) / E4M3_MAX)
    scales = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
    scales = jnp.where(jnp.all(jnp.isfinite(wide), axis=-1), scales, jnp.nan)
    return jnp.clip(wide / scales[..., None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scales


def hadamard(width: int) -> np.ndarray:
    """The orthogonal [width, width] matrix of entries +-width^-1/2. ValueError unless width is a power of two."""
    if width < 1 or width & (width - 1):
        raise ValueError(f"hadamard: width {width} is not a power of two")
    i = np.arange(width)
    signs = 1 - 2 * (np.bitwise_count(i[:, None] & i) % 2).astype(np.float32)
    return signs / np.float32(np.sqrt(width))


def quantise_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index queries or keys in int8 with one scale a vector, for chips without 8-bit floats (TPU v5).

    Args:
      x: [..., Di].

    Returns:
      int8 [..., Di] and scales [...] float32, max(|x|, 1e-4) / 127; their product is within half a scale of x. NaN for a
      vector that is not finite, so that its scores count as the lowest.
    """
    wide = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), MIN_MAGNITUDE) / INT8_MAX
    scales = jnp.where(jnp.all(jnp.isfinite(wide), axis=-1), scales, jnp.nan)
    return jnp.clip(jnp.round(wide / scales[..., None]), -INT8_MAX, INT8_MAX).astype(jnp.int8), scales


def quantise_latents(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents in e4m3 with one scale a token: 580 bytes a token instead of 1152 at C+R = 512+64.

    Args:
      latents: [..., C+R].

    Returns:
      float8_e4m3fn [..., C+R] and scales [...] float32. Each token's largest magnitude becomes 448; numbers down to 2**-15
      of it are kept within 1/16, smaller ones are lost.
    """
    wide = latents.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), MIN_MAGNITUDE) / E4M3_MAX
    return jnp.clip(wide / scales[..., None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn), scales


def dequantise_latents(latents: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The products of latents [..., C+R] and scales [...], rounded once, to `dtype`."""
    return (latents.astype(jnp.float32) * scales[..., None]).astype(dtype)


def dequantise_selected(
    latents: jax.Array, scales: jax.Array, indices: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Latents in `dtype` for a selection, and the selection's indices into them.

    All latents are dequantised where the queries select more rows than there are (prefill), else the selected ones (decode).

    Args:
      latents: float8_e4m3fn [B, T, C+R]. scales: [B, T]. indices: [B, S, k] int32 positions in T, -1 where empty.

    Returns:
      [B, T', C+R], and [B, S, k] int32 of which each index names the row that `indices` names in `latents`.
    """
    b, s, k = indices.shape
    if s * k >= latents.shape[1]:
        return dequantise_latents(latents, scales, dtype), indices
    rows = jnp.maximum(indices.reshape(b, s * k), 0)
    selected = jnp.take_along_axis(latents, rows[..., None], axis=1)
    selected = dequantise_latents(selected, jnp.take_along_axis(scales, rows, axis=1), dtype)
    order = jnp.arange(s * k, dtype=jnp.int32).reshape(s, k)
    return selected, jnp.where(indices >= 0, order, -1)
