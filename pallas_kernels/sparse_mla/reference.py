"""The reference sparse_mla in plain XLA.

A block of queries at a time: gather the selected latents of the block, then two small batched products with a softmax
between. A masked product with all T latents would cost T / k times the arithmetic, so the gather pays already at a few
hundred keys. The block is sized so that its gathered latents stay in a CPU's cache; an accelerator wants more work per step
than that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, quant
from pallas_kernels.blocks import map_queries

GATHER_BYTES = {"cpu": 4 * 2**20, "other": 256 * 2**20}


def attend(
    queries: jax.Array, selected: jax.Array, valid: jax.Array, *, scale: float, value_dim: int
) -> tuple[jax.Array, jax.Array]:
    """queries [S, H, C+R] over their own selected latents [S, k, C+R], of which valid [S, k] count.

    Returns the context [S, H, C] float32, and the log-sum-exp [S, H] of the logits, -inf where none counts.
    """
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    logits = jnp.einsum("shd,skd->shk", queries, selected, preferred_element_type=jnp.float32, precision=precision) * scale
    logits = jnp.where(valid[:, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = selected[..., :value_dim]
    out = jnp.einsum(
        "shk,skc->shc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32, precision=precision
    )
    return out / jnp.where(total == 0, 1.0, total), (top + jnp.log(total))[..., 0]


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    return_lse: bool = False,
) -> Any:
    b, s, _, width = queries.shape
    if isinstance(latents, quant.Latents):
        latents, indices = quant.dequantise_selected(latents, indices, queries.dtype)
    k = indices.shape[2]

    def block(q: jax.Array, idx: jax.Array) -> Any:
        def row(q: jax.Array, kv: jax.Array, idx: jax.Array) -> tuple[jax.Array, jax.Array]:
            valid = idx >= 0
            # An empty entry reads row 0, whose content may be anything, NaN included: zero it.
            selected = jnp.where(valid[..., None], kv[jnp.where(valid, idx, 0)], 0).astype(q.dtype)
            return attend(q, selected, valid, scale=scale, value_dim=value_dim)

        out, lse = jax.vmap(row)(q, latents, idx)
        out = out.astype(queries.dtype)
        return (out, lse) if return_lse else out

    budget = GATHER_BYTES.get(device.platform(), GATHER_BYTES["other"])
    rows = max(1, min(s, budget // (b * k * width * latents.dtype.itemsize)))
    return map_queries(block, (queries, indices), rows)
