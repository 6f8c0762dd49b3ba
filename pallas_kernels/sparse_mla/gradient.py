"""The backward pass of sparse_mla in XLA, for every implementation without one of its own.

With probabilities P of a query's selected latents kv, output O and its cotangent dO:

    dS = P * (dO . values - sum of dO * O)     dq = scale * dS kv     dkv = scale * dS^T q + (P^T dO in the values' columns)

A latent's gradient is a sum over all queries that selected it, any number of them. Adding with atomics would make it
depend on timing, so a block of queries spreads its dS and P over the whole context instead, where every position gets one
number, and the sum is a matrix product: deterministic, in float32, at the price of products over keys that nobody
selected. Blocks are added in turn.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.blocks import merge, split

SPREAD_BYTES = {"cpu": 16 * 2**20, "other": 512 * 2**20}  # of one block's dS over the whole context


Pull = Callable[..., tuple[jax.Array, jax.Array]]


def differentiable(forward: Callable[..., jax.Array], backward_pass: Pull | None = None) -> Callable[..., jax.Array]:
    """forward(queries, latents, indices, scale=, value_dim=) made differentiable; its options become positional.

    `backward_pass(queries, latents, indices, out, cotangent, scale, value_dim)` gives the gradients, None XLA's.
    """

    def run(queries: jax.Array, latents: jax.Array, indices: jax.Array, scale: float, value_dim: int) -> jax.Array:
        return forward(queries, latents, indices, scale=scale, value_dim=value_dim)

    def run_and_keep(queries, latents, indices, scale, value_dim):
        out = run(queries, latents, indices, scale, value_dim)
        return out, (queries, latents, indices, None if backward_pass is None else out)

    def backward(scale, value_dim, residuals, cotangent):
        queries, latents, indices, out = residuals
        if backward_pass is not None:
            return *backward_pass(queries, latents, indices, out, cotangent, scale, value_dim), None
        return *pull(queries, latents, indices, cotangent, scale, value_dim), None

    both = jax.custom_vjp(run, nondiff_argnums=(3, 4))
    both.defvjp(run_and_keep, backward)
    return both


def pull(
    queries: jax.Array, latents: jax.Array, indices: jax.Array, cotangent: jax.Array, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """The gradients of queries [B, S, H, W] and latents [B, T, W] from that of the output [B, S, H, C]."""
    b, s, h, w = queries.shape
    t = latents.shape[1]
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def product(spec: str, *terms: jax.Array) -> jax.Array:
        terms = tuple(term.astype(queries.dtype) for term in terms)
        return jnp.einsum(spec, *terms, preferred_element_type=jnp.float32, precision=precision)

    def row(q: jax.Array, kv: jax.Array, idx: jax.Array, out_grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[n, H, W], [T, W], [n, k], [n, H, C] -> [n, H, W] and these queries' share of [T, W]."""
        valid = idx >= 0
        selected = jnp.where(valid[..., None], kv[jnp.where(valid, idx, 0)], 0)
        logits = jnp.where(valid[:, None], product("nhw,nkw->nhk", q, selected) * scale, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        p = weights / jnp.where(total == 0, 1.0, total)
        of_p = product("nhc,nkc->nhk", out_grad, selected[..., :value_dim])
        of_logits = p * (of_p - jnp.sum(p * of_p, axis=-1, keepdims=True)) * scale

        def spread(x: jax.Array) -> jax.Array:  # [n, H, k] -> [n, H, T]
            add_rows = jax.vmap(lambda x, idx: jnp.zeros((h, t), jnp.float32).at[:, idx].add(x, mode="drop"))
            return add_rows(x, jnp.where(valid, idx, t))

        of_kv = product("nht,nhw->tw", spread(of_logits), q)
        of_kv = of_kv.at[:, :value_dim].add(product("nht,nhc->tc", spread(p), out_grad))
        return product("nhk,nkw->nhw", of_logits, selected), of_kv

    budget = SPREAD_BYTES.get(device.platform(), SPREAD_BYTES["other"])
    rows = max(1, min(s, budget // (4 * b * h * t)))

    def step(total: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, idx, out_grad = block
        of_queries, of_latents = jax.vmap(row)(q, latents, idx, out_grad)
        return total + of_latents, of_queries.astype(queries.dtype)

    start = jnp.zeros(latents.shape, jnp.float32)
    blocked = split(queries, rows), split(indices, rows, fill=-1), split(cotangent, rows)
    of_latents, of_queries = jax.lax.scan(step, start, blocked)
    return merge(of_queries, s), of_latents.astype(latents.dtype)
