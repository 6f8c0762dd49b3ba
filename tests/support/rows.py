"""Kernels for rows of activations on Hopper (pallas_kernels.hopper.lanes), run on NumPy."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.support.emulated import lockstep


def words(x: Any) -> np.ndarray:
    """An array's bytes as 32-bit words."""
    flat = np.asarray(x).reshape(-1).view(np.uint8)
    return np.pad(flat, (0, -flat.size % 4)).view(np.int32).copy()


def run_program(
    monkeypatch: pytest.MonkeyPatch,
    program: Any,
    blocks: int,
    inputs: Sequence[Any],
    outputs: list[np.ndarray],
    shared_words: int = 0,
) -> list[np.ndarray]:
    """The outputs, arrays of words, that so many blocks of a program have written."""
    from pallas_kernels.hopper import lanes

    arrays = {str(i): array for i, array in enumerate([*map(words, inputs), *outputs])}

    def stages(addresses: dict[str, Any], block: Any, shared: Any) -> list[Any]:
        def run() -> None:
            program(*addresses.values(), block, *(shared,) * bool(shared_words))

        return [types.SimpleNamespace(begin=lambda: None, prefetches=(), run=run)]

    lockstep.run_grid(monkeypatch, arrays, blocks, lanes.THREADS, 4 * max(shared_words, 1), stages)
    return outputs
