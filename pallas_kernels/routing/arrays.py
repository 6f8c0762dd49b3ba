"""What `route` returns: the experts that rows chose, and in what order kernels go through them."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """The experts of N rows, k for each, E of which are a device's own. Group E stands for the shared experts, for all rows.

    The pair of row n and its j-th expert has the number n k + j, the pair of row n and the shared experts N k + n.
    """

    experts: jax.Array  # [N, k] int32; -1 where another device has the expert
    weights: jax.Array  # [N, k] float32
    groups: jax.Array  # [E + 1] int32: first those that have rows, E before the others, then -1
    num_groups: jax.Array  # [1] int32: how many groups have rows
    barrier_count: jax.Array  # [1] int32: zero; thread blocks count their arrivals at a grid barrier in it
    slots: jax.Array  # [E + 1, N] int32: the number of the pair of a group and a row, -1 where the row is not in the group
