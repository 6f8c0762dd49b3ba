"""A byte n-gram model with Witten-Bell smoothing: the baseline a trained checkpoint has to beat by far."""

from __future__ import annotations

import numpy as np


def _codes(data: np.ndarray, n: int) -> np.ndarray:
    """The n-grams of bytes as integers, n <= 7; entry i ends at byte i + n - 1."""
    codes = np.zeros(data.size - n + 1, np.int64)
    for i in range(n):
        codes = codes * 256 + data[i : data.size - n + 1 + i]
    return codes


def _count(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, counts[at], 0)


def loss(train: np.ndarray, held_out: np.ndarray, order: int) -> float:
    """Nats per byte of held_out under an order-gram model of train, both uint8, order 1 to 7.

    p_n(w | h) = (c(hw) + t(h) p_{n-1}(w | h')) / (c(h) + t(h)), with t(h) the number of distinct bytes seen after h and
    p_0 uniform. The first order - 1 bytes are not counted.
    """
    if not 1 <= order <= 7:
        raise ValueError(f"order: {order} is not between 1 and 7")
    p = np.full(held_out.size - order + 1, 1 / 256)
    for n in range(1, order + 1):
        grams, counts = np.unique(_codes(train, n), return_counts=True)
        contexts, first = np.unique(grams // 256, return_index=True)
        totals = np.add.reduceat(counts, first)
        distinct = np.diff(np.append(first, grams.size))
        wanted = _codes(held_out, n)[order - n :]
        seen = _count(contexts, totals, wanted // 256)
        kinds = _count(contexts, distinct, wanted // 256)
        smoothed = (_count(grams, counts, wanted) + kinds * p) / np.maximum(seen + kinds, 1)
        p = np.where(seen > 0, smoothed, p)
    return float(-np.mean(np.log(p)))
