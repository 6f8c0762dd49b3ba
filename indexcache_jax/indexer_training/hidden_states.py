"""The hidden states of the text before every layer, which run as the model itself runs them, each with its own indexer.

On a mesh every device takes one sequence at a time through a layer. A process keeps on its host what its own devices computed,
and the others' sequences where it trains an indexer that learns from them. The devices of all processes exchange these, since
all of them run one program; to the host only the process that learns takes them. The arrays have room for all sequences, which
memory takes for those alone that are written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np

from indexcache_jax import model, sharding
from indexcache_jax.config import Config
from indexcache_jax.indexer_training.run import Run
from indexcache_jax.params import Params
from indexcache_jax.sharding import constrain

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class States:
    """Hidden states x [N, S, D] before a layer on the host, and the indices [N, S, k] that it reuses if the model has it S."""

    x: np.ndarray
    indices: np.ndarray | None


@functools.partial(jax.jit, static_argnames="full")
def _after(params: Params, x: jax.Array, indices: jax.Array | None, config: Config, full: bool) -> tuple[jax.Array, jax.Array]:
    x, indices = model.single_layer(params, x, indices, config, full)
    return constrain(x, "batch", None, None), constrain(indices, "batch", None, None)


@jax.jit
def _gathered(x: jax.Array) -> jax.Array:
    """The rows [B, S, D] of all devices on each of them."""
    return constrain(x, None, None, None)


def held(tree: T) -> T:
    """Of arrays that every device holds whole the copy of this process's first device."""
    return jax.tree.map(lambda a: a.addressable_data(0) if isinstance(a, jax.Array) else a, tree)


def embedded(run: Run, *, whole: bool) -> States:
    """The hidden states before layer 0: of all sequences if `whole`, else of those that this process's devices compute."""
    table = np.asarray(held(run.layers.ends().embedding))
    x = run.allocate((*run.tokens.shape, run.config.hidden_size), table.dtype)
    for row in range(len(x)) if whole else _own(len(x)):
        x[row] = table[run.tokens[row]]
    return States(x, None)


def advanced(
    run: Run, params: Params, layer: int, before: States, *, in_place: bool, exchanged: bool = False, whole: bool = False
) -> States:
    """The hidden states after a layer, run as the model itself runs it; in the arrays of those before it if `in_place`.

    exchanged: whether a process needs what other processes computed, by which all of them go. whole: whether this one does.
    """
    base, config = run.layers.schedule, run.config
    config = dataclasses.replace(config, num_layers=1, moe_layers=config.moe_layers[layer : layer + 1])
    x = before.x if in_place else run.allocate(before.x.shape, before.x.dtype)
    reused, indices = layer + 1 < base.num_layers and not base.is_full[layer + 1], None
    if reused:
        indices = run.allocate((*x.shape[:2], min(config.index_topk, x.shape[1])), np.int32)

    def keep(rows: np.ndarray, after: tuple[jax.Array, jax.Array], everything: jax.Array | None) -> None:
        if everything is not None and whole:
            x[rows] = np.asarray(everything.addressable_data(0))
        else:
            _keep_own(x, rows, after[0])
        if indices is not None:
            _keep_own(indices, rows, after[1])

    running: list[tuple[np.ndarray, tuple[jax.Array, jax.Array], jax.Array | None]] = []
    for rows in _batches(len(x)):
        given = None if before.indices is None or base.is_full[layer] else _on_devices(before.indices, rows)
        after = _after(params, _on_devices(before.x, rows), given, config, base.is_full[layer])
        if running:
            keep(*running.pop())  # takes it to the host while devices compute
        running.append((rows, after, _gathered(after[0]) if exchanged else None))  # of which devices hold one at a time
    keep(*running.pop())
    return States(x, indices)


def _batches(count: int) -> Iterator[np.ndarray]:
    """The numbers of the rows that devices compute at once, one each; at the end the last row again for those without one."""
    devices = sharding.devices_along("batch")
    for first in range(0, count, devices):
        yield np.minimum(np.arange(first, first + devices), count - 1)


def _own(count: int) -> Iterator[int]:
    """The numbers of the rows, of so many, that this process's devices compute."""
    for rows in _batches(count):
        at = sharding.fitting(rows.shape, ("batch",))
        for index in [None] if at is None else at.addressable_devices_indices_map(rows.shape).values():
            yield from rows[_first(index)]


def _on_devices(array: np.ndarray, rows: np.ndarray) -> jax.Array | np.ndarray:
    """Rows of an array [N, ...], each on the device that computes it."""
    shape = len(rows), *array.shape[1:]
    at = sharding.fitting(shape, ("batch", *(None for _ in shape[1:])))
    if at is None:
        return array[rows[0] : rows[0] + 1]
    return jax.make_array_from_callback(shape, at, lambda index: array[rows[_first(index)]])


def _keep_own(array: np.ndarray, rows: np.ndarray, computed: jax.Array) -> None:
    """Puts the rows [B, ...] that this process's devices computed where they belong in an array [N, ...]."""
    for shard in computed.addressable_shards:
        array[rows[_first(shard.index)]] = np.asarray(shard.data)


def _first(index: tuple[slice, ...] | None) -> slice:
    """Which rows of a batch a part of it holds; None stands for all of it."""
    return slice(None) if index is None else index[0]
