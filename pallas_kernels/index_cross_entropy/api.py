"""index_cross_entropy: what index scores miss of given targets, and its gradient (distillation)."""

from __future__ import annotations

import jax

from pallas_kernels import bits, dispatch
from pallas_kernels.index_cross_entropy import reference
from pallas_kernels.shapes import check_shapes

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.index_cross_entropy.mosaic_gpu", "index_cross_entropy"),
    "xla": dispatch.Backend(reference.index_cross_entropy),
}


def index_cross_entropy(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    target: jax.Array,
    selection_bits: jax.Array,
    *,
    q_positions: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The sum over queries of -sum_t target_t log softmax(I)_t within the selection: a float32 scalar.

    I = sum_h w_h relu(q_h . k) of the index heads. With the target's entropy taken off it is the divergence from the target,
    and with a mean of targets it has the gradient of the mean of their divergences.

    Args:
      index_queries: [B, S, Hi, Di]; index_keys: [B, T, Di]; head_weights: [B, S, Hi] float32.
      target: [B, S, T] float32 or bfloat16, not negative, zero outside the selection; `attention_target` makes it.
      selection_bits: [B, ceil(T / 32), S] int32, the selection as `bits.pack` or `bits.causal` make it. No query may select a
        later position than its own.
      q_positions: [S] int32, ascending: the position of each query in its row, as T counts them; None for 0 .. S-1.
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
        "target": "B, S, T",
        "selection_bits": "B, ceil(T / 32), S",
        "q_positions": "S",
    }
    arrays = (index_queries, index_keys, head_weights, *jax.lax.stop_gradient((target, selection_bits)))
    check_shapes("index_cross_entropy", expected, (*arrays, q_positions), bits.DERIVED_SIZES)
    bits.check_dtype("index_cross_entropy", selection_bits)
    return dispatch.call("index_cross_entropy", BACKENDS, implementation, *arrays, q_positions=q_positions)
