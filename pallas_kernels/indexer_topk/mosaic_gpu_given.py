"""select_topk on Hopper: the selection kernel of indexer_topk over scores that are given, which have no block maxima."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.indexer_topk import mosaic_gpu

MULTIPLE = 64  # of a row's width


def why_not(scores: jax.Array, visible: jax.Array, *, k_select: int) -> str | None:
    if reason := hopper.why_not():
        return reason
    if k_select > mosaic_gpu.MAX_K or scores.shape[2] > mosaic_gpu.MAX_KEYS:
        return f"it selects up to {mosaic_gpu.MAX_K} of {mosaic_gpu.MAX_KEYS} scores, not {k_select} of {scores.shape[2]}"
    if 0 in scores.shape:
        return "there is nothing to select from"
    return None


def select_topk(scores: jax.Array, visible: jax.Array, *, k_select: int) -> jax.Array:
    from pallas_kernels.indexer_topk import mosaic_gpu_select

    b, _, t = scores.shape
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, -t % MULTIPLE)))
    lengths = jnp.full((b,), t, jnp.int32)
    return mosaic_gpu_select.select(scores, None, visible - 1, lengths, k_select, clean=False, keys=t)
