"""Activations in 8 bits, as products with matrices in 8 bits take them.

quantise_rows rounds what is given, quantise_swiglu a SwiGLU activation, and normalise_rows a normalised input, which it returns
unrounded too. quantise_index_queries is for the indexer, whose queries have a scale for each head.
"""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.quant import Scaled
from pallas_kernels.quantised import reference

_KERNELS = "pallas_kernels.quantised.mosaic_gpu"

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend(_KERNELS, "quantise_rows"),
    "xla": dispatch.Backend(reference.quantise_rows),
}
SWIGLU_BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend(_KERNELS, "quantise_swiglu", "why_not_swiglu"),
    "xla": dispatch.Backend(reference.quantise_swiglu),
}
NORMALISE_BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend(_KERNELS, "normalise_rows", "why_not_normalise"),
    "xla": dispatch.Backend(reference.normalise_rows),
}
INDEX_BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.quantised.mosaic_gpu_index", "quantise_index_queries"),
    "xla": dispatch.Backend(reference.quantise_index_queries),
}


def quantise_rows(rows: jax.Array, *, implementation: str | None = None) -> Scaled:
    """rows [M, K] in 8 bits, with a float32 scale for every 128 numbers: max(|x|, 1e-4) / 448 (quant.quantise_rows).

    `implementation` None picks "mosaic_gpu" on Hopper for bfloat16 rows with a K that is a multiple of 128, else "xla", the
    reference. Codes and scales are the same bit for bit. There is no gradient. Raises ValueError for other than two axes,
    NotImplementedError where a named implementation cannot serve.
    """
    if rows.ndim != 2:
        raise ValueError(f"quantise_rows: expected rows [M, K], got {rows.shape}")
    return dispatch.call("quantise_rows", BACKENDS, implementation, rows)


def quantise_swiglu(gate_up: jax.Array, *, implementation: str | None = None) -> Scaled:
    """silu(gate) * up of gate_up [M, 2 F], gate first, in 8 bits [M, F]: everything up to the codes is computed in float32.

    Scales, `implementation` and errors are those of quantise_rows.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"quantise_swiglu: expected gate and up [M, 2 F], got {gate_up.shape}")
    return dispatch.call("quantise_swiglu", SWIGLU_BACKENDS, implementation, gate_up)


def normalise_rows(
    rows: jax.Array,
    weight: jax.Array,
    eps: float,
    *,
    plain: bool = True,
    in_8_bits: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array | None, Scaled | None]:
    """weight [K] times the first K numbers of rows [M, W >= K] over their root mean square: [M, K], and the same in 8 bits.

    The quotient is rounded to the dtype of `rows`, the product to that of `weight`. A result that is not asked for, by
    `plain` and `in_8_bits`, is None. Scales, `implementation` and errors are those of quantise_rows, but the implementations
    add squares in different orders, so that their results differ by roundings.
    """
    if rows.ndim != 2 or weight.ndim != 1 or not 0 < weight.shape[0] <= rows.shape[1]:
        raise ValueError(f"normalise_rows: expected rows [M, W] and weight [K], K <= W, got {rows.shape} and {weight.shape}")
    if not (plain or in_8_bits):
        raise ValueError("normalise_rows: plain and in_8_bits are both False, so there is no result")
    options = {"plain": plain, "in_8_bits": in_8_bits}
    return dispatch.call("normalise_rows", NORMALISE_BACKENDS, implementation, rows, weight, eps, **options)


def quantise_index_queries(
    product: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Index queries in 8 bits from their projection [M, Hi, Di]: codes [M, Hi, Di] and scales [M, Hi] (quant.quantise_index).

    The first R numbers of every head are rotated by cos and sin [M, R / 2] float32, and rounded to the dtype of `product`:
    pairs of neighbours, or unless `interleaved` those of j and j + R / 2. `implementation` and errors are those of
    quantise_rows; "mosaic_gpu" serves neighbours in heads of 128.
    """
    fits = product.ndim == 3 and cos.shape == sin.shape and cos.ndim == 2 and cos.shape[0] == product.shape[0]
    if not fits or 2 * cos.shape[1] > product.shape[2]:
        shapes = product.shape, cos.shape, sin.shape
        raise ValueError(f"quantise_index_queries: expected a product [M, Hi, Di], cos and sin [M, R / 2], got {shapes}")
    return dispatch.call("quantise_index_queries", INDEX_BACKENDS, implementation, product, cos, sin, interleaved=interleaved)
