"""`python -m experiments.run` in several processes: the results are those of one, and a lost process ends all."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.support import meshes

ROOT = pathlib.Path(__file__).parents[2]
SEARCH = ["--retentions=1/2", "--retention=1/2", "--sequences=2", "--batch_size=2", "--held_out_sequences=2", "--context=256"]
DISTILL = [
    "--experiment=distill",
    "--train=all",
    "--warmup_steps=4",
    "--sparse_steps=4",
    "--context=160",
    "--batch_size=2",
    "--save_every=2",
]
DISTILL += ["--held_out_sequences=2", "--text=indexcache_jax"]


def started(output_dir, *arguments, count, devices_each=1):
    """The processes of a command; one is alone."""
    environment = os.environ | meshes.simulated(devices_each) | {"PYTHONPATH": str(ROOT)}
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    several = [f"--coordinator=localhost:{port}", f"--num_processes={count}"] if count > 1 else []
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "experiments.run", f"--output_dir={output_dir}", *arguments, *several),
                *([f"--process_id={i}"] if several else []),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def results(output_dir, *arguments, count, devices_each=1):
    """results.json of a command that all its processes end well."""
    running = started(output_dir, *arguments, count=count, devices_each=devices_each)
    finished = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0] * count, [stderr[-2000:] for _, stderr in finished]
    found = json.loads((output_dir / "results.json").read_text())
    assert found["device"]["processes"] == count and found["device"]["count"] == count * devices_each
    return found


def kill_one(running, begun):
    """Kills the last process once `begun()`; the others end within a minute with one line that names it."""
    deadline = time.monotonic() + 600
    while not begun():
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.1)
    running[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for process in running[:-1]:
        *_, last = process.communicate(timeout=90)[1].splitlines()
        missing = f"error: process {len(running) - 1} is missing; start all again, with --resume to go on from here"
        assert last.endswith(missing) and process.returncode != 0  # after a carriage return, where a bar was shown
    assert time.monotonic() - killed < 60
    running[-1].communicate()


@pytest.mark.slow
def test_completions_are_those_of_one_process(tmp_path):
    prompts = [{"prompt": "def main():\n"}, {"prompt": "import os\nclass A"}, {"tokens": [102, 111, 114]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    arguments = ["--experiment=generate", f"--prompts={tmp_path}/prompts.jsonl", "--max_new_tokens=12", "--rows_per_batch=2"]
    arguments.append("--cache_len=256")
    results(tmp_path / "one", *arguments, count=1)
    found = results(tmp_path / "two", *arguments, "--mesh=data=2,context=2", count=2, devices_each=2)
    assert found["device"]["mesh"] == "context=2, data=2, experts over 4, of 4 cpu"
    assert (tmp_path / "two/completions.jsonl").read_text() == (tmp_path / "one/completions.jsonl").read_text()


@pytest.mark.slow
def test_a_search_that_lost_a_process_goes_on_to_what_one_process_finds(tmp_path):
    log = tmp_path / "two/evaluations.jsonl"
    kill_one(started(tmp_path / "two", *SEARCH, count=2), lambda: log.exists() and log.read_text().count("\n") > 20)
    kept = log.read_text()
    two = results(tmp_path / "two", *SEARCH, "--resume", count=2)
    assert log.read_text().startswith(kept)
    one = results(tmp_path / "one", *SEARCH, count=1)
    assert two["device"]["mesh"] == "data=2, experts over 2, of 2 cpu" and one["device"]["mesh"] == "1 cpu"
    assert two["metrics"]["pattern"] == one["metrics"]["pattern"]
    for ours, wanted in zip(two["metrics"]["steps"], one["metrics"]["steps"], strict=True):
        assert ours["pattern"] == wanted["pattern"] and ours["loss"] == pytest.approx(wanted["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_distillation_that_lost_a_process_goes_on_to_what_one_process_trains(tmp_path):
    log = tmp_path / "two/train.jsonl"
    kill_one(started(tmp_path / "two", *DISTILL, count=2), lambda: log.exists() and log.read_text().count("\n") > 2)
    results(tmp_path / "two", *DISTILL, "--resume", count=2)
    results(tmp_path / "one", *DISTILL, count=1)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()] for name in ("two", "one")
    ]
    assert [entry["step"] for entry in logs[0]] == list(range(8))
    for ours, wanted in zip(*logs, strict=True):
        assert ours["language"] == pytest.approx(wanted["language"], abs=1e-4), ours


@pytest.mark.slow
def test_indexers_that_lost_a_process_go_on_to_what_one_process_trains_bit_for_bit(tmp_path):
    """Two processes of two devices each, and then of one each: sequences through the layers on all devices, groups in turn."""
    arguments = ["--experiment=distill", "--schedule=FSFFSSFFSFSS", "--sequences=6", "--steps=24", "--context=192", "--stream"]
    arguments += ["--held_out_sequences=4", "--text=indexcache_jax", "--export=linked"]
    made = tmp_path / "two/indexers"
    kill_one(started(tmp_path / "two", *arguments, count=2, devices_each=2), lambda: len(list(made.glob("layer-*.npz"))) > 1)
    kept = {path: path.read_bytes() for path in made.glob("layer-*.npz")}
    two = results(tmp_path / "two", *arguments, "--resume", count=2)
    assert all(path.read_bytes() == content for path, content in kept.items())
    one = results(tmp_path / "one", *arguments, count=1)
    assert two["device"]["mesh"] == "data=2, experts whole, of 2 cpu" and one["device"]["mesh"] == "1 cpu"
    for ours, wanted in zip(two["metrics"]["groups"], one["metrics"]["groups"], strict=True):
        assert ours["divergence"] == wanted["divergence"]
    written = [tmp_path / name / "checkpoint/model-00002-of-00002.safetensors" for name in ("two", "one")]
    assert written[0].read_bytes() == written[1].read_bytes()
    for ours, wanted in zip(*(found["metrics"]["held_out"].values() for found in (two, one)), strict=True):
        assert ours == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_an_experiment_that_decides_by_its_times_refuses(tmp_path):
    running = started(tmp_path, "--experiment=kernels", count=2)
    for process in running:
        *_, last = process.communicate(timeout=90)[1].splitlines()
        assert last == "error: --experiment=kernels: runs in one process, but there are 2" and process.returncode == 1
