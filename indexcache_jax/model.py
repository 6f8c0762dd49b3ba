"""The forward pass of a DSA model under a schedule, as pure functions of params.

Every entry point is the same walk over the layers; they differ in where a layer's latents and index keys come from
(this call alone, or a cache) and in what is read off at the end. `indices` is the one value that crosses layers beside
the hidden states: an F layer replaces it, an S layer attends with it as it is.

Rows are right-padded: position -1 marks a padded token, which sees nothing and is seen by nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import attention, indexer, moe
from indexcache_jax.cache import Cache, write
from indexcache_jax.config import Config
from indexcache_jax.norm import rms_norm
from indexcache_jax.params import MLP, Attention, Indexer, MoE, Params, at_layer, check_schedule, slots
from indexcache_jax.rope import angles
from indexcache_jax.schedule import Schedule
from pallas_kernels.blocks import map_queries

LOGITS_BYTES = 256 * 2**20  # of float32 logits at once where only a loss is wanted


@flax.struct.dataclass
class Positions:
    """Where the new tokens stand. `queries` [B, S] (-1: padding), `kv_lengths` [B], rope's `angles` [B, S, dr/2] x 2."""

    queries: jax.Array
    kv_lengths: jax.Array
    angles: tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class AttentionLayer:
    """One layer's attention weights; `indexer` is None where the layer has none."""

    norm: jax.Array
    attention: Attention
    indexer: Indexer | None


# Takes a layer's new latents and index keys (None on S layers), returns all that its queries may attend to.
Remember = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]]


