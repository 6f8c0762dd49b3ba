"""What a run keeps on the host, and its floating-point operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp

from indexcache_jax import tensors, training
from indexcache_jax.indexer_training.run import Run
from indexcache_jax.indexer_training.share import Share
from indexcache_jax.memory import ROW_TARGET_BYTES
from indexcache_jax.params import abstract


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a run keeps on the host: hidden states, and targets where a step reads them."""

    states: int
    targets: int


def need(run: Run) -> Need:
    """What a process of a run keeps on the host at most, under the mesh in force, of all groups that are there at once."""
    count, length = run.tokens.shape
    size = jnp.dtype(run.stage.compute_dtype).itemsize
    longest = max(map(len, run.groups)) + 1
    indices = 0 if all(run.layers.schedule.is_full) else 4 * min(run.config.index_topk, length)
    states = count * length * (longest * run.config.hidden_size * size + 2 * indices)
    at_once = Share.in_force().at_once(run.schedule.num_full)
    return Need(at_once * states, at_once * count * length * length * size)


def sizes(run: Run) -> tuple[int, int]:
    """How many weights the model has under the schedule, and how many of them train."""
    tree = abstract(run.config, run.schedule)
    return tensors.count(tree), tensors.count(tree.indexer)


def can_keep_targets(run: Run) -> bool:
    """Whether a device can make the targets of a whole row at once, as it does to keep them."""
    return 4 * run.tokens.shape[1] ** 2 <= ROW_TARGET_BYTES


def layer_work(run: Run) -> float:
    """Floating-point operations of a layer for one sequence, experts and selected attention included."""
    c, s = run.config, run.tokens.shape[1]
    one = dataclasses.replace(c, vocab_size=1)  # without the logits
    per_token = training.flops_per_token(one, run.schedule, dataclasses.replace(run.stage, kind="sparse", context=s))
    return per_token * s / (3 * c.num_layers)


def target_work(run: Run) -> float:
    """Floating-point operations of one layer's target for one sequence."""
    c, s = run.config, run.tokens.shape[1]
    projections = s * (c.hidden_size * (c.q_lora_rank + c.latent_dim) + c.num_heads * c.q_lora_rank * c.qk_head_dim)
    projections += s * c.num_heads * c.kv_lora_rank * c.qk_nope_head_dim
    return 2.0 * (projections + s * (s + 1) / 2 * c.num_heads * c.qk_head_dim)


def step_work(run: Run, layers: int) -> float:
    """Floating-point operations of a step for a group of so many layers."""
    c, s = run.config, run.tokens.shape[1]
    projections = s * (c.hidden_size * c.q_lora_rank + 2 * c.q_lora_rank * c.index_n_heads * c.index_head_dim)
    projections += 2 * s * c.hidden_size * (c.index_head_dim + c.index_n_heads)
    scores = 3 * s * (s + 1) / 2 * c.index_n_heads * (c.index_head_dim + 1)
    again = 0.0 if run.keeps_targets else layers * target_work(run)
    return run.stage.sequences * (2.0 * (projections + scores) + again)


def unfinished(run: Run, finished: Collection[int]) -> list[tuple[int, ...]]:
    return [group for group in run.groups if group[0] not in finished]


def last_layer(groups: list[tuple[int, ...]]) -> int:
    return max(group[-1] for group in groups)


def pass_work(run: Run) -> float:
    """Floating-point operations of a layer for the sequences of this process, under the mesh in force."""
    return layer_work(run) * len(run.tokens) / Share.in_force().processes


def work(run: Run, finished: Collection[int] = ()) -> float:
    """Floating-point operations of the rest of a run in this process, as `train` reports them under the mesh in force."""
    if not (groups := unfinished(run, finished)):
        return 0.0
    own = Share.in_force().of(groups)
    of_groups = sum(run.stage.steps * step_work(run, len(group)) for group in own)
    return last_layer(groups) * pass_work(run) + len(run.tokens) * sum(map(len, own)) * target_work(run) + of_groups
