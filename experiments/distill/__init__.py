"""Training-aware IndexCache: distils a checkpoint's indexers for a schedule and writes the checkpoint that results.

--train=indexers: the model is frozen. Group by group, an F layer's indexer trains towards the attention of all layers that it
serves; with --stream on a model that no device holds. With --spans the schedule stays, and every F layer's indexer learns all
numbers of layers that it could serve, for a schedule to be searched for afterwards.

--train=all: two stages (paper 3.2). Warm-up: dense attention, only the indexers of the F layers train, each towards the
attention of all layers that it serves. Sparse: attention over what they select; the indexers go on learning on the selected
keys, the rest of the model on the language loss, each at its own rate.

F layers start from the checkpoint's own indexers.
"""

from __future__ import annotations

from absl import flags

from experiments.common import devices, options
from experiments.distill import everything, goal, indexers
from indexcache_jax.sharding import TRAINING

for _name in (
    *(
        "checkpoint",
        "dtype",
        "weights",
        "schedule",
        "retention",
        "context",
        "batch_size",
        "text",
        "held_out",
        "held_out_sequences",
    ),
    *("accumulate", "warmup_steps", "sparse_steps", "warmup_learning_rate", "indexer_learning_rate", "model_learning_rate"),
    *("sequences", "stream", "stream_memory", "resume", "mesh"),
    *("steps", "learning_rate", "schedule_from", "cross_layer", "spans", "save_every", "keep", "export"),
):
    flags.declare_key_flag(_name)

_TRAIN = flags.DEFINE_enum(
    "train",
    "indexers",
    ["indexers", "all"],
    "indexers: of a frozen model, group by group, on --sequences of text; all: a dense warm-up and a sparse stage",
)


def run(output_dir: str, seed: int) -> None:
    goal.check_schedule_flags()
    if _TRAIN.value == "indexers":
        needs_all = "needs --train=all; --train=indexers trains indexers alone, with --steps and --learning_rate"
        options.refuse(needs_all, "warmup_steps", "sparse_steps", "accumulate", "save_every", "keep")
        options.refuse(needs_all, "warmup_learning_rate", "indexer_learning_rate", "model_learning_rate")
        if goal.SPANS.value is not None and not goal.CROSS_LAYER.value:
            raise ValueError(f"--spans={goal.SPANS.value}: teaches other layers too, so not with --nocross_layer")
        options.refuse("needs --train=all; --train=indexers has sequences, and groups of layers, on every device", "mesh")
        indexers.run(output_dir, seed)
        return
    options.refuse("needs --train=indexers", "steps", "learning_rate", "sequences", "spans", "stream", "stream_memory")
    options.check_positive("batch_size")
    layout = devices.layout(options.BATCH_SIZE.value)
    with devices.in_force(layout, TRAINING):
        given = everything.read_inputs(output_dir, seed)
        result = everything.distil(given, seed)
    everything.report(result, given, layout)
