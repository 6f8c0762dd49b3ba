"""Where new tokens stand in their rows: what masks, caches and rotary embeddings are made from."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax.config import Config
from indexcache_jax.rope import CosSin, cos_sin


@flax.struct.dataclass
class Positions:
    """The positions of new tokens.

    queries [B, S] int32: each token's position in its row, -1 for padding. kv_lengths [B] int32: tokens of each row, the
    new ones included. cos_sin: rope's cosines and sines of the new tokens, [B, S, dr / 2] float32 each.
    """

    queries: jax.Array
    kv_lengths: jax.Array
    cos_sin: CosSin


def make_positions(starts: jax.Array, lengths: jax.Array, width: int, config: Config) -> Positions:
    """The positions of `width` right-padded tokens a row, of which lengths [B] count, after starts [B] earlier ones."""
    offsets = jnp.arange(width)
    queries = jnp.where(offsets < lengths[:, None], starts[:, None] + offsets, -1)
    return Positions(queries, starts + lengths, cos_sin(jnp.maximum(queries, 0), config))


def whole_rows(x: jax.Array, config: Config, lengths: jax.Array | None = None) -> Positions:
    """The positions of the right-padded rows x [B, S, ...], which nothing precedes; lengths [B] defaults to S everywhere."""
    batch, width = x.shape[:2]
    lengths = jnp.full((batch,), width, jnp.int32) if lengths is None else lengths
    return make_positions(jnp.zeros((batch,), jnp.int32), lengths, width, config)
