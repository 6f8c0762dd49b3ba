"""What a search is said to take, held against searches that are counted as they run."""

import json
import pathlib

import numpy as np
import pytest

from experiments.common import search_cost
from experiments.common.search_cost import Batches, Cost, Counter, Rate
from indexcache_jax import search
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.search.streamed import StreamedEvaluator, state_bytes
from tests.indexcache_jax.search.test_streamed import CASE, OneByOne, batches, whole
from tests.support.loss_tables import noisy

ROOT = pathlib.Path(__file__).parents[3]


def test_a_search_in_memory_runs_at_most_the_layers_that_are_counted():
    ran = []
    search.greedy_search(whole(progress=ran.append), CASE.schedule)
    counter = Counter(5, Batches(2, 2))
    steps = search.greedy_search(counter, CASE.schedule)
    assert counter.cost.losses == 2 * (1 + 2 + 1) and len(steps) == 3
    assert 0.8 < sum(ran) / counter.cost.layers <= 1
    # The start, then flips of layers 1 and 3, then of layer 1 alone, on each of 2 batches.
    assert counter.cost.passes == (2 * 5, 2 * (3 + 4 + 2), 2 * (1 + 4))


@pytest.mark.parametrize("states, passes", [(100, 3), (2, 4), (0, 6)])
def test_a_streamed_search_reads_the_weights_as_often_as_is_counted(states, passes):
    size = state_bytes(CASE.config, np.float32, 2, 40)
    layers, ran = OneByOne(), []
    search.greedy_search(StreamedEvaluator(layers, batches(), progress=ran.append, memory=states * size), CASE.schedule)
    counter = Counter(5, Batches(2, 2, states))
    search.greedy_search(counter, CASE.schedule)
    assert len(counter.cost.passes) == passes == len(layers.asked) / 5
    assert 0.8 < sum(ran) / counter.cost.layers <= 1
    assert counter.cost.states == min(4, max(2, states))  # of both flips on a batch, and of both batches


def test_a_race_takes_a_pass_of_every_comparison_and_no_more_than_is_counted():
    race, start = search.Race(0.05, growth=2), Schedule.all_full(8)
    table, counter = noisy(0, 8, 32), Counter(8, Batches(32, 1, 10**6), race)
    for oracle, dropping in ((table, race), (counter, None)):
        search.greedy_search(oracle, start, num_full=4, race=dropping)
    assert table.measured < counter.cost.losses == 32 * (1 + 7 + 6 + 5 + 4)
    comparisons = len(race.comparisons(32, 1))
    assert len(counter.cost.passes) == 1 + 4 * comparisons


def test_a_floating_search_that_takes_nothing_back_is_counted():
    start = Schedule.all_full(6)
    counter = Counter(6, Batches(1, 1))
    steps = search.floating_search(counter, start, num_full=2)
    greedy = Counter(6, Batches(1, 1))
    assert [step.schedule for step in steps] == [step.schedule for step in search.greedy_search(greedy, start, num_full=2)]
    assert counter.cost.losses > greedy.cost.losses


def test_a_pass_takes_as_long_as_running_or_as_reading():
    cost = Cost(2, 3, (10, 1)) + Cost(passes=(4,), states=3)
    assert (cost.steps, cost.losses, cost.layers, cost.states) == (2, 3, 15, 3)
    assert cost.seconds(Rate(2.0)) == 30 and cost.seconds(Rate(2.0, reading=5.0)) == 20 + 5 + 8


def test_rates_are_those_of_the_results():
    for name, found in search_cost.MEASURED.items():
        rows = json.loads((ROOT / found.source / "results.json").read_text())
        assert rows["device"]["kind"] == found.device and rows["metrics"]["model"].startswith(f"{name},")
        all_full = {r["length"]: r["prefill_seconds"] for r in rows["metrics"]["rows"] if r["pattern"] in ("DSA", "all F")}
        assert found.seconds == pytest.approx(all_full, rel=0.005)


def test_a_rate_is_known_for_layers_that_were_measured():
    for name in ("glm-5", "glm-5.2"):  # whose layers are the same
        rate, found = search_cost.measured(Config.from_hf(preset(name)), rows=2, context=35840)
        assert found.source == "results/speed-glm-5" and rate.layer == pytest.approx(2 * (2.08 + 14.5) / 2 / 78)
    assert search_cost.measured(CASE.config, 1, 1000) is None
    said = search_cost.estimated(Cost(1, 1, (10**6,)), CASE.config, 1, 1000, None)
    assert said == "how long that takes is said once a layer has been timed, before the search begins"


def test_what_is_said_of_a_large_model():
    config, cost = Config.from_hf(preset("glm-5")), Cost(20, 500, (78_000,) * 10)
    counted = search_cost.counted(cost, 1, 35840, 10**12)
    assert "at most 20 steps" in counted and "500 losses on a batch of 1 x 35,840 tokens" in counted
    assert "780,000 layers" in counted and "reads the weights 10 times, 10.0 TB" in counted
    estimated = search_cost.estimated(cost, config, 1, 35840, 10**12)  # 8.29 s a model, 10000 times
    assert "at most 23.0 hours on one NVIDIA H200" in estimated and "results/speed-glm-5" in estimated
    assert "if the weights come at 0.1 GB/s" in estimated
    assert "weights" not in search_cost.counted(cost, 1, 35840, None) + search_cost.estimated(cost, config, 1, 35840, None)
    assert "1.5 minutes" not in search_cost.duration(90) and search_cost.duration(150) == "2.5 minutes"
    timed = search_cost.timed(Cost(passes=(100, 10)), Rate(0.5, reading=40.0), "cpu")
    assert "at most 90 s" in timed and "500 ms a layer of a batch and 40 s to read the weights, on cpu" in timed
