"""The lightning indexer of an F layer: small queries, one key per token, and a weight per head (docs/model.md, Indexer).

Its rope comes first in the head dimension and its no-position part last, the opposite order of the main attention. The
`finish_` functions are what follows a product with a weight matrix; Params and serving weights share them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from indexcache_jax import ops
from indexcache_jax.config import Config
from indexcache_jax.norm import layer_norm
from indexcache_jax.params import Indexer
from indexcache_jax.positions import Positions
from indexcache_jax.rope import CosSin, rotate


def finish_queries(product: jax.Array, cos_sin: CosSin, config: Config) -> jax.Array:
    """Index queries [B, S, Hi, Di] from their projection, by rotating the first dr numbers of every head."""
    front, back = product[..., : config.qk_rope_head_dim], product[..., config.qk_rope_head_dim :]
    return jnp.concatenate([rotate(front, *cos_sin, interleaved=config.index_rope_interleave), back], axis=-1)


def finish_keys(
    product: jax.Array, norm: jax.Array, bias: jax.Array, cos_sin: CosSin, config: Config, dtype: Any = None
) -> jax.Array:
    """Index keys [B, S, Di] from their projection: layer norm and rope, in `dtype` or that of the product."""
    keys = finish_queries(layer_norm(product, norm, bias), cos_sin, config)
    return keys.astype(dtype or product.dtype)


def finish_head_weights(product: jax.Array, config: Config) -> jax.Array:
    """Head weights [B, S, Hi] float32 from their projection, with the scales of the score folded in."""
    return product * config.index_scale


def index_queries(p: Indexer, q_latent: jax.Array, cos_sin: CosSin, config: Config) -> jax.Array:
    """[B, S, R] normalised query latents -> [B, S, Hi, Di]."""
    return finish_queries(jnp.einsum("bsr,rhd->bshd", q_latent, p.queries), cos_sin, config)


def index_keys(p: Indexer, x: jax.Array, cos_sin: CosSin, config: Config) -> jax.Array:
    """[B, S, D] normalised layer input -> [B, S, Di], after layer norm and rope: what the cache holds."""
    return finish_keys(x @ p.keys, p.key_norm, p.key_norm_bias, cos_sin, config)


def head_weights(p: Indexer, x: jax.Array, config: Config) -> jax.Array:
    """[B, S, D] -> [B, S, Hi] float32, the scales Hi^-1/2 and Di^-1/2 of the score folded in.

    The product is in float32 throughout: rounding to bfloat16 before the scale flips near-ties of the selection.
    """
    product = jnp.einsum("bsd,dh->bsh", x.astype(jnp.float32), p.head_weights.astype(jnp.float32))
    return finish_head_weights(product, config)


def select(p: Indexer, x: jax.Array, q_latent: jax.Array, keys: jax.Array, positions: Positions, config: Config) -> jax.Array:
    """The positions [B, S, min(index_topk, T)] that every query selects among index keys [B, T, Di]."""
    queries = index_queries(p, q_latent, positions.cos_sin, config)
    return ops.select(queries, keys, head_weights(p, x, config), positions, config)
