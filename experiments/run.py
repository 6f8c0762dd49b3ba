"""The one command: `python -m experiments.run [--experiment=NAME]`. Without flags it searches the shipped checkpoint."""

from __future__ import annotations

import importlib
import sys

from absl import app, flags, logging

EXPERIMENTS = ("search", "pretrain", "kernels")

_EXPERIMENT = flags.DEFINE_enum("experiment", "search", EXPERIMENTS, "what to run")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "", "where results.json, report.md and plots go; default out/EXPERIMENT")
_SEED = flags.DEFINE_integer("seed", 0, "of every random choice")

# Each experiment is a module of that name here, with its own flags and `run(output_dir, seed)`.
_MODULES = {name: importlib.import_module(f"experiments.{name}") for name in EXPERIMENTS}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags look like --checkpoint=DIR")
    logging.set_verbosity(logging.WARNING)  # orbax reports every file at INFO
    name = _EXPERIMENT.value
    try:
        _MODULES[name].run(_OUTPUT_DIR.value or f"out/{name}", _SEED.value)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main)
