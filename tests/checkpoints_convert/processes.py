"""Programs that run as two processes of four CPU devices each."""

import os
import socket
import subprocess
import sys

from tests.checkpoints_convert import files
from tests.support import meshes


def run_two(program: str, *arguments: str) -> list[str]:
    """What each of two processes of a program prints: called with the coordinator's address, its number, and `arguments`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | meshes.simulated(4)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(number), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=files.ROOT,
            env=environment,
        )
        for number in range(2)
    ]
    try:
        printed = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, printed, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in printed]
