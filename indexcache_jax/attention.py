"""Multi-head latent attention over selected positions, absorbed and expanded (docs/model.md, Attention).

A token is remembered as one latent of width C + dr: its normalised compression c and one rotated key part shared by all
heads. The absorbed form moves the up-projections to the query and output side, so that the latent itself is key and
value of every head: what inference uses, since it reads 576 numbers a token instead of H (dn + dr + dv). The expanded
form builds every head's keys and values from the latents: fewer operations where most tokens are attended, and the form
whose attention probabilities training needs.

The `finish_` functions are what follows a product with a weight matrix. Params and serving weights multiply differently
and share them.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from indexcache_jax import ops
from indexcache_jax.config import Config
from indexcache_jax.norm import rms_norm
from indexcache_jax.params import Attention
from indexcache_jax.rope import CosSin, rotate


class HasUpProjections(Protocol):
    """What makes every head's keys and values from latents: k_up [H, dn, C] and v_up [H, C, dv]."""

    @property
    def k_up(self) -> jax.Array: ...
    @property
    def v_up(self) -> jax.Array: ...


def finish_query_latent(
    product: jax.Array, bias: jax.Array | None, norm: jax.Array, config: Config, dtype: Any = None
) -> jax.Array:
    """Query latents [B, S, R] from their projection [B, S, R]: bias and norm, in `dtype` or that of the product."""
    product = product if bias is None else product + bias
    return rms_norm(product, norm, config.latent_norm_eps).astype(dtype or product.dtype)


def finish_latent(
    product: jax.Array, bias: jax.Array | None, norm: jax.Array, cos_sin: CosSin, config: Config, dtype: Any = None
) -> jax.Array:
    """Latents [B, S, C + dr] from their projection: bias, the norm of the first C numbers, the rotation of the last dr.

    The result has `dtype` or that of the product.
    """
    product = product if bias is None else product + bias
    compressed, rope = product[..., : config.kv_lora_rank], product[..., config.kv_lora_rank :]
    compressed = rms_norm(compressed, norm, config.latent_norm_eps)
    return jnp.concatenate([compressed, rotate(rope, *cos_sin, interleaved=True)], axis=-1).astype(dtype or product.dtype)


def finish_queries(product: jax.Array, cos_sin: CosSin, config: Config) -> tuple[jax.Array, jax.Array]:
    """The no-position part [B, S, H, dn] and the rotated part [B, S, H, dr] of projected queries [B, S, H, dn + dr]."""
    nope, rope = product[..., : config.qk_nope_head_dim], product[..., config.qk_nope_head_dim :]
    return nope, rotate(rope, *cos_sin, interleaved=True)


def query_latents(p: Attention, x: jax.Array, config: Config) -> jax.Array:
    """[B, S, D] normalised layer input -> [B, S, R], normalised; the indexer reads them too."""
    return finish_query_latent(x @ p.q_down, p.q_down_bias, p.q_norm, config)


def queries(p: Attention, q_latent: jax.Array, cos_sin: CosSin, config: Config) -> tuple[jax.Array, jax.Array]:
    """[B, S, R] -> the no-position part [B, S, H, dn] and the rotated part [B, S, H, dr] of every head's query."""
    return finish_queries(jnp.einsum("bsr,rhd->bshd", q_latent, p.q_up), cos_sin, config)


def latents(p: Attention, x: jax.Array, cos_sin: CosSin, config: Config) -> jax.Array:
    """[B, S, D] normalised layer input -> [B, S, C+dr]: what the cache holds."""
    return finish_latent(x @ p.kv_down, p.kv_down_bias, p.kv_norm, cos_sin, config)


def attend(
    p: Attention, q_latent: jax.Array, latents: jax.Array, indices: jax.Array, cos_sin: CosSin, config: Config
) -> jax.Array:
    """The absorbed form over selected latents: q_latent [B, S, R], latents [B, T, C+dr], indices [B, S, k] -> [B, S, D]."""
    nope, rope = queries(p, q_latent, cos_sin, config)
    absorbed = jnp.concatenate([jnp.einsum("bshn,hnc->bshc", nope, p.k_up), rope], axis=-1)
    context = ops.attend(absorbed, latents, indices, config)
    return output(p, jnp.einsum("bshc,hcv->bshv", context, p.v_up))


def output(p: Attention, heads: jax.Array) -> jax.Array:
    """[B, S, H, dv] -> [B, S, D]."""
    out = jnp.einsum("bshv,hvd->bsd", heads, p.out)
    return out if p.out_bias is None else out + p.out_bias


def expand(p: HasUpProjections, latents: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Every head's keys [B, T, H, dn+dr] and values [B, T, H, dv] from latents [B, T, C+dr]."""
    compressed, rope = latents[..., : config.kv_lora_rank], latents[..., config.kv_lora_rank :]
    nope = jnp.einsum("btc,hnc->bthn", compressed, p.k_up)
    rope = jnp.broadcast_to(rope[:, :, None], (*nope.shape[:3], rope.shape[-1]))
    return jnp.concatenate([nope, rope], axis=-1), jnp.einsum("btc,hcv->bthv", compressed, p.v_up)


def attend_expanded(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Masked multi-head attention of a block of queries, and its probabilities averaged over the heads.

    queries [B, Q, H, dn+dr], keys [B, T, H, dn+dr], values [B, T, H, dv], mask [B, Q, T] (True: attended) ->
    [B, Q, H, dv] in the dtype of `values` and [B, Q, T] float32; a row that attends to nothing gives zeros.
    """
    logits = jnp.einsum("bqhd,bthd->bhqt", queries, keys, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(mask[:, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probabilities = weights / jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bhqt,bthv->bqhv", probabilities.astype(values.dtype), values)
    return out, jnp.mean(probabilities, axis=1)
