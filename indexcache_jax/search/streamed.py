"""Losses of a model larger than its devices: weights are read layer by layer from where they are stored.

The layers are visited once, from the first to the last, and each is applied to the hidden states of every schedule that
is asked about: schedules share what lies below the first layer in which they differ. So one step of a greedy search reads
the weights once for as many calibration batches as host memory holds hidden states of, and the next layer is read while
the devices work on this one.

Devices split the rows of a batch, each with the whole layer: a row's arithmetic is that of a single device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from indexcache_jax import model, sharding
from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.evaluator import BatchEvaluator, Missing, Progress, no_progress
from indexcache_jax.search.greedy import LossLog
from indexcache_jax.search.layerwise import State

HIDDEN_STATE_BYTES = 64 * 2**30  # of host memory, at most, for the hidden states of one pass over the layers
DATA = "data"  # the mesh axis that splits the rows of a batch, as in sharding.SERVING
REPLICATED = PartitionSpec()

Pass = dict[int, list[Schedule]]  # batch numbers, and the schedules that one pass over the layers runs on each batch
StateKey = tuple[int, str]  # a batch number, and the letters of a schedule up to some layer


class Layers(Protocol):
    """A source of weights to read layer by layer: Params of host arrays, with None where nothing was asked for."""

    config: Config

    @property
    def schedule(self) -> Schedule:
        """The schedule that the weights are for: its F layers have an indexer."""

    def ends(self) -> Params:
        """Embedding, final norm and head."""

    def layer(self, layer: int) -> Params:
        """Every stack with this layer alone, None for the stacks that it has no part in."""


def _batch_spec(mesh: Mesh) -> PartitionSpec:
    return sharding.spec(("batch",), sharding.SERVING, mesh)


@functools.partial(jax.jit, static_argnames=("full", "mesh"), donate_argnames="state")
def _apply(params: Params, state: State, config: Config, full: bool, mesh: Mesh) -> State:
    """`layerwise.single` on every device's rows."""

    def on_rows(params: Params, state: State) -> State:
        return layerwise.single(params, state, config, full)

    rows = _batch_spec(mesh)
    return jax.shard_map(on_rows, mesh=mesh, in_specs=(REPLICATED, rows), out_specs=rows, check_vma=False)(params, state)


