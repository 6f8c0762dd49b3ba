"""The losses of a search, kept in memory."""

from indexcache_jax import search
from indexcache_jax.schedule import Schedule


class MemoryLog(search.MemoryLog):
    """A log that is told no loss twice."""

    def add(self, schedule: Schedule, sequence: int, loss: float) -> None:
        assert (schedule.pattern, sequence) not in self.losses
        super().add(schedule, sequence, loss)
