"""A model's weights one layer at a time: out of params in memory, or out of a checkpoint that no device holds whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent import futures
from typing import Protocol

import jax
from jax.sharding import Mesh

from indexcache_jax import sharding
from indexcache_jax.config import Config
from indexcache_jax.params import Params, abstract, slots, weights_of
from indexcache_jax.schedule import Schedule


class Layers(Protocol):
    """A source of weights to read layer by layer: Params with None where nothing was asked for.

    shardings: where they lie, a tree for all Params of the model; by default on the default device. Of an array only what
    this process's devices hold is read.
    """

    @property
    def config(self) -> Config:
        """The shape of the model."""

    @property
    def schedule(self) -> Schedule:
        """The schedule that the weights are for: its F layers have an indexer."""

    @property
    def weights(self) -> str | None:
        """The form of the params, as `params.abstract` names it."""

    def ends(self, shardings: Params | None = None) -> Params:
        """Embedding, final norm and head."""

    def layer(self, layer: int, shardings: Params | None = None) -> Params:
        """Every stack with this layer alone, None for the stacks that it has no part in."""


def shardings_in_force(layers: Layers) -> Params | None:
    """Where the mesh and rules in force put the weights of `layers`; None without a mesh.

    Raises ValueError where an axis of a weight cannot be divided evenly.
    """
    mesh, rules = sharding.current()
    return None if mesh is None else placed(layers, jax.sharding.get_mesh(), rules)


def placed(layers: Layers, mesh: Mesh, rules: sharding.Rules) -> Params:
    """Where a mesh and rules put the weights of `layers`; ValueError as for `shardings_in_force`."""
    return sharding.shardings(abstract(layers.config, layers.schedule, layers.weights), mesh, rules)


@dataclasses.dataclass(frozen=True)
class Resident:
    """Params in memory as a source of layers, which lie where the params do, whatever `shardings` say."""

    config: Config
    schedule: Schedule
    params: Params

    @property
    def weights(self) -> str | None:
        return weights_of(self.params)

    def ends(self, shardings: Params | None = None) -> Params:
        tree = abstract(self.config, self.schedule, self.weights)
        return jax.tree.map(lambda array, tensor: None if tensor.stacked else array, self.params, tree)

    def layer(self, layer: int, shardings: Params | None = None) -> Params:
        tree = abstract(self.config, self.schedule, self.weights)

        def of(array: jax.Array, layers: tuple[int, ...] | None) -> jax.Array | None:
            slot = slots(layers or ()).get(layer)
            return None if slot is None else array[slot : slot + 1]

        return jax.tree.map(lambda array, tensor: of(array, tensor.layers), self.params, tree)


def in_order(layers: Layers, shardings: Params | None = None) -> Iterator[tuple[int, Params]]:
    """The layers' numbers and weights on the devices, each read while the one before is in use."""
    with futures.ThreadPoolExecutor(1) as reader:
        following = reader.submit(layers.layer, 0, shardings)
        for layer in range(layers.config.num_layers):
            params = following.result()
            if layer + 1 < layers.config.num_layers:
                following = reader.submit(layers.layer, layer + 1, shardings)
            yield layer, params
            del params  # or two layers would stay on the devices while a third is read
