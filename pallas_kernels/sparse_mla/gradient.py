"""A kernel's forward pass with the reference's backward pass."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_mla import reference


def of_reference(forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """forward(queries, latents, indices, scale=, value_dim=) as run(queries, latents, indices, scale, value_dim)."""

    def run(queries: jax.Array, latents: jax.Array, indices: jax.Array, scale: float, value_dim: int) -> jax.Array:
        return forward(queries, latents, indices, scale=scale, value_dim=value_dim)

    def run_and_keep(queries, latents, indices, scale, value_dim):
        return run(queries, latents, indices, scale, value_dim), (queries, latents, indices)

    def backward(scale, value_dim, kept, cotangent):
        queries, latents, indices = kept
        # A latent's gradient is a sum over every query that selected it: in float32, or later terms would be lost.
        wide = latents.astype(jnp.float32)
        _, pull = jax.vjp(lambda q, kv: reference.sparse_mla(q, kv, indices, scale=scale, value_dim=value_dim), queries, wide)
        of_queries, of_latents = pull(cotangent)
        return of_queries, of_latents.astype(latents.dtype), None

    differentiable = jax.custom_vjp(run, nondiff_argnums=(3, 4))
    differentiable.defvjp(run_and_keep, backward)
    return differentiable
