"""What a training of indexers is: the model, the text, what each group learns from, and what comes out.

For a schedule that is searched afterwards, an indexer learns from every number of layers that it could serve at once
(docs/model.md, Distillation): that is the same loss with other weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from indexcache_jax.config import Config
from indexcache_jax.layers import Layers
from indexcache_jax.params import Indexer
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage

STEPS, LEARNING_RATE, LR_WARMUP_STEPS = 400, 3e-3, 20  # of a group, by default

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """What indexers are trained with and for.

    layers: the frozen model. schedule: the one to train for, whose F layers have an indexer there. tokens [N, S] int32: the
    text. stage: of kind "warmup"; a step sees `stage.sequences` of the N rows, and every group takes `stage.steps` steps.
    spans: instead of the layers that an F layer serves under `schedule`, teach its indexer every number of layers, up to this
    one, that it serves under some schedule searched from `schedule`. keeps_targets: compute every target once. allocate:
    makes the arrays of shape and dtype that are kept on the host.

    ValueError where an F layer has no indexer, the stage has another kind or its compute_dtype is not that of the weights, the
    tokens are not of its context, or there are spans below 1 or of a stage that teaches own layers alone.
    """

    layers: Layers
    schedule: Schedule
    tokens: np.ndarray
    stage: Stage
    seed: int = 0
    spans: int | None = None
    keeps_targets: bool = True
    allocate: Allocate = np.empty

    def __post_init__(self) -> None:
        base = self.layers.schedule
        self.schedule.check_layers(base.num_layers)
        if lacking := [layer for layer in self.schedule.full_layers if not base.is_full[layer]]:
            raise ValueError(f"schedule pattern: layer {lacking[0]} of {self.schedule.pattern} is F, but it has no indexer")
        if self.stage.kind != "warmup":
            raise ValueError(f"stage: {self.stage.kind!r} is not 'warmup', the kind that trains indexers alone")
        if self.tokens.ndim != 2 or self.tokens.shape[1] != self.stage.context:
            raise ValueError(f"tokens: {list(self.tokens.shape)} are not rows of the stage's context, {self.stage.context}")
        if not len(self.tokens):
            raise ValueError("tokens: there are none")
        if self.spans is not None and self.spans < 1:
            raise ValueError(f"spans: {self.spans} is below 1")
        if self.spans is not None and not self.stage.cross_layer:
            raise ValueError(f"spans: {self.spans}, but the stage teaches an indexer its own layer alone")

    @property
    def config(self) -> Config:
        return self.layers.config

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The layers that every F layer's indexer learns from, ascending: itself first."""
        return [tuple(self.shares(layer)) for layer in self.schedule.full_layers]

    def shares(self, layer: int) -> dict[int, float]:
        """The layers that the indexer of F layer `layer` learns from, ascending, and what the divergence of each counts."""
        if self.spans is not None:
            found = shares_of_spans(spans_of(self.schedule, layer, self.spans))
        else:
            served = len(self.schedule.serves(layer)) if self.stage.cross_layer else 1
            found = [1 / served] * served
        return dict(enumerate(found, start=layer))

    def rows(self, layer: int) -> np.ndarray:
        """Which rows [steps, sequences] the steps of the group of F layer `layer` see: all in turn, in random orders."""
        count, wanted = len(self.tokens), self.stage.steps * self.stage.sequences
        rng = np.random.default_rng((self.seed, layer))
        orders = [rng.permutation(count) for _ in range(-(-wanted // count))]
        return np.concatenate([np.zeros(0, np.int64), *orders])[:wanted].reshape(self.stage.steps, self.stage.sequences)


def spans_of(schedule: Schedule, layer: int, most: int) -> list[int]:
    """The numbers of layers, ascending, that F layer `layer` serves under schedules which turn F layers of `schedule` to S.

    Those up to `most`, but always the smallest.
    """
    ends = [*(end for end in schedule.full_layers if end > layer), schedule.num_layers]
    smallest, *others = (end - layer for end in ends)
    return [smallest, *(span for span in others if span <= most)]


def shares_of_spans(spans: Sequence[int]) -> list[float]:
    """What the divergence at every distance counts in the mean of the multi-layer losses of spans; they add up to 1."""
    return [sum(1 / span for span in spans if span > distance) / len(spans) for distance in range(max(spans))]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A group's indexer in host memory, float32, as that of a single layer; its divergence L at every step, in nats.

    seconds: what its targets and its steps took.
    """

    layer: int
    indexer: Indexer
    divergence: np.ndarray
    seconds: float


def indexer_stage(
    context: int,
    compute_dtype: str,
    *,
    steps: int = STEPS,
    rows: int = 1,
    learning_rate: float = LEARNING_RATE,
    cross_layer: bool = True,
) -> Stage:
    """The stage of a `Run`: what every group's indexer takes."""
    return Stage(
        *("indexers", "warmup", steps, rows, context, 0.0, learning_rate),
        lr_warmup_steps=LR_WARMUP_STEPS,
        cross_layer=cross_layer,
        compute_dtype=compute_dtype,
    )
