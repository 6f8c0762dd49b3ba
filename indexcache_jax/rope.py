"""Rotary position embedding: plain and yarn frequencies, both layouts of the rotated pairs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax.config import Config

CosSin = tuple[jax.Array, jax.Array]


def frequencies(config: Config) -> np.ndarray:
    """Angle per position of each rotated pair, [dr / 2] float64.

    Plain: theta^(-2j / dr). Yarn divides the slow ones by `factor` and blends linearly between the pairs that turn
    beta_fast and beta_slow times within the original context.
    """
    rope, dim = config.rope, config.qk_rope_head_dim
    plain = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.type == "default":
        return plain

    def pair_turning(times: float) -> float:
        return dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_turning(rope.beta_fast)), 0)
    high = min(math.ceil(pair_turning(rope.beta_slow)), dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / rope.factor * slow + plain * (1 - slow)


def cos_sin(positions: jax.Array, config: Config) -> CosSin:
    """Cosines and sines, [B, S, dr / 2] float32 each, of positions [B, S]; yarn's attention factor is in them."""
    theta = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(config), jnp.float32)
    return jnp.cos(theta) * config.rope.attention_factor, jnp.sin(theta) * config.rope.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotates the pairs of x [B, S, ..., dr] in float32 and returns x's dtype.

    Interleaved pairs are (x[2j], x[2j+1]); otherwise (x[j], x[j + dr / 2]). The result keeps the layout of x.
    """
    between = (1,) * (x.ndim - cos.ndim)
    cos, sin = (t.reshape(*t.shape[:2], *between, t.shape[-1]) for t in (cos, sin))
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    else:
        first, second = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
