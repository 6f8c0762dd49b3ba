"""The losses of a search, kept in memory."""

from indexcache_jax.schedule import Schedule


class MemoryLog:
    """A `search.LossLog` that is told no loss twice."""

    def __init__(self) -> None:
        self.losses: dict[tuple[str, int], float] = {}

    def get(self, schedule: Schedule, batch: int) -> float | None:
        return self.losses.get((schedule.pattern, batch))

    def add(self, schedule: Schedule, batch: int, loss: float) -> None:
        assert (schedule.pattern, batch) not in self.losses
        self.losses[schedule.pattern, batch] = loss
