"""A token each of a few rows on Hopper: a layer in fewer kernels than XLA makes of `layer.layer`.

With few rows a layer reads its weights once and computes little, so that its time is how fast weights stream and how many
kernels it has. Here one kernel normalises latents and puts the tokens into the caches, one makes absorbed queries, one chooses
experts and one applies them. What else a layer has is as in `layer`. Where `why_not` has nothing against a model, `model.step`
runs its rows through `run_layer`.

On a mesh every device does so with its own rows and heads. Where experts are split, the rows of all devices are gathered
before the router, every device chooses for all of them and applies its own experts, and the sums go back to the rows' devices.
The shared experts are read once for all rows, and each device takes those of its own rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from indexcache_jax import ops, sharding
from indexcache_jax.config import Config
from indexcache_jax.moe import Matrices
from indexcache_jax.norm import rms_norm
from indexcache_jax.positions import Positions
from indexcache_jax.rope import CosSin
from indexcache_jax.serving import fused
from indexcache_jax.serving.cache import Cache, LayerCache
from indexcache_jax.serving.layer import attend, linear, mlp, select
from indexcache_jax.serving.weights import Dense, Experts, Layer, Weights
from pallas_kernels.quant import Scaled


def why_not(weights: Weights, x: jax.Array, cache: Cache, positions: Positions, config: Config) -> str | None:
    """Why these kernels cannot serve x [B, 1, D] in all layers, None where they can."""
    if sharding.devices_along("tokens") > 1:
        return "they write whole rows of the cache, and devices split the tokens of this one"
    fewest = 2 if sharding.current()[0] is None else 1
    if not fewest <= x.shape[0] <= ops.routed_mlp.MAX_ROWS:
        return f"they take {fewest} to {ops.routed_mlp.MAX_ROWS} rows, not {x.shape[0]}"
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
    shared = m.shared_gate_up, m.shared_down
    if any(matrix is not None and not isinstance(matrix, Scaled) for matrix in (m.gate_up, m.down, *shared)):
        return "they read experts in 8 bits, and these are not"
    if config.n_routed_experts <= 4 * config.num_experts_per_tok:
        chosen = f"{config.num_experts_per_tok} of {config.n_routed_experts}"
        return f"multiplying by every expert is faster where a row chooses {chosen}"
    exchange = _exchange(m, x)
    devices = exchange.devices if exchange else 1
    shape = jax.ShapeDtypeStruct
    own = jax.tree.map(lambda array: shape((array.shape[0] // devices, *array.shape[1:]), array.dtype), (m.gate_up, m.down))
    # All rows of the step are gathered where experts are split; elsewhere a device has as many at most.
    rows, logits = shape((x.shape[0], x.shape[2]), x.dtype), shape((x.shape[0], m.router.shape[0]), jnp.float32)
    given, options = (logits, m.router_bias, shape((1,), jnp.int32)), _options(m, config) | {"num_own": own[0].shape[0]}
    if reason := ops.routing.BACKENDS["mosaic_gpu"].why_not(*given, **options):
        return reason
    routes = jax.eval_shape(functools.partial(ops.routing.reference.route, **options), *given)
    return ops.routed_mlp.BACKENDS["mosaic_gpu"].why_not(rows, routes, *own, *shared)


def _options(m: Experts, config: Config) -> dict[str, Any]:
    return ops.choice_options(config) | {"shared": m.shared_down is not None}


def _exchange(m: Experts, x: jax.Array) -> sharding.Exchange | None:
    return sharding.exchange(x.shape[:1], ("batch",), "expert", m.gate_up.shape[0])


def attention(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """Does what `layer.attention` does, for a token a row: x [B, 1, D], the indices that it attended to, and the caches."""
    with jax.named_scope("project"):
        product = linear(rms_norm(x, p.norm, config.rms_norm_eps), p.down, jnp.float32)
        rows = ("batch",)
        on_each = sharding.on_each_device(functools.partial(_latents, config=config), ((), rows, rows, rows), (rows, rows))
        # What is alike on all devices. The other weights are not needed, and some of them are split.
        none = dict.fromkeys(("down", "up", "index_up", "k_up", "v_up", "out"))
        norms = dataclasses.replace(p, **none, mlp=Dense(None, None))
        q_latent, cache = on_each(norms, product, cache, positions)
        of_heads = ("heads",), ("heads",), rows, rows
        absorbed = sharding.on_each_device(_absorbed, of_heads, ("batch", "queries", "heads"))(
            p.up, p.k_up, q_latent, positions.cos_sin
        )
    if p.full:
        with jax.named_scope("index"):
            head_weights = product[..., config.q_lora_rank + config.latent_dim + config.index_head_dim :]
            indices = select(p, q_latent, head_weights, cache, positions, kv_length, config)
    assert indices is not None  # the first layer is F
    return attend(p, x, absorbed, indices, cache, kv_length, config), indices, cache


def _latents(
    p: Layer, product: jax.Array, cache: LayerCache, positions: Positions, config: Config
) -> tuple[jax.Array, LayerCache]:
    """Query latents [N, 1, R] of a device's rows, and their caches with the tokens in them. p: as far as norms are used."""
    given = fused.attention_weights(p, cache, positions, config)
    q_latent, *arrays = ops.decode_layer.latents_of_rows(product, given)
    return q_latent, LayerCache(*arrays)


