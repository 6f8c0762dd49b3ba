"""Losses of a model whose weights stay where they are stored: what the search needs of a model larger than its devices.

The layers are visited once, from the first to the last, and each is applied to the hidden states of every schedule that
is asked about: schedules share what lies below the first layer in which they differ. So one step of a greedy search reads
the weights once for as many calibration batches as `memory` holds hidden states of, and the next layer is read while the
devices work on this one.

Devices split the rows of a batch, each with the whole layer: a row's arithmetic is that of a single device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.greedy import LossLog, check_finite, check_shapes
from indexcache_jax.search.layerwise import State

MEMORY = 64 * 2**30
ROWS = "rows"


class Layers(Protocol):
    """A source of weights. Params are arrays on the host; what was not asked for is None."""

    config: Config

    @property
    def schedule(self) -> Schedule:
        """Which layers have an indexer."""

    def ends(self) -> Params:
        """Embedding, final norm and head."""

    def layer(self, layer: int) -> Params:
        """Every stack with this layer alone, or None where it has no part in it."""


@functools.partial(jax.jit, static_argnames=("full", "mesh"), donate_argnames="state")
def _apply(params: Params, state: State, config: Config, full: bool, mesh: Mesh) -> State:
    """`layerwise.single` on every device's rows."""

    def on_rows(params: Params, state: State) -> State:
        return layerwise.single(params, state, config, full)

    return jax.shard_map(on_rows, mesh=mesh, in_specs=(P(), P(ROWS)), out_specs=P(ROWS), check_vma=False)(params, state)


