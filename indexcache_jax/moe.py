"""SwiGLU layers, dense and routed: sigmoid scores, groups, a bias for the choice only, shared experts (SPEC.md 2.6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import pallas_kernels
from indexcache_jax.config import Config
from indexcache_jax.params import MLP, MoE


def mlp(p: MLP, x: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x): [..., D] -> [..., D]."""
    gate_up = jnp.einsum("...d,dgf->...gf", x, p.gate_up)
    return (jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]) @ p.down


def route(p: MoE, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """The experts [N, k] of tokens x [N, D] and their weights [N, k] float32.

    The bias counts when choosing, not in the weights. With groups, only experts of the topk_group best groups can be
    chosen; a group is as good as its two best experts together.
    """
    logits = jnp.dot(x.astype(jnp.float32), p.router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    choice = scores + p.router_bias
    if config.n_group > 1:
        groups = choice.reshape(-1, config.n_group, config.n_routed_experts // config.n_group)
        quality = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
        kept = jax.lax.top_k(quality, config.topk_group)[1]
        kept = jnp.any(kept[..., None] == jnp.arange(config.n_group), axis=1)
        choice = jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice.shape)
    experts = jax.lax.top_k(choice, config.num_experts_per_tok)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return experts, weights * config.routed_scaling_factor


def moe(p: MoE, x: jax.Array, config: Config) -> jax.Array:
    """Routed and shared experts of x [B, S, D]: tokens sorted by expert, two grouped products, summed in float32."""
    tokens = x.reshape(-1, x.shape[-1])
    experts, weights = route(p, tokens, config)
    k = config.num_experts_per_tok
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.bincount(experts.reshape(-1), length=config.n_routed_experts)
    width = p.gate_up.shape[-1]
    gate_up = pallas_kernels.grouped_matmul(tokens[order // k], p.gate_up.reshape(*p.gate_up.shape[:2], 2 * width), sizes)
    hidden = jax.nn.silu(gate_up[:, :width]) * gate_up[:, width:]
    routed = pallas_kernels.grouped_matmul(hidden, p.down, sizes)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    routed = routed[back].reshape(-1, k, tokens.shape[-1]).astype(jnp.float32)
    out = jnp.sum(routed * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)
    return out if p.shared is None else out + mlp(p.shared, x)
