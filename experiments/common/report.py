"""What every experiment writes: results.json, report.md, plots, tables for the report and the terminal, and progress.

Of several processes, process 0 alone writes and shows progress.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from absl import flags

from experiments.common import processes
from experiments.common.devices import Layout
from experiments.common.journal import replacing
from experiments.common.lock import Lock, hold
from experiments.common.options import CHECKPOINT, DEMO, EXPERIMENTS, RESUME

# Environment variables that change a measurement; they are no flags of ours.
VARIABLES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "indexcache-jax")


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES."""
    version_of = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            version_of[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version_of[package] = "not installed"
    return version_of


def device() -> dict[str, Any]:
    """The first device's platform and kind, how many devices all processes have, the processes, and this host's CPU cores."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "processes": processes.count(),
        "cpu_cores": os.cpu_count(),
    }


def commit() -> str | None:
    """The commit of this library's own repository, marked where files differ from it; None where it is installed."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    if found.returncode:
        return None
    return found.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def progress(**options: Any) -> tqdm.tqdm:
    """A bar on the terminal, of tqdm's options."""
    return tqdm.tqdm(disable=not processes.is_main(), **options)


def duration(seconds: float) -> str:
    """Such as 02:10 or 1:02:10."""
    return tqdm.tqdm.format_interval(seconds)


def time_left(done: int, total: int, began: float) -> str:
    """How far work is that began at `began` of time.perf_counter(), and what the rest takes at its rate so far.

    Such as "3 of 12, 01:40 left".
    """
    return f"{done} of {total}, {duration((time.perf_counter() - began) / done * (total - done))} left"


def command() -> str:
    """The command line as a reader of the report would type it, with the VARIABLES that are set."""
    given = [f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES if os.environ.get(name)]
    return " ".join([*given, "python -m experiments.run", shlex.join(sys.argv[1:])]).rstrip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c) for c in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *(line(row) for row in rows)])


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for the terminal, its columns aligned at the left."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _check_apart(directory: str) -> None:
    """ValueError for an output folder that is the checkpoint's: what is written would mix with its files."""
    checkpoint = flags.FLAGS[CHECKPOINT.name].value or str(DEMO)
    if os.path.realpath(directory) == os.path.realpath(checkpoint):
        raise ValueError(f"--output_dir={directory}: is the checkpoint's folder {checkpoint}; choose another")


@dataclasses.dataclass(frozen=True)
class Output:
    """An experiment's output folder, which no other run may write into. A file in it appears whole or not at all."""

    directory: pathlib.Path
    lock: Lock | None = None  # of process 0

    @classmethod
    def create(cls, directory: str) -> Output:
        """The folder, made where it is not there.

        ValueError where it cannot be made, where another run has it, and where it is the checkpoint's.
        """
        path, lock = pathlib.Path(directory), None

        def make() -> None:
            nonlocal lock
            _check_apart(directory)
            if flags.FLAGS[RESUME.name].value and not path.exists():
                print(f"note: --resume: {directory} is not there, so there is nothing to go on from", file=sys.stderr)
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock = hold(path)
            except OSError as error:
                raise ValueError(f"--output_dir={directory}: cannot be made: {error}") from None

        processes.from_main(make)
        return cls(path, lock)

    def write(self, name: str, text: str) -> None:
        if processes.is_main():
            with replacing(self.directory / name) as file:
                file.write(text.encode())

    def save_figure(self, figure: Any, name: str) -> None:
        if processes.is_main():
            with replacing(self.directory / name) as file:
                figure.savefig(file, format="png", dpi=120, bbox_inches="tight")

    def finish(self, experiment: str, metrics: dict[str, Any], report: str, layout: Layout | None = None) -> None:
        """Writes results.json and report.md, each with the command, the versions and the devices that made them.

        layout: how the devices shared the work, for an experiment that has --mesh.
        """
        on = device() | ({"mesh": layout.text} if layout else {})
        results: dict[str, Any] = {
            "experiment": experiment,
            "command": command(),
            "flags": {name: flags.FLAGS[name].value for name in ("experiment", "output_dir", "seed")}
            | {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(EXPERIMENTS[experiment])},
            "versions": versions(),
            "commit": commit(),
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            "device": on,
            "metrics": metrics,
        }
        self.write("results.json", json.dumps(results, indent=1) + "\n")
        packages = ", ".join(f"{package} {version}" for package, version in versions().items())
        number = f"{on['count']} device(s) in {on['processes']} process(es)"
        machine = f"{on['kind']} ({on['platform']}, {number}, {on['cpu_cores']} CPU cores)"
        mesh = f"; mesh {layout.text}" if layout else ""
        made = results["date"] + (f", commit {results['commit']}" if results["commit"] else "")
        self.write("report.md", f"{report.rstrip()}\n\n---\n`{command()}`\n\n{made}; {packages}; {machine}{mesh}\n")
