"""The one command: `python -m experiments.run [VERB]`, or --experiment=VERB. Without one it searches the shipped checkpoint."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import warnings
from types import FrameType, ModuleType
from typing import NoReturn, TextIO

from absl import app, flags, logging

from experiments.common import command_line
from experiments.common.options import COMPILING, EXPERIMENTS, TOGETHER

_EXPERIMENT = flags.DEFINE_enum("experiment", next(iter(EXPERIMENTS)), list(EXPERIMENTS), "what to run")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "", "where results.json, report.md and plots go; default out/EXPERIMENT")
_SEED = flags.DEFINE_integer("seed", 0, "of every random choice", lower_bound=0, upper_bound=2**31 - 1)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, of several that run this; default the cluster's, or this process is alone"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes that run this, with --coordinator", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of the processes this one is, from 0", lower_bound=0)


def load(name: str) -> ModuleType:
    """The experiment's module, which has its own flags and `run(output_dir, seed)`."""
    return importlib.import_module(EXPERIMENTS[name])


# What makes an experiment's memory smaller, of the flags that it has.
_SMALLER = ("stream", "batch_size", "rows_per_batch", "context", "chunk", "cache_len", "latent_cache", "tokens", "mesh")


def main(argv: list[str]) -> None:
    from checkpoints_convert.ending import MAX_LINE, end_well
    from indexcache_jax.foreign import escaped

    del argv  # the program's name
    warnings.showwarning = lambda message, *_: print(f"warning: {escaped(str(message), MAX_LINE)}", file=sys.stderr)
    logging.set_verbosity(logging.WARNING)  # orbax reports every file at INFO
    name = _EXPERIMENT.value
    own = {f.name for f in flags.FLAGS.get_key_flags_for_module(EXPERIMENTS[name])}
    go_on = "; the same command with --resume goes on from here" if "resume" in own else ""
    smaller = " or ".join(f"--{flag}" for flag in _SMALLER if flag in own)
    end_well(lambda: _run(name, "resume" in own), f"interrupted{go_on}", smaller)


def _run(name: str, resumable: bool) -> None:
    from experiments.common import processes, programs

    if name not in COMPILING:
        programs.keep()
    go_on = f"start all again{', with --resume to go on from here' if resumable else ''}"
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, go_on)
    with processes.sharing_fate():
        if processes.count() > 1 and name not in TOGETHER:
            raise ValueError(f"--experiment={name}: runs in one process, but there are {processes.count()}")
        load(name).run(_OUTPUT_DIR.value or f"out/{name}", _SEED.value)


def _ended_early(number: int, frame: FrameType | None) -> None:
    """Ends the process while it imports: there is nothing to tidy up yet."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _say(text: str) -> NoReturn:
    """Prints a text and ends; well too where the reader, such as head, has gone before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush has a reader
    sys.exit(0)


def replace_what_it_lacks(stream: TextIO) -> None:
    """Has a terminal whose encoding lacks a character of a report, such as ±, show another instead of ending the run."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def command() -> None:
    """What `indexcache` and `python -m experiments.run` do."""
    replace_what_it_lacks(sys.stdout)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ended_early)
    if sys.argv[1:2] == [command_line.CONVERT]:
        os.execv(sys.executable, [sys.executable, "-m", command_line.CONVERTER, *sys.argv[2:]])
    if command_line.wants_version(sys.argv[1:]):
        import indexcache_jax

        _say(f"indexcache-jax {indexcache_jax.__version__}")
    try:
        arguments = command_line.with_flag(sys.argv[1:])
        name = command_line.experiment_of(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(command_line.USAGE_ERROR)
    if command_line.wants_help(arguments) and command_line.named(arguments) is None:
        _say(command_line.overview())
    load(name)  # its flags exist once it is imported
    if command_line.wants_help(arguments):
        _say(command_line.help_of(name))
    app.run(main, argv=[sys.argv[0], *arguments], flags_parser=command_line.parse)


if __name__ == "__main__":
    command()
