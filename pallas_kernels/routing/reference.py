"""Routing in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.routing.arrays import Routes


def choose(
    logits: jax.Array, bias: jax.Array, *, choices: int, normalised: bool, scale: float, n_group: int = 1, topk_group: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The experts [N, k] of largest sigmoid(logits) + bias, the lower number first among equals, and their weights [N, k]."""
    choice = jax.nn.sigmoid(logits) + bias
    if n_group > 1:
        choice = _in_best_groups(choice, n_group, topk_group)
    experts = jax.lax.top_k(choice, choices)[1]
    return experts, weights_of(logits, experts, normalised=normalised, scale=scale)


def _in_best_groups(choice: jax.Array, n_group: int, topk_group: int) -> jax.Array:
    """`choice` [N, E] with -inf for experts of the groups that are not among the best."""
    groups = choice.reshape(choice.shape[0], n_group, -1)
    quality = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
    kept = jax.lax.top_k(quality, topk_group)[1]
    is_kept = jnp.any(kept[..., None] == jnp.arange(n_group), axis=-2)
    return jnp.where(is_kept[..., None], groups, -jnp.inf).reshape(choice.shape)


def weights_of(logits: jax.Array, experts: jax.Array, *, normalised: bool, scale: float) -> jax.Array:
    """The weights [N, k] of chosen experts [N, k]."""
    scores = jax.nn.sigmoid(logits)
    # A sum: a gather's gradient would be a scatter.
    weights = jnp.sum(jax.nn.one_hot(experts, logits.shape[-1]) * scores[..., None, :], axis=-1)
    if normalised:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * scale


def tables(experts: jax.Array, weights: jax.Array, num_experts: int, *, shared: bool) -> Routes:
    """The routes of chosen experts [N, k], -1 for those of other devices, and their weights."""
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
    num_groups, barrier_count = jnp.sum(used, dtype=jnp.int32)[None], jnp.zeros(1, jnp.int32)
    return Routes(experts, weights, groups, num_groups, barrier_count, slots)


def route(
    logits: jax.Array,
    bias: jax.Array,
    first: jax.Array | int = 0,
    *,
    num_own: int | None = None,
    shared: bool,
    **of_choice: Any,
) -> Routes:
    experts, weights = choose(logits, bias, **of_choice)
    own, num_own = experts - first, num_own or logits.shape[1]
    own = jnp.where((own >= 0) & (own < num_own), own, -1)
    return tables(own, weights, num_own, shared=shared)


def sort_by_group(groups: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    order = jnp.argsort(groups, stable=True)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    # A sum: a histogram by scatter serialises on a GPU.
    sizes = jnp.sum(groups[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    return order.astype(jnp.int32), back.astype(jnp.int32), sizes
