"""The quality experiment: what it measures, and a run of it on a tiny model."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints_convert
from experiments import quality, text, training
from indexcache_jax import forward
from indexcache_jax.schedule import Schedule
from tests.tiny_models import GLM_FIELDS, Case

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 2, "vocab_size": 258, "eos_token_id": 256}
BASE = Case(FIELDS, "FFF", 0)


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def decoded(tokens):
    return bytes(tokens.tolist()).decode()


@pytest.mark.parametrize("task", quality.TASKS)
def test_a_prompt_hides_what_it_asks_for(task):
    haystack = np.full(400, ord("."), np.int32)
    prompts = [quality.prompt(task, haystack, text.Bytes(), 300, np.random.default_rng(seed)) for seed in range(5)]
    for found in prompts:
        whole = decoded(found.tokens)
        assert found.tokens.shape == found.answer.shape == (301,)
        end = whole.rindex("." * 4)
        answers = decoded(found.tokens[found.answer])
        words = [answers[i : i + 6] for i in range(0, len(answers), 6)]
        assert len(words) == (3 if task == "several values" else 1) and not found.answer[:end].any()
        for word in words:
            assert f" = '{word}'" in whole[:end] and word in whole[end:]
        if task == "two hops":
            second = whole[end:].split("assert ")[1].split()[0]
            first = next(line for line in whole[:end].replace(".", "\n").splitlines() if line.startswith(second)).split(" = ")[
                1
            ]
            assert f"{first} = '{words[0]}'" in whole[:end]
    assert len({p.tokens.tobytes() for p in prompts}) == 5


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match="--context=40"):
        quality.prompt("several keys", np.zeros(100, np.int32), text.Bytes(), 40, np.random.default_rng(0))


def test_intervals_are_students():
    mean, half = quality.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert np.isnan(quality.interval([1.0])[1])
    assert quality.shown([1.0], 2) == "1.00" and quality.shown([1.0, 1.0], 2) == "1.00 ± 0.00"


def test_changes_are_paired_with_the_same_seed():
    scores = {
        "DSA": [{"loss": 1.0, "one key": 1.0}, {"loss": 2.0, "one key": 0.5}],
        "1/2 uniform": [{"loss": 1.1, "one key": 0.0}, {"loss": 2.2, "one key": 0.0}],
    }
    header, rows = quality.score_table(scores, {"DSA": ["FF"] * 2, "1/2 uniform": ["FS"] * 2}, quality.PAPER)
    assert header == ["", "indexers", "loss", "change, %", "one key", "paper, Long"]
    assert rows[1][1] == "1" and rows[1][3].startswith("10.00 ± 0.00") and rows[1][-1] == "47.4"


@pytest.mark.parametrize("pattern", ["FFF", "FSF"])
def test_measures_are_those_of_the_forward_pass(pattern):
    schedule = Schedule(pattern)
    rng = np.random.default_rng(0)
    cuts = rng.integers(97, 123, (2, 41)).astype(np.int32)
    far = rng.random((2, 40)) < 0.3
    own = forward(training.under(BASE.params, BASE.schedule, schedule), cuts[:, :-1], BASE.config, schedule)
    logp = np.asarray(jax.nn.log_softmax(own))
    losses = -np.take_along_axis(logp, cuts[:, 1:, None], axis=-1)[..., 0]
    likeliest = np.argmax(logp, axis=-1)
    # One prompt whose answer is what the model would say, and one that differs from it in one place.
    answer = np.zeros(41, bool)
    answer[-3] = True
    right = np.concatenate([cuts[0][:-3], [likeliest[0, -3]], cuts[0][-2:]]).astype(np.int32)
    wrong = right.copy()
    wrong[-3] = (right[-3] + 1) % 256
    prompts = {"said": [quality.Prompt(right, answer)], "half": [quality.Prompt(right, answer), quality.Prompt(wrong, answer)]}
    found = quality.measure(BASE.params, BASE.config, BASE.schedule, schedule, quality.Sample(cuts, far, prompts))
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert found["long-range loss"] == pytest.approx(losses[far].mean(), rel=1e-4)
    assert (found["said"], found["half"]) == (1.0, 0.5)


def test_trained_indexers_take_their_layers_places():
    schedule = Schedule("FSF")
    trained = training.under(BASE.params, BASE.schedule, schedule)
    trained = dataclasses.replace(trained, indexer=jax.tree.map(lambda a: a + 1, trained.indexer))
    whole = quality.over(trained, BASE.params, BASE.schedule, schedule)
    keys, before = whole.indexer.keys, BASE.params.indexer.keys
    np.testing.assert_array_equal(keys, jnp.stack([before[0] + 1, before[1], before[2] + 1]))


@pytest.mark.slow
def test_a_run_in_small(tmp_path):
    checkpoints_convert.save(tmp_path / "base", BASE.params, BASE.config, BASE.schedule)
    rng = np.random.default_rng(0)
    for folder in ("code", "prose"):
        (tmp_path / folder).mkdir()
        for i in range(24):
            (tmp_path / folder / f"{i}.txt").write_bytes(rng.integers(97, 101, 1500).astype(np.uint8).tobytes())
    flags = {
        "experiment": "quality",
        "checkpoint": tmp_path / "base",
        "code": tmp_path / "code" / "*.txt",
        "prose": tmp_path / "prose" / "*.txt",
        "output_dir": tmp_path / "out",
        "context": 200,
        "sequences": 1,
        "held_out_sequences": 1,
        "retentions": "2/3,1/3",
        "retention": "2/3",
        "distilled": "DSA,2/3 searched,2/3 uniform (own layer only)",
        "seeds": 2,
        "retrieval_prompts": 1,
        "ngram_order": 3,
        "long_range": 20,
        "warmup_steps": 2,
        "sparse_steps": 2,
    }
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "experiments.run", *(f"--{name}={value}" for name, value in flags.items())]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert found.returncode == 0, found.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert list(metrics["training_free"]) == ["DSA"] + [
        f"{share} {kind}" for share in ("2/3", "1/3") for kind in ("uniform", "searched", "similarity")
    ]
    assert list(metrics["distilled"]) == ["DSA", "2/3 searched", "2/3 uniform (own layer only)"]
    for entries in [*metrics["training_free"].values(), *metrics["distilled"].values()]:
        assert len(entries) == 2 and set(entries[0]) == {"loss", "long-range loss", *quality.TASKS}
        assert all(np.isfinite(list(entry.values())).all() for entry in entries)
    assert metrics["training_free"]["DSA"] != metrics["distilled"]["DSA"]
    assert len(metrics["domains"]) == 2 and list(metrics["domains"][0]) == [
        "DSA",
        "uniform",
        "searched on code",
        "searched on prose",
        "searched on both",
    ]
    assert all(p.count("F") == 2 for p in metrics["patterns"]["2/3 searched"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Distilled" in report and "±" in report and (tmp_path / "out" / "overlap.png").stat().st_size > 1000
