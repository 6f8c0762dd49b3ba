"""What a search takes, counted before it runs: losses to measure, layers to run for them, weights to read, and hours."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import Race


@dataclasses.dataclass(frozen=True)
class Rate:
    """Seconds. layer: to run a layer on a batch; reading: to read all weights once, 0 for a model in memory."""

    layer: float
    reading: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a search takes, at most.

    steps: of the search. losses: of a schedule on a batch. passes: for every pass, for which a streamed model's weights are
    read once, the number of layers that it runs on a batch. states: hidden states of a batch that are kept at a time.
    """

    steps: int = 0
    losses: int = 0
    passes: tuple[int, ...] = ()
    states: int = 0

    @property
    def layers(self) -> int:
        return sum(self.passes)

    def seconds(self, rate: Rate) -> float:
        """The time at a rate. A layer is read while the one before runs, so a pass takes the longer of the two."""
        return sum(max(layers * rate.layer, rate.reading) for layers in self.passes)

    def __add__(self, other: Cost) -> Cost:
        passes, states = self.passes + other.passes, max(self.states, other.states)
        return Cost(self.steps + other.steps, self.losses + other.losses, passes, states)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of equally many rows that losses are measured on.

    states: how many hidden states of a batch a pass over a streamed model may keep; None for a model in memory.
    """

    count: int
    rows: int
    states: int | None = None


class Counter:
    """A `search.LossOracle` that counts what measuring would take, and measures nothing.

    Its losses let the highest layers become S first, which leaves the most layers to run. race: of the search, which nothing
    is dropped from; it makes a pass of every comparison.
    """

    def __init__(self, num_layers: int, batches: Batches, race: Race | None = None) -> None:
        self.num_layers, self.batches, self.race = num_layers, batches, race
        self._known: list[set[Schedule]] = [set() for _ in range(batches.count)]
        self._passes: list[int] = []
        self._states = 0

    @property
    def num_batches(self) -> int:
        return self.batches.count

    @property
    def rows(self) -> int:
        return self.batches.rows

    @property
    def cost(self) -> Cost:
        """Of all that was asked for so far."""
        return Cost(0, sum(map(len, self._known)), tuple(self._passes), self._states)

    def sequence_losses(
        self, schedules: Sequence[Schedule], base: Schedule | None = None, batches: Sequence[int] | None = None
    ) -> np.ndarray:
        numbers = range(self.num_batches) if batches is None else batches
        for part in self._compared(numbers, len(schedules)):
            missing = {number: [s for s in dict.fromkeys(schedules) if s not in self._known[number]] for number in part}
            for group in self._in_passes({number: unknown for number, unknown in missing.items() if unknown}):
                self._passes.append(sum(self._layers_of(unknown, base) for unknown in group.values()))
                self._states = max(self._states, sum(map(len, group.values())))
                for number, unknown in group.items():
                    self._known[number].update(unknown)
        losses = [self.num_layers**2 - sum(i + 1 for i, full in enumerate(s.is_full) if not full) for s in schedules]
        return np.repeat(np.array(losses, np.float64)[:, None], len(numbers) * self.rows, axis=1)

    def _compared(self, numbers: Sequence[int], schedules: int) -> Iterator[Sequence[int]]:
        """The batches between two comparisons of a race; all of them where nothing is compared."""
        if self.race is None or schedules == 1:
            yield numbers
            return
        for start, stop in itertools.pairwise([0, *self.race.comparisons(self.num_batches, self.rows)]):
            yield numbers[start:stop]

    def _in_passes(self, missing: dict[int, list[Schedule]]) -> Iterator[dict[int, list[Schedule]]]:
        """Batches and schedules in groups as `StreamedEvaluator` has them: of at most `states` hidden states, or one batch."""
        group: dict[int, list[Schedule]] = {}
        for number, schedules in missing.items():
            states = sum(map(len, group.values())) + len(schedules)
            if group and self.batches.states is not None and states > self.batches.states:
                yield group
                group = {}
            group[number] = schedules
        if group:
            yield group

    def _layers_of(self, schedules: Sequence[Schedule], base: Schedule | None) -> int:
        """The layers that are run on one batch for these schedules."""
        if self.batches.states is not None:  # they share what lies below the first layer in which they differ
            patterns = sorted(schedule.pattern for schedule in schedules)
            shared = sum(_common(one, other) for one, other in itertools.pairwise(patterns))
            return self.num_layers * len(patterns) - shared
        below = [0 if base is None else _first_difference(schedule, base) for schedule in schedules]
        return max(below) + sum(self.num_layers - layer for layer in below)


def _first_difference(schedule: Schedule, base: Schedule) -> int:
    """The first layer in which two schedules differ, 0 where they do not."""
    return _common(schedule.pattern, base.pattern) % schedule.num_layers


def _common(one: str, other: str) -> int:
    """How many letters two patterns begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


