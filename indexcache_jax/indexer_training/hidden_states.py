"""The hidden states of the text before every layer, which run as the model itself runs them, each with its own indexer."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.indexer_training.run import Run
from indexcache_jax.params import Params


@dataclasses.dataclass(frozen=True)
class States:
    """Hidden states x [N, S, D] before a layer on the host, and the indices [N, S, k] that it reuses if the model has it S."""

    x: np.ndarray
    indices: np.ndarray | None


@functools.partial(jax.jit, static_argnames="full")
def _after(params: Params, x: jax.Array, indices: jax.Array | None, config: Config, full: bool) -> tuple[jax.Array, jax.Array]:
    return model.single_layer(params, x, indices, config, full)


def embedded(run: Run) -> States:
    """The hidden states before layer 0."""
    table = run.layers.ends().embedding
    x = run.allocate((*run.tokens.shape, run.config.hidden_size), table.dtype)
    for row, tokens in enumerate(run.tokens):
        x[row] = table[tokens]
    return States(x, None)


def advanced(run: Run, params: Params, layer: int, before: States, in_place: bool) -> States:
    """The hidden states after a layer, run as the model itself runs it; in the arrays of those before it if `in_place`."""
    base, config = run.layers.schedule, run.config
    config = dataclasses.replace(config, num_layers=1, moe_layers=config.moe_layers[layer : layer + 1])
    x = before.x if in_place else run.allocate(before.x.shape, before.x.dtype)
    reused, indices = layer + 1 < base.num_layers and not base.is_full[layer + 1], None
    if reused:
        indices = run.allocate((*x.shape[:2], min(config.index_topk, x.shape[1])), np.int32)

    def keep(row: int, after: tuple[jax.Array, jax.Array]) -> None:
        x[row] = np.asarray(after[0][0])
        if indices is not None:
            indices[row] = np.asarray(after[1][0])

    running: tuple[int, tuple[jax.Array, jax.Array]] | None = None  # taken to the host while the device computes the next
    for row in range(len(x)):
        given = None if before.indices is None or base.is_full[layer] else before.indices[row : row + 1]
        after = _after(params, before.x[row : row + 1], given, config, base.is_full[layer])
        if running is not None:
            keep(*running)
        running = row, after
    assert running is not None  # a run has rows
    keep(*running)
    return States(x, indices)
