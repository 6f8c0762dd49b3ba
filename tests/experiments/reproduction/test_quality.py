"""The quality experiment: what it measures, and a run of it on a tiny model."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints_convert
from experiments.common import runs
from experiments.common.report import Output
from experiments.reproduction import quality, retrieval
from indexcache_jax import forward
from indexcache_jax.params import with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = pathlib.Path(__file__).parents[3]
FIELDS = GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 2, "vocab_size": 258, "eos_token_id": 256}
BASE = Case(FIELDS, "FFF", 0)


def test_intervals_are_students():
    mean, half = quality.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert np.isnan(quality.interval([1.0])[1])
    assert quality.shown([1.0], 2) == "1.00" and quality.shown([1.0, 1.0], 2) == "1.00 ± 0.00"


def test_changes_are_paired_with_the_same_seed():
    scores = {
        "all F": {0: {"loss": 1.0, "one key": 1.0}, 1: {"loss": 2.0, "one key": 0.5}},
        "1/2 uniform": {0: {"loss": 1.1, "one key": 0.0}, 1: {"loss": 2.2, "one key": 0.0}},
        "1/4 uniform": {1: {"loss": 2.4, "one key": 0.0}},
    }
    patterns = {"all F": {0: "FF", 1: "FF"}, "1/2 uniform": {0: "FS", 1: "FS"}, "1/4 uniform": {1: "FS"}}
    header, rows = quality.score_table(scores, patterns, quality.PAPER)
    assert header == ["", "indexers", "loss", "change, %", "one key", "paper, Long"]
    assert rows[1][1] == "1" and rows[1][3].startswith("10.00 ± 0.00") and rows[1][-1] == "47.4"
    assert rows[2][3] == "20.00"  # of the one seed that there is


def test_similarity_is_held_against_the_loss_step_by_step():
    steps = [
        {"full": 4, "similarity": [3.0, 2.0, 1.0], "loss": [1.0, 1.1, 1.2]},
        {"full": 3, "similarity": [1.0, 2.0], "loss": [1.0, 2.0]},
    ]
    turned = [{"full": 4, "similarity": [1.0, 2.0, 3.0], "loss": [1.0, 1.1, 1.2]}, steps[1]]
    found = [quality.Found({}, {}, s) for s in (steps, turned)]
    rows = quality.proxy_table(found)[1]
    assert len(rows) == 1 and rows[0][0] == "4"  # two flips have no order worth the name
    assert rows[0][1].startswith("0.00 ±") and rows[0][2].startswith("20.00 ± 0.00") and rows[0][3].startswith("10.00 ±")
    assert quality.proxy_table(found[:1])[1][0][1] == "-1.00"


def test_rows_survive_a_kill_and_are_not_made_twice(tmp_path):
    path, about = tmp_path / "rows.jsonl", {"flags": {"context": 3}}
    rows = quality.Rows(path, about, resume=False)
    assert rows.once("free", 0, "all F", lambda: {"loss": 1.5}) == {"loss": 1.5}
    rows.close()
    with open(path, "ab") as file:
        file.write(b'{"part": "free", "seed": 1, "na')
    with pytest.raises(ValueError, match="holds an earlier run; --resume"):
        quality.Rows(path, about, resume=False)
    with pytest.raises(ValueError, match=r"another flags\.context: 3 there, 4 here"):
        quality.Rows(path, {"flags": {"context": 4}}, resume=True)
    rows = quality.Rows(path, about, resume=True)
    assert rows.once("free", 0, "all F", lambda: pytest.fail("made twice")) == {"loss": 1.5}
    assert not rows.has("free", 1, "all F") and rows.once("free", 1, "all F", lambda: [2]) == [2]
    rows.close()
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(retention="none"), "--retention=none"),
        (dict(retentions=["1/2", "0"]), "--retentions=0"),
        (dict(batch_size=2, sequences=2, held_out_sequences=3), "--batch_size=2: does not divide --held_out_sequences=3"),
        (
            dict(retentions=["1/3"], distilled=["all F", "1/2 uniform"]),
            "--distilled: '1/2 uniform' is not one of 'all F', '1/3 u",
        ),
    ],
)
def test_flags_are_looked_at_before_anything_takes_long(given, message):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**given), pytest.raises(ValueError, match=message):
        quality.check_flags()
    quality.check_flags()


def test_a_resumed_run_trains_as_long_as_the_rows_that_are_there(tmp_path, monkeypatch):
    flags.FLAGS.mark_as_parsed()
    stages = [Stage(kind, kind, 100, 1, 24, 1e-3, 1e-3) for kind in ("warmup", "sparse")]
    monkeypatch.setattr(runs, "seconds_per_step", lambda *_: 1.0)
    studied, output = quality.Model(*[None] * 6), Output.create(str(tmp_path))
    monkeypatch.setattr(quality, "traced_schedule", lambda base: None)
    ends = time.perf_counter() + quality.FINISH_SECONDS

    def steps(count, begun, seconds, resume=True):
        with flagsaver.flagsaver(resume=resume):
            fitted = quality.within_the_limit(studied, stages, count, begun, 0.0, output, ends + seconds)
        return [stage.steps for stage in fitted]

    with flagsaver.flagsaver(time_limit=41.0):
        assert steps(2, False, 30, resume=False) == []  # so little time distils nothing
    cut = steps(2, False, 61, resume=False)
    assert sum(cut) == pytest.approx(30, abs=2)
    assert steps(1, True, np.inf) == steps(1, True, 900) == steps(0, True, np.inf) == cut
    assert steps(2, False, np.inf, resume=False) == [100, 100]
    assert steps(1, True, 61) == [100, 100]  # the rows that are there were not cut


@pytest.mark.parametrize("pattern", ["FFF", "FSF"])
def test_measures_are_those_of_the_forward_pass(pattern):
    schedule = Schedule(pattern)
    rng = np.random.default_rng(0)
    cuts = rng.integers(97, 123, (2, 41)).astype(np.int32)
    far = rng.random((2, 40)) < 0.3
    own = forward(with_schedule(BASE.params, BASE.schedule, schedule), cuts[:, :-1], BASE.config, schedule)
    logp = np.asarray(jax.nn.log_softmax(own))
    losses = -np.take_along_axis(logp, cuts[:, 1:, None], axis=-1)[..., 0]
    found = quality.measure(BASE.params, BASE.config, BASE.schedule, schedule, quality.Sample(cuts, far, {}))
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert found["long-range loss"] == pytest.approx(losses[far].mean(), rel=1e-4)


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
        "text": tmp_path / "code" / "*.txt",
        "other_text": tmp_path / "prose" / "*.txt",
        "output_dir": tmp_path / "out",
        "context": 200,
        "sequences": 1,
        "held_out_sequences": 1,
        "retentions": "2/3,1/3",
        "retention": "2/3",
        "distilled": "all F,2/3 searched,2/3 uniform (own layer only)",
        "seeds": 2,
        "retrieval_prompts": 1,
        "ngram_order": 3,
        "long_range": 20,
        "warmup_steps": 2,
        "sparse_steps": 2,
        "woven": 0.5,
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
    assert list(metrics["training_free"]) == ["all F"] + [
        f"{share} {kind}" for share in ("2/3", "1/3") for kind in ("uniform", "searched", "similarity")
    ]
    assert list(metrics["distilled"]) == ["all F", "2/3 searched", "2/3 uniform (own layer only)"]
    for entries in [*metrics["training_free"].values(), *metrics["distilled"].values()]:
        assert len(entries) == 2 and set(entries["0"]) == {"loss", "long-range loss", *retrieval.TASKS}
        assert all(np.isfinite(list(entry.values())).all() for entry in entries.values())
    assert metrics["training_free"]["all F"] != metrics["distilled"]["all F"]
    assert len(metrics["domains"]) == 2 and list(metrics["domains"][0]) == [
        "all F",
        "uniform",
        "searched on code",
        "searched on prose",
        "searched on both",
    ]
    assert all(p.count("F") == 2 for p in metrics["patterns"]["2/3 searched"].values())
    # After a kill that took the last row: what is there is not made again.
    path = tmp_path / "out" / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    found = subprocess.run([*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    assert path.read_text() == "".join(lines) and found.stdout.count("distilled") == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Distilled" in report and "±" in report and (tmp_path / "out" / "overlap.png").stat().st_size > 1000
