"""The one command: `python -m experiments.run [--experiment=NAME]`. Without flags it searches the shipped checkpoint."""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType

from absl import app, flags, logging

from experiments.common.options import EXPERIMENTS

_EXPERIMENT = flags.DEFINE_enum("experiment", next(iter(EXPERIMENTS)), list(EXPERIMENTS), "what to run")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "", "where results.json, report.md and plots go; default out/EXPERIMENT")
_SEED = flags.DEFINE_integer("seed", 0, "of every random choice", lower_bound=0, upper_bound=2**31 - 1)


def experiment_of(arguments: list[str]) -> str:
    """The experiment that a command line names; wrong names are left to absl, which says so."""
    joined = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("experiment=")]
    apart = [b for a, b in itertools.pairwise(arguments) if a in ("-experiment", "--experiment")]
    return next((name for name in [*joined, *apart] if name in EXPERIMENTS), next(iter(EXPERIMENTS)))


def load(name: str) -> ModuleType:
    """The experiment's module, which has its own flags and `run(output_dir, seed)`."""
    return importlib.import_module(EXPERIMENTS[name])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags look like --checkpoint=DIR")
    logging.set_verbosity(logging.WARNING)  # orbax reports every file at INFO
    name = _EXPERIMENT.value
    try:
        load(name).run(_OUTPUT_DIR.value or f"out/{name}", _SEED.value)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        reads = {f.name for f in flags.FLAGS.get_key_flags_for_module(EXPERIMENTS[name])}
        go_on = "; the same command with --resume goes on from here" if "resume" in reads else ""
        print(f"interrupted{go_on}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    load(experiment_of(sys.argv[1:]))  # its flags exist once it is imported
    app.run(main)
