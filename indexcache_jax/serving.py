"""A model in the form that inference runs: one tree of weights and one set of cache buffers per layer.

`Params` stacks equal layers, which is what training, sharding and checkpoints want. Inference wants other things:

- A layer by itself is one program for prefill, compiled once for each kind of layer (F or S, dense or experts) however
  many layers there are. The host queues them one after the other; a chunk of prompt keeps the device busy for longer.
- All layers and many steps are one program for decoding, so that between tokens nothing returns to the host.
- What reads the same input is one matrix: query latent, key-value latent, index key and index head weights; query heads
  and index query heads; router and shared experts. A step of decoding then is fewer launches. A chunk of prompt cuts two
  of these matrices again, because their products are larger than they are (`_queries`, `mlp`).
- A matrix is [outputs, inputs]. For one token a product then is a sum along contiguous memory, which XLA fuses with what
  stands before and after it, where [inputs, outputs] would be a product written to memory and a second pass over it.
- A single token on Hopper goes through `pallas_kernels.decode_layer`: everything between two attentions is one launch. An
  S layer is that one and the attention, an F layer has the scores and the selection besides, where XLA's own launches
  were 23 and 33; 8 layers FSSSFSSS of the 30B shape are 35 a step (H200), 15 of them outside the layers. `step` takes
  this way where `decode_layer.why_not` has nothing against any layer: one row, weights and latents in bfloat16, index
  keys in bfloat16 or float8_e4m3fn, no biases of projections, no groups of experts. Anything else goes layer by layer in
  XLA: more rows at once, latents in 8 bits, other devices.

The mathematics is that of `model`, whose forward the tests hold it against.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

import pallas_kernels
from indexcache_jax import moe
from indexcache_jax.config import Config
from indexcache_jax.model import Positions, mlp_layers, place
from indexcache_jax.norm import layer_norm, rms_norm
from indexcache_jax.params import MLP, MoE, Params, at_layer, check_schedule, init, slots
from indexcache_jax.rope import rotate
from indexcache_jax.schedule import Schedule
from pallas_kernels import quant
from pallas_kernels.decode_layer import api as decode_layer

FP8 = jnp.float8_e4m3fn


@flax.struct.dataclass
class Dense:
    gate_up: jax.Array  # [2 F, D]
    down: jax.Array  # [D, F]


@flax.struct.dataclass
class Experts:
    """The routed experts as in Params, since that is what grouped_matmul multiplies."""

    router: jax.Array  # [E + 2 Is, D]: the router, then the shared experts' gate and up projections
    router_bias: jax.Array  # [E] float32
    gate_up: jax.Array  # [E, D, 2, I]
    down: jax.Array  # [E, I, D]
    shared_down: jax.Array | None  # [D, Is]


@flax.struct.dataclass
class Layer:
    """One layer. An S layer has no key norm, and no rows of the indexer in `down` and `up`."""

    norm: jax.Array  # [D]
    down: jax.Array  # [R + C + dr (+ Di + Hi), D]
    down_bias: jax.Array | None  # [R + C + dr]
    q_norm: jax.Array  # [R]
    kv_norm: jax.Array  # [C]
    key_norm: jax.Array | None  # [Di]
    key_norm_bias: jax.Array | None  # [Di]
    up: jax.Array  # [H (dn + dr) (+ Hi Di), R]
    k_up: jax.Array  # [H, C, dn]
    v_up: jax.Array  # [H, dv, C]
    out: jax.Array  # [D, H dv]
    out_bias: jax.Array | None  # [D]
    mlp_norm: jax.Array  # [D]
    mlp: Dense | Experts

    @property
    def full(self) -> bool:
        return self.key_norm is not None


@flax.struct.dataclass
class Weights:
    embedding: jax.Array  # [V, D]
    layers: tuple[Layer, ...]
    final_norm: jax.Array  # [D]
    head: jax.Array | None  # [V, D]; None where embeddings are tied


@flax.struct.dataclass
class LayerCache:
    """One layer's tokens, [B, T, ...]. Scales [B, T] float32 exist for what is kept in float8_e4m3fn."""

    latents: jax.Array  # [B, T, C + dr]
    latent_scales: jax.Array | None
    index_keys: jax.Array | None  # [B, T, Di]; None on S layers
    index_scales: jax.Array | None


