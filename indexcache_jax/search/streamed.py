"""Losses of a model larger than its devices: weights are read layer by layer from where they are stored.

The layers are visited once, from the first to the last, and each is applied to the hidden states of every schedule that
is asked about: schedules share what lies below the first layer in which they differ. So one step of a greedy search reads
the weights once for as many calibration batches as host memory holds hidden states of, and the next layer is read while
the devices work on this one.

Under a mesh in force (`sharding.use`) a layer's weights lie where its rules put them, of which every process reads only its
devices' parts, and a process keeps the hidden states of its own devices. Without one as many local devices take part as
divide the rows of a batch, each with the whole layer: a row's arithmetic is that of a single device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from indexcache_jax import arguments, sharding
from indexcache_jax.config import Config
from indexcache_jax.layers import Layers, in_order, placed
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.evaluator import BatchEvaluator, Missing, Progress, checked_batches, no_progress
from indexcache_jax.search.layerwise import State
from indexcache_jax.search.oracle import LossLog
from indexcache_jax.sharding import SERVING

HIDDEN_STATE_BYTES = 64 * 2**30  # of host memory, at most, for the hidden states of one pass over the layers

T = TypeVar("T")

Bounds = tuple[tuple[int | None, int | None], ...]  # start and stop along every axis of an array
Pass = dict[int, list[Schedule]]  # batch numbers, and the schedules that one pass over the layers runs on each batch
StateKey = tuple[int, str]  # a batch number, and the letters of a schedule up to some layer


@functools.partial(jax.jit, static_argnames="full", donate_argnames="state")
def _apply(params: Params, state: State, config: Config, full: bool) -> State:
    """`layerwise.single` as one program."""
    return layerwise.single(params, state, config, full)


@dataclasses.dataclass(frozen=True)
class HostArray:
    """An array in host memory: of each part of it that devices of this process hold, one copy."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    parts: Mapping[Bounds, np.ndarray]

    @classmethod
    def of(cls, x: jax.Array) -> HostArray:
        """A copy of `x`."""
        shards = {_bounds(shard.index): shard.data for shard in x.addressable_shards}
        for data in shards.values():
            data.copy_to_host_async()
        return cls(x.shape, x.sharding, {bounds: np.asarray(data) for bounds, data in shards.items()})

    def on_devices(self) -> jax.Array:
        """The array on the devices that it was on."""
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.parts[_bounds(index)])


@dataclasses.dataclass(frozen=True)
class HostState:
    """A `State` in host memory."""

    x: HostArray
    indices: HostArray


def _to_host(state: State) -> HostState:
    return HostState(HostArray.of(state.x), HostArray.of(state.indices))


def _bounds(index: tuple[slice, ...] | None) -> Bounds:
    return tuple((axis.start, axis.stop) for axis in index or ())


def _largest_share(at: jax.sharding.Sharding, shape: tuple[int, ...]) -> float:
    """The largest share of an array of this shape that one process holds a copy of: the same in all processes."""
    parts: dict[int, dict[Bounds, int]] = {}
    indices: Mapping[Any, tuple[slice, ...]] = at.devices_indices_map(shape)
    for device, index in indices.items():
        size = math.prod(len(range(*axis.indices(n))) for axis, n in zip(index, shape, strict=True))
        parts.setdefault(device.process_index, {})[_bounds(index)] = size
    return max(sum(sizes.values()) for sizes in parts.values()) / math.prod(shape)


def state_bytes(config: Config, dtype: Any, rows: int, width: int) -> int:
    """Bytes of the hidden states of a batch of so many rows and tokens under one schedule, whole."""
    return rows * width * (config.hidden_size * np.dtype(dtype).itemsize + 4 * min(config.index_topk, width))


