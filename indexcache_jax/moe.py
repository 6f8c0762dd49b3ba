"""SwiGLU layers, dense and routed: sigmoid scores, groups, a bias for the choice only, shared experts.

The formulas are those of docs/model.md, Experts.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from indexcache_jax import ops
from indexcache_jax.config import Config
from indexcache_jax.params import MLP, MoE


class Matrices(Protocol):
    """What holds the routed experts' weights: gate_up [E, D, 2, I] and down [E, I, D]."""

    @property
    def gate_up(self) -> jax.Array: ...
    @property
    def down(self) -> jax.Array: ...


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise."""
    return jax.nn.silu(gate) * up


def mlp(p: MLP, x: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x): [..., D] -> [..., D]."""
    gate_up = jnp.einsum("...d,dgf->...gf", x, p.gate_up)
    return swiglu(gate_up[..., 0, :], gate_up[..., 1, :]) @ p.down


def route(p: MoE, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """The experts [N, k] of tokens x [N, D] and their weights [N, k] float32.

    The bias counts when choosing, not in the weights. With groups, only experts of the topk_group best groups can be
    chosen; a group is as good as its two best experts together.
    """
    logits = jnp.dot(x.astype(jnp.float32), p.router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return choose(logits, p.router_bias, config)


def choose(logits: jax.Array, bias: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """`route` from the router's logits [N, E] float32 on."""
    scores = jax.nn.sigmoid(logits)
    choice = scores + bias
    if config.n_group > 1:
        groups = choice.reshape(-1, config.n_group, config.n_routed_experts // config.n_group)
        quality = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
        kept = jax.lax.top_k(quality, config.topk_group)[1]
        kept = jnp.any(kept[..., None] == jnp.arange(config.n_group), axis=1)
        choice = jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice.shape)
    experts = jax.lax.top_k(choice, config.num_experts_per_tok)[1]
    weights = jnp.sum(jax.nn.one_hot(experts, config.n_routed_experts) * scores[:, None], axis=-1)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return experts, weights * config.routed_scaling_factor


def tokens_per_expert(experts: jax.Array, num_experts: int) -> jax.Array:
    """How many tokens each expert got, [E] int32; a sum, since a histogram by scatter serialises on a GPU."""
    return jnp.sum(jax.nn.one_hot(experts.reshape(-1), num_experts, dtype=jnp.int32), axis=0)


def moe(p: MoE, x: jax.Array, config: Config) -> jax.Array:
    """Routed and shared experts of x [B, S, D], summed in float32."""
    tokens = x.reshape(-1, x.shape[-1])
    out = routed(p, tokens, *route(p, tokens, config), config).astype(x.dtype).reshape(x.shape)
    return out if p.shared is None else out + mlp(p.shared, x)


def routed(p: Matrices, tokens: jax.Array, experts: jax.Array, weights: jax.Array, config: Config) -> jax.Array:
    """The weighted sum [N, D] float32 over the experts [N, k] of tokens [N, D], both as `choose` gives them."""
    if _few_experts(config):
        way = _every_expert
    elif _few_rows(experts, config):
        way = _matrix_by_matrix
    else:
        way = _sorted_by_expert
    return way(p, tokens, experts, weights)


def _few_experts(config: Config) -> bool:
    # An accelerator multiplies a small model's tokens by every expert faster than it sorts them.
    return ops.platform() != "cpu" and config.n_routed_experts <= 4 * config.num_experts_per_tok


def _few_rows(experts: jax.Array, config: Config) -> bool:
    # Then a matrix for every row is less than what a TPU's grouped product reads. Hopper's reads the chosen ones alone.
    return ops.platform() == "tpu" and 4 * experts.size <= config.n_routed_experts


def _every_expert(p: Matrices, tokens: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
    """All experts of tokens [N, D], those not chosen with weight 0 -> [N, D] float32."""
    gates = jnp.sum(jax.nn.one_hot(experts, p.gate_up.shape[0]) * weights[..., None], axis=1)
    gate_up = jnp.einsum("nd,edgi->negi", tokens, p.gate_up)
    hidden = swiglu(gate_up[:, :, 0], gate_up[:, :, 1])
    hidden = (hidden.astype(jnp.float32) * gates[..., None]).astype(tokens.dtype)
    return jnp.einsum("nei,eid->nd", hidden, p.down, preferred_element_type=jnp.float32)


def _matrix_by_matrix(p: Matrices, tokens: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
    """The chosen experts of a few tokens [N, D], one after the other -> [N, D] float32.

    On a TPU XLA reads one slice of a stack in place but copies what a gather or a reshape of it makes.
    """

    def apply(token: jax.Array, expert: jax.Array) -> jax.Array:  # [D] -> [D]
        def matrix(stack: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False)

        gate_up = jnp.einsum("d,dgi->gi", token, matrix(p.gate_up))
        return jnp.einsum("i,id->d", swiglu(gate_up[0], gate_up[1]), matrix(p.down))

    n, k = experts.shape
    rows = jnp.stack([jnp.stack([apply(tokens[i], experts[i, j]) for j in range(k)]) for i in range(n)])  # [N, k, D]
    return jnp.sum(rows * weights[..., None], axis=1)


def _sorted_by_expert(p: Matrices, tokens: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
    """The chosen experts of tokens [N, D]: rows sorted by expert, two grouped products -> [N, D] float32."""
    k, groups = experts.shape[1], p.gate_up.shape[0]
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = tokens_per_expert(experts, groups)
    hidden = ops.grouped_swiglu(tokens[order // k], p.gate_up, sizes)
    rows = ops.grouped_matmul(hidden, p.down, sizes)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    rows = rows[back].reshape(-1, k, tokens.shape[-1]).astype(jnp.float32)
    return jnp.sum(rows * weights[..., None], axis=1)
