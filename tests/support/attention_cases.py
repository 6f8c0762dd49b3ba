"""What every implementation of sparse_mla is asked, and the answer in plain NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes: batch b, queries s, heads h, keys t, selected k, latents c + r."""

    b: int
    s: int
    h: int
    t: int
    k: int
    c: int = 512
    r: int = 64

    def __str__(self) -> str:
        return f"b{self.b}-s{self.s}-h{self.h}-t{self.t}-k{self.k}-c{self.c}+{self.r}"


def inputs(case: Case, dtype=jnp.bfloat16, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(case.b, case.s, case.h, case.c + case.r))
    return jnp.asarray(queries, dtype), jnp.asarray(rng.normal(size=(case.b, case.t, case.c + case.r)), dtype)


def selections(case: Case, kind: str, seed: int = 1) -> np.ndarray:
    """Indices [b, s, k] of a kind.

    ascending: distinct, -1 in the tail of rows that select fewer. overlapping: the same, neighbours share most of them.
    causal: the last min(p + 1, k) keys at or before position p. scattered: any order, twice the same, -1 anywhere.
    nothing: all -1. mixed: ascending, but every third query selects nothing.
    """
    rng = np.random.default_rng(seed)
    out = np.full((case.b, case.s, case.k), -1, np.int32)
    if kind == "scattered":
        return rng.integers(-1, case.t, out.shape).astype(np.int32)
    for b in range(case.b):
        previous = None
        for s in range(case.s):
            if kind == "causal":
                chosen = np.arange(max(0, s + 1 - case.k), min(s + 1, case.t))
            elif kind == "nothing" or (kind == "mixed" and s % 3 == 1):
                continue
            else:
                size = min(case.t, case.k if s % 2 else rng.integers(1, case.k + 1))
                pool = rng.permutation(case.t)
                if kind == "overlapping" and previous is not None:
                    kept = rng.permutation(previous)[: size * 9 // 10]
                    pool = np.concatenate([kept, np.setdiff1d(pool, kept)])
                chosen = np.sort(pool[:size])
                previous = chosen
            out[b, s, : len(chosen)] = chosen
    return out


def numpy_attention(queries, latents, indices, scale: float, value_dim: int) -> np.ndarray:
    """One query, one head at a time, in float64."""
    q, kv, indices = np.asarray(queries, np.float64), np.asarray(latents, np.float64), np.asarray(indices)
    out = np.zeros((*q.shape[:3], value_dim))
    for b, s in np.ndindex(indices.shape[:2]):
        chosen = kv[b, indices[b, s][indices[b, s] >= 0]]
        if len(chosen):
            for h in range(q.shape[2]):
                logits = chosen @ q[b, s, h] * scale
                weights = np.exp(logits - logits.max())
                out[b, s, h] = weights @ chosen[:, :value_dim] / weights.sum()
    return out


def numpy_lse(queries, latents, indices, scale: float) -> np.ndarray:
    """log(sum(exp(logits))) [b, s, h] in float64, -inf where nothing is selected."""
    q, kv, indices = np.asarray(queries, np.float64), np.asarray(latents, np.float64), np.asarray(indices)
    out = np.full(q.shape[:3], -np.inf)
    for b, s in np.ndindex(indices.shape[:2]):
        logits = q[b, s] @ kv[b, indices[b, s][indices[b, s] >= 0]].T * scale
        if logits.size:
            top = logits.max(-1)
            out[b, s] = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return out


def relative_error(out, expected) -> float:
    """Root mean square of the difference over that of `expected`."""
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(out).all()
    return float(np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)))


def assert_unions(lists, counts, indices, packed: int, ascending: bool) -> None:
    """Rows of `lists` hold what `packed` neighbouring queries of indices [b, s, k] select, every key with its owners."""
    tiles = -(-indices.shape[1] // packed)
    assert lists.shape[0] == indices.shape[0] * tiles
    for i, entries in enumerate(np.asarray(lists)):
        group = indices[i // tiles, packed * (i % tiles) :][:packed]
        assert 1 <= counts[i] <= lists.shape[1] // 128
        entries = entries[: 128 * counts[i]]
        assert (entries[entries >> 24 == 0] == 0).all()
        entries = entries[entries != 0]
        for query, row in enumerate(group):
            found = entries[entries >> 24 >> query & 1 == 1] & 0xFFFFFF
            np.testing.assert_array_equal(np.sort(found), np.sort(row[row >= 0]))
        assert (entries >> 24 < 1 << len(group)).all()
        if ascending:
            assert (np.diff(entries & 0xFFFFFF) > 0).all()
