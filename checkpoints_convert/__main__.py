"""python -m checkpoints_convert SRC DST: safetensors to orbax, orbax to safetensors, FP8 to bfloat16 and back, a new schedule.

    python -m checkpoints_convert GLM-5-FP8 glm-5-orbax
    python -m checkpoints_convert GLM-5-FP8 glm-5-bf16 --format=safetensors --weights=bf16
    python -m checkpoints_convert GLM-5-FP8 glm-5-shared --format=safetensors --schedule=FSSF...

SRC is a Hugging Face directory with safetensors files, or an orbax one; DST must not exist or be empty.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import jax
import tqdm
from absl import app, flags, logging

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.ending import MAX_LINE, end_well
from checkpoints_convert.save import FORMATS, convert
from indexcache_jax.foreign import escaped

_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format of DST; without it, the one that SRC is not.")
_SCHEDULE = flags.DEFINE_string("schedule", None, "F or S for every layer (FSSF...), instead of the schedule in SRC.")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights in DST; without it, SRC's own.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["fp8", "bf16"], "Matrices as FP8 with a scale for each 128 x 128, or decoded; without it, as in SRC."
)
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Upper bound of a safetensors file: 5GB, 200KB, 1GiB.")
_KEEP_MTP = flags.DEFINE_bool("keep_mtp", False, "Copy the multi-token prediction layers (safetensors to safetensors).")
_KEEP_SHARED_INDEXERS = flags.DEFINE_bool(
    "keep_shared_indexers", False, "Copy the indexers of S layers (safetensors to safetensors)."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) != 3:
        raise app.UsageError(f"expected SRC and DST, got {len(argv) - 1} arguments")
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


if __name__ == "__main__":
    app.run(main)
