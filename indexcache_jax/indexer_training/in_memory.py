"""A model in memory with its indexers distilled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import arguments
from indexcache_jax.config import Config
from indexcache_jax.indexer_training.groups import Progress, no_progress, train
from indexcache_jax.indexer_training.run import LEARNING_RATE, STEPS, Run, indexer_stage
from indexcache_jax.layers import Resident
from indexcache_jax.params import FP8_BASE, Indexer, Params, check_schedule, with_schedule
from indexcache_jax.schedule import Schedule


def distil_indexers(
    params: Params,
    config: Config,
    schedule: Schedule,
    tokens: Any,
    target: Schedule,
    *,
    spans: int | None = None,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 1,
    seed: int = 0,
    keeps_targets: bool = True,
    progress: Progress = no_progress,
) -> Params:
    """The params for `target`, with its indexers trained on tokens [N, S]; nothing else of them changes.

    schedule: the params' own. A step sees batch_size of the N sequences; every indexer takes `steps` of them, with a learning
    rate that peaks at `learning_rate`, in the arithmetic of the params' dtype. spans and keeps_targets, which takes N S S
    numbers of host memory, are as of `Run`; progress as of `train`.

    ValueError where an argument does not fit the model, indexers are in 8 bits, or training gives what is not finite.
    """
    check_schedule(params, schedule)
    rows = np.asarray(arguments.tokens("tokens", tokens, config.vocab_size), np.int32)
    layers = Resident(config, schedule, params)
    if layers.weights not in (None, FP8_BASE):
        raise ValueError(f"params: in the form {layers.weights!r}, but indexers in 8 bits do not train; load {FP8_BASE!r}")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        arguments.integer(name, value, 1)
    dtype = str(params.embedding.dtype)
    stage = indexer_stage(rows.shape[1], dtype, steps=steps, rows=batch_size, learning_rate=learning_rate)
    run = Run(layers, target, rows, stage, seed, spans, keeps_targets)
    return with_indexers(params, schedule, target, {group.layer: group.indexer for group in train(run, progress=progress)})


def stacked(indexers: Mapping[int, Indexer], schedule: Schedule) -> Indexer:
    """The indexers of a schedule's F layers, given by layer, as params hold them."""
    return jax.tree.map(lambda *stack: np.stack(stack), *(indexers[layer] for layer in schedule.full_layers))


def with_indexers(params: Params, schedule: Schedule, target: Schedule, indexers: Mapping[int, Indexer]) -> Params:
    """Params of `schedule` as `target` wants them, with other indexers, which take the dtypes of those that they replace."""
    kept = with_schedule(params, schedule, target)
    new = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), stacked(indexers, target), kept.indexer)
    return dataclasses.replace(kept, indexer=new)
