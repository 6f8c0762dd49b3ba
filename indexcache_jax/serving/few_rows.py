"""A token each of a few rows on Hopper: a layer in fewer kernels than XLA makes of `layer.layer`.

With few rows a layer reads its weights once and computes little, so that its time is how fast weights stream and how many
kernels it has. Here one kernel normalises latents and puts the tokens into the caches, one makes absorbed queries, one chooses
experts and one applies them. What else a layer has is as in `layer`. Where `why_not` has nothing against a model, `model.step`
runs its rows through `run_layer`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from indexcache_jax import ops, sharding
from indexcache_jax.config import Config
from indexcache_jax.norm import rms_norm
from indexcache_jax.positions import Positions
from indexcache_jax.serving import fused
from indexcache_jax.serving.cache import Cache, LayerCache
from indexcache_jax.serving.layer import attend, linear, mlp, select
from indexcache_jax.serving.weights import Dense, Experts, Layer, Weights
from pallas_kernels.quant import Scaled


def why_not(weights: Weights, x: jax.Array, cache: Cache, positions: Positions, config: Config) -> str | None:
    """Why these kernels cannot serve x [B, 1, D] in all layers, None where they can."""
    if sharding.current()[0] is not None:
        return "they run on a device that computes alone"
    if not 2 <= x.shape[0] <= ops.routed_mlp.MAX_ROWS:
        return f"they take 2 to {ops.routed_mlp.MAX_ROWS} rows, not {x.shape[0]}"
    for p, layer_cache in zip(weights.layers, cache.layers, strict=True):
        if reason := _why_not_layer(p, x, layer_cache, positions, config):
            return reason
    return None


def _why_not_layer(p: Layer, x: jax.Array, cache: LayerCache, positions: Positions, config: Config) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"they take activations in bfloat16, not in {x.dtype}"
    if p.down_bias is not None:
        return "they take no biases of projections, and this model has them (attention_bias)"
    if reason := ops.decode_layer.why_not_rows(fused.attention_weights(p, cache, positions, config)):
        return reason
    return None if isinstance(p.mlp, Dense) else _why_not_experts(p.mlp, x, config)


def _why_not_experts(m: Experts, x: jax.Array, config: Config) -> str | None:
    matrices = m.gate_up, m.down, m.shared_gate_up, m.shared_down
    if any(matrix is not None and not isinstance(matrix, Scaled) for matrix in matrices):
        return "they read experts in 8 bits, and these are not"
    if config.n_routed_experts <= 4 * config.num_experts_per_tok:
        chosen = f"{config.num_experts_per_tok} of {config.n_routed_experts}"
        return f"multiplying by every expert is faster where a row chooses {chosen}"
    rows = jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), x.dtype)
    logits = jax.ShapeDtypeStruct((x.shape[0], m.router.shape[0]), jnp.float32)
    options = _options(m, config)
    if reason := ops.routing.BACKENDS["mosaic_gpu"].why_not(logits, m.router_bias, **options):
        return reason
    routes = jax.eval_shape(lambda logits, bias: ops.routing.reference.route(logits, bias, **options), logits, m.router_bias)
    return ops.routed_mlp.BACKENDS["mosaic_gpu"].why_not(rows, routes, *matrices)


def _options(m: Experts, config: Config) -> dict[str, Any]:
    return {
        "choices": config.num_experts_per_tok,
        "normalised": config.norm_topk_prob,
        "scale": config.routed_scaling_factor,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "shared": m.shared_down is not None,
    }


def attention(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """Does what `layer.attention` does, for a token a row: x [B, 1, D], the indices that it attended to, and the caches."""
    with jax.named_scope("project"):
        product = linear(rms_norm(x, p.norm, config.rms_norm_eps), p.down, jnp.float32)
        given = fused.attention_weights(p, cache, positions, config)
        q_latent, *arrays = ops.decode_layer.latents_of_rows(product, given)
        cache = LayerCache(*arrays)
        # XLA would make one product of this and that with `index_up`.
        product_up = linear(jax.lax.optimization_barrier(q_latent), p.up)
        absorbed = ops.decode_layer.absorbed_queries(product_up, p.k_up, positions.cos_sin)
    if p.full:
        with jax.named_scope("index"):
            head_weights = product[..., config.q_lora_rank + config.latent_dim + config.index_head_dim :]
            indices = select(p, q_latent, head_weights, cache, positions, kv_length, config)
    assert indices is not None  # the first layer is F
    return attend(p, x, absorbed, indices, cache, kv_length, config), indices, cache


def experts(p: Layer, x: jax.Array, config: Config) -> jax.Array:
    """Does what `layer.mlp` does in a layer with experts, for x [B, 1, D]."""
    with jax.named_scope("mlp"):
        m = p.mlp
        assert isinstance(m, Experts) and isinstance(m.gate_up, Scaled) and isinstance(m.down, Scaled)
        h = rms_norm(x[:, 0], p.mlp_norm, config.rms_norm_eps)
        routes = ops.routing.route(linear(h, m.router, jnp.float32), m.router_bias, **_options(m, config))
        out = ops.routed_mlp.routed_mlp(h, routes, m.gate_up, m.down, m.shared_gate_up, m.shared_down)
        return (x + out[:, None]).astype(x.dtype)


def layer(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
    """Does what `layer.layer` does, for a token a row."""
    x, indices, cache = attention(p, x, indices, cache, positions, kv_length, config)
    x = mlp(p, x, config) if isinstance(p.mlp, Dense) else experts(p, x, config)
    return x, indices if p.full else None, cache


run_layer = jax.jit(layer, static_argnames="kv_length")
