"""Index queries and keys in 8 bits, as DeepSeek-V3.2 serves them: e4m3 with one power-of-two scale a vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MAX = 448.0  # the largest finite e4m3
TINY = 1e-4  # smallest magnitude a vector is scaled for
GROUP = 128  # elements that share a scale: one index head


def hadamard(width: int) -> np.ndarray:
    """The orthogonal [width, width] matrix of entries +-width^-1/2; width is a power of two."""
    if width < 1 or width & (width - 1):
        raise ValueError(f"hadamard: width {width} is not a power of two")
    i = np.arange(width)
    signs = 1 - 2 * (np.bitwise_count(i[:, None] & i) % 2).astype(np.float32)
    return signs / np.float32(np.sqrt(width))


def quantise(x: jax.Array, *, rotate: bool = False) -> tuple[jax.Array, jax.Array]:
    """x [..., Di] -> float8_e4m3fn [..., Di] and scales [...] float32, whose product is about x.

    A scale is max(|x|, 1e-4) / 448 rounded up to a power of two; a vector that is not finite gets NaN. With `rotate`, x
    first goes through the Hadamard matrix, which spreads outliers; products are kept if queries and keys both do.
    Raises ValueError for Di above 128, and with `rotate` for a Di that is no power of two.
    """
    width = x.shape[-1]
    if width > GROUP:
        raise ValueError(f"quantise: width {width} is above the {GROUP} elements that share a scale")
    wide = x.astype(jnp.float32)
    if rotate:
        wide = jnp.matmul(wide, hadamard(width), precision=jax.lax.Precision.HIGHEST)
    mantissa, exponent = jnp.frexp(jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), TINY) / MAX)
    scales = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
    scales = jnp.where(jnp.all(jnp.isfinite(wide), axis=-1), scales, jnp.nan)
    return jnp.clip(wide / scales[..., None], -MAX, MAX).astype(jnp.float8_e4m3fn), scales
