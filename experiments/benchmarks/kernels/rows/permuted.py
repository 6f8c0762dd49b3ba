"""Tokens of a prefill layer of the 30B shape, brought to their experts and back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.kernels.arrays import FP8, key_scales, normal
from experiments.benchmarks.kernels.cases import Arguments, Row, Sizes, bytes_of, passes, row
from pallas_kernels import gather_rows, quant, sum_rows

TOKENS, WIDTH, CHOICES = 10240, 2048, 4


def _pairs(tokens: int, seed: int) -> np.ndarray:
    """The numbers of all pairs of a token and an expert [tokens CHOICES] int32, in a random order."""
    return np.random.default_rng(seed).permutation(tokens * CHOICES).astype(np.int32)


def _to_experts(sizes: Sizes, seed: int) -> Arguments:
    tokens, width = sizes.queries(TOKENS), sizes.width(WIDTH)
    rows = quant.Scaled(normal((tokens, width), FP8, seed), key_scales((tokens, -(-width // quant.BLOCK)), seed))
    return rows, jax.device_put(_pairs(tokens, seed) // CHOICES)


def _from_experts(sizes: Sizes, seed: int) -> Arguments:
    tokens, width = sizes.queries(TOKENS), sizes.width(WIDTH)
    places = jax.device_put(_pairs(tokens, seed).reshape(tokens, CHOICES))
    added = tuple(normal((tokens, width), seed=seed + other) for other in (1, 2))
    return normal((tokens * CHOICES, width), seed=seed), places, key_scales((tokens, CHOICES), seed), added


def _sum(rows: Any, places: Any, weights: Any, added: Any, **options: Any) -> Any:
    return sum_rows(rows, places, weights, added, dtype=rows.dtype, **options)


def permuted_rows(sizes: Sizes) -> Iterator[Row]:
    """gather_rows and sum_rows."""
    add = functools.partial(row, sizes)

    def gathered(given: Arguments) -> float:
        rows, index = given
        return bytes_of(given) + CHOICES * bytes_of(rows)

    def summed(given: Arguments) -> float:
        *_, added = given
        return bytes_of(given) + added[0].nbytes

    yield add("gather rows, fp8, 40960 of 10240 x 2048", passes, gather_rows, _to_experts, gathered)
    yield add("sum rows, 10240 x 4 of 40960 x 2048, two added", passes, _sum, _from_experts, summed)
