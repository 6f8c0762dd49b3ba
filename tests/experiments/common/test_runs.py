"""Training runs that are stopped and resumed, what they write, and what they measure before they begin."""

import contextlib
import dataclasses
import json
import re
import shutil
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments.common import runs
from experiments.common.report import Output
from experiments.common.runs import Saving, TrainingRun
from indexcache_jax import training
from indexcache_jax.distill import traced_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

CASE = Case(GLM_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 2, "vocab_size": 258}, "FS", 0)
TOKENS = np.random.default_rng(0).integers(0, 256, 2000).astype(np.int32)
WARMUP = Stage("warm-up", "warmup", 3, 1, 24, 0.0, 1e-2, lr_warmup_steps=1, compute_dtype="float32")
SPARSE = Stage("sparse", "sparse", 3, 1, 24, 1e-3, 1e-2, lr_warmup_steps=1, compute_dtype="float32")


def trained(
    output, stages=(WARMUP, SPARSE), resume=False, seed=0, tokens=TOKENS, params=None, case=CASE, traced=None, **saving
):
    params = case.params if params is None else params
    run = TrainingRun(tokens, stages, case.config, case.schedule, seed, traced)
    saving = Saving(**({"every": 2, "keep": 2, "log_every": 1} | saving))
    return runs.train(params, run, Output.create(str(output)), resume=resume, saving=saving)


