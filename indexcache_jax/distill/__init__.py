"""Training losses of a DSA model: language modelling, and the multi-layer distillation of its indexers (paper 3.2).

The indexer of an F layer l scores keys as I and serves the layers l .. l+m, each with attention probabilities p averaged
over heads. It is trained on L = sum_j 1/(m+1) sum_t KL(p^(l+j) || softmax(I)). An S layer needs nothing of its F layer but
index queries, keys and head weights, so these are passed from layer to layer and every layer adds its own term.

Dense (warm-up): attention and the divergence run over all visible keys. Sparse: both run over the keys that I selects,
with p and softmax(I) renormalised on them. The indexer reads detached activations and p is a constant, so the divergence
trains only indexers; selection is discrete, so the language loss never reaches them.

On a mesh every device computes what is per query for its own rows and queries. Where queries of a row are split, latents and
index keys are gathered and every device makes the attention's keys and values from them; the queries are dealt so that all
devices see as many keys (`positions.even_order`). A layer's weights are gathered for as long as it runs.

A schedule is static, as in inference, unless it is given as arrays (`TracedSchedule`): then one program trains for any
schedule, and layers that turn out S keep an indexer without a gradient.
"""

from indexcache_jax.distill.formulas import (
    SCORE_BYTES,
    averaged_divergence,
    cross_entropy,
    divergence,
    entropy,
    index_scores,
    map_causal,
    selection_mask,
)
from indexcache_jax.distill.forward import Losses, Run, losses, runs
from indexcache_jax.distill.stages import TracedSchedule, balance, traced_schedule, trainable

__all__ = [
    "SCORE_BYTES",
    "Losses",
    "Run",
    "TracedSchedule",
    "averaged_divergence",
    "balance",
    "cross_entropy",
    "divergence",
    "entropy",
    "index_scores",
    "losses",
    "map_causal",
    "runs",
    "selection_mask",
    "traced_schedule",
    "trainable",
]
