"""Several processes that run one program: real ones, on the CPUs of this machine."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from experiments.common import processes
from tests.support import meshes

ROOT = pathlib.Path(__file__).parents[3]
START = """
import json, os, pathlib, sys, time
import jax, jax.numpy as jnp, numpy as np
from experiments.common import devices, journal, processes
from experiments.common.report import Output
from indexcache_jax import sharding
from indexcache_jax.sharding import SERVING

coordinator, count, number, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
processes.start(coordinator, count, number, "start again")
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def started(program, count, tmp_path, devices_each=1):
    """The processes of a program, each with a folder of its own."""
    coordinator = f"localhost:{free_port()}"
    environment = os.environ | meshes.simulated(devices_each) | {"PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", START + program, coordinator, str(count), str(i), str(tmp_path / str(i))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


TOGETHER = """
with processes.sharing_fate():
    said = {"count": processes.count(), "main": processes.is_main()}
    layout = devices.suited(2, jax.device_count())
    with devices.in_force(layout, SERVING):
        mesh = sharding.current()[0]
        said["mesh"] = dict(mesh.shape)
        rows = jax.make_array_from_callback((4, 4), sharding.fitting((4, 4), ("batch", "queries")), lambda part: TABLE[part])
        said["sum"] = float(jax.jit(jnp.sum)(rows))
    output = Output.create(folder)
    output.write("report.md", "text")
    with journal.Journal(output.directory / "log", {"weights": 1}) as log:
        said["entries"] = log.entries
        log.append({"step": 1})
    try:
        processes.from_main(lambda: open(folder + "/missing"))
    except ValueError as error:
        said["error"] = str(error)
    print("printed")
    print(json.dumps(said), file=sys.stderr)
""".replace("TABLE", "np.arange(16.0, dtype=np.float32).reshape(4, 4)")


def check_together(count, devices_each, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/log").write_text('{"weights": 1}\n{"step": 0}\n')
    running = started(TOGETHER, count, tmp_path, devices_each)
    finished = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * count, finished
    said = [json.loads(stderr.splitlines()[-1]) for _, stderr in finished]
    assert [one.pop("main") for one in said] == [True] + [False] * (count - 1)
    missing = tmp_path / "0/missing"
    wanted = {
        "count": count,
        "mesh": {"data": 2, "context": count * devices_each // 2, "tensor": 1},
        "sum": 120.0,
        "entries": [{"step": 0}],
        "error": f"[Errno 2] No such file or directory: '{missing}'",
    }
    assert said == [wanted] * count
    assert ["printed" in stdout for stdout, _ in finished] == [True] + [False] * (count - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]  # the others have written nothing
    assert (tmp_path / "0/report.md").read_text() == "text"
    assert (tmp_path / "0/log").read_text() == '{"weights": 1}\n{"step": 0}\n{"step": 1}\n'


def test_two_processes_of_two_devices_compute_together_and_the_first_alone_writes(tmp_path):
    check_together(2, 2, tmp_path)


@pytest.mark.slow
def test_four_processes(tmp_path):
    check_together(4, 1, tmp_path)


UNTIL_KILLED = """
with processes.sharing_fate():
    for step in range(100_000):
        processes.from_main(lambda: step)
        if step == 0:
            print("ready", file=sys.stderr)
"""
ASLEEP = UNTIL_KILLED.replace("range(100_000)", "range(1)") + "\n    time.sleep(600)\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", [UNTIL_KILLED, ASLEEP], ids=["in collectives", "without collectives"])
@pytest.mark.parametrize(("count", "killed"), [(2, 0), (2, 1), (4, 2)])
def test_where_one_is_killed_the_others_end_within_a_minute_and_name_it(program, count, killed, tmp_path):
    running = started(program, count, tmp_path)
    for process in running:
        assert process.stderr.readline() == "ready\n"
    running[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for number, process in enumerate(running):
        _, stderr = process.communicate(timeout=90)
        if number != killed:
            assert process.returncode not in (0, None)
            assert len(stderr.splitlines()) == 1 and stderr.startswith(f"error: process {killed} is missing")
            assert stderr.endswith("; start again\n")
    assert time.monotonic() - began < 60


WRONG = """
with processes.sharing_fate():
    processes.from_main(lambda: 0)
    assert not CONDITION, "wrong"
    processes.from_main(lambda: time.sleep(600))
"""


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["True", "number == 0"], ids=["of all", "of one"])
def test_an_error_of_all_is_said_by_all_and_an_error_of_one_ends_the_others(wrong, tmp_path):
    running = started(WRONG.replace("CONDITION", f"({wrong})"), 2, tmp_path)
    first, second = [process.communicate(timeout=90)[1].splitlines()[-1] for process in running]
    assert first == "AssertionError: wrong" and running[0].returncode == 1
    if wrong == "True":
        assert second == first and running[1].returncode == 1
    else:
        assert second.startswith("error: process 0 is missing") and running[1].returncode == -signal.SIGABRT


# ---- whether there are several


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, None), "--coordinator=host:1: --num_processes and --process_id must be given too"),
        ((None, 2, 0), "--num_processes=2: --coordinator must be given too"),
        ((None, None, 0), "--process_id=0: --coordinator and --num_processes must be given too"),
        (("host", 2, 0), "--coordinator=host: not the host and a free port"),
        (("host:port", 2, 0), "--coordinator=host:port: not the host and a free port"),
        (("host:1", 2, 2), "--process_id=2: must be from 0 to --num_processes - 1 = 1"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message):
    with pytest.raises(ValueError) as error:
        processes.start(*flags, "")
    assert message in str(error.value)


def test_one_process_stays_alone():
    processes.start(None, 1, None, "")
    assert not jax.distributed.is_initialized()
    assert processes.count() == 1 and processes.is_main() and processes.from_main(lambda: (1, 2)) == (1, 2)


def test_a_clusters_environment_says_whether_there_are_several(monkeypatch):
    for name in (
        "KUBERNETES_SERVICE_HOST",
        "OMPI_MCA_orte_hnp_uri",
        *[name for name in os.environ if name.startswith("SLURM")],
    ):
        monkeypatch.delenv(name, raising=False)
    assert not processes.launched_by_a_cluster()
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "node[1-2]", "PROCID": "0", "LOCALID": "0", "STEP_NUM_NODES": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for tasks, several in (("1", False), ("2", True)):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        assert processes.launched_by_a_cluster() is several
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(ValueError, match=r"from SlurmCluster \(.*'many'\); give --coordinator"):
        processes.launched_by_a_cluster()
