"""The reference grouped_matmul in plain XLA.

Groups are padded to whole blocks of rows, so that every block has one matrix; a loop over the blocks multiplies each
with the matrix of its group. That costs at most one block of waste per group, where XLA's own expansion of a ragged
product on a CPU multiplies every row by every matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Scaled, dequantise

MAX_BLOCK = 64  # rows; 64 keeps a CPU's matrix units busy, fewer rows per group get a smaller block


def grouped_matmul(rows: jax.Array | Scaled, matrices: jax.Array | Scaled, group_sizes: jax.Array) -> jax.Array:
    """Rows in 8 bits are decoded to float32; matrices in 8 bits [E, N, K] are, one at a time, to the dtype of the rows."""
    if isinstance(rows, Scaled):
        return grouped_matmul(dequantise(rows, jnp.float32), matrices, group_sizes).astype(jnp.bfloat16)
    m, groups = rows.shape[0], matrices.shape[0]
    block = max(1, min(MAX_BLOCK, m // groups))
    blocks = -(-m // block) + groups  # enough whatever the sizes are

    padded_sizes = -(-group_sizes // block) * block
    starts, padded_starts = jnp.cumsum(group_sizes) - group_sizes, jnp.cumsum(padded_sizes) - padded_sizes
    group_of_row = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right")
    padded_row = jnp.arange(m) - starts[group_of_row] + padded_starts[group_of_row]
    padded = jnp.zeros((blocks * block, rows.shape[1]), rows.dtype).at[padded_row].set(rows, unique_indices=True)

    group_of_block = jnp.searchsorted(jnp.cumsum(padded_sizes), jnp.arange(blocks) * block, side="right")
    group_of_block = jnp.minimum(group_of_block, groups - 1)

    def multiply(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        block_rows, group = inputs
        matrix = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, group, keepdims=False), matrices)
        if isinstance(matrix, Scaled):
            matrix = dequantise(matrix, rows.dtype).T
        return jnp.dot(block_rows, matrix, preferred_element_type=jnp.float32).astype(rows.dtype)

    out = jax.lax.map(multiply, (padded.reshape(blocks, block, -1), group_of_block))
    return out.reshape(blocks * block, -1)[padded_row]


def swiglu_of(
    multiply: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    rows: jax.Array,
    gate_up: jax.Array,
    group_sizes: jax.Array,
) -> jax.Array:
    """silu(gate) * up [M, I] by way of one grouped product: rows [M, K], gate_up [E, K, 2, I]."""
    groups, k, _, width = gate_up.shape
    product = multiply(rows, gate_up.reshape(groups, k, 2 * width), group_sizes)
    return jax.nn.silu(product[:, :width]) * product[:, width:]


def scaled_swiglu_of(
    multiply: Callable[[jax.Array | Scaled, Scaled, jax.Array], jax.Array],
    rows: jax.Array | Scaled,
    gate_up: Scaled,
    group_sizes: jax.Array,
) -> jax.Array:
    """As `swiglu_of`, gate_up [E, 2, I, K] in 8 bits: two products, since blocks of scales may end within either matrix."""
    gate, up = (
        multiply(rows, jax.tree.map(lambda stack, half=half: stack[:, half], gate_up), group_sizes) for half in range(2)
    )
    return jax.nn.silu(gate) * up
