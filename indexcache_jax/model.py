"""The forward pass of a DSA model under a schedule, as pure functions of params.

`indices` is the one value that crosses layers beside the hidden states: an F layer replaces it, an S layer attends with it
as it is. Rows are right-padded: position -1 marks a padded token, which sees nothing and is seen by nothing.

This is the form in which every formula is read most easily, and what training and the search differentiate and compare.
Inference with a cache is `indexcache_jax.serving`.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import arguments, attention, indexer, moe
from indexcache_jax.config import Config
from indexcache_jax.norm import rms_norm
from indexcache_jax.ops import QUERIES
from indexcache_jax.params import MLP, Attention, Indexer, MoE, Params, at_layer, check_params, check_schedule, decoded, slots
from indexcache_jax.positions import Positions, in_own_order, whole_rows
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import constrain, on_each_device
from pallas_kernels.blocks import map_queries

LOGITS_BYTES = 256 * 2**20  # of float32 logits at once where only a loss is wanted


@flax.struct.dataclass
class AttentionLayer:
    """One layer's attention weights; `indexer` is None where the layer has none."""

    norm: jax.Array
    attention: Attention
    indexer: Indexer | None


def decoded_layer(p: AttentionLayer, config: Config, dtype: Any) -> AttentionLayer:
    """The weights with the matrices that formulas multiply, those in 8 bits in `dtype`."""
    return AttentionLayer(p.norm, decoded(p.attention, config, dtype), decoded(p.indexer, config, dtype))


