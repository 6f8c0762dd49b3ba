"""What a model under any schedule makes of a sample: its loss, that of long-range tokens, and retrieval.

All of a sample goes through one program that compiles once for all schedules, sequence after sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reproduction import retrieval
from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise

TAIL = 128  # targets at a prompt's end in which answers stand are counted in so many, so that few sizes are compiled


@dataclasses.dataclass(frozen=True)
class Sample:
    """What to evaluate on: cuts [N, S+1], which of their targets [N, S] are long-range, and prompts of as many tokens."""

    cuts: np.ndarray
    long_range: np.ndarray
    prompts: Sequence[retrieval.Prompt]

    @property
    def tail(self) -> int:
        """How many targets at the end hold all answers."""
        longest = max((prompt.tail for prompt in self.prompts), default=1)
        return min(self.cuts.shape[1] - 1, -(-longest // TAIL) * TAIL)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a sample scores, sequence by sequence, so that two models can be compared on the same ones.

    losses: means in nats a token. long_range: sums over the long-range tokens, and long_range_tokens how many these are.
    solved: by task, of every prompt, 1 for each time it was solved there and 0 for each that it was not.
    """

    losses: Sequence[float]
    long_range: Sequence[float]
    long_range_tokens: Sequence[int]
    solved: Mapping[str, Sequence[Sequence[int]]]

    @property
    def means(self) -> dict[str, float]:
        """The loss, the loss on long-range tokens if there are some, and the share of prompts solved, by task."""
        found = {"loss": float(np.mean(self.losses))}
        if tokens := sum(self.long_range_tokens):
            found["long-range loss"] = float(np.sum(self.long_range)) / tokens
        shares = {task: [hit for of_prompt in outcomes for hit in of_prompt] for task, outcomes in self.solved.items()}
        return found | {task: float(np.mean(hits)) for task, hits in shares.items() if hits}


@functools.partial(jax.jit, static_argnames="tail")
def _run(
    params: Params, full: jax.Array, tokens: jax.Array, counted: jax.Array, config: Config, schedule: Schedule, tail: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of rows of tokens [M, S+1]: mean losses [M], losses summed over `counted` [M, S], and hits [M, tail] at their ends.

    A hit is a target that is the likeliest token.
    """

    def of_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens, counted = row
        inputs, targets = tokens[None, :-1], tokens[None, 1:]
        x = layerwise.hidden_states(params, inputs, full, config, schedule)
        losses = model.token_losses(params, x, targets, config)[0]
        likeliest = jnp.argmax(model.unembed(params, x[:, -tail:], config), axis=-1)[0]
        return jnp.mean(losses), jnp.sum(jnp.where(counted, losses, 0.0)), likeliest == targets[0, -tail:]

    return jax.lax.map(of_row, (tokens, counted))


def lower(params: Params, config: Config, base: Schedule, rows: int, context: int, tail: int) -> jax.stages.Lowered:
    """The program of `score` for params that may be abstract."""
    full, tokens, counted = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((config.num_layers,), bool),
            ((rows, context + 1), jnp.int32),
            ((rows, context), bool),
        )
    )
    return _run.lower(params, full, tokens, counted, config, base, tail)


def score(params: Params, config: Config, base: Schedule, schedule: Schedule, on: Sample) -> Scores:
    """What the model makes of a sample under `schedule`; `base` is the schedule that the params are for."""
    count = len(on.cuts)
    tokens = np.concatenate([on.cuts, *(prompt.tokens[None] for prompt in on.prompts)]).astype(np.int32)
    counted = np.zeros((len(tokens), tokens.shape[1] - 1), bool)
    counted[:count] = on.long_range
    full = np.array(schedule.is_full)
    losses, sums, hits = jax.device_get(_run(params, full, tokens, counted, config, base, on.tail))
    solved = [prompt.solved(of_prompt) for prompt, of_prompt in zip(on.prompts, hits[count:], strict=True)]
    return Scores(
        losses[:count].tolist(),
        sums[:count].tolist(),
        on.long_range.sum(axis=1).tolist(),
        retrieval.by_task(on.prompts, solved),
    )


def neighbours_and_pairs(matrix: np.ndarray) -> dict[str, float]:
    """The mean overlap of adjacent layers and that of all pairs, of a matrix [L, L] of the layers' selections."""
    return {
        "adjacent": float(np.mean(np.diag(matrix, 1))),
        "all pairs": float(np.mean(matrix[np.triu_indices(len(matrix), 1)])),
    }
