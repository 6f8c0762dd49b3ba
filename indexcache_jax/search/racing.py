"""Racing: schedules are compared on few sequences first, and those that cannot win are not measured on the others.

Sequences are drawn in random order, so the first of them are a sample of all. After some of them the schedule with the
lowest mean leads, and every other is dropped whose paired difference to it is too large to turn: above t standard errors of
its mean over *all* sequences, of which the part that was measured is certain (the finite population correction, which makes
the last comparison exact).

A schedule is dropped wrongly only if it would have won and the bound of the pair that it forms with the leader fails. Its
rivals can lead at any comparison, so the error that is allowed is shared by all of them and by all comparisons (a union
bound). The bound supposes differences that are about normal; `noise` says why less cannot be supposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from indexcache_jax.arguments import is_real
from indexcache_jax.schedule import Schedule
from indexcache_jax.search.noise import NOISE_ERROR, Margin, t_quantile
from indexcache_jax.search.oracle import LossOracle

Losses = dict[Schedule, np.ndarray]  # of each schedule on the first sequences

FEWEST = 4  # sequences of the first comparison: fewer leave the spread unknown


@dataclasses.dataclass(frozen=True)
class Race:
    """How schedules that cannot win are dropped.

    error: the probability, at most, that a whole search drops a schedule which all sequences would have chosen.
    growth: how many times more sequences each comparison has than the one before. With a model that is streamed every
        comparison takes another pass over its weights.

    Raises ValueError unless 0 < error < 1 and 1 < growth < infinity.
    """

    error: float = 0.05
    growth: float = 1.25

    def __post_init__(self) -> None:
        if not (is_real(self.error) and 0 < self.error < 1):
            raise ValueError(f"error: {self.error!r} is not between 0 and 1")
        if not (is_real(self.growth) and 1 < self.growth < math.inf):
            raise ValueError(f"growth: {self.growth!r} is not a finite number above 1")

    def comparisons(self, batches: int, rows: int) -> list[int]:
        """After how many of so many batches schedules are compared; the last comparison has all of them."""
        counts, count = [], -(-FEWEST // rows)
        while count < batches:
            counts.append(count)
            count = max(count + 1, math.ceil(count * self.growth))
        return [*counts, batches]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The winner of several schedules, and the losses of each on the first sequences: on all for the winner."""

    winner: Schedule
    losses: Mapping[Schedule, np.ndarray]

    @property
    def loss(self) -> float:
        """The winner's mean loss."""
        return float(np.mean(self.losses[self.winner]))

    def margin(self, schedule: Schedule) -> Margin:
        """How much higher a schedule's losses are than the winner's."""
        return Margin.between(self.losses[schedule], self.losses[self.winner])

    def estimate(self, schedule: Schedule) -> float:
        """A schedule's mean loss over all sequences: for one that was dropped the winner's and the margin to it."""
        losses = self.losses[schedule]
        if len(losses) == len(self.losses[self.winner]):
            return float(np.mean(losses))
        return self.loss + self.margin(schedule).mean

    @property
    def rivals(self) -> dict[str, Margin]:
        """The margins of all that did not win, by pattern."""
        return {schedule.pattern: self.margin(schedule) for schedule in self.losses if schedule != self.winner}


def contest(
    oracle: LossOracle, base: Schedule, groups: Sequence[Sequence[Schedule]], race: Race | None, error: float
) -> list[Outcome]:
    """The schedule of each group with the lowest mean loss, the first of equals.

    base: the schedule from which all of them differ in few layers. race: how those that cannot win are dropped, wrongly with
    a probability of at most `error` in all groups together; None measures every schedule on all sequences.
    """
    total, level = oracle.num_batches * oracle.rows, _level(oracle, groups, race, error)
    racing, losses = _measured(oracle, base, groups, race, lambda group, losses: _that_can_win(group, losses, total, level))
    winners = [_leader(group, losses) if len(group) > 1 else group[0] for group in racing]
    return _outcomes(oracle, base, groups, winners, losses)


