"""The reference of rows in 8 bits: quant.quantise_rows of what a layer multiplies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Scaled, quantise_rows

__all__ = ["normalise_rows", "quantise_rows", "quantise_swiglu"]


def quantise_swiglu(gate_up: jax.Array) -> Scaled:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return quantise_rows(jax.nn.silu(gate) * up)


def normalise_rows(
    rows: jax.Array, weight: jax.Array, eps: float, *, plain: bool = True, in_8_bits: bool = True
) -> tuple[jax.Array | None, Scaled | None]:
    wide = rows[:, : weight.shape[0]].astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normalised = (weight * wide.astype(rows.dtype)).astype(weight.dtype)
    return normalised if plain else None, quantise_rows(normalised) if in_8_bits else None
