"""routing: which experts the rows of a decode step are given to, and the tables by which kernels go through them."""

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


def route(
    logits: jax.Array,
    bias: jax.Array,
    *,
    choices: int,
    normalised: bool,
    scale: float,
    shared: bool = False,
    implementation: str | None = None,
) -> Routes:
    """The experts of rows with router logits [N, E] float32, and the tables by which kernels go through them.

    The `choices` experts of largest sigmoid(logits) + bias; the lower number comes first among equals, and NaN before all
    others. A weight is the sigmoid, over the sum of a row's with `normalised`, times `scale`.

    Args:
      bias: [E] float32, counts for the choice alone.
      shared: whether there are shared experts too, of which all rows are.
      implementation: "mosaic_gpu" on Hopper, else "xla", the reference; None picks.

    Raises:
      ValueError for shapes that do not fit, NotImplementedError where the named implementation cannot serve.
    """
    if logits.ndim != 2 or bias.shape != logits.shape[1:] or not 1 <= choices <= logits.shape[1]:
        raise ValueError(
            f"route: expected logits [N, E], bias [E] and 1 to E choices, got {logits.shape}, {bias.shape}, {choices}"
        )
    options = {"choices": choices, "normalised": normalised, "scale": scale, "shared": shared}
    return dispatch.call("route", BACKENDS, implementation, logits.astype(jnp.float32), bias.astype(jnp.float32), **options)
