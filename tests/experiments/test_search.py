"""`python -m experiments.run`: the search from the command line."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from fractions import Fraction

import pytest
from absl import flags

import checkpoints_convert
from experiments import run as _run  # it defines the flags that results.json records
from experiments import search
from experiments.common import inputs, options, search_cost, serving_times
from indexcache_jax import host_memory, memory
from indexcache_jax.config import Config
from indexcache_jax.params import abstract
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import SERVING
from tests.support import command_flags
from tests.support.loss_tables import Table

assert _run.EXPERIMENTS
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
    assert search.compared({12: base}, base, base, goal_of(retentions=("1",), target="1")) == [("all F", base)]


def test_a_loss_budget_ends_the_search_where_it_is_exceeded():
    base = Schedule.all_full(12)
    for budget, full, most in ((0.0, 12, 12), (0.0101, 8, 60), (1.0, 1, 100)):
        model, goal = Counted(COSTS), goal_of(budget)
        steps = search.search_down(model, base, goal)
        assert search.choose(steps, {}, base, goal).num_full == full and model.evaluations <= most
        assert all(step.loss <= 1 + budget for step in steps)


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
        "stream",
        "stream_memory",
        "serving_length",
        "time_prefill",
        "strategy",
        "batch_size",
        "race",
        "text",
        "resume",
    ):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["test"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_budget=0.01", "--retention=1/4"], "--retention=1/4: counts for nothing beside --loss_budget=0.01"),
        (["--blocks=13"], "--blocks=13: the model has 12 layers"),
        (["--strategy=similarity", "--blocks=2"], "--blocks=2: --strategy=similarity measures no losses"),
        (["--strategy=similarity", "--race=0.1"], "--race=0.1: --strategy=similarity measures no losses"),
        (["--stream_memory=5"], "--stream_memory=5.0: needs --stream"),
        (["--notime_prefill", "--serving_length=300"], "--serving_length=300: nothing is timed without --time_prefill"),
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


CONFIG, BASE = inputs.described(str(options.DEMO))


@pytest.mark.parametrize(
    "arguments", [[], ["--blocks=4"], ["--stream"], ["--loss_budget=0"], ["--strategy=floating"], ["--strategy=similarity"]]
)
def test_what_a_search_takes_is_counted_for_every_way_to_search(with_flags, arguments):
    with_flags(*arguments, "--sequences=4", "--batch_size=2", "--held_out_sequences=6")
    goal = search.read_goal(BASE)
    searching, evaluating = search.costs(CONFIG, BASE, goal, "float32")
    table = Counted(COSTS)
    steps = [] if goal.strategy == "similarity" else search.search_down(table, BASE, goal)
    if goal.budget is None:  # which ends this search early
        assert (searching.steps, searching.losses) == (max(0, len(steps) - 1), 2 * table.evaluations)
    else:
        assert (searching.steps, searching.losses) == (11, 2 * (1 + sum(range(1, 12))))
    assert evaluating.losses % 3 == 0 and evaluating.losses >= 3 * 4  # all F, and 1/2, 1/4 and 1/8
    assert searching.layers > 0 and evaluating.passes[-1] == 2 * 12  # the selections on two batches


GLM = Config.from_hf(preset("glm-5"))
READING = 3e9  # bytes a second


def taken_of_glm_5():
    """Steps, losses, readings of the weights, TB of them in 8 bits, hours of an H200, and hours with weights at READING."""
    base, context = Schedule.all_full(GLM.num_layers), options.CONTEXT.value
    searching, evaluating = search.costs(GLM, base, search.read_goal(base), "bfloat16")
    size = memory.tree_bytes(abstract(GLM, base, "fp8"), "bfloat16", memory.mesh_of(), SERVING)
    rate, _ = search_cost.measured(GLM, options.BATCH_SIZE.value, context)
    cost = searching + evaluating
    readings = len(cost.passes)
    hours = [cost.seconds(each) / 3600 for each in (rate, search_cost.Rate(rate.layer, size / READING))]
    return cost.steps, cost.losses, readings, readings * size / 1e12, *hours


def test_the_pages_say_what_searches_of_a_large_model_take(with_flags, monkeypatch):
    """docs/search.md for several commands, and the README for its own, which ends within a working day."""
    monkeypatch.setattr(host_memory, "available", lambda: 2**40)
    table = re.findall(r"^\| `(--[^`]*)` \| (.*) \|$", (ROOT / "docs" / "search.md").read_text(), re.MULTILINE)
    assert len(table) > 3
    for arguments, cells in table:
        with_flags("--stream", *arguments.split())
        steps, losses, readings, size, hours, reading = taken_of_glm_5()
        assert cells.split(" | ") == [
            f"{steps}",
            f"{losses:,}",
            f"{readings:,}",
            f"{size:,.0f}",
            f"{hours:.1f}",
            f"{reading:.1f}",
        ]
    readme = (ROOT / "README.md").read_text().replace("\\\n", "")
    (command_line,) = re.findall(r"^    python -m experiments.run (.*--stream --blocks.*)$", readme, re.MULTILINE)
    with_flags(*(word for word in shlex.split(command_line) if not word.startswith("--checkpoint")))
    _, _, readings, size, hours, reading = taken_of_glm_5()
    words = " ".join(readme.split())
    assert f"at most {hours:.1f} hours of an H200" in words and reading < 8
    assert f"reads the weights {readings} times, {size:.0f} TB" in words


def test_a_search_that_does_not_fit_is_refused_before_weights_are_read(with_flags, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10_000_000)
    with_flags()
    with pytest.raises(ValueError, match="needs .* of each device, there are 0.01 GB.*; --stream reads"):
        search.read_inputs(0)
    with_flags("--stream")
    with pytest.raises(
        ValueError, match=r"needs .*two layers.*hidden states.*; a smaller --context, --batch_size or --stream_m"
    ):
        search.read_inputs(0)


def test_a_length_that_the_model_does_not_reach_is_refused(with_flags):
    with_flags("--serving_length=4097")
    with pytest.raises(ValueError, match="--serving_length=4097: the model's longest is 4096"):
        search.read_inputs(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere"], "nowhere"),
        (["--text=no*such.txt"], "no*such.txt"),
        (["--context=100"], "--context=100: must be above index_topk = 128"),
        (["--sequences=0"], "--sequences=0"),
        (["--blocks=0"], "--blocks=0: must be at least 1"),
        (["--loss_budget=-1"], "--loss_budget=-1.0: must be at least 0"),
        (["--batch_size=4", "--sequences=6"], "--batch_size=4: does not divide"),
        (["--stream", "--strategy=similarity"], "--strategy=similarity: needs the whole model in memory"),
        (["--blocks=2", "--strategy=floating"], "--blocks=2: --strategy=floating has no blocks"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path):
    with command_flags.given(*arguments), pytest.raises(ValueError, match=re.escape(message)):
        search.run(str(tmp_path / "out"), 0)


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
    for options_ in (["--stream", "--stream_memory=0"], []):
        done = command(f"--output_dir={tmp_path}/out", "--notime_prefill", *arguments, *options_)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = json.loads((tmp_path / "out/results.json").read_text())["metrics"]
        losses = [step.pop("loss") for step in metrics["steps"]] + [s.pop("held_out_loss") for s in metrics["schedules"]]
        for measured in (*metrics["steps"], *metrics["schedules"]):
            for name in ("losses", "rivals", "held_out_losses", "change"):
                measured.pop(name, None)
        found.append((losses, [list(step.pop("candidates").values()) for step in metrics["steps"]], metrics))
    (streamed, flips, rest), (in_memory, flips_in_memory, rest_in_memory) = found
    assert streamed == pytest.approx(in_memory, abs=1e-5) and rest == rest_in_memory
    for one, other in zip(flips, flips_in_memory, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


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


def test_a_dry_run_checks_and_says_what_it_takes_and_writes_nothing(tmp_path, with_flags, capsys, monkeypatch):
    """Of the weights it reads the headers alone."""
    monkeypatch.setattr(checkpoints_convert, "load", None)
    monkeypatch.setattr(checkpoints_convert.Layers, "layer", None)
    for arguments in ([], ["--stream"]):
        with_flags("--context=130", "--sequences=2", "--dry_run", *arguments)
        search.run(str(tmp_path / "out"), 0)
        out = capsys.readouterr().out
        assert "the search takes at most 10 steps and measures at most 160 losses on a batch of 1 x 130 tokens" in out
        assert "how long that takes is said once a layer has been timed" in out and "memory of each device" in out
        assert ("reads the weights 13 times, 0.0 TB" in out) == bool(arguments) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_streamed_search_reports_its_text_its_times_and_what_made_it(tmp_path, with_flags, monkeypatch, capsys):
    few = ["--context=130", "--sequences=1", "--held_out_sequences=2", "--retention=11/12", "--retentions=11/12"]
    with_flags(*few, "--stream", "--serving_length=200")
    asked = []

    def timed(models, tokens, steps):
        asked.append((tokens.shape, steps))
        return [(seconds, seconds / 1000) for seconds in (2.0, 5.0, 3.5)]  # an F layer takes 1 s, an S layer 0.5 s

    monkeypatch.setattr(serving_times, "timed", timed)
    search.run(str(tmp_path / "out"), 0)
    assert "at the measured rate" in capsys.readouterr().out
    assert asked == [((1, 200), serving_times.STEPS)] * len(set(CONFIG.moe_layers))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    about = results["metrics"]["text"]
    assert (about["text"], about["tokenizer"], about["calibration_tokens"]) == ("standard-library", "bytes", 130)
    assert about["documents"] > about["held_out_documents"] > 0 and about["held_out_tokens"] == 260
    assert results["date"].endswith("UTC") and "commit" in results
    report = (tmp_path / "out" / "report.md").read_text()
    for words in ("(chosen)", "±", "standard-library", "UTC", "pipeline", "prefill s, estimate", "one request of 200 tokens"):
        assert words in report
    times = [(row["prefill_seconds"], row["decode_step_seconds"], row["estimated"]) for row in results["metrics"]["schedules"]]
    assert times == [(pytest.approx(each), pytest.approx(each / 1000), True) for each in (12.0, 11.5, 11.5)]
    assert "| 11.500 | 1.04x | 11.500 | 1.04x |" in report
