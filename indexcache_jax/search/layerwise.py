"""A model run one layer at a time, by programs that compile once for all schedules.

`model.forward` specialises on its schedule, which is right for inference and wrong for a search that tries hundreds. Here
the layer's number and its F/S choice are traced: every function compiles once for one shape of batch, whatever the number
of layers and schedules. A traced choice compiles both branches and runs one.

The price is that a layer's weights are sliced out of their stacks while the program runs; beside a layer's work on a
calibration batch that is little.

Under a mesh in force (`sharding.use`) rows are split over the devices along "batch" and a row's tokens over those along
"queries", dealt so that all see equally many keys (`positions.even_order`). Losses do not depend on it.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import model, sharding
from indexcache_jax.config import Config
from indexcache_jax.params import MLP, MoE, Params, at_layer
from indexcache_jax.positions import even_order, whole_rows
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import constrain


@flax.struct.dataclass
class State:
    """What one layer passes to the next: hidden states x [B, S, D] and indices [B, S, k] (-1 before the first layer).

    Under a mesh that splits queries a row's tokens stand in the order of `positions.even_order`.
    """

    x: jax.Array
    indices: jax.Array


def place(rows: np.ndarray) -> jax.Array:
    """Rows [B, ...], which every process has whole, on the devices of the mesh in force, or on the default device."""
    at = sharding.fitting(rows.shape, ("batch", *(None,) * (rows.ndim - 1)))
    return jnp.asarray(rows) if at is None else jax.make_array_from_callback(rows.shape, at, rows.__getitem__)


def _dealt(tokens: jax.Array) -> jax.Array:
    """Tokens [B, S] in the order in which the devices of the mesh in force share them."""
    order = even_order(tokens.shape[1])
    return constrain(tokens if order is None else tokens[:, order], "batch", "queries")


def _attend(p: model.AttentionLayer, state: State, config: Config, full: bool | jax.Array) -> State:
    """The state after a layer's attention, its residual included."""
    order = even_order(state.x.shape[1])
    positions = whole_rows(state.x, config, order=order)
    x, indices = model.attention_block(p, state.x, state.indices, positions, config, full, order)
    return State(constrain(x, "batch", "queries", None), constrain(indices, "batch", "queries", None))


def _slots(layers: tuple[int, ...], config: Config) -> jax.Array:
    """For every layer its slot in the stack of `layers`; 0 for a layer that has none, which must not read it."""
    return jnp.array([layers.index(i) if i in layers else 0 for i in range(config.num_layers)], jnp.int32)


