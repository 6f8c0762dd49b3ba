"""Activations in 8 bits, as a prefill layer of the 30B shape makes them between products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from experiments.benchmarks.kernels.arrays import normal
from experiments.benchmarks.kernels.cases import Arguments, Row, Sizes, bytes_of, passes, row
from pallas_kernels import normalise_rows, quantise_index_queries, quantise_rows, quantise_swiglu


def _writes(part: float) -> Callable[[Arguments], float]:
    """Bytes of a pass that reads its arguments and writes so many times the bytes of the first."""
    return lambda given: bytes_of(given) + part * given[0].nbytes


def activation_rows(sizes: Sizes) -> Iterator[Row]:
    """What a prefill layer of the 30B shape does to its activations between products."""
    add = functools.partial(row, sizes)

    def drawn(*shape: int) -> Callable[[Sizes, int], Arguments]:
        return lambda sizes, seed: (normal((sizes.queries(shape[0]), sizes.width(shape[1])), seed=seed),)

    def normalised(sizes: Sizes, seed: int) -> Arguments:
        return *drawn(10240, 2048)(sizes, seed), normal((sizes.width(2048),))

    def normalise(rows: Any, weight: Any, **options: Any) -> Any:
        return normalise_rows(rows, weight, 1e-5, **options)

    def index_queries(sizes: Sizes, seed: int) -> Arguments:
        tokens = sizes.queries(10240)
        angles = (normal((tokens, 32), jnp.float32, other) for other in (0, 1))
        return normal((tokens, 32, 128), seed=seed), *angles

    def quantise_queries(product: Any, cos: Any, sin: Any, **options: Any) -> Any:
        return quantise_index_queries(product, cos, sin, interleaved=True, **options)

    yield add("quantise rows, 10240 x 5120", passes, quantise_rows, drawn(10240, 5120), _writes(0.5))
    yield add("quantise SwiGLU, 10240 x 2 x 1536", passes, quantise_swiglu, drawn(10240, 3072), _writes(0.25))
    yield add("normalise rows, 10240 x 2048, also in fp8", passes, normalise, normalised, _writes(1.5))
    yield add("quantise index queries, 10240 x 32 x 128", passes, quantise_queries, index_queries, _writes(0.5))
