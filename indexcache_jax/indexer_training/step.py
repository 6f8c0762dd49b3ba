"""A step of a group: the divergence of its indexer from the targets, the gradient, and AdamW.

The scores and their gradient are computed once for a group, not for each of its layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from indexcache_jax import distill, indexer, model, ops, training
from indexcache_jax.config import Config
from indexcache_jax.indexer_training.targets import Kept, Recomputed, inputs, most_rows, queries_and_keys, visible
from indexcache_jax.memory import ROW_TARGET_BYTES
from indexcache_jax.model import AttentionLayer
from indexcache_jax.params import Indexer, abstract
from indexcache_jax.positions import whole_rows
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage
from pallas_kernels import bits

Factors = tuple[jax.Array, jax.Array, jax.Array]  # of index scores: index queries, index keys, head weights


def divergence(p: Indexer, layer: AttentionLayer, x: jax.Array, targets: Kept | Recomputed, config: Config) -> jax.Array:
    """L of an indexer of `layer` with hidden states x [B, S, D] before it: the mean over rows and queries, in nats.

    Arithmetic is in the dtype of x.
    """
    tree = abstract(config, Schedule.all_full(config.num_layers)).indexer
    p = jax.tree.map(lambda a, t: a.astype(t.dtype or x.dtype), p, tree)
    layer = model.decoded_layer(layer, config, x.dtype)
    h, q_latent = inputs(layer, x, config)
    cos_sin = whole_rows(x, config).cos_sin
    factors = (
        indexer.index_queries(p, q_latent, cos_sin, config),
        indexer.index_keys(p, h, cos_sin, config),
        indexer.head_weights(p, h, config),
    )
    if isinstance(targets, Recomputed):
        return _from_recomputed(factors, targets, config)
    if ops.distils_by_kernels(x.shape[0], x.shape[1], x.dtype, config):
        return _missed(factors, targets.target) - jnp.mean(targets.entropy)
    return _from_kept(*factors, targets)


def _missed(factors: Factors, target: jax.Array) -> jax.Array:
    """What the scores of index queries, keys and head weights miss of a target [B, S, S]: the mean over queries."""
    b, s = target.shape[:2]
    queries, keys, head_weights = factors
    return ops.index_cross_entropy(queries, keys, head_weights, target, bits.causal(b, s, s)) / (b * s)


def _from_kept(queries: jax.Array, keys: jax.Array, head_weights: jax.Array, targets: Kept) -> jax.Array:
    def block(t: int, queries: jax.Array, head_weights: jax.Array, target: jax.Array, visible: jax.Array) -> jax.Array:
        mask = jnp.arange(t) < visible[..., None]
        scores = distill.index_scores(queries, keys[:, :t], head_weights)
        return distill.cross_entropy(target[..., :t].astype(jnp.float32), scores, mask)

    per_query = queries, head_weights, targets.target, visible(keys)
    found = distill.map_causal(block, per_query, keys.shape[1], queries.shape[2] + 1, most_rows())
    return jnp.mean(found) - jnp.mean(targets.entropy)


def _from_recomputed(factors: Factors, targets: Recomputed, config: Config) -> jax.Array:
    b, s = targets.x[0].shape[:2]
    words, scale, zero = bits.causal(b, s, s), config.attention_scale, jnp.zeros((), jnp.float32)
    together = 4 * b * s * s <= ROW_TARGET_BYTES
    target = jnp.zeros((b, s, s), jnp.float32) if together else None
    each = entropy = zero
    for layer, x, lse, share in zip(targets.layers, targets.x, targets.lse, targets.share, strict=True):
        queries, keys, _ = queries_and_keys(model.decoded_layer(layer, config, x.dtype), x, config)
        arrays = *jax.lax.stop_gradient((queries, keys, lse)), words
        if target is None:
            each = each + share * ops.index_divergence(*factors, *arrays, scale=scale) / (b * s)
            continue
        target, entropies = ops.attention_target(target, *arrays, share=share, scale=scale)
        entropy = entropy + share * jnp.mean(entropies)
    return each if target is None else _missed(factors, target) - entropy


@functools.partial(jax.jit, static_argnames="stage", donate_argnames=("p", "state"))
def take_step(
    p: Indexer,
    state: Any,
    layer: AttentionLayer,
    x: jax.Array,
    targets: Kept | Recomputed,
    config: Config,
    stage: Stage,
    steps: jax.Array,
) -> tuple[Indexer, Any, jax.Array]:
    """One update on rows x [B, S, D]: the indexer, the optimiser's state, and L before the update. One row at a time."""

    def of_row(row: jax.Array) -> tuple[jax.Array, Indexer]:
        of_rows = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1), (x, _by_row(targets)))
        return jax.value_and_grad(divergence)(p, layer, of_rows[0], _with_rows(targets, of_rows[1]), config)

    shapes = jax.eval_shape(of_row, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    count = x.shape[0]
    if count == 1:
        value, gradient = of_row(jnp.int32(0))
    else:
        total, _ = jax.lax.scan(lambda sums, row: (jax.tree.map(jnp.add, sums, of_row(row)), None), zeros, jnp.arange(count))
        value, gradient = jax.tree.map(lambda a: a / count, total)
    updates, state = optimiser(stage, config, steps).update(gradient, state, p)
    return optax.apply_updates(p, updates), state, value


def _by_row(targets: Kept | Recomputed) -> Any:
    """What of the targets has an entry for every row."""
    return (targets.target, targets.entropy) if isinstance(targets, Kept) else (targets.x, targets.lse)


def _with_rows(targets: Kept | Recomputed, by_row: Any) -> Kept | Recomputed:
    """The targets with other rows."""
    if isinstance(targets, Kept):
        return Kept(*by_row)
    x, lse = by_row
    return dataclasses.replace(targets, x=x, lse=lse)


def optimiser(stage: Stage, config: Config, steps: jax.Array | int | None = None) -> optax.GradientTransformation:
    """AdamW over the indexer of a single layer, which is all that trains. steps: the stage's length where it is traced."""
    tree = abstract(config, Schedule.all_full(config.num_layers)).indexer
    decayed = jax.tree.map(lambda tensor: tensor.init == "normal", tree)
    return training.adamw(stage, stage.indexer_learning_rate, stage.steps if steps is None else steps, decayed)
