"""What schedules gain in time: the sum over layers, and that whole and cut models are timed by the same code."""

import numpy as np
import pytest
from absl import flags

import checkpoints_convert
from experiments.common import inputs, options, serving_times
from experiments.common.serving_times import LayerSeconds
from indexcache_jax import memory
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import CASES

CASE = CASES["glm-mixed"]  # two dense layers, then three with experts
SCHEDULES = [Schedule(pattern) for pattern in ("FFFFF", "FSFSS", "FSSSS")]


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def test_layers_are_the_differences_of_models_that_share_everything_else():
    ends, full, shared = 5.0, 2.0, 0.5
    more = serving_times.MORE
    one = ends + full
    assert LayerSeconds.between(one, one + more * full, one + more * shared) == LayerSeconds(full, shared)


def test_a_model_is_the_sum_of_its_layers():
    by_kind = {False: LayerSeconds(10.0, 7.0), True: LayerSeconds(100.0, 60.0)}
    found = [serving_times.of_all_layers(schedule, CASE.config, by_kind) for schedule in SCHEDULES]
    assert found == [2 * 10 + 3 * 100, 10 + 7 + 100 + 2 * 60, 10 + 7 + 3 * 60]


def test_an_estimate_adds_up_what_was_timed(monkeypatch):
    """With times that are made up: of a model's ends 10 s, and of its layers by their kind."""
    asked = []

    def cut_models(config, experts, dtype, weights):
        patterns = ("F", "FFFF", "FSSS")
        cut = [inputs.cut(config, (experts,) * len(pattern)) for pattern in patterns]
        return [serving_times.Served(None, config, Schedule(p)) for p, config in zip(patterns, cut, strict=True)]

    def timed(models, tokens, steps):
        asked.append((tokens.shape, steps))
        kinds = {"F": 3.0, "S": 2.0} if models[0].config.moe_layers[0] else {"F": 1.0, "S": 0.5}
        seconds = [10 + sum(kinds[letter] for letter in model.schedule.pattern) for model in models]
        return [(each, each / 1000) for each in seconds]

    monkeypatch.setattr(serving_times, "cut_models", cut_models)
    monkeypatch.setattr(serving_times, "timed", timed)
    found = serving_times.estimate(CASE.config, SCHEDULES, np.zeros((1, 40), np.int32), "float32", None)
    assert found.estimated and asked == [((1, 40), serving_times.STEPS)] * 2
    assert found.prefill == pytest.approx([2 * 1 + 3 * 3, 1 + 0.5 + 3 + 2 * 2, 1 + 0.5 + 3 * 2])
    assert found.decode == pytest.approx([seconds / 1000 for seconds in found.prefill])
    assert "estimates for one request of 40 tokens" in found.how and "random float32 weights" in found.how
    assert "layers dense, 2 in all" in found.how
    assert "layers with experts, 3 in all, an F layer takes 3e+03 ms of prefill" in found.how


@pytest.mark.parametrize("weights", [None, "fp8"])
def test_cut_models_share_a_layer(weights):
    models = serving_times.cut_models(CASE.config, True, "float32", weights)
    assert [model.weights.pattern for model in models] == ["F", "FFFF", "FSSS"]
    first = models[0].weights.layers[0]
    assert all(layer is first for layer in models[1].weights.layers)
    assert models[2].weights.layers[3].out is first.out and models[2].weights.layers[3].index_up is None
    assert models[0].weights.format == weights


def test_models_take_turns_at_prefill_and_at_decoding():
    one = serving_times.cut_models(CASE.config, False, "float32", None)[0]
    found = serving_times.timed([one, one], np.ones((2, 64), np.int32), steps=2)
    assert len(found) == 2 and all(prefill > 0 and decode > 0 for prefill, decode in found)


def test_a_layer_without_room_is_not_timed(monkeypatch):
    taken = serving_times.need(CASE.config, 1, 200, "float32", None)
    assert set(taken.parts) == {"a layer", "cache", "temporaries"} and taken.total < 10**7
    monkeypatch.setattr(memory, "available", lambda: taken.total - 1)
    found = serving_times.estimate(CASE.config, SCHEDULES, np.zeros((1, 200), np.int32), "float32", None)
    assert found.prefill == [None] * 3 and not found.estimated and "No times: a layer at 200 tokens needs" in found.how


def test_a_model_without_room_is_not_read(monkeypatch):
    monkeypatch.setattr(checkpoints_convert, "load", None)
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    checkpoint = inputs.Checkpoint(str(options.DEMO), "float32")
    found = serving_times.of_checkpoint(checkpoint, SCHEDULES, np.zeros((2, 200), np.int32))
    assert found.prefill == [None] * 3 and found.how.startswith("No times: inference of 2 x 200 tokens needs 0.0 GB")


def test_a_cut_model_has_the_layers_that_were_asked_for():
    cut = inputs.cut(CASE.config, (True, False, True))
    assert (cut.num_layers, cut.moe_layers, cut.vocab_size) == (3, (True, False, True), 97)
    assert cut.hidden_size == CASE.config.hidden_size and cut.eos_token_ids == ()
