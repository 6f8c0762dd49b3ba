"""What transformers computed for the recorded cases, as files that need neither torch nor transformers."""

from __future__ import annotations

import pathlib

import numpy as np

DIRECTORY = pathlib.Path(__file__).parents[1] / "fixtures"


def read(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, S, V] float32 and indices [num_full, B, S, k] of a recorded case."""
    with np.load(DIRECTORY / f"{name}.npz", allow_pickle=False) as file:
        return file["logits"], file["indices"].astype(np.int32)


def write(name: str, logits: np.ndarray, indices: np.ndarray) -> None:
    DIRECTORY.mkdir(exist_ok=True)
    np.savez_compressed(DIRECTORY / f"{name}.npz", logits=logits.astype(np.float32), indices=indices.astype(np.int16))
