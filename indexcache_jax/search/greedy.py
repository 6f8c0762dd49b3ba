"""The greedy search for a schedule (paper, Algorithm 1), over any model that can say a schedule's losses.

Starting from the checkpoint's own schedule, every step flips each F layer alone to S, measures the language modelling loss
on the same calibration sequences, and keeps the flip with the lowest. The sets of F layers are nested, so one search answers
for every number of F layers on its way.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from indexcache_jax import arguments
from indexcache_jax.schedule import Schedule, check_is_schedule
from indexcache_jax.search.noise import Margin
from indexcache_jax.search.oracle import LossOracle
from indexcache_jax.search.racing import Outcome, Race, contest


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a search.

    schedule: the schedule after the step. losses: its mean losses in nats a token on each sequence. flipped: the layers that
    are S and were F before the step, restored: those that are F and were S; none for the starting point. candidates: for
    every layer that was tried, the loss with that layer alone flipped; of a flip that a race dropped an estimate. rivals: the
    patterns that were tried and not taken, with how much higher their losses are.
    """

    schedule: Schedule
    losses: tuple[float, ...]
    flipped: tuple[int, ...] = ()
    restored: tuple[int, ...] = ()
    candidates: Mapping[int, float] = dataclasses.field(default_factory=dict)
    rivals: Mapping[str, Margin] = dataclasses.field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean loss in nats a token over all sequences."""
        return float(np.mean(self.losses))

    def within_noise(self, error: float) -> dict[str, Margin]:
        """The rivals that on all text may be better than what the step took, the closest first.

        error: the probability, at most, that the best of all schedules tried is neither what the step took nor among them.
        """
        level = error / max(1, len(self.rivals))
        close = {pattern: margin for pattern, margin in self.rivals.items() if not margin.is_above_noise(level)}
        return dict(sorted(close.items(), key=lambda item: item[1].mean))

    def sequences_to_settle(self, error: float) -> int | None:
        """How many sequences would leave no rival within noise, if they are like those measured; None where none do."""
        level = error / max(1, len(self.rivals))
        needed = [margin.sequences_to_settle(level) for margin in self.rivals.values()]
        return None if None in needed else max((count for count in needed if count is not None), default=0)


def first_step(oracle: LossOracle, schedule: Schedule) -> Step:
    """The starting point of a search."""
    return Step(schedule, tuple(oracle.sequence_losses([schedule])[0].tolist()))


def candidates(schedule: Schedule, blocks: int = 1) -> list[list[int]]:
    """The F layers that may be flipped to S, by block: all but the first layer of each contiguous block of layers.

    ValueError for blocks that are not between 1 and the number of layers.
    """
    check_is_schedule("schedule", schedule)
    blocks = arguments.integer("blocks", blocks, 1, schedule.num_layers)
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
    oracle: LossOracle,
    schedule: Schedule,
    *,
    num_full: int = 1,
    max_loss: float = float("inf"),
    blocks: int = 1,
    race: Race | None = None,
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
        race: how flips that cannot win are dropped before they are measured on all sequences; None measures all on all. With
            fewer than 5 sequences nothing is dropped.

    Of flips with equal losses the lowest layer is taken.

    Raises:
        ValueError: num_full or blocks is out of range, max_loss is no number, oracle, schedule or race is none.
    """
    check_search(oracle, schedule, num_full, max_loss, race)
    if not 1 <= arguments.integer("blocks", blocks) <= schedule.num_layers:
        raise ValueError(f"blocks: {blocks!r} is not between 1 and {schedule.num_layers}")
    steps = [first_step(oracle, schedule)]
    error = error_of_a_step(race, schedule.num_full - num_full)
    while (most_flips := steps[-1].schedule.num_full - num_full) > 0:
        current = steps[-1].schedule
        by_block = _candidates_left(current, blocks if most_flips >= blocks else 1)
        if not by_block:
            break
        outcomes = flip_contest(oracle, current, by_block, race, error)
        best = sorted(outcomes, key=lambda outcome: outcome.loss)
        step = _commit(oracle, current, best, outcomes)
        if len(best) > 1 and step.loss > max_loss:
            step = _commit(oracle, current, best[:1], outcomes)
        if step.loss > max_loss:
            break
        steps.append(step)
    return steps


