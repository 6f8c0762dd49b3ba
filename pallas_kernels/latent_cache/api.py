"""append_latents: the latents of new tokens, from their projection to a cache in 8 bits."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.latent_cache import reference
from pallas_kernels.quant import Latents

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.latent_cache.mosaic_gpu", "append_latents"),
    "xla": dispatch.Backend(reference.append_latents),
}


def append_latents(
    cache: Latents,
    product: jax.Array,
    norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    *,
    start: int,
    eps: float,
    implementation: str | None = None,
) -> Latents:
    """The cache with the latents of new tokens, in the codes of quant.quantise_latents, at their positions.

    Args:
      cache: [B, T, C + R].
      product: [B, S, W] float32, of which the C + R numbers from `start` on are the tokens' projections.
      norm: [C], the weight with which the first C numbers are normalised; latents are rounded to its dtype before the codes.
      cos, sin: [B, S, R / 2] float32, by which pairs of neighbours among the last R numbers are rotated.
      positions: [B, S] int32; tokens outside 0 .. T - 1 are dropped.
      eps: added to the mean of squares.
      implementation: "mosaic_gpu" on Hopper, which writes in place where `cache` is not used again, else "xla", the
        reference; None picks.

    Raises:
      ValueError for shapes that do not fit, NotImplementedError where a named implementation cannot serve.
    """
    (b, _, width), values = cache.shape, norm.shape[-1]
    tokens, half = positions.shape, (width - values) // 2
    fits = product.shape[:2] == tokens and start + width <= product.shape[-1] and tokens[0] == b
    if not fits or cache.codes.shape[-1] != values or cos.shape != (*tokens, half) or sin.shape != cos.shape:
        shapes = [x.shape for x in (cache, product, norm, cos, sin, positions)]
        raise ValueError(
            "append_latents: expected a cache [B, T, C + R], product [B, S, W], norm [C], cos and sin [B, S, R / 2] and "
            f"positions [B, S], got {shapes} with start {start}"
        )
    return dispatch.call(
        "append_latents", BACKENDS, implementation, cache, product, norm, cos, sin, positions, start=start, eps=eps
    )
