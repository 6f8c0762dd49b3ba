"""The experts that tokens choose, 4 of 64 or 8 of 256 within groups as in DeepSeek-V3.2, and their order."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernels.arrays import normal
from experiments.benchmarks.kernels.cases import Arguments, Row, Sizes, bytes_of, passes, row
from pallas_kernels import choose, route, sort_by_group

EXPERTS, CHOICES = 64, 4
OPTIONS: dict[str, Any] = {"choices": CHOICES, "normalised": True, "scale": 1.8}
GROUPED_EXPERTS = 256
GROUPED: dict[str, Any] = {"choices": 8, "normalised": True, "scale": 2.5, "n_group": 8, "topk_group": 4}


def _logits(sizes: Sizes, seed: int, tokens: int, experts: int = EXPERTS) -> Arguments:
    n = sizes.queries(tokens) if tokens > 64 else tokens
    return normal((n, experts), jnp.float32, seed), normal((experts,), jnp.float32)


def _groups(sizes: Sizes, seed: int, pairs: int) -> Arguments:
    drawn = np.random.default_rng(seed).integers(0, EXPERTS, sizes.queries(pairs), np.int32)
    return (jax.device_put(drawn),)


def _route(logits: Any, bias: Any, **options: Any) -> Any:
    return route(logits, bias, shared=True, **OPTIONS, **options)


def _route_in_groups(logits: Any, bias: Any, **options: Any) -> Any:
    return route(logits, bias, shared=True, **GROUPED, **options)


def _choose(logits: Any, bias: Any, **options: Any) -> Any:
    return choose(logits, bias, **OPTIONS, **options)


def _choose_in_groups(logits: Any, bias: Any, **options: Any) -> Any:
    return choose(logits, bias, **GROUPED, **options)


def _sort(groups: Any, **options: Any) -> Any:
    return sort_by_group(groups, EXPERTS, **options)


def routing_rows(sizes: Sizes) -> Iterator[Row]:
    """choose, sort_by_group and route."""
    add = functools.partial(row, sizes)

    def chosen(given: Arguments, choices: int = CHOICES) -> float:
        return bytes_of(given) + 8 * choices * given[0].shape[0]

    def sorted_(given: Arguments) -> float:
        return 3 * bytes_of(given)

    note = "so few bytes that its time is that of the kernel's dependent steps"
    yield add("choose 4 of 64 experts, 10240 tokens", passes, _choose, functools.partial(_logits, tokens=10240), chosen)
    yield add("sort pairs by expert, 40960 of 64", passes, _sort, functools.partial(_groups, pairs=40960), sorted_)
    for tokens in (2, 16):
        arguments = functools.partial(_logits, tokens=tokens)
        yield add(f"route, decode, {tokens} rows, 4 of 64 experts", passes, _route, arguments, chosen, note=note)
    chosen_in_groups = functools.partial(chosen, choices=GROUPED["choices"])
    for name, tokens, kernel in (
        ("choose 8 of 256 experts in 4 of 8 groups, 10240 tokens", 10240, _choose_in_groups),
        ("route, decode, 16 rows, 8 of 256 experts in 4 of 8 groups", 16, _route_in_groups),
    ):
        arguments = functools.partial(_logits, tokens=tokens, experts=GROUPED_EXPERTS)
        yield add(name, passes, kernel, arguments, chosen_in_groups, note=note)
