"""The flags that more than one experiment reads: each is defined here once and means the same everywhere.

An experiment declares those it reads (`flags.declare_key_flag`), so that its results record them and its --help shows them.
A flag that a single experiment reads is defined in that experiment's module. A default of None or "" is the experiment's own.
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
    "indexer_speed": "experiments.benchmarks.indexer_speed",
    "precision": "experiments.benchmarks.precision",
    "compile": "experiments.benchmarks.compile",
    "plan": "experiments.benchmarks.plan",
    "pretrain": "experiments.reproduction.pretrain",
    "quality": "experiments.reproduction.quality",
    "doctor": "experiments.doctor",
}

# Those that several processes can run together; the others decide what to do next by times that each process measures.
TOGETHER = ("search", "generate", "distill")
# Those that compile for devices that need not be at hand: such a program cannot be loaded again, so none is kept.
COMPILING = ("compile", "plan")

DEMO = pathlib.Path(__file__).parents[1] / "assets" / "demo"
ALL_F = "all F"  # what the schedule without S layers is called in flags, tables and results
MOST_LAYERS = 10_000
MOST = 2**31 - 1  # of a size: rows and positions are counted in 32 bits

# ---- the model and its schedule

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Hugging Face or orbax directory; default the small model shipped here")
PRESETS = ("30b", "glm-5", "glm-5.1", "glm-5.2", "glm-5.3", "deepseek-v3.2", "demo")
PRESET = flags.DEFINE_enum("preset", "30b", PRESETS, "the model's shape; demo is the small one shipped here")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "of weights and arithmetic; default float32 on a CPU, else bfloat16"
)
WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["fp8", "bf16"],
    "matrices as fp8 codes with a scale for each 128 x 128 of them, or decoded into --dtype; default as the checkpoint stores "
    "them, and bf16 where weights are made",
)
NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", 0, "cut the model to so many layers; 0 is the experiment's own choice", 0, MOST_LAYERS
)
SCHEDULE = flags.DEFINE_list(
    "schedule",
    [],
    "F or S for every layer, such as FSSF; or 'all F'; or the share of layers that are F, such as 1/4. speed takes several, "
    "separated by commas; default the experiment's own",
)
RETENTION = flags.DEFINE_string("retention", "1/4", "share of indexers that the schedule keeps")
RETENTIONS = flags.DEFINE_list("retentions", ["1/2", "1/4", "1/8"], "shares of indexers kept that the table compares")
BLOCKS = flags.DEFINE_integer("blocks", 1, "contiguous blocks of layers; greedy commits the best flip of each per step")

# ---- text

TEXT = flags.DEFINE_string(
    "text",
    "",
    'text to read, comma-separated: globs, folders, JSONL with "text" or "messages" in every line, standard-library, '
    "installed-code, installed-prose; default the Python standard library's sources, in pretrain the recipe's own",
)
HELD_OUT = flags.DEFINE_string("held_out", "", "text to evaluate on, named like --text; default a tenth of --text's files")
CONTEXT = flags.DEFINE_integer("context", 1536, "tokens of a sequence; must exceed the model's index_topk")
SEQUENCES = flags.DEFINE_integer("sequences", None, "calibration sequences; default 2, of distill 32")
HELD_OUT_SEQUENCES = flags.DEFINE_integer("held_out_sequences", 4, "sequences to evaluate on")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "sequences at a time")
WOVEN = flags.DEFINE_float(
    "woven", None, "share of the training text with retrieval tasks in it; default the recipe's, or none", 0.0, 1.0
)

# ---- inference

CACHES = ("fp8", "bf16")
CHUNK = flags.DEFINE_integer(
    "chunk", None, "prompt tokens of a row at a time, which bounds memory; default the experiment's own"
)
LATENT_CACHE = flags.DEFINE_enum(
    "latent_cache", None, CACHES, "what latents are kept in; default bf16 in speed, in generate the weights' dtype"
)
INDEX_CACHE = flags.DEFINE_enum(
    "index_cache", None, CACHES, "what index keys are kept in; default fp8 in speed, in generate the weights' dtype"
)

TOKENS = flags.DEFINE_integer("tokens", 131_072, "the cache's length")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "devices that programs are compiled for and that need not be at hand, such as v5e:2x2, v5p:4x4x4, or in plan h200:16 and "
    "local; default the experiment's own",
)

# ---- weights read layer by layer

STREAM = flags.DEFINE_bool("stream", False, "read the weights layer by layer, for a model larger than the device")
STREAM_MEMORY = flags.DEFINE_float(
    "stream_memory",
    64.0,
    "GB of host memory for hidden states, in search with --stream, and for targets in distill; by default no more than half of "
    "what is left",
    0.0,
)

# ---- distillation

WARMUP_STEPS = flags.DEFINE_integer(
    "warmup_steps", 1000, "steps of the dense warm-up, which trains indexers alone", lower_bound=0
)
SPARSE_STEPS = flags.DEFINE_integer("sparse_steps", 4000, "steps of the sparse stage, which trains everything", lower_bound=0)
ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "times --batch_size sequences to a step", lower_bound=1)
WARMUP_LEARNING_RATE = flags.DEFINE_float(
    "warmup_learning_rate", 1e-3, "peak learning rate of the indexers in the warm-up", lower_bound=0
)
INDEXER_LEARNING_RATE = flags.DEFINE_float(
    "indexer_learning_rate", 1e-4, "peak learning rate of the indexers in the sparse stage", lower_bound=0
)
MODEL_LEARNING_RATE = flags.DEFINE_float(
    "model_learning_rate", 7.3e-6, "peak learning rate of the rest in the sparse stage", lower_bound=0
)

# ---- the run

MESH = flags.DEFINE_string(
    "mesh",
    "",
    "how the devices of all processes share the work, such as context=4,data=2: rows over data, the queries of a prompt over "
    "context, heads over tensor; expert=1 keeps experts whole on every device, cache=4 splits cached tokens over context; "
    "default what suits the work",
)
RESUME = flags.DEFINE_bool("resume", False, "go on from what --output_dir holds after a kill")
TIME_LIMIT = flags.DEFINE_float(
    "time_limit",
    None,
    "seconds after which nothing further is begun, training being cut to what fits; default the experiment's own",
    lower_bound=0,
)


def seconds_to_spend(default: float) -> float:
    """--time_limit, or the experiment's own."""
    return default if TIME_LIMIT.value is None else TIME_LIMIT.value


