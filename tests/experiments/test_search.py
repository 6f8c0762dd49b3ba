"""`python -m experiments.run`: the search from the command line."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import types

import pytest
from absl import flags

import checkpoints_convert
from experiments import search
from experiments.common import inputs, options
from indexcache_jax import memory
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments, cwd=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_settings_are_what_each_engine_reads():
    config = Config.from_hf(GLM_FIELDS)
    found = {s.engine: s.usage for s in search.settings(Schedule("FFSFS"), "my dir/glm", config)}
    for engine, flag in (("sglang", "--json-model-override-args"), ("vllm", "--hf-overrides")):
        words = shlex.split(found[engine])
        assert "my dir/glm" in words
        assert json.loads(words[words.index(flag) + 1])["index_topk_pattern"] == "FFSFS"
    assert "indexer_types" in found["transformers"] and '"index_topk_pattern": "FFSFS"' in found["tensorrt-llm"]
    deepseek = {s.engine: s.usage for s in search.settings(Schedule("FFSFS"), "x", Config.from_hf(DEEPSEEK_FIELDS))}
    assert deepseek["transformers"].startswith("not supported")


def test_engines_are_given_safetensors(tmp_path):
    config, schedule, params = checkpoints_convert.load(options.DEMO)
    checkpoints_convert.save(tmp_path / "a b", params, config, schedule, format="orbax")
    directory, command = search.for_engines(f"{tmp_path}/a b/")
    assert command == f"python -m checkpoints_convert '{tmp_path}/a b/' '{directory}' --format=safetensors"
    assert directory == f"{tmp_path}/a b-safetensors" and search.for_engines(str(options.DEMO)) == (str(options.DEMO), "")


def test_the_last_step_within_the_budget():
    steps = [
        search.search.Step(Schedule(p), (loss,)) for p, loss in (("FFFF", 1.0), ("FFSF", 1.005), ("FSSF", 1.2), ("FSSS", 1.0))
    ]
    assert search.within_budget(steps, 0.01).schedule.pattern == "FFSF"
    assert search.within_budget(steps, 0.0).schedule.pattern == "FFFF"


def test_a_model_larger_than_the_device_is_to_be_streamed(monkeypatch):
    flags.FLAGS(["test"])
    monkeypatch.setattr(memory, "available", lambda: 10_000_000)
    for stream in (False, True):
        monkeypatch.setattr(options, "STREAM", types.SimpleNamespace(value=stream))
        if stream:
            assert isinstance(search.open_model(inputs.Checkpoint(str(options.DEMO), "float32")), search.Streamed)
        else:
            with pytest.raises(ValueError, match="needs .* of each device, there are 0.01 GB; .*; --stream reads"):
                search.open_model(inputs.Checkpoint(str(options.DEMO), "float32"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere"], "nowhere"),
        (["--text=no*such.txt"], "no*such.txt"),
        (["--context=100"], "--context=100: must be above index_topk = 128"),
        (["--sequences=0"], "--sequences=0"),
        (["--blocks=0"], "--blocks=0: must be at least 1"),
        (["--loss_budget=nan"], "--loss_budget=nan: must be at least 0"),
        (["--batch_size=4", "--sequences=6"], "--batch_size=4: does not divide"),
        (["--stream", "--strategy=similarity"], "--strategy=similarity: needs the whole model in memory"),
        (["--blocks=2", "--strategy=floating"], "--blocks=2: --strategy=floating has no blocks"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line_on_stderr(arguments, message, tmp_path):
    done = command(f"--output_dir={tmp_path}/out", *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_shipped_checkpoint_searched_beats_uniform(tmp_path):
    arguments = [f"--output_dir={tmp_path}", "--retentions=1/4", "--sequences=1", "--held_out_sequences=2", "--context=1024"]
    first = command(*arguments)
    assert first.returncode == 0, first.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    losses = {row["name"]: row["held_out_loss"] for row in results["metrics"]["schedules"]}
    assert losses["1/4 searched"] <= losses["1/4 uniform"] and losses["all F"] < 0.7
    assert results["metrics"]["pattern"] in first.stdout
    for name in ("loss.png", "overlap.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for engine in ("transformers", "sglang", "vllm", "tensorrt-llm"):
        assert engine in (tmp_path / "report.md").read_text()

    # Cut the log as a kill would, and resume: the same steps.
    log = tmp_path / search.LOG
    kept = log.read_text().splitlines()[:20]
    log.write_text("\n".join(kept) + '\n{"patt')
    again = command(*arguments, "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["steps"] == results["metrics"]["steps"]


@pytest.mark.slow
def test_a_streamed_search_finds_what_one_in_memory_does(tmp_path):
    arguments = ["--retentions=1/2", "--retention=1/2", "--sequences=2", "--held_out_sequences=1", "--context=400"]
    found = []
    for options_ in (["--stream", "--stream_memory=0"], ["--notime_prefill"]):
        done = command(f"--output_dir={tmp_path}/out", *arguments, *options_)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = json.loads((tmp_path / "out/results.json").read_text())["metrics"]
        losses = [step.pop("loss") for step in metrics["steps"]] + [s.pop("held_out_loss") for s in metrics["schedules"]]
        for measured in (*metrics["steps"], *metrics["schedules"]):
            for name in ("losses", "rivals", "held_out_losses", "change"):
                measured.pop(name, None)
        found.append((losses, [list(step.pop("candidates").values()) for step in metrics["steps"]], metrics))
    (streamed, flips, rest), (in_memory, flips_in_memory, rest_in_memory) = found
    assert streamed == pytest.approx(in_memory, abs=1e-6) and rest == rest_in_memory
    for one, other in zip(flips, flips_in_memory, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.slow
def test_ones_own_text_and_a_loss_budget(tmp_path):
    (tmp_path / "docs").mkdir()
    for i, source in enumerate(sorted((ROOT / "indexcache_jax").glob("*.py"))):
        (tmp_path / "docs" / f"{i}.txt").write_bytes(source.read_bytes())
    arguments = [
        "--text=docs/*.txt",
        "--held_out=docs/0.txt",
        "--loss_budget=0.05",
        "--output_dir=out",
        "--retentions=1/2",
    ]
    done = command(*arguments, "--sequences=1", "--held_out_sequences=1", "--context=512", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "out/results.json").read_text())["metrics"]
    allowed = 1.05 * metrics["steps"][0]["loss"]
    losses = [s["loss"] for s in metrics["steps"]]
    chosen = [s["pattern"] for s in metrics["steps"]].index(metrics["pattern"])
    assert all(loss <= allowed for loss in losses[: chosen + 1])
    assert chosen > 0 and (chosen + 1 == len(losses) or losses[chosen + 1] > allowed)
