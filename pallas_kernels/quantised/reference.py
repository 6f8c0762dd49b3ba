"""The reference of rows in 8 bits: quant.quantise_rows of what a layer multiplies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Scaled, quantise_index, quantise_rows

__all__ = ["normalise_rows", "quantise_index_queries", "quantise_rows", "quantise_swiglu"]


def quantise_swiglu(gate_up: jax.Array) -> Scaled:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return quantise_rows(jax.nn.silu(gate) * up)


def normalised(rows: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight [K] times the first K numbers of rows [..., W] over their root mean square, in the dtype of `weight`."""
    wide = rows[..., : weight.shape[0]].astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (weight * wide.astype(rows.dtype)).astype(weight.dtype)


def normalise_rows(
    rows: jax.Array, weight: jax.Array, eps: float, *, plain: bool = True, in_8_bits: bool = True
) -> tuple[jax.Array | None, Scaled | None]:
    result = normalised(rows, weight, eps)
    return result if plain else None, quantise_rows(result) if in_8_bits else None


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = True) -> jax.Array:
    """x [..., R] with its pairs, neighbours or (j, j + R / 2), rotated by cos and sin [..., R / 2], in float32."""
    wide, half = x.astype(jnp.float32), x.shape[-1] // 2
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)


def quantise_index_queries(
    product: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool
) -> tuple[jax.Array, jax.Array]:
    dr = 2 * cos.shape[1]
    front = rotated(product[..., :dr], cos[:, None], sin[:, None], interleaved=interleaved).astype(product.dtype)
    return quantise_index(jnp.concatenate([front, product[..., dr:]], axis=-1))