def _attention(params: Params, state: State, layer: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> State:
    """The state after the attention of `layer`, its residual included."""
    return _attend(model.attention_layer(params, layer, _slots(schedule.full_layers, config)[layer]), state, config, full)


def _mlp(params: Params, x: jax.Array, layer: jax.Array, config: Config) -> jax.Array:
    """The hidden states [B, S, D] after the MLP of `layer`, dense or of experts; with both kinds, one is chosen at run time."""
    norm = at_layer(params.mlp_norm, layer)

    def block(stack: MLP | MoE | None, layers: tuple[int, ...]) -> jax.Array:
        out = model.mlp_block(at_layer(stack, _slots(layers, config)[layer]), norm, x, config)
        return constrain(out, "batch", "queries", None)

    dense = functools.partial(block, params.dense, config.dense_layers)
    experts = functools.partial(block, params.moe, config.expert_layers)
    if not config.expert_layers:
        return dense()
    if not config.dense_layers:
        return experts()
    return jax.lax.cond(jnp.array(config.moe_layers)[layer], experts, dense)


def _layer(params: Params, state: State, layer: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> State:
    state = _attention(params, state, layer, full, config, schedule)
    return dataclasses.replace(state, x=_mlp(params, state.x, layer, config))


@jax.jit
def start(params: Params, tokens: jax.Array, config: Config) -> State:
    """The state before layer 0, of rows of tokens [B, S] without padding."""
    unknown = jnp.full((*tokens.shape, min(config.index_topk, tokens.shape[1])), -1, jnp.int32)
    return State(model.embed(params, _dealt(tokens)), constrain(unknown, "batch", "queries", None))


@functools.partial(jax.jit, donate_argnames="state")
def advance(params: Params, state: State, layer: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> State:
    """The state after `layer`, run as F where `full` is True and as S where it is False; both are traced.

    `schedule` is the one the params are for: its F layers have an indexer.
    """
    return _layer(params, state, layer, full, config, schedule)


def single(params: Params, state: State, config: Config, full: bool) -> State:
    """The state after the only layer of `params` and `config`, run as F or S; an S layer's params need no indexer."""
    x, indices = model.single_layer(params, state.x, state.indices, config, full, even_order(state.x.shape[1]))
    return State(constrain(x, "batch", "queries", None), constrain(indices, "batch", "queries", None))


@jax.jit
def hidden_states(params: Params, tokens: jax.Array, full: jax.Array, config: Config, schedule: Schedule) -> jax.Array:
    """Hidden states [B, S, D] after all layers, of rows of tokens [B, S] without padding.

    full [L] bool, traced: which layers run as F. `schedule` is the one the params are for.
    """
    state, order = start(params, tokens, config), even_order(tokens.shape[1])
    x = jax.lax.fori_loop(0, config.num_layers, lambda i, s: _layer(params, s, i, full[i], config, schedule), state).x
    return x if order is None else constrain(x[:, np.argsort(order)], "batch", "queries", None)


@jax.jit
def row_losses(params: Params, x: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """The mean losses [B] in nats a token of targets [B, S], from hidden states x [B, S, D] after the last layer.

    Of the params only embedding, final norm and head are read.
    """
    nothing: Params = jax.tree.map(lambda _: None, params)
    ends = dataclasses.replace(nothing, embedding=params.embedding, final_norm=params.final_norm, head=params.head)
    tokens = ("batch", "queries")
    losses = sharding.on_each_device(functools.partial(model.token_losses, config=config), ((), tokens, tokens), tokens)
    return constrain(jnp.mean(losses(ends, x, _dealt(targets)), axis=1), None)


@jax.jit
def finish(
    params: Params, state: State, layer: jax.Array, full: jax.Array, targets: jax.Array, config: Config, schedule: Schedule
) -> jax.Array:
    """The mean losses [B] in nats a token of targets [B, S], from the state before `layer`: the layers from there on are run.

    full [L] bool, traced: which layers run as F. `schedule` is the one the params are for.
    """
    state = jax.lax.fori_loop(layer, config.num_layers, lambda i, s: _layer(params, s, i, full[i], config, schedule), state)
    return row_losses(params, state.x, targets, config)


def schedules_at_once(rows: int, config: Config) -> int:
    """How many schedules devices can run at once on a batch of so many rows, each its own: 1, or the number of devices.

    The flips of a step are independent of each other, so where the devices along "batch" do not divide the rows, and all
    would compute all of them, each takes a schedule of its own instead (`finish_each`). That needs the whole model on every
    device. Where experts, heads or queries are split over devices too, these have to run the same schedule.
    """
    mesh, _ = sharding.current()
    devices = sharding.devices_along("batch")
    split_experts = config.expert_layers and sharding.devices_along("expert") > 1
    return 1 if mesh is None or devices < mesh.size or split_experts or rows % devices == 0 else devices


@jax.jit
def finish_each(
    params: Params, state: State, layer: jax.Array, full: jax.Array, targets: jax.Array, config: Config, schedule: Schedule
) -> jax.Array:
    """`finish` under a schedule for each of N = `schedules_at_once` devices: full [N, L] -> losses [N, B]."""

    def on_one(params: Params, state: State, layer: jax.Array, full: jax.Array, targets: jax.Array) -> jax.Array:
        return finish(params, state, layer, full[0], targets, config, schedule)[None]

    losses = sharding.on_each_device(on_one, ((), (), (), ("batch",), ()), ("batch",))(params, state, layer, full, targets)
    return constrain(losses, None, None)


def selected(state: State, queries: np.ndarray) -> np.ndarray:
    """The indices [B * Q, k] that queries at positions [Q] of every row attend with, rows outermost."""
    indices = sharding.to_host(_indices_at(state.indices, queries))
    return indices.reshape(-1, indices.shape[-1])


@jax.jit
def _indices_at(indices: jax.Array, queries: jax.Array) -> jax.Array:
    """The indices [B, Q, k], whole on every device, of queries at positions [Q]."""
    order = even_order(indices.shape[1])
    places = queries if order is None else jnp.asarray(np.argsort(order))[queries]
    return constrain(indices[:, places], None, None, None)


@jax.jit
def compare(
    params: Params, state: State, layer: jax.Array, other: jax.Array, config: Config, schedule: Schedule
) -> tuple[State, jax.Array]:
    """The state after `layer` run as F, and the similarity of its attention output with indices `other` [B, S, k].

    The similarity is the cosine between a token's outputs with the layer's own indices and with the other ones, averaged
    over tokens (paper, appendix C).
    """
    own = _attention(params, state, layer, jnp.array(True), config, schedule)
    with_other = _attention(params, dataclasses.replace(state, indices=other), layer, jnp.array(False), config, schedule)
    a, b = ((s.x - state.x).astype(jnp.float32) for s in (own, with_other))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30)
    return dataclasses.replace(own, x=_mlp(params, own.x, layer, config)), jnp.mean(cosine)
