"""What a run's rates are compared with: products and a copy by XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernels.arrays import FP8, normal
from experiments.benchmarks.kernels.cases import Case, Row, Sizes


def matmul(sizes: Sizes, dtype: Any) -> Case:
    n = sizes.width(8192)

    def multiply(a: Any, b: Any) -> Any:  # [n, n] and the transpose of [n, n]
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    return Case(multiply, [(normal((n, n), dtype, 0), normal((n, n), dtype, 1))], flops=2 * n**3)


def copy(sizes: Sizes) -> Case:
    n = sizes.width(2**14) ** 2 * 4  # 2 GiB
    return Case(lambda x: x + 1, [(jnp.zeros((n,), jnp.bfloat16),)], bytes=2 * 2 * n)


def baselines(sizes: Sizes) -> list[Row]:
    return [
        Row("matmul, bf16, 8192 x 8192 x 8192", lambda: matmul(sizes, jnp.bfloat16)),
        Row("matmul, fp8, 8192 x 8192 x 8192", lambda: matmul(sizes, FP8)),
        Row("copy, 2 GiB", lambda: copy(sizes)),
    ]
