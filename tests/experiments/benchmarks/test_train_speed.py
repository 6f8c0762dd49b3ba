"""The benchmark of training on a model small enough for a CPU."""

import json
import math

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import run  # noqa: F401  run defines the flags that reports quote
from experiments.benchmarks import train_speed
from indexcache_jax import training

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_speed, "FIELDS", train_speed.FIELDS | SMALL)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def test_the_pattern_repeats_over_the_layers():
    config, schedule = train_speed.model(6, 256, 16, "FSSS")
    assert schedule.pattern == "FSSSFS" and config.num_layers == 6 and not any(config.moe_layers)


def test_it_writes_what_it_measured(tmp_path, capsys):
    with flagsaver.flagsaver(num_layers=2, train_context=128, train_topk=8, train_steps=1, schedule=["FS"]):
        train_speed.run(str(tmp_path), 0)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["pattern"] == "FS" and metrics["way"] == "XLA"
    config, schedule = train_speed.model(2, 128, 8, "FS")
    for kind in ("sparse", "warmup"):
        found = metrics["stages"][kind]
        flops = training.flops_per_token(config, schedule, train_speed.stage_of(kind, 128)) * found["tokens_per_second"]
        assert math.isclose(found["model_tflops"], flops / 1e12, rel_tol=1e-6)
        assert found["divergence"] > 0
    assert "sparse" in (tmp_path / "report.md").read_text() and "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"train_stages": ["dense"]}, "--train_stages=dense"),
        ({"train_stages": []}, "--train_stages=: name sparse"),
        ({"train_topk": 128, "train_context": 128}, "--train_topk=128"),
    ],
)
def test_wrong_flags_are_named(wrong, message, tmp_path):
    with flagsaver.flagsaver(**wrong), pytest.raises(ValueError, match=message):
        train_speed.run(str(tmp_path), 0)


def test_a_pattern_that_is_empty_is_named():
    with pytest.raises(ValueError, match="--schedule="):
        train_speed.model(4, 256, 16, "")


@pytest.mark.parametrize("entry, pattern", [("all F", "FFFF"), ("1/2", "FSFS"), ("fs", "FSFS")])
def test_a_schedule_is_said_as_everywhere(entry, pattern):
    assert train_speed.model(4, 256, 16, entry)[1].pattern == pattern
