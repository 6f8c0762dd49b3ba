"""What an indexer learns: how far its scores are from attention, in blocks of queries that need little memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from indexcache_jax.sharding import devices_along
from pallas_kernels.blocks import block_rows, map_queries

SCORE_BYTES = 512 * 2**20  # of float32 attention and index logits at once, of all heads and rows of one block of queries
# Queries see only keys before them, so from CAUSAL_FROM tokens on a row is cut into CAUSAL_PARTS parts: the queries of the
# first quarter need no product with the keys of the other three. Not where devices share a row: each has early and late ones.
CAUSAL_PARTS, CAUSAL_FROM = 4, 1024


def index_scores(queries: jax.Array, keys: jax.Array, head_weights: jax.Array) -> jax.Array:
    """Scores I [B, Q, T] float32 of index queries [B, Q, Hi, Di] with head weights [B, Q, Hi] for index keys [B, T, Di].

    docs/model.md, Indexer.
    """
    dots = jnp.einsum("bqhd,btd->bqht", queries, keys, preferred_element_type=jnp.float32)
    return jnp.einsum("bqht,bqh->bqt", jax.nn.relu(dots), head_weights)


def divergence(target: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(target || softmax of the scores within the mask) of every query in nats: [B, Q, T] x 3 -> [B, Q].

    The target is a distribution within the mask, zeros outside. A query whose mask is empty gets 0.
    """
    return cross_entropy(target, scores, mask) - entropy(target)


def cross_entropy(target: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """What of `divergence` depends on the scores."""
    any_key = jnp.any(mask, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, jnp.where(any_key, -jnp.inf, 0.0)), axis=-1)
    return -jnp.sum(target * jnp.where(mask, log_q, 0.0), axis=-1)


def entropy(target: jax.Array) -> jax.Array:
    """The entropies [...] of distributions [..., T], in nats."""
    return -jnp.sum(jax.scipy.special.xlogy(target, target), axis=-1)


def averaged_divergence(targets: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(mean of the targets [n, B, Q, T] || softmax of the scores within the mask): [B, Q] (paper 3.2, averaged form).

    Its gradient is that of the mean of `divergence` over the targets, which is larger by their Jensen-Shannon divergence.
    Training takes the sum of divergences, or where kernels run, adds targets up layer by layer and takes this.
    """
    return divergence(jnp.mean(targets, axis=0), scores, mask)


def selection_mask(indices: jax.Array, num_keys: int) -> jax.Array:
    """Which of num_keys = T keys are selected, [B, Q, T] bool, by indices [B, Q, k] (-1 selects nothing)."""
    batch, query = (jax.lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (0, 1))
    keys = jnp.where(indices < 0, num_keys, indices)
    return jnp.zeros((*indices.shape[:2], num_keys), bool).at[batch, query, keys].set(True, mode="drop")


def map_causal(
    block: Callable[..., Any], per_query: tuple[Any, ...], keys: int, heads: int, most_rows: int | None = None
) -> Any:
    """`block(t, *inputs)` over blocks of queries that see at most the first t of `keys` keys, recomputed in the backward pass.

    per_query: trees of arrays [B, S, ...] of queries that stand in the order of their positions, unless devices share them.
    heads: scores that a block has for every query and key, which bound its rows, as `most_rows` does. Returns what the blocks
    do, for all queries.
    """
    b, s = jax.tree.leaves(per_query)[0].shape[:2]
    parts = CAUSAL_PARTS if keys >= CAUSAL_FROM and devices_along("queries") == 1 else 1
    found = []
    for first, stop in itertools.pairwise(i * s // parts for i in range(parts + 1)):
        part = jax.tree.map(lambda x, first=first, stop=stop: x[:, first:stop], per_query)
        seen = keys if parts == 1 else stop
        rows = block_rows(stop - first, 4 * b * seen * heads, SCORE_BYTES)
        rows = rows if most_rows is None else min(rows, most_rows)
        found.append(map_queries(jax.checkpoint(functools.partial(block, seen)), part, rows))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *found)
