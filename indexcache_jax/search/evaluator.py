"""Losses of a model under any schedule on fixed calibration sequences: what a search compares.

A flip at layer l changes nothing below l. `Evaluator` therefore walks a batch up the layers once under the schedule that is
flipped and branches off where each flip does: the layers from there on run under it. No state is stored but the walk's own,
and the three programs that do it (layerwise.py) compile once.

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

from indexcache_jax import arguments, sharding
from indexcache_jax.config import Config
from indexcache_jax.foreign import shown
from indexcache_jax.params import Params, check_model, check_params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.greedy import greedy_search
from indexcache_jax.search.oracle import LossLog, MemoryLog
from indexcache_jax.sharding import constrain

Missing = list[tuple[int, list[Schedule]]]  # batch numbers, and the schedules whose loss on that batch is not known
FINGERPRINT_SAMPLE = 4096  # numbers of each array
Progress = Callable[[int], object]  # called with a number of layers, each time that so many were run on a batch


def no_progress(layers: int) -> None:
    """Reports nothing."""


def checked_batches(batches: Sequence[np.ndarray], config: Config) -> list[np.ndarray]:
    """Batches [B, S+1] of tokens of the model, int32. ValueError unless there are some, all of one shape and S at least 1."""
    if arguments.is_text(batches) or not hasattr(batches, "__len__"):
        raise ValueError(f"batches: {arguments.described(batches)} is not a list of batches [B, S+1]")
    found = [np.asarray(arguments.tokens("batches", batch, config.vocab_size, ("B", "S+1")), np.int32) for batch in batches]
    shapes = sorted({batch.shape for batch in found})
    if len(shapes) != 1:
        raise ValueError(f"batches: shapes {shapes}, but one shape is needed")
    if shapes[0][1] < 2:
        raise ValueError(f"batches: shape {shapes[0]} holds no token with one after it")
    return found


class BatchEvaluator(abc.ABC):
    """Losses under any schedule on the sequences of fixed batches [B, S+1] of one shape: a `LossOracle`.

    Subclasses say how losses are measured (`_measure`).

    config, dtype: of the weights. schedule: the one that the weights are for, so only its F layers have an indexer.
    log: holds every loss that was measured, and answers for those it holds; None keeps them as long as the evaluator lives.
    Sequence i is row i % B of batch i // B.

    Raises ValueError where the batches differ in shape or hold what is no token, for a schedule of another number of layers or
    with an F layer that has no indexer, and where a loss is NaN or infinite: the lowest of such losses means nothing.
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
        self.config, self.schedule, self.dtype = config, schedule, dtype
        self.batches, self.progress = checked_batches(batches, config), progress
        self.log = MemoryLog() if log is None else log

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return len(self.batches)

    @property
    def rows(self) -> int:
        """B, how many sequences a batch has."""
        return len(self.batches[0])

    @abc.abstractmethod
    def _measure(self, missing: Missing, base: Schedule | None) -> Iterator[tuple[Schedule, int, np.ndarray]]:
        """The losses that are missing, as they are measured: schedule, batch number, losses [B].

        base: the schedule from which those to measure differ in few layers; None where they have nothing in common.
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
        """The mean loss in nats a token under `schedule`, over all sequences."""
        return self.losses([schedule])[0]

    def losses(self, schedules: Sequence[Schedule]) -> list[float]:
        """The mean loss in nats a token under each of the schedules, over all sequences."""
        return np.mean(self.sequence_losses(schedules), axis=1).tolist()

    def sequence_losses(
        self, schedules: Sequence[Schedule], base: Schedule | None = None, batches: Sequence[int] | None = None
    ) -> np.ndarray:
        """The mean losses in nats a token of each sequence, [schedules, sequences] float64.

        base: a schedule from which they differ in few layers: what lies below the first of these is run once for all.
        batches: the numbers of the batches whose sequences are asked for, default all.
        """
        if isinstance(schedules, (Schedule, str)):
            raise ValueError(f"schedules: {shown(str(schedules))} is one schedule, not a list of them")
        if not schedules:
            raise ValueError("schedules: there are none")
        for schedule in schedules:
            self._check(schedule)
        numbers = range(self.num_batches) if batches is None else batches
        for number in numbers:
            arguments.integer("batches", number, 0, self.num_batches - 1)
        missing: Missing = []
        for number in numbers:
            unknown = [schedule for schedule in dict.fromkeys(schedules) if self._known(schedule, number) is None]
            if unknown:
                missing.append((number, unknown))
        for schedule, number, losses in self._measure(missing, base):
            self._keep(schedule, number, losses.tolist())
        return np.array([np.concatenate([self._known(schedule, number) for number in numbers]) for schedule in schedules])

    def _known(self, schedule: Schedule, number: int) -> list[float] | None:
        """The losses of a batch's sequences, None where one was not measured yet."""
        losses = [self.log.get(schedule, sequence) for sequence in self._sequences(number)]
        return None if None in losses else [loss for loss in losses if loss is not None]

    def _keep(self, schedule: Schedule, number: int, losses: list[float]) -> None:
        for sequence, loss in zip(self._sequences(number), losses, strict=True):
            self._check_finite(loss, schedule, sequence)
            if self.log.get(schedule, sequence) is None:  # a kill may have left some of a batch
                self.log.add(schedule, sequence, loss)

    def _sequences(self, number: int) -> range:
        return range(number * self.rows, (number + 1) * self.rows)

    def _check(self, schedule: Schedule) -> None:
        check_model(self.config, schedule)
        if lacking := [i for i in schedule.full_layers if not self.schedule.is_full[i]]:
            raise ValueError(f"schedule {schedule.pattern}: layer {lacking[0]} is F, but the weights have no indexer for it")

    def _check_finite(self, loss: float, schedule: Schedule, sequence: int) -> None:
        if not math.isfinite(loss):
            why = f"the weights hold NaN or infinity, or {self.dtype} arithmetic overflows"
            raise ValueError(f"loss of {schedule.pattern} on sequence {sequence} is {loss}: {why}")


