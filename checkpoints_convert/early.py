"""How a command ends while it imports: there is nothing to tidy up yet."""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_at_signals() -> None:
    """From now on Ctrl-C and SIGTERM end the process with one line, until `ending.end_well` takes them over."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