def _absorbed(up: jax.Array | Scaled, k_up: jax.Array, q_latent: jax.Array, cos_sin: CosSin) -> jax.Array:
    """Absorbed queries [N, 1, H, C + dr] of a device's rows and heads."""
    # XLA would make one product of this and that with `index_up`.
    return ops.decode_layer.absorbed_queries(linear(jax.lax.optimization_barrier(q_latent), up), k_up, cos_sin)


def experts(p: Layer, x: jax.Array, config: Config) -> jax.Array:
    """Does what `layer.mlp` does in a layer with experts, for x [B, 1, D]."""
    with jax.named_scope("mlp"):
        m = p.mlp
        assert isinstance(m, Experts)
        rows = ("batch",)
        on_each = sharding.on_each_device(
            functools.partial(_experts, options=_options(m, config), exchange=_exchange(m, x)),
            (("expert",), (), (), (), rows),
            rows,
        )
        h = rms_norm(x[:, 0], p.mlp_norm, config.rms_norm_eps)
        out = on_each(Matrices(m.gate_up, m.down), (m.shared_gate_up, m.shared_down), m.router, m.router_bias, h)
        return (x + out[:, None]).astype(x.dtype)


def _experts(
    m: Matrices,
    shared: tuple[Scaled | None, Scaled | None],
    router: jax.Array,
    bias: jax.Array,
    h: jax.Array,
    options: Mapping[str, Any],
    exchange: sharding.Exchange | None,
) -> jax.Array:
    """The experts of a device's rows h [N, D] -> [N, D] float32."""
    assert isinstance(m.gate_up, Scaled) and isinstance(m.down, Scaled)
    rows, own = h, None
    if exchange is not None:
        num_own = m.gate_up.shape[0]
        rows, own = exchange.gather(h), (exchange.index() * num_own, num_own)
    routes = ops.routing.route(linear(rows, router, jnp.float32), bias, own=own, **options)
    out, of_shared = ops.routed_mlp.routed_mlp(rows, routes, m.gate_up, m.down, *shared)
    if exchange is not None:
        out = exchange.add_up(out.astype(h.dtype)).astype(jnp.float32)
        of_shared = None if of_shared is None else exchange.own_rows(of_shared)
    return out if of_shared is None else out + of_shared


def layer(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
    """Does what `layer.layer` does, for a token a row."""
    x, indices, cache = attention(p, x, indices, cache, positions, kv_length, config)
    x = mlp(p, x, config) if isinstance(p.mlp, Dense) else experts(p, x, config)
    return x, indices if p.full else None, cache


run_layer = jax.jit(layer, static_argnames="kv_length")
