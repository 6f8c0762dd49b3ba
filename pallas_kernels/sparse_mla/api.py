"""sparse_mla: multi-query attention over selected latents, the absorbed form of multi-head latent attention.

For inference the latents may be kept in 8 bits, 580 bytes a token instead of 1152 at C+R = 512+64. A cache then holds
what `quant.quantise_latents` returns for new latents, float8_e4m3fn [B, T, C+R] and float32 scales [B, T]; queries are not
quantised:

    from pallas_kernels import quant
    codes, scales = quant.quantise_latents(latents)
    sparse_mla(queries, codes, indices, latent_scales=scales, ...)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla import gradient, reference


def _reference(
    queries: jax.Array, latents: jax.Array, indices: jax.Array, *, latent_scales: Any, return_lse: bool, **options: Any
) -> Any:
    if latent_scales is not None or return_lse:
        options |= {"latent_scales": latent_scales, "return_lse": return_lse}
        return reference.sparse_mla(queries, latents, indices, **options)
    return gradient.differentiable(reference.sparse_mla)(queries, latents, indices, options["scale"], options["value_dim"])


BACKENDS = {
    "mosaic_tpu": dispatch.imported("pallas_kernels.sparse_mla.mosaic_tpu", "sparse_mla"),
    "mosaic_gpu": dispatch.imported("pallas_kernels.sparse_mla.mosaic_gpu", "sparse_mla"),
    "triton": dispatch.imported("pallas_kernels.sparse_mla.triton", "sparse_mla"),
    "xla": dispatch.Backend(_reference),
}


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    implementation: str | None = None,
    latent_scales: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * q . kv[indices]) @ kv[indices, :value_dim], float32 inside, for every query and head.

    Args:
      queries: [B, S, H, C+R], already multiplied by the key up-projection.
      latents: [B, T, C+R]; one row serves all heads as key (all of it) and as value (its first `value_dim`).
      indices: [B, S, k] int32 positions in T; -1 marks an empty entry. The caller makes them causal.
      scale: of the logits.
      value_dim: C.
      implementation: None picks the best for the backend; "mosaic_tpu" is for TPUs, "mosaic_gpu" for Hopper, "triton" for
        older GPUs, "xla" runs anywhere and is the reference.
      latent_scales: [B, T] float32, for latents kept as float8_e4m3fn (`quant.quantise_latents`): a latent then is the product,
        rounded to the dtype of `queries`. For inference: no gradient reaches such latents.
      return_lse: also give the log-sum-exp of the logits, which attention to parts of the latents is merged by. For inference.

    Returns:
      [B, S, H, C] in the dtype of `queries`; zeros where all indices of a query are -1. Differentiable in queries and
      latents, deterministically. With return_lse also log(sum(exp(scale * q . kv[indices]))) [B, S, H] float32, -inf where
      all indices are -1.

    Raises:
      ValueError for shapes and dtypes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    shapes = f"queries {queries.shape}, latents {latents.shape}, indices {indices.shape}"
    if queries.ndim != 4 or latents.ndim != 3 or indices.ndim != 3:
        raise ValueError(f"sparse_mla: expected queries [B, S, H, C+R], latents [B, T, C+R], indices [B, S, k], got {shapes}")
    if (queries.shape[0], queries.shape[3]) != (latents.shape[0], latents.shape[2]) or queries.shape[:2] != indices.shape[:2]:
        raise ValueError(f"sparse_mla: B, S or C+R differ between {shapes}")
    if not 1 <= value_dim <= latents.shape[2]:
        raise ValueError(f"sparse_mla: value_dim {value_dim} is not between 1 and the latents' width {latents.shape[2]}")
    if (latent_scales is not None) != (latents.dtype == jnp.float8_e4m3fn):
        scales = "given" if latent_scales is not None else "missing"
        raise ValueError(f"sparse_mla: latent_scales go with float8_e4m3fn latents: {latents.dtype}, scales {scales}")
    if latent_scales is not None and latent_scales.shape != latents.shape[:2]:
        raise ValueError(f"sparse_mla: latent_scales must be {latents.shape[:2]}, one a token, got {latent_scales.shape}")
    return dispatch.call(
        "sparse_mla",
        BACKENDS,
        implementation,
        queries,
        latents,
        indices.astype(jnp.int32),
        scale=scale,
        value_dim=value_dim,
        latent_scales=latent_scales,
        return_lse=return_lse,
    )