def train(*arguments, **options):
    return trained(*arguments, **options).params


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(uninterrupted, tmp_path, monkeypatch, stop):
    """Stopped before the first checkpoint, within the first stage's last and right after a stage began."""
    whole, expected = uninterrupted
    real, taken = training.step, []

    def failing(*arguments):
        if len(taken) == stop:
            raise KeyboardInterrupt
        taken.append(1)
        return real(*arguments)

    monkeypatch.setattr(training, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.setattr(training, "step", real)
    params = train(tmp_path, resume=True)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert (tmp_path / runs.LOG).read_text() == (whole / runs.LOG).read_text()
    assert [entry["step"] for entry in runs.read_log(tmp_path)] == list(range(6))


def test_time_is_of_all_processes_but_for_what_a_kill_undid(tmp_path, monkeypatch):
    """Steps take 1 s, and 3 s once resumed. The kill in step 5 undoes step 4; the first step of a process is no rate."""
    real, clock, taken = training.step, [0.0], []
    monkeypatch.setattr(runs, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def timed(*arguments):
        if len(taken) == 5:
            taken.append("killed")
            raise KeyboardInterrupt
        taken.append("step")
        clock[0] += 3.0 if "killed" in taken else 1.0
        return real(*arguments)

    monkeypatch.setattr(training, "step", timed)
    stages = [dataclasses.replace(WARMUP, steps=8)]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stages)
    for _ in range(2):  # the second finds it finished
        found = trained(tmp_path, stages, resume=True)
        assert found.seconds == 4 * 1.0 + 4 * 3.0
        assert found.tokens_per_second == {"warm-up": (24 / 1.0 + 24 / 3.0) / 2}  # the median of three of each


def test_only_the_last_checkpoints_are_kept_and_a_finished_run_is_left_as_it_is(uninterrupted):
    folder, expected = uninterrupted
    assert sorted(int(p.name) for p in (folder / runs.CHECKPOINTS).iterdir() if p.name.isdigit()) == [4, 6]
    again = train(folder, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def torn(folder, how):
    if how == "cut":
        path = largest(folder)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        for path in folder.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    elif how == "without a part":
        shutil.rmtree(folder / "weights")
    else:
        shutil.rmtree(folder / "about")


@pytest.mark.parametrize("how", ["cut", "empty", "without a part", "without what it is about"])
def test_a_torn_newest_checkpoint_is_named_and_an_older_one_goes_on(uninterrupted, tmp_path, capsys, how):
    whole, expected = uninterrupted
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    torn(tmp_path / runs.CHECKPOINTS / "6", how)
    params = train(tmp_path, resume=True)
    assert re.search(r"warning: .*training/6: cannot be read .*; going on from step 4", capsys.readouterr().out)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert (tmp_path / runs.LOG).read_text() == (whole / runs.LOG).read_text()
    again = train(tmp_path, resume=True)  # from a checkpoint of its last step, which it has written again
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    assert not capsys.readouterr().out


def test_where_no_checkpoint_is_whole_the_newest_is_named(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    for step in ("4", "6"):
        torn(tmp_path / runs.CHECKPOINTS / step, "empty")
    with pytest.raises(ValueError, match=r"training/6: cannot be read .*, nor an older one; choose another --output_dir"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(resume=False), "--resume goes on with it"),
        (dict(seed=1), "another seed"),
        (
            dict(stages=(WARMUP, dataclasses.replace(SPARSE, model_learning_rate=1.0))),
            rf"another stages\[1\]\.model_learning_rate: {SPARSE.model_learning_rate!r} there, 1\.0 here",
        ),
        (dict(params=jax.tree.map(lambda a: 2 * a, CASE.params)), "another weights"),
        (dict(tokens=TOKENS[:-1]), "another tokens"),
        (dict(tokens=TOKENS[::-1]), "another tokens"),
        (dict(traced=traced_schedule(Schedule("FF"))), r"another traced schedule: '\(missing\)' there"),
    ],
)
def test_another_run_is_not_continued(uninterrupted, change, message):
    with pytest.raises(ValueError, match=message):
        train(uninterrupted[0], **({"resume": True} | change))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    """The rate explodes in step 3."""
    wild = dataclasses.replace(SPARSE, model_learning_rate=1e30, weight_decay=0.0, clip_norm=1e30)
    with pytest.raises(ValueError, match=r"sparse: step (4|5) is not finite \(language nan.*keeps the last good state"):
        train(tmp_path, (WARMUP, wild), every=1)
    steps = [entry["step"] for entry in runs.read_log(tmp_path)]
    saved = sorted(int(p.name) for p in (tmp_path / runs.CHECKPOINTS).iterdir() if p.name.isdigit())
    assert steps == list(range(len(steps))) and saved[-1] == len(steps)


@pytest.mark.parametrize("every", [1, None])
def test_weights_that_the_last_step_broke_are_neither_saved_nor_returned(tmp_path, every):
    """Step 3 has a rate of 0; after step 4, whose loss and gradient are finite, decay alone is beyond float32."""
    wild = dataclasses.replace(SPARSE, steps=2, model_learning_rate=1e30, weight_decay=1e20)
    message = r"sparse: the weights after step 4 are not finite \(\.attention\.\w+, the first of \d+\)"
    kept = "" if every is None else ".*training keeps the last good state"
    with pytest.raises(ValueError, match=f"{message}{kept}$"):
        train(tmp_path, (WARMUP, wild), every=every)
    assert [entry["step"] for entry in runs.read_log(tmp_path)] == list(range(5))
    if every is not None:
        saved = [int(p.name) for p in (tmp_path / runs.CHECKPOINTS).iterdir() if p.name.isdigit()]
        assert max(saved) == 4


@pytest.mark.parametrize("every", [2, None])
def test_a_run_without_checkpoints_promises_none(tmp_path, every):
    broken = jax.tree.map(lambda a: a * jnp.nan, CASE.params)
    with pytest.raises(ValueError, match=r"step 0 is not finite \([^)]*\)$"):
        train(tmp_path, params=broken, every=every)


def test_a_stage_without_steps_is_left_out(tmp_path):
    with_one = train(tmp_path / "one", (dataclasses.replace(SPARSE, steps=0), WARMUP))
    jax.tree.map(np.testing.assert_array_equal, with_one, train(tmp_path / "none", (WARMUP,)))


def test_a_run_for_a_schedule_given_as_data_is_resumed_for_that_schedule_alone(tmp_path):
    case, traced = Case(CASE.fields, "FF", 0), traced_schedule(CASE.schedule)
    first = train(tmp_path, (WARMUP,), case=case, traced=traced)
    again = train(tmp_path, (WARMUP,), case=case, traced=traced, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    with pytest.raises(ValueError, match=r"another traced schedule\.full\[1\]: False there, True here"):
        train(tmp_path, (WARMUP,), case=case, traced=traced_schedule(case.schedule), resume=True)


def scalars(folder):
    """(step, name, value) of the event files, their records taken apart: length, checksum, event, checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return found


def test_tensorboard_gets_what_the_log_gets(uninterrupted):
    folder, _ = uninterrupted
    logged = [(e["step"], name, np.float32(e[name])) for e in runs.read_log(folder) for name in training.METRICS]
    assert [(step, name, np.float32(value)) for step, name, value in scalars(folder)] == logged


def test_a_log_cut_off_in_a_line_is_taken_up_at_the_step(tmp_path):
    lines = [json.dumps({"step": i, "stage": "s", "language": 1.0}) + "\n" for i in range(4)]
    (tmp_path / runs.LOG).write_text("".join(lines) + '{"step": 4, "sta')
    with runs.Metrics(tmp_path, 3) as metrics:
        metrics.write(3, "s", {"language": 2.0})
    assert [(e["step"], e["language"]) for e in runs.read_log(tmp_path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_rates_leave_compilation_out(tmp_path):
    found = trained(tmp_path, [WARMUP], every=500)
    assert set(found.tokens_per_second) == {"warm-up"} and found.tokens_per_second["warm-up"] > 0


def test_a_run_without_checkpoints_ends_where_one_with_them_does(uninterrupted, tmp_path):
    whole, expected = uninterrupted
    params = train(tmp_path, every=None)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert (tmp_path / runs.LOG).read_text() == (whole / runs.LOG).read_text()
    assert not (tmp_path / runs.CHECKPOINTS).exists()


def test_a_stage_of_any_length_finds_its_step_compiled(caplog):
    stage, before = dataclasses.replace(WARMUP, context=20), jax.tree.map(np.asarray, CASE.params)
    longer = dataclasses.replace(stage, steps=7, name="longer")

    def compilations():
        caplog.clear()
        jax.config.update("jax_log_compiles", True)  # the context manager would miss other threads
        with caplog.at_level("WARNING"):
            yield
        jax.config.update("jax_log_compiles", False)
        found.append(sum("Finished XLA compilation of jit(step)" in record.getMessage() for record in caplog.records))

    found: list[int] = []
    for action in (
        lambda: runs.compile_steps([stage], CASE.config, CASE.schedule),
        lambda: runs.seconds_per_step(CASE.params, longer, CASE.config, CASE.schedule),
    ):
        with contextlib.contextmanager(compilations)():
            action()
    assert found == [1, 0]
    jax.tree.map(np.testing.assert_array_equal, CASE.params, before)


def test_a_step_that_is_not_finite_is_found_before_the_run():
    broken = jax.tree.map(lambda a: a * jnp.nan, CASE.params)
    with pytest.raises(ValueError, match="warm-up: a step on random tokens is not finite"):
        runs.seconds_per_step(broken, dataclasses.replace(WARMUP, context=20), CASE.config, CASE.schedule)


def test_stages_are_cut_to_their_share_of_the_time():
    stages = [dataclasses.replace(WARMUP, steps=n) for n in (100, 10, 1000)]
    costs = [1.0, 1.0, 0.1]

    def fitted(seconds):
        return [stage.steps for stage in runs.fit(stages, costs, (0.5, 0.25, 0.25), seconds)]

    assert fitted(1000) == [100, 10, 1000]
    assert fitted(40) == [20, 10, 100]
    assert fitted(100) == [60, 10, 300]  # the second needs 10 of its 25 s, and the others share the rest as 2 to 1
    assert fitted(0) == fitted(-5) == [1, 1, 1]
