"""A model walked one layer at a time by programs that serve every schedule.

`forward` specialises on its schedule, which is right for inference and wrong for a search that tries hundreds. Here the
layer's number and its F/S choice are traced: every function compiles once for one shape of batch, whatever the number of
layers and schedules. A traced choice compiles both branches and runs one.

The price is that a layer's weights are sliced out of their stacks while the program runs; beside a layer's work on a
calibration batch that is little.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.params import Params, at_layer
from indexcache_jax.positions import Positions, whole_rows
from indexcache_jax.schedule import Schedule


@flax.struct.dataclass
class State:
    """What one layer hands to the next: hidden states x [B, S, D] and indices [B, S, k] (-1 before the first layer)."""

    x: jax.Array
    indices: jax.Array


def _positions(x: jax.Array, config: Config) -> Positions:
    return whole_rows(x, config)


def _slots(layers: tuple[int, ...], config: Config) -> jax.Array:
    """Place of every layer on the axis that stacks `layers`; 0 for those that are not in it, which must not be read."""
    return jnp.array([layers.index(i) if i in layers else 0 for i in range(config.num_layers)], jnp.int32)


def _attention(params: Params, state: State, layer: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> State:
    p = model.attention_layer(params, layer, _slots(schedule.full_layers, config)[layer])
    return State(*model.attention_block(p, state.x, state.indices, _positions(state.x, config), config, full))


def _mlp(params: Params, x: jax.Array, layer: jax.Array, config: Config) -> jax.Array:
    norm = at_layer(params.mlp_norm, layer)
    stacks = zip((params.dense, params.moe), (config.dense_layers, config.expert_layers), strict=True)
    branches = [
        functools.partial(
            lambda stack, layers: model.mlp_block(at_layer(stack, _slots(layers, config)[layer]), norm, x, config), s, n
        )
        for s, n in stacks
        if n
    ]
    if len(branches) == 1:
        return branches[0]()
    dense, experts = branches
    return jax.lax.cond(jnp.array(config.moe_layers)[layer], experts, dense)


def _layer(params: Params, state: State, layer: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> State:
    state = _attention(params, state, layer, full, config, schedule)
    return dataclasses.replace(state, x=_mlp(params, state.x, layer, config))


@jax.jit
def start(params: Params, tokens: jax.Array, config: Config) -> State:
    """The state before layer 0 of whole rows tokens [B, S]."""
    k = min(config.index_topk, tokens.shape[1])
    return State(model.embed(params, tokens), jnp.full((*tokens.shape, k), -1, jnp.int32))


@functools.partial(jax.jit, donate_argnames="state")
def advance(params: Params, state: State, layer: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> State:
    """The state after `layer`, run as F where `full` (traced) is True. `schedule` says which layers have an indexer."""
    return _layer(params, state, layer, full, config, schedule)


def single(params: Params, state: State, config: Config, full: bool) -> State:
    """The state after the only layer of `params` and `config`, run as F or S; as S its params need no indexer."""
    p = model.attention_layer(params, 0, 0 if full else None)
    state = State(*model.attention_block(p, state.x, state.indices, _positions(state.x, config), config, full))
    mlp = at_layer(params.moe if config.moe_layers[0] else params.dense, 0)
    return dataclasses.replace(state, x=model.mlp_block(mlp, at_layer(params.mlp_norm, 0), state.x, config))


@jax.jit
def hidden_states(params: Params, tokens: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> jax.Array:
    """Hidden states [B, S, D] of whole rows tokens [B, S] after all layers, with the choices full [L]."""
    state = start(params, tokens, config)
    return jax.lax.fori_loop(0, config.num_layers, lambda i, s: _layer(params, s, i, full[i], config, schedule), state).x


@jax.jit
def finish(
    params: Params, state: State, layer: jax.Array, full: jax.Array, targets: jax.Array, config: Config, schedule: Schedule
) -> jax.Array:
    """Mean loss in nats of targets [B, S] after `layer` and all above it, with the choices full [L]."""
    state = jax.lax.fori_loop(layer, config.num_layers, lambda i, s: _layer(params, s, i, full[i], config, schedule), state)
    return jnp.mean(model.token_losses(params, state.x, targets, config))


@jax.jit
def compare(
    params: Params, state: State, layer: jax.Array, other: jax.Array, config: Config, schedule: Schedule
) -> tuple[State, jax.Array]:
    """The state after F layer `layer`, and how like its attention output is to the one with indices `other` [B, S, k].

    The likeness is the cosine of a token's two outputs, averaged over tokens (paper, appendix C).
    """
    own = _attention(params, state, layer, jnp.array(True), config, schedule)
    with_other = _attention(params, dataclasses.replace(state, indices=other), layer, jnp.array(False), config, schedule)
    a, b = ((s.x - state.x).astype(jnp.float32) for s in (own, with_other))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30)
    return dataclasses.replace(own, x=_mlp(params, own.x, layer, config)), jnp.mean(cosine)
