"""The reference indexer_topk in plain XLA.

A block of queries at a time: score the block against the keys head by head (the sum's order is part of the definition),
hide what a query may not see, take the k largest (lax.top_k prefers the lowest position among equals) and sort their
positions. Scores exist for one block only, at most SCORE_BYTES of them. Queries at the front of a causal prompt see few
keys, so each block is scored against the shortest of four prefixes of the keys that covers what it sees.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.blocks import map_queries

# Of float32 scores per batch row; independent of B, so that B cannot change a result. On a CPU a block stays in the cache.
SCORE_BYTES = {"cpu": 4 * 2**20, "other": 32 * 2**20}


def scores(queries: jax.Array, keys: jax.Array, head_weights: jax.Array, key_scales: jax.Array | None = None) -> jax.Array:
    """I = scale_t * sum_h w_h relu(q_h . k_t): queries [S, Hi, Di], keys [T, Di], head_weights [S, Hi] -> [S, T] float32.

    key_scales [T] go with 8-bit queries and keys, whose products are exact in float32.
    """
    if key_scales is not None:
        queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)

    def add_head(total: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        query, weight = head
        dots = jax.lax.dot_general(
            query, keys, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return total + weight[:, None] * jax.nn.relu(dots), None

    start = jnp.zeros((queries.shape[0], keys.shape[0]), jnp.float32)
    total = jax.lax.scan(add_head, start, (queries.transpose(1, 0, 2), head_weights.T))[0]
    return total if key_scales is None else total * key_scales


def comparable(scores: jax.Array) -> jax.Array:
    """Scores as the selection compares them: NaN loses against every number, and -0 equals 0."""
    return jnp.where(scores == 0, 0.0, jnp.where(jnp.isnan(scores), -jnp.inf, scores))


def scores_of(positions: jax.Array, scores: jax.Array) -> jax.Array:
    """What `return_scores` gives: of selected positions [..., k] the scores, which are among scores [..., T]."""
    chosen = jnp.take_along_axis(scores, jnp.maximum(positions, 0), axis=-1)
    return jnp.where(positions < 0, -jnp.inf, comparable(chosen))


def select(scores: jax.Array, visible: jax.Array, k: int) -> jax.Array:
    """Positions of the k best of scores [S, T], of which row i sees the first visible[i]: [S, k] ascending, then -1."""
    t = scores.shape[1]
    # What is not visible sits behind all that is, so the order of -inf among them never lets a hidden key in.
    scores = jnp.where(jnp.arange(t) < visible[:, None], comparable(scores), -jnp.inf)
    positions = jax.lax.top_k(scores, min(k, t))[1].astype(jnp.int32)
    positions = jnp.sort(jnp.where(positions < visible[:, None], positions, t), axis=1)
    positions = jnp.where(positions < t, positions, -1)
    return jnp.pad(positions, ((0, 0), (0, k - positions.shape[1])), constant_values=-1)


def indexer_topk(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    *,
    k_select: int,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    key_scales: jax.Array | None = None,
    return_scores: bool = False,
) -> Any:
    b, s, _, _ = queries.shape
    t = keys.shape[1]
    visible = jnp.clip(jnp.minimum(q_positions + 1, kv_lengths[:, None]), 0, t)
    prefixes = sorted({max(-(-t * part // 4), min(k_select, t)) for part in (1, 2, 3, 4)})

    def row(q: jax.Array, k: jax.Array, w: jax.Array, scales: jax.Array | None, seen: jax.Array) -> Any:
        of_keys = scores(q, k, w, scales)
        chosen = select(of_keys, seen, k_select)
        return (chosen, scores_of(chosen, of_keys)) if return_scores else chosen

    def block(q: jax.Array, w: jax.Array, seen: jax.Array) -> Any:  # [B, n, Hi, Di], [B, n, Hi], [B, n]
        def against(prefix: int) -> Any:
            scales = None if key_scales is None else key_scales[:, :prefix]
            return jax.vmap(row)(q, keys[:, :prefix], w, scales, seen)

        shortest = jnp.searchsorted(jnp.array(prefixes), jnp.max(seen))
        return jax.lax.switch(shortest, [functools.partial(against, prefix) for prefix in prefixes])

    budget = SCORE_BYTES.get(device.platform(), SCORE_BYTES["other"])
    rows = max(1, min(s, budget // (4 * max(t, 1))))
    return map_queries(block, (queries, head_weights, visible), rows)


def select_topk(scores: jax.Array, visible: jax.Array, *, k_select: int) -> jax.Array:
    return jax.vmap(functools.partial(select, k=k_select))(scores, visible)