def _candidates_left(schedule: Schedule, blocks: int) -> list[list[int]]:
    """The candidates of the blocks that have some, or of all layers as one block where none has; [] where none is left."""
    of_blocks = [block for block in candidates(schedule, blocks) if block]
    return of_blocks or [block for block in candidates(schedule) if block]


def check_num_full(schedule: Schedule, num_full: int) -> None:
    """ValueError unless a search from `schedule` can end at so many F layers."""
    if not 1 <= arguments.integer("num_full", num_full) <= schedule.num_full:
        raise ValueError(f"num_full: {num_full!r} is not between 1 and {schedule.num_full}, the F layers of {schedule.pattern}")


def check_search(oracle: LossOracle, schedule: Schedule, num_full: int, max_loss: float, race: Race | None) -> None:
    """ValueError, naming the argument, for one of a search that is not what it should be."""
    if not hasattr(oracle, "sequence_losses"):
        raise ValueError(f"oracle: {arguments.described(oracle)} gives no losses; an Evaluator of params and batches does")
    check_is_schedule("schedule", schedule)
    check_num_full(schedule, num_full)
    if not arguments.is_real(max_loss):
        raise ValueError(f"max_loss: {arguments.described(max_loss)} is not a number")
    if race is not None and not isinstance(race, Race):
        raise ValueError(f"race: {arguments.described(race)} is neither a Race nor None")


def error_of_a_step(race: Race | None, steps: int) -> float:
    """The probability with which each of so many steps may drop what would have won."""
    return 0.0 if race is None else race.error / max(1, steps)


def flip_contest(
    oracle: LossOracle, schedule: Schedule, by_block: Sequence[Sequence[int]], race: Race | None, error: float
) -> list[Outcome]:
    """The best flip of each block of layers, in their order."""
    groups = [[schedule.with_shared(layer) for layer in block] for block in by_block]
    return contest(oracle, schedule, groups, race, error)


def flip_step(schedule: Schedule, losses: np.ndarray, flipped: Sequence[int], outcomes: Sequence[Outcome]) -> Step:
    """The step that flips these layers of `schedule` to a schedule of these losses, after contests of single flips."""
    tried = {flipped_layer(schedule, flip): outcome.estimate(flip) for outcome in outcomes for flip in outcome.losses}
    rivals = {pattern: margin for outcome in outcomes for pattern, margin in outcome.rivals.items()}
    for layer in flipped:
        schedule = schedule.with_shared(layer)
    return Step(schedule, tuple(losses.tolist()), tuple(flipped), candidates=tried, rivals=rivals)


def flipped_layer(schedule: Schedule, flip: Schedule) -> int:
    """The layer that is F in `schedule` and S in `flip`."""
    return next(i for i, (a, b) in enumerate(zip(schedule.pattern, flip.pattern, strict=True)) if a != b)


def _commit(oracle: LossOracle, schedule: Schedule, best: Sequence[Outcome], outcomes: Sequence[Outcome]) -> Step:
    """The step that makes the winning flips of `best`; the losses of a single flip are known already."""
    flipped = [flipped_layer(schedule, outcome.winner) for outcome in best]
    if len(best) == 1:
        return flip_step(schedule, best[0].losses[best[0].winner], flipped, outcomes)
    together = schedule
    for layer in flipped:
        together = together.with_shared(layer)
    return flip_step(schedule, oracle.sequence_losses([together], schedule)[0], flipped, outcomes)


def first_step_with_at_most(steps: Sequence[Step], num_full: int) -> Step:
    """The first step with at most `num_full` F layers. Raises ValueError where the search ended with more, or has no step."""
    arguments.integer("num_full", num_full, 1)
    if not steps:
        raise ValueError("steps: there are none")
    for step in steps:
        if step.schedule.num_full <= num_full:
            return step
    raise ValueError(f"num_full: the search ended at {steps[-1].schedule.num_full} F layers, above {num_full}")
