"""What every experiment leaves behind: results.json, report.md and its plots, and the same table on the terminal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments.common.options import EXPERIMENTS

# What changes a measurement and is no flag of ours.
VARIABLES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "indexcache-jax")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> dict[str, Any]:
    first = jax.devices()[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count(), "cpu_cores": os.cpu_count()}


def command() -> str:
    """The command line as a reader of the report would type it, with the VARIABLES that are set."""
    given = [f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES if os.environ.get(name)]
    return " ".join([*given, "python -m experiments.run", shlex.join(sys.argv[1:])]).rstrip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c) for c in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *(line(row) for row in rows)])


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


@dataclasses.dataclass(frozen=True)
class Output:
    """An experiment's folder. Files are written beside and renamed, so that a reader never meets half of one."""

    directory: pathlib.Path

    @classmethod
    def create(cls, directory: str) -> Output:
        path = pathlib.Path(directory)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output_dir={directory}: cannot be made: {error}") from None
        return cls(path)

    def write(self, name: str, text: str) -> None:
        target = self.directory / name
        beside = target.with_name(target.name + ".partial")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)

    def save_figure(self, figure: Any, name: str) -> None:
        beside = self.directory / (name + ".partial")
        figure.savefig(beside, format="png", dpi=120, bbox_inches="tight")
        os.replace(beside, self.directory / name)

    def finish(self, experiment: str, metrics: dict[str, Any], report: str) -> None:
        """Writes results.json and report.md."""
        results = {
            "experiment": experiment,
            "command": command(),
            "flags": {name: flags.FLAGS[name].value for name in ("experiment", "output_dir", "seed")}
            | {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(EXPERIMENTS[experiment])},
            "versions": versions(),
            "device": device(),
            "metrics": metrics,
        }
        self.write("results.json", json.dumps(results, indent=1) + "\n")
        about = ", ".join(f"{k} {v}" for k, v in versions().items())
        place = f"{device()['kind']} ({device()['platform']}, {device()['count']} device(s), {device()['cpu_cores']} CPU cores)"
        self.write("report.md", f"{report.rstrip()}\n\n---\n`{command()}`\n\n{about}; {place}\n")
