"""Inputs of attention by bits and of the divergence, and both written out with full arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCALE = 0.08
KINDS = ("random", "causal", "first", "window", "nothing")


@dataclasses.dataclass(frozen=True)
class Case:
    b: int
    s: int
    heads: int
    width: int
    value_width: int
    index_heads: int
    index_width: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    attention: tuple[jax.Array, jax.Array, jax.Array]  # queries, keys, values
    index: tuple[jax.Array, jax.Array, jax.Array]  # index queries, index keys, head weights
    out_grad: jax.Array
    mask: np.ndarray  # [B, S, S]: which keys each query selects


def masks(kind: str, b: int, s: int, rng: np.random.Generator) -> np.ndarray:
    causal = np.broadcast_to(np.tril(np.ones((s, s), bool)), (b, s, s))
    places = np.arange(s)
    if kind == "random":
        found = causal & (rng.random((b, s, s)) < 0.2)
        found[:, s // 3] = False
        return found
    if kind == "first":
        return causal & (places < 40)
    if kind == "window":
        return causal & (places[:, None] - places < 70)
    return causal if kind == "causal" else np.zeros((b, s, s), bool)


def indices_of(mask: np.ndarray) -> np.ndarray:
    """The positions [B, S, k] of a mask's True, ascending, then -1."""
    k = max(1, int(mask.sum(-1).max()))
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :k]
    return np.where(np.take_along_axis(mask, order, axis=-1), order, -1).astype(np.int32)


def inputs(case: Case, kind: str, dtype: Any, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: Any = dtype) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    c = case
    of_heads = (c.b, c.s, c.heads)
    return Inputs(
        (normal(*of_heads, c.width), normal(*of_heads, c.width), normal(*of_heads, c.value_width)),
        (
            normal(c.b, c.s, c.index_heads, c.index_width),
            normal(c.b, c.s, c.index_width),
            normal(c.b, c.s, c.index_heads, scale=0.05, dtype=jnp.float32),
        ),
        normal(*of_heads, c.value_width),
        masks(kind, c.b, c.s, rng),
    )


def some_queries(given: Inputs, queries: np.ndarray) -> Inputs:
    """The same keys for some of the queries alone: `mask` is [B, Q, S] then."""
    (q, *keys), (index_q, index_k, weights) = given.attention, given.index
    index = index_q[:, queries], index_k, weights[:, queries]
    return Inputs((q[:, queries], *keys), index, given.out_grad[:, queries], given.mask[:, queries])


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def written_out(given: Inputs, cotangent: float) -> dict[str, jax.Array]:
    """Everything the two operations give, gradients by autodiff of plain full arrays in float32."""
    mask = jnp.asarray(given.mask)

    def logits(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.where(mask[:, None], jnp.einsum("bqhd,bthd->bhqt", q, k, precision="highest") * SCALE, -1e30)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        p = jnp.where(mask[:, None], jax.nn.softmax(logits(q, k), axis=-1), 0.0)
        return jnp.einsum("bhqt,bthv->bqhv", p, v, precision="highest")

    attention, index = _float32(given.attention), _float32(given.index)
    q, k, _ = attention
    some = mask.any(-1)[:, None]
    lse = jnp.where(some, jax.nn.logsumexp(logits(q, k), axis=-1), 0.0)
    p = jnp.where(mask, jnp.mean(jnp.exp(jnp.where(mask[:, None], logits(q, k) - lse[..., None], -1e30)), axis=1), 0.0)

    def diverge(iq: jax.Array, ik: jax.Array, w: jax.Array) -> jax.Array:
        dots = jax.nn.relu(jnp.einsum("bqhd,btd->bqht", iq, ik, precision="highest"))
        scores = jnp.where(mask, jnp.einsum("bqht,bqh->bqt", dots, w, precision="highest"), -1e30)
        log_q = jnp.where(mask, jax.nn.log_softmax(scores, axis=-1), 0.0)
        return jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q)

    out, pull = jax.vjp(attend, *attention)
    kl, pull_index = jax.vjp(diverge, *index)
    found = {"out": out, "lse": lse, "kl": kl, "target": p}
    found |= dict(zip(("dq", "dk", "dv"), pull(_float32(given.out_grad)), strict=True))
    return found | dict(zip(("index dq", "index dk", "dw"), pull_index(jnp.float32(cotangent)), strict=True))


def computed(attend: Any, diverge: Any, given: Inputs, words: jax.Array, cotangent: float) -> dict[str, jax.Array]:
    """The same of two implementations, without their names and scale."""
    q, k, _ = given.attention
    (out, lse), pull = jax.vjp(lambda *qkv: attend(*qkv, words), *given.attention)
    kl, pull_index = jax.vjp(lambda *index: diverge(*index, q, k, lse, words), *given.index)
    found = {"out": out, "lse": lse, "kl": kl}
    found |= dict(zip(("dq", "dk", "dv"), pull((given.out_grad, jnp.zeros_like(lse))), strict=True))
    return found | dict(zip(("index dq", "index dk", "dw"), pull_index(jnp.float32(cotangent)), strict=True))


def computed_by_parts(
    denominators: Any, add_target: Any, miss: Any, given: Inputs, words: jax.Array, cotangent: float
) -> dict[str, jax.Array]:
    """The divergence of denominators, targets of two layers that are the same one, and what index scores miss of their sum."""
    q, k, _ = given.attention
    lse = denominators(q, k, words)
    nothing = jnp.zeros((q.shape[0], q.shape[1], k.shape[1]), jnp.float32)
    total, _ = add_target(nothing, q, k, lse, words, share=0.25)
    total, entropy = add_target(total, q, k, lse, words, share=jnp.float32(0.75))
    missed, pull = jax.vjp(lambda *index: miss(*index, total, words), *given.index)
    found = {"lse": lse, "target": total, "kl": missed - jnp.sum(entropy)}
    return found | dict(zip(("index dq", "index dk", "dw"), pull(jnp.float32(cotangent)), strict=True))


def assert_close(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float, exact: float = 1e-4, rounded: float | None = None
) -> None:
    """Relative to the largest number of each; `exact` for the sums, which are float32 in every implementation.

    rounded: for the divergence, where it is the difference of two sums, or of targets that are rounded to bfloat16.
    """
    bounds = {"lse": exact, "kl": exact if rounded is None else rounded}
    for name in found:
        a, b = np.asarray(found[name], np.float32), np.asarray(expected[name], np.float32)
        bound = bounds.get(name, tolerance) * np.abs(b).max() + 1e-6
        assert np.abs(a - b).max() <= bound, (name, np.abs(a - b).max(), np.abs(b).max())
