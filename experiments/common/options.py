"""Flags that mean the same in several experiments.

An experiment declares those it reads (`flags.declare_key_flag`), so that its results record them and its --help shows them.
"""

from __future__ import annotations

import pathlib

from absl import flags

# The modules of the experiments by name; the first is the default.
EXPERIMENTS = {
    "search": "experiments.search",
    "generate": "experiments.generate",
    "distill": "experiments.distill",
    "speed": "experiments.benchmarks.speed",
    "kernels": "experiments.benchmarks.kernels",
    "train_speed": "experiments.benchmarks.train_speed",
    "precision": "experiments.benchmarks.precision",
    "compile": "experiments.benchmarks.compile",
    "pretrain": "experiments.reproduction.pretrain",
    "quality": "experiments.reproduction.quality",
}

DEMO = pathlib.Path(__file__).parents[1] / "assets" / "demo"

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Hugging Face or orbax directory; default the small model shipped here")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "of weights and arithmetic; default float32 on a CPU, else bfloat16"
)
CONTEXT = flags.DEFINE_integer("context", 1536, "tokens of a sequence; must exceed the model's index_topk")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "sequences at a time")
HELD_OUT = flags.DEFINE_string("held_out", "", "text files to evaluate on; default a tenth of the other files, kept apart")
HELD_OUT_SEQUENCES = flags.DEFINE_integer("held_out_sequences", 4, "sequences to evaluate on")
RETENTION = flags.DEFINE_string("retention", "1/4", "share of indexers that the schedule keeps")
RESUME = flags.DEFINE_bool("resume", False, "go on from what --output_dir holds after a kill")
NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", 0, "cut the model to so many layers; 0 is the experiment's own choice", lower_bound=0
)
WOVEN = flags.DEFINE_float(
    "woven", None, "share of the training text with retrieval tasks in it; default the recipe's, or none", 0.0, 1.0
)
TIME_LIMIT = flags.DEFINE_float(
    "time_limit",
    None,
    "seconds after which nothing further is begun, training being cut to what fits; default the experiment's own",
    lower_bound=0,
)


def seconds_to_spend(default: float) -> float:
    """--time_limit, or the experiment's own."""
    return default if TIME_LIMIT.value is None else TIME_LIMIT.value
