"""routing: which experts rows are given to, and in what order.

`route` is for the few rows of a decode step, `choose` and `sort_by_group` for any number of rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.routing import reference
from pallas_kernels.routing.arrays import Routes

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.routing.mosaic_gpu", "route"),
    "xla": dispatch.Backend(reference.route),
}
_MANY_ROWS = "pallas_kernels.routing.mosaic_gpu_many_rows"
CHOOSE_BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend(_MANY_ROWS, "choose"),
    "xla": dispatch.Backend(reference.choose),
}
SORT_BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend(_MANY_ROWS, "sort_by_group", "why_not_sort"),
    "xla": dispatch.Backend(reference.sort_by_group),
}


def route(
    logits: jax.Array,
    bias: jax.Array,
    *,
    choices: int,
    normalised: bool,
    scale: float,
    n_group: int = 1,
    topk_group: int = 1,
    shared: bool = False,
    own: tuple[jax.Array, int] | None = None,
    implementation: str | None = None,
) -> Routes:
    """The experts of rows with router logits [N, E] float32, and the tables by which kernels go through them.

    A row is given to the `choices` experts of largest sigmoid(logits) + bias. Among equals the lower number comes first,
    and NaN comes before all others. Of `n_group` groups of experts only the `topk_group` best count; a group is as good as
    its two best experts together, and experts of the other groups count as -inf.

    Args:
      bias: [E] float32, which counts for the choice alone.
      normalised: whether a weight, the sigmoid, is divided by the sum of the row's chosen ones.
      scale: by which weights are multiplied last.
      shared: whether there are shared experts too, to which all rows are given.
      own: where devices split the experts, the number of the first that this one has, int32, and how many it has. Routes then
        count experts from that first one.
      implementation: "mosaic_gpu" on Hopper, for up to 64 rows, else "xla", the reference; None picks.

    Raises:
      ValueError for shapes that do not fit, NotImplementedError where the named implementation cannot serve.
    """
    _check("route", logits, bias, choices, n_group, topk_group)
    of_choice = {"choices": choices, "normalised": normalised, "scale": scale, "n_group": n_group, "topk_group": topk_group}
    first, num_own = (0, logits.shape[1]) if own is None else own
    arrays = logits.astype(jnp.float32), bias.astype(jnp.float32), jnp.asarray(first, jnp.int32).reshape(1)
    return dispatch.call("route", BACKENDS, implementation, *arrays, num_own=num_own, shared=shared, **of_choice)


def _check(operation: str, logits: jax.Array, bias: jax.Array, choices: int, n_group: int, topk_group: int) -> None:
    if logits.ndim != 2 or bias.shape != logits.shape[1:] or not 1 <= choices <= logits.shape[1]:
        shapes = f"{logits.shape}, {bias.shape}, {choices}"
        raise ValueError(f"{operation}: expected logits [N, E], bias [E] and 1 to E choices, got {shapes}")
    experts = logits.shape[1]
    if n_group < 1 or experts % n_group or (n_group > 1 and experts < 2 * n_group) or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"{operation}: expected n_group equal groups of at least two of {experts} experts and 1 to n_group of them kept, "
            f"got n_group {n_group} and topk_group {topk_group}"
        )


def choose(
    logits: jax.Array,
    bias: jax.Array,
    *,
    choices: int,
    normalised: bool,
    scale: float,
    n_group: int = 1,
    topk_group: int = 1,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The experts [N, k] of rows with router logits [N, E] float32, and their weights [N, k], as `route` has them.

    Weights have the gradient of the reference. Arguments, `implementation` and errors are those of `route`.
    """
    _check("choose", logits, bias, choices, n_group, topk_group)
    of_choice = {"choices": choices, "normalised": normalised, "scale": scale, "n_group": n_group, "topk_group": topk_group}
    return dispatch.call("choose", CHOOSE_BACKENDS, implementation, logits, bias, **of_choice)


def sort_by_group(
    groups: jax.Array, num_groups: int, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """groups [M] int32 from 0 to `num_groups` sorted, stable; `num_groups` stands for none and comes last.

    Returns the order [M] int32, element i of which is the index in `groups` of what comes i-th; its inverse [M] int32; and how
    many there are of each group, [num_groups] int32. `implementation` and errors are those of `route`.
    """
    if groups.ndim != 1:
        raise ValueError(f"sort_by_group: expected groups [M], got {groups.shape}")
    return dispatch.call("sort_by_group", SORT_BACKENDS, implementation, groups.astype(jnp.int32), num_groups)
