"""How sure a comparison of two schedules is: paired differences of their losses over the same sequences.

Sequences differ in loss far more than schedules do, and both schedules see the same ones, so the differences tell what the
two means do not. Their mean is judged by Student's t, which supposes that the sequences are drawn independently from the
text that counts and that the differences are about normal. Nothing else says anything sure of a few sequences: by signs
alone m of them leave a doubt of 2^-m, and bounds that hold for every distribution exceed the whole range for m below some
fifty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

NOISE_ERROR = 0.05  # the probability with which a difference that is noise is called above it


def t_quantile(error: float, sequences: int) -> float:
    """What the mean of so many normal numbers of mean 0, in standard errors, exceeds with probability `error`.

    Infinite for fewer than 2 sequences.
    """
    return math.inf if sequences < 2 else -float(special.stdtrit(sequences - 1, error))


@dataclasses.dataclass(frozen=True)
class Margin:
    """How much higher the losses of one schedule are than those of another on the same sequences, in nats a token.

    mean: of the differences. error: its standard error, infinite for a single sequence. sequences: how many were compared.
    """

    mean: float
    error: float
    sequences: int

    @classmethod
    def between(cls, losses: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> Margin:
        """Of losses over those of the reference, on as many sequences as the shorter of the two has; ValueError for none."""
        count = min(len(losses), len(reference))
        if not count:
            raise ValueError(f"losses: {len(losses)} of them and {len(reference)} of the reference leave none to compare")
        differences = np.asarray(losses[:count], np.float64) - np.asarray(reference[:count], np.float64)
        error = float(np.std(differences, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
        return cls(float(np.mean(differences)), error, count)

    def is_above_noise(self, error: float) -> bool:
        """Whether the mean over all text is above 0; wrongly True with at most this probability."""
        return self.sequences > 1 and self.mean > t_quantile(error, self.sequences) * self.error

    def sequences_to_settle(self, error: float) -> int | None:
        """How many sequences put a mean and a spread like these above noise; None where no number does or nothing is known."""
        if self.sequences < 2 or self.mean <= 0:
            return None
        spread = self.error * math.sqrt(self.sequences) / self.mean
        count = max(2, math.ceil((special.ndtri(1 - error) * spread) ** 2))  # by the normal's quantile, below the t's
        while t_quantile(error, count) * spread >= math.sqrt(count):
            count += 1
        return count
