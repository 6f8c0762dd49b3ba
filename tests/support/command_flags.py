"""Flags as a command line sets them, for tests that call an experiment in this process."""

import contextlib
from collections.abc import Iterator

from absl import flags
from absl.testing import flagsaver

from experiments import run  # defines the flags of every experiment

assert run.EXPERIMENTS


@contextlib.contextmanager
def given(*arguments: str) -> Iterator[None]:
    with flagsaver.flagsaver():
        flags.FLAGS(["test", *arguments])
        yield
