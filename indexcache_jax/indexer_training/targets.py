"""What a group's indexer is to predict: the attention of its layers, averaged over heads and layers.

Where the host's memory has room, every query's mean target is computed once, and a step computes index scores and their
gradient alone:

    sum_j 1/(m+1) KL(p_j || q) = cross entropy(mean_j p_j, q) - mean_j entropy(p_j)

Otherwise a step computes the targets again from hidden states and the softmax's denominators.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import attention, distill, model, ops
from indexcache_jax.config import Config
from indexcache_jax.indexer_training.cost import target_work
from indexcache_jax.indexer_training.rows import Rows
from indexcache_jax.indexer_training.run import Run
from indexcache_jax.model import AttentionLayer
from indexcache_jax.norm import rms_norm
from indexcache_jax.positions import whole_rows
from pallas_kernels import bits

CPU_ROWS = 64


@flax.struct.dataclass
class Kept:
    """The mean target [B, S, T] of rows, in the compute dtype, and the mean over queries and layers of the entropies [B]."""

    target: jax.Array
    entropy: jax.Array


@flax.struct.dataclass
class Recomputed:
    """What the targets of rows are computed from, by layer of the group: weights, hidden states, softmax denominators.

    x [B, S, D]; lse [B, H, S] float32; share: what each layer's divergence counts.
    """

    layers: tuple[AttentionLayer, ...]
    x: tuple[jax.Array, ...]
    lse: tuple[jax.Array, ...]
    share: tuple[jax.Array, ...]


TargetsOf = Callable[[np.ndarray], Kept | Recomputed]  # of rows by their numbers [B]


def inputs(p: AttentionLayer, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Normalised input [B, S, D] and query latents [B, S, R] of a layer with hidden states x before it."""
    h = rms_norm(x, p.norm, config.rms_norm_eps)
    return h, attention.query_latents(p.attention, h, config)


def queries_and_keys(p: AttentionLayer, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys [B, S, H, dn + dr] and values [B, S, H, dv] of a layer with hidden states x before it."""
    cos_sin = whole_rows(x, config).cos_sin
    h, q_latent = inputs(p, x, config)
    queries = jnp.concatenate(attention.queries(p.attention, q_latent, cos_sin, config), axis=-1)
    return queries, *attention.expand(p.attention, attention.latents(p.attention, h, cos_sin, config), config)


@jax.jit
def add_target(
    target: jax.Array, entropy: jax.Array, p: AttentionLayer, x: jax.Array, share: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
    """target [B, S, T] and entropy [B], float32, with a layer's: its heads' mean probabilities over all visible keys."""
    p = model.decoded_layer(p, config, x.dtype)
    queries, keys, values = queries_and_keys(p, x, config)
    b, s = x.shape[:2]
    if ops.distils_by_kernels(b, s, x.dtype, config):
        words, scale = bits.causal(b, s, s), config.attention_scale
        lse = ops.attention_denominators(queries, keys, words, scale=scale)
        target, entropies = ops.attention_target(target, queries, keys, lse, words, share=share, scale=scale)
        return target, entropy + share * jnp.mean(entropies, axis=1)

    def block(t: int, queries: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask = jnp.arange(t) < visible[..., None]
        _, found = attention.attend_expanded(queries, keys[:, :t], values[:, :t], mask, config.attention_scale)
        return jnp.pad(found, ((0, 0), (0, 0), (0, keys.shape[1] - t))), distill.entropy(found)

    found, entropies = distill.map_causal(block, (queries, visible(x)), keys.shape[1], config.num_heads, most_rows())
    return target + share * found, entropy + share * jnp.mean(entropies, axis=1)


def most_rows() -> int | None:
    """Queries of a block: on a CPU so few that their scores stay in its cache, which makes a step four times faster."""
    return CPU_ROWS if ops.platform() == "cpu" else None


def visible(x: jax.Array) -> jax.Array:
    """How many keys each query of whole rows [B, S, ...] sees: [B, S]."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1) + 1


@jax.jit
def denominators(p: AttentionLayer, x: jax.Array, config: Config) -> jax.Array:
    """The logarithms of the softmax's denominators [B, H, S] float32 of a layer, over all visible keys."""
    queries, keys, _ = queries_and_keys(model.decoded_layer(p, config, x.dtype), x, config)
    words = bits.causal(x.shape[0], x.shape[1], x.shape[1])
    return ops.attention_denominators(queries, keys, words, scale=config.attention_scale)


def mean_target(
    layer_of: Callable[[jax.Array], tuple[AttentionLayer, jax.Array, jax.Array]],
    count: int | jax.Array,
    like: jax.Array,
    config: Config,
) -> Kept:
    """The target of a group of `count` layers, which may be traced, in the dtype of `like` [B, S, D].

    layer_of(j): of the jth, traced, its weights, the hidden states x [B, S, D] before it, and what its divergence counts.
    """
    b, s = like.shape[:2]

    def add(j: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return add_target(*sums, *layer_of(j), config)

    target, entropy = jax.lax.fori_loop(0, count, add, (jnp.zeros((b, s, s), jnp.float32), jnp.zeros(b, jnp.float32)))
    return Kept(target.astype(like.dtype), entropy)


def kept_targets(
    run: Run,
    layers: list[AttentionLayer],
    states: list[Rows],
    share: list[jax.Array],
    on_device: int,
    progress: Callable[[float], object],
) -> TargetsOf:
    (count, length), dtype = run.tokens.shape, states[0].on_host.dtype
    kept, entropies = Rows([], run.allocate((count - on_device, length, length), dtype)), np.empty(count, np.float32)
    for row in range(count):
        target, entropy = jnp.zeros((1, length, length), jnp.float32), jnp.zeros(1, jnp.float32)
        for layer, x, weight in zip(layers, states, share, strict=True):
            target, entropy = add_target(target, entropy, layer, x.of([row]), weight, run.config)
        kept.put(row, target.astype(dtype), on_device)
        entropies[row] = np.asarray(entropy[0])
        progress(target_work(run) * len(layers))
    return lambda rows: Kept(kept.of(rows), jnp.asarray(entropies[rows]))


def recomputed_targets(
    run: Run,
    layers: list[AttentionLayer],
    states: list[Rows],
    share: list[jax.Array],
    on_device: int,
    progress: Callable[[float], object],
) -> TargetsOf:
    count, length = run.tokens.shape
    lse = [Rows([], np.empty((count - on_device, run.config.num_heads, length), np.float32)) for _ in layers]
    states = states[:]
    for row in range(count):
        for layer, x, kept in zip(layers, states, lse, strict=True):
            kept.put(row, denominators(layer, x.of([row]), run.config), on_device)
        progress(target_work(run) * len(layers))
    return lambda rows: Recomputed(
        tuple(layers), tuple(x.of(rows) for x in states), tuple(kept.of(rows) for kept in lse), tuple(share)
    )
