"""Trains the indexers of a frozen model, group after group: an F layer and the S layers that it serves.

The divergence of `distill` trains nothing but indexers, and an indexer reads nothing but the input of its own layer. On a
frozen model that input and the attention that an indexer is to predict are constants. So groups do not depend on each other:
a group needs the hidden states of the text before each of its layers, the attention weights of these layers, and one indexer.

The layers are read once, from the first to the last, and run as the model itself runs them, each with its own indexer. What a
group needs stays in host memory.

    params = distil_indexers(params, config, schedule, tokens, target)

does it for a model in memory; `Run` and `train` for one whose layers are read one by one, group by group.
"""

from indexcache_jax.indexer_training.cost import Need, can_keep_targets, need, sizes, step_work, work
from indexcache_jax.indexer_training.groups import train
from indexcache_jax.indexer_training.in_memory import distil_indexers, stacked, with_indexers
from indexcache_jax.indexer_training.rows import rows_on_device
from indexcache_jax.indexer_training.run import (
    LEARNING_RATE,
    STEPS,
    Allocate,
    Run,
    Trained,
    indexer_stage,
    shares_of_spans,
    spans_of,
)
from indexcache_jax.indexer_training.step import divergence, optimiser
from indexcache_jax.indexer_training.targets import Kept, Recomputed, mean_target

__all__ = [
    "LEARNING_RATE",
    "STEPS",
    "Allocate",
    "Kept",
    "Need",
    "Recomputed",
    "Run",
    "Trained",
    "can_keep_targets",
    "distil_indexers",
    "divergence",
    "indexer_stage",
    "mean_target",
    "need",
    "optimiser",
    "rows_on_device",
    "shares_of_spans",
    "sizes",
    "spans_of",
    "stacked",
    "step_work",
    "train",
    "with_indexers",
    "work",
]