def calibration_sequences(default: int = 2) -> int:
    """--sequences, or `default`."""
    return default if SEQUENCES.value is None else SEQUENCES.value


def stream_memory() -> int:
    """Bytes of --stream_memory; where it is not given, at most half of what the host has left."""
    if STREAM_MEMORY.value > MOST:
        raise ValueError(f"--stream_memory={STREAM_MEMORY.value}: no host has so many GB")
    size = int(1e9 * STREAM_MEMORY.value)
    from indexcache_jax import host_memory  # here, since it brings JAX along: a signal or --help would wait for that

    return size if STREAM_MEMORY.present else min(size, host_memory.available() // 2)


def refuse(why: str, *names: str) -> None:
    """ValueError for the first of these flags that is given, where nothing reads it."""
    for name in names:
        if flags.FLAGS[name].present:
            value = flags.FLAGS[name].value
            raise ValueError(f"--{name}={','.join(value) if isinstance(value, list) else value}: {why}")


def check_positive(*names: str) -> None:
    """ValueError for the first of these flags whose value is below 1, or above what a size can be.

    None passes: it is the experiment's own default.
    """
    for name in names:
        value = flags.FLAGS[name].value
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1")
        if value is not None and value > MOST:
            raise ValueError(f"--{name}={value}: must be at most {MOST}")
