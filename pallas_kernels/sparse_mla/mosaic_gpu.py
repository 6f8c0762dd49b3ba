"""sparse_mla on Hopper: how its arguments become tasks of the attention kernel, by these rules.

- A query with 64 heads is a tile, with 128 two. Lists of indices go to the kernel as they are.
- At most 32 heads leave rows of a tile empty. Queries that have keys in common share a tile over the union of their lists,
  others go to a kernel of their own, mosaic_gpu_few_heads.py, one by one. `unions_pay` decides by the lists, where
  there are PACKED_QUERIES or more; below, and in decode steps, each query is on its own.
- A few tiles leave SMs idle: their lists are split among the blocks of a cluster, which combine their parts
  through each other's shared memory. Another kernel for that would cost about as much as all the rest of a decode step.
- Latents in 8 bits have a kernel of their own for any number of heads, mosaic_gpu_scaled.py. It reads half the bytes, so
  there queries never share a tile.

The backward pass is in mosaic_gpu_gradient.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import hopper, quant
from pallas_kernels.latents import VALUE_DIM, WIDTH
from pallas_kernels.sparse_mla import gradient
from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import MAX_PACKED, MAX_SPLITS, OWNER_SHIFT, PAIR, TILE, Tasks

PACKED_QUERIES = 2 * hopper.NUM_SMS  # B * S from which the unions pay for the kernel that builds them

# Key blocks of the unions for each key block of the lists, below which tiles of several queries are faster
# (docs/kernels.md, "Sparse MLA").
UNION_PAYS = 0.6
SAMPLED_TILES = 128  # one for each SM, so that their unions take the time of one


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
    if reason := hopper.why_not():
        return reason
    if (latents.shape[2], value_dim) != (WIDTH, VALUE_DIM):
        return f"it is laid out for C+R = {VALUE_DIM}+{WIDTH - VALUE_DIM}, these are {value_dim}+{latents.shape[2] - value_dim}"
    if queries.dtype != jnp.bfloat16 or latents.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"it takes bfloat16 queries and bfloat16 or float8_e4m3fn latents, not {queries.dtype} and {latents.dtype}"
    if 0 in queries.shape or 0 in latents.shape or 0 in indices.shape:
        return "there is nothing to attend"
    if return_lse:
        return "it does not return the log-sum-exp"
    return None


def padded_heads(heads: int) -> int:
    """Heads as the kernel takes them: any number up to a tile, above it whole tiles."""
    return heads if heads <= TILE else -(-heads // TILE) * TILE


def queries_per_tile(batch: int, queries: int, heads: int, keys: int) -> int:
    """How many neighbouring queries share a tile."""
    from pallas_kernels.sparse_mla import mosaic_gpu_union

    if batch * queries < PACKED_QUERIES or keys > 1 << OWNER_SHIFT:
        return 1
    fitting = min(TILE // heads, queries, MAX_PACKED, mosaic_gpu_union.most_queries(keys))
    return max(1, fitting)


def unions_pay(indices: jax.Array, heads: int, keys: int, packed: int) -> jax.Array:
    """Whether tiles of `packed` queries over the unions of their lists are faster than every query on its own.

    Either way the time goes into key blocks, those of the unions or those of the lists, which are counted in a sample of
    tiles. A block of a union takes the same time for any number of heads, because the tile is of 64 rows. One of a list
    moves 1936, 2072 and 2208 clocks' worth of shared memory with 16, 24 and 32 columns: one threshold is right within 7 %.

    Args:
      indices: [B, S, k] int32, -1 where empty.

    Returns:
      [] bool, a function of the indices alone.
    """
    from pallas_kernels.hopper.columns import KEYS
    from pallas_kernels.sparse_mla import mosaic_gpu_union

    b, s, k = indices.shape
    of_batch_row = s // packed  # whole tiles
    sampled = min(b * of_batch_row, SAMPLED_TILES)
    tile = np.arange(sampled) * (b * of_batch_row) // sampled
    first = tile // of_batch_row * s + tile % of_batch_row * packed
    lists = indices.reshape(b * s, k)[(first[:, None] + np.arange(packed)).reshape(-1)]
    tasks = Tasks(1, sampled * packed, heads, keys, pairs=-(-packed * k // PAIR), packed=packed)
    _, pairs = mosaic_gpu_union.unite(lists, tasks)
    of_unions = jnp.sum(pairs) * (PAIR // KEYS)
    return of_unions < UNION_PAYS * jnp.sum(blocks_to_visit(lists, KEYS))


def splits_of(tiles: int, pairs: int) -> int:
    """Into how many even parts lists of `pairs` pairs of key blocks are split, so that the device is full."""
    most = min(MAX_SPLITS, max(1, hopper.NUM_SMS // tiles))
    return max(parts for parts in range(1, pairs + 1) if pairs % parts == 0 and parts <= most)


def blocks_to_visit(indices: jax.Array, size: int) -> jax.Array:
    """indices [lists, k], usually -1 in the tail -> [lists] int32 blocks of `size` entries up to the last one set."""
    block = np.arange(indices.shape[1], dtype=np.int32) // size + 1  # a constant, so that XLA makes one kernel
    return jnp.max(jnp.where(indices >= 0, block, 1), axis=1)


def blocks_of(lengths: jax.Array, size: int) -> jax.Array:
    """lengths [lists] int32 of lists that are set up to there -> [lists] int32, as `blocks_to_visit` of the lists."""
    return jnp.maximum(1, (lengths + size - 1) // size)


def _in_blocks(indices: jax.Array, size: int) -> jax.Array:
    """[lists, k] -> [lists, blocks * size], filled up with -1."""
    return jnp.pad(indices, ((0, 0), (0, -indices.shape[1] % size)), constant_values=-1)


def _one_by_one(queries: jax.Array, latents: jax.Array, indices: jax.Array, *, scale: float) -> jax.Array:
    """`forward` for at most 32 heads, by the kernel of mosaic_gpu_few_heads.py."""
    from pallas_kernels.hopper.columns import KEYS
    from pallas_kernels.sparse_mla import mosaic_gpu_few_heads
    from pallas_kernels.sparse_mla.mosaic_gpu_few_heads_tasks import Tasks as FewHeadsTasks

    (b, s, h, width), t = queries.shape, latents.shape[1]
    lists = _in_blocks(indices.reshape(b * s, -1), KEYS)
    blocks = lists.shape[1] // KEYS
    # A decode step has full lists or short contexts, and another kernel would cost more than it saves.
    counts = blocks_to_visit(lists, KEYS) if s > 1 else jnp.full((b,), blocks, jnp.int32)
    tasks = FewHeadsTasks(b, s, h, t, blocks)
    flat = queries.reshape(b * s * h, width), latents.reshape(b * t, width), lists, counts
    return mosaic_gpu_few_heads.attend(*flat, tasks, scale=scale).reshape(b, s, h, VALUE_DIM)


def _in_8_bits(
    queries: jax.Array, latents: quant.Latents, indices: jax.Array, lengths: jax.Array | None, *, scale: float
) -> jax.Array:
    """`forward` for latents in 8 bits; lengths [B, S] of the lists, None where they are not known."""
    from pallas_kernels.hopper.columns import KEYS
    from pallas_kernels.sparse_mla import mosaic_gpu_scaled
    from pallas_kernels.sparse_mla import mosaic_gpu_scaled_tasks as scaled

    (b, s, h, width), t = queries.shape, latents.shape[1]
    lists = _in_blocks(indices.reshape(b * s, -1), KEYS)
    blocks = lists.shape[1] // KEYS
    splits = scaled.splits_of(b * s * -(-h // scaled.MAX_COLUMNS), blocks)
    # A decode step has full lists or short contexts, and another kernel would cost more than it saves.
    if s == 1 or splits > 1:
        counts = None
    elif lengths is not None:
        counts = blocks_of(lengths.reshape(-1), KEYS)
    else:
        counts = blocks_to_visit(lists, KEYS)
    tasks = scaled.Tasks(b, s, h, t, blocks, splits)
    codes, rotary, scales = (x.reshape(b * t, *x.shape[2:]) for x in (latents.codes, latents.rotary, latents.scales))
    flat = queries.reshape(b * s * h, width), codes, rotary, scales, lists, counts
    return mosaic_gpu_scaled.attend(*flat, tasks, scale=scale).reshape(b, s, h, VALUE_DIM)


def _in_tiles(queries: jax.Array, latents: jax.Array, indices: jax.Array, *, scale: float, packed: int) -> jax.Array:
    """`forward` by the kernel whose tiles are 64 heads of one query, or those of `packed` ones."""
    from pallas_kernels.sparse_mla import mosaic_gpu_attention, mosaic_gpu_union

    (b, s, h, width), t, k = queries.shape, latents.shape[1], indices.shape[2]
    heads = padded_heads(h)
    if heads != h:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, heads - h), (0, 0)))
    indices = indices.reshape(b * s, k)

    counts: jax.Array | None
    if packed > 1:
        tasks = Tasks(b, s, heads, t, pairs=-(-packed * k // PAIR), packed=packed)
        lists, counts = mosaic_gpu_union.unite(indices, tasks)
    else:
        pairs = -(-k // PAIR)
        splits = splits_of(b * s * max(1, heads // TILE), pairs)
        tasks = Tasks(b, s, heads, t, pairs=pairs, splits=splits)
        lists, counts = _in_blocks(indices, PAIR), None

    out = mosaic_gpu_attention.attend(
        queries.reshape(b * s * heads, width),
        latents.reshape(b * t, width),
        lists,
        counts,
        tasks,
        scale=scale,
    )
    return out.reshape(b, s, heads, VALUE_DIM)[:, :, :h]


def forward(queries: jax.Array, latents: jax.Array, indices: jax.Array, *, scale: float, value_dim: int) -> jax.Array:
    """queries [B, S, H, 576], bfloat16 latents [B, T, 576] and indices [B, S, k] -> [B, S, H, 512] bfloat16."""
    from pallas_kernels.sparse_mla.mosaic_gpu_few_heads_tasks import MAX_HEADS

    b, s, h, _ = queries.shape
    t, k = latents.shape[1], indices.shape[2]
    packed = queries_per_tile(b, s, padded_heads(h), t)
    in_tiles = functools.partial(_in_tiles, scale=scale, packed=packed)
    is_split = splits_of(b * s, -(-k // PAIR)) > 1
    if h > MAX_HEADS or is_split:
        return in_tiles(queries, latents, indices)
    one_by_one = functools.partial(_one_by_one, scale=scale)
    if packed == 1:
        return one_by_one(queries, latents, indices)
    return jax.lax.cond(unions_pay(indices, h, t, packed), in_tiles, one_by_one, queries, latents, indices)


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    lengths: jax.Array | None = None,
    return_lse: bool = False,  # `why_not` refuses it
) -> jax.Array:
    if isinstance(latents, quant.Latents):
        return _in_8_bits(queries, latents, indices, lengths, scale=scale)
    from pallas_kernels.sparse_mla import mosaic_gpu_gradient

    return gradient.differentiable(forward, mosaic_gpu_gradient.pull)(queries, latents, indices, scale, value_dim)
