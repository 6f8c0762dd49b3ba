"""The floating search over models that are formulas: what greedy cannot take back, and never worse than it."""

import numpy as np
import pytest

from indexcache_jax import search
from indexcache_jax.schedule import Schedule
from tests.support.loss_tables import Table, noisy


def losses_by_size(steps):
    return {step.schedule.num_full: step.loss for step in steps}


def entangled(seed, layers=9):
    """Pairs of layers that cost together as much as alone, or spare each other's cost."""
    rng = np.random.default_rng(seed)
    pairs = {(i, j): rng.uniform(-1, 2) for i in range(1, layers) for j in range(i + 1, layers)}
    return Table(rng.uniform(0, 2, layers), pairs, sequences=2)


def test_a_flip_is_taken_back_once_others_make_it_a_poor_one():
    """Layer 1 is the cheapest alone; layers 2 and 3 cost less together than either beside it."""
    table = Table((0, 1, 2, 2), {(2, 3): -2.0, (1, 2): 3.0, (1, 3): 3.0}, sequences=2)
    greedy = search.greedy_search(table, Schedule.all_full(4))
    floating = search.floating_search(table, Schedule.all_full(4))
    assert [s.schedule.pattern for s in greedy] == ["FFFF", "FSFF", "FSSF", "FSSS"]
    assert [s.schedule.pattern for s in floating] == ["FFFF", "FSFF", "FFSS", "FSSS"]
    assert [(s.flipped, s.restored) for s in floating] == [((), ()), ((1,), ()), ((2, 3), (1,)), ((1,), ())]
    assert [s.loss for s in floating] == [0, 1, 2, 9]


def test_a_flip_is_exchanged_for_a_neighbours():
    """Layer 2 is the cheapest alone, but the last indexer is worth more there than in layer 1."""
    table = Table((0, 3, 1, 2), {(1, 3): -5.0, (2, 3): 0.5}, sequences=2)
    greedy = search.greedy_search(table, Schedule.all_full(4), num_full=2)
    floating = search.floating_search(table, Schedule.all_full(4), num_full=2)
    assert greedy[-1].schedule.pattern == "FFSS" and greedy[-1].loss == 3.5
    assert floating[-1].schedule.pattern == "FSFS" and floating[-1].loss == 0
    assert floating[-1].rivals["FFSS"].mean == 3.5


@pytest.mark.parametrize("race", [None, search.Race()])
def test_never_worse_than_greedy_and_often_better(race):
    better = 0
    for seed in range(20):
        table = entangled(seed)
        greedy = losses_by_size(search.greedy_search(table, Schedule.all_full(9), race=race))
        floating = losses_by_size(search.floating_search(table, Schedule.all_full(9), race=race))
        assert floating.keys() == greedy.keys() and all(floating[size] <= greedy[size] for size in greedy)
        better += floating != greedy
    assert better > 10


def test_with_noise_and_a_race_no_size_is_worse_than_the_greedy_search_on_all_sequences():
    for seed in range(10):
        table = noisy(seed, 10, 64)
        greedy = losses_by_size(search.greedy_search(table, Schedule.all_full(10)))
        floating = losses_by_size(search.floating_search(table, Schedule.all_full(10), race=search.Race()))
        assert all(floating[size] <= greedy[size] for size in greedy)


def test_where_nothing_pays_the_steps_are_the_greedy_ones():
    table = Table((0, 2, 1, 1.5, 3), sequences=2)
    greedy = search.greedy_search(table, Schedule.all_full(5))
    assert [(s.schedule, s.losses, s.flipped) for s in search.floating_search(table, Schedule.all_full(5))] == [
        (s.schedule, s.losses, s.flipped) for s in greedy
    ]


def test_starts_from_a_schedule_whose_shared_layers_stay_shared():
    table = entangled(0, layers=6)
    steps = search.floating_search(table, Schedule("FFSFFS"))
    assert all(not step.schedule.is_full[2] and not step.schedule.is_full[5] for step in steps)
    assert {pattern[2] + pattern[5] for patterns in table.asked for pattern in patterns} == {"SS"}


def test_stops_before_the_loss_exceeds_its_bound():
    table = Table((0, 2, 1, 1.5, 3), sequences=2)
    assert [s.loss for s in search.floating_search(table, Schedule.all_full(5), max_loss=3.0)] == [0, 1, 2.5]


def test_what_is_better_by_noise_alone_does_not_pay():
    """The exchange of layer 1 for 2 saves 0.1 on average; whether it does on all text depends on the sequences' spread.

    At a spread of 0.2 that is 1.9 standard errors: enough for one challenger, not for the best of several.
    """
    for spread, pattern in ((0.01, "FSFS"), (0.2, "FFSS"), (1.0, "FFSS")):
        noise = spread * np.array([1.0, -1.0] * 8)
        table = Table((0, 2, 1, 1), {(1, 3): -1.1 + noise}, sequences=16)
        assert search.greedy_search(table, Schedule.all_full(4), num_full=2)[-1].schedule.pattern == "FFSS"
        for race in (None, search.Race()):
            steps = search.floating_search(table, Schedule.all_full(4), num_full=2, race=race)
            assert steps[-1].schedule.pattern == pattern


@pytest.mark.parametrize(
    "first, spread, others, pattern", [(0.0, 0.3, 0.5, "FSFS"), (1.0, 0.01, -1.0, "FFSS")], ids=["late", "early"]
)
def test_what_an_exchange_saves_on_the_first_sequences_does_not_decide_a_race(first, spread, others, pattern):
    """It pays where it begins with nothing and is clear on the others; not where all but the first sequences lose by it."""
    saving = np.concatenate([first + spread * np.array([1.0, -1.0] * 2), others + 0.01 * np.array([1.0, -1.0] * 6)])
    table = Table((0, 2, 1, 1), {(1, 3): -1.0 - saving}, sequences=16)
    steps = search.floating_search(table, Schedule.all_full(4), num_full=2, race=search.Race())
    assert steps[-1].schedule.pattern == pattern


def test_a_race_spares_most_of_what_changes_that_do_not_pay_would_cost():
    measured = []
    for race in (None, search.Race()):
        table = noisy(0, 12, 128)
        search.floating_search(table, Schedule.all_full(12), num_full=3, race=race)
        measured.append(table.measured)
    assert measured[1] < measured[0] / 3