@flax.struct.dataclass
class Cache:
    """A row's position t holds token t of that row; only the first lengths[b] positions count."""

    layers: tuple[LayerCache, ...]
    lengths: jax.Array  # [B] int32

    @property
    def max_len(self) -> int:
        return self.layers[0].latents.shape[1]


# ---- weights


def _one(params: Params, layer: Any, indexer_slot: Any, mlp_slot: Any, config: Config, full: bool, experts: bool) -> Layer:
    """A layer of `params`; its places in the stacks may be traced, `full` and `experts` say which stacks it is in."""
    c, p = config, at_layer(params.attention, layer)
    down, up, bias, index = [p.q_down.T, p.kv_down.T], [p.q_up.reshape(c.q_lora_rank, -1).T], None, None
    if full:
        index = at_layer(params.indexer, indexer_slot)
        down += [index.keys.T, index.head_weights.T]
        up.append(index.queries.reshape(c.q_lora_rank, -1).T)
    if p.q_down_bias is not None:
        bias = jnp.concatenate([p.q_down_bias, p.kv_down_bias])
    mlp: Dense | Experts
    if experts:
        m: MoE = at_layer(params.moe, mlp_slot)
        router = [m.router.T]
        if m.shared is not None:
            router.append(m.shared.gate_up.reshape(c.hidden_size, -1).T)
        shared_down = None if m.shared is None else m.shared.down.T
        mlp = Experts(jnp.concatenate(router), m.router_bias, m.gate_up, m.down, shared_down)
    else:
        d: MLP = at_layer(params.dense, mlp_slot)
        mlp = Dense(d.gate_up.reshape(c.hidden_size, -1).T, d.down.T)
    return Layer(
        norm=at_layer(params.input_norm, layer),
        down=jnp.concatenate(down),
        down_bias=bias,
        q_norm=p.q_norm,
        kv_norm=p.kv_norm,
        key_norm=None if index is None else index.key_norm,
        key_norm_bias=None if index is None else index.key_norm_bias,
        up=jnp.concatenate(up),
        k_up=p.k_up.swapaxes(1, 2),
        v_up=p.v_up.swapaxes(1, 2),
        out=p.out.reshape(-1, c.hidden_size).T,
        out_bias=p.out_bias,
        mlp_norm=at_layer(params.mlp_norm, layer),
        mlp=mlp,
    )


_convert = jax.jit(_one, static_argnames=("full", "experts"))


def weights_of(params: Params, config: Config, schedule: Schedule) -> Weights:
    """`params` of a model under `schedule` for inference. Both exist until the caller drops `params`.

    ValueError where `params` are not those of `schedule`.
    """
    check_schedule(params, schedule)
    full_slots, (dense, sparse) = slots(schedule.full_layers), mlp_layers(config)
    mlp_slots = {**slots(dense), **slots(sparse)}
    layers = tuple(
        _convert(params, i, full_slots.get(i, 0), mlp_slots[i], config, full=full, experts=config.moe_layers[i])
        for i, full in enumerate(schedule.is_full)
    )
    head = None if params.head is None else params.head.T
    return Weights(params.embedding, layers, params.final_norm, head)


