"""n-grams: a smoothed byte model, the baseline a trained checkpoint has to beat by far, and how far back one last occurred."""

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


def distance(tokens: np.ndarray, n: int) -> np.ndarray:
    """How far back the n tokens that end at each position last occurred, [S] int64; 0 where they did not (before).

    A model finds such a token again only where it still sees the earlier occurrence: the loss on those with a large
    distance is a loss on long-range dependence. ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n: {n} is below 1")
    found = np.zeros(tokens.size, np.int64)
    if tokens.size < n:
        return found
    windows = np.lib.stride_tricks.sliding_window_view(tokens, n)
    kinds = np.unique(windows, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(kinds, kind="stable")
    again = kinds[order[1:]] == kinds[order[:-1]]
    found[order[1:][again] + n - 1] = (order[1:] - order[:-1])[again]
    return found
