"""Products of tiles as the interpreter of Hopper's kernels can have them: it knows no wgmma on values in registers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest


def _product(a: Any, b: Any, *_: int) -> jax.Array:
    return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")


PLAIN = {
    "product": _product,
    "products": lambda first, second, *_: (_product(*first), _product(*second)),
    "add_product": lambda total, a, b: total + _product(a, b),
    "add_products": lambda totals, first, second: (totals[0] + _product(*first), totals[1] + _product(*second)),
}


def multiply_plainly(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Puts plain products in the place of hopper.tiles' in modules that imported them."""
    for module in modules:
        for name, plain in PLAIN.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, plain)
