"""What a model makes of a sample: the forward pass's own losses and likeliest tokens."""

import jax
import numpy as np
import pytest

from experiments.reproduction import retrieval, scoring
from indexcache_jax import forward
from indexcache_jax.params import with_schedule
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import GLM_FIELDS, Case

FIELDS = GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 2, "vocab_size": 258, "eos_token_id": 256}
BASE = Case(FIELDS, "FFF", 0)


def test_measures_are_those_of_the_forward_pass():
    rng = np.random.default_rng(0)
    cuts = rng.integers(97, 123, (2, 41)).astype(np.int32)
    far = rng.random((2, 40)) < 0.3
    for pattern in ("FFF", "FSF"):
        schedule = Schedule(pattern)
        params, right = with_schedule(BASE.params, BASE.schedule, schedule), cuts[0].copy()
        answers = np.zeros(41, np.int32)
        answers[[-5, -3]] = 1, 2
        for at in (-5, -3):  # a prompt whose answers are what the model would say, one after the other
            own = np.asarray(forward(params, np.stack([*cuts, right])[:, :-1], BASE.config, schedule))
            right[at] = np.argmax(own[2, at])
        losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(own[:2])), cuts[:, 1:, None], axis=-1)[..., 0]
        wrong = right.copy()
        wrong[-3] = (right[-3] + 1) % 256
        prompts = [retrieval.Prompt(tokens, answers, ("one key", "two hops")) for tokens in (right, wrong)]
        found = scoring.score(BASE.params, BASE.config, BASE.schedule, schedule, scoring.Sample(cuts, far, prompts))
        np.testing.assert_allclose(found.losses, losses.mean(axis=1), rtol=1e-4)
        np.testing.assert_allclose(found.long_range, (losses * far).sum(axis=1), rtol=1e-4)
        assert found.long_range_tokens == far.sum(axis=1).tolist()
        assert found.solved["one key"] == [[1], [1]] and found.solved["two hops"] == [[1], [0]]
        means = found.means
        assert means["loss"] == pytest.approx(losses.mean(), rel=1e-4) and means["two hops"] == 0.5
        assert means["long-range loss"] == pytest.approx(losses[far].mean(), rel=1e-4) and "several keys" not in means


def test_the_end_of_a_sample_holds_all_answers():
    answers = np.zeros(1001, np.int32)
    answers[-300] = 1
    cuts = np.zeros((1, 1001), np.int32)
    prompts = [retrieval.Prompt(cuts[0], answers, ("one key",))]
    assert scoring.Sample(cuts, cuts[:, 1:] > 0, prompts).tail == 384
    assert scoring.Sample(cuts[:, :321], cuts[:, 1:321] > 0, prompts).tail == 320


def test_overlap_is_summed_up_by_neighbours_and_by_all_pairs():
    matrix = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.7], [0.3, 0.7, 1.0]])
    assert scoring.neighbours_and_pairs(matrix) == {"adjacent": pytest.approx(0.6), "all pairs": pytest.approx(0.5)}
