"""Routing in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.routing.arrays import Routes


def choose(logits: jax.Array, bias: jax.Array, *, choices: int, normalised: bool, scale: float) -> tuple[jax.Array, jax.Array]:
    """The experts [N, k] of largest sigmoid(logits) + bias, the lower number first among equals, and their weights [N, k]."""
    scores = jax.nn.sigmoid(logits)
    experts = jax.lax.top_k(scores + bias, choices)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if normalised:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return experts, weights * scale


def tables(experts: jax.Array, weights: jax.Array, num_experts: int, *, shared: bool) -> Routes:
    """The routes of chosen experts [N, k] and their weights."""
    n, k = experts.shape
    places = jnp.arange(n * k, dtype=jnp.int32).reshape(n, k)
    chosen = experts[None] == jnp.arange(num_experts)[:, None, None]  # [E, N, k]
    slots = jnp.max(jnp.where(chosen, places, -1), axis=-1)
    of_all = n * k + jnp.arange(n, dtype=jnp.int32) if shared else jnp.full(n, -1, jnp.int32)
    slots = jnp.concatenate([slots, of_all[None]])
    # Group E, then the experts.
    order = jnp.roll(jnp.arange(num_experts + 1, dtype=jnp.int32), 1)
    used = jnp.any(slots >= 0, axis=1)[order]
    place = jnp.where(used, jnp.cumsum(used) - 1, num_experts + 1)
    groups = jnp.full(num_experts + 1, -1, jnp.int32).at[place].set(order, mode="drop")
    return Routes(experts, weights, groups, jnp.sum(used, dtype=jnp.int32)[None], slots)


def route(logits: jax.Array, bias: jax.Array, *, choices: int, normalised: bool, scale: float, shared: bool) -> Routes:
    experts, weights = choose(logits, bias, choices=choices, normalised=normalised, scale=scale)
    return tables(experts, weights, logits.shape[1], shared=shared)
