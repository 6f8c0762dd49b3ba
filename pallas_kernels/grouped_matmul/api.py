"""grouped_matmul: rows sorted by expert, each group times its own matrix.

grouped_swiglu is the first product of a SwiGLU layer with its activation, grouped_mlp the whole layer.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch
from pallas_kernels.grouped_matmul import (
    mosaic_gpu,
    mosaic_gpu_codes,
    mosaic_gpu_prefill,
    mosaic_tpu,
    mosaic_tpu_codes,
    per_row,
    reference,
)
from pallas_kernels.quant import Scaled, dequantise


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


def decoded(rows: jax.Array | Scaled, matrices: Scaled, group_sizes: jax.Array) -> jax.Array:
    """By way of all matrices in 16 bits or float32, whichever the rows are."""
    if isinstance(rows, Scaled):
        rows = dequantise(rows, jnp.bfloat16)
    return grouped_matmul(rows, jnp.swapaxes(dequantise(matrices, rows.dtype), 1, 2), group_sizes)


def _prefers_blocks_of_codes(*_: Any) -> str | None:
    return "a CPU decodes them one at a time" if device.platform() == "cpu" else None


CODES_BACKENDS = {
    "mosaic_gpu": dispatch.Backend(mosaic_gpu_codes.grouped_matmul, mosaic_gpu_codes.why_not),
    "per_row": dispatch.Backend(per_row.grouped_matmul_of_codes, per_row.why_not),
    "mosaic_tpu": dispatch.Backend(mosaic_tpu_codes.grouped_matmul, mosaic_tpu_codes.why_not),
    "decoded": dispatch.Backend(decoded, _prefers_blocks_of_codes),
    "xla": dispatch.Backend(reference.grouped_matmul),
}


def grouped_matmul(
    rows: jax.Array | Scaled, matrices: jax.Array | Scaled, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """rows [M, K] in groups of group_sizes [E] times matrices [E, K, N] -> [M, N] in the dtype of `rows`.

    The sizes sum to at most M: results for the rows after the last group are undefined. Products are accumulated in
    float32. `implementation` None picks the best for the backend:
    "mosaic_gpu" on Hopper, else "per_row" for many more groups than rows (decode), "mosaic_tpu" on TPU, XLA's "ragged_dot"
    on other accelerators and "xla", the reference, on a CPU. Raises ValueError for shapes that do not fit,
    NotImplementedError where a named implementation cannot serve.

    Matrices in 8 bits are [E, N, K] and constants: they have no gradient. With them rows may be in 8 bits too, for a result
    in bfloat16; where groups have many rows, "mosaic_gpu" quantises bfloat16 rows first (quantise_rows). "mosaic_tpu" decodes
    matrices as it reads them; on other accelerators "decoded" multiplies by the decoded matrices.
    """
    in_codes = isinstance(matrices, Scaled)
    k = matrices.shape[-1 if in_codes else 1] if matrices.ndim == 3 else None
    fits = in_codes or not isinstance(rows, Scaled)
    if not fits or rows.ndim != 2 or k != rows.shape[1] or group_sizes.shape != matrices.shape[:1]:
        raise ValueError(
            "grouped_matmul: expected rows [M, K], matrices [E, K, N], in 8 bits [E, N, K], and group_sizes [E], "
            f"got {rows.shape}, {matrices.shape} and {group_sizes.shape}"
        )
    backends = BACKENDS
    if isinstance(matrices, Scaled):
        backends, matrices = CODES_BACKENDS, jax.lax.stop_gradient(matrices)
    return dispatch.call("grouped_matmul", backends, implementation, rows, matrices, group_sizes.astype(jnp.int32))


SWIGLU_BACKENDS = {
    "mosaic_gpu": dispatch.Backend(mosaic_gpu.grouped_swiglu, mosaic_gpu.why_not_swiglu),
    "unfused": dispatch.Backend(functools.partial(reference.swiglu_of, grouped_matmul)),
    "xla": dispatch.Backend(functools.partial(reference.swiglu_of, reference.grouped_matmul)),
}
CODES_SWIGLU_BACKENDS = {
    "mosaic_gpu": dispatch.Backend(mosaic_gpu_codes.grouped_swiglu, mosaic_gpu_codes.why_not_swiglu),
    "mosaic_tpu": dispatch.Backend(mosaic_tpu_codes.grouped_swiglu, mosaic_tpu_codes.why_not),
    "unfused": dispatch.Backend(functools.partial(reference.scaled_swiglu_of, grouped_matmul)),
    "xla": dispatch.Backend(functools.partial(reference.scaled_swiglu_of, reference.grouped_matmul)),
}


def grouped_swiglu(
    rows: jax.Array | Scaled, gate_up: jax.Array | Scaled, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """silu(gate) * up of rows [M, K] in groups of group_sizes [E] times gate_up [E, K, 2, I] -> [M, I].

    As grouped_matmul, whose result "unfused", the best but for many rows on Hopper and matrices in 8 bits on TPU, rounds
    before the activation; the kernels round the activation only. In 8 bits gate_up is [E, 2, I, K]. Errors as of
    grouped_matmul.
    """
    in_codes = isinstance(gate_up, Scaled)
    fits = (in_codes or not isinstance(rows, Scaled)) and rows.ndim == 2 and gate_up.ndim == 4
    k, pair = (gate_up.shape[-1], gate_up.shape[1]) if in_codes else gate_up.shape[1:3] if fits else (0, 0)
    if not fits or pair != 2 or rows.shape[1] != k or group_sizes.shape != gate_up.shape[:1]:
        raise ValueError(
            "grouped_swiglu: expected rows [M, K], gate_up [E, K, 2, I], in 8 bits [E, 2, I, K], and group_sizes [E], "
            f"got {rows.shape}, {gate_up.shape} and {group_sizes.shape}"
        )
    backends = SWIGLU_BACKENDS
    if isinstance(gate_up, Scaled):
        backends, gate_up = CODES_SWIGLU_BACKENDS, jax.lax.stop_gradient(gate_up)
    return dispatch.call("grouped_swiglu", backends, implementation, rows, gate_up, group_sizes.astype(jnp.int32))


def quantises(rows: jax.Array | jax.ShapeDtypeStruct, gate_up: Scaled, group_sizes: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether grouped_swiglu would quantise rows [M, K]: then codes may be brought to their groups instead of them."""
    served = dispatch.best(CODES_SWIGLU_BACKENDS, rows, gate_up, group_sizes) == "mosaic_gpu"
    return served and mosaic_gpu_prefill.serves(rows.shape[0], gate_up.shape[0])


def _one_after_the_other(
    rows: jax.Array | Scaled, gate_up: jax.Array | Scaled, down: jax.Array | Scaled, group_sizes: jax.Array
) -> jax.Array:
    return grouped_matmul(grouped_swiglu(rows, gate_up, group_sizes), down, group_sizes)


MLP_BACKENDS = {
    "mosaic_gpu": dispatch.Backend(mosaic_gpu_codes.grouped_mlp, mosaic_gpu_codes.why_not_mlp),
    "xla": dispatch.Backend(_one_after_the_other),
}


def grouped_mlp(
    rows: jax.Array | Scaled,
    gate_up: jax.Array | Scaled,
    down: jax.Array | Scaled,
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """The SwiGLU layers of rows [M, K] in groups of group_sizes [E]: grouped_matmul(grouped_swiglu(...), down) -> [M, K'].

    "xla" is the two operations, each with its best implementation. For many rows and matrices in 8 bits "mosaic_gpu" on
    Hopper quantises the activations between the products in the first one, before they leave the chip.
    """
    return dispatch.call("grouped_mlp", MLP_BACKENDS, implementation, rows, gate_up, down, group_sizes.astype(jnp.int32))
