"""Rows of the text, of which a device keeps the first and the host the others.

What a step reads of the first rows stays on the device, as many as half of its free memory holds, so that the host need not
send it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import ops
from indexcache_jax.indexer_training.run import Run

DEVICE_SHARE = 0.5  # of a device's free memory that rows may fill


@dataclasses.dataclass(frozen=True)
class Rows:
    """An entry for each of the N rows of a run: of the first ones on the device, [1, ...] each, of the others on the host."""

    on_device: list[jax.Array]
    on_host: np.ndarray

    def of(self, rows: Sequence[int] | np.ndarray) -> jax.Array:
        """The entries of rows by their numbers, [B, ...] on the device."""
        there = len(self.on_device)
        if not there and len(rows) > 1:
            return jnp.asarray(self.on_host[rows])
        found = [self.on_device[row] if row < there else self.on_host[row - there : row - there + 1] for row in rows]
        return jnp.asarray(found[0]) if len(found) == 1 else jnp.concatenate(found)

    def put(self, row: int, entry: jax.Array, on_device: int) -> None:
        """Keeps the entry [1, ...] of the next row: of the first `on_device` rows on the device."""
        if row < on_device:
            self.on_device.append(entry)
        else:
            self.on_host[row - on_device] = np.asarray(entry[0])


def states_of(x: np.ndarray, on_device: int) -> Rows:
    """Hidden states [N, S, D], the first `on_device` rows of them on the device."""
    return Rows([jnp.asarray(x[row : row + 1]) for row in range(on_device)], x[on_device:])


def rows_on_device(device: jax.Device | None, run: Run, layers: int) -> int:
    """Of how many rows a device keeps what the steps of a group of `layers` layers read.

    On a CPU there are none, since the host's memory is at hand.
    """
    stats = (device or jax.local_devices()[0]).memory_stats() if ops.platform() != "cpu" else None
    if stats is None or "bytes_limit" not in stats:
        return 0
    c, length, size = run.config, run.tokens.shape[1], jnp.dtype(run.stage.compute_dtype).itemsize
    of_row = size * length * c.hidden_size
    of_row = of_row + size * length * length if run.keeps_targets else layers * (of_row + 4 * length * c.num_heads)
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return max(0, min(len(run.tokens), int(DEVICE_SHARE * free / of_row)))
