"""Finding a schedule: the greedy search of the paper (Algorithm 1) and the similarity DP of its appendix C.

Greedy: starting from the checkpoint's own schedule, over and over flip each F layer alone to S, measure the language
modelling loss on the same calibration batches, and keep the flip with the lowest. The sets of F layers are nested, so one
search answers for every retention on its way.

A flip at layer l changes nothing below l. Each step therefore walks a batch up the layers once under the current
schedule, and at every candidate branches off: the rest of the model with that one layer flipped. No state is stored but
the walk's own, and the three programs that do it (layerwise.py) compile once.

The similarity DP judges a layer by how little its attention output changes with another layer's indices. It is the
cheaper idea and the paper's negative result: such a likeness is local, what counts is the loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a greedy search: the schedule after it, its loss, the layers it flipped, and what each flip would cost."""

    schedule: Schedule
    loss: float
    flipped: tuple[int, ...] = ()
    candidates: Mapping[int, float] = dataclasses.field(default_factory=dict)


class Losses(Protocol):
    """What the search needs to know of a model."""

    def loss(self, schedule: Schedule) -> float: ...

    def flips(self, schedule: Schedule, layers: Sequence[int]) -> dict[int, float]:
        """For each layer the loss of the schedule with that layer turned into S."""


class LossLog(Protocol):
    """Where an evaluator keeps the losses it measures, so that a search that was stopped does not measure them again."""

    def get(self, schedule: Schedule, batch: int) -> float | None:
        """The loss of a schedule on a batch, by its number; None where it was not measured yet."""

    def add(self, schedule: Schedule, batch: int, loss: float) -> None: ...


def check_shapes(batches: Sequence[np.ndarray]) -> None:
    """ValueError unless all batches have one shape."""
    if len({batch.shape for batch in batches}) != 1:
        raise ValueError(f"batches: shapes {sorted({batch.shape for batch in batches})}, but one shape is needed")


def check_finite(loss: float, schedule: Schedule, batch: int, dtype: Any) -> float:
    """The loss. ValueError where it is NaN or infinite: the lowest of such losses means nothing."""
    if math.isfinite(loss):
        return loss
    why = f"the weights hold NaN or infinity, or {dtype} arithmetic overflows"
    raise ValueError(f"loss of {schedule.pattern} on batch {batch} is {loss}: {why}")


class Evaluator:
    """Mean losses of one model under any schedule on fixed batches [B, S+1] of one shape.

    `schedule` is the one the params are made for: only its F layers can be F. `log` keeps every loss and answers for
    those it knows. `progress` is called with the number of layers run, over and over.
    """

    def __init__(
        self,
        params: Params,
        config: Config,
        schedule: Schedule,
        batches: Sequence[np.ndarray],
        log: LossLog | None = None,
        progress: Callable[[int], object] = lambda layers: None,
    ) -> None:
        check_shapes(batches)
        self.params, self.config, self.schedule = params, config, schedule
        self.batches, self.log, self.progress = list(batches), log, progress

    def loss(self, schedule: Schedule) -> float:
        return self._mean(schedule, (None,))[None]

    def losses(self, schedules: Sequence[Schedule]) -> list[float]:
        return [self.loss(schedule) for schedule in schedules]

    def flips(self, schedule: Schedule, layers: Sequence[int]) -> dict[int, float]:
        found = self._mean(schedule, layers)
        return {layer: found[layer] for layer in layers}

    def _mean(self, schedule: Schedule, flips: Sequence[int | None]) -> dict[int | None, float]:
        if lacking := [i for i in schedule.full_layers if not self.schedule.is_full[i]]:
            raise ValueError(f"schedule {schedule.pattern}: layer {lacking[0]} is F, but the params hold no indexer for it")
        per_batch = [self._batch(number, schedule, flips) for number in range(len(self.batches))]
        return {flip: float(np.mean([found[flip] for found in per_batch])) for flip in flips}

    def _batch(self, number: int, schedule: Schedule, flips: Sequence[int | None]) -> dict[int | None, float]:
        """Losses on one batch of the schedule with each of `flips` (None: as it is)."""
        wanted = {flip: schedule if flip is None else schedule.shared(flip) for flip in flips}
        known = {flip: None if self.log is None else self.log.get(s, number) for flip, s in wanted.items()}
        found = {flip: loss for flip, loss in known.items() if loss is not None}
        num_layers = self.config.num_layers
        # The branch for `flip` leaves the walk at that layer; the schedule as it is needs no walk.
        missing = sorted((0 if flip is None else flip, flip) for flip in flips if flip not in found)
        if not missing:
            return found
        tokens = jnp.asarray(self.batches[number])
        state = layerwise.start(self.params, tokens[:, :-1], self.config)
        at = 0
        for branch, flip in missing:
            while at < branch:
                full = jnp.array(schedule.is_full[at])
                state = layerwise.advance(self.params, state, jnp.int32(at), full, self.config, self.schedule)
                at += 1
                self.progress(1)
            full = jnp.array(wanted[flip].is_full)
            loss = layerwise.finish(self.params, state, jnp.int32(branch), full, tokens[:, 1:], self.config, self.schedule)
            found[flip] = check_finite(float(loss), wanted[flip], number, self.params.embedding.dtype)
            self.progress(num_layers - branch)
            if self.log is not None:
                self.log.add(wanted[flip], number, found[flip])
        return found


