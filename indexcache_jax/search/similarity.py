"""The similarity search for a schedule (paper, appendix C): S layers take the indices that change their output least.

A layer is judged by the cosine between its attention output with its own indices and with another layer's; dynamic
programming then finds the schedule with the highest sum. It needs far fewer runs of the model than the greedy search, and
is the paper's negative result: the cosine is local to a layer, while what counts is the loss at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from indexcache_jax import arguments
from indexcache_jax.config import Config
from indexcache_jax.params import Params, check_params
from indexcache_jax.schedule import Schedule, check_is_schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.evaluator import checked_batches


def similarities(
    params: Params,
    config: Config,
    schedule: Schedule,
    batches: Sequence[np.ndarray],
    progress: Callable[[int], object] = lambda layers: None,
) -> np.ndarray:
    """How little each layer's attention output changes with a lower layer's indices: cosines [L, L] float64.

    Entry [i, j], j <= i, is the cosine of layer i's output with its own indices and its output with those of layer j,
    averaged over the tokens of batches [B, S+1]; entries above the diagonal are NaN. `progress` is called with the number
    of layers run.

    Raises ValueError unless every layer of `schedule`, the params' own, is F, and for batches as `Evaluator` does.
    """
    check_is_schedule("schedule", schedule)
    if schedule.num_full != schedule.num_layers:
        raise ValueError(f"schedule {schedule.pattern}: the similarity search needs the indexers of all layers")
    check_params(params, config, schedule)
    batches = checked_batches(batches, config)
    num_layers = config.num_layers
    sums = np.full((num_layers, num_layers), np.nan)
    sums[np.tril_indices(num_layers)] = 0.0
    for tokens in batches:
        state = layerwise.start(params, layerwise.place(tokens[:, :-1]), config)
        for source in range(num_layers):
            state = layerwise.advance(params, state, np.int32(source), np.bool_(True), config, schedule)
            sums[source, source] += 1.0
            above, cosines = state, []
            for layer in range(source + 1, num_layers):
                above, cosine = layerwise.compare(params, above, np.int32(layer), state.indices, config, schedule)
                cosines.append(cosine)
            sums[source + 1 :, source] += jax.device_get(cosines)  # once for all layers, which are queued meanwhile
            progress(num_layers - source)
    return sums / len(batches)


def check_similarity(similarity: np.ndarray) -> None:
    """ValueError unless these are cosines [L, L]: none is missing on the diagonal and below it."""
    shape: tuple[int, ...] = getattr(similarity, "shape", ())
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0] or similarity.dtype.kind != "f":
        raise ValueError(f"similarity: {arguments.described(similarity)}, not [L, L] of floats")
    if not np.isfinite(similarity[np.tril_indices(shape[0])]).all():
        raise ValueError("similarity: an entry on or below the diagonal is not finite")


def total_similarity(similarity: np.ndarray, schedule: Schedule) -> float:
    """The sum over all layers of similarity [L, L] to the F layer whose indices they use: what `most_similar` maximises.

    ValueError for cosines that are not finite, and for another number of layers.
    """
    check_similarity(similarity)
    schedule.check_layers(len(similarity))
    return float(sum(similarity[layer, source] for layer, source in enumerate(schedule.source)))


def most_similar(similarity: np.ndarray, num_full: int) -> Schedule:
    """The schedule of `num_full` F layers with the highest `total_similarity` under similarity [L, L].

    Of schedules with equal sums the one whose F layers are lower is taken. Raises ValueError for `num_full` out of range and
    for cosines that are not finite.
    """
    check_similarity(similarity)
    num_layers = len(similarity)
    if not 1 <= arguments.integer("num_full", num_full) <= num_layers:
        raise ValueError(f"num_full: {num_full!r} is not between 1 and {num_layers}")
    # best[n][stop]: the highest sum over the layers below `stop` with n F layers, and those F layers.
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]
    for _ in range(num_full):
        row: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (total, full) in best[-1].items():
            for stop in range(start + 1, num_layers + 1):
                entry = (total + float(np.sum(similarity[start:stop, start])), (*full, start))
                if stop not in row or entry[0] > row[stop][0]:
                    row[stop] = entry
        best.append(row)
    full_layers = best[num_full][num_layers][1]
    return Schedule("".join("F" if i in full_layers else "S" for i in range(num_layers)))
