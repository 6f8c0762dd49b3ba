"""routed_mlp: the experts of a decode step's few rows, in the 30B shape and as wide as GLM-5's, matrices in 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernels.arrays import normal, scaled_normal
from experiments.benchmarks.kernels.cases import Case, Row, Sizes, bytes_of, on_hopper, row
from pallas_kernels import routed_mlp
from pallas_kernels.routing import reference

EXPERTS = 64


def few_rows(sizes: Sizes, rows: int, choices: int, width: int, hidden: int) -> Case:
    """Random routes: of the experts those are read that a row chose, and the shared one."""
    width, hidden = sizes.width(width), sizes.width(hidden)
    matrices = (scaled_normal((EXPERTS, 2, hidden, width)), scaled_normal((EXPERTS, width, hidden)))
    shared = scaled_normal((2 * hidden, width)), scaled_normal((width, hidden))
    make_routes = functools.partial(reference.route, choices=choices, normalised=True, scale=1.8, shared=True)

    def one(seed: int) -> tuple[Any, ...]:
        logits, bias = normal((rows, EXPERTS), jnp.float32, seed), jnp.zeros(EXPERTS)
        return normal((rows, width), seed=seed), jax.jit(make_routes)(logits, bias)

    chosen = len(np.unique(one(0)[1].experts))
    read = bytes_of(matrices) * chosen / EXPERTS + bytes_of(shared)
    sets = [one(seed) for seed in sizes.seeds(read)]
    reference_ = (functools.partial(routed_mlp, implementation="xla"), (*sets[0], *matrices, *shared), 1)
    return Case(routed_mlp, sets, bytes=read, common=(*matrices, *shared), reference=reference_ if on_hopper() else None)


def routed_mlp_rows(sizes: Sizes) -> Iterator[Row]:
    """routed_mlp; the bytes are those of the experts that the first call's rows chose."""
    for rows in (2, 8, 16):
        yield row(sizes, f"routed MLP, fp8, decode, {rows} rows, 4 of 64 experts", few_rows, rows, 4, 2048, 1536)
    for rows in (8, 16):
        yield row(sizes, f"routed MLP, fp8, decode, {rows} rows of 6144, 8 of 64 experts", few_rows, rows, 8, 6144, 2048)
