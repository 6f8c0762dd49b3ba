"""Pretraining at the size of a test: what its evaluation measures, and a whole run."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints_convert
import experiments.run  # noqa: F401  (its flags go into every results.json)
from experiments.common import options, runs, text
from experiments.common.report import Output
from experiments.reproduction import pretrain, retrieval
from indexcache_jax.config import Config
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import count
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

FIELDS = GLM_FIELDS | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 258,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "max_position_embeddings": 160,
}


def random_selection_loss(case, tokens, seed=0):
    arguments = (case.params, jnp.asarray(tokens), case.config, case.schedule, jax.random.key(seed))
    return float(pretrain.random_selection_loss(*arguments)[0])


def test_random_selections_are_random_until_they_hold_everything():
    tokens = np.random.default_rng(0).integers(0, 256, (1, 33)).astype(np.int32)
    few, all_ = Case(FIELDS, "FF", 0), Case(FIELDS | {"index_topk": 32}, "FF", 0)
    assert abs(random_selection_loss(few, tokens) - random_selection_loss(few, tokens, seed=1)) > 1e-3
    dense = runs.evaluate(all_.params, tokens, all_.config, all_.schedule, "float32", sparse=False).language
    assert random_selection_loss(all_, tokens) == pytest.approx(dense, rel=1e-4)
    assert abs(random_selection_loss(few, tokens) - dense) > 1e-3


def test_the_shipped_model_is_the_one_described():
    config, schedule, params = checkpoints_convert.load(options.DEMO)
    assert config == Config.from_hf(pretrain.DEMO) and schedule == Schedule.all_full(12)
    assert params.embedding.dtype == jnp.bfloat16


def test_the_layers_of_the_deep_model_begin_alike():
    config, schedule = pretrain.RECIPES["deep"].shape()
    assert config.num_layers >= 24 and 20e6 < count(abstract(config, schedule)) < 100e6
    assert all(stage.neighbour_decay for stage in pretrain.RECIPES["deep"].stages)
    case = Case(FIELDS, "FF", 0)
    params = pretrain.alike(case.params)
    for name in ("attention", "indexer"):
        found, first = getattr(params, name), getattr(case.params, name)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.stack([b[0]] * 2)), found, first)
    np.testing.assert_array_equal(params.moe.down, case.params.moe.down)


def test_a_resumed_run_keeps_to_the_steps_it_began_with(tmp_path, monkeypatch):
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(runs, "seconds_per_step", lambda *_: 1.0)
    recipe, output = pretrain.RECIPES["demo"], Output.create(str(tmp_path))

    def steps(seconds, resume):
        with flagsaver.flagsaver(resume=resume):
            deadline = time.perf_counter() + seconds
            fitted = pretrain.within_the_limit(recipe, *[None] * 3, output, deadline)
        return [stage.steps for stage in fitted]

    whole = [stage.steps for stage in recipe.stages]
    cut = steps(120, resume=False)
    assert sum(cut) == pytest.approx(100, abs=4)
    assert steps(np.inf, resume=True) == steps(500, resume=True) == cut
    assert steps(np.inf, resume=False) == whole
    (tmp_path / runs.CHECKPOINTS / "500").mkdir(parents=True)
    assert steps(120, resume=True) == whole  # which is what those checkpoints are of
    plan = tmp_path / pretrain.PLAN
    plan.write_text("of that run")
    with flagsaver.flagsaver(time_limit=1.0), pytest.raises(ValueError, match="holds an earlier run; --resume"):
        pretrain.run(str(tmp_path), 0)
    assert plan.read_text() == "of that run"


def test_text_that_is_not_there_is_said_before_anything_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.runs, "in_a_thread", None)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(text="nowhere.py"), pytest.raises(ValueError, match="--text=nowhere.py: no such file"):
        pretrain.run(str(tmp_path), 0)


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
    recipe = pretrain.Recipe(FIELDS, stages, (0.5, 0.3, 0.2), separator=256)
    monkeypatch.setitem(pretrain.RECIPES, "demo", recipe)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(text=str(tmp_path / "corpus"), steps_scale=0.5):
        pretrain.run(str(tmp_path / "out"), 0)
    entries = runs.read_log(tmp_path / "out")
    assert [sum(e["stage"] == s.name for e in entries) for s in stages] == [20, 10, 5]
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    first = entries[0]["language"]
    assert metrics["held_out_loss"]["sparse"] < 0.8 * first and metrics["ngram_loss"] < first
    config, schedule, params = checkpoints_convert.load(tmp_path / "out" / "checkpoint")
    assert schedule.pattern == "FF" and params.embedding.dtype == jnp.bfloat16
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    for part in ("| dense | 20 | 8 | 32 |", f"{metrics['held_out_loss']['sparse']:.4f}", f"{metrics['ngram_loss']:.4f}"):
        assert part in card
    assert 0 < metrics["overlap"]["adjacent"] <= 1 and f"adjacent ones {metrics['overlap']['adjacent']:.3f}" in card
    assert set(metrics["retrieval"]) == set(retrieval.TASKS) and metrics["stages"][0]["steps"] == 20


@pytest.mark.slow
def test_a_run_on_tokens_keeps_to_its_time_and_is_taken_up_again(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        words = " ".join(["alpha", "beta", "gamma", "delta"][j] for j in rng.integers(4, size=200))
        (tmp_path / "corpus" / f"{i}.py").write_text(words)
    stages = (
        Stage("dense", "dense", 10**6, 4, 32, 1e-2, 0.0, compute_dtype="float32"),
        Stage("warm-up", "warmup", 3, 4, 150, 0.0, 1e-2, compute_dtype="float32"),
    )
    fields = FIELDS | {"vocab_size": 300, "eos_token_id": 0, "pad_token_id": None, "max_position_embeddings": 150}
    recipe = pretrain.Recipe(fields, stages, (0.5, 0.5), 0, vocabulary=300, woven=0.5, held_out=2, finish_seconds=0.0)
    monkeypatch.setitem(pretrain.RECIPES, "medium", recipe)
    monkeypatch.setattr(
        pretrain, "plan", lambda recipe: [dataclasses.replace(s, steps=min(s.steps, 5000)) for s in recipe.stages]
    )
    flags.FLAGS.mark_as_parsed()
    given = dict(text=f"{tmp_path}/corpus/*.py", recipe="medium")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("of a run that was given up")
    with flagsaver.flagsaver(**given, time_limit=0.5):
        pretrain.run(str(tmp_path / "out"), 0)
    steps = {entry["stage"]: entry["steps"] for entry in json.loads((tmp_path / "out" / "plan.json").read_text())}
    assert 1 <= steps["dense"] < 5000 and 1 <= steps["warm-up"] <= 3
    assert len(runs.read_log(tmp_path / "out")) == sum(steps.values())
    encoder = text.tokenizer(tmp_path / "out" / "checkpoint", 300)
    assert isinstance(encoder, text.FromFile) and encoder.decode(encoder.encode(b"alpha beta")) == "alpha beta"
    log, found = (tmp_path / "out" / "train.jsonl").read_text(), tmp_path / "out" / "results.json"
    times = [json.loads(found.read_text())["metrics"][name] for name in ("seconds", "tokens_per_second")]
    with flagsaver.flagsaver(**given, time_limit=1000.0, resume=True):
        pretrain.run(str(tmp_path / "out"), 0)  # with the steps chosen then
    assert (tmp_path / "out" / "train.jsonl").read_text() == log
    assert [json.loads(found.read_text())["metrics"][name] for name in ("seconds", "tokens_per_second")] == times
