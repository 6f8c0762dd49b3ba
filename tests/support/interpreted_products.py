"""Products of tiles as the interpreter of Hopper's kernels can have them: it knows no wgmma on values in registers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest


def _product(a: Any, b: Any, *_: int) -> jax.Array:
    return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")


def _fold_products(pairs: list[tuple[Any, Any]], fold: Any, start: jax.Array, *_: int) -> jax.Array:
    for i, (a, b) in enumerate(pairs):
        start = fold(start, _product(a, b), i)
    return start


def _add_chained(total: jax.Array, pairs: list[tuple[Any, Any]], between: Any, seconds: list[Any], *_: int) -> jax.Array:
    for i, ((a, b), second) in enumerate(zip(pairs, seconds, strict=True)):
        total = total + _product(between(_product(a, b), i), second)
    return total


PLAIN = {
    "product": _product,
    "products": lambda first, second, use, *_: (use(_product(*first)), _product(*second)),
    "add_product": lambda total, a, b: total + _product(a, b),
    "add_products": lambda totals, first, second: (totals[0] + _product(*first), totals[1] + _product(*second)),
    "fold_products": _fold_products,
    "add_chained": _add_chained,
}


def multiply_plainly(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Puts plain products in the place of hopper.tiles' in modules that imported them."""
    for module in modules:
        for name, plain in PLAIN.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, plain)
