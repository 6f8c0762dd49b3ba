"""Says in one line that a process is missing, in place of the log that JAX ends the other processes with.

JAX's coordination service watches heartbeats. Where one stops, it ends every other process from C++, with thirty lines on
stderr and no hook for Python. So a process that is one of several writes its C++ logs through this program, a child
that outlives it by a moment: it passes every line on, but for that last report. Python's own stderr stays as it is.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

# Logs that begin with severity, date, time, thread, file and line, of which some are about lost processes.
_LOG = re.compile(rb"[IWEF]\d{4} \S+ +\d+ (\S+):\d+\] ")
_ABOUT_PROCESSES = (b"coordination_service", b"preemption_sync_manager")
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"

_UNHEALTHY = re.compile(rb"unhealthy \(stopped sending heartbeats\):([\s\d,]+)")
_NOT_STARTED = b"RegisterTask"  # what was called when the time ran out
_NO_ANSWER = b"Failed to send RPC to coordination service"
_STATUS = re.compile(rb"absl::Status: (.*)")


def in_one_line(go_on: str) -> None:
    """From here on what C++ writes to stderr of this process goes through `condensed`; `go_on` says what to do then."""
    read, write = os.pipe()
    terminal = os.dup(sys.stderr.fileno())
    command = [sys.executable, "-I", "-S", str(pathlib.Path(__file__).resolve()), go_on]
    subprocess.Popen(command, stdin=read, stdout=terminal)
    os.close(read)
    os.dup2(write, 2)
    os.close(write)
    sys.stderr = open(terminal, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)  # noqa: SIM115


def condensed(lines: Iterable[bytes], go_on: str) -> Iterator[bytes]:
    """The lines, in place of a last report that processes are missing, and of what led to it, the one line of `reason`.

    Errors about processes are held back until it is known whether they lead to such a report: to the end.
    """
    held: list[bytes] = []
    holding = ending = False
    for line in lines:
        if ending := ending or _FATAL in line:
            held.append(line)
            continue
        if log := _LOG.match(line):  # else: a message of several lines goes on
            holding = line[:1] in b"WE" and log[1].startswith(_ABOUT_PROCESSES)
        if holding:
            held.append(line)
        else:
            yield line
    if ending:
        yield f"error: {reason(b''.join(held))}; {go_on}\n".encode()
    else:
        yield from held


def reason(report: bytes) -> str:
    """Which process is missing, by the report that JAX ended this one with."""
    if unhealthy := _UNHEALTHY.search(report):
        numbers = sorted(map(int, re.findall(rb"\d+", unhealthy[1])))
        which, verb = ("process", "is") if len(numbers) == 1 else ("processes", "are")
        return f"{which} {', '.join(map(str, numbers))} {verb} missing"
    if _NOT_STARTED in report:
        return "a process is missing: not all of --num_processes have come to --coordinator in time"
    if _NO_ANSWER in report:
        return "process 0 is missing (if it ended because another is, its own last line says so)"
    status = _STATUS.search(report)
    return f"a process is missing: {status[1].decode(errors='replace') if status else 'JAX does not say why'}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process whose logs these are
    for passed in condensed(iter(sys.stdin.buffer.readline, b""), sys.argv[1]):
        sys.stdout.buffer.write(passed)
        sys.stdout.buffer.flush()
