"""grouped_matmul on TPU: JAX's own megablox kernel, which has its backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import tpu

BLOCK_ROWS, BLOCK_K, BLOCK_N = 512, 1024, 1024  # 2 x 2 MB of matrix blocks in flight; fewer rows where there are fewer
ROW_TILE = 16  # bfloat16 rows of a TPU tile


def why_not(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> str | None:
    if reason := tpu.why_not():
        return reason
    if not {rows.dtype, matrices.dtype} <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"it takes bfloat16 and float32, not {rows.dtype} and {matrices.dtype}"
    if rows.shape[0] == 0:
        return "there are no rows"
    return None


def grouped_matmul(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import megablox

    m, (_, k, n) = rows.shape[0], matrices.shape
    block = min(BLOCK_ROWS, -(-m // ROW_TILE) * ROW_TILE)
    out = megablox.gmm(
        jnp.pad(rows, ((0, -m % block), (0, 0))),
        matrices,
        group_sizes,
        preferred_element_type=rows.dtype,
        tiling=(block, min(BLOCK_K, k), min(BLOCK_N, n)),
        interpret=interpret,
    )
    return out[:m]