@functools.partial(jax.jit, static_argnames="mesh")
def _mean_loss(ends: Params, x: jax.Array, targets: jax.Array, config: Config, mesh: Mesh) -> jax.Array:
    """The mean loss in nats a token of targets [B, S], from hidden states x [B, S, D] after the last layer."""

    def on_rows(ends: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
        return model.token_losses(ends, x, targets, config)

    rows = _batch_spec(mesh)
    specs = REPLICATED, rows, rows
    return jnp.mean(jax.shard_map(on_rows, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(ends, x, targets))


class StreamedEvaluator(BatchEvaluator):
    """Mean losses under any schedule of a model whose weights are read layer by layer, on fixed batches [B, S+1].

    Args:
        layers: the source of the weights.
        batches: rows of inputs and their successors, int32, all of one shape.
        log: holds every loss that was measured, and answers for those it holds. Losses are added when a pass ends.
        progress: called with the number of layers run on a batch, each time some were.
        memory: bytes of host memory for hidden states. At least one batch is in it at a time, under all its schedules.

    As many local devices take part as divide B.

    Raises:
        ValueError: the batches differ in shape; when asked for a loss: a schedule has an F layer without an indexer, or the
            loss is not finite.
    """

    def __init__(
        self,
        layers: Layers,
        batches: Sequence[np.ndarray],
        log: LossLog | None = None,
        progress: Progress = no_progress,
        memory: int = HIDDEN_STATE_BYTES,
    ) -> None:
        ends = layers.ends()
        super().__init__(layers.config, layers.schedule, ends.embedding.dtype, batches, log, progress)
        self.layers, self.memory = layers, memory
        rows, devices = batches[0].shape[0], jax.local_devices()
        count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
        self._mesh = Mesh(np.array(devices[:count]), (DATA,))
        self._ends = self._replicate(ends)

    def selections(self, schedule: Schedule, numbers: Sequence[int], queries: np.ndarray) -> list[np.ndarray]:
        """The indices that the F layers select for some queries of every row, on the batches of these numbers.

        queries [Q]: positions in a row. Returns for each batch [num_full, B * Q, k] int32, rows outermost.
        Raises ValueError for a schedule with an F layer that has no indexer.
        """
        self._check(schedule)
        by_batch: list[list[np.ndarray]] = [[] for _ in numbers]

        def keep(layer: int, number: int, state: State) -> None:
            if schedule.is_full[layer]:
                indices = np.asarray(state.indices)[:, queries]
                by_batch[numbers.index(number)].append(indices.reshape(-1, indices.shape[-1]))

        for batches in self._passes([(number, [schedule]) for number in numbers]):
            self._walk(batches, keep)
        return [np.stack(selections) for selections in by_batch]

    def _measure(self, missing: Missing, base: Schedule | None) -> Iterator[tuple[Schedule, int, float]]:
        for batches in self._passes(missing):
            states = self._walk(batches)
            for number, schedules in batches.items():
                targets = self._split_rows(self.batches[number][:, 1:])
                for schedule in schedules:
                    x = self._split_rows(states[number, schedule.pattern].x)
                    yield schedule, number, float(_mean_loss(self._ends, x, targets, self.config, self._mesh))

    def _passes(self, missing: Missing) -> Iterator[Pass]:
        """The batches and schedules in groups, each with no more hidden states than `memory` holds (or of one batch)."""
        rows, width = self.batches[0].shape[0], self.batches[0].shape[1] - 1
        token_bytes = self.config.hidden_size * np.dtype(self.dtype).itemsize + 4 * min(self.config.index_topk, width)
        most_states = self.memory // (rows * width * token_bytes)
        group: Pass = {}
        for number, schedules in missing:
            if group and sum(map(len, group.values())) + len(schedules) > most_states:
                yield group
                group = {}
            group[number] = schedules
        if group:
            yield group

    def _walk(
        self, batches: Pass, see: Callable[[int, int, State], None] = lambda layer, number, state: None
    ) -> dict[StateKey, State]:
        """The states on the host after all layers, by batch number and pattern, from one pass over the layers.

        `see(layer, batch number, state)` is called with every state after every layer.
        """
        states: dict[StateKey, State] = {}
        for number in batches:
            tokens = self._split_rows(self.batches[number][:, :-1])
            states[number, ""] = jax.device_get(layerwise.start(self._ends, tokens, self.config))
        for layer, params in self._read():
            above = {}
            for key, state in self._through(layer, params, states, batches):
                above[key] = state
                see(layer, key[0], state)
                self.progress(1)
            states = above
        return states

    def _through(
        self, layer: int, params: Params, states: dict[StateKey, State], batches: Mapping[int, Sequence[Schedule]]
    ) -> Iterator[tuple[StateKey, State]]:
        """The states after a layer, on the host; those before it are taken out of `states` as they are used."""
        config = dataclasses.replace(self.config, num_layers=1, moe_layers=self.config.moe_layers[layer : layer + 1])
        # One program for S layers, whether or not they have an indexer.
        without_indexer = dataclasses.replace(params, indexer=jax.tree.map(lambda _: None, params.indexer))
        running: tuple[StateKey, State] | None = None  # copied to the host while the devices compute the next one
        for number, below in list(states):
            state = states.pop((number, below))
            for letter in sorted({s.pattern[layer] for s in batches[number] if s.pattern[:layer] == below}):
                full = letter == "F"
                on_devices = jax.tree.map(self._split_rows, state)
                after = _apply(params if full else without_indexer, on_devices, config, full, self._mesh)
                if running is not None:
                    yield running[0], jax.device_get(running[1])
                running = (number, below + letter), after
        if running is not None:
            yield running[0], jax.device_get(running[1])

    def _read(self) -> Iterator[tuple[int, Params]]:
        """The layers' numbers and weights on the devices, each read while the one before is in use."""

        def read(layer: int) -> Params:
            return self._replicate(self.layers.layer(layer))

        with futures.ThreadPoolExecutor(1) as reader:
            following = reader.submit(read, 0)
            for layer in range(self.config.num_layers):
                params = following.result()
                if layer + 1 < self.config.num_layers:
                    following = reader.submit(read, layer + 1)
                yield layer, params
                del params  # or two layers would stay on the devices while a third is read

    def _replicate(self, params: Params) -> Params:
        return jax.device_put(params, NamedSharding(self._mesh, REPLICATED))

    def _split_rows(self, x: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(self._mesh, _batch_spec(self._mesh)))
