"""Races over losses that are drawn: the same schedules from fewer losses, and how often a race is wrong."""

import numpy as np
import pytest

from indexcache_jax import search
from indexcache_jax.schedule import Schedule
from indexcache_jax.search.racing import contest
from tests.support.loss_tables import Table, noisy

LAYERS, SEQUENCES = 14, 128
ALL = Schedule.all_full(LAYERS)


def patterns(steps):
    return [step.schedule.pattern for step in steps]


@pytest.mark.parametrize("heavy", [False, True])
def test_a_third_of_the_losses_give_the_same_pattern(heavy):
    same, shares = 0, []
    for seed in range(100):
        whole, raced = (noisy(seed, LAYERS, SEQUENCES, heavy=heavy) for _ in range(2))
        expected = search.greedy_search(whole, ALL, num_full=4)
        found = search.greedy_search(raced, ALL, num_full=4, race=search.Race(error=0.05))
        same += patterns(found) == patterns(expected)
        shares.append(raced.measured / whole.measured)
    assert same >= 95 and max(shares) <= 1 / 3


def test_blocks_are_raced_each_for_itself():
    whole, raced = noisy(3, LAYERS, SEQUENCES), noisy(3, LAYERS, SEQUENCES)
    expected = search.greedy_search(whole, ALL, num_full=4, blocks=3)
    assert patterns(search.greedy_search(raced, ALL, num_full=4, blocks=3, race=search.Race())) == patterns(expected)
    assert raced.measured < 0.6 * whole.measured


@pytest.mark.parametrize("error", [0.05, 0.3])
def test_a_race_is_wrong_no_more_often_than_it_says(error):
    """Six schedules that are alike: whichever is the best of all sequences is dropped as rarely as promised."""
    rng, base, wrong = np.random.default_rng(0), Schedule.all_full(7), 0
    flips = [base.with_shared(layer) for layer in range(1, 7)]
    for _ in range(300):
        table = Table([np.zeros(40), *rng.standard_normal((6, 40))], sequences=40)
        best = min(flips, key=lambda flip: table.of(flip).mean())
        wrong += contest(table, base, [flips], search.Race(), error)[0].winner != best
    assert wrong <= error * 300


def test_what_is_dropped_is_measured_on_few_sequences_and_the_winner_on_all():
    level = np.repeat([10.0, 0.0], [4, 60])  # of the sequences, whatever the schedule
    flips = [1 + level, *(2 + level + np.random.default_rng(i).uniform(-0.1, 0.1, 64) for i in range(3))]
    step = search.greedy_search(Table([0, *flips], sequences=64), Schedule.all_full(5), num_full=4, race=search.Race())[-1]
    assert step.schedule.pattern == "FSFFF" and step.losses == tuple(1 + level)
    assert [margin.sequences for margin in step.rivals.values()] == [4, 4, 4]
    assert step.candidates[2] == pytest.approx(2 + level.mean(), abs=0.1)


@pytest.mark.parametrize("steps, measured", [(1, 8), (2, 10)])
def test_a_bound_is_of_what_is_not_measured_yet_and_of_all_steps(steps, measured):
    """After 8 of 10 sequences a rival is 1.15 standard errors behind: the bound is at 1.06 of them, of two steps at 1.27."""
    table = Table([0, 1.0, 2 + 2.3 * np.array([1.0, -1.0] * 5)], sequences=10)
    found = search.greedy_search(table, Schedule.all_full(3), num_full=3 - steps, race=search.Race(growth=2))
    assert found[1].rivals["FFS"].sequences == measured


def test_rows_of_a_batch_are_sequences():
    table = Table([0, 1.0, 2 + np.random.default_rng(0).uniform(-0.1, 0.1, 32)], sequences=32, rows=8)
    step = search.greedy_search(table, Schedule.all_full(3), num_full=2, race=search.Race())[-1]
    assert step.rivals["FFS"].sequences == 8 and len(step.losses) == 32


def test_few_sequences_are_all_measured():
    table = Table([0, 1.0, 2.0, 3.0], sequences=4)
    search.greedy_search(table, Schedule.all_full(4), num_full=3, race=search.Race())
    assert table.measured == 4 * 4


def test_comparisons_grow_and_end_with_all():
    assert search.Race(growth=2).comparisons(batches=40, rows=1) == [4, 8, 16, 32, 40]
    assert search.Race(growth=2).comparisons(batches=10, rows=3) == [2, 4, 8, 10]
    assert search.Race().comparisons(batches=1, rows=8) == [1]


@pytest.mark.parametrize(
    "options, named",
    [
        ({"error": 0}, "error: 0"),
        ({"error": 1.0}, "1.0"),
        ({"growth": 1}, "growth: 1"),
        ({"growth": float("inf")}, "growth: inf"),
    ],
)
def test_settings_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        search.Race(**options)
