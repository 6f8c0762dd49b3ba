"""indexer_topk: the lightning indexer's scores and the exact selection of the best k, as one operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.indexer_topk import reference

BACKENDS = {"xla": dispatch.Backend(reference.indexer_topk)}


def indexer_topk(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    *,
    k_select: int,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """For every query the positions of its `k_select` best keys.

    The score of key t is I = sum_h w_h relu(q_h . k_t), accumulated in float32, one head after the other; any scaling
    is folded into w by the caller. A key at position t is visible to a query at position p when t <= p and
    t < kv_length.

    Args:
      queries: [B, S, Hi, Di].
      keys: [B, T, Di], after normalisation and rope.
      head_weights: [B, S, Hi]; may be negative.
      k_select: k, at least 1.
      q_positions: [B, S] integers; a negative one (a padded query) sees no key.
      kv_lengths: [B] integers; how many of the T keys exist.
      implementation: None picks the best for the backend; "xla" runs anywhere and is the reference.

    Returns:
      [B, S, k_select] int32 positions, ascending, -1 in the tail where fewer are visible. Ties are cut lowest position
      first, a NaN or -inf score counts as the lowest, and -0 equals 0, so the result is one well-defined set.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    shapes = f"queries {queries.shape}, keys {keys.shape}, head_weights {head_weights.shape}"
    shapes += f", q_positions {q_positions.shape}, kv_lengths {kv_lengths.shape}"
    if queries.ndim != 4 or keys.ndim != 3:
        raise ValueError(f"indexer_topk: expected queries [B, S, Hi, Di] and keys [B, T, Di], got {shapes}")
    b, s, heads, width = queries.shape
    if (keys.shape[0], keys.shape[2]) != (b, width) or head_weights.shape != (b, s, heads):
        raise ValueError(f"indexer_topk: B, S, Hi or Di differ between {shapes}")
    if q_positions.shape != (b, s) or kv_lengths.shape != (b,):
        raise ValueError(f"indexer_topk: expected q_positions [B, S] and kv_lengths [B], got {shapes}")
    if k_select < 1:
        raise ValueError(f"indexer_topk: k_select {k_select} is below 1")
    return dispatch.call(
        "indexer_topk",
        BACKENDS,
        implementation,
        queries,
        keys,
        head_weights.astype(jnp.float32),
        k_select=k_select,
        q_positions=q_positions.astype(jnp.int32),
        kv_lengths=kv_lengths.astype(jnp.int32),
    )
