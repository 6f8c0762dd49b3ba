"""Mean losses of a model under any schedule, on fixed calibration batches: what a search compares.

A flip at layer l changes nothing below l. `Evaluator.flips` therefore walks a batch up the layers once under the current
schedule and branches off at every layer it flips: the layers from there on run with that one layer S. No state is stored
but the walk's own, and the three programs that do it (layerwise.py) compile once.

Under a mesh in force (`sharding.use`) its devices share the rows of a batch, their tokens, heads and experts as the rules
say; where they could share no rows, and each holds the whole model, they run different schedules. All processes of a mesh
measure together, and each has all the losses.
"""

from __future__ import annotations

import abc
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import sharding
from indexcache_jax.config import Config
from indexcache_jax.model import check_tokens
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.greedy import LossLog, greedy_search
from indexcache_jax.sharding import constrain

Missing = list[tuple[int, list[Schedule]]]  # batch numbers, and the schedules whose loss on that batch is not known
FINGERPRINT_SAMPLE = 4096  # numbers of each array
Progress = Callable[[int], object]  # called with a number of layers, each time that so many were run on a batch


def no_progress(layers: int) -> None:
    """Reports nothing."""


class BatchEvaluator(abc.ABC):
    """Mean losses under any schedule on fixed batches [B, S+1] of one shape, of which a log may hold some.

    Subclasses say how losses are measured (`_measure`).

    config, dtype: of the weights. schedule: the one that the weights are for, so only its F layers have an indexer.
    log: holds every loss that was measured, and answers for those it holds.

    Raises ValueError where the batches differ in shape, for a schedule with an F layer that has no indexer, and where a loss
    is NaN or infinite: the lowest of such losses means nothing.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        dtype: Any,
        batches: Sequence[np.ndarray],
        log: LossLog | None,
        progress: Progress,
    ) -> None:
        if len({batch.shape for batch in batches}) != 1:
            raise ValueError(f"batches: shapes {sorted({batch.shape for batch in batches})}, but one shape is needed")
        self.config, self.schedule, self.dtype = config, schedule, dtype
        self.batches, self.log, self.progress = list(batches), log, progress

    @abc.abstractmethod
    def _measure(self, missing: Missing, base: Schedule | None) -> Iterator[tuple[Schedule, int, float]]:
        """The losses that are missing, as they are measured: schedule, batch number, loss.

        base: the schedule of which each one to measure is a flip; None where they have nothing in common.
        """

    def advice(self) -> list[str]:
        """Sentences on devices of the mesh in force that all compute the same, and what would change that; else none."""
        rows, width = self.batches[0].shape[0], self.batches[0].shape[1] - 1
        found = []
        for axis, size, what in (("batch", rows, "rows a batch"), ("queries", width, "tokens a row")):
            if size % (devices := sharding.devices_along(axis)):
                whole = f"{size} {what} cannot be divided by {devices} devices, which therefore all compute the same"
                found.append(f"{whole}; a multiple of {devices} would be shared")
        return found

    def loss(self, schedule: Schedule) -> float:
        """The mean loss in nats a token under `schedule`, over all batches."""
        return self.losses([schedule])[0]

    def losses(self, schedules: Sequence[Schedule]) -> list[float]:
        """The mean loss in nats a token under each of the schedules, over all batches."""
        return self._means(schedules, None)

    def flips(self, schedule: Schedule, layers: Sequence[int]) -> dict[int, float]:
        """For each of the layers, the mean loss under `schedule` with that layer alone turned from F to S."""
        flipped = [schedule.with_shared(layer) for layer in layers]
        return dict(zip(layers, self._means(flipped, schedule), strict=True))

    def _means(self, schedules: Sequence[Schedule], base: Schedule | None) -> list[float]:
        for schedule in schedules:
            self._check(schedule)
        losses: dict[tuple[Schedule, int], float] = {}
        missing: Missing = []
        for number in range(len(self.batches)):
            unknown = []
            for schedule in dict.fromkeys(schedules):
                known = None if self.log is None else self.log.get(schedule, number)
                if known is None:
                    unknown.append(schedule)
                else:
                    losses[schedule, number] = known
            if unknown:
                missing.append((number, unknown))
        for schedule, number, loss in self._measure(missing, base):
            self._check_finite(loss, schedule, number)
            losses[schedule, number] = loss
            if self.log is not None:
                self.log.add(schedule, number, loss)
        return [float(np.mean([losses[schedule, n] for n in range(len(self.batches))])) for schedule in schedules]

    def _check(self, schedule: Schedule) -> None:
        if lacking := [i for i in schedule.full_layers if not self.schedule.is_full[i]]:
            raise ValueError(f"schedule {schedule.pattern}: layer {lacking[0]} is F, but the weights have no indexer for it")

    def _check_finite(self, loss: float, schedule: Schedule, number: int) -> None:
        if not math.isfinite(loss):
            why = f"the weights hold NaN or infinity, or {self.dtype} arithmetic overflows"
            raise ValueError(f"loss of {schedule.pattern} on batch {number} is {loss}: {why}")


class Evaluator(BatchEvaluator):
    """Mean losses of a model in memory under any schedule, on fixed batches [B, S+1] of one shape.

    Args:
        params: the weights, on the device or, under a mesh, placed on it (`sharding.put`, `checkpoints_convert.load`).
        config: their shape.
        schedule: the one the params are for: only its F layers can be F.
        batches: rows of inputs and their successors, int32.
        log: holds every loss that was measured, and answers for those it holds.
        progress: called with the number of layers run on a batch, each time some were.

    Raises:
        ValueError: the batches differ in shape; when asked for a loss: a schedule has an F layer without an indexer, or the
            loss is not finite.
    """

    def __init__(
        self,
        params: Params,
        config: Config,
        schedule: Schedule,
        batches: Sequence[np.ndarray],
        log: LossLog | None = None,
        progress: Progress = no_progress,
    ) -> None:
        super().__init__(config, schedule, params.embedding.dtype, batches, log, progress)
        self.params = params

    def advice(self) -> list[str]:
        return [] if self._at_once > 1 else super().advice()

    @property
    def _at_once(self) -> int:
        """How many schedules are run at once."""
        return layerwise.schedules_at_once(self.batches[0].shape[0], self.config)

    def _measure(self, missing: Missing, base: Schedule | None) -> Iterator[tuple[Schedule, int, float]]:
        for number, schedules in missing:
            for schedule, loss in self._measure_batch(self.batches[number], schedules, base):
                yield schedule, number, loss

    def _measure_batch(
        self, batch: np.ndarray, schedules: Sequence[Schedule], base: Schedule | None
    ) -> Iterator[tuple[Schedule, float]]:
        """The losses on one batch, in the order in which the schedules leave the walk under `base`."""
        tokens, targets = layerwise.place(batch[:, :-1]), layerwise.place(batch[:, 1:])
        state = layerwise.start(self.params, tokens, self.config)
        layer = 0
        ordered = sorted(schedules, key=lambda schedule: _first_difference(schedule, base))
        for first in range(0, len(ordered), self._at_once):
            group = ordered[first : first + self._at_once]
            while layer < _first_difference(group[0], base):
                assert base is not None
                full = np.bool_(base.is_full[layer])
                state = layerwise.advance(self.params, state, np.int32(layer), full, self.config, self.schedule)
                layer += 1
                self.progress(1)
            for schedule, loss in zip(group, self._finish(state, layer, group, targets), strict=True):
                self.progress(self.config.num_layers - _first_difference(schedule, base))
                yield schedule, loss

    def _finish(self, state: layerwise.State, layer: int, group: list[Schedule], targets: jax.Array) -> list[float]:
        """The losses under one schedule or, at once, under several, from the state before `layer`."""
        rest = targets, self.config, self.schedule
        if self._at_once == 1:
            full = np.array(group[0].is_full)
            return [float(layerwise.finish(self.params, state, np.int32(layer), full, *rest))]
        padded = group + group[-1:] * (self._at_once - len(group))
        every = np.array([schedule.is_full for schedule in padded])
        losses = np.asarray(layerwise.finish_each(self.params, state, np.int32(layer), layerwise.place(every), *rest))
        return losses[: len(group)].tolist()


def find_schedule(
    params: Params,
    config: Config,
    schedule: Schedule,
    tokens: Any,
    num_full: int,
    *,
    batch_size: int = 1,
    blocks: int = 1,
    log: LossLog | None = None,
    progress: Progress = no_progress,
) -> Schedule:
    """The schedule of `num_full` F layers that the greedy search finds from `schedule`, the params' own.

    tokens [N, S+1]: sequences to search on, and the token after each; batch_size of them are run at a time. The rest is as
    for `Evaluator` and `greedy_search`. ValueError names the argument at fault.
    """
    cuts = np.asarray(check_tokens(tokens, config), np.int32)
    if batch_size < 1 or len(cuts) == 0 or len(cuts) % batch_size:
        raise ValueError(f"batch_size: {batch_size} does not divide {len(cuts)} sequences")
    if cuts.shape[1] - 1 <= config.index_topk:
        raise ValueError(
            f"tokens: sequences of {cuts.shape[1] - 1} tokens; up to index_topk = {config.index_topk} every key is selected, "
            "and all schedules are the same"
        )
    batches = np.split(cuts, len(cuts) // batch_size)
    evaluator = Evaluator(params, config, schedule, batches, log, progress)
    return greedy_search(evaluator, schedule, num_full=num_full, blocks=blocks)[-1].schedule


def _first_difference(schedule: Schedule, base: Schedule | None) -> int:
    """The first layer in which two schedules differ, 0 where they do not or `base` is None."""
    if base is None:
        return 0
    return next((i for i, (a, b) in enumerate(zip(schedule.pattern, base.pattern, strict=True)) if a != b), 0)


@jax.jit
def _numbers_at(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    """The numbers of an array at some places [N], an index of each axis, as float32."""
    return constrain(x[index].astype(jnp.float32), None)


def fingerprint(params: Any, batches: Sequence[np.ndarray]) -> dict[str, int]:
    """Checksums of a tree of weights (of some numbers of each array) and of the batches: what losses depend on.

    A log of losses holds them, so that it is not continued with other weights or another text.
    """
    weights = 0
    for leaf in jax.tree.leaves(params):
        places = np.arange(0, leaf.size, max(1, leaf.size // FINGERPRINT_SAMPLE))[:FINGERPRINT_SAMPLE]
        sample = sharding.to_host(_numbers_at(leaf, np.unravel_index(places, leaf.shape)))
        weights = zlib.crc32(sample.tobytes(), weights)
    tokens = 0
    for batch in batches:
        tokens = zlib.crc32(np.ascontiguousarray(batch, np.int32).tobytes(), tokens)
    return {"weights": weights, "calibration tokens": tokens}
