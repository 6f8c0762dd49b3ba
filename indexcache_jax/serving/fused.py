"""A single token on Hopper: everything between two attentions in one kernel.

Where `why_not` has nothing against any layer, `model.step` runs a token through these functions instead of `layer.layer`. An
S layer is then the attention and one kernel of `pallas_kernels.decode_layer`, an F layer has the scores and the selection
besides; XLA's own kernels for the same work would be 23 and 33. It serves one row on one device, weights in bfloat16 or 8 bits,
latents and index keys in bfloat16 or 8 bits, no biases of projections.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from indexcache_jax import ops, sharding
from indexcache_jax.config import Config
from indexcache_jax.ops import decode_layer
from indexcache_jax.positions import Positions
from indexcache_jax.serving.cache import Cache, LayerCache
from indexcache_jax.serving.weights import Dense, Layer, Weights
from pallas_kernels.quant import Scaled

# Absorbed queries [1, 1, H, C + dr], and of an F layer index queries [1, 1, Hi, Di] and head weights [1, 1, Hi].
Queries = tuple[jax.Array, jax.Array | None, jax.Array | None]


def attention_weights(p: Layer, cache: LayerCache, positions: Positions, config: Config) -> decode_layer.AttentionWeights:
    """What the kernels need of a layer before its attention."""
    c = config
    weights = {"norm": p.norm, "down": p.down, "q_norm": p.q_norm, "kv_norm": p.kv_norm, "up": p.up, "k_up": p.k_up}
    if p.full:
        weights |= {"index_up": p.index_up, "key_norm": p.key_norm, "key_norm_bias": p.key_norm_bias}
    return decode_layer.AttentionWeights(
        weights=weights,
        latents=cache.latents,
        index_keys=cache.index_keys,
        index_scales=cache.index_scales,
        position=positions.queries,
        cos_sin=positions.cos_sin,
        eps=c.rms_norm_eps,
        latent_eps=c.latent_norm_eps,
        index_scale=c.index_scale,
        index_interleaved=c.index_rope_interleave,
    )


def output_weights(p: Layer) -> dict[str, jax.Array | Scaled]:
    """What the kernels need of a layer after its attention."""
    weights: dict[str, jax.Array | Scaled] = {"v_up": p.v_up, "out": p.out, "mlp_norm": p.mlp_norm}
    if isinstance(p.mlp, Dense):
        return weights | {"shared_gate_up": p.mlp.gate_up, "shared_down": p.mlp.down}
    m = p.mlp
    weights |= {"router": m.router, "router_bias": m.router_bias, "gate_up": m.gate_up, "expert_down": m.down}
    return weights if m.shared_down is None else weights | {"shared_gate_up": m.shared_gate_up, "shared_down": m.shared_down}


def choice(p: Layer, config: Config) -> decode_layer.Choice | None:
    """How a layer's experts are chosen, None for a dense layer."""
    if isinstance(p.mlp, Dense):
        return None
    return decode_layer.Choice(config.n_routed_experts, **ops.choice_options(config))


def why_not(weights: Weights, x: jax.Array, cache: Cache, positions: Positions, config: Config) -> str | None:
    """Why these kernels cannot serve x [B, S, D] in all layers, None where they can."""
    if sharding.current()[0] is not None:
        return "they run on a device that computes alone"
    for p, layer_cache in zip(weights.layers, cache.layers, strict=True):
        if p.down_bias is not None or p.out_bias is not None:
            return "it takes no biases of projections"
        operands = attention_weights(p, layer_cache, positions, config)
        if reason := decode_layer.why_not(x, operands, output_weights(p), choice(p, config)):
            return reason
    return None


def _queries_and_cache(operands: decode_layer.AttentionOperands) -> tuple[Queries, LayerCache]:
    cache = LayerCache(operands.latents, operands.index_keys, operands.index_scales)
    return (operands.queries, operands.index_queries, operands.index_weights), cache


@jax.jit
def _first_queries(
    p: Layer, x: jax.Array, cache: LayerCache, positions: Positions, config: Config, barrier_count: jax.Array
) -> tuple[Queries, LayerCache, jax.Array]:
    """The queries of the first layer, its cache with the token in it, and the arrivals at the grid barrier so far."""
    before = attention_weights(p, cache, positions, config)
    operands, barrier_count = decode_layer.attention_inputs(x, before, output_weights(p), barrier_count)
    return *_queries_and_cache(operands), barrier_count


@functools.partial(jax.jit, static_argnames="kv_length")
def _attend(
    queries: Queries, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array]:
    """The context [1, 1, H, C] of a layer's attention, and the indices it attended with."""
    absorbed, index_queries, head_weights = queries
    if index_queries is not None:
        assert cache.index_keys is not None and head_weights is not None
        scales = None if cache.index_scales is None else cache.index_scales[:, :kv_length]
        indices = ops.select(index_queries, cache.index_keys[:, :kv_length], head_weights, positions, config, scales)
    assert indices is not None  # the first layer is F
    return ops.attend(absorbed, jax.tree.map(lambda x: x[:, :kv_length], cache.latents), indices, config), indices


@jax.jit
def _outputs(
    p: Layer,
    x: jax.Array,
    context: jax.Array,
    following: tuple[Layer, LayerCache] | None,
    positions: Positions,
    config: Config,
    barrier_count: jax.Array,
) -> tuple[jax.Array, tuple[Queries, LayerCache] | None, jax.Array]:
    """The layer's output, the queries and the cache of the `following` layer, and the arrivals at the grid barrier."""
    x, operands, barrier_count = decode_layer.layer_outputs(
        x,
        context,
        output_weights(p),
        barrier_count,
        eps=config.rms_norm_eps,
        choice=choice(p, config),
        next_layer=None if following is None else attention_weights(*following, positions, config),
        next_outputs=None if following is None else output_weights(following[0]),
    )
    return x, None if operands is None else _queries_and_cache(operands), barrier_count


def layers(
    weights: Weights, x: jax.Array, cache: Cache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """All layers over a single token x [1, 1, D]: hidden states and the layers' caches.

    Only the first `kv_length` positions of the cache are read.
    """
    zero = jnp.zeros((1,), jnp.int32)
    queries, layer_cache, barrier_count = _first_queries(weights.layers[0], x, cache.layers[0], positions, config, zero)
    indices, done = None, []
    for i, p in enumerate(weights.layers):
        done.append(layer_cache)
        context, indices = _attend(queries, indices, layer_cache, positions, kv_length, config)
        following = (weights.layers[i + 1], cache.layers[i + 1]) if i + 1 < len(weights.layers) else None
        x, after, barrier_count = _outputs(p, x, context, following, positions, config, barrier_count)
        if after is not None:
            queries, layer_cache = after
    return x, tuple(done)
