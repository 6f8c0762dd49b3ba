"""The floating search: a greedy search that takes earlier flips back when that pays.

Greedy only removes indexers, so what was cheap at an early step binds all later ones. After every flip the floating search
tries two more kinds of change: one flip is taken back (the layer is F again), which pays where the schedule is better than the
best known with as many F layers; or it is taken back and a neighbouring F layer is S in its place, which pays where the
schedule is better than the one it came from. Better means beyond noise, so with a single sequence nothing pays. Where a change
pays, the search goes on from there. (Pattern recognition calls this sequential floating backward selection; the exchanges are
an addition.)

The search starts from the steps of the greedy one and replaces a schedule only by one with a lower loss on the same
sequences, so that for no number of F layers it is worse there.
"""

from __future__ import annotations

import dataclasses

from indexcache_jax.schedule import Schedule
from indexcache_jax.search.greedy import (
    Step,
    candidates,
    error_of_a_step,
    flip_contest,
    flip_step,
    flipped_layer,
    greedy_search,
)
from indexcache_jax.search.oracle import LossOracle
from indexcache_jax.search.racing import Outcome, Race, challenge


def floating_search(
    oracle: LossOracle,
    schedule: Schedule,
    *,
    num_full: int = 1,
    max_loss: float = float("inf"),
    race: Race | None = None,
) -> list[Step]:
    """The best schedule found for every number of F layers from that of `schedule` down, as steps.

    Arguments and errors as for `greedy_search`, and a search of one block. The sets of F layers need not be nested: `flipped`
    and `restored` say how a step differs from the one before, `candidates` and `rivals` are those of the comparison in which
    its schedule was chosen. The error of a race holds for the greedy steps, and so for being no worse than they are; a schedule
    that is dropped wrongly afterwards is only a better one missed.
    """
    greedy = greedy_search(oracle, schedule, num_full=num_full, max_loss=max_loss, race=race)
    best = {step.schedule.num_full: step for step in greedy}
    flipped_from = {step.schedule for step in greedy[:-1]}
    changed_from: set[Schedule] = set()
    error = error_of_a_step(race, schedule.num_full - num_full)
    size = schedule.num_full
    while size > num_full:
        current = best[size].schedule
        if current not in flipped_from:
            flipped_from.add(current)
            lower = _best_flip(oracle, current, race, error)
            if size - 1 not in best and lower.loss > max_loss:
                break
            if size - 1 not in best or lower.loss < best[size - 1].loss:
                best[size - 1] = lower
        size -= 1
        while size + 1 < schedule.num_full and (current := best[size].schedule) not in changed_from:
            changed_from.add(current)
            incumbents = best[size + 1].schedule, current
            higher, level = _best_changes(oracle, schedule, *incumbents, race, error)
            for number, outcome in ((size, level), (size + 1, higher)):
                if outcome.winner not in incumbents:
                    best[number] = Step(outcome.winner, tuple(outcome.losses[outcome.winner].tolist()), rivals=outcome.rivals)
                    size = number
    return _as_steps([best[size] for size in sorted(best, reverse=True)])


def _best_flip(oracle: LossOracle, schedule: Schedule, race: Race | None, error: float) -> Step:
    """The best single flip of a schedule with more than one F layer."""
    outcomes = flip_contest(oracle, schedule, candidates(schedule), race, error)
    winner = outcomes[0].winner
    return flip_step(schedule, outcomes[0].losses[winner], [flipped_layer(schedule, winner)], outcomes)


def _best_changes(
    oracle: LossOracle, start: Schedule, above: Schedule, current: Schedule, race: Race | None, error: float
) -> tuple[Outcome, Outcome]:
    """The best of `above` and of `current` with a flip of `start` taken back; the best of `current` and its exchanges."""
    restored = [current.with_full(i) for i, full in enumerate(start.is_full) if full and not current.is_full[i]]
    groups = [
        [above, *(schedule for schedule in restored if schedule != above)],
        [current, *_exchanges(start, current)],
    ]
    higher, level = challenge(oracle, current, groups, race, error)
    return higher, level


def _exchanges(start: Schedule, schedule: Schedule) -> list[Schedule]:
    """Every F layer but the first moved to every layer between its neighbouring F layers that is F in `start`."""
    bounds = [*schedule.full_layers, schedule.num_layers]
    moved = []
    for before, layer, after in zip(bounds, bounds[1:], bounds[2:], strict=False):
        others = (i for i in range(before + 1, after) if i != layer and start.is_full[i])
        moved += [schedule.with_shared(layer).with_full(i) for i in others]
    return moved


def _as_steps(best: list[Step]) -> list[Step]:
    """The steps with what each changes of the one before."""
    steps = best[:1]
    for step in best[1:]:
        before, after = steps[-1].schedule.is_full, step.schedule.is_full
        flipped = tuple(i for i, full in enumerate(before) if full and not after[i])
        restored = tuple(i for i, full in enumerate(after) if full and not before[i])
        steps.append(dataclasses.replace(step, flipped=flipped, restored=restored))
    return steps