@functools.partial(jax.jit, static_argnames=("experts", "dtype"))
def _random_layer(key: jax.Array, config: Config, experts: bool, dtype: Any) -> Layer:
    one = dataclasses.replace(config, num_layers=1, moe_layers=(experts,))
    return _one(init(key, one, Schedule("F"), dtype), 0, 0, 0, one, full=True, experts=experts)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random_rows(key: jax.Array, scale: float, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return (scale * jax.random.normal(key, shape, dtype)).astype(dtype)


def random_weights(key: jax.Array, config: Config, dtype: Any = jnp.bfloat16) -> Weights:
    """Random weights with an indexer in every layer, made on the device layer by layer: for measuring speed."""
    keys, shape = jax.random.split(key, config.num_layers + 2), (config.vocab_size, config.hidden_size)
    return Weights(
        embedding=_random_rows(keys[0], config.initializer_range, shape, dtype),
        layers=tuple(_random_layer(k, config, experts, dtype) for k, experts in zip(keys[2:], config.moe_layers, strict=True)),
        final_norm=jnp.ones(config.hidden_size, dtype),
        head=None if config.tie_word_embeddings else _random_rows(keys[1], config.hidden_size**-0.5, shape, dtype),
    )


def restrict(weights: Weights, config: Config, schedule: Schedule) -> Weights:
    """The same model with fewer F layers. What an S layer keeps is shared with `weights`, but for two cut matrices.

    ValueError where `schedule` asks for an indexer that `weights` do not have.
    """
    if schedule.num_layers != len(weights.layers):
        raise ValueError(f"schedule pattern: {schedule.num_layers} entries for {len(weights.layers)} layers")
    heads = config.num_heads * config.qk_head_dim

    def shared(layer: Layer) -> Layer:
        if not layer.full:
            return layer
        down, up = layer.down[: config.q_lora_rank + config.latent_dim], layer.up[:heads]
        return dataclasses.replace(layer, down=down, up=up, key_norm=None, key_norm_bias=None)

    layers = []
    for i, (layer, full) in enumerate(zip(weights.layers, schedule.is_full, strict=True)):
        if full and not layer.full:
            raise ValueError(f"schedule pattern: layer {i} is F, but these weights have no indexer there")
        layers.append(layer if full else shared(layer))
    return dataclasses.replace(weights, layers=tuple(layers))


# ---- cache


def init_cache(
    config: Config,
    schedule: Schedule,
    batch: int,
    max_len: int,
    dtype: Any = jnp.bfloat16,
    *,
    latent_dtype: Any = None,
    index_dtype: Any = None,
) -> Cache:
    """An empty cache for `batch` rows of at most `max_len` tokens.

    `latent_dtype` and `index_dtype` overrule `dtype` for one of the two parts: float8_e4m3fn keeps it in 8 bits with a
    scale a token, 580 instead of 1152 and 132 instead of 256 bytes. ValueError for sizes below 1.
    """
    if batch < 1 or max_len < 1:
        raise ValueError(f"init_cache: batch {batch} and max_len {max_len} must be at least 1")
    latent_dtype, index_dtype = (jnp.dtype(dtype if given is None else given) for given in (latent_dtype, index_dtype))

    def scales(kind: Any) -> jax.Array | None:
        return jnp.zeros((batch, max_len), jnp.float32) if kind == FP8 else None

    def layer(full: bool) -> LayerCache:
        return LayerCache(
            latents=jnp.zeros((batch, max_len, config.latent_dim), latent_dtype),
            latent_scales=scales(latent_dtype),
            index_keys=jnp.zeros((batch, max_len, config.index_head_dim), index_dtype) if full else None,
            index_scales=scales(index_dtype) if full else None,
        )

    return Cache(tuple(layer(full) for full in schedule.is_full), jnp.zeros((batch,), jnp.int32))


def bytes_per_token(config: Config, schedule: Schedule, latent_dtype: Any, index_dtype: Any) -> int:
    """What one token takes in the cache, all layers together."""

    def one(width: int, dtype: Any) -> int:
        return width * jnp.dtype(dtype).itemsize + (4 if dtype == FP8 else 0)

    return config.num_layers * one(config.latent_dim, latent_dtype) + schedule.num_full * one(
        config.index_head_dim, index_dtype
    )


def fork(cache: Cache, copies: int, max_len: int | None = None) -> Cache:
    """Every row `copies` times, next to each other: one prefilled document, many questions. `cache` stays as it is.

    `max_len`: tokens that a row has room for, which must be those it holds at least; default as in `cache`.
    """
    if copies < 1:
        raise ValueError(f"fork: copies {copies} must be at least 1")
    layers = jax.tree.map(lambda x: _copies(x, copies, max_len or cache.max_len), cache.layers)
    return Cache(layers, jnp.repeat(cache.lengths, copies))


@functools.partial(jax.jit, static_argnames=("copies", "max_len"))
def _copies(x: jax.Array, copies: int, max_len: int) -> jax.Array:
    x = jnp.repeat(x[:, :max_len], copies, axis=0)
    return jnp.pad(x, [(0, 0), (0, max_len - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def _write(buffer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Puts new [B, S, ...] at positions [B, S] of buffer [B, T, ...]; those outside 0 .. T-1 are dropped.

    Only where a single token is all there is, one past the end takes the last place: dropping it would be a launch more.
    """
    if positions.shape == (1, 1):
        start = (0, positions[0, 0]) + (0,) * (buffer.ndim - 2)
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), start)
    rows = jnp.arange(new.shape[0])[:, None]
    places = jnp.where(positions < 0, buffer.shape[1], positions)
    return buffer.at[rows, places].set(new.astype(buffer.dtype), mode="drop")


def _remember(cache: LayerCache, latents: jax.Array, keys: jax.Array | None, positions: jax.Array) -> LayerCache:
    latent_scales, index_keys, index_scales = cache.latent_scales, cache.index_keys, cache.index_scales
    if latent_scales is not None:
        latents, scales = quant.quantise_latents(latents)
        latent_scales = _write(latent_scales, scales, positions)
    if keys is not None and index_keys is not None:
        if index_scales is not None:
            keys, scales = quant.quantise_index(keys)
            index_scales = _write(index_scales, scales, positions)
        index_keys = _write(index_keys, keys, positions)
    return LayerCache(_write(cache.latents, latents, positions), latent_scales, index_keys, index_scales)


# ---- layers


def linear(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., K] times weight [N, K] -> [..., N], accumulated in float32, in `dtype` or that of x.

    For a single row on a GPU it is written as the sum that it is: a library's product would be a launch that nothing fuses
    with, and for float32 results of bfloat16 it would first convert the matrix.
    """
    if x.size == x.shape[-1] and jax.default_backend() == "gpu":
        products = x.astype(jnp.float32).reshape(-1) * weight.astype(jnp.float32)
        return jnp.sum(products, axis=-1).astype(dtype or x.dtype).reshape(*x.shape[:-1], -1)
    exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, precision=exact, preferred_element_type=dtype or x.dtype)


def _select(
    queries: jax.Array, weights: jax.Array, cache: LayerCache, positions: Positions, keys: int, config: Config
) -> jax.Array:
    assert cache.index_keys is not None  # an F layer's cache has them
    scales = None
    if cache.index_scales is not None:
        queries, query_scales = quant.quantise_index(queries)
        weights, scales = weights * query_scales, cache.index_scales[:, :keys]
    return pallas_kernels.indexer_topk(
        queries,
        cache.index_keys[:, :keys],
        weights,
        k_select=min(config.index_topk, keys),
        q_positions=positions.queries,
        kv_lengths=positions.kv_lengths,
        key_scales=scales,
    )


def _queries(p: Layer, q_latent: jax.Array, positions: Positions, config: Config) -> tuple[jax.Array, jax.Array]:
    """The absorbed queries [B, S, H, C + dr], and the index queries [B, S, Hi Di] before rope (Hi 0 on an S layer).

    With one token a row a single product is cut into its parts. For a chunk of prompt the matrix is what is cheaper to
    cut, and the absorbing product leaves room for the rope part, which then is written into it: cutting and joining the
    queries themselves are two passes over them and a transposition.
    """
    c, (b, s, _) = config, q_latent.shape
    rows = c.num_heads * c.qk_head_dim
    if s == 1:
        up = linear(q_latent, p.up)
        heads, index_queries = up[..., :rows].reshape(b, s, c.num_heads, c.qk_head_dim), up[..., rows:]
        nope, rope = heads[..., : c.qk_nope_head_dim], heads[..., c.qk_nope_head_dim :]
        rope = rotate(rope, *positions.angles, interleaved=True)
        return jnp.concatenate([jnp.einsum("bshn,hcn->bshc", nope, p.k_up), rope], axis=-1), index_queries
    matrices, tokens = p.up[:rows].reshape(c.num_heads, c.qk_head_dim, -1), q_latent.reshape(b * s, -1)
    nope = linear(tokens, matrices[:, : c.qk_nope_head_dim].reshape(-1, tokens.shape[1]))
    wide = jnp.pad(p.k_up, ((0, 0), (0, c.qk_rope_head_dim), (0, 0)))
    absorbed = jnp.einsum("thn,hcn->thc", nope.reshape(b * s, c.num_heads, -1), wide).reshape(b, s, c.num_heads, -1)
    # XLA would make one product of two small ones again.
    tokens = jax.lax.optimization_barrier(tokens)
    rope = linear(tokens, matrices[:, c.qk_nope_head_dim :].reshape(-1, tokens.shape[1])).reshape(b, s, c.num_heads, -1)
    rope = rotate(rope, *positions.angles, interleaved=True)
    return absorbed.at[..., c.kv_lora_rank :].set(rope), linear(q_latent, p.up[rows:])


def attention(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, keys: int, config: Config
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """x + attention(norm(x)), the indices [B, S, k] it attended with, and the cache with the new tokens in it.

    Only the first `keys` positions of the cache are looked at.
    """
    c, (b, s, _), dtype = config, x.shape, x.dtype
    h = rms_norm(x, p.norm, c.rms_norm_eps)
    down = linear(h, p.down, jnp.float32)
    ends = [c.q_lora_rank, c.q_lora_rank + c.kv_lora_rank, c.q_lora_rank + c.latent_dim]
    q_latent, compressed, rope, rest = jnp.split(down, ends, axis=-1)
    if p.down_bias is not None:
        q_latent, compressed, rope = (
            part + bias for part, bias in zip((q_latent, compressed, rope), jnp.split(p.down_bias, ends[:2]), strict=True)
        )
    q_latent = rms_norm(q_latent, p.q_norm, c.latent_norm_eps).astype(dtype)
    compressed = rms_norm(compressed, p.kv_norm, c.latent_norm_eps)
    latents = jnp.concatenate([compressed, rotate(rope, *positions.angles, interleaved=True)], axis=-1).astype(dtype)

    absorbed, index_queries = _queries(p, q_latent, positions, c)

    if p.full:

        def rotate_front(x: jax.Array) -> jax.Array:
            front, back = x[..., : c.qk_rope_head_dim], x[..., c.qk_rope_head_dim :]
            return jnp.concatenate([rotate(front, *positions.angles, interleaved=c.index_rope_interleave), back], axis=-1)

        assert p.key_norm is not None and p.key_norm_bias is not None
        keys_new = rotate_front(layer_norm(rest[..., : c.index_head_dim], p.key_norm, p.key_norm_bias)).astype(dtype)
        cache = _remember(cache, latents, keys_new, positions.queries)
        index_queries = index_queries.reshape(b, s, c.index_n_heads, c.index_head_dim)
        weights = rest[..., c.index_head_dim :] * (c.index_n_heads**-0.5 * c.index_head_dim**-0.5)
        indices = _select(rotate_front(index_queries), weights, cache, positions, keys, c)
    else:
        cache = _remember(cache, latents, None, positions.queries)
    assert indices is not None  # the first layer is F

    context = pallas_kernels.sparse_mla(
        absorbed,
        cache.latents[:, :keys],
        indices,
        scale=c.attention_scale,
        value_dim=c.kv_lora_rank,
        latent_scales=None if cache.latent_scales is None else cache.latent_scales[:, :keys],
    )
    heads = jnp.einsum("bshc,hvc->bshv", context, p.v_up)
    out = linear(heads.reshape(b, s, -1), p.out)
    return x + (out if p.out_bias is None else out + p.out_bias), indices, cache


def _swiglu(gate_up: jax.Array, down: jax.Array, dtype: Any) -> jax.Array:
    gate, up = jnp.split(gate_up.astype(dtype), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, down)


def mlp(p: Layer, x: jax.Array, config: Config) -> jax.Array:
    """x + mlp(norm(x))."""
    h = rms_norm(x, p.mlp_norm, config.rms_norm_eps)
    if isinstance(p.mlp, Dense):
        return x + _swiglu(linear(h, p.mlp.gate_up), p.mlp.down, x.dtype)
    experts = config.n_routed_experts
    if x.shape[1] == 1:
        first = linear(h, p.mlp.router, jnp.float32)
        logits, shared = first[..., :experts], first[..., experts:]
    else:  # the router alone needs float32
        logits, shared = linear(h, p.mlp.router[:experts], jnp.float32), linear(h, p.mlp.router[experts:])
    chosen = moe.choose(logits.reshape(-1, experts), p.mlp.router_bias, config)
    out = moe.routed(p.mlp, h.reshape(-1, h.shape[-1]), *chosen, config).reshape(x.shape)
    if p.mlp.shared_down is not None:
        out = out + _swiglu(shared, p.mlp.shared_down, x.dtype)
    return (x + out).astype(x.dtype)


def layer(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, keys: int, config: Config
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
    """One layer over new tokens x [B, S, D]: hidden states, an F layer's indices for those that follow, and its cache.

    An S layer returns None for the indices that it was given: as a program's result they would be copied.
    """
    x, indices, cache = attention(p, x, indices, cache, positions, keys, config)
    return mlp(p, x, config), indices if p.full else None, cache


# `indices` is donated only by F layers, which replace it.
prefill_layer = jax.jit(layer, static_argnames="keys", donate_argnames=("x", "cache"))
_same_program = jax.jit(layer, static_argnames="keys")  # traced once for all layers of a kind


@jax.jit
def embed(
    embedding: jax.Array, tokens: jax.Array, starts: jax.Array, lengths: jax.Array, config: Config
) -> tuple[jax.Array, Positions]:
    """Hidden states and positions of tokens [B, S], of which lengths [B] count, after starts [B] earlier ones."""
    return embedding[tokens], place(starts, lengths, tokens.shape[1], config)


def logits(weights: Weights, x: jax.Array, config: Config) -> jax.Array:
    """Hidden states [..., D] -> [..., V] float32."""
    head = weights.embedding if weights.head is None else weights.head
    return linear(rms_norm(x, weights.final_norm, config.rms_norm_eps), head, jnp.float32)


def step(weights: Weights, token: jax.Array, cache: Cache, config: Config, keys: int | None = None) -> tuple[jax.Array, Cache]:
    """Appends one token [B] a row: logits [B, V] float32 of the next, and the cache.

    `keys`: only so much of the cache is looked at, which must hold the new tokens too; default all of it.
    """
    ones = jnp.ones_like(cache.lengths)
    x, positions = embed(weights.embedding, token[:, None], cache.lengths, ones, config)
    keys = keys or cache.max_len
    if all(_in_few_launches(p, x, one, positions, config) for p, one in zip(weights.layers, cache.layers, strict=True)):
        x, layers = _few_launches(weights.layers, x, cache.layers, positions, keys, config)
    else:
        indices, layers = None, []
        for p, one in zip(weights.layers, cache.layers, strict=True):
            x, selected, one = _same_program(p, x, indices, one, positions, keys, config)
            indices = selected if p.full else indices
            layers.append(one)
    return logits(weights, x[:, 0], config), Cache(tuple(layers), positions.kv_lengths)


# ---- a single token, its layers' dense parts in one launch between two attentions


def _before(p: Layer, cache: LayerCache, positions: Positions, config: Config) -> decode_layer.AttentionWeights:
    c = config
    weights = {"norm": p.norm, "down": p.down, "q_norm": p.q_norm, "kv_norm": p.kv_norm, "k_up": p.k_up}
    rows = c.num_heads * c.qk_head_dim
    weights["up"] = p.up[:rows]
    if p.key_norm is not None and p.key_norm_bias is not None:
        weights |= {"index_up": p.up[rows:], "key_norm": p.key_norm, "key_norm_bias": p.key_norm_bias}
    return decode_layer.AttentionWeights(
        weights=weights,
        latents=cache.latents,
        index_keys=cache.index_keys,
        index_scales=cache.index_scales,
        position=positions.queries,
        cos_sin=positions.angles,
        eps=c.rms_norm_eps,
        latent_eps=c.latent_norm_eps,
        index_scale=c.index_n_heads**-0.5 * c.index_head_dim**-0.5,
        index_interleaved=c.index_rope_interleave,
    )


def _after(p: Layer) -> dict[str, jax.Array]:
    weights = {"v_up": p.v_up, "out": p.out, "mlp_norm": p.mlp_norm}
    if isinstance(p.mlp, Dense):
        return weights | {"shared_gate_up": p.mlp.gate_up, "shared_down": p.mlp.down}
    m = p.mlp
    experts = m.router_bias.size
    weights |= {"router": m.router[:experts], "router_bias": m.router_bias, "gate_up": m.gate_up, "expert_down": m.down}
    return weights if m.shared_down is None else weights | {"shared_gate_up": m.router[experts:], "shared_down": m.shared_down}


def _in_few_launches(p: Layer, x: jax.Array, cache: LayerCache, positions: Positions, config: Config) -> bool:
    if p.down_bias is not None or p.out_bias is not None:
        return False
    return decode_layer.why_not(x, _before(p, cache, positions, config), _after(p), config.n_group) is None


@jax.jit
def _inputs(
    p: Layer, x: jax.Array, cache: LayerCache, positions: Positions, config: Config, barrier_count: jax.Array
) -> tuple[tuple[jax.Array | None, ...], LayerCache, jax.Array]:
    """What the first layer's attention takes, its cache with the token in it, and how often the device's blocks have met."""
    ready, barrier_count = decode_layer.attention_inputs(x, _before(p, cache, positions, config), _after(p), barrier_count)
    return *_split(ready), barrier_count


def _split(ready: decode_layer.AttentionOperands) -> tuple[tuple[jax.Array | None, ...], LayerCache]:
    cache = LayerCache(ready.latents, None, ready.index_keys, ready.index_scales)
    return (ready.queries, ready.index_queries, ready.index_weights), cache


@functools.partial(jax.jit, static_argnames="keys")
def _attend(
    queries: tuple[jax.Array | None, ...],
    indices: jax.Array | None,
    cache: LayerCache,
    positions: Positions,
    keys: int,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """What the layer attended to, and with which indices."""
    absorbed, index_queries, index_weights = queries
    if index_queries is not None:
        assert cache.index_keys is not None and index_weights is not None
        scales = None if cache.index_scales is None else cache.index_scales[:, :keys]
        indices = pallas_kernels.indexer_topk(
            index_queries,
            cache.index_keys[:, :keys],
            index_weights,
            k_select=min(config.index_topk, keys),
            q_positions=positions.queries,
            kv_lengths=positions.kv_lengths,
            key_scales=scales,
        )
    assert absorbed is not None and indices is not None  # the first layer is F
    latents = cache.latents[:, :keys]
    context = pallas_kernels.sparse_mla(absorbed, latents, indices, scale=config.attention_scale, value_dim=config.kv_lora_rank)
    return context, indices


@jax.jit
def _outputs(
    p: Layer,
    x: jax.Array,
    context: jax.Array,
    following: tuple[Layer, LayerCache] | None,
    positions: Positions,
    config: Config,
    barrier_count: jax.Array,
) -> tuple[jax.Array, tuple[tuple[jax.Array | None, ...], LayerCache] | None, jax.Array]:
    """The layer's output, what the following layer's attention takes with its cache, and how often blocks have met."""
    x, ready, barrier_count = decode_layer.layer_outputs(
        x,
        context,
        _after(p),
        barrier_count,
        eps=config.rms_norm_eps,
        num_experts_per_token=config.num_experts_per_tok,
        normalised=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        next_layer=None if following is None else _before(*following, positions, config),
        next_outputs=None if following is None else _after(following[0]),
    )
    return x, None if ready is None else _split(ready), barrier_count


def _few_launches(
    layers: tuple[Layer, ...],
    x: jax.Array,
    caches: tuple[LayerCache, ...],
    positions: Positions,
    keys: int,
    config: Config,
) -> tuple[jax.Array, list[LayerCache]]:
    """All layers over a single token x [1, 1, D], and their caches."""
    queries, cache, barrier_count = _inputs(layers[0], x, caches[0], positions, config, jnp.zeros((1,), jnp.int32))
    indices, done = None, []
    for i, p in enumerate(layers):
        done.append(cache)
        context, indices = _attend(queries, indices, cache, positions, keys, config)
        following = (layers[i + 1], caches[i + 1]) if i + 1 < len(layers) else None
        x, then, barrier_count = _outputs(p, x, context, following, positions, config, barrier_count)
        if then is not None:
            queries, cache = then
    return x, done
