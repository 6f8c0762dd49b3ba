"""The greedy search for a schedule (paper, Algorithm 1), over any model that can say a schedule's loss.

Starting from the checkpoint's own schedule, every step flips each F layer alone to S, measures the language modelling loss
on the same calibration batches, and keeps the flip with the lowest. The sets of F layers are nested, so one search answers
for every number of F layers on its way.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from indexcache_jax.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a greedy search.

    schedule: the schedule after the step. loss: its mean loss in nats a token. flipped: the layers that the step turned from
    F to S, none for the starting point. candidates: for every layer that was tried, the loss with that layer alone flipped.
    """

    schedule: Schedule
    loss: float
    flipped: tuple[int, ...] = ()
    candidates: Mapping[int, float] = dataclasses.field(default_factory=dict)


class LossOracle(Protocol):
    """What the greedy search asks of a model: mean losses in nats a token on fixed calibration batches."""

    def loss(self, schedule: Schedule) -> float:
        """The loss under `schedule`."""

    def flips(self, schedule: Schedule, layers: Sequence[int]) -> dict[int, float]:
        """For each of the layers, the loss under `schedule` with that layer alone turned from F to S."""


class LossLog(Protocol):
    """Where an evaluator keeps the losses it measures, so that a search that was stopped does not measure them again."""

    def get(self, schedule: Schedule, batch: int) -> float | None:
        """The loss of a schedule on a batch, by its number; None where it was not measured yet."""

    def add(self, schedule: Schedule, batch: int, loss: float) -> None:
        """Keeps the loss of a schedule on a batch, by its number."""


def candidates(schedule: Schedule, blocks: int = 1) -> list[list[int]]:
    """The F layers that may be flipped to S, by block: all but the first layer of each contiguous block of layers."""
    starts = [i * schedule.num_layers // blocks for i in range(blocks)]
    spans = zip(starts, [*starts[1:], schedule.num_layers], strict=True)
    return [[i for i in range(a + 1, b) if schedule.is_full[i]] for a, b in spans]


def layers_to_run(schedule: Schedule, num_full: int, blocks: int = 1) -> int:
    """The most layers that an evaluator runs on one batch in a greedy search down to `num_full`: a progress bar's total."""
    total = num_layers = schedule.num_layers
    flat = list(itertools.chain(*candidates(schedule, blocks)))
    for _ in range(-(-(schedule.num_full - num_full) // blocks)):
        if not flat:
            break
        total += sum(num_layers - i for i in flat) + flat[-1] + (num_layers if blocks > 1 else 0)
        flat = flat[:-blocks]  # which flips win is not known; the highest ones leave the most to run
    return total


def greedy_search(
    oracle: LossOracle, schedule: Schedule, *, num_full: int = 1, max_loss: float = float("inf"), blocks: int = 1
) -> list[Step]:
    """The steps of a greedy search from `schedule`, the starting point first (paper, Algorithm 1).

    Args:
        oracle: the losses of the model, such as an `Evaluator`.
        schedule: where the search starts.
        num_full: the number of F layers to stop at. The search also ends where no layer is left to flip.
        max_loss: the highest loss allowed, in nats a token: the search ends before a step that exceeds it.
        blocks: contiguous blocks that the layers are cut into. Each step flips the best layer of every block, which takes
            about `blocks` times fewer evaluations. Every flip is judged alone; where all of a step's flips together exceed
            max_loss, only the best of them is made. Where fewer than `blocks` flips are left to num_full, and where no block
            has one left, flips are single ones, of any layer: the search ends at num_full, whatever the blocks.

    Of flips with equal losses the lowest layer is taken.

    Raises:
        ValueError: num_full or blocks is out of range.
    """
    if not 1 <= num_full <= schedule.num_full:
        raise ValueError(f"num_full: {num_full!r} is not between 1 and {schedule.num_full}, the F layers of {schedule.pattern}")
    if not 1 <= blocks <= schedule.num_layers:
        raise ValueError(f"blocks: {blocks!r} is not between 1 and {schedule.num_layers}")
    steps = [Step(schedule, oracle.loss(schedule))]
    while (most_flips := steps[-1].schedule.num_full - num_full) > 0:
        current = steps[-1].schedule
        by_block = _candidates_left(current, blocks if most_flips >= blocks else 1)
        if not by_block:
            break
        flip_losses = oracle.flips(current, list(itertools.chain(*by_block)))

        def rank(layer: int, flip_losses: Mapping[int, float] = flip_losses) -> tuple[float, int]:
            return flip_losses[layer], layer

        best = sorted((min(block, key=rank) for block in by_block), key=rank)[:most_flips]
        step = _commit(oracle, current, best, flip_losses)
        if len(best) > 1 and step.loss > max_loss:
            step = _commit(oracle, current, best[:1], flip_losses)
        if step.loss > max_loss:
            break
        steps.append(step)
    return steps


def _candidates_left(schedule: Schedule, blocks: int) -> list[list[int]]:
    """The candidates of the blocks that have some, or of all layers as one block where none has; [] where none is left."""
    of_blocks = [block for block in candidates(schedule, blocks) if block]
    return of_blocks or [block for block in candidates(schedule) if block]


def _commit(oracle: LossOracle, schedule: Schedule, layers: Sequence[int], flip_losses: Mapping[int, float]) -> Step:
    """The step that flips `layers` of `schedule`; the loss of a single flip is known already."""
    for layer in layers:
        schedule = schedule.with_shared(layer)
    loss = flip_losses[layers[0]] if len(layers) == 1 else oracle.loss(schedule)
    return Step(schedule, loss, tuple(layers), dict(flip_losses))


def first_step_with_at_most(steps: Sequence[Step], num_full: int) -> Step:
    """The first step with at most `num_full` F layers. Raises ValueError where the search ended with more."""
    for step in steps:
        if step.schedule.num_full <= num_full:
            return step
    raise ValueError(f"num_full: the search ended at {steps[-1].schedule.num_full} F layers, above {num_full}")
