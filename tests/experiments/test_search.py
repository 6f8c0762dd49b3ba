"""`python -m experiments.run`: the search from the command line."""

import json
import os
import pathlib
import subprocess
import sys
import types
from fractions import Fraction

import pytest
from absl import flags

from experiments import search
from experiments.common import inputs, options
from indexcache_jax import memory
from indexcache_jax.schedule import Schedule
from tests.support.loss_tables import Table

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


class Counted(Table):
    """A model whose loss is 1 and what each S layer costs; it knows what it was asked for."""

    def of(self, schedule):
        return 1 + super().of(schedule)

    @property
    def evaluations(self):
        return len(self.known)


COSTS = (9, *(i / 1000 for i in range(1, 12)))


def goal_of(budget=None, blocks=1, retentions=("1/2", "1/4"), target="1/4"):
    return search.Goal([Fraction(r) for r in retentions], Fraction(target), budget, "greedy", blocks)


@pytest.mark.parametrize("blocks", [1, 4, 5])
def test_every_size_that_was_asked_for_is_reached_exactly(blocks):
    """Steps of 4 flips pass 12 to 6 and 3 by; the labels of the table are those of what it holds."""
    base, goal = Schedule.all_full(12), goal_of(blocks=blocks)
    steps = search.search_down(Counted(COSTS), base, goal)
    sizes = {step.schedule.num_full: step.schedule for step in steps}
    assert {6, 3} <= sizes.keys() and steps[-1].schedule.num_full == 3
    assert search.choose(steps, sizes, base, goal).num_full == 3
    named = dict(search.compared(sizes, base, sizes[3], goal))
    assert [named[f"{share} searched"].num_full for share in ("1/2", "1/4")] == [6, 3]


def test_a_loss_budget_ends_the_search_where_it_is_exceeded():
    base = Schedule.all_full(12)
    for budget, full, most in ((0.0, 12, 12), (0.0101, 8, 60), (1.0, 1, 100)):
        model, goal = Counted(COSTS), goal_of(budget)
        steps = search.search_down(model, base, goal)
        assert search.choose(steps, {}, base, goal).num_full == full and model.evaluations <= most
        assert all(step.loss <= 1 + budget for step in steps)


def test_what_a_search_takes_is_what_it_takes():
    base = Schedule.all_full(12)
    for goal in (goal_of(), goal_of(blocks=4), goal_of(retentions=("11/12",), target="11/12")):
        model, counter = Counted(COSTS), search._Counter()
        search.search_down(model, base, goal)
        search.search_down(counter, base, goal)
        assert len(counter.known) == model.evaluations
    text = search.cost(base, goal, 3, 1000, 10**12)
    assert "at most 12 losses on 3 batches of 1,000 tokens" in text and "at least 2 times, 2.0 TB" in text
    assert "weights" not in search.cost(base, goal, 3, 1000, None)


@pytest.fixture
def with_flags():
    def parse(*arguments):
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["test", *arguments])

    parse()
    yield parse
    parse()
    for name in (
        "retention",
        "loss_budget",
        "blocks",
        "compare",
        "context",
        "sequences",
        "held_out_sequences",
        "retentions",
        "dry_run",
    ):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["test"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_budget=0.01", "--retention=1/4"], "--retention=1/4: counts for nothing beside --loss_budget=0.01"),
        (["--blocks=13"], "--blocks=13: the model has 12 layers"),
        (["--compare=FFFF"], "--compare=FFFF: 'FFFF' has 4 entries for 12 layers"),
        (["--compare=SFFFFFFFFFFF"], "starts with a shared layer"),
        (["--compare=FFFFFFFFFFFF"], "layer 11 is F, but the checkpoint has no indexer for it"),
    ],
)
def test_goals_that_cannot_be_are_refused_before_the_search(with_flags, arguments, message):
    with_flags(*arguments)
    with pytest.raises(ValueError, match=message):
        search.read_goal(Schedule("FFFFFFFFFFFS"))


def test_given_patterns_stand_in_the_table(with_flags):
    base = Schedule.all_full(12)
    with_flags("--compare=FSSSSSSSSSSS,FFSSSSSSSSSS")
    goal = search.read_goal(base)
    named = dict(search.compared({}, base, base, goal))
    assert named["1/12 given"].pattern == "FSSSSSSSSSSS" and named["2/12 given"].pattern == "FFSSSSSSSSSS"


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


def test_a_dry_run_checks_and_says_what_it_takes_and_writes_nothing(tmp_path, with_flags, capsys):
    with_flags("--context=130", "--sequences=2", "--dry_run")
    search.run(str(tmp_path / "out"), 0)
    assert "the search measures at most" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_search_reports_its_text_and_what_made_it(tmp_path, with_flags, monkeypatch):
    with_flags("--context=130", "--sequences=1", "--held_out_sequences=2", "--retention=11/12", "--retentions=11/12")
    monkeypatch.setattr(search, "prefill_seconds", lambda checkpoint, schedules, tokens: [None for _ in schedules])
    search.run(str(tmp_path / "out"), 0)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    about = results["metrics"]["text"]
    assert (about["text"], about["tokenizer"], about["calibration_tokens"]) == ("standard-library", "bytes", 130)
    assert about["documents"] > about["held_out_documents"] > 0 and about["held_out_tokens"] == 260
    assert results["date"].endswith("UTC") and "commit" in results
    report = (tmp_path / "out" / "report.md").read_text()
    for words in ("(chosen)", "±", "standard-library", "UTC", "pipeline"):
        assert words in report
