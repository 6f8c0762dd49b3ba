"""Models that are formulas: losses of schedules on sequences, without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from indexcache_jax.schedule import Schedule


@dataclasses.dataclass
class Table:
    """The sum of what each S layer costs, plus what pairs of them cost together: a `search.LossOracle`.

    alone, pairs: costs, numbers or arrays [sequences]. measured: how many losses of a sequence were asked for the first time;
    asked: the patterns asked for, in order.
    """

    alone: Sequence[float | np.ndarray]
    pairs: Mapping[tuple[int, int], float | np.ndarray] = dataclasses.field(default_factory=dict)
    sequences: int = 1
    rows: int = 1
    known: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    asked: list[list[str]] = dataclasses.field(default_factory=list)

    @property
    def num_batches(self) -> int:
        return self.sequences // self.rows

    @property
    def measured(self) -> int:
        return self.rows * len(self.known)

    def of(self, schedule: Schedule) -> np.ndarray:
        """The losses on all sequences."""
        off = {i for i, full in enumerate(schedule.is_full) if not full}
        together = (cost for (i, j), cost in self.pairs.items() if i in off and j in off)
        total = np.zeros(self.sequences)
        for cost in (*(self.alone[i] for i in sorted(off)), *together):
            total = total + cost
        return total

    def sequence_losses(
        self, schedules: Sequence[Schedule], base: Schedule | None = None, batches: Sequence[int] | None = None
    ) -> np.ndarray:
        numbers = range(self.num_batches) if batches is None else batches
        self.asked.append([schedule.pattern for schedule in schedules])
        self.known |= {(schedule.pattern, number) for schedule in schedules for number in numbers}
        rows = [number * self.rows + row for number in numbers for row in range(self.rows)]
        return np.array([self.of(schedule)[rows] for schedule in schedules])


def noisy(seed: int, layers: int, sequences: int, spread: float = 0.5, heavy: bool = False) -> Table:
    """Costs of layers from one in a thousand to a third of a nat, in random order, each sequence's its own.

    spread: the standard deviation over the sequences, as a share of a cost. heavy: differences with the tails of Student's t
    with 4 degrees of freedom. Each two neighbours cost something together, too.
    """
    rng = np.random.default_rng(seed)
    draw = (lambda: rng.standard_t(4, sequences) / np.sqrt(2)) if heavy else (lambda: rng.standard_normal(sequences))
    costs = rng.permutation(np.geomspace(0.001, 0.3, layers)) * rng.uniform(0.9, 1.1, layers)
    alone = [cost * (1 + spread * draw()) for cost in costs]
    pairs = {(i, i + 1): 0.2 * min(costs[i], costs[i + 1]) * (1 + spread * draw()) for i in range(layers - 1)}
    return Table(alone, pairs, sequences)
