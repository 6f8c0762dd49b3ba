"""gather_rows and sum_rows: tokens in the order of their experts, and what the experts made of a token added up."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.permuted import reference
from pallas_kernels.quant import Scaled

_KERNELS = "pallas_kernels.permuted.mosaic_gpu"

GATHER_BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend(_KERNELS, "gather_rows"),
    "xla": dispatch.Backend(reference.gather_rows),
}
SUM_BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend(_KERNELS, "sum_rows", "why_not_sum"),
    "xla": dispatch.Backend(reference.sum_rows),
}


def gather_rows(rows: jax.Array | Scaled, index: jax.Array, *, implementation: str | None = None) -> Any:
    """rows [N, K], an array or in 8 bits with scales by row, at index [M] in [0, N): [M, K] of the same kind.

    `implementation` None picks "mosaic_gpu" on Hopper for rows in 8 bits, else "xla", the reference, which has a gradient.
    Raises ValueError for shapes that do not fit, NotImplementedError where a named implementation cannot serve.
    """
    if rows.ndim != 2 or index.ndim != 1 or (isinstance(rows, Scaled) and not rows.by_row):
        raise ValueError(
            f"gather_rows: expected rows [N, K], with scales by row, and index [M], got {rows.shape}, {index.shape}"
        )
    return dispatch.call("gather_rows", GATHER_BACKENDS, implementation, rows, index.astype(jnp.int32))


def sum_rows(
    rows: jax.Array,
    places: jax.Array,
    weights: jax.Array,
    added: tuple[jax.Array, ...] = (),
    *,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """The sums over j of weights[n, j] * rows[places[n, j]], and of `added`: [N, D] in `dtype`, added up in float32.

    rows [M, D]; places [N, k] in [0, M); weights [N, k] float32; added: arrays [N, D]. Summands are added in the order in
    which they stand here, j ascending. `implementation` and errors are those of gather_rows; "mosaic_gpu" serves bfloat16.
    """
    n, d = places.shape[0] if places.ndim == 2 else -1, rows.shape[-1]
    if rows.ndim != 2 or weights.shape != places.shape or any(other.shape != (n, d) for other in added):
        shapes = [x.shape for x in (rows, places, weights, *added)]
        raise ValueError(f"sum_rows: expected rows [M, D], places and weights [N, k] and arrays [N, D], got {shapes}")
    return dispatch.call(
        "sum_rows", SUM_BACKENDS, implementation, rows, places.astype(jnp.int32), weights, tuple(added), dtype=jnp.dtype(dtype)
    )
