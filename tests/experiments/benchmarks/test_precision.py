"""What 8 bits in the cache change, measured on the shipped checkpoint."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints_convert
from experiments import run  # noqa: F401  run defines the flags that reports quote
from experiments.benchmarks import precision
from experiments.common import options
from indexcache_jax import serving
from indexcache_jax.serving import CacheFormat, prefill_chunk


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def test_selections_are_compared_where_more_keys_than_k_are_seen():
    a = jnp.array([[[0, -1], [0, 1], [0, 1], [1, 3], [2, 4]]])
    b = jnp.array([[[0, -1], [0, 1], [1, 2], [1, 3], [0, 1]]])
    np.testing.assert_allclose(precision.selected_alike([a, a], [a, b], 2), [1.0, (1 + 2 + 0) / 6])


def test_a_cut_model_walks_as_inference_does_and_layers_take_the_states_they_are_given():
    config, schedule, params = checkpoints_convert.load(options.DEMO, schedule="FFSSSFSSSSSS", dtype=jnp.dtype("float32"))
    weights = serving.from_params(params, config, schedule)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 160)))
    states, selections = precision.walk(weights, tokens, config, schedule, CacheFormat.of(jnp.float32))
    assert len(states) == 13 and len(selections) == 3
    cache = serving.init_cache(config, schedule, 1, 160, jnp.float32)
    x, _ = prefill_chunk(weights, tokens, jnp.array([160]), cache, config)
    np.testing.assert_allclose(states[-1], x, atol=1e-4)

    again, chosen = precision.walk(weights, tokens, config, schedule, CacheFormat.of(jnp.float32), states)
    np.testing.assert_array_equal(again[-1], states[-1])
    assert precision.selected_alike(selections, chosen, config.index_topk).tolist() == [1, 1, 1]
    both = precision.cache_format("fp8 both", jnp.float32)
    rounded, chosen = precision.walk(weights, tokens, config, schedule, both, states)
    assert np.abs(rounded[-1] - states[-1]).max() > 0
    assert 0.5 < np.mean(precision.selected_alike(selections, chosen, config.index_topk)) <= 1


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path, capsys):
    with flagsaver.flagsaver(context=160, held_out_sequences=1):
        precision.run(str(tmp_path), 0)
    found = json.loads((tmp_path / "results.json").read_text())["metrics"]["in_8_bits"]
    assert list(found) == [*precision.CACHES, *precision.WEIGHTS]
    for one in found.values():
        assert abs(one["loss"] - one["loss_unrounded"]) < 0.1 and 0 <= one["divergence"] < 0.1
        assert len(one["selected_alike"]) == 12
    assert found["fp8 latents"]["selected_alike"] == [1] * 12  # they are no part of the scores
    assert found["fp8 index keys"]["divergence"] < found["fp8 both"]["divergence"]
    assert 0 < found["fp8 weights"]["divergence"] < found["fp8 weights and activations"]["divergence"]
    assert "worst layer" in (tmp_path / "report.md").read_text() and "fp8 both" in capsys.readouterr().out


def test_a_context_in_which_everything_is_selected_is_refused(tmp_path):
    with flagsaver.flagsaver(context=128), pytest.raises(ValueError, match="--context=128: must be above index_topk = 128"):
        precision.run(str(tmp_path), 0)
