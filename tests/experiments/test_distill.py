"""`--experiment=distill`: killed and resumed, and the checkpoint that it writes."""

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
from experiments import distill
from experiments.common import inputs, runs
from indexcache_jax import forward
from indexcache_jax.params import with_schedule
from indexcache_jax.training import Stage
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
    distill.export(tmp_path / "out", params, params, BASE.config, TARGET.schedule, checkpoint)
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
    distill.export(tmp_path / "out", params, params, BASE.config, TARGET.schedule, checkpoint, link)
    jax.tree.map(np.testing.assert_array_equal, checkpoints_convert.load(tmp_path / "out")[2], params)
    assert [path.is_symlink() for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [link, False]


@pytest.mark.parametrize("steps, rate, expected", [(0, 1e-5, True), (5, 0.0, True), (5, 1e-5, None)])
def test_links_are_for_runs_that_train_indexers_alone(checkpoint, tmp_path, monkeypatch, steps, rate, expected):
    stages = [Stage("warm-up", "warmup", 3, 1, 24, 0.0, 1e-3), Stage("sparse", "sparse", steps, 1, 24, rate, 1e-3)]
    monkeypatch.setattr(distill, "_EXPORT", types.SimpleNamespace(value="linked"))
    if expected:
        assert distill.link_or_copy(stages, str(checkpoint)) is True
        checkpoints_convert.convert(checkpoint, tmp_path / "orbax")
        with pytest.raises(ValueError, match="--export=linked: .*orbax checkpoint"):
            distill.link_or_copy(stages, str(tmp_path / "orbax"))
    else:
        with pytest.raises(ValueError, match="--export=linked: the sparse stage trains all weights"):
            distill.link_or_copy(stages, str(checkpoint))
    monkeypatch.setattr(distill, "_EXPORT", types.SimpleNamespace(value="full"))
    assert distill.link_or_copy(stages, str(checkpoint)) is (False if expected else None)


def test_the_export_keeps_the_dtypes_of_the_checkpoint(tmp_path, checkpoint):
    params = trained_indexers()
    like = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    distill.export(tmp_path / "out", params, like, BASE.config, TARGET.schedule, checkpoint)
    found = checkpoints_convert.load(tmp_path / "out")[2]
    assert found.indexer.keys.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.attention.out, like.attention.out)


def test_only_the_warm_up_trains_on_a_base_in_8_bits(checkpoint, tmp_path):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    checkpoints_convert.convert(checkpoint, tmp_path / "fp8", format="safetensors", weights="fp8")
    given = inputs.Checkpoint(str(tmp_path / "fp8"), "float32")
    with flagsaver.flagsaver(sparse_steps=0):
        assert distill.form_to_train(given) == "fp8 base"
        assert distill.form_to_train(inputs.Checkpoint(str(checkpoint), "float32")) is None
    with flagsaver.flagsaver(sparse_steps=1):
        assert distill.form_to_train(given) is None
    asked = inputs.Checkpoint(str(checkpoint), "float32")
    with (
        flagsaver.flagsaver(sparse_steps=1, weights="fp8"),
        pytest.raises(ValueError, match="--weights=fp8: only with --sparse"),
    ):
        distill.form_to_train(asked)


def test_transformers_computes_the_same_from_the_export(checkpoint, tmp_path):
    pytest.importorskip("torch", reason="the oracle needs torch")
    pytest.importorskip("transformers", reason="the oracle needs transformers")
    from tests.support import oracle

    params = trained_indexers()
    distill.export(tmp_path / "out", params, params, BASE.config, TARGET.schedule, checkpoint)
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
        "warmup_steps": 30,
        "sparse_steps": 30,
        "save_every": 4,
        "output_dir": output,
    }
    flags_given = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "experiments.run", "--experiment=distill", *flags_given, *more]


def environment(cache):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # so that every start but the first is quick
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.mark.slow
def test_killed_again_and_again_it_ends_where_the_uninterrupted_run_ends(checkpoint, texts, tmp_path):
    options = {
        "env": environment(tmp_path / "cache"),
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    whole = subprocess.run(arguments(checkpoint, texts, tmp_path / "whole"), timeout=600, **options)
    assert whole.returncode == 0, whole.stderr
    log = tmp_path / "killed" / runs.LOG
    command = arguments(checkpoint, texts, tmp_path / "killed", "--resume")
    kills = 0
    for lines in (1, 13, 37, 50):  # of the log: before and after stages end, while checkpoints are being written
        process = subprocess.Popen(command, **options)
        while process.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) >= lines):
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
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
    again = subprocess.run(arguments(checkpoint, texts, tmp_path / "whole"), timeout=600, **options)
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1].startswith("error: ") and "--resume" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--context=8", "--context=8"),
        ("--schedule=FS", "--schedule=FS"),
        ("--schedule=FSF,FFF", "--schedule=FSF,FFF: this experiment takes one"),
        ("--text=none*.txt", "none*.txt"),
        ("--retention=2", None),
        ("--warmup_steps=0 --sparse_steps=0", "--warmup_steps=0 --sparse_steps=0"),
    ],
)
def test_bad_flags_are_named(checkpoint, texts, tmp_path, flag, message):
    found = subprocess.run(
        [*arguments(checkpoint, texts, tmp_path / "out"), *(["--schedule="] if message is None else []), *flag.split()],
        env=environment(tmp_path / "cache"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1 and line.startswith("error: ") and (message or "--retention=2") in line