def challenge(
    oracle: LossOracle, base: Schedule, groups: Sequence[Sequence[Schedule]], race: Race | None, error: float
) -> list[Outcome]:
    """The best of each group that is better than its first schedule, the incumbent, beyond noise; else the incumbent.

    As `contest`, whose arguments it takes. NOISE_ERROR is shared by all challengers: it is the probability, at most, that
    where none is better on all text one displaces an incumbent. A challenger is also dropped once it is not likely to end
    above noise (with the probability race.error that it does), since with what differs by noise alone nothing is gained.
    """
    total, level = oracle.num_batches * oracle.rows, _level(oracle, groups, race, error)
    noise_level = NOISE_ERROR / max(1, sum(len(group) - 1 for group in groups))

    def drop(group: Sequence[Schedule], losses: Mapping[Schedule, np.ndarray]) -> list[Schedule]:
        assert race is not None, "without a race there is a single comparison"
        likely = [s for s in group[1:] if _can_displace(s, group[0], losses, total, race.error, noise_level)]
        best = _that_can_win([group[0], *likely], losses, total, level)
        return best if best[0] == group[0] else [group[0], *best]

    racing, losses = _measured(oracle, base, groups, race, drop)
    winners = []
    for incumbent, *challengers in racing:
        better = [
            schedule
            for schedule in challengers
            if Margin.between(losses[incumbent], losses[schedule]).is_above_noise(noise_level)
        ]
        winners.append(_leader(better, losses) if better else incumbent)
    return _outcomes(oracle, base, groups, winners, losses)


def _level(oracle: LossOracle, groups: Sequence[Sequence[Schedule]], race: Race | None, error: float) -> float:
    """The probability with which each pair of schedules may be wrong in each comparison but the last, which is exact."""
    if race is None:
        return error
    comparisons = race.comparisons(oracle.num_batches, oracle.rows)
    return error / max(1, sum(len(group) - 1 for group in groups)) / max(1, len(comparisons) - 1)


def _measured(
    oracle: LossOracle,
    base: Schedule,
    groups: Sequence[Sequence[Schedule]],
    race: Race | None,
    drop: Callable[[Sequence[Schedule], Losses], list[Schedule]],
) -> tuple[list[list[Schedule]], Losses]:
    """What is left of each group, measured on all sequences unless it is alone, and the losses of all.

    drop: what is left of a group after a comparison, given the losses so far.
    """
    losses = {schedule: np.empty(0) for group in groups for schedule in group}
    racing, done = [list(group) for group in groups], 0
    for stop in [oracle.num_batches] if race is None else race.comparisons(oracle.num_batches, oracle.rows):
        asked = [schedule for group in racing if len(group) > 1 for schedule in group]
        if not asked:
            break
        measured = oracle.sequence_losses(asked, base, range(done, stop))
        for schedule, values in zip(asked, measured, strict=True):
            losses[schedule] = np.append(losses[schedule], values)
        if stop < oracle.num_batches:
            racing = [drop(group, losses) if len(group) > 1 else group for group in racing]
        done = stop
    return racing, losses


def _outcomes(
    oracle: LossOracle,
    base: Schedule,
    groups: Sequence[Sequence[Schedule]],
    winners: Sequence[Schedule],
    losses: Losses,
) -> list[Outcome]:
    """The outcomes of groups, their winners measured on all sequences."""
    for winner, values in zip(winners, oracle.sequence_losses(winners, base), strict=True):
        losses[winner] = values
    return [
        Outcome(winner, {schedule: losses[schedule] for schedule in group})
        for winner, group in zip(winners, groups, strict=True)
    ]


def _leader(group: Sequence[Schedule], losses: Mapping[Schedule, np.ndarray]) -> Schedule:
    """The schedule with the lowest mean loss so far, the first of equals."""
    return min(group, key=lambda schedule: float(np.mean(losses[schedule])))


def _that_can_win(group: Sequence[Schedule], losses: Mapping[Schedule, np.ndarray], total: int, level: float) -> list[Schedule]:
    """Those of a group whose mean over `total` sequences can be the lowest; each is wrong with probability `level`."""
    leader = _leader(group, losses)
    unknown = math.sqrt(1 - len(losses[leader]) / total)
    bound = t_quantile(level, len(losses[leader])) * unknown

    def can_win(schedule: Schedule) -> bool:
        margin = Margin.between(losses[schedule], losses[leader])
        return margin.mean <= bound * margin.error

    return [schedule for schedule in group if schedule == leader or can_win(schedule)]


def _can_displace(
    schedule: Schedule,
    incumbent: Schedule,
    losses: Mapping[Schedule, np.ndarray],
    total: int,
    error: float,
    noise_level: float,
) -> bool:
    """Whether a schedule can be better than the incumbent beyond noise (`noise_level`) over `total` sequences.

    Wrongly False with about the probability `error`.
    """
    margin = Margin.between(losses[incumbent], losses[schedule])
    highest = margin.mean + t_quantile(error, margin.sequences) * margin.error * math.sqrt(1 - margin.sequences / total)
    error_of_all = margin.error * math.sqrt(margin.sequences / total)
    return highest >= t_quantile(noise_level, total) * error_of_all
