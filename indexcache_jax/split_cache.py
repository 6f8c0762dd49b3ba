"""Selection and attention of few queries over a cache whose positions are split over devices, without gathering it.

A prompt's many queries are split over the same devices, which then gather a layer's positions once for all of them. For a
decode step that would move the whole cache at every layer. Here every device computes with its own positions for all
queries, and what the devices exchange is a few numbers a query, however long the cache:

- selection: the best k of each device's positions, with their scores. The k best of these are the k best of all.
- attention: each device's context and the log-sum-exp of its logits.

Every device then makes the same choice from the same numbers. The functions run within `sharding.on_each_device`; `ops` gives
them the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from indexcache_jax import sharding
from indexcache_jax.sharding import Exchange
from pallas_kernels import quant

# (queries, keys, head_weights, q_positions, kv_lengths, key_scales) -> positions and scores [B, S, k], as `indexer_topk`.
Candidates = Callable[..., tuple[jax.Array, jax.Array]]
# (scores [B, S, N], visible [B, S]) -> places [B, S, k] among the N, ascending, then -1.
Best = Callable[[jax.Array, jax.Array], jax.Array]
# (queries, latents, indices) -> context [B, S, H, C] and log-sum-exp [B, S, H], as `sparse_mla`.
Attend = Callable[..., tuple[jax.Array, jax.Array]]


def exchange(queries: jax.Array, cached: jax.Array | quant.Latents) -> Exchange | None:
    """What the devices exchange for queries [B, S, ...] that split the positions of `cached` [B, T, ...].

    None where every device computes with all positions: without a mesh, where nothing splits them or the devices do not divide
    them, and where the devices split the queries.
    """
    devices = sharding.devices_along("tokens")
    split = sharding.devices_along("queries")
    if cached.shape[1] % devices or (split > 1 and queries.shape[1] % split == 0):
        return None
    return sharding.exchange(cached.shape, ("batch",), "tokens", cached.shape[1])


def select(
    candidates: Candidates,
    best: Best,
    devices: Exchange,
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    key_scales: jax.Array | None,
) -> jax.Array:
    """The positions [B, S, k] that one device would select, from this device's part [B, T / n, Di] of the keys.

    A candidate that is visible comes before those that are not: of the n devices the first ones see all of their T / n keys,
    one sees the first few, the others none. So what `candidates` returns, one device after the other, is ascending too.
    """
    first = devices.index() * keys.shape[1]
    seen = jnp.maximum(q_positions - first, -1), jnp.maximum(kv_lengths - first, 0)
    positions, scores = candidates(queries, keys, head_weights, *seen, key_scales)
    positions = jnp.where(positions < 0, -1, positions + first)
    positions, scores = jax.lax.all_gather((positions, scores), devices.weights, axis=2, tiled=True)
    chosen = best(scores, jnp.sum(positions >= 0, axis=-1))
    return jnp.where(chosen < 0, -1, jnp.take_along_axis(positions, jnp.maximum(chosen, 0), axis=-1))


def attend(
    partial: Attend,
    devices: Exchange,
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
) -> jax.Array:
    """The context [B, S, H, C] of all selected latents, from this device's part [B, T / n, C + dr] of them.

    Parts are weighted by their share of the sum of exponentials and added up in float32; one without a selected latent has
    none.
    """
    own = indices - devices.index() * latents.shape[1]
    own = jnp.where((indices >= 0) & (own >= 0) & (own < latents.shape[1]), own, -1)
    context, lse = partial(queries, latents, own)
    of_all = jax.nn.logsumexp(jax.lax.all_gather(lse, devices.weights), axis=0)
    share = jnp.where(jnp.isneginf(of_all), 0.0, jnp.exp(lse - of_all))
    return jax.lax.psum(share[..., None] * context.astype(jnp.float32), devices.weights).astype(context.dtype)
