"""Overlap of two layers' selections: the share |A and B| / k of indices in both, as in the paper's heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import arguments
from indexcache_jax.config import Config
from indexcache_jax.params import Params, check_params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.evaluator import checked_batches


@jax.jit
def intersection_sizes(indices: jax.Array) -> jax.Array:
    """How many positions each two of N layers have both selected, [Q, N, N] int32.

    indices [N, Q, k]: the layers' selections for Q queries, ascending, -1 where fewer than k keys were visible.
    """
    k = indices.shape[-1]

    def of_query(rows: jax.Array) -> jax.Array:  # [N, k]
        # Both lists ascend, so a position is in the other one if a binary search finds it there.
        def pair(a: jax.Array, b: jax.Array) -> jax.Array:
            slots = jnp.minimum(jnp.searchsorted(b, a), k - 1)
            return jnp.sum((b[slots] == a) & (a >= 0))

        ascending = jnp.where(rows < 0, jnp.iinfo(jnp.int32).max, rows)
        return jax.vmap(lambda a: jax.vmap(lambda b: pair(a, b))(ascending))(rows)

    return jax.lax.map(of_query, indices.swapaxes(0, 1), batch_size=16)


def spread(width: int, index_topk: int, count: int = 64) -> np.ndarray:
    """At most `count` positions, ascending, spread evenly over those of `width` that see more than index_topk keys.

    Queries that see fewer keys select all of them in every layer. Raises ValueError where no query sees more.
    """
    if width <= index_topk:
        raise ValueError(f"rows of {width} tokens: no query sees more than index_topk = {index_topk} keys")
    return np.unique(np.linspace(index_topk, width - 1, count).astype(int))


def mean_overlap(selections: Sequence[np.ndarray], index_topk: int) -> np.ndarray:
    """The mean overlap [N, N] of each two of N layers, over all queries of several batches' selections [N, Q, k].

    ValueError where there are none.
    """
    if not selections:
        raise ValueError("selections: there are none")
    sizes = sum(np.asarray(jnp.sum(intersection_sizes(jnp.asarray(indices)), axis=0)) for indices in selections)
    return sizes / (sum(indices.shape[1] for indices in selections) * index_topk)


def layer_overlap(
    params: Params, config: Config, schedule: Schedule, batches: Iterable[np.ndarray], queries: int = 64
) -> np.ndarray:
    """The mean overlap [num_full, num_full] of the F layers' selections on batches of tokens [B, S+1].

    queries: how many positions of every row are compared, evenly spread over those with a choice (`spread`).
    Raises ValueError where no query sees more than index_topk keys, and for params and batches as `Evaluator` does.
    """
    check_params(params, config, schedule)
    arguments.integer("queries", queries, 1)
    selections = []
    for tokens in checked_batches(list(batches), config):
        compared = spread(tokens.shape[1] - 1, config.index_topk, queries)
        state = layerwise.start(params, layerwise.place(tokens[:, :-1]), config)
        by_layer = []
        for layer, full in enumerate(schedule.is_full):
            state = layerwise.advance(params, state, np.int32(layer), np.bool_(full), config, schedule)
            if full:
                by_layer.append(layerwise.selected(state, compared))
        selections.append(np.stack(by_layer))
    return mean_overlap(selections, config.index_topk)
