"""Pretraining at the size of a test: what its evaluation measures, and a whole run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints_convert
import experiments.run  # noqa: F401  (its flags go into every results.json)
from experiments import options, pretrain, training
from experiments.training import Stage
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from tests.tiny_models import GLM_FIELDS, Case

FIELDS = GLM_FIELDS | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 258,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_selection_loss(case, tokens, seed=0):
    arguments = (case.params, jnp.asarray(tokens), case.config, case.schedule, jax.random.key(seed))
    return float(pretrain.random_selection_loss(*arguments))


def test_random_selections_are_random_until_they_hold_everything():
    tokens = np.random.default_rng(0).integers(0, 256, (1, 33)).astype(np.int32)
    few, all_ = Case(FIELDS, "FF", 0), Case(FIELDS | {"index_topk": 32}, "FF", 0)
    assert abs(random_selection_loss(few, tokens) - random_selection_loss(few, tokens, seed=1)) > 1e-3
    dense = training.evaluate(all_.params, tokens, all_.config, all_.schedule, "float32", sparse=False).language
    assert random_selection_loss(all_, tokens) == pytest.approx(dense, rel=1e-4)
    assert abs(random_selection_loss(few, tokens) - dense) > 1e-3


def test_the_shipped_model_is_the_one_described():
    config, schedule, params = checkpoints_convert.load(options.DEMO)
    assert config == Config.from_hf(pretrain.DEMO) and schedule == Schedule.all_full(12)
    assert params.embedding.dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_run_trains_all_stages_and_leaves_a_checkpoint_with_its_card(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for i in range(30):
        words = " ".join(["alpha", "beta", "gamma", "delta"][j] for j in rng.integers(4, size=60))
        (tmp_path / "corpus" / f"{i}.py").write_text(words)
    stages = (
        Stage("dense", "dense", 40, 8, 32, 1e-2, 0.0, balance_speed=1e-3, compute_dtype="float32"),
        Stage("warm-up", "warmup", 20, 4, 48, 0.0, 1e-2, compute_dtype="float32"),
        Stage("sparse", "sparse", 10, 4, 48, 1e-3, 1e-2, compute_dtype="float32"),
    )
    monkeypatch.setattr(pretrain, "DEMO", FIELDS)
    monkeypatch.setattr(pretrain, "STAGES", stages)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(corpus=str(tmp_path / "corpus"), steps_scale=0.5):
        pretrain.run(str(tmp_path / "out"), 0)
    entries = training.read_log(tmp_path / "out")
    assert [sum(e["stage"] == s.name for e in entries) for s in stages] == [20, 10, 5]
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    first = entries[0]["language"]
    assert metrics["held_out_loss"]["sparse"] < 0.8 * first and metrics["ngram_loss"] < first
    config, schedule, params = checkpoints_convert.load(tmp_path / "out" / "checkpoint")
    assert schedule.pattern == "FF" and params.embedding.dtype == jnp.bfloat16
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    for part in ("| dense | 20 | 8 | 32 |", f"{metrics['held_out_loss']['sparse']:.4f}", f"{metrics['ngram_loss']:.4f}"):
        assert part in card
