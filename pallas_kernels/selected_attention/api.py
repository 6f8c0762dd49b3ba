"""selected_attention: multi-head attention where a bit for every pair says whether it counts; the form that training takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import bits, dispatch
from pallas_kernels.selected_attention import reference

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.selected_attention.mosaic_gpu", "selected_attention"),
    "xla": dispatch.Backend(reference.selected_attention),
}


def selected_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, words: jax.Array, *, scale: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale * q . k) v over the selected keys, float32 inside, and the logarithm of the softmax's denominator.

    Numbers must be finite, also those of keys that nobody selects: what is not selected is multiplied by zero.

    Args:
      queries: [B, S, H, D], at positions 0 .. S-1.
      keys, values: [B, T, H, D] and [B, T, H, V].
      words: [B, ceil(T / 32), S] int32, the selection as `bits.pack` or `bits.causal` make it. No query may select a
        later position than its own.
      scale: of the logits.
      implementation: None picks the best for the backend; "mosaic_gpu" is for Hopper, "xla" runs anywhere and is the
        reference.

    Returns:
      [B, S, H, V] in the dtype of values, zeros where nothing is selected, differentiable in queries, keys and values,
      deterministically; and [B, H, S] float32, through which no gradient flows, 0 where nothing is selected.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    (b, s, h, d), t = queries.shape, keys.shape[1]
    expected = (b, t, h, d), (b, t, h), (b, bits.num_words(t), s)
    if (keys.shape, values.shape[:3], words.shape) != expected or words.dtype != jnp.int32:
        shapes = f"queries {queries.shape}, keys {keys.shape}, values {values.shape}, words {words.shape} {words.dtype}"
        raise ValueError(f"selected_attention: these do not fit together: {shapes}")
    return dispatch.call("selected_attention", BACKENDS, implementation, queries, keys, values, words, scale=scale)
