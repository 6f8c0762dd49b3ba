"""What a search says of its own noise: how sure each step and each row of its table is, and what would make them surer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from indexcache_jax.schedule import Schedule
from indexcache_jax.search import Margin, Step
from indexcache_jax.search.noise import NOISE_ERROR

CONFIDENCE = 1 - NOISE_ERROR  # with which something is called above noise
LEAST_TO_NAME = 4  # sequences: of fewer, noise is so wide that nearly any schedule is within it


def change(losses: Sequence[float], reference: Sequence[float]) -> str:
    """How much higher losses are than those of a reference on the same sequences, in per cent of it: +2.35% ± 0.41%."""
    margin, mean = Margin.between(losses, reference), math.fsum(reference) / len(reference)
    certain = tuple(losses) == tuple(reference) or margin.sequences < 2
    return f"{margin.mean / mean:+.2%}" + ("" if certain else f" ± {margin.error / mean:.2%}")


def _signed(margin: Margin) -> str:
    return f"{margin.mean:+.4f}" + (f" ± {margin.error:.4f}" if margin.sequences > 1 else "")


def as_json(margin: Margin) -> dict[str, Any]:
    """A margin's fields; no error of a single sequence."""
    error = margin.error if math.isfinite(margin.error) else None
    return {"mean": margin.mean, "error": error, "sequences": margin.sequences}


def steps_table(steps: Sequence[Step]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: of every step what it costs, and how sure it is that no other would have been better."""
    header = [
        "indexers",
        "layers to S",
        "loss",
        "cost of the step",
        "closest other",
        "higher by",
        "within noise",
        "sequences to settle",
    ]
    cells = []
    for before, step in itertools.pairwise(steps):
        closest = min(step.rivals, key=lambda pattern: step.rivals[pattern].mean, default=None)
        cells.append(
            [
                str(step.schedule.num_full),
                _layers(step.flipped) + (f", {_layers(step.restored)} to F" if step.restored else ""),
                f"{step.loss:.4f}",
                _signed(Margin.between(step.losses, before.losses)),
                "-" if closest is None else _layers(_shared_instead(closest, step.schedule)),
                "-" if closest is None else _signed(step.rivals[closest]),
                f"{len(step.within_noise(NOISE_ERROR))} of {len(step.rivals)}",
                _sequences(step),
            ]
        )
    return header, cells


def _layers(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers)) or "-"


def _shared_instead(pattern: str, chosen: Schedule) -> list[int]:
    """The layers that a pattern has S and the chosen schedule F."""
    return [i for i, letter in enumerate(pattern) if letter == "S" and chosen.is_full[i]]


def _sequences(step: Step) -> str:
    if not step.within_noise(NOISE_ERROR):
        return "settled"
    count = _to_settle(step)
    return "no number" if count == math.inf else f"{count:.0f}" if count < 100_000 else "over 100000"


def _to_settle(step: Step) -> float:
    """How many sequences would settle an open step: more than there are, since a race may have dropped the rival before."""
    count = step.sequences_to_settle(NOISE_ERROR)
    return math.inf if count is None else max(count, len(step.losses) + 1)


def cheapest_within_noise(steps: Sequence[Step], chosen: Schedule) -> tuple[Step, Margin] | None:
    """The step with the fewest F layers, fewer than `chosen`, whose losses are not above its own beyond noise; None if none."""
    reference = next(step for step in steps if step.schedule == chosen)
    cheaper = [step for step in steps if step.schedule.num_full < chosen.num_full]
    margins = [(step, Margin.between(step.losses, reference.losses)) for step in cheaper]
    within = [(step, margin) for step, margin in margins if not margin.is_above_noise(NOISE_ERROR)]
    return min(within, key=lambda pair: pair[0].schedule.num_full, default=None)


def sentences(steps: Sequence[Step], chosen: Schedule, name_cheaper: bool) -> list[str]:
    """What to say of a search's certainty: of the steps to `chosen`, of the race, of a cheaper schedule if it is asked for."""
    count = len(steps[0].losses)
    if count == 1:
        return ["A single calibration sequence says nothing about noise: --sequences=8 does."]
    taken = [step for step in steps[1:] if step.schedule.num_full >= chosen.num_full]
    found = []
    if taken:
        found.append(_of_choice(taken, count))
    if share := _share_measured(steps):
        found.append(f"Schedules that cannot win were dropped early: {share:.0%} of the losses were measured.")
    if name_cheaper:
        found.append(_of_cheaper(cheapest_within_noise(steps, chosen), count) if count >= LEAST_TO_NAME else _too_few(count))
    return found


def _too_few(count: int) -> str:
    return f"{count} calibration sequences are too few to name a cheaper schedule within noise of it: --sequences=8 does."


def _of_choice(taken: Sequence[Step], count: int) -> str:
    open_steps = [step for step in taken if step.within_noise(NOISE_ERROR)]
    if not open_steps:
        return f"On {count} calibration sequences all {len(taken)} steps to this schedule are above noise ({CONFIDENCE:.0%})."
    share = "all" if len(open_steps) == len(taken) else len(open_steps)
    line = f"On {count} calibration sequences {share} of the {len(taken)} steps to this schedule are within noise "
    line += f"({CONFIDENCE:.0%}): other layers may serve as well."
    settled = {more: sum(_to_settle(step) <= more for step in open_steps) for more in (4 * count, 16 * count)}
    some = " and ".join(f"{more} sequences would settle {n} of them" for more, n in settled.items() if n)
    return f"{line} About {some}." if some else f"{line} Even {16 * count} sequences would settle none of them."


def _share_measured(steps: Sequence[Step]) -> float | None:
    """The share of the steps' losses that was measured; None where all were."""
    count = len(steps[0].losses)
    measured = sum(count + sum(margin.sequences for margin in step.rivals.values()) for step in steps)
    every = sum(count * (1 + len(step.rivals)) for step in steps)
    return None if measured == every else measured / every


def _of_cheaper(cheaper: tuple[Step, Margin] | None, count: int) -> str:
    if cheaper is None:
        return f"No schedule of the search with fewer indexers is within noise of it ({CONFIDENCE:.0%})."
    step, margin = cheaper
    about = f"{step.schedule.num_full} of {step.schedule.num_layers} indexers, {_signed(margin)} nats per token"
    return f"Cheapest within noise of it ({CONFIDENCE:.0%}): {step.schedule.pattern}, {about} on the {count} sequences."
