"""The experts of few rows in plain JAX: every row by every expert, those not chosen with weight 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Scaled, dequantise
from pallas_kernels.routing.arrays import Routes


def _swiglu(rows: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """rows [N, D], gate_up [2, I, D], down [D, I] -> [N, D] float32."""
    gate, up = (jnp.einsum("nd,id->ni", rows, half, preferred_element_type=jnp.float32) for half in gate_up)
    hidden = (jax.nn.silu(gate) * up).astype(rows.dtype)
    return jnp.einsum("ni,di->nd", hidden, down, preferred_element_type=jnp.float32)


def routed_mlp(
    rows: jax.Array, routes: Routes, gate_up: Scaled, down: Scaled, shared_gate_up: Scaled | None, shared_down: Scaled | None
) -> tuple[jax.Array, jax.Array | None]:
    experts = jnp.arange(gate_up.shape[0])
    gates = jnp.sum(jnp.where(routes.experts[None] == experts[:, None, None], routes.weights, 0.0), axis=-1)  # [E, N]

    def add(total: jax.Array, expert: tuple[jax.Array, Scaled, Scaled]) -> tuple[jax.Array, None]:
        weights, *matrices = expert
        return total + weights[:, None] * _swiglu(rows, *(dequantise(m, rows.dtype) for m in matrices)), None

    out = jax.lax.scan(add, jnp.zeros(rows.shape, jnp.float32), (gates, gate_up, down))[0]
    if shared_gate_up is None or shared_down is None:
        return out, None
    matrix = dequantise(shared_gate_up, rows.dtype)
    return out, _swiglu(rows, matrix.reshape(2, -1, matrix.shape[1]), dequantise(shared_down, rows.dtype))
