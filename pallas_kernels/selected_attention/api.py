"""selected_attention: multi-head attention over selected keys, with the selection as a bit for every pair; used in training."""

from __future__ import annotations

import jax

from pallas_kernels import bits, dispatch
from pallas_kernels.selected_attention import reference
from pallas_kernels.shapes import check_shapes

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.selected_attention.mosaic_gpu", "selected_attention"),
    "xla": dispatch.Backend(reference.selected_attention),
}


def selected_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    selection_bits: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale * q . k) v over the selected keys, float32 inside, and the logarithm of the softmax's denominator.

    Numbers must be finite, also those of keys that nobody selects: what is not selected is multiplied by zero.

    Args:
      queries: [B, S, H, D].
      keys, values: [B, T, H, D] and [B, T, H, V].
      selection_bits: [B, ceil(T / 32), S] int32, the selection as `bits.pack` or `bits.causal` make it. No query may select a
        later position than its own.
      scale: of the logits.
      q_positions: [S] int32, ascending: the position of each query in its row, as T counts them; None for 0 .. S-1.
      implementation: None picks the best for the backend; "mosaic_gpu" is for Hopper, "xla" runs anywhere and is the
        reference.

    Returns:
      [B, S, H, V] in the dtype of values, zeros where nothing is selected, differentiable in queries, keys and values,
      deterministically; and [B, H, S] float32, through which no gradient flows, 0 where nothing is selected.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    expected = {
        "queries": "B, S, H, D",
        "keys": "B, T, H, D",
        "values": "B, T, H, V",
        "selection_bits": "B, ceil(T / 32), S",
        "q_positions": "S",
    }
    arrays = (queries, keys, values, selection_bits)
    check_shapes("selected_attention", expected, (*arrays, q_positions), bits.DERIVED_SIZES)
    bits.check_dtype("selected_attention", selection_bits)
    return dispatch.call("selected_attention", BACKENDS, implementation, *arrays, scale=scale, q_positions=q_positions)
