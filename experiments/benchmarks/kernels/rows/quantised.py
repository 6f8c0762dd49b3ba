"""Activations in 8 bits, as a prefill layer of the 30B shape makes them between products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarks.kernels.arrays import normal
from experiments.benchmarks.kernels.cases import Arguments, Case, Row, Sizes, on_hopper, row
from pallas_kernels import normalise_rows, quantise_rows, quantise_swiglu


def passes(sizes: Sizes, operation: Callable[..., Any], arguments: Callable[[Sizes, int], Arguments], written: float) -> Case:
    """An operation that reads its arguments once and writes `written` times the bytes of the first."""
    one = arguments(sizes, 0)
    moved = sum(x.nbytes for x in one) + written * one[0].nbytes
    sets = [arguments(sizes, seed) for seed in sizes.seeds(moved)]
    reference = (functools.partial(operation, implementation="xla"), sets[0], 1) if on_hopper() else None
    return Case(operation, sets, bytes=moved, reference=reference)


def activation_rows(sizes: Sizes) -> Iterator[Row]:
    """What a prefill layer of the 30B shape does to its activations between products."""
    add = functools.partial(row, sizes)

    def drawn(*shape: int) -> Callable[[Sizes, int], Arguments]:
        return lambda sizes, seed: (normal((sizes.queries(shape[0]), sizes.width(shape[1])), seed=seed),)

    def normalised(sizes: Sizes, seed: int) -> Arguments:
        return *drawn(10240, 2048)(sizes, seed), normal((sizes.width(2048),))

    def normalise(rows: Any, weight: Any, **options: Any) -> Any:
        return normalise_rows(rows, weight, 1e-5, **options)

    yield add("quantise rows, 10240 x 5120", passes, quantise_rows, drawn(10240, 5120), 0.5)
    yield add("quantise SwiGLU, 10240 x 2 x 1536", passes, quantise_swiglu, drawn(10240, 3072), 0.25)
    yield add("normalise rows, 10240 x 2048, also in fp8", passes, normalise, normalised, 1.5)
