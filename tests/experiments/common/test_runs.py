"""Data, the optimiser step, and runs that are stopped and resumed."""

import contextlib
import dataclasses
import json
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments.common import data
from experiments.common import runs as training
from experiments.common.report import Output
from experiments.common.runs import Saving, Stage
from indexcache_jax.distill import roles_of
from indexcache_jax.params import with_schedule
from tests.support.tiny_models import GLM_FIELDS, Case

CASE = Case(GLM_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 2, "vocab_size": 258}, "FS", 0)
WITH_EXPERTS = Case(GLM_FIELDS | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 258}, "F", 0)
TOKENS = np.random.default_rng(0).integers(0, 256, 2000).astype(np.int32)
WARMUP = Stage("warm-up", "warmup", 3, 1, 24, 0.0, 1e-2, ramp=1, compute_dtype="float32")
SPARSE = Stage("sparse", "sparse", 3, 1, 24, 1e-3, 1e-2, ramp=1, compute_dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def take_steps(stage, tokens, case=CASE):
    config, schedule = case.config, case.schedule
    params = jax.tree.map(jnp.copy, case.params)
    state = training.start(params, stage, config, schedule)
    metrics = []
    for rows in tokens:
        params, state, found = training.step(params, state, jnp.asarray(rows), config, schedule, stage)
        metrics.append(np.asarray(found))
    return params, state, np.array(metrics)


def batches(stage, count):
    rows = data.Rows(TOKENS, stage.context, (0,))
    return [rows.batch(i * stage.sequences, stage.sequences).reshape(stage.accumulate, stage.rows, -1) for i in range(count)]


def changed(params, case=CASE):
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, case.params)
    return {jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal}


def test_the_warm_up_changes_indexers_alone_and_keeps_state_for_them_alone():
    params, state, metrics = take_steps(WARMUP, batches(WARMUP, 3))
    assert changed(params) == {f".indexer.{name}" for name in ("queries", "keys", "key_norm", "key_norm_bias", "head_weights")}
    trained = sum(leaf.size for leaf in jax.tree.leaves(CASE.params.indexer))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * trained + 20
    assert np.isfinite(metrics).all()


def test_the_sparse_stage_changes_everything_but_the_routers_bias():
    case = WITH_EXPERTS
    params, _, _ = take_steps(SPARSE, batches(SPARSE, 2), case)
    every = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert changed(params, case) == every - {".moe.router_bias"}


def test_the_two_rates_are_apart_and_balancing_is_by_rule():
    still = dataclasses.replace(SPARSE, model_rate=0.0, balance_speed=0.1)
    params, _, _ = take_steps(still, batches(SPARSE, 1), WITH_EXPERTS)
    assert {name.split(".")[1] for name in changed(params, WITH_EXPERTS)} == {"moe"}  # the rates start from 0
    np.testing.assert_allclose(jnp.abs(params.moe.router_bias - WITH_EXPERTS.params.moe.router_bias).max(), 0.1, atol=1e-6)
    params, _, _ = take_steps(still, batches(SPARSE, 2), WITH_EXPERTS)
    assert {name for name in changed(params, WITH_EXPERTS) if "indexer" not in name} == {".moe.router_bias"}


def test_accumulated_rows_are_one_batch():
    whole = dataclasses.replace(WARMUP, rows=4)
    parts = dataclasses.replace(WARMUP, rows=2, accumulate=2)
    (_, state, one), (_, other_state, other) = take_steps(whole, batches(whole, 1)), take_steps(parts, batches(parts, 1))
    np.testing.assert_allclose(one[:, [0, 1, 3]], other[:, [0, 1, 3]], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):  # Adam's means of the gradients
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(jnp.asarray(a)).max()))


def test_training_lowers_the_divergence():
    stage = dataclasses.replace(WARMUP, steps=30, rows=2)
    _, _, metrics = take_steps(stage, batches(stage, 30))
    assert metrics[-5:, 1].mean() < 0.9 * metrics[:5, 1].mean()


def trained(output, stages=(WARMUP, SPARSE), resume=False, seed=0, tokens=TOKENS, params=CASE.params, **saving):
    return training.train(
        params,
        tokens,
        stages,
        CASE.config,
        CASE.schedule,
        Output.create(str(output)),
        seed=seed,
        resume=resume,
        saving=Saving(**({"every": 2, "keep": 2, "log_every": 1} | saving)),
    )


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
    assert (tmp_path / training.LOG).read_text() == (whole / training.LOG).read_text()
    assert [entry["step"] for entry in training.read_log(tmp_path)] == list(range(6))