class StreamedEvaluator(BatchEvaluator):
    """Mean losses under any schedule of a model whose weights are read layer by layer, on fixed batches [B, S+1].

    Args:
        layers: the source of the weights.
        batches: rows of inputs and their successors, int32, all of one shape.
        log: holds every loss that was measured, and answers for those it holds. Losses are added when a pass ends.
        progress: called with the number of layers run on a batch, each time some were.
        memory: bytes of a process's host memory for hidden states. At least one batch is in it at a time, under all its
            schedules.

    The mesh is the one in force when it is made, by default one of as many local devices as divide B.

    Raises:
        ValueError: the batches differ in shape or hold what is no token, or the mesh does not divide an axis of a weight
            evenly; when asked for a loss: a schedule has an F layer without an indexer, or the loss is not finite.
    """

    def __init__(
        self,
        layers: Layers,
        batches: Sequence[np.ndarray],
        log: LossLog | None = None,
        progress: Progress = no_progress,
        memory: int = HIDDEN_STATE_BYTES,
    ) -> None:
        arguments.integer("memory", memory, 0)
        batches = checked_batches(batches, layers.config)
        mesh, self._rules = sharding.current()
        if mesh is None:
            rows, devices = batches[0].shape[0], jax.local_devices()
            count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
            self._mesh, self._rules = sharding.make_mesh(data=count, devices=devices[:count]), SERVING.whole_experts()
        else:
            self._mesh = jax.sharding.get_mesh()
        self._shardings = placed(layers, self._mesh, self._rules)
        self._ends = layers.ends(self._shardings)
        super().__init__(layers.config, layers.schedule, self._ends.embedding.dtype, batches, log, progress)
        self.layers, self.memory = layers, memory

    def selections(self, schedule: Schedule, numbers: Sequence[int], queries: np.ndarray) -> list[np.ndarray]:
        """The indices that the F layers select for some queries of every row, on the batches of these numbers.

        queries [Q]: positions in a row. Returns for each batch [num_full, B * Q, k] int32, rows outermost.
        Raises ValueError for a schedule with an F layer that has no indexer.
        """
        self._check(schedule)
        by_batch: list[list[np.ndarray]] = [[] for _ in numbers]

        def keep(layer: int, number: int, state: State) -> None:
            if schedule.is_full[layer]:
                by_batch[numbers.index(number)].append(self._run(layerwise.selected, state, queries))

        for batches in self._passes([(number, [schedule]) for number in numbers]):
            self._walk(batches, keep)
        return [np.stack(selections) for selections in by_batch]

    def seconds_of_layer(self) -> tuple[float, float]:
        """Seconds to read a layer, the middle F layer, and to run it as F on the first batch once its program is compiled."""
        layer = self.schedule.full_layers[self.schedule.num_full // 2]
        began = time.perf_counter()
        params = jax.block_until_ready(self.layers.layer(layer, self._shardings))
        reading = time.perf_counter() - began
        running, tokens = 0.0, self.batches[0][:, :-1]
        for _ in range(2):  # the first time compiles
            state = self._run(layerwise.start, self._ends, self._run(layerwise.place, tokens), self.config)
            jax.block_until_ready(state)
            began = time.perf_counter()
            _to_host(self._run(_apply, params, state, self._config_of(layer), True))
            running = time.perf_counter() - began
        return reading, running

    def _config_of(self, layer: int) -> Config:
        """The config of a layer alone."""
        return dataclasses.replace(self.config, num_layers=1, moe_layers=self.config.moe_layers[layer : layer + 1])

    def _measure(self, missing: Missing, base: Schedule | None) -> Iterator[tuple[Schedule, int, np.ndarray]]:
        for batches in self._passes(missing):
            states = self._walk(batches)
            for number, schedules in batches.items():
                targets = self._run(layerwise.place, self.batches[number][:, 1:])
                for schedule in schedules:
                    x = states[number, schedule.pattern].x.on_devices()
                    yield schedule, number, np.asarray(self._run(layerwise.row_losses, self._ends, x, targets, self.config))

    def _passes(self, missing: Missing) -> Iterator[Pass]:
        """The batches and schedules in groups, each with no more hidden states than `memory` holds (or of one batch)."""
        rows, width = self.batches[0].shape[0], self.batches[0].shape[1] - 1
        share = _largest_share(
            NamedSharding(self._mesh, sharding.fitting_spec((rows, width), ("batch", "queries"), self._rules, self._mesh)),
            (rows, width),
        )
        most_states = self.memory // int(share * state_bytes(self.config, self.dtype, rows, width))
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
    ) -> dict[StateKey, HostState]:
        """The states on the host after all layers, by batch number and pattern, from one pass over the layers.

        `see(layer, batch number, state)` is called with every state after every layer, on the devices.
        """
        states: dict[StateKey, HostState] = {}
        for number in batches:
            tokens = self._run(layerwise.place, self.batches[number][:, :-1])
            states[number, ""] = _to_host(self._run(layerwise.start, self._ends, tokens, self.config))
        for layer, params in in_order(self.layers, self._shardings):
            above = {}
            for key, state in self._through(layer, params, states, batches):
                see(layer, key[0], state)
                above[key] = _to_host(state)
                self.progress(1)
                del state  # or it would stay on the devices beside the next two
            states = above
        return states

    def _through(
        self, layer: int, params: Params, states: dict[StateKey, HostState], batches: Mapping[int, Sequence[Schedule]]
    ) -> Iterator[tuple[StateKey, State]]:
        """The states after a layer, on the devices; those before it are taken out of `states` as they are used."""
        config = self._config_of(layer)
        # One program for S layers, whether or not they have an indexer.
        without_indexer = dataclasses.replace(params, indexer=jax.tree.map(lambda _: None, params.indexer))
        running: tuple[StateKey, State] | None = None  # handed on while the devices compute the next one
        for number, below in list(states):
            state = states.pop((number, below))
            for letter in sorted({s.pattern[layer] for s in batches[number] if s.pattern[:layer] == below}):
                full = letter == "F"
                before = State(state.x.on_devices(), state.indices.on_devices())
                after = self._run(_apply, params if full else without_indexer, before, config, full)
                if running is not None:
                    yield running
                running = (number, below + letter), after
        if running is not None:
            yield running

    def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns with the mesh in force."""
        with sharding.use(self._mesh, self._rules):
            return function(*arguments)
