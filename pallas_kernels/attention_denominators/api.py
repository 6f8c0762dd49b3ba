"""attention_denominators: what the exponentials of a query's attention logits add up to, without attending."""

from __future__ import annotations

import jax

from pallas_kernels import bits, dispatch
from pallas_kernels.attention_denominators import reference
from pallas_kernels.shapes import check_shapes

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.attention_denominators.mosaic_gpu", "attention_denominators"),
    "xla": dispatch.Backend(reference.attention_denominators),
}


def attention_denominators(
    queries: jax.Array,
    keys: jax.Array,
    selection_bits: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The logarithm of the softmax's denominator of every query and head, [B, H, S] float32: 0 where nothing is selected.

    It is what `selected_attention` returns beside its output, without values. No gradient flows through it.

    Args:
      queries, keys: [B, S, H, D] and [B, T, H, D].
      selection_bits: [B, ceil(T / 32), S] int32, the selection as `bits.pack` or `bits.causal` make it. No query may select a
        later position than its own.
      scale: of the logits.
      q_positions: [S] int32, ascending: the position of each query in its row, as T counts them; None for 0 .. S-1.
      implementation: None picks the best for the backend; "mosaic_gpu" is for Hopper, "xla" runs anywhere and is the
        reference.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    expected = {
        "queries": "B, S, H, D",
        "keys": "B, T, H, D",
        "selection_bits": "B, ceil(T / 32), S",
        "q_positions": "S",
    }
    arrays = jax.lax.stop_gradient((queries, keys, selection_bits))
    check_shapes("attention_denominators", expected, (*arrays, q_positions), bits.DERIVED_SIZES)
    bits.check_dtype("attention_denominators", selection_bits)
    options = {"scale": scale, "q_positions": q_positions}
    return dispatch.call("attention_denominators", BACKENDS, implementation, *arrays, **options)