def attention_block(
    p: AttentionLayer,
    x: jax.Array,
    indices: jax.Array | None,
    positions: Positions,
    config: Config,
    full: bool | jax.Array,
    order: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x + attention(norm(x)) and the indices [B, S, k] it attended with, over new tokens x [B, S, D] alone.

    `full`: run the indexer (F) or reuse `indices` (S). A Python bool compiles only that branch; a traced boolean
    compiles both, which is how the search evaluates every schedule with one program. order [S]: which token stands in each
    place of a row, where they are not in their own order; indices are positions in any case. Matrices in 8 bits are decoded
    here, so that a model has those of one layer decoded at a time.
    """
    p = decoded_layer(p, config, x.dtype)
    with jax.named_scope("project"):
        h = rms_norm(x, p.norm, config.rms_norm_eps)
        q_latent = attention.query_latents(p.attention, h, config)
        latents = in_own_order(attention.latents(p.attention, h, positions.cos_sin, config), order)

        keys = None
        if p.indexer is not None:
            keys = in_own_order(indexer.index_keys(p.indexer, h, positions.cos_sin, config), order)

    def select() -> jax.Array:
        assert p.indexer is not None and keys is not None  # an F layer has both
        with jax.named_scope("index"):
            return indexer.select(p.indexer, h, q_latent, keys, positions, config)

    if not isinstance(full, bool):
        indices = jax.lax.cond(full, select, lambda: indices)
    elif full:
        indices = select()
    assert indices is not None  # the first layer is F
    with jax.named_scope("attend"):
        return x + attention.attend(p.attention, q_latent, latents, indices, positions.cos_sin, config), indices


def mlp_block(p: MLP | MoE, norm: jax.Array, x: jax.Array, config: Config) -> jax.Array:
    """x + mlp(norm(x)) of hidden states x [B, S, D]. Matrices in 8 bits are decoded, save those of routed experts."""
    with jax.named_scope("mlp"):
        p, h = decoded(p, config, x.dtype), rms_norm(x, norm, config.rms_norm_eps)
        return x + (moe.mlp(p, h) if isinstance(p, MLP) else moe.moe(p, h, config))


def attention_layer(params: Params, layer: Any, indexer_slot: Any) -> AttentionLayer:
    """Attention weights of one layer; `indexer_slot` is its place in the indexer stack, None for an S layer."""
    return AttentionLayer(
        norm=at_layer(params.input_norm, layer),
        attention=at_layer(params.attention, layer),
        indexer=None if indexer_slot is None else at_layer(params.indexer, indexer_slot),
    )


def single_layer(
    params: Params,
    x: jax.Array,
    indices: jax.Array | None,
    config: Config,
    full: bool,
    order: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, S, D] after the only layer of `params` and `config`, run as F or S, and the indices [B, S, k] it used.

    An S layer's params need no indexer, an F layer no indices. x: whole rows without padding. order: as for `attention_block`.
    """
    p = attention_layer(params, 0, 0 if full else None)
    x, indices = attention_block(p, x, indices, whole_rows(x, config, order=order), config, full, order)
    mlp = at_layer(params.moe if config.moe_layers[0] else params.dense, 0)
    return mlp_block(mlp, at_layer(params.mlp_norm, 0), x, config), indices


def walk(
    params: Params, x: jax.Array, positions: Positions, config: Config, schedule: Schedule
) -> tuple[jax.Array, list[jax.Array]]:
    """All layers over embedded tokens x [B, S, D]: hidden states before the final norm, and the F layers' indices."""
    check_schedule(params, schedule)
    full_slots, dense_slots, moe_slots = slots(schedule.full_layers), slots(config.dense_layers), slots(config.expert_layers)
    indices, selections = None, []
    for layer, full in enumerate(schedule.is_full):
        p = attention_layer(params, layer, full_slots.get(layer))
        x, indices = attention_block(p, x, indices, positions, config, full)
        if full:
            selections.append(indices)
        mlp = at_layer(params.moe, moe_slots[layer]) if layer in moe_slots else at_layer(params.dense, dense_slots[layer])
        x = mlp_block(mlp, at_layer(params.mlp_norm, layer), x, config)
    return x, selections


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Tokens [B, S] -> hidden states [B, S, D]."""
    return constrain(params.embedding[tokens], "batch", "queries", None)


def unembed(params: Params, x: jax.Array, config: Config) -> jax.Array:
    """Hidden states [..., D] -> logits [..., V] float32."""
    return _logits(params.final_norm, _head(params), x, config)


def _head(params: Params) -> jax.Array:
    """The matrix [D, V] of the logits."""
    return params.embedding.T if params.head is None else params.head


def _logits(norm: jax.Array, head: jax.Array, x: jax.Array, config: Config) -> jax.Array:
    return jnp.dot(rms_norm(x, norm, config.rms_norm_eps), head, preferred_element_type=jnp.float32)


def _checked(params: Params, tokens: Any, config: Config, schedule: Schedule, lengths: Any) -> tuple[Any, Any]:
    """Tokens and lengths of `forward` as arrays, once all of its arguments are seen to be what they should."""
    check_params(params, config, schedule)
    tokens = arguments.tokens("tokens", tokens, config.vocab_size)
    return tokens, None if lengths is None else arguments.lengths(lengths, *tokens.shape)


def forward(
    params: Params, tokens: jax.Array, config: Config, schedule: Schedule, lengths: jax.Array | None = None
) -> jax.Array:
    """Logits [B, S, V] float32 of right-padded tokens [B, S]; lengths [B] defaults to S everywhere.

    ValueError for tokens that the model does not have, lengths that are not between 0 and S, and params of another model or
    schedule. Numbers are checked before anything runs; within a traced function only shapes and dtypes are.
    """
    tokens, lengths = _checked(params, tokens, config, schedule, lengths)
    return _forward(params, tokens, config, schedule, lengths)


@jax.jit
def _forward(params: Params, tokens: jax.Array, config: Config, schedule: Schedule, lengths: jax.Array | None) -> jax.Array:
    x, _ = walk(params, embed(params, tokens), whole_rows(tokens, config, lengths), config, schedule)
    return unembed(params, x, config)


def selections(
    params: Params, tokens: jax.Array, config: Config, schedule: Schedule, lengths: jax.Array | None = None
) -> jax.Array:
    """The indices [num_full, B, S, k] that the F layers select; arguments and errors as for `forward`."""
    tokens, lengths = _checked(params, tokens, config, schedule, lengths)
    return _selections(params, tokens, config, schedule, lengths)


@jax.jit
def _selections(params: Params, tokens: jax.Array, config: Config, schedule: Schedule, lengths: jax.Array | None) -> jax.Array:
    return jnp.stack(walk(params, embed(params, tokens), whole_rows(tokens, config, lengths), config, schedule)[1])


def token_losses(params: Params, x: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """-log p(targets [B, S]) in nats, float32, from hidden states x [B, S, D]: logits exist for a block at a time."""

    def losses(norm: jax.Array, head: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
        def block(x: jax.Array, targets: jax.Array) -> jax.Array:
            logits = _logits(norm, head, x, config)
            picked = jnp.sum(jnp.where(jnp.arange(config.vocab_size) == targets[..., None], logits, 0.0), axis=-1)
            return jax.nn.logsumexp(logits, axis=-1) - picked

        rows = max(1, LOGITS_BYTES // (4 * config.vocab_size * x.shape[0]))
        return map_queries(jax.checkpoint(block), (x, targets), min(rows, x.shape[1]))

    return on_each_device(losses, ((), (), QUERIES, QUERIES), QUERIES)(params.final_norm, _head(params), x, targets)