@functools.partial(jax.jit, static_argnames="mesh")
def _mean_loss(ends: Params, x: jax.Array, targets: jax.Array, config: Config, mesh: Mesh) -> jax.Array:
    def on_rows(ends: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
        return model.token_losses(ends, x, targets, config)

    specs = P(), P(ROWS), P(ROWS)
    return jnp.mean(jax.shard_map(on_rows, mesh=mesh, in_specs=specs, out_specs=P(ROWS), check_vma=False)(ends, x, targets))


class StreamedEvaluator:
    """`search.Evaluator` for weights that are read layer by layer, on fixed batches [B, S+1] of one shape.

    memory: bytes of host memory for hidden states; at least one batch is in it at a time. As many devices as divide B
    take part. `log` and `progress` are as there; losses are logged when a pass over the layers has ended.
    """

    def __init__(
        self,
        layers: Layers,
        batches: Sequence[np.ndarray],
        log: LossLog | None = None,
        progress: Callable[[int], object] = lambda layers: None,
        memory: int = MEMORY,
    ) -> None:
        check_shapes(batches)
        self.layers, self.batches, self.log, self.progress, self.memory = layers, list(batches), log, progress, memory
        self.config = layers.config
        rows, devices = batches[0].shape[0], jax.local_devices()
        self._mesh = Mesh(np.array(devices[: max(n for n in range(1, len(devices) + 1) if rows % n == 0)]), (ROWS,))
        self._ends = self._everywhere(layers.ends())

    def loss(self, schedule: Schedule) -> float:
        return self.losses([schedule])[0]

    def flips(self, schedule: Schedule, layers: Sequence[int]) -> dict[int, float]:
        return dict(zip(layers, self.losses([schedule.shared(layer) for layer in layers]), strict=True))

    def losses(self, schedules: Sequence[Schedule]) -> list[float]:
        """The mean loss of each of several schedules, from as few passes over the layers as memory allows."""
        for schedule in schedules:
            self._check(schedule)
        found: dict[tuple[str, int], float] = {}
        missing: list[tuple[int, list[Schedule]]] = []  # batch, and what to find on it
        for number in range(len(self.batches)):
            known = {s.pattern: None if self.log is None else self.log.get(s, number) for s in schedules}
            found |= {(pattern, number): loss for pattern, loss in known.items() if loss is not None}
            if lacking := [s for s in dict.fromkeys(schedules) if known[s.pattern] is None]:
                missing.append((number, lacking))
        for together in self._passes(missing):
            for schedule, number, loss in self._pass(together):
                found[schedule.pattern, number] = check_finite(loss, schedule, number, self._ends.embedding.dtype)
                if self.log is not None:
                    self.log.add(schedule, number, loss)
        return [float(np.mean([found[s.pattern, n] for n in range(len(self.batches))])) for s in schedules]

    def selections(self, schedule: Schedule, numbers: Sequence[int], queries: np.ndarray) -> list[np.ndarray]:
        """Of each of the batches `numbers` the indices [num_full, B * Q, k] that the F layers select for `queries` [Q]."""
        self._check(schedule)
        found: list[list[np.ndarray]] = [[] for _ in numbers]

        def keep(layer: int, number: int, state: State) -> None:
            if schedule.is_full[layer]:
                chosen = np.asarray(state.indices)[:, queries]
                found[numbers.index(number)].append(chosen.reshape(-1, chosen.shape[-1]))

        for together in self._passes([(number, [schedule]) for number in numbers]):
            self._walk(together, keep)
        return [np.stack(rows) for rows in found]

    def _check(self, schedule: Schedule) -> None:
        if lacking := [i for i in schedule.full_layers if not self.layers.schedule.is_full[i]]:
            raise ValueError(f"schedule {schedule.pattern}: layer {lacking[0]} is F, but the weights have no indexer for it")

    def _passes(self, wanted: list[tuple[int, list[Schedule]]]) -> Iterator[dict[int, list[Schedule]]]:
        """`wanted` cut so that the states of a part fit the memory."""
        rows, width = self.batches[0].shape[0], self.batches[0].shape[1] - 1
        of_token = self.config.hidden_size * self._ends.embedding.dtype.itemsize + 4 * min(self.config.index_topk, width)
        room = self.memory // (rows * width * of_token)
        part: dict[int, list[Schedule]] = {}
        for number, schedules in wanted:
            if part and sum(map(len, part.values())) + len(schedules) > room:
                yield part
                part = {}
            part[number] = schedules
        if part:
            yield part

    def _pass(self, wanted: dict[int, list[Schedule]]) -> Iterator[tuple[Schedule, int, float]]:
        """The loss of each schedule on each batch."""
        states = self._walk(wanted, lambda layer, number, state: None)
        for number, schedules in wanted.items():
            targets = self._by_rows(self.batches[number][:, 1:])
            for schedule in schedules:
                x = self._by_rows(states[number, schedule.pattern].x)
                yield schedule, number, float(_mean_loss(self._ends, x, targets, self.config, self._mesh))

    def _walk(self, wanted: dict[int, list[Schedule]], see: Callable[[int, int, State], None]) -> dict[tuple[int, str], State]:
        """The states on the host after all layers, by batch and pattern; `see` is shown those after each layer."""
        states: dict[tuple[int, str], State] = {}  # by batch and the letters of the layers so far
        for number in wanted:
            tokens = self._by_rows(self.batches[number][:, :-1])
            states[number, ""] = jax.device_get(layerwise.start(self._ends, tokens, self.config))
        for layer, params in self._read():
            above = {}
            for key, state in self._through(layer, params, states, wanted):
                above[key] = state
                see(layer, key[0], state)
                self.progress(1)
            states = above
        return states

    def _through(
        self, layer: int, params: Params, states: dict[tuple[int, str], State], wanted: dict[int, list[Schedule]]
    ) -> Iterator[tuple[tuple[int, str], State]]:
        """The states after a layer, on the host; those before it are taken out of `states` as they are used."""
        config = dataclasses.replace(self.config, num_layers=1, moe_layers=self.config.moe_layers[layer : layer + 1])
        # One program for S layers, whether or not they have an indexer.
        without = dataclasses.replace(params, indexer=jax.tree.map(lambda _: None, params.indexer))
        running = None  # on its way back while the next one is computed
        for number, below in list(states):
            state = states.pop((number, below))
            for letter in sorted({s.pattern[layer] for s in wanted[number] if s.pattern[:layer] == below}):
                is_full = letter == "F"
                given = jax.tree.map(self._by_rows, state)
                after = _apply(params if is_full else without, given, config, is_full, self._mesh)
                if running is not None:
                    yield running[0], jax.device_get(running[1])
                running = (number, below + letter), after
        if running is not None:
            yield running[0], jax.device_get(running[1])

    def _read(self) -> Iterator[tuple[int, Params]]:
        """The layers on the devices, each read while the one before is in use."""

        def one(layer: int) -> Params:
            return self._everywhere(self.layers.layer(layer))

        with futures.ThreadPoolExecutor(1) as reader:
            coming = reader.submit(one, 0)
            for layer in range(self.config.num_layers):
                params = coming.result()
                if layer + 1 < self.config.num_layers:
                    coming = reader.submit(one, layer + 1)
                yield layer, params
                del params

    def _everywhere(self, params: Params) -> Params:
        return jax.device_put(params, NamedSharding(self._mesh, P()))

    def _by_rows(self, x: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(self._mesh, P(ROWS)))
