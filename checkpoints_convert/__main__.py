"""python -m checkpoints_convert SRC DST: safetensors to orbax, orbax to safetensors, FP8 to bfloat16 and back, a new schedule.

    python -m checkpoints_convert GLM-5-FP8 glm-5-orbax
    python -m checkpoints_convert GLM-5-FP8 glm-5-bf16 --format=safetensors --weights=bf16
    python -m checkpoints_convert GLM-5-FP8 glm-5-shared --format=safetensors --schedule=FSSF...

SRC is a Hugging Face directory with safetensors files, or an orbax one; DST must not exist or be empty.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence

import jax
import tqdm
from absl import flags, logging

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.ending import MAX_LINE, end_well
from checkpoints_convert.save import FORMATS, convert
from indexcache_jax.foreign import escaped

_FLAGS = flags.FlagValues()  # of this program alone, some of which are called as those of experiments are
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format of DST; without it, the one that SRC is not.", _FLAGS)
_SCHEDULE = flags.DEFINE_string("schedule", None, "F or S for every layer (FSSF...), instead of the schedule in SRC.", _FLAGS)
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights in DST; without it, SRC's own.", _FLAGS)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["fp8", "bf16"],
    "Matrices as FP8 with a scale for each 128 x 128, or decoded; without it, as in SRC.",
    _FLAGS,
)
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Upper bound of a safetensors file: 5GB, 200KB, 1GiB.", _FLAGS)
_KEEP_MTP = flags.DEFINE_bool("keep_mtp", False, "Copy the multi-token prediction layers (safetensors to safetensors).", _FLAGS)
_KEEP_SHARED_INDEXERS = flags.DEFINE_bool(
    "keep_shared_indexers", False, "Copy the indexers of S layers (safetensors to safetensors).", _FLAGS
)


_COMMAND = "python -m checkpoints_convert"
_HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort", "--helpfull", "-helpfull", "help")
_USAGE_ERROR = 2  # the exit status


def parse(argv: list[str]) -> list[str]:
    """The program's name, SRC and DST, absl's flags taken out. Exits with one line where the arguments are wrong."""
    try:
        rest = _FLAGS(argv)
        if len(rest) != 3:
            raise ValueError(f"expected SRC and DST, got {len(rest) - 1} arguments: {' '.join(rest[1:])}".removesuffix(": "))
    except (flags.Error, ValueError) as error:
        said = f"--{error.flagname}: no such flag" if isinstance(error, flags.UnrecognizedFlagError) else error
        print(f"error: {said}; {_COMMAND} --help shows what there is", file=sys.stderr)
        sys.exit(_USAGE_ERROR)
    return rest


def main(argv: Sequence[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: an accelerator is neither needed nor taken
    logging.set_verbosity(logging.ERROR)  # orbax tells every step of its own
    warnings.showwarning = lambda message, *_: print(f"warning: {escaped(str(message), MAX_LINE)}", file=sys.stderr)
    end_well(lambda: _convert(argv[1], argv[2]), "interrupted; nothing was written")


def _convert(source: str, directory: str) -> None:
    with tqdm.tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = convert(
            source,
            directory,
            format=_FORMAT.value,
            schedule=_SCHEDULE.value,
            dtype=_DTYPE.value,
            max_shard_size=_MAX_SHARD_SIZE.value,
            keep_mtp=_KEEP_MTP.value,
            keep_shared_indexers=_KEEP_SHARED_INDEXERS.value,
            progress=progress,
            weights={None: "stored", "fp8": "fp8", "bf16": None}[_WEIGHTS.value],
        )
    for line in report:
        print(f"{source}: {line}", file=sys.stderr)
    print(directory)


def command() -> None:
    """What `python -m checkpoints_convert` does."""
    if set(sys.argv[1:]) & set(_HELP):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has gone, such as head, ends the program
        print(f"{__doc__}{_FLAGS.module_help(str(_FLAGS.find_module_defining_flag(_FORMAT.name)))}")
        return
    main(parse(sys.argv))


if __name__ == "__main__":
    command()
