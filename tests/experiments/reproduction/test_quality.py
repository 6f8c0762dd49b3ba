"""The quality experiment: what it measures, and a run of it on a tiny model."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints_convert
from experiments.common import inputs, options
from experiments.reproduction import quality, retrieval
from experiments.reproduction.quality_tables import WAYS
from tests.support.tiny_models import GLM_FIELDS, Case

ROOT = pathlib.Path(__file__).parents[3]
FIELDS = GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 2, "vocab_size": 258, "eos_token_id": 256}
BASE = Case(FIELDS, "FFF", 0)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(retention="none"), "--retention=none"),
        (dict(retentions=["1/2", "0"]), "--retentions=0"),
        (dict(batch_size=2, sequences=2, held_out_sequences=3), "--batch_size=2: does not divide --held_out_sequences=3"),
        (dict(ways=["untrained", "all"]), "--ways: 'all' is not one of 'untrained', 'indexers'"),
        (dict(ways=["untrained", "own", "everything-own"]), "--ways=.*'everything-own' is compared with 'everything'"),
        (dict(retentions=["1/3"], everything_for=["all F", "1/2 uniform"]), "--everything_for: '1/2 uniform' is not one of"),
        (dict(everything_for=["1/2 uniform"]), "--everything_for=1/2 uniform: they are compared with 'all F'"),
        (dict(warmup_steps=0), "--warmup_steps=0: must be at least 1"),
        (dict(beside=["nowhere/results.json"]), "nowhere"),
    ],
)
def test_flags_are_looked_at_before_anything_takes_long(given, message):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**given), pytest.raises(ValueError, match=message):
        quality.check_flags()
        quality.overlaps_beside()
    quality.check_flags()


def test_a_context_that_the_model_does_not_reach_is_named_before_weights_are_read(monkeypatch):
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(checkpoints_convert, "load", None)
    with flagsaver.flagsaver(context=4097), pytest.raises(ValueError, match="--context=4097: must be above index_topk"):
        quality.load(inputs.Checkpoint(str(options.DEMO), "float32"))


def test_rows_come_for_all_seeds_before_those_that_train_everything():
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(retentions=["1/2"], everything_for=["all F", "1/2 uniform", "1/2 greedy"]):
        found = list(quality.jobs([0, 1]))
        assert quality.names_of("own") == ["1/2 uniform", "1/2 greedy", "1/2 floating", "1/2 similarity"]
    ways = [way for way, _, _ in found]
    assert ways == [
        *["untrained"] * 10,
        *(["indexers"] * 5 + ["own"] * 4 + ["once"] * 5) * 2,
        *["everything"] * 6,
        *["everything-own"] * 2,
    ]
    assert found[-8:-4] == [("everything", seed, name) for name in ("all F", "1/2 uniform") for seed in (0, 1)]
    assert len(set(found)) == len(found)


def arguments(tmp_path, **changes):
    """The command line of a whole run in small."""
    checkpoints_convert.save(tmp_path / "base", BASE.params, BASE.config, BASE.schedule)
    rng = np.random.default_rng(0)
    for folder in ("code", "prose"):
        (tmp_path / folder).mkdir()
        for i in range(24):
            (tmp_path / folder / f"{i}.txt").write_bytes(rng.integers(97, 101, 1500).astype(np.uint8).tobytes())
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "results.json").write_text('{"metrics": {"overlap": {"adjacent": 0.875, "all pairs": 0.75}}}')
    given = {
        "experiment": "quality",
        "checkpoint": tmp_path / "base",
        "text": tmp_path / "code" / "*.txt",
        "other_text": tmp_path / "prose" / "*.txt",
        "output_dir": tmp_path / "out",
        "context": 200,
        "sequences": 2,
        "held_out_sequences": 1,
        "retentions": "2/3,1/3",
        "retention": "2/3",
        "everything_for": "all F,2/3 uniform",
        "seeds": 2,
        "retrieval_prompts": 2,
        "retrieval_together": 2,
        "ngram_order": 3,
        "long_range": 20,
        "training_sequences": 2,
        "most_span": 2,
        "warmup_steps": 2,
        "sparse_steps": 2,
        "woven": 0.5,
        "beside": tmp_path / "deeper" / "results.json",
    }
    return [f"--{name}={value}" for name, value in (given | changes).items()]


@pytest.mark.slow
def test_a_run_in_small(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "experiments.run", *arguments(tmp_path)]

    def run(*more):
        found = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
        assert found.returncode == 0, found.stderr[-3000:]
        return found.stdout

    stdout = run("--time_limit=1")  # reads and compiles, and has no time for a row
    assert (
        "no time was left for" in stdout
        and json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["rows"] == {}
    )
    run("--resume")
    results = (tmp_path / "out" / "results.json").read_text()
    rows = json.loads(results)["metrics"]["rows"]
    names = ["all F"] + [f"{share} {kind}" for share in ("2/3", "1/3") for kind in quality.KINDS]
    assert {way: list(of_way) for way, of_way in rows.items()} == {
        "untrained": names,
        "indexers": names,
        "own": names[1:],
        "once": names,
        "everything": ["all F", "2/3 uniform"],
        "everything-own": ["2/3 uniform"],
    }
    for of_way in rows.values():
        for name, entries in of_way.items():
            for entry in entries.values():
                assert set(entry) == {"pattern", "loss", "long-range loss", "sequence_losses", *retrieval.TASKS}
                assert all(np.isfinite(value) for key, value in entry.items() if key not in ("pattern", "sequence_losses"))
                assert entry["pattern"].count("F") == {"all": 3, "2/3": 2, "1/3": 1}[name.split()[0]]
            assert list(entries) == ["0", "1"]
    losses = {way: of_way["2/3 uniform"]["0"]["loss"] for way, of_way in rows.items()}
    assert len(set(losses.values())) == len(WAYS)  # each way has other indexers or weights
    domains = json.loads(results)["metrics"]["domains"]
    assert len(domains) == 2 and list(domains[0]) == [
        "all F",
        "uniform",
        *(f"searched on {o}" for o in ("code", "prose", "both")),
    ]
    # After a kill that took some rows: what is there is not made again, what is missing is.
    path = tmp_path / "out" / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lost = [number for number, line in enumerate(lines) if json.loads(line).get("part") in ("own", "everything-own")]
    path.write_text("".join(line for number, line in enumerate(lines) if number not in lost))
    stdout = run("--resume")
    assert stdout.count("\nseed ") == len(lost) > 2

    def parts(text):
        fields = "part", "seed", "name"
        return {tuple(map(entry.get, fields)): entry.get("value") for entry in map(json.loads, text.splitlines())}

    before, after = parts("".join(lines)), parts(path.read_text())
    assert before.keys() == after.keys()
    for key, value in before.items():
        for field in ("losses", "long_range") if key[0] in ("own", "everything-own") else ():
            np.testing.assert_allclose(after[key][field], value[field], rtol=1e-5)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Everything distilled, own layer only" in report and "deeper 0.875 and 0.750" in report
    for picture in ("overlap.png", "training.png"):
        assert f"]({picture})" in report and (tmp_path / "out" / picture).stat().st_size > 1000
