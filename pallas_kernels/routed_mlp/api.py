"""routed_mlp: the experts of a decode step's few rows, and the shared ones, with matrices in 8 bits."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.quant import Scaled
from pallas_kernels.routed_mlp import reference
from pallas_kernels.routing.arrays import Routes

MAX_ROWS = 16  # of the kernel for Hopper, which does not launch with 24

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.routed_mlp.mosaic_gpu", "routed_mlp"),
    "xla": dispatch.Backend(reference.routed_mlp),
}


def routed_mlp(
    rows: jax.Array,
    routes: Routes,
    gate_up: Scaled,
    down: Scaled,
    shared_gate_up: Scaled | None = None,
    shared_down: Scaled | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The weighted sum over the experts of rows [N, D], and the shared experts of them: [N, D] float32 each, None without.

    Experts that the routes leave to other devices count for nothing. An expert is down (silu(gate row) * up row), its hidden
    numbers rounded to the dtype of the rows.

    Args:
      routes: of the rows, made with `shared` where there are shared experts.
      gate_up: [E, 2, I, D], down: [E, D, I]; shared_gate_up: [2 Is, D], shared_down: [D, Is].
      implementation: "mosaic_gpu" on Hopper reads the matrices of chosen experts once each, for up to MAX_ROWS rows; "xla", the
        reference, multiplies by all of them. None picks.

    Raises:
      ValueError for shapes that do not fit, NotImplementedError where the named implementation cannot serve.
    """
    fits = rows.ndim == 2 and gate_up.ndim == 4 and down.ndim == 3
    if fits:
        experts, two, width, hidden = gate_up.shape
        fits = two == 2 and rows.shape[1] == hidden and down.shape == (experts, hidden, width)
        fits = fits and routes.experts.shape[0] == rows.shape[0] and routes.slots.shape == (experts + 1, rows.shape[0])
    if not fits:
        raise ValueError(
            "routed_mlp: expected rows [N, D] and their routes, gate_up [E, 2, I, D] and down [E, D, I], "
            f"got {rows.shape}, {gate_up.shape} and {down.shape}"
        )
    if (shared_gate_up is None) != (shared_down is None):
        missing = "shared_gate_up" if shared_gate_up is None else "shared_down"
        raise ValueError(f"routed_mlp: expected shared_gate_up and shared_down together, {missing} is None")
    if shared_gate_up is not None and shared_down is not None:
        hidden, width = shared_down.shape if shared_down.ndim == 2 else (0, 0)
        if hidden != rows.shape[1] or shared_gate_up.shape != (2 * width, hidden):
            raise ValueError(
                f"routed_mlp: expected shared_gate_up [2 Is, D] and shared_down [D, Is] for D = {rows.shape[1]}, "
                f"got {shared_gate_up.shape} and {shared_down.shape}"
            )
    matrices = gate_up, down, shared_gate_up, shared_down
    return dispatch.call("routed_mlp", BACKENDS, implementation, rows, routes, *jax.lax.stop_gradient(matrices))
