"""Indexers of a frozen model, distilled for any schedule out of one store.

An F layer and the S layers that it serves are a group, and what its indexer becomes depends on nothing else
(`indexcache_jax.indexer_training`). Many schedules share groups, so each is trained once. The model is small: the hidden
states before all of its layers stay on the device, and the targets and all steps of a group are one program, which compiles
once for groups of any layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from indexcache_jax import indexer_training, model, sharding
from indexcache_jax.config import Config
from indexcache_jax.indexer_training import Kept
from indexcache_jax.layers import Resident
from indexcache_jax.params import Indexer, Params, at_layer
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.training import Stage

CURVE = 25  # points of a divergence's curve


@dataclasses.dataclass(frozen=True)
class Trained:
    """An indexer in host memory, float32, as that of a single layer, and its divergence at every step, in nats a token."""

    indexer: Indexer
    divergence: np.ndarray


@jax.jit
def states(params: Params, tokens: jax.Array, config: Config, schedule: Schedule) -> jax.Array:
    """The hidden states [L, N, S, D] before every layer of a model that runs under its own schedule, of tokens [N, S]."""
    full = jnp.array(schedule.is_full)

    def of_row(tokens: jax.Array) -> jax.Array:
        def of_layer(state: layerwise.State, layer: jax.Array) -> tuple[layerwise.State, jax.Array]:
            return layerwise.advance(params, state, layer, full[layer], config, schedule), state.x[0]

        return jax.lax.scan(of_layer, layerwise.start(params, tokens[None], config), jnp.arange(config.num_layers))[1]

    return jax.lax.map(of_row, tokens).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="p")
def _train(
    p: Indexer,
    params: Params,
    x: jax.Array,
    first: jax.Array,
    share: jax.Array,
    rows: jax.Array,
    config: Config,
    stage: Stage,
) -> tuple[Indexer, jax.Array]:
    """The indexer of layer `first` after a step on each of rows [steps, B], and its divergence before every step [steps].

    x [L, N, S, D]: hidden states before every layer. share [L]: what the divergence of each layer from `first` on counts; 0
    from the end of the group on.
    """
    own, inputs = model.attention_layer(params, first, None), x[first]
    optimiser = indexer_training.optimiser(stage, config, rows.shape[0])

    def target_of(row: jax.Array) -> Kept:
        def layer_of(j: jax.Array) -> tuple[model.AttentionLayer, jax.Array, jax.Array]:
            return model.attention_layer(params, first + j, None), x[first + j, row][None], share[j]

        found = indexer_training.mean_target(layer_of, jnp.sum(share > 0), inputs[:1], config)
        return jax.tree.map(lambda a: a[0], found)

    targets = jax.lax.map(target_of, jnp.arange(x.shape[1]))

    def step(carry: tuple[Indexer, optax.OptState], rows: jax.Array) -> tuple[tuple[Indexer, optax.OptState], jax.Array]:
        p, state = carry
        found = []
        for row in rows:
            target = jax.tree.map(lambda a, row=row: a[row][None], targets)
            found.append(jax.value_and_grad(indexer_training.divergence)(p, own, inputs[row][None], target, config))
        value, gradient = jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)
        updates, state = optimiser.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), value

    (p, _), values = jax.lax.scan(step, (p, optimiser.init(p)), rows)
    return p, values


class Store:
    """The indexers of a frozen model with all layers F, by what they were taught: each is trained when it is first asked for.

    params: the model in the dtype to compute in. tokens [N, S]: the text. stage: what every group takes
    (`indexer_training.indexer_stage`). The rows that a group sees depend on the seed and its F layer alone.

    All runs on the first device, whatever mesh is in force.
    """

    def __init__(self, params: Params, config: Config, schedule: Schedule, tokens: np.ndarray, stage: Stage, seed: int) -> None:
        self._config, self._schedule = config, schedule
        self._run = indexer_training.Run(Resident(config, schedule, params), schedule, tokens, stage, seed)
        self._trained: dict[tuple[int, tuple[float, ...]], Trained] = {}
        with _on_one_device():
            self._params = jax.tree.map(lambda a: jnp.asarray(sharding.to_host(a)), params)
            self._states = states(self._params, tokens, config, schedule)

    def __len__(self) -> int:
        """How many indexers were trained."""
        return len(self._trained)

    def for_schedule(self, schedule: Schedule, *, cross_layer: bool = True) -> dict[int, Trained]:
        """The indexers of its F layers, by layer: taught all layers that they serve, or not `cross_layer`, their own."""
        stage = dataclasses.replace(self._run.stage, cross_layer=cross_layer)
        return self._of(dataclasses.replace(self._run, schedule=schedule, stage=stage))

    def for_spans(self, most: int) -> dict[int, Trained]:
        """The indexers of all layers, taught every number of layers up to `most` that they could serve."""
        return self._of(dataclasses.replace(self._run, spans=most))

    def _of(self, run: indexer_training.Run) -> dict[int, Trained]:
        return {layer: self._train(layer, tuple(run.shares(layer).values())) for layer in run.schedule.full_layers}

    def _train(self, layer: int, shares: tuple[float, ...]) -> Trained:
        if (layer, shares) not in self._trained:
            share = np.zeros(self._config.num_layers, np.float32)
            share[: len(shares)] = shares
            with _on_one_device():
                p = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), at_layer(self._params.indexer, layer))
                rows = self._run.rows(layer)
                given = self._states, jnp.int32(layer), jnp.asarray(share), jnp.asarray(rows)
                found, divergence = _train(p, self._params, *given, self._config, self._run.stage.program)
            if not np.isfinite(divergence).all():
                raise ValueError(f"indexer of layer {layer}: its divergence is not finite")
            self._trained[layer, shares] = Trained(jax.device_get(found), np.asarray(divergence))
        return self._trained[layer, shares]


def _on_one_device() -> contextlib.AbstractContextManager[None]:
    """The first device alone in force."""
    return sharding.use(sharding.make_mesh(devices=jax.local_devices()[:1]))


def programs(
    params: Params, config: Config, schedule: Schedule, stage: Stage, sequences: int
) -> list[Callable[[], jax.stages.Compiled]]:
    """What compiles each of the store's programs, of params that may be abstract, for so many sequences of text."""

    def structs(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    params = structs(params)
    tokens = jax.ShapeDtypeStruct((sequences, stage.context), jnp.int32)
    p = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], jnp.float32), params.indexer)
    x = jax.eval_shape(states, params, tokens, config, schedule)
    first, share, rows = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((), jnp.int32), ((config.num_layers,), jnp.float32), ((stage.steps, stage.sequences), jnp.int32))
    )
    lowered = (
        lambda: states.lower(params, tokens, config, schedule),
        lambda: _train.lower(p, params, x, first, share, rows, config, stage.program),
    )

    def compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        with _on_one_device():
            return lower().compile()

    return [functools.partial(compiled, lower) for lower in lowered]


def with_indexers(params: Params, trained: Mapping[int, Trained]) -> Params:
    """Params with all indexers, those of some layers replaced, in the dtypes of those that they replace."""
    layers = np.array(sorted(trained))
    new = jax.tree.map(lambda *stack: np.stack(stack), *(trained[layer].indexer for layer in layers))
    indexer = jax.tree.map(lambda old, new: old.at[layers].set(new.astype(old.dtype)), params.indexer, new)
    return dataclasses.replace(params, indexer=indexer)


def curve(trained: Mapping[int, Trained]) -> list[list[float]]:
    """Points (step, divergence) of several indexers' mean divergence, each a mean over the steps around."""
    mean = np.mean([one.divergence for one in trained.values()], axis=0)
    parts = np.array_split(np.arange(len(mean)), min(CURVE, len(mean)))
    return [[float(np.mean(part)), float(np.mean(mean[part]))] for part in parts]
