"""append_latents: new tokens of the 30B shape, from their projection to a cache in 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernels.arrays import FP8, key_scales, normal
from experiments.benchmarks.kernels.cases import Arguments, Row, Sizes, bytes_of, passes, row
from pallas_kernels import append_latents, quant
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH

QUERY_RANK = 768  # numbers of the projection before the latents


def _given(sizes: Sizes, seed: int, batch: int, tokens: int) -> Arguments:
    """Tokens that fill a cache up."""
    s = sizes.queries(tokens)
    codes, rotary = (normal((batch, s, width), kind) for width, kind in ((VALUE_DIM, FP8), (ROTARY, jnp.bfloat16)))
    positions = np.broadcast_to(np.arange(s, dtype=np.int32), (batch, s))
    angles = (normal((batch, s, ROTARY // 2), jnp.float32, other) for other in (0, 1))
    product = normal((batch, s, QUERY_RANK + WIDTH), jnp.float32, seed)
    return (
        product,
        quant.Latents(codes, rotary, key_scales((batch, s))),
        normal((VALUE_DIM,)),
        *angles,
        jax.device_put(positions),
    )


def _append(product: Any, cache: Any, *others: Any, **options: Any) -> Any:
    return append_latents(cache, product, *others, start=QUERY_RANK, eps=1e-5, **options)


def latent_cache_rows(sizes: Sizes) -> Iterator[Row]:
    """append_latents. The cache is given to several calls, so that each copies it: its bytes count twice more."""

    def moved(given: Arguments) -> float:
        product, cache, norm, cos, sin, positions = given
        used = product.nbytes * WIDTH / product.shape[-1]
        return used + bytes_of((norm, cos, sin, positions)) + 3 * bytes_of(cache)

    arguments = functools.partial(_given, batch=1, tokens=10240)
    yield row(sizes, "append latents, fp8, 10240 tokens", passes, _append, arguments, moved)