def candidates(schedule: Schedule, blocks: int = 1) -> list[list[int]]:
    """The layers that may still be flipped, by block; the first layer of every block stays F."""
    starts = [i * schedule.num_layers // blocks for i in range(blocks)]
    spans = zip(starts, [*starts[1:], schedule.num_layers], strict=True)
    return [[i for i in range(a + 1, b) if schedule.is_full[i]] for a, b in spans]


def layers_to_run(schedule: Schedule, num_full: int, blocks: int = 1) -> int:
    """How many layers a greedy search down to `num_full` runs on one batch, at most; for progress bars."""
    total = num_layers = schedule.num_layers
    flat = list(itertools.chain(*candidates(schedule, blocks)))
    for _ in range(-(-(schedule.num_full - num_full) // blocks)):
        if not flat:
            break
        total += sum(num_layers - i for i in flat) + flat[-1] + (num_layers if blocks > 1 else 0)
        flat = flat[:-blocks]  # which flips win is not known; the highest ones leave the most to run
    return total


def greedy(
    losses: Losses, schedule: Schedule, *, num_full: int = 1, max_loss: float = float("inf"), blocks: int = 1
) -> list[Step]:
    """The steps of a greedy search from `schedule`, the starting point first.

    It ends at `num_full` F layers, before the loss exceeds `max_loss`, or where no layer is left to flip. Equal losses
    go to the lowest layer. blocks: cut the layers into so many contiguous blocks and commit the best flip of each per
    step, which needs about as many times fewer evaluations (all flips are judged alone; where together they exceed
    `max_loss`, only the best of them counts).

    Raises ValueError for `num_full` or `blocks` out of range.
    """
    if not 1 <= num_full <= schedule.num_full:
        raise ValueError(f"num_full: {num_full!r} is not between 1 and {schedule.num_full}, the F layers of {schedule.pattern}")
    if not 1 <= blocks <= schedule.num_layers:
        raise ValueError(f"blocks: {blocks!r} is not between 1 and {schedule.num_layers}")
    steps = [Step(schedule, losses.loss(schedule))]
    while (room := steps[-1].schedule.num_full - num_full) > 0:
        current = steps[-1].schedule
        by_block = [block for block in candidates(current, blocks) if block]
        if not by_block:
            break
        found = losses.flips(current, list(itertools.chain(*by_block)))
        best = sorted((min(block, key=lambda i: (found[i], i)) for block in by_block), key=lambda i: (found[i], i))[:room]
        step = _commit(losses, current, best, found)
        if len(best) > 1 and step.loss > max_loss:
            step = _commit(losses, current, best[:1], found)
        if step.loss > max_loss:
            break
        steps.append(step)
    return steps


def _commit(losses: Losses, schedule: Schedule, layers: Sequence[int], found: Mapping[int, float]) -> Step:
    for layer in layers:
        schedule = schedule.shared(layer)
    loss = found[layers[0]] if len(layers) == 1 else losses.loss(schedule)
    return Step(schedule, loss, tuple(layers), dict(found))


def with_at_most(steps: Sequence[Step], num_full: int) -> Step:
    """The first step with at most `num_full` F layers. ValueError where the search did not come so far."""
    for step in steps:
        if step.schedule.num_full <= num_full:
            return step
    raise ValueError(f"num_full: the search ended at {steps[-1].schedule.num_full} F layers, above {num_full}")


def similarities(
    params: Params,
    config: Config,
    schedule: Schedule,
    batches: Sequence[np.ndarray],
    progress: Callable[[int], object] = lambda layers: None,
) -> np.ndarray:
    """[L, L]: cosine of layer i's attention output with its own indices and with those of layer j <= i; NaN elsewhere.

    Every layer must be F in `schedule`, which is the one of the params (ValueError).
    """
    if schedule.num_full != schedule.num_layers:
        raise ValueError(f"schedule {schedule.pattern}: the similarity search needs the indexers of all layers")
    num_layers = config.num_layers
    found = np.full((num_layers, num_layers), np.nan)
    found[np.tril_indices(num_layers)] = 0.0
    for tokens in batches:
        state = layerwise.start(params, jnp.asarray(tokens[:, :-1]), config)
        for source in range(num_layers):
            state = layerwise.advance(params, state, jnp.int32(source), jnp.array(True), config, schedule)
            found[source, source] += 1.0
            above = state
            for layer in range(source + 1, num_layers):
                above, cosine = layerwise.compare(params, above, jnp.int32(layer), state.indices, config, schedule)
                found[layer, source] += float(cosine)
            progress(num_layers - source)
    return found / len(batches)


def likeness(similarity: np.ndarray, schedule: Schedule) -> float:
    """What `most_similar` maximises: the sum over layers of similarity [L, L] to their source."""
    return float(sum(similarity[layer, source] for layer, source in enumerate(schedule.source)))


def most_similar(similarity: np.ndarray, num_full: int) -> Schedule:
    """The schedule of `num_full` F layers with the highest sum over layers of similarity [L, L] to their source.

    Equal sums go to the lower layers. ValueError for `num_full` out of range.
    """
    num_layers = len(similarity)
    if not 1 <= num_full <= num_layers:
        raise ValueError(f"num_full: {num_full!r} is not between 1 and {num_layers}")
    # best[n][stop]: (sum, F layers) over the layers below `stop` with n F layers.
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]
    for _ in range(num_full):
        row: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (total, full) in best[-1].items():
            for stop in range(start + 1, num_layers + 1):
                entry = (total + float(np.sum(similarity[start:stop, start])), (*full, start))
                if stop not in row or entry[0] > row[stop][0]:
                    row[stop] = entry
        best.append(row)
    full_layers = best[num_full][num_layers][1]
    return Schedule("".join("F" if i in full_layers else "S" for i in range(num_layers)))


def fingerprint(params: Any, batches: Sequence[np.ndarray]) -> dict[str, int]:
    """Checksums of the weights, a tree of arrays (of up to 4096 numbers of each), and of the batches: what a log is about."""
    weights = 0
    for leaf in jax.tree.leaves(params):
        flat = leaf.reshape(-1)
        sample = flat[:: max(1, flat.size // 4096)][:4096]
        weights = zlib.crc32(np.asarray(sample.astype(jnp.float32)).tobytes(), weights)
    tokens = 0
    for batch in batches:
        tokens = zlib.crc32(np.ascontiguousarray(batch, np.int32).tobytes(), tokens)
    return {"weights": weights, "calibration tokens": tokens}
