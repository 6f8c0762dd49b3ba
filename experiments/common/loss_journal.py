"""The losses that a search has measured, in a file from which a killed search goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from experiments.common.journal import Journal
from indexcache_jax.schedule import Schedule


class LossJournal:
    """Losses by schedule and sequence number in a `Journal`, for the `log` of an evaluator (`search.LossLog`).

    about: what a loss depends on: the weights, the dtype, the text (`search.fingerprint`). ValueError as for a `Journal`.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self._journal = Journal(path, about, fields={"pattern": str, "sequence": int, "loss": float})
        self._losses = {(entry["pattern"], entry["sequence"]): entry["loss"] for entry in self._journal.entries}

    def get(self, schedule: Schedule, sequence: int) -> float | None:
        """The loss, None where it was not measured yet."""
        return self._losses.get((schedule.pattern, sequence))

    def add(self, schedule: Schedule, sequence: int, loss: float) -> None:
        """Keeps a loss, in the file too."""
        self._losses[schedule.pattern, sequence] = loss
        self._journal.append({"pattern": schedule.pattern, "sequence": sequence, "loss": loss})

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> LossJournal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