# ---- rates that are known before anything has run


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a prefill by its length, all layers F, as a folder of results/ has them."""

    source: str
    device: str
    seconds: dict[int, float]


MEASURED = {
    "glm-5": Measured("results/speed-glm-5", "NVIDIA H200", {10240: 2.08, 61440: 14.5, 122880: 32.3, 204800: 60.3}),
    "deepseek-v3.2": Measured(
        "results/speed-deepseek-v3.2", "NVIDIA H200", {10240: 2.19, 61440: 15.9, 122880: 36.1, 204800: 69.2}
    ),
    "30b": Measured("results/speed", "NVIDIA H200", {10240: 0.343, 61440: 2.91, 122880: 7.40, 204800: 15.8}),
}
# What makes two models' layers take the same time.
_SHAPE = (
    *("hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank", "index_n_heads", "index_head_dim", "index_topk"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)


def measured(config: Config, rows: int, context: int) -> tuple[Rate, Measured] | None:
    """The rate of layers of this shape on a batch of so many rows and tokens, and what it is from; None for other shapes."""
    for name, found in MEASURED.items():
        other = Config.from_hf(preset(name))
        if all(getattr(config, field) == getattr(other, field) for field in _SHAPE):
            seconds = np.interp(context, [0, *found.seconds], [0.0, *found.seconds.values()])
            return Rate(rows * float(seconds) / other.num_layers), found
    return None


# ---- what is said


def duration(seconds: float) -> str:
    """Such as "40 s", "3.2 minutes", "5.0 hours"."""
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def counted(cost: Cost, rows: int, context: int, weights: int | None) -> str:
    """What a search takes. weights: bytes of a streamed model's, which every pass reads; None for one in memory."""
    text = f"the search takes at most {cost.steps} steps and measures at most {cost.losses:,} losses on a batch of "
    text += f"{rows} x {context:,} tokens, for which it runs {cost.layers:,} layers on one"
    if weights is not None:
        size = len(cost.passes) * weights
        text += f"; it reads the weights {len(cost.passes):,} times, {size / 1e12:,.1f} TB in all"
    return text


def estimated(cost: Cost, config: Config, rows: int, context: int, weights: int | None) -> str:
    """How long that takes by what is known before anything has run, with where that is from."""
    if (found := measured(config, rows, context)) is None:
        return "how long that takes is said once a layer has been timed, before the search begins"
    rate, source = found
    seconds = cost.seconds(rate)
    text = f"estimate: at most {duration(seconds)} on one {source.device}, at the rate of a prefill there ({source.source})"
    if weights is None:
        return text
    fast_enough = len(cost.passes) * weights / seconds
    return f"{text}, if the weights come at {fast_enough / 1e9:,.1f} GB/s; slower reading takes longer"


def timed(cost: Cost, rate: Rate, device: str) -> str:
    """How long that takes at a measured rate."""
    text = (
        f"estimate: at most {duration(cost.seconds(rate))} at the measured rate, {1e3 * rate.layer:,.3g} ms a layer of a batch"
    )
    if rate.reading:
        text += f" and {duration(rate.reading)} to read the weights"
    return f"{text}, on {device}"
