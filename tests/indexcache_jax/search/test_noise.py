"""Paired differences: what they say of few sequences, how often they are wrong, and how many more would be needed."""

import math

import numpy as np
import pytest

from indexcache_jax import search
from indexcache_jax.schedule import Schedule
from indexcache_jax.search.noise import t_quantile
from tests.support.loss_tables import Table

Margin = search.Margin


def test_a_margin_is_the_mean_of_differences_with_its_standard_error():
    margin = Margin.between([3.0, 5.0, 10.0], [1.0, 2.0, 6.0])
    assert margin == Margin(3.0, pytest.approx(1 / math.sqrt(3)), 3)


def test_what_sequences_have_in_common_is_no_noise():
    level = 10 * np.random.default_rng(0).standard_normal(16)
    margin = Margin.between(level + 0.01, level)
    assert margin.error < 1e-9 and margin.is_above_noise(0.001)


def test_the_longer_one_counts_as_far_as_the_shorter_one():
    assert Margin.between([2.0, 3.0], [1.0, 2.0, 100.0]) == Margin(1.0, 0.0, 2)


def test_a_single_sequence_tells_nothing():
    margin = Margin.between([3.0], [1.0])
    assert margin == Margin(2.0, math.inf, 1)
    assert not margin.is_above_noise(0.4) and margin.sequences_to_settle(0.05) is None


def test_quantiles_are_those_of_the_tables():
    assert t_quantile(0.05, 2) == pytest.approx(6.3138, abs=1e-4)
    assert t_quantile(0.025, 31) == pytest.approx(2.0423, abs=1e-4)


def test_above_noise_is_wrong_as_often_as_it_says():
    rng = np.random.default_rng(0)
    wrong = [Margin.between(rng.standard_normal(6), np.zeros(6)).is_above_noise(0.1) for _ in range(2000)]
    assert 0.08 < np.mean(wrong) < 0.12


def test_as_many_sequences_as_needed_settle_it_and_one_fewer_do_not():
    margin = Margin(0.02, 0.03, 10)
    count = margin.sequences_to_settle(0.05)

    def of(sequences):
        return Margin(0.02, 0.03 * math.sqrt(10 / sequences), sequences)

    assert not margin.is_above_noise(0.05) and count > 10
    assert of(count).is_above_noise(0.05) and not of(count - 1).is_above_noise(0.05)
    assert Margin(0.0, 0.03, 10).sequences_to_settle(0.05) is None


def test_a_step_names_the_rivals_within_noise_the_closest_first():
    spread = np.array([-1.0, 1.0] * 8)
    table = Table([0, np.ones(16), 1.5 + spread, 1.1 + spread, 9 + spread], sequences=16)
    step = search.greedy_search(table, Schedule.all_full(5), num_full=4)[-1]
    assert step.rivals["FFSFF"].is_above_noise(0.05)  # alone, but not as one of three rivals
    assert list(step.within_noise(0.05)) == ["FFFSF", "FFSFF"]
    needed = step.sequences_to_settle(0.05)
    assert needed == step.rivals["FFFSF"].sequences_to_settle(0.05 / 3) > 16
    assert search.greedy_search(table, Schedule.all_full(5))[0].sequences_to_settle(0.05) == 0
