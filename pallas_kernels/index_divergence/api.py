"""index_divergence: the divergence of index scores from the attention they predict, and its gradient (distillation)."""

from __future__ import annotations

import jax

from pallas_kernels import bits, dispatch
from pallas_kernels.index_divergence import reference
from pallas_kernels.shapes import check_shapes

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.index_divergence.mosaic_gpu", "index_divergence"),
    "xla": dispatch.Backend(reference.index_divergence),
}


def index_divergence(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    selection_bits: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The sum over queries of KL(p || softmax of I), both within the selection: a float32 scalar.

    p is the mean over heads of exp(scale * q . k - lse) and a constant, I = sum_h w_h relu(q_h . k) of the index heads.

    Args:
      index_queries: [B, S, Hi, Di]; index_keys: [B, T, Di]; head_weights: [B, S, Hi] float32.
      queries, keys: [B, S, H, D] and [B, T, H, D] of the attention.
      lse, selection_bits: [B, H, S] float32 and [B, ceil(T / 32), S] int32, which `selected_attention` returned and was given.
      scale, q_positions: as `selected_attention` was given them.
      implementation: None picks the best for the backend; "mosaic_gpu" is for Hopper, "xla" runs anywhere and is the
        reference.

    Differentiable in the first three, deterministically; no gradient flows to the others.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    expected = {
        "index_queries": "B, S, Hi, Di",
        "index_keys": "B, T, Di",
        "head_weights": "B, S, Hi",
        "queries": "B, S, H, D",
        "keys": "B, T, H, D",
        "lse": "B, H, S",
        "selection_bits": "B, ceil(T / 32), S",
        "q_positions": "S",
    }
    arrays = (index_queries, index_keys, head_weights, queries, keys, lse, selection_bits)
    check_shapes("index_divergence", expected, (*arrays, q_positions), bits.DERIVED_SIZES)
    bits.check_dtype("index_divergence", selection_bits)
    constants = jax.lax.stop_gradient(arrays[3:])
    arrays = (*arrays[:3], *constants)
    return dispatch.call("index_divergence", BACKENDS, implementation, *arrays, scale=scale, q_positions=q_positions)
