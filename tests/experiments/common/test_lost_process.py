"""The line that stands for the log that JAX ends a process with where another one is missing."""

import pathlib
import signal
import subprocess
import sys

import pytest

from experiments.common.lost_process import condensed

ROOT = pathlib.Path(__file__).parents[3]

FATAL = (
    "F1128 14:03:53.150702   11251 client.h:86] Terminating process because the JAX distributed service detected fatal errors. "
)
FATAL += "This most likely indicates that another task died; see the other task logs for more details. absl::Status: "
POLLED = "E1128 14:03:53.150696   11251 coordination_service_agent.cc:288] Polled an error from coordination service.\n"
STACK = """*** Check failure stack trace: ***
    @     0x7fe6fa840634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
Fatal Python error: Aborted

Current thread 0x00007fe6f99 (most recent call first):
  <no Python frame>
"""

# What JAX 0.10 and 0.11 write, shortened.
UNHEALTHY = """UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
{tasks}
The tasks have crashed. Check the task logs for an earlier error, or scheduler events (e.g. preemption, eviction) to debug.

RPC: /xla.coordination.CoordinationService/PollForError [type.googleapis.com/tensorflow.CoordinationServiceError='']
"""
SERVICE = """E1128 14:01:19.888016   10135 coordination_service.cc:1549] [929067] Use error polling to propagate this error:
1
The tasks have crashed. Check the task logs for an earlier error.
"""
NO_ANSWER = """UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died/restarted.
Additional GRPC error information from remote target coordination_service while calling PollForError:
:UNAVAILABLE:Stream removed (Socket closed)
"""
NOT_STARTED = """DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/RegisterTask
"""
OTHER = "W1128 14:01:20.000000   10249 cuda_executor.cc:17] something else\n"


def lines(text):
    return [line.encode() for line in text.splitlines(keepends=True)]


def read(text):
    return b"".join(condensed(lines(text), "start again")).decode()


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (UNHEALTHY.format(tasks="1"), "error: process 1 is missing; start again\n"),
        (UNHEALTHY.format(tasks="12\n3"), "error: processes 3, 12 are missing; start again\n"),
        (NO_ANSWER, "error: process 0 is missing (if it ended because another is, its own last line says so); start again\n"),
        (
            NOT_STARTED,
            "error: a process is missing: not all of --num_processes have come to --coordinator in time; start again\n",
        ),
        ("ABORTED: for once\n", "error: a process is missing: ABORTED: for once; start again\n"),
    ],
)
def test_a_report_of_missing_processes_becomes_one_line(report, line):
    assert read(SERVICE + POLLED + FATAL + report + STACK) == line


def test_other_logs_pass_as_they_come():
    text = OTHER + "no log at all\n" + OTHER.replace("W", "F", 1) + STACK
    assert read(text) == text
    passing = condensed(iter(lines(OTHER) + lines(FATAL)), "start again")
    assert next(passing).decode() == OTHER


def test_errors_about_processes_that_lead_to_no_report_come_at_the_end():
    assert read(SERVICE + OTHER + POLLED) == OTHER + SERVICE + POLLED


def test_a_process_that_is_aborted_has_written_the_line_and_what_python_wrote_stands_beside_it():
    program = (
        "import os, sys; from experiments.common import lost_process; lost_process.in_one_line('start again');"
        "print('from Python', file=sys.stderr); os.write(2, sys.argv[1].encode()); os.abort()"
    )
    report = OTHER + POLLED + FATAL + UNHEALTHY.format(tasks="2") + STACK
    done = subprocess.run([sys.executable, "-c", program, report], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    written = done.stderr.splitlines(keepends=True)
    assert sorted(written) == sorted(["from Python\n", OTHER, "error: process 2 is missing; start again\n"])
