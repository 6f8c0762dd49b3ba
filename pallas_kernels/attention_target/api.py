"""attention_target: the attention that an indexer is to predict, a mean over heads, added up over layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import bits, dispatch
from pallas_kernels.attention_target import reference
from pallas_kernels.shapes import check_shapes

BACKENDS = {
    "mosaic_gpu": dispatch.hopper_backend("pallas_kernels.attention_target.mosaic_gpu", "attention_target"),
    "xla": dispatch.Backend(reference.attention_target),
}


def attention_target(
    total: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    selection_bits: jax.Array,
    *,
    share: jax.Array | float,
    scale: float,
    q_positions: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """total + share * p, [B, S, T] float32, and the entropy of p, [B, S] float32 in nats.

    p is the mean over heads of exp(scale * q . k - lse) within the selection, zero elsewhere. No gradient flows through either.

    Args:
      total: [B, S, T] float32, what other layers with the same selection add up to; zeros before the first.
      queries, keys, selection_bits, scale, q_positions: as `attention_denominators` takes them.
      lse: [B, H, S] float32, as `attention_denominators` and `selected_attention` return it.
      share: what this layer counts; may be traced.
      implementation: None picks the best for the backend; "mosaic_gpu" is for Hopper, "xla" runs anywhere and is the
        reference.

    Raises:
      ValueError for shapes that do not fit; NotImplementedError where a named implementation cannot serve.
    """
    expected = {
        "total": "B, S, T",
        "queries": "B, S, H, D",
        "keys": "B, T, H, D",
        "lse": "B, H, S",
        "selection_bits": "B, ceil(T / 32), S",
        "q_positions": "S",
    }
    arrays = jax.lax.stop_gradient((total, queries, keys, lse, selection_bits))
    check_shapes("attention_target", expected, (*arrays, q_positions), bits.DERIVED_SIZES)
    bits.check_dtype("attention_target", selection_bits)
    share = jax.lax.stop_gradient(jnp.asarray(share, jnp.float32))
    options = {"scale": scale, "q_positions": q_positions}
    return dispatch.call("attention_target", BACKENDS, implementation, *arrays, share, **options)
