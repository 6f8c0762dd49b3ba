"""The absorbed queries of a decode step's few rows in the 30B shape.

The kernels for a single token wait for all of a device and for one another, and `latents_of_rows` writes into a cache that the
calls of a program cannot share: neither has a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernels.arrays import normal
from experiments.benchmarks.kernels.cases import Case, Row, Sizes, bytes_of, on_hopper, row
from pallas_kernels.decode_layer import api
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH

HEADS, NOPE = 20, 192


def absorbed(sizes: Sizes, rows: int) -> Case:
    """absorbed_queries; the formula in plain JAX where there is no Hopper GPU, and as the reference."""
    cos_sin = tuple(normal((rows, 1, ROTARY // 2), jnp.float32, seed) for seed in (0, 1))

    def kernel(product: Any, k_up: Any, *cos_sin: Any) -> Any:
        return api.absorbed_queries(product, k_up, cos_sin)

    def in_xla(product: Any, k_up: Any, cos: Any, sin: Any) -> Any:
        heads = product.reshape(rows, HEADS, NOPE + ROTARY)
        first, second = (heads[..., NOPE + i :: 2].astype(jnp.float32) for i in (0, 1))
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(rows, HEADS, ROTARY)
        nope = jnp.einsum("bhn,hcn->bhc", heads[..., :NOPE], k_up)
        return jnp.concatenate([nope, rotated.astype(product.dtype)], axis=-1)

    matrices = normal((HEADS, VALUE_DIM, NOPE)), *cos_sin
    moved = bytes_of(matrices) + 2 * rows * HEADS * (NOPE + ROTARY + WIDTH)
    width = HEADS * (NOPE + ROTARY)
    sets = [(normal((rows, 1, width), seed=seed), *(jax.tree.map(jnp.copy, matrices))) for seed in sizes.seeds(moved)]
    if not on_hopper():
        return Case(in_xla, sets, bytes=moved)
    return Case(kernel, sets, bytes=moved, reference=(in_xla, sets[0], 1))


def decode_layer_rows(sizes: Sizes) -> Iterator[Row]:
    """absorbed_queries."""
    for rows in (2, 16):
        yield row(sizes, f"absorbed queries, decode, {rows} rows of 20 heads", absorbed, rows)