class Evaluator(BatchEvaluator):
    """Losses of a model in memory under any schedule, on the sequences of fixed batches [B, S+1] of one shape.

    Args:
        params: the weights, on the device or, under a mesh, placed on it (`sharding.put`, `checkpoints_convert.load`).
        config: their shape.
        schedule: the one the params are for: only its F layers can be F.
        batches: rows of inputs and their successors, int32.
        log: holds every loss that was measured, and answers for those it holds.
        progress: called with the number of layers run on a batch, each time some were.

    Raises:
        ValueError: the params are not those of config and schedule, the batches differ in shape or hold what is no token; when
            asked for a loss: a schedule has another number of layers or an F layer without an indexer, or the loss is not
            finite.
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
        check_params(params, config, schedule)
        super().__init__(config, schedule, params.embedding.dtype, batches, log, progress)
        self.params = params

    def advice(self) -> list[str]:
        return [] if self._at_once > 1 else super().advice()

    @property
    def _at_once(self) -> int:
        """How many schedules are run at once."""
        return layerwise.schedules_at_once(self.batches[0].shape[0], self.config)

    def _measure(self, missing: Missing, base: Schedule | None) -> Iterator[tuple[Schedule, int, np.ndarray]]:
        for number, schedules in missing:
            for schedule, losses in self._measure_batch(self.batches[number], schedules, base):
                yield schedule, number, losses

    def _measure_batch(
        self, batch: np.ndarray, schedules: Sequence[Schedule], base: Schedule | None
    ) -> Iterator[tuple[Schedule, np.ndarray]]:
        """The losses [B] on one batch, in the order in which the schedules leave the walk under `base`."""
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
            for schedule, losses in zip(group, self._finish(state, layer, group, targets), strict=True):
                self.progress(self.config.num_layers - _first_difference(schedule, base))
                yield schedule, losses

    def _finish(self, state: layerwise.State, layer: int, group: list[Schedule], targets: jax.Array) -> Sequence[np.ndarray]:
        """The losses [B] under one schedule or, at once, under several, from the state before `layer`."""
        rest = targets, self.config, self.schedule
        if self._at_once == 1:
            full = np.array(group[0].is_full)
            return [np.asarray(layerwise.finish(self.params, state, np.int32(layer), full, *rest))]
        padded = group + group[-1:] * (self._at_once - len(group))
        every = np.array([schedule.is_full for schedule in padded])
        losses = np.asarray(layerwise.finish_each(self.params, state, np.int32(layer), layerwise.place(every), *rest))
        return list(losses[: len(group)])


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
    check_params(params, config, schedule)
    cuts = np.asarray(arguments.tokens("tokens", tokens, config.vocab_size, ("N", "S+1")), np.int32)
    if len(cuts) % arguments.integer("batch_size", batch_size, 1):
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
    """Checksums of a tree of weights (of some numbers of each array) and of the batches [B, S+1]: what losses depend on.

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
