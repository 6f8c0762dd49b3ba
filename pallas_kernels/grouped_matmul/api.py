"""grouped_matmul: rows sorted by expert, each group times its own matrix.

grouped_swiglu is the first product of a SwiGLU layer with its activation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_tpu, per_row, reference
from pallas_kernels.quant import Scaled


def ragged_dot(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(rows, matrices, group_sizes, preferred_element_type=jnp.float32).astype(rows.dtype)


def _prefers_blocks(*_: jax.Array) -> str | None:
    return "XLA's CPU backend expands it to every row times every matrix" if device.platform() == "cpu" else None


BACKENDS = {
    "mosaic_gpu": dispatch.Backend(mosaic_gpu.grouped_matmul, mosaic_gpu.why_not),
    "per_row": dispatch.Backend(per_row.grouped_matmul, per_row.why_not),
    "mosaic_tpu": dispatch.Backend(mosaic_tpu.grouped_matmul, mosaic_tpu.why_not),
    "ragged_dot": dispatch.Backend(ragged_dot, _prefers_blocks),
    "xla": dispatch.Backend(reference.grouped_matmul),
}


def grouped_matmul(
    rows: jax.Array, matrices: jax.Array | Scaled, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """rows [M, K] in groups of group_sizes [E] times matrices [E, K, N] -> [M, N] in the dtype of `rows`.

    Matrices in 8 bits are [E, N, K].

    The sizes sum to at most M: results for the rows after the last group are undefined. Products are accumulated in
    float32. `implementation` None picks the best for the backend:
    "mosaic_gpu" on Hopper, else "per_row" for many more groups than rows (decode), "mosaic_tpu" on TPU, XLA's "ragged_dot"
    on other accelerators and "xla", the reference, on a CPU. Raises ValueError for shapes that do not fit,
    NotImplementedError where a named implementation cannot serve.
    """
    if isinstance(matrices, Scaled):
        return reference.grouped_matmul(rows, matrices, group_sizes.astype(jnp.int32))
    if rows.ndim != 2 or matrices.ndim != 3 or rows.shape[1] != matrices.shape[1] or group_sizes.shape != matrices.shape[:1]:
        raise ValueError(
            "grouped_matmul: expected rows [M, K], matrices [E, K, N] and group_sizes [E], "
            f"got {rows.shape}, {matrices.shape} and {group_sizes.shape}"
        )
    return dispatch.call("grouped_matmul", BACKENDS, implementation, rows, matrices, group_sizes.astype(jnp.int32))


SWIGLU_BACKENDS = {
    "mosaic_gpu": dispatch.Backend(mosaic_gpu.grouped_swiglu, mosaic_gpu.why_not_swiglu),
    "unfused": dispatch.Backend(functools.partial(reference.swiglu_of, grouped_matmul)),
    "xla": dispatch.Backend(functools.partial(reference.swiglu_of, reference.grouped_matmul)),
}


def grouped_swiglu(
    rows: jax.Array, gate_up: jax.Array | Scaled, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """silu(gate) * up of rows [M, K] in groups of group_sizes [E] times gate_up [E, K, 2, I] -> [M, I].

    In 8 bits gate_up is [E, 2, I, K].

    As grouped_matmul, whose result "unfused", the best but for many rows on Hopper, rounds before the activation;
    "mosaic_gpu" rounds the activation only.
    """
    if isinstance(gate_up, Scaled):
        return reference.scaled_swiglu(rows, gate_up, group_sizes.astype(jnp.int32))
    expected = rows.ndim == 2 and gate_up.ndim == 4 and gate_up.shape[2] == 2
    if not expected or rows.shape[1] != gate_up.shape[1] or group_sizes.shape != gate_up.shape[:1]:
        raise ValueError(
            "grouped_swiglu: expected rows [M, K], gate_up [E, K, 2, I] and group_sizes [E], "
            f"got {rows.shape}, {gate_up.shape} and {group_sizes.shape}"
        )
    return dispatch.call("grouped_swiglu", SWIGLU_BACKENDS, implementation, rows, gate_up, group_sizes.astype(jnp.int32))
