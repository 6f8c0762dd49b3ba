"""Several processes that run one experiment, as jax.distributed connects them: how they start and end, and who writes.

All run the same program with the same flags, each with its own devices. Process 0 alone writes files and prints; what a
result depends on and only process 0 may know, such as a log that is continued, the others get from it. They share their
fate: where one ends early all end, and the same command with --resume goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.common import lost_process

T = TypeVar("T")

START_SECONDS = 300  # to wait for the other processes at the start
HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process is missing
# How errors of operations between processes begin, as those of gloo and NCCL do; JAX raises several types of them.
_OF_A_COLLECTIVE = re.compile("UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS")
LAST_SECONDS = 5  # that process 0, whose end ends all others, leaves them to say what is wrong


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, go_on: str) -> None:
    """Connects this process with the others, before anything asks JAX for devices; does nothing where it is alone.

    The arguments are those of the flags of the same names; without them a cluster's launcher may have started several
    processes (Slurm, Open MPI, a TPU slice). go_on: what to do once a process is missing, as an error tells it.

    ValueError for some of the flags without the others, and for values that cannot be.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing == ["coordinator", "process_id"] and num_processes == 1:
        return
    if missing and len(missing) < len(given):
        name, value = next((name, value) for name, value in given.items() if value is not None)
        raise ValueError(f"--{name}={value}: --{' and --'.join(missing)} must be given too")
    if coordinator is not None and num_processes is not None and process_id is not None:
        check(coordinator, num_processes, process_id)
    elif not launched_by_a_cluster():
        return
    # With it a process would not end at SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    lost_process.in_one_line(go_on)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate" if coordinator else None,
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)


def check(coordinator: str, num_processes: int, process_id: int) -> None:
    """ValueError for values that --coordinator, --num_processes and --process_id cannot have."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator={coordinator}: not the host and a free port of process 0, such as 10.0.0.1:1234")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id}: must be from 0 to --num_processes - 1 = {num_processes - 1}")


def launched_by_a_cluster() -> bool:
    """Whether the environment is that of one of several processes, as `jax.distributed.initialize()` finds it.

    ValueError where there is a cluster that cannot say how many processes there are.
    """
    from jax._src.clusters import ClusterEnv  # initialize() cannot be asked without being called

    with warnings.catch_warnings(action="ignore"):  # of packages that other clusters would need
        found = next((c for c in ClusterEnv._cluster_types if not c.opt_in_only_method and c.is_env_present()), None)
    if found is None:
        return False
    try:
        return found.get_process_count() > 1
    except Exception as error:  # of the cluster's own library
        raise ValueError(
            f"the number of processes is not to be had from {found.__name__} ({error}); give --coordinator, "
            "--num_processes and --process_id, or --num_processes=1"
        ) from None


def count() -> int:
    """The number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which writes and prints, or the only process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in process 0, a JSON value, for every process. All call this together.

    make is called in process 0 alone. ValueError in all of them where it raises a ValueError or an OSError.
    """
    if count() == 1:
        return make()
    made: dict[str, Any] = {}
    if is_main():
        try:
            made = {"value": make()}
        except (ValueError, OSError) as error:
            made = {"error": str(error)}
    made = json.loads(_broadcast(json.dumps(made).encode()))
    if "error" in made:
        raise ValueError(made["error"])
    return made["value"]


def _broadcast(content: bytes) -> bytes:
    """The bytes of process 0; those of other processes do not matter."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few different sizes, because each is a program
    padded[: len(content)] = np.frombuffer(content[: len(padded)], np.uint8)
    return multihost_utils.broadcast_one_to_all(padded)[:size].tobytes()


@contextlib.contextmanager
def sharing_fate() -> Iterator[None]:
    """Within it an error of one process ends all: this one does not wait for the others, which then miss it.

    An error that JAX raises may be the first sign of a process that is missing. It is held back for as long as the
    coordination service needs to find that out and to end this process with a line that says so.
    """
    try:
        yield
    except BaseException as error:
        if count() > 1:
            if _of_a_collective(error):
                time.sleep(HEARTBEAT_SECONDS + 10)
            atexit.register(_end)  # runs before JAX's own, which waits for the other processes
        raise


def _of_a_collective(error: BaseException) -> bool:
    """Whether it may come from an operation between processes: by its status, as JAX's errors begin with it."""
    return isinstance(error, Exception) and _OF_A_COLLECTIVE.match(str(error)) is not None


def _end() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if is_main():
        time.sleep(LAST_SECONDS)
    os._exit(1)
