"""grouped_matmul, the experts of a layer, and scaled_matmul."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.kernels.arrays import FP8, key_scales, normal, scaled_normal
from experiments.benchmarks.kernels.cases import Case, Row, Sizes, on_hopper, row
from pallas_kernels import grouped_matmul, quant, scaled_matmul


def activations(shape: tuple[int, int], seed: int, in_codes: bool) -> Any:
    """Rows [M, K], or as codes and scales [K / 128, M]: that is how the kernels that make them write scales."""
    if not in_codes:
        return normal(shape, seed=seed)
    return normal(shape, FP8, seed), key_scales((-(-shape[1] // quant.BLOCK), shape[0]), seed)


def rows_of(x: Any) -> Any:
    return quant.Scaled(x[0], x[1].T) if isinstance(x, tuple) else x


def experts(sizes: Sizes, rows: int, groups: int, k: int, n: int, *, scaled: bool = False, in_codes: bool = False) -> Case:
    """grouped_matmul; few rows read only the matrices of groups that have any.

    scaled: matrices in 8 bits. in_codes: rows too, which otherwise are quantised on the way where groups have many.
    """
    m, groups, k, n = sizes.queries(rows), sizes.batch(groups), sizes.width(k), sizes.width(n)
    counts = np.random.default_rng(0).multinomial(m, np.full(groups, 1 / groups)).astype(np.int32)
    many = rows >= 128 * groups
    read = (1 if scaled else 2) * k * n * int((counts > 0).sum())
    matrices = scaled_normal((groups, n, k)) if scaled else normal((groups, k, n))
    sets = [(activations((m, k), seed, in_codes), jax.device_put(counts)) for seed in sizes.seeds(read)]

    def run(x: Any, counts: Any, matrices: Any, implementation: str | None = None) -> Any:
        return grouped_matmul(rows_of(x), matrices, counts, implementation=implementation)

    in_xla = functools.partial(run, implementation="decoded" if scaled else "ragged_dot")
    work: dict[str, Any] = dict(flops=2 * m * k * n) if many else dict(bytes=read)
    reference = (in_xla, (*sets[0], matrices), 1) if on_hopper() else None
    return Case(run, sets, common=(matrices,), reference=reference, **work)


def scaled_product(sizes: Sizes, rows: int, k: int, n: int, *, in_codes: bool = False) -> Case:
    """scaled_matmul; `in_codes` of rows in 8 bits, which otherwise are quantised on the way where they are many."""
    m, k, n = sizes.queries(rows) if rows > 128 else rows, sizes.width(k), sizes.width(n)
    work: dict[str, Any] = dict(flops=2 * m * k * n) if rows >= 128 else dict(bytes=k * n)
    sets = [(activations((m, k), seed, in_codes), scaled_normal((n, k), seed=seed)) for seed in sizes.seeds(m * k + n * k)]

    def run(x: Any, matrix: Any, implementation: str | None = None) -> Any:
        return scaled_matmul(rows_of(x), matrix, implementation=implementation)

    reference = (functools.partial(run, implementation="xla"), sets[0], 1) if on_hopper() else None
    return Case(run, sets, reference=reference, **work)


def expert_rows(sizes: Sizes) -> Iterator[Row]:
    """grouped_matmul."""
    add = functools.partial(row, sizes)
    yield add(
        "grouped matmul, 32768 x 2048 x 3072, 64 groups", experts, 32768, 64, 2048, 3072, public=(1.16, "JAX's ragged_dot_mgpu")
    )
    yield add("grouped matmul, 64 x 2048 x 3072, 64 groups", experts, 64, 64, 2048, 3072)
    for name, rows, groups, k, n, target in (
        ("32768 x 2048 x 3072, 64 groups", 32768, 64, 2048, 3072, 0.43),
        ("65536 x 6144 x 4096, 32 groups", 65536, 32, 6144, 4096, 2.87),
    ):
        note = "bfloat16 rows are quantised on the way"
        yield add(f"grouped matmul, fp8, {name}", experts, rows, groups, k, n, scaled=True, target=target, note=note)
        name = f"grouped matmul, fp8, {name}, rows in fp8"
        yield add(name, experts, rows, groups, k, n, scaled=True, in_codes=True, target=target)
    yield add("grouped matmul, fp8, 64 x 2048 x 3072, 64 groups", experts, 64, 64, 2048, 3072, scaled=True)
    yield add("scaled matmul, fp8, 4096 x 16384 x 7168", scaled_product, 4096, 16384, 7168, target=0.837)
    name = "scaled matmul, fp8, 4096 x 16384 x 7168, rows in fp8"
    yield add(name, scaled_product, 4096, 16384, 7168, in_codes=True, target=0.837)
