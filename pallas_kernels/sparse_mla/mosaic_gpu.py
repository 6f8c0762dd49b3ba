"""sparse_mla on Hopper: how its arguments become tasks of the attention kernel, by these rules.

- A query with 64 heads is a tile, with 128 two. Lists of indices go to the kernel as they are.
- A query with at most 32 heads goes to a kernel of its own, mosaic_gpu_few_heads.py, unless its list has to be split.
- Few heads leave rows of a tile empty, and the gather of the keys is what takes the time then. Neighbouring queries select
  much the same keys, so several queries share a tile over the union of their lists (PACKED_QUERIES says from when on).
- A few tiles leave multiprocessors idle: their lists are split among the blocks of a cluster, which combine their parts
  through each other's shared memory. A launch more for that would cost about as much as all the rest of a decode step.
- Latents in 8 bits are read as such, by the same kernel.

The backward pass is the reference's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.sparse_mla import gradient

WIDTH, VALUE_DIM = 576, 512  # what the kernel is laid out for; mosaic_gpu_attention.py says how
TILE, PAIR = 64, 128
PACKED_QUERIES = 2 * hopper.MULTIPROCESSORS  # B * S from which the unions pay for the kernel that builds them


def why_not(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    latent_scales: jax.Array | None = None,
) -> str | None:
    if reason := hopper.why_not():
        return reason
    if (latents.shape[2], value_dim) != (WIDTH, VALUE_DIM):
        return f"it is laid out for C+R = 512+64, these are {value_dim}+{latents.shape[2] - value_dim}"
    if queries.dtype != jnp.bfloat16 or latents.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"it takes bfloat16 queries and bfloat16 or float8_e4m3fn latents, not {queries.dtype} and {latents.dtype}"
    if 0 in queries.shape or 0 in latents.shape or 0 in indices.shape:
        return "there is nothing to attend"
    return None


def padded_heads(heads: int) -> int:
    """Heads as the kernel takes them: any number up to a tile, above it whole tiles."""
    return heads if heads <= TILE else -(-heads // TILE) * TILE


def queries_per_tile(batch: int, queries: int, heads: int, keys: int) -> int:
    """How many neighbouring queries share a tile."""
    from pallas_kernels.sparse_mla import mosaic_gpu_attention, mosaic_gpu_union

    if batch * queries < PACKED_QUERIES or keys > 1 << mosaic_gpu_attention.OWNER_SHIFT:
        return 1
    fitting = min(TILE // heads, queries, mosaic_gpu_attention.MAX_PACKED, mosaic_gpu_union.most_queries(keys))
    return max(1, fitting)


def splits_of(tiles: int, pairs: int) -> int:
    """Into how many even parts lists of `pairs` pairs of key blocks are split, so that the device is full."""
    from pallas_kernels.sparse_mla import mosaic_gpu_attention

    most = min(mosaic_gpu_attention.MAX_SPLITS, max(1, hopper.MULTIPROCESSORS // tiles))
    return max(parts for parts in range(1, pairs + 1) if pairs % parts == 0 and parts <= most)


def blocks_to_visit(indices: jax.Array, size: int) -> jax.Array:
    """indices [lists, k], empty places usually in the tail -> [lists] int32 blocks of `size` entries up to the last one set."""
    places = jnp.arange(1, indices.shape[1] + 1, dtype=jnp.int32)
    last = jnp.max(jnp.where(indices >= 0, places, 1), axis=1)
    return -(-last // size)


def _in_blocks(indices: jax.Array, size: int) -> jax.Array:
    """[lists, k] -> [lists, blocks * size], filled up with -1."""
    return jnp.pad(indices, ((0, 0), (0, -indices.shape[1] % size)), constant_values=-1)


def _few_heads(queries: jax.Array, latents: jax.Array, indices: jax.Array, *, scale: float) -> jax.Array:
    """`forward` for at most 32 heads, by the kernel that is made for them."""
    from pallas_kernels.sparse_mla import mosaic_gpu_few_heads

    (b, s, h, width), t = queries.shape, latents.shape[1]
    lists = _in_blocks(indices.reshape(b * s, -1), mosaic_gpu_few_heads.KEYS)
    blocks = lists.shape[1] // mosaic_gpu_few_heads.KEYS
    # A decode step has full lists or short contexts, and a further launch would cost more than it saves.
    counts = blocks_to_visit(lists, mosaic_gpu_few_heads.KEYS) if s > 1 else jnp.full((b,), blocks, jnp.int32)
    tasks = mosaic_gpu_few_heads.Tasks(b, s, h, t, blocks)
    flat = queries.reshape(b * s * h, width), latents.reshape(b * t, width), lists, counts
    return mosaic_gpu_few_heads.attend(*flat, tasks, scale=scale).reshape(b, s, h, VALUE_DIM)


def forward(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    latent_scales: jax.Array | None = None,
    packed: int | None = None,
) -> jax.Array:
    """queries [B, S, H, 576], latents [B, T, 576] and indices [B, S, k] -> [B, S, H, 512] bfloat16.

    `packed` overrules the rule for how many queries share a tile.
    """
    from pallas_kernels.sparse_mla import mosaic_gpu_attention, mosaic_gpu_few_heads, mosaic_gpu_union

    b, s, h, width = queries.shape
    t, k = latents.shape[1], indices.shape[2]
    is_split = splits_of(b * s, -(-k // PAIR)) > 1
    if packed is None and latent_scales is None and h <= mosaic_gpu_few_heads.MAX_HEADS and not is_split:
        return _few_heads(queries, latents, indices, scale=scale)
    heads = padded_heads(h)
    if heads != h:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, heads - h), (0, 0)))
    packed = packed or queries_per_tile(b, s, heads, t)
    indices = indices.reshape(b * s, k)

    counts: jax.Array | None
    if packed > 1:
        tasks = mosaic_gpu_attention.Tasks(b, s, heads, t, pairs=-(-packed * k // PAIR), packed=packed)
        lists, counts = mosaic_gpu_union.unite(indices, tasks)
    else:
        pairs = -(-k // PAIR)
        splits = splits_of(b * s * max(1, heads // TILE), pairs)
        tasks = mosaic_gpu_attention.Tasks(b, s, heads, t, pairs=pairs, splits=splits)
        lists = _in_blocks(indices, PAIR)
        # A decode step has full lists or short contexts, and a further launch would cost more than it saves.
        counts = blocks_to_visit(lists, PAIR) if splits == 1 and s > 1 else None

    out = mosaic_gpu_attention.attend(
        queries.reshape(b * s * heads, width),
        latents.reshape(b * t, width),
        None if latent_scales is None else latent_scales.astype(jnp.float32).reshape(b * t),
        lists,
        counts,
        tasks,
        scale=scale,
    )
    return out.reshape(b, s, heads, value_dim)[:, :, :h]


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    latent_scales: jax.Array | None = None,
) -> jax.Array:
    if latent_scales is not None:
        return forward(queries, latents, indices, scale=scale, value_dim=value_dim, latent_scales=latent_scales)
    return gradient.differentiable(forward)(queries, latents, indices, scale, value_dim)
