"""How much the selections of two layers have in common: |A n B| / k, the measure of the paper's heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise


@jax.jit
def shared(indices: jax.Array) -> jax.Array:
    """Sizes of the intersections [Q, N, N] of the selections [N, Q, k] of N layers (-1: none)."""
    n, q, k = indices.shape

    def of_query(rows: jax.Array) -> jax.Array:  # [N, k]
        # Both lists ascend, so a position is in the other one where a search finds it.
        def pair(a: jax.Array, b: jax.Array) -> jax.Array:
            places = jnp.minimum(jnp.searchsorted(b, a), k - 1)
            return jnp.sum((b[places] == a) & (a >= 0))

        filled = jnp.where(rows < 0, jnp.iinfo(jnp.int32).max, rows)
        return jax.vmap(lambda a: jax.vmap(lambda b: pair(a, b))(filled))(rows)

    return jax.lax.map(of_query, indices.swapaxes(0, 1), batch_size=16)


def spread(width: int, index_topk: int, count: int = 64) -> np.ndarray:
    """At most `count` positions, evenly spread over those of `width` that see more than index_topk keys.

    Before those everybody selects everything. ValueError where there is none.
    """
    if width <= index_topk:
        raise ValueError(f"rows of {width} tokens: no query sees more than index_topk = {index_topk} keys")
    return np.unique(np.linspace(index_topk, width - 1, count).astype(int))


def mean_overlap(selections: Sequence[np.ndarray], index_topk: int) -> np.ndarray:
    """Mean overlap [N, N] between the selections [N, Q, k] of N layers, of several batches."""
    sums = sum(np.asarray(jnp.sum(shared(jnp.asarray(found)), axis=0)) for found in selections)
    return sums / (sum(found.shape[1] for found in selections) * index_topk)


def overlap(params: Params, config: Config, schedule: Schedule, batches: Iterable[np.ndarray], queries: int = 64) -> np.ndarray:
    """Mean overlap [num_full, num_full] between the F layers' selections on tokens [B, S+1], at `queries` of `spread`."""
    selections = []
    for tokens in batches:
        picked = spread(tokens.shape[1] - 1, config.index_topk, queries)
        state = layerwise.start(params, jnp.asarray(tokens[:, :-1]), config)
        rows = []
        for layer, full in enumerate(schedule.is_full):
            state = layerwise.advance(params, state, jnp.int32(layer), jnp.array(full), config, schedule)
            if full:
                rows.append(state.indices[:, picked].reshape(-1, state.indices.shape[-1]))
        selections.append(np.asarray(jnp.stack(rows)))
    return mean_overlap(selections, config.index_topk)
