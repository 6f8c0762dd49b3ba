"""The cache of one batch: latents of every layer, index keys of F layers only (S layers own none; SPEC.md 3)."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule


@flax.struct.dataclass
class Cache:
    """A row's position t holds token t of that row; only the first lengths[b] positions count."""

    latents: jax.Array  # [L, B, T, C+dr]
    index_keys: jax.Array  # [num_full, B, T, Di]
    lengths: jax.Array  # [B] int32


def init_cache(config: Config, schedule: Schedule, batch: int, max_len: int, dtype: Any = jnp.bfloat16) -> Cache:
    """An empty cache for `batch` rows of at most `max_len` tokens. ValueError for sizes below 1."""
    if batch < 1 or max_len < 1:
        raise ValueError(f"init_cache: batch {batch} and max_len {max_len} must be at least 1")
    return Cache(
        latents=jnp.zeros((config.num_layers, batch, max_len, config.latent_dim), dtype),
        index_keys=jnp.zeros((schedule.num_full, batch, max_len, config.index_head_dim), dtype),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def write(buffer: jax.Array, layer: int, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Puts new [B, S, W] at positions [B, S] of buffer[layer] [B, T, W]; positions outside 0 .. T-1 are dropped.

    A negative position marks padding, so what stands there never reaches the cache.
    """
    rows = jnp.arange(new.shape[0])[:, None]
    places = jnp.where(positions < 0, buffer.shape[2], positions)
    return buffer.at[layer, rows, places].set(new.astype(buffer.dtype), mode="drop")
