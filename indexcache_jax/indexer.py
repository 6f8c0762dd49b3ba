"""The lightning indexer of an F layer: small queries, one key per token, and a weight per head (SPEC.md 2.3).

Its rope comes first in the head dimension and its no-position part last, the opposite order of the main attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import pallas_kernels
from indexcache_jax.config import Config
from indexcache_jax.norm import layer_norm
from indexcache_jax.params import Indexer
from indexcache_jax.rope import rotate

Angles = tuple[jax.Array, jax.Array]


def _rotate_front(x: jax.Array, angles: Angles, config: Config) -> jax.Array:
    front, rest = x[..., : config.qk_rope_head_dim], x[..., config.qk_rope_head_dim :]
    return jnp.concatenate([rotate(front, *angles, interleaved=config.index_rope_interleave), rest], axis=-1)


def index_queries(p: Indexer, q_latent: jax.Array, angles: Angles, config: Config) -> jax.Array:
    """[B, S, R] normalised query latents -> [B, S, Hi, Di]."""
    return _rotate_front(jnp.einsum("bsr,rhd->bshd", q_latent, p.queries), angles, config)


def index_keys(p: Indexer, x: jax.Array, angles: Angles, config: Config) -> jax.Array:
    """[B, S, D] normalised layer input -> [B, S, Di], after layer norm and rope: what the cache holds."""
    return _rotate_front(layer_norm(x @ p.keys, p.key_norm, p.key_norm_bias), angles, config)


def head_weights(p: Indexer, x: jax.Array, config: Config) -> jax.Array:
    """[B, S, D] -> [B, S, Hi] float32, the scales Hi^-1/2 and Di^-1/2 of the score folded in.

    In float32 throughout: rounding to bfloat16 before the scale flips near-ties of the selection.
    """
    weights = jnp.einsum("bsd,dh->bsh", x.astype(jnp.float32), p.head_weights.astype(jnp.float32))
    return weights * (config.index_n_heads**-0.5 * config.index_head_dim**-0.5)


def select(
    p: Indexer,
    x: jax.Array,
    q_latent: jax.Array,
    keys: jax.Array,
    angles: Angles,
    positions: jax.Array,
    kv_lengths: jax.Array,
    config: Config,
) -> jax.Array:
    """The selected positions [B, S, min(index_topk, T)] of every query among index keys [B, T, Di]."""
    return pallas_kernels.indexer_topk(
        index_queries(p, q_latent, angles, config),
        keys,
        head_weights(p, x, config),
        k_select=min(config.index_topk, keys.shape[1]),
        q_positions=positions,
        kv_lengths=kv_lengths,
    )