def only_these(latents: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Without a cache the new tokens are all there is."""
    return latents, keys


def place(starts: jax.Array, lengths: jax.Array, width: int, config: Config) -> Positions:
    """Positions of `width` new tokens a row, of which lengths [B] count, after starts [B] earlier ones."""
    offsets = jnp.arange(width)
    queries = jnp.where(offsets < lengths[:, None], starts[:, None] + offsets, -1)
    return Positions(queries, starts + lengths, angles(jnp.maximum(queries, 0), config))


def attention_block(
    p: AttentionLayer,
    x: jax.Array,
    indices: jax.Array | None,
    positions: Positions,
    config: Config,
    full: bool | jax.Array,
    remember: Remember = only_these,
) -> tuple[jax.Array, jax.Array]:
    """x + attention(norm(x)) and the indices [B, S, k] it attended with.

    `full`: run the indexer (F) or reuse `indices` (S). A Python bool compiles only that branch; a traced boolean
    compiles both, which is how the search evaluates every schedule with one program.
    """
    h = rms_norm(x, p.norm, config.rms_norm_eps)
    q_latent = attention.query_latents(p.attention, h, config)
    keys = None if p.indexer is None else indexer.index_keys(p.indexer, h, positions.angles, config)
    latents, keys = remember(attention.latents(p.attention, h, positions.angles, config), keys)

    def select() -> jax.Array:
        assert p.indexer is not None and keys is not None  # an F layer has both
        return indexer.select(p.indexer, h, q_latent, keys, positions.angles, positions.queries, positions.kv_lengths, config)

    if not isinstance(full, bool):
        indices = jax.lax.cond(full, select, lambda: indices)
    elif full:
        indices = select()
    assert indices is not None  # the first layer is F
    return x + attention.attend(p.attention, q_latent, latents, indices, positions.angles, config), indices


def mlp_block(p: MLP | MoE, norm: jax.Array, x: jax.Array, config: Config) -> jax.Array:
    """x + mlp(norm(x))."""
    h = rms_norm(x, norm, config.rms_norm_eps)
    return x + (moe.mlp(p, h) if isinstance(p, MLP) else moe.moe(p, h, config))


def attention_layer(params: Params, layer: Any, indexer_slot: Any) -> AttentionLayer:
    """Attention weights of one layer; `indexer_slot` is its place in the indexer stack, None for an S layer."""
    return AttentionLayer(
        norm=at_layer(params.input_norm, layer),
        attention=at_layer(params.attention, layer),
        indexer=None if indexer_slot is None else at_layer(params.indexer, indexer_slot),
    )


def mlp_layers(config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers of the dense and of the expert stack."""
    every = range(config.num_layers)
    return tuple(i for i in every if not config.moe_layers[i]), tuple(i for i in every if config.moe_layers[i])


def walk(
    params: Params,
    x: jax.Array,
    positions: Positions,
    config: Config,
    schedule: Schedule,
    remember: Callable[[int], Remember] = lambda layer: only_these,
) -> tuple[jax.Array, list[jax.Array]]:
    """All layers over embedded tokens x [B, S, D]: hidden states before the final norm, and the F layers' indices."""
    check_schedule(params, schedule)
    full_slots, (dense, sparse) = slots(schedule.full_layers), mlp_layers(config)
    dense_slots, moe_slots = slots(dense), slots(sparse)
    indices, selections = None, []
    for layer in range(config.num_layers):
        full = schedule.is_full[layer]
        p = attention_layer(params, layer, full_slots.get(layer))
        x, indices = attention_block(p, x, indices, positions, config, full, remember(layer))
        if full:
            selections.append(indices)
        mlp = at_layer(params.moe, moe_slots[layer]) if layer in moe_slots else at_layer(params.dense, dense_slots[layer])
        x = mlp_block(mlp, at_layer(params.mlp_norm, layer), x, config)
    return x, selections


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    return params.embedding[tokens]


def unembed(params: Params, x: jax.Array, config: Config) -> jax.Array:
    """Hidden states [..., D] -> logits [..., V] float32."""
    h = rms_norm(x, params.final_norm, config.rms_norm_eps)
    head = params.embedding.T if params.head is None else params.head
    return jnp.dot(h, head, preferred_element_type=jnp.float32)


def _whole(tokens: jax.Array, lengths: jax.Array | None, config: Config) -> Positions:
    b, s = tokens.shape
    lengths = jnp.full((b,), s, jnp.int32) if lengths is None else lengths
    return place(jnp.zeros((b,), jnp.int32), lengths, s, config)


@jax.jit
def forward(
    params: Params, tokens: jax.Array, config: Config, schedule: Schedule, lengths: jax.Array | None = None
) -> jax.Array:
    """Logits [B, S, V] float32 of right-padded tokens [B, S]; lengths [B] defaults to S everywhere."""
    x, _ = walk(params, embed(params, tokens), _whole(tokens, lengths, config), config, schedule)
    return unembed(params, x, config)


@jax.jit
def selections(
    params: Params, tokens: jax.Array, config: Config, schedule: Schedule, lengths: jax.Array | None = None
) -> jax.Array:
    """The indices [num_full, B, S, k] that the F layers select."""
    return jnp.stack(walk(params, embed(params, tokens), _whole(tokens, lengths, config), config, schedule)[1])


def token_losses(params: Params, x: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """-log p(targets [B, S]) in nats, float32, from hidden states x [B, S, D]: logits exist for a block at a time."""

    def block(x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = unembed(params, x, config)
        picked = jnp.sum(jnp.where(jnp.arange(config.vocab_size) == targets[..., None], logits, 0.0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - picked

    rows = max(1, LOGITS_BYTES // (4 * config.vocab_size * x.shape[0]))
    return map_queries(jax.checkpoint(block), (x, targets), min(rows, x.shape[1]))


@jax.jit
def prefill(
    params: Params, tokens: jax.Array, lengths: jax.Array, cache: Cache, config: Config, schedule: Schedule
) -> tuple[jax.Array, Cache]:
    """Appends right-padded tokens [B, S], of which lengths [B] count, to the cache.

    Returns the logits [B, V] float32 of each row's last token and the cache. Called again it continues, so a long
    prompt goes in chunk by chunk. What does not fit is dropped: the caller sees to cache.lengths + lengths <= T. A row
    of length 0 is left as it is and its logits mean nothing.
    """
    positions = place(cache.lengths, lengths.astype(jnp.int32), tokens.shape[1], config)
    full_slots = slots(schedule.full_layers)

    def remember(layer: int) -> Remember:
        def store(latents: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
            nonlocal cache
            cache = dataclasses.replace(cache, latents=write(cache.latents, layer, latents, positions.queries))
            if keys is None:
                return cache.latents[layer], None
            slot = full_slots[layer]
            cache = dataclasses.replace(cache, index_keys=write(cache.index_keys, slot, keys, positions.queries))
            return cache.latents[layer], cache.index_keys[slot]

        return store

    x, _ = walk(params, embed(params, tokens), positions, config, schedule, remember)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return unembed(params, last, config), dataclasses.replace(cache, lengths=positions.kv_lengths)


@jax.jit
def decode_step(params: Params, token: jax.Array, cache: Cache, config: Config, schedule: Schedule) -> tuple[jax.Array, Cache]:
    """Appends one token [B] a row: logits [B, V] float32 of the next, and the cache."""
    return prefill(params, token[:, None], jnp.ones_like(cache.lengths), cache, config, schedule)
