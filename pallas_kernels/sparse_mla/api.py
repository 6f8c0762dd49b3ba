"""sparse_mla: multi-query attention over selected latents, the absorbed form of multi-head latent attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla import reference

BACKENDS = {"xla": dispatch.Backend(reference.sparse_mla)}


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * q . kv[indices]) @ kv[indices, :value_dim], float32 inside, for every query and head.

    Args:
      queries: [B, S, H, C+R], already multiplied by the key up-projection.
      latents: [B, T, C+R]; one row serves all heads as key (all of it) and as value (its first `value_dim`).
      indices: [B, S, k] int32 positions in T; -1 marks an empty place. They already are causal.
      scale: of the logits.
      value_dim: C.
      implementation: None picks the best for the backend; "xla" runs anywhere and is the reference.

    Returns:
      [B, S, H, C] in the dtype of `queries`; zeros where all indices of a query are -1.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    shapes = f"queries {queries.shape}, latents {latents.shape}, indices {indices.shape}"
    if queries.ndim != 4 or latents.ndim != 3 or indices.ndim != 3:
        raise ValueError(f"sparse_mla: expected queries [B, S, H, C+R], latents [B, T, C+R], indices [B, S, k], got {shapes}")
    if (queries.shape[0], queries.shape[3]) != (latents.shape[0], latents.shape[2]) or queries.shape[:2] != indices.shape[:2]:
        raise ValueError(f"sparse_mla: B, S or C+R differ between {shapes}")
    if not 1 <= value_dim <= latents.shape[2]:
        raise ValueError(f"sparse_mla: value_dim {value_dim} is not between 1 and the latents' width {latents.shape[2]}")
    return dispatch.call(
        "sparse_mla", BACKENDS, implementation, queries, latents, indices.astype(jnp.int32), scale=scale, value_dim=value_dim
    )
