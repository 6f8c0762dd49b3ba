"""Finding a schedule: which layers of a DSA model keep their indexer (F) and which reuse a lower layer's indices (S).

    found = search.find_schedule(params, config, schedule, tokens, num_full=10)

or, step by step:

    evaluator = search.Evaluator(params, config, schedule, batches)
    steps = search.greedy_search(evaluator, schedule, num_full=10, race=search.Race())
    search.first_step_with_at_most(steps, 12).schedule.pattern

The greedy search compares losses, from a model in memory (`Evaluator`) or one whose weights are read layer by layer
(`StreamedEvaluator`); `floating_search` also takes flips back. A `Race` drops what cannot win before it is measured on all
sequences, and a `Margin` says how sure a comparison is. `most_similar` is the paper's cheaper and worse way, and
`layer_overlap` shows what layers share.
"""

from indexcache_jax.search.evaluator import BatchEvaluator, Evaluator, find_schedule, fingerprint
from indexcache_jax.search.floating import floating_search
from indexcache_jax.search.greedy import Step, candidates, first_step_with_at_most, greedy_search, layers_to_run
from indexcache_jax.search.noise import Margin
from indexcache_jax.search.oracle import LossLog, LossOracle, MemoryLog
from indexcache_jax.search.overlap import intersection_sizes, layer_overlap, mean_overlap
from indexcache_jax.search.racing import Race
from indexcache_jax.search.similarity import most_similar, similarities, total_similarity
from indexcache_jax.search.streamed import StreamedEvaluator

__all__ = [
    "BatchEvaluator",
    "Evaluator",
    "LossLog",
    "LossOracle",
    "Margin",
    "MemoryLog",
    "Race",
    "Step",
    "StreamedEvaluator",
    "candidates",
    "find_schedule",
    "fingerprint",
    "first_step_with_at_most",
    "floating_search",
    "greedy_search",
    "intersection_sizes",
    "layer_overlap",
    "layers_to_run",
    "mean_overlap",
    "most_similar",
    "similarities",
    "total_similarity",
]