def test_time_is_of_all_processes_but_for_what_a_kill_undid(tmp_path, monkeypatch):
    """Steps take 1 s, and 3 s once resumed. The kill in step 5 undoes step 4; the first step of a process is no rate."""
    real, clock, taken = training.step, [0.0], []
    monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

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
    assert sorted(int(p.name) for p in (folder / training.CHECKPOINTS).iterdir() if p.name.isdigit()) == [4, 6]
    again = train(folder, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(resume=False), "--resume goes on with it"),
        (dict(seed=1), "another seed"),
        (
            dict(stages=(WARMUP, dataclasses.replace(SPARSE, model_rate=1.0))),
            rf"another stages\[1\]\.model_rate: {SPARSE.model_rate!r} there, 1\.0 here",
        ),
        (dict(params=jax.tree.map(lambda a: 2 * a, CASE.params)), "another weights"),
        (dict(tokens=TOKENS[:-1]), "another tokens"),
        (dict(tokens=TOKENS[::-1]), "another tokens"),
    ],
)
def test_another_run_is_not_continued(uninterrupted, change, message):
    with pytest.raises(ValueError, match=message):
        train(uninterrupted[0], **({"resume": True} | change))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    """The rate explodes in step 3."""
    wild = dataclasses.replace(SPARSE, model_rate=1e30, weight_decay=0.0, clip=1e30)
    with pytest.raises(ValueError, match=r"sparse: step (4|5) is not finite \(language nan.*keeps the last good state"):
        train(tmp_path, (WARMUP, wild), every=1)
    steps = [entry["step"] for entry in training.read_log(tmp_path)]
    saved = sorted(int(p.name) for p in (tmp_path / training.CHECKPOINTS).iterdir() if p.name.isdigit())
    assert steps == list(range(len(steps))) and saved[-1] == len(steps)


@pytest.mark.parametrize("every", [1, None])
def test_weights_that_the_last_step_broke_are_neither_saved_nor_returned(tmp_path, every):
    """Step 3 has a rate of 0; after step 4, whose loss and gradient are finite, decay alone is beyond float32."""
    wild = dataclasses.replace(SPARSE, steps=2, model_rate=1e30, weight_decay=1e20)
    message = r"sparse: the weights after step 4 are not finite \(\.attention\.\w+, the first of \d+\)"
    kept = "" if every is None else ".*training keeps the last good state"
    with pytest.raises(ValueError, match=f"{message}{kept}$"):
        train(tmp_path, (WARMUP, wild), every=every)
    assert [entry["step"] for entry in training.read_log(tmp_path)] == list(range(5))
    if every is not None:
        saved = [int(p.name) for p in (tmp_path / training.CHECKPOINTS).iterdir() if p.name.isdigit()]
        assert max(saved) == 4


@pytest.mark.parametrize("every", [2, None])
def test_a_run_without_checkpoints_promises_none(tmp_path, every):
    broken = jax.tree.map(lambda a: a * jnp.nan, CASE.params)
    with pytest.raises(ValueError, match=r"step 0 is not finite \([^)]*\)$"):
        train(tmp_path, params=broken, every=every)


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
    logged = [(e["step"], name, np.float32(e[name])) for e in training.read_log(folder) for name in training.METRICS]
    assert [(step, name, np.float32(value)) for step, name, value in scalars(folder)] == logged


