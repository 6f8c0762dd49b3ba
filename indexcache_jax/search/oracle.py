"""What a search asks of a model, and where the answers are kept: losses of schedules, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from indexcache_jax.schedule import Schedule


class LossOracle(Protocol):
    """A model's losses on fixed calibration sequences, which lie in batches of equally many rows.

    What was measured once is not measured again.
    """

    @property
    def num_batches(self) -> int:
        """How many batches there are."""

    @property
    def rows(self) -> int:
        """How many sequences a batch has."""

    def sequence_losses(
        self, schedules: Sequence[Schedule], base: Schedule | None = None, batches: Sequence[int] | None = None
    ) -> np.ndarray:
        """The mean losses in nats a token of each sequence, [schedules, sequences] float64.

        base: a schedule from which they differ in few layers, so that what lies below is run once. batches: the numbers of
        the batches whose sequences are asked for, default all.
        """


class LossLog(Protocol):
    """Where an evaluator keeps the losses it measures, so that a search that was stopped does not measure them again."""

    def get(self, schedule: Schedule, sequence: int) -> float | None:
        """The loss of a schedule on a sequence, by its number; None where it was not measured yet."""

    def add(self, schedule: Schedule, sequence: int, loss: float) -> None:
        """Keeps the loss of a schedule on a sequence, by its number."""


class MemoryLog:
    """A `LossLog` that lives as long as its process."""

    def __init__(self) -> None:
        self.losses: dict[tuple[str, int], float] = {}

    def get(self, schedule: Schedule, sequence: int) -> float | None:
        return self.losses.get((schedule.pattern, sequence))

    def add(self, schedule: Schedule, sequence: int, loss: float) -> None:
        self.losses[schedule.pattern, sequence] = loss
