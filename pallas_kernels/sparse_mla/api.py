"""sparse_mla: multi-query attention over selected latents, the absorbed form of multi-head latent attention.

For inference the latents may be kept in 8 bits, 644 bytes a token instead of 1152 at C+R = 512+64. A cache then holds
what `quant.quantise_latents` returns for new latents; queries are not quantised:

    from pallas_kernels import quant
    sparse_mla(queries, quant.quantise_latents(latents, value_dim=512), indices, value_dim=512, ...)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, quant
from pallas_kernels.sparse_mla import gradient, reference


def _reference(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    lengths: jax.Array | None,
    return_lse: bool,
    **options: Any,
) -> Any:
    del lengths  # the reference reads every entry of a list
    if isinstance(latents, quant.Latents) or return_lse:
        return reference.sparse_mla(queries, latents, indices, **options, return_lse=return_lse)
    return gradient.differentiable(reference.sparse_mla)(queries, latents, indices, options["scale"], options["value_dim"])


BACKENDS = {
    "mosaic_tpu": dispatch.imported("pallas_kernels.sparse_mla.mosaic_tpu", "sparse_mla"),
    "mosaic_gpu": dispatch.imported("pallas_kernels.sparse_mla.mosaic_gpu", "sparse_mla"),
    "triton": dispatch.imported("pallas_kernels.sparse_mla.triton", "sparse_mla"),
    "xla": dispatch.Backend(_reference),
}


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    lengths: jax.Array | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * q . kv[indices]) @ kv[indices, :value_dim], float32 inside, for every query and head.

    Args:
      queries: [B, S, H, C+R], already multiplied by the key up-projection.
      latents: [B, T, C+R]; one row serves all heads as key (all of it) and as value (its first `value_dim`). In 8 bits
        (`quant.Latents`) for inference: no gradient reaches such latents.
      indices: [B, S, k] int32 positions in T; -1 marks an empty entry. The caller makes them causal.
      scale: of the logits.
      value_dim: C.
      lengths: [B, S] int32, where the caller knows how many entries of a query's list come before its empty tail: entries from
        there on must be -1. A kernel then need not read the lists to find out; None where it has to.
      implementation: None picks the best for the backend; "mosaic_tpu" is for TPUs, "mosaic_gpu" for Hopper, "triton" for
        older GPUs, "xla" runs anywhere and is the reference.
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
    if lengths is not None and lengths.shape != indices.shape[:2]:
        raise ValueError(f"sparse_mla: lengths must be {indices.shape[:2]}, one a query, got {lengths.shape}")
    if not 1 <= value_dim <= latents.shape[2]:
        raise ValueError(f"sparse_mla: value_dim {value_dim} is not between 1 and the latents' width {latents.shape[2]}")
    if isinstance(latents, quant.Latents):
        kept = latents.codes.dtype, latents.rotary.dtype, latents.scales.dtype
        if kept != (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32):
            raise ValueError(
                f"sparse_mla: 8-bit latents are float8_e4m3fn, bfloat16 and float32, not {', '.join(map(str, kept))}"
            )
        rows = {x.shape[:2] for x in (latents.codes, latents.rotary, latents.scales)}
        if len(rows) > 1 or latents.scales.ndim != 2:
            raise ValueError(f"sparse_mla: codes, rotary numbers and scales of 8-bit latents are of different tokens: {rows}")
        if latents.codes.shape[-1] != value_dim:
            raise ValueError(f"sparse_mla: 8-bit latents have {latents.codes.shape[-1]} codes, not value_dim {value_dim}")
    elif latents.dtype == jnp.float8_e4m3fn:
        raise ValueError("sparse_mla: float8_e4m3fn latents have scales: quant.Latents")
    return dispatch.call(
        "sparse_mla",
        BACKENDS,
        implementation,
        queries,
        latents,
        indices.astype(jnp.int32),
        scale=scale,
        value_dim=value_dim,
        lengths=lengths,
        return_lse=return_lse,
    )
