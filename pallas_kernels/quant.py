"""Numbers in 8 bits: codes, and scales whose products with them are the numbers.

Index keys and index queries have one float32 scale a vector, and so have latents (`Latents`), whose rotary numbers stay
bfloat16: what a cache keeps and what operations take. Weights and activations (`Scaled`) have one for every 128 x 128 or 128
codes. Kernels that quantise on registers give the same codes and scales.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

E4M3_MAX = 448.0  # the largest finite float8_e4m3fn
INT8_MAX = 127.0
MIN_MAGNITUDE = 1e-4  # a vector's largest magnitude counts as at least this, so that zeros have a scale
INDEX_GROUP = 128  # elements that share a scale in published index caches: one index head
BLOCK = 128  # a scale of published fp8 weights is that of 128 x 128 codes, one of an activation that of 128 codes


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents in 8 bits, scale * [codes, rotary]: 644 bytes a token instead of 1152 at C+R = 512+64.

    The rotary numbers keep 16 bits: rounding these few to 8 would change predictions more than rounding all the others
    (docs/model.md). A scale serves all of a token, so that it factors out of products with latents.

    codes: float8_e4m3fn [..., C]. rotary: bfloat16 [..., R]. scales: float32 [...], positive.
    """

    codes: Any
    rotary: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., C+R]."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] + self.rotary.shape[-1])

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> Any:
        return self.codes.dtype


def quantise_latents(latents: jax.Array, value_dim: int) -> Latents:
    """Latents [..., C+R] in 8 bits, C = value_dim.

    The largest magnitude of a token's C numbers, at least 1e-4, becomes 448; numbers down to 2**-15 of it are kept within
    1/16, smaller ones are lost.
    """
    wide = latents.astype(jnp.float32)
    values = wide[..., :value_dim]
    scales = jnp.maximum(jnp.max(jnp.abs(values), axis=-1), MIN_MAGNITUDE) / E4M3_MAX
    codes = jnp.clip(values / scales[..., None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return Latents(codes, (wide[..., value_dim:] / scales[..., None]).astype(jnp.bfloat16), scales)


def dequantise_latents(latents: Latents, dtype: Any) -> jax.Array:
    """[..., C+R], products rounded once, to `dtype`."""
    both = jnp.concatenate([latents.codes.astype(jnp.float32), latents.rotary.astype(jnp.float32)], axis=-1)
    return (both * latents.scales[..., None]).astype(dtype)


def dequantise_selected(latents: Latents, indices: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Latents in `dtype` for a selection, and the selection's indices into them.

    All latents are dequantised where the queries select more rows than there are (prefill), else the selected ones (decode).

    Args:
      latents: [B, T, C+R].
      indices: [B, S, k] int32 positions in T, -1 where empty.

    Returns:
      [B, T', C+R], and [B, S, k] int32 of which each index names the row that `indices` names in `latents`.
    """
    b, s, k = indices.shape
    if s * k >= latents.shape[1]:
        return dequantise_latents(latents, dtype), indices
    rows = jnp.maximum(indices.reshape(b, s * k), 0)
    selected = jax.tree.map(lambda x: jnp.take_along_axis(x, rows.reshape(b, s * k, *[1] * (x.ndim - 2)), axis=1), latents)
    order = jnp.arange(s * k, dtype=jnp.int32).reshape(s, k)
    return dequantise_latents(selected, dtype), jnp.where(indices >= 0, order, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Numbers in 8 bits: float8_e4m3fn codes [..., N, K] and multipliers of groups of them.

    scales: [..., N, ceil(K / 128)], one for 128 codes of a row, as activations have them; or
    [..., ceil(N / 128), ceil(K / 128)], one for a block of 128 x 128, as published weights have them. Blocks are cut from
    the top left, so the last ones may be smaller. float32, or a narrower type of a checkpoint: bfloat16, float8_e8m0fnu, or
    the exponents of the latter as uint8.
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return self.codes.dtype

    @property
    def by_row(self) -> bool:
        """Whether every row has scales of its own. ValueError where the scales fit the codes neither way."""
        *stacked, rows, columns = self.codes.shape
        if self.scales.shape == (*stacked, rows, -(-columns // BLOCK)):
            return True
        if self.scales.shape == (*stacked, -(-rows // BLOCK), -(-columns // BLOCK)):
            return False
        raise ValueError(f"Scaled: scales {self.scales.shape} are not those of codes {self.codes.shape} in blocks of {BLOCK}")


def single_group(rows: jax.Array | Scaled, matrix: Scaled) -> tuple[Scaled, jax.Array]:
    """matrix [N, K] as a stack [1, N, K] of which all rows [M, K] are one group, and that group's size [1]."""
    return jax.tree.map(lambda x: x[None], matrix), jnp.full((1,), rows.shape[0], jnp.int32)


def float_scales(scales: jax.Array) -> jax.Array:
    """Scales in float32, exactly, from any of the types that `Scaled` may keep them in."""
    if scales.dtype == jnp.uint8:
        scales = jax.lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu)
    return scales.astype(jnp.float32)


def quantise_rows(x: jax.Array) -> Scaled:
    """Activations x [..., K] in 8 bits, with a float32 scale for every 128 numbers of a row: max(|x|, 1e-4) / 448.

    A group that is not finite has the scale NaN, so that products with it are NaN too. Both divisions are written as products
    with an inverse, so that kernels, for which a division is many instructions, give the same bits.
    """
    *rows, width = x.shape
    groups = -(-width // BLOCK)
    wide = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(rows) + [(0, groups * BLOCK - width)])
    wide = wide.reshape(*rows, groups, BLOCK)
    largest = jnp.max(jnp.abs(wide), axis=-1)  # NaN where a number is
    scales = row_scales(largest)
    codes = jnp.clip(wide * (1.0 / scales)[..., None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return Scaled(codes.reshape(*rows, groups * BLOCK)[..., :width], scales)


def row_scales(largest: jax.Array) -> jax.Array:
    """The scales of groups of 128 activations whose largest magnitudes these are; NaN where they are not finite."""
    return jnp.where(largest < jnp.inf, jnp.maximum(largest, MIN_MAGNITUDE) * jnp.float32(1 / E4M3_MAX), jnp.nan)


def quantise_matrix(w: jax.Array) -> Scaled:
    """Weights w [..., N, K] in 8 bits, with a float32 scale for every block of 128 x 128: max |w| / 448, 1 for zeros."""
    *stacked, rows, columns = w.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padding = [(0, 0)] * len(stacked) + [(0, down * BLOCK - rows), (0, across * BLOCK - columns)]
    blocks = jnp.pad(w.astype(jnp.float32), padding).reshape(*stacked, down, BLOCK, across, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=(-3, -1))
    scales = jnp.where(largest > 0, largest / E4M3_MAX, 1.0)
    codes = jnp.clip(blocks / scales[..., :, None, :, None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return Scaled(codes.reshape(*stacked, down * BLOCK, across * BLOCK)[..., :rows, :columns], scales)


def dequantise(x: Scaled, dtype: Any) -> jax.Array:
    """The products of codes and scales, [..., N, K], rounded once, to `dtype`."""
    *_, rows, columns = x.codes.shape
    scales = float_scales(x.scales)
    if not x.by_row:
        scales = jnp.repeat(scales, BLOCK, axis=-2)[..., :rows, :]
    scales = jnp.repeat(scales, BLOCK, axis=-1)[..., :columns]
    return (x.codes.astype(jnp.float32) * scales).astype(dtype)
