"""`--experiment=distill`: killed and resumed, and the checkpoint that it writes."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints_convert
from checkpoints_convert.safetensors_io import read_header
from experiments import distill, run  # noqa: F401  (run defines flags that every experiment has)
from experiments.common import indexer_runs, inputs, runs
from experiments.distill import everything, export, goal
from indexcache_jax import forward
from indexcache_jax.params import with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage
from tests.support import command_flags
from tests.support.tiny_models import GLM_FIELDS, Case

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 2, "vocab_size": 258, "eos_token_id": 256}
BASE = Case(FIELDS, "FFF", 0)
TARGET = Case(FIELDS, "FSF", 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    checkpoints_convert.save(folder, BASE.params, BASE.config, BASE.schedule)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for i in range(5):
        (folder / f"{i}.txt").write_bytes(rng.integers(97, 123, 800).astype(np.uint8).tobytes())
    return folder


def trained_indexers():
    """Params for the target schedule whose indexers, and nothing else, have moved."""
    params = with_schedule(BASE.params, BASE.schedule, TARGET.schedule)
    return dataclasses.replace(params, indexer=jax.tree.map(lambda a: 1.25 * a + 0.01, params.indexer))


def test_the_export_is_the_checkpoint_with_the_schedule_and_its_indexers(checkpoint, tmp_path):
    params = trained_indexers()
    export.write(tmp_path / "out", params, params, BASE.config, TARGET.schedule, checkpoint)
    config, schedule, found = checkpoints_convert.load(tmp_path / "out")
    assert schedule == TARGET.schedule and config == BASE.config
    jax.tree.map(np.testing.assert_array_equal, found, params)
    _, _, before = checkpoints_convert.load(checkpoint)
    for name in ("embedding", "attention", "moe", "final_norm"):  # what the warm-up leaves alone
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), getattr(before, name))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["indexer_types"] == ["full", "shared", "full"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("link", [True, False])
def test_where_indexers_alone_train_the_export_is_links_or_copies_beside_them(checkpoint, tmp_path, link):
    params = trained_indexers()
    export.write(tmp_path / "out", params, params, BASE.config, TARGET.schedule, checkpoint, link)
    jax.tree.map(np.testing.assert_array_equal, checkpoints_convert.load(tmp_path / "out")[2], params)
    assert [path.is_symlink() for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [link, False]


@pytest.mark.parametrize("steps, rate, expected", [(0, 1e-5, True), (5, 0.0, True), (5, 1e-5, None)])
def test_links_are_for_runs_that_train_indexers_alone(checkpoint, tmp_path, monkeypatch, steps, rate, expected):
    stages = [Stage("warm-up", "warmup", 3, 1, 24, 0.0, 1e-3), Stage("sparse", "sparse", steps, 1, 24, rate, 1e-3)]
    monkeypatch.setattr(export, "EXPORT", types.SimpleNamespace(value="linked"))
    if expected:
        assert export.link_or_copy(stages, str(checkpoint)) is True
        checkpoints_convert.convert(checkpoint, tmp_path / "orbax")
        with pytest.raises(ValueError, match="--export=linked: .*orbax checkpoint"):
            export.link_or_copy(stages, str(tmp_path / "orbax"))
    else:
        with pytest.raises(ValueError, match="--export=linked: the sparse stage trains all weights"):
            export.link_or_copy(stages, str(checkpoint))
    monkeypatch.setattr(export, "EXPORT", types.SimpleNamespace(value="full"))
    assert export.link_or_copy(stages, str(checkpoint)) is (False if expected else None)


def test_a_checkpoint_is_not_replaced_by_what_is_made_of_it(tmp_path):
    source, output = tmp_path / "out" / "checkpoint", export.Output(tmp_path / "out")
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    with command_flags.given("--resume"):
        for given in (source, tmp_path / "link"):
            with pytest.raises(ValueError, match=f"--checkpoint={given} would be replaced"):
                export.check_free(output, str(given))
        export.check_free(output, str(tmp_path))


def test_the_export_keeps_the_dtypes_of_the_checkpoint(tmp_path, checkpoint):
    params = trained_indexers()
    like = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    export.write(tmp_path / "out", params, like, BASE.config, TARGET.schedule, checkpoint)
    found = checkpoints_convert.load(tmp_path / "out")[2]
    assert found.indexer.keys.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.attention.out, like.attention.out)


def test_only_the_warm_up_trains_on_a_base_in_8_bits(checkpoint, tmp_path):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    checkpoints_convert.convert(checkpoint, tmp_path / "fp8", format="safetensors", weights="fp8")
    given = inputs.Checkpoint(str(tmp_path / "fp8"), "float32")
    with flagsaver.flagsaver(sparse_steps=0):
        assert everything.form_to_train(given) == "fp8 base"
        assert everything.form_to_train(inputs.Checkpoint(str(checkpoint), "float32")) is None
    with flagsaver.flagsaver(sparse_steps=1):
        assert everything.form_to_train(given) is None
    asked = inputs.Checkpoint(str(checkpoint), "float32")
    with (
        flagsaver.flagsaver(sparse_steps=1, weights="fp8"),
        pytest.raises(ValueError, match="--weights=fp8: only with --sparse"),
    ):
        everything.form_to_train(asked)


def test_transformers_computes_the_same_from_the_export(checkpoint, tmp_path):
    pytest.importorskip("torch", reason="the oracle needs torch")
    pytest.importorskip("transformers", reason="the oracle needs transformers")
    from tests.support import oracle

    params = trained_indexers()
    export.write(tmp_path / "out", params, params, BASE.config, TARGET.schedule, checkpoint)
    logits, indices = oracle.record(oracle.load(tmp_path / "out"), TARGET)
    ours = np.asarray(forward(params, TARGET.tokens, BASE.config, TARGET.schedule))
    assert len(indices) == 2
    np.testing.assert_allclose(ours, logits, atol=5e-5, rtol=0)
    untrained = np.asarray(
        forward(with_schedule(BASE.params, BASE.schedule, TARGET.schedule), TARGET.tokens, BASE.config, TARGET.schedule)
    )
    assert np.abs(untrained - ours).max() > 1e-2


def arguments(checkpoint, texts, output, *more):
    flags = {
        "checkpoint": checkpoint,
        "schedule": "FSF",
        "text": f"{texts}/[0-3].txt",
        "held_out": texts / "4.txt",
        "context": 24,
        "held_out_sequences": 2,
        "output_dir": output,
    }
    flags_given = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "experiments.run", "--experiment=distill", *flags_given, *more]


EVERYTHING = "--train=all", "--warmup_steps=30", "--sparse_steps=30", "--save_every=4"


def environment(cache):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # so that every start but the first is quick
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def made(path):
    """How many lines a log has, or how many files a folder."""
    if path.is_dir():
        return len(list(path.iterdir()))
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def kill_at(command, path, counts, options):
    """Starts a command for every count and kills it once it has `made` so much there. How many had not ended by then."""
    kills = 0
    for count in counts:
        process = subprocess.Popen(command, **options)
        while process.poll() is None and made(path) < count:
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return kills


@pytest.mark.slow
def test_killed_again_and_again_it_ends_where_the_uninterrupted_run_ends(checkpoint, texts, tmp_path):
    options = {
        "env": environment(tmp_path / "cache"),
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    whole = subprocess.run(arguments(checkpoint, texts, tmp_path / "whole", *EVERYTHING), timeout=600, **options)
    assert whole.returncode == 0, whole.stderr
    log = tmp_path / "killed" / runs.LOG
    command = arguments(checkpoint, texts, tmp_path / "killed", *EVERYTHING, "--resume")
    # In both stages, and before the first checkpoint.
    kills = kill_at(command, log, (1, 13, 37), options)
    last = subprocess.run(command, timeout=600, **options)
    assert last.returncode == 0, last.stderr
    assert kills >= 2
    assert log.read_text() == (tmp_path / "whole" / runs.LOG).read_text()
    assert len(runs.read_log(tmp_path / "killed")) == 60
    weights = [tmp_path / name / "checkpoint" / "model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found, resumed = (json.loads((tmp_path / name / "results.json").read_text())["metrics"] for name in ("whole", "killed"))
    assert set(resumed["speed"]) == set(found["speed"]) == {"matmul_tflops", "warm-up", "sparse"}  # of all processes
    assert found["pattern"] == "FSF" and set(found["held_out"]) == {"as it came", "the schedule, untrained", "distilled"}
    assert found["held_out"]["distilled"]["indexer"] < found["held_out"]["the schedule, untrained"]["indexer"]
    again = subprocess.run(arguments(checkpoint, texts, tmp_path / "whole", *EVERYTHING), timeout=600, **options)
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1].startswith("error: ") and "--resume" in again.stderr


# ---- indexers of a frozen model


@contextlib.contextmanager
def flags_of(checkpoint, texts, **more):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    given = {
        "checkpoint": str(checkpoint),
        "schedule": ["FSF"],
        "text": f"{texts}/[0-3].txt",
        "held_out": str(texts / "4.txt"),
        "context": 24,
        "sequences": 4,
        "held_out_sequences": 2,
        "steps": 12,
    }
    with flagsaver.flagsaver(**given | more):
        yield


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"context": 8}, "--context=8"),
        ({"schedule": ["FS"]}, "--schedule=FS"),
        ({"schedule": ["FSF", "FFF"]}, "--schedule=FSF,FFF: this experiment takes one"),
        ({"text": "none*.txt"}, r"none\*\.txt"),
        ({"schedule": [], "retention": "2"}, "--retention=2"),
        ({"warmup_steps": 0, "sparse_steps": 0}, "--warmup_steps=0 --sparse_steps=0"),
    ],
)
def test_bad_flags_are_named(checkpoint, texts, tmp_path, wrong, message):
    given = {"train": "all", "warmup_steps": 30, "sparse_steps": 30, "save_every": 4} | wrong
    with flags_of(checkpoint, texts, **given), pytest.raises(ValueError, match=message):
        distill.run(str(tmp_path / "out"), 0)


def stored(folder):
    """The bytes of every tensor of a safetensors directory by name."""
    headers = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: entry.read(0, entry.nbytes).tobytes() for header in headers for name, entry in header.items()}


@pytest.fixture(scope="module")
def trained(checkpoint, texts, tmp_path_factory):
    """The output folder of a run."""
    output = tmp_path_factory.mktemp("trained")
    with flags_of(checkpoint, texts):
        distill.run(str(output), 0)
    return output


def test_only_the_indexers_of_the_schedule_change(checkpoint, trained):
    before, after = stored(checkpoint), stored(trained / "checkpoint")
    indexers = {name for name in before if ".indexer." in name}
    dropped = {name for name in indexers if "layers.1." in name}
    assert len(dropped) == len(indexers) // 3 and after.keys() == before.keys() - dropped
    assert {name for name in after if after[name] != before[name]} == indexers - dropped
    config, schedule, _ = checkpoints_convert.load(trained / "checkpoint")
    assert schedule == TARGET.schedule and config == BASE.config
    assert (trained / "checkpoint" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_report_has_the_losses_of_what_was_written(checkpoint, texts, trained):
    found = json.loads((trained / "results.json").read_text())["metrics"]
    with flags_of(checkpoint, texts):
        sides = inputs.split(f"{texts}/[0-3].txt", str(texts / "4.txt"))
        cuts = inputs.reader(str(checkpoint), BASE.config).draw(sides.held_out, "held_out", 2, 0)
    config, schedule, params = checkpoints_convert.load(trained / "checkpoint")
    logits = np.float64(forward(params, cuts[:, :-1], config, schedule))
    logits -= logits.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(logits, cuts[:, 1:, None], axis=-1)[..., 0]
    expected = np.mean(np.log(np.exp(logits).sum(axis=-1)) - picked, axis=-1)
    np.testing.assert_allclose(found["held_out_losses"]["distilled"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["held_out"]["distilled"], np.mean(expected), rtol=1e-5)
    assert list(found["held_out"]) == ["all F", "the schedule, untrained", "distilled"]
    assert f"vllm serve {trained}/checkpoint --hf-overrides" in (trained / "report.md").read_text()
    for group in found["groups"]:
        assert len(group["divergence"]) == 12 and np.mean(group["divergence"][-4:]) < np.mean(group["divergence"][:4])


def test_a_run_that_reads_the_weights_layer_by_layer_writes_the_same(checkpoint, texts, trained, tmp_path):
    with flags_of(checkpoint, texts, stream=True, stream_memory=0.0, export="linked"):
        distill.run(str(tmp_path / "out"), 0)
    found, expected = (checkpoints_convert.load(folder / "checkpoint")[2] for folder in (tmp_path / "out", trained))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, expected)


def test_with_spans_every_indexer_changes_and_the_schedule_stays(checkpoint, texts, tmp_path):
    for name, more in (("resident", {}), ("streamed", {"stream": True, "export": "linked"})):
        with flags_of(checkpoint, texts, schedule=[], spans=2, **more):
            distill.run(str(tmp_path / name), 0)
    found, streamed = (checkpoints_convert.load(tmp_path / name / "checkpoint") for name in ("resident", "streamed"))
    assert found[:2] == streamed[:2] == (BASE.config, BASE.schedule)
    jax.tree.map(np.testing.assert_array_equal, streamed[2], found[2])
    before, after = stored(checkpoint), stored(tmp_path / "resident" / "checkpoint")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {name for name in before if ".indexer." in name}
    assert f"--experiment=search --checkpoint={tmp_path}/resident/checkpoint" in (tmp_path / "resident/report.md").read_text()
    metrics = json.loads((tmp_path / "resident" / "results.json").read_text())["metrics"]
    assert list(metrics["held_out"]) == ["all F", "distilled"] and [group["layer"] for group in metrics["groups"]] == [0, 1, 2]


def test_indexers_trained_on_a_base_in_8_bits_are_written_in_8_bits(checkpoint, texts, tmp_path):
    checkpoints_convert.convert(checkpoint, tmp_path / "fp8", format="safetensors", weights="fp8")
    with flags_of(tmp_path / "fp8", texts, stream=True):
        distill.run(str(tmp_path / "out"), 0)
    before, after = stored(tmp_path / "fp8"), stored(tmp_path / "out" / "checkpoint")
    changed = {name for name in after if after[name] != before[name]}
    assert changed and all(".indexer." in name for name in changed)
    assert any(name.endswith("wk.weight_scale_inv") for name in changed)
    losses = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["held_out"]
    assert all(0 < loss < 20 for loss in losses.values())


def test_an_orbax_checkpoint_is_written_whole(checkpoint, texts, trained, tmp_path):
    checkpoints_convert.convert(checkpoint, tmp_path / "orbax", format="orbax")
    with flags_of(tmp_path / "orbax", texts):
        distill.run(str(tmp_path / "out"), 0)
    found, expected = (checkpoints_convert.load(folder / "checkpoint") for folder in (tmp_path / "out", trained))
    assert found[:2] == expected[:2]
    jax.tree.map(np.testing.assert_array_equal, found[2], expected[2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup_steps": 5}, "--warmup_steps=5: needs --train=all"),
        ({"model_learning_rate": 0.1}, "--model_learning_rate=0.1: needs --train=all"),
        ({"train": "all", "steps": 5}, "--steps=5: needs --train=indexers"),
        ({"train": "all", "stream": True}, "--stream=True: needs --train=indexers"),
        ({"train": "all", "spans": 2}, "--spans=2: needs --train=indexers"),
        ({"spans": 2, "schedule": ["FSF"]}, "--schedule=FSF: counts for nothing beside --spans=2"),
        ({"mesh": "data=2"}, "--mesh=data=2: needs --train=all"),
        ({"spans": 2, "schedule_from": "out"}, "--schedule_from=out: counts for nothing beside --spans=2"),
        ({"schedule_from": "out", "retention": "1/2"}, "--retention=1/2: counts for nothing beside --schedule_from=out"),
        ({"schedule": ["FSF"], "retention": "1/2"}, "--retention=1/2: counts for nothing beside --schedule=FSF"),
        ({"spans": 2, "cross_layer": False}, "--spans=2: teaches other layers too, so not with --nocross_layer"),
        ({"schedule": ["FS"]}, "--schedule=FS"),
        ({"sequences": 0}, "--sequences=0"),
        ({"sequences": 4000}, "--text: "),
    ],
)
def test_flags_that_do_not_fit_are_named(checkpoint, texts, tmp_path, given, message):
    with flags_of(checkpoint, texts, **given), present(*given), pytest.raises(ValueError, match=message):
        distill.run(str(tmp_path / "out"), 0)
    assert not (tmp_path / "out").exists()


def test_the_schedule_may_be_the_one_that_a_search_chose(checkpoint, texts, tmp_path):
    results = {"experiment": "search", "metrics": {"pattern": "FFS", "schedules": [{"pattern": "FSF"}]}}
    path = tmp_path / "results.json"

    def chosen(**found):
        path.write_text(json.dumps(results | found))
        with flags_of(checkpoint, texts, schedule=[], schedule_from=str(tmp_path)):
            return goal.target_schedule(BASE.schedule)

    assert chosen() == Schedule("FFS")
    with pytest.raises(ValueError, match=f"--schedule_from={tmp_path}: the experiment of .* is 'distill', not 'search'"):
        chosen(experiment="distill")
    with pytest.raises(ValueError, match=r"metrics\.pattern of .*results\.json: None is neither"):
        chosen(metrics={})
    with pytest.raises(ValueError, match="has 2 entries for 3 layers"):
        chosen(metrics={"pattern": "FS"})
    path.unlink()
    with (
        flags_of(checkpoint, texts, schedule_from=str(tmp_path)),
        pytest.raises(ValueError, match="results.json: no such file"),
    ):
        goal.target_schedule(BASE.schedule)


@contextlib.contextmanager
def present(*names):
    """These flags alone count as given on the command line."""
    before = {name: flags.FLAGS[name].present for name in flags.FLAGS}
    for name in before:
        flags.FLAGS[name].present = int(name in names)
    yield
    for name, value in before.items():
        flags.FLAGS[name].present = value


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_where_the_uninterrupted_run_ends(checkpoint, texts, tmp_path):
    options = {
        "env": environment(tmp_path / "cache"),
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    more = "--sequences=4", "--steps=300", "--stream"
    whole = subprocess.run(arguments(checkpoint, texts, tmp_path / "whole", *more), timeout=600, **options)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed" / indexer_runs.FOLDER
    command = arguments(checkpoint, texts, tmp_path / "killed", *more, "--resume")
    kills = kill_at(command, folder, (1, 2, 2, 3), options)  # one file says what the run is about
    last = subprocess.run(command, timeout=600, **options)
    assert last.returncode == 0, last.stderr
    assert kills >= 3
    assert stored(tmp_path / "whole" / "checkpoint") == stored(tmp_path / "killed" / "checkpoint")
    again = subprocess.run(arguments(checkpoint, texts, tmp_path / "whole", *more), timeout=600, **options)
    assert again.returncode == 1 and "--resume" in again.stderr.strip().splitlines()[-1]
