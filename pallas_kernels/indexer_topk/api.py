"""indexer_topk: the lightning indexer's scores and the exact selection of the best k, as one operation.

Keys may be kept in 8 bits, about half of a bfloat16 cache. It then holds what `quant.quantise_index` returns for the keys,
float8_e4m3fn [B, T, Di] and float32 scales [B, T]; queries are quantised when they are made, and their scales, which
are positive, go through relu into the head weights:

    from pallas_kernels import quant
    small_queries, query_scales = quant.quantise_index(queries)  # [B, S, Hi, Di], [B, S, Hi]
    indexer_topk(small_queries, small_keys, head_weights * query_scales, key_scales=key_scales, ...)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.indexer_topk import reference

BACKENDS = {
    "mosaic_tpu": dispatch.imported("pallas_kernels.indexer_topk.mosaic_tpu", "indexer_topk"),
    "mosaic_gpu": dispatch.imported("pallas_kernels.indexer_topk.mosaic_gpu", "indexer_topk"),
    "triton": dispatch.imported("pallas_kernels.indexer_topk.triton", "indexer_topk"),
    "xla": dispatch.Backend(reference.indexer_topk),
}
SELECT_BACKENDS = {
    "mosaic_gpu": dispatch.imported("pallas_kernels.indexer_topk.mosaic_gpu_given", "select_topk"),
    "xla": dispatch.Backend(reference.select_topk),
}


def indexer_topk(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    *,
    k_select: int,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    implementation: str | None = None,
    key_scales: jax.Array | None = None,
    return_scores: bool = False,
) -> Any:
    """For every query the positions of its `k_select` best keys.

    The score of key t is I = sum_h w_h relu(q_h . k_t), accumulated in float32; any scaling is folded into w by the
    caller. A key at position t is visible to a query at position p when t <= p and t < kv_length.

    Args:
      queries: [B, S, Hi, Di].
      keys: [B, T, Di], after normalisation and rope.
      head_weights: [B, S, Hi]; may be negative.
      k_select: k, at least 1.
      q_positions: [B, S] integers; a negative one (a padded query) sees no key.
      kv_lengths: [B] integers; how many of the T keys exist.
      implementation: None picks the best for the backend; "mosaic_tpu" is for TPUs, "mosaic_gpu" for Hopper, "triton" for
        older GPUs, "xla" runs anywhere and is the reference.
      key_scales: [B, T] float32, for queries and keys in float8_e4m3fn (`quant.quantise_index`) or int8
        (`quant.quantise_int8`): the score of key t is multiplied by its scale. The scales of the queries are folded into
        head_weights by the caller.
      return_scores: also give the scores of the positions, which selections from parts of the keys are merged by.

    Returns:
      [B, S, k_select] int32 positions, ascending, -1 in the tail where fewer are visible. Ties are cut lowest position
      first, a NaN or -inf score counts as the lowest, and -0 equals 0, so the result is one well-defined set. With
      return_scores also their scores [B, S, k_select] float32 as they are compared: -inf for a NaN, 0 for a -0; -inf in the
      tail.

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
    if (key_scales is not None) != (keys.dtype in (jnp.float8_e4m3fn, jnp.int8)) or (
        key_scales is not None and queries.dtype != keys.dtype
    ):
        scales = "given" if key_scales is not None else "missing"
        kinds = f"queries {queries.dtype}, keys {keys.dtype}, key_scales {scales}"
        raise ValueError(f"indexer_topk: key_scales go with float8_e4m3fn or int8 queries and keys: {kinds}")
    if key_scales is not None and key_scales.shape != keys.shape[:2]:
        raise ValueError(f"indexer_topk: key_scales must be {keys.shape[:2]}, one a key, got {key_scales.shape}")
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
        key_scales=key_scales,
        return_scores=return_scores,
    )


def select_topk(scores: jax.Array, visible: jax.Array, *, k_select: int, implementation: str | None = None) -> jax.Array:
    """The selection of `indexer_topk` from given scores.

    Args:
      scores: [B, S, T] float32.
      visible: [B, S] integers; a query sees the first so many of its T scores.
      k_select: k, at least 1.
      implementation: None picks the best for the backend; "mosaic_gpu" is for Hopper, "xla" runs anywhere.

    Returns:
      [B, S, k_select] int32 positions, as `indexer_topk` returns them.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    if scores.ndim != 3 or visible.shape != scores.shape[:2]:
        raise ValueError(f"select_topk: expected scores [B, S, T] and visible [B, S], got {scores.shape} and {visible.shape}")
    if k_select < 1:
        raise ValueError(f"select_topk: k_select {k_select} is below 1")
    arguments = scores.astype(jnp.float32), jnp.clip(visible, 0, scores.shape[2]).astype(jnp.int32)
    return dispatch.call("select_topk", SELECT_BACKENDS, implementation, *arguments, k_select=k_select)
