"""sparse_mla through Pallas' Triton backend, for GPUs before Hopper.

One program attends with up to 32 heads of one query: it walks the query's list in blocks of keys, gathers a block's
latents by index, and keeps a running softmax. The value columns serve as the first part of the keys, so that a latent is
loaded once; head counts are padded to a power of two of at least 16, which is what the matrix units take.

Why these blocks: 32 heads x 512 float32 accumulators fill the registers of 4 warps; two stages of 32 gathered keys and the
queries fit the 100 KB of shared memory of the smaller devices.

JAX deprecated this backend in 0.11 and will remove it: delete this file, its row in api.py and its tests then.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import device, quant
from pallas_kernels.softmax import LOG2E, MASKED, START
from pallas_kernels.sparse_mla import gradient

MAX_HEADS, MIN_HEADS = 32, 16  # of a program
KEYS = 32  # of a block
WARPS, STAGES = 4, 2


def why_not(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    lengths: jax.Array | None = None,
    return_lse: bool = False,
) -> str | None:
    if device.platform() != "gpu":
        return f"it needs a GPU, the device compiled for is a {device.platform()!r}"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"JAX {jax.__version__} has no Pallas Triton backend any more"
    rotary = latents.shape[2] - value_dim
    if any(size < 16 or size & (size - 1) for size in (value_dim, rotary)):
        return f"C and R must be powers of two of at least 16, these are {value_dim} and {rotary}"
    if queries.dtype not in (jnp.bfloat16, jnp.float16) or latents.dtype not in (queries.dtype, jnp.float8_e4m3fn):
        return f"it takes 16-bit queries with latents of the same dtype or 8 bits, not {queries.dtype} and {latents.dtype}"
    if 0 in queries.shape or 0 in latents.shape or 0 in indices.shape:
        return "there is nothing to attend"
    if return_lse:
        return "it does not return the log-sum-exp"
    return None


def _attend(q_ref, kv_ref, index_ref, out_ref, *, scale: float, value_dim: int) -> None:
    """q [heads, C+R], kv [T, C+R], indices [blocks * KEYS] -> out [heads, C]."""
    from jax.experimental.pallas import triton as plgpu

    heads, width = q_ref.shape
    values, rotary = pl.ds(0, value_dim), pl.ds(value_dim, width - value_dim)
    q_values, q_rotary = q_ref[:, values], q_ref[:, rotary]
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    over_columns, over_keys = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))

    def step(i, carry):
        top, total, out = carry
        index = index_ref[pl.ds(i * KEYS, KEYS)]
        valid = index >= 0

        def gather(first, columns):
            at = kv_ref.at[jnp.where(valid, index, 0)[:, None], (first + jnp.arange(columns))[None, :]]
            inside = jnp.broadcast_to(valid[:, None], (KEYS, columns))
            return plgpu.load(at, mask=inside, other=0.0)

        kv_values = gather(0, value_dim)
        logits = dot(q_values, kv_values, over_columns)
        logits += dot(q_rotary, gather(value_dim, width - value_dim), over_columns)
        logits = jnp.where(valid[None, :], logits * (scale * LOG2E), MASKED)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        weights, factors = jnp.exp2(logits - new_top[:, None]), jnp.exp2(top - new_top)
        out = out * factors[:, None] + dot(weights.astype(kv_values.dtype), kv_values, over_keys)
        return new_top, total * factors + jnp.sum(weights, axis=1), out

    nothing = jnp.full((heads,), START, jnp.float32), jnp.zeros((heads,)), jnp.zeros((heads, value_dim), jnp.float32)
    _, total, out = jax.lax.fori_loop(0, index_ref.shape[0] // KEYS, step, nothing)
    out_ref[...] = (out / jnp.where(total == 0, 1.0, total)[:, None]).astype(out_ref.dtype)


def forward(
    queries: jax.Array, latents: jax.Array, indices: jax.Array, *, scale: float, value_dim: int, interpret: bool = False
) -> jax.Array:
    from jax.experimental.pallas import triton as plgpu

    b, s, h, width = queries.shape
    t, k = latents.shape[1], indices.shape[2]
    block = min(MAX_HEADS, max(MIN_HEADS, 1 << (h - 1).bit_length()))
    blocks = -(-h // block)
    length = -(-k // KEYS) * KEYS
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, blocks * block - h), (0, 0)))
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, length - k)), constant_values=-1)
    out = pl.pallas_call(
        functools.partial(_attend, scale=scale, value_dim=value_dim),
        grid=(b, s, blocks),
        in_specs=[
            pl.BlockSpec((None, None, block, width), lambda b, s, h: (b, s, h, 0)),
            pl.BlockSpec((None, t, width), lambda b, s, h: (b, 0, 0)),
            pl.BlockSpec((None, None, length), lambda b, s, h: (b, s, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, block, value_dim), lambda b, s, h: (b, s, h, 0)),
        out_shape=jax.ShapeDtypeStruct((b, s, blocks * block, value_dim), queries.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )(queries, latents, indices)
    return out[:, :, :h]


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    lengths: jax.Array | None = None,  # the lists themselves are read
    return_lse: bool = False,  # `why_not` refuses it
) -> jax.Array:
    if isinstance(latents, quant.Latents):
        latents, indices = quant.dequantise_selected(latents, indices, queries.dtype)
    return gradient.differentiable(forward)(queries, latents, indices, scale, value_dim)
