"""The benchmark of an indexer's training on a model small enough for a CPU."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import run  # noqa: F401  run defines the flags that reports quote
from experiments.benchmarks import indexer_speed

FOUND = {"seconds_per_layer": 1.0, "seconds_per_target": 0.5, "seconds_per_step": 0.1, "targets_kept": True}


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def test_it_writes_what_it_measured(tmp_path, capsys):
    with flagsaver.flagsaver(preset="demo", context=64, sequences=2, num_layers=2, timed_steps=6):
        indexer_speed.run(str(tmp_path), 0)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["layers"] == 2 and metrics["targets_kept"] and len(metrics["divergence"]) == 6
    assert metrics["of_matmul"] is None and metrics["model_tflops"] > 0
    assert metrics["hours"]["8"] < metrics["hours"]["1"]
    assert "hours on 1 and" in (tmp_path / "report.md").read_text() and "s a step" in capsys.readouterr().out


def test_layers_share_their_weights():
    layers = indexer_speed.RandomLayers(indexer_speed.model("demo", 3), None, 0)
    first, last = (jax.tree.leaves(layers.layer(layer)) for layer in (0, 2))
    assert first and all(a is b for a, b in zip(first, last, strict=True))
    assert layers.ends().embedding is not None and layers.layer(0).embedding is None


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("fit", [True, False], ids=["targets have room", "targets are computed at every step"])
def test_the_hours_of_a_whole_model(devices, fit):
    """12 layers in groups of 3, of which 8 devices have one each at most, and one device all four."""
    sequences, steps = indexer_speed.WHOLE
    step = 0.1 if fit else 0.1 + 3 * 0.5
    groups = 4 if devices == 1 else 1
    expected = 12 * sequences / devices * 1.0 + groups * (3 * sequences * 0.5 + steps * step)
    found = indexer_speed.whole_hours(FOUND | {"all_targets_fit": fit}, 12, 3, devices)
    np.testing.assert_allclose(3600 * found, expected)