def test_a_log_cut_off_in_a_line_is_taken_up_at_the_step(tmp_path):
    lines = [json.dumps({"step": i, "stage": "s", "language": 1.0}) + "\n" for i in range(4)]
    (tmp_path / training.LOG).write_text("".join(lines) + '{"step": 4, "sta')
    metrics = training.Metrics(tmp_path, 3)
    metrics.write(3, "s", {"language": 2.0})
    metrics.close()
    assert [(e["step"], e["language"]) for e in training.read_log(tmp_path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_flops_count_what_a_token_needs():
    """Against products counted one by one."""
    case = Case(GLM_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}, "FS", 0)
    s, k = 24, 8
    attended = {"dense": sum(range(1, s + 1)) / s, "sparse": sum(min(i, k) for i in range(1, s + 1)) / s}
    # Per layer: queries down and up, latents down, keys and values up, output; then logits and values of attended keys.
    layer = 64 * 48 + 48 * 4 * 40 + 64 * 48 + 32 * 4 * (24 + 20) + 4 * 20 * 64
    pair = 4 * (40 + 20)
    mlps = 3 * 64 * 128 + 3 * 64 * 32 * (2 + 1) + 64 * 8
    head = 64 * 97
    indexer, score = 48 * 16 * 32 + 64 * 32 + 64 * 16, 16 * 32 + 16

    def model(keys):
        return 2 * (layer + pair * keys) + mlps + head

    def count(stage):
        return training.flops_per_token(case.config, case.schedule, stage) / 2

    dense = dataclasses.replace(WARMUP, kind="dense")
    assert count(dense) == pytest.approx(3 * model(attended["dense"]))
    expected = model(attended["dense"]) + 2 * indexer + 3 * 2 * score * attended["dense"]
    assert count(WARMUP) == pytest.approx(expected)
    expected = 3 * model(attended["sparse"]) + 2 * indexer + 3 * 2 * score * attended["sparse"] + score * attended["dense"]
    assert count(SPARSE) == pytest.approx(expected)


def test_rates_leave_compilation_out(tmp_path):
    found = training.train(
        CASE.params,
        TOKENS,
        [WARMUP],
        CASE.config,
        CASE.schedule,
        Output.create(str(tmp_path)),
        seed=0,
        resume=False,
        saving=Saving(log_every=1),
    )
    assert set(found.tokens_per_second) == {"warm-up"} and found.tokens_per_second["warm-up"] > 0


def test_the_rate_is_optaxs_warm_up_and_cosine():
    for steps in (1, 3, 40, 1000):
        ramp = max(1, min(WARMUP.ramp, steps // 5))
        expected = optax.warmup_cosine_decay_schedule(0.0, 2.0, ramp, max(steps, ramp + 1), 2.0 * WARMUP.final)
        found = training.rate(WARMUP, 2.0, jnp.int32(steps))
        counts = np.unique(np.linspace(0, steps - 1, 20).astype(int))
        np.testing.assert_allclose([found(i) for i in counts], [expected(i) for i in counts], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def all_full():
    return Case(CASE.fields, "FF", 0)


@pytest.mark.parametrize("stage", [WARMUP, SPARSE], ids=["warm-up", "sparse"])
def test_a_schedule_as_data_trains_as_one_compiled_in(stage, all_full):
    rows = jnp.asarray(batches(stage, 1)[0])
    expected, expected_state, expected_metrics = take_steps(stage, [rows] * 2)
    params, state = (
        jax.tree.map(jnp.copy, all_full.params),
        training.start(all_full.params, stage, CASE.config, all_full.schedule),
    )
    roles = roles_of(CASE.schedule)
    for _ in range(2):
        length = jnp.int32(stage.steps)
        arguments = CASE.config, all_full.schedule, stage.program, length, roles
        params, state, metrics = training.step(params, state, rows, *arguments)
    np.testing.assert_allclose(metrics, expected_metrics[-1], rtol=1e-4)
    kept = with_schedule(params, all_full.schedule, CASE.schedule)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, expected)


def test_a_run_without_checkpoints_ends_where_one_with_them_does(uninterrupted, tmp_path):
    whole, expected = uninterrupted
    params = train(tmp_path, every=None)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert (tmp_path / training.LOG).read_text() == (whole / training.LOG).read_text()
    assert not (tmp_path / training.CHECKPOINTS).exists()


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
        lambda: training.compile_steps([stage], CASE.config, CASE.schedule),
        lambda: training.seconds_per_step(CASE.params, longer, CASE.config, CASE.schedule),
    ):
        with contextlib.contextmanager(compilations)():
            action()
    assert found == [1, 0]
    jax.tree.map(np.testing.assert_array_equal, CASE.params, before)


def test_a_step_that_is_not_finite_is_found_before_the_run():
    broken = jax.tree.map(lambda a: a * jnp.nan, CASE.params)
    with pytest.raises(ValueError, match="warm-up: a step on random tokens is not finite"):
        training.seconds_per_step(broken, dataclasses.replace(WARMUP, context=20), CASE.config, CASE.schedule)


def test_stages_are_cut_to_their_share_of_the_time():
    stages = [dataclasses.replace(WARMUP, steps=n) for n in (100, 10, 1000)]
    costs = [1.0, 1.0, 0.1]

    def fitted(seconds):
        return [stage.steps for stage in training.fit(stages, costs, (0.5, 0.25, 0.25), seconds)]

    assert fitted(1000) == [100, 10, 1000]
    assert fitted(40) == [20, 10, 100]
    assert fitted(100) == [60, 10, 300]  # the second needs 10 of its 25 s, and the others share the rest as 2 to 1
    assert fitted(0) == fitted(-5) == [1, 1, 1]
