"""A layer's attention in training, with what its indexer's scores miss of it: by kernels, by cuDNN, or in blocks of queries.

In XLA, probabilities exist for one block of queries at a time and are recomputed in the backward pass; a selection is kept
as its indices, made once by the F layer. Where the kernels serve (Hopper, bfloat16, heads up to 192 wide, values and index
heads up to 128), a selection is kept as bits, attention is fused, and the divergence's gradient is made in the forward pass,
once for all layers that an indexer serves, which add their targets up, as long as these fit in `forward.TARGET_BYTES`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import attention, indexer, ops
from indexcache_jax.config import Config
from indexcache_jax.distill.formulas import divergence, index_scores, map_causal, selection_mask
from indexcache_jax.model import AttentionLayer
from indexcache_jax.norm import rms_norm
from indexcache_jax.ops import HEADS, QUERIES, ROWS
from indexcache_jax.positions import Positions, even_order, in_own_order
from indexcache_jax.sharding import constrain, devices_along, on_each_device
from pallas_kernels import bits

BITS, LSE = ("batch", None, "queries"), ("batch", "heads", "queries")  # the logical axes of bits and of denominators


@flax.struct.dataclass
class IndexState:
    """What an F layer passes to the S layers that reuse it: the factors of its index scores and, if sparse, its selection.

    The selection is held as indices, or as bits where the kernels attend; bits hold all visible keys where it is dense.
    """

    queries: jax.Array  # [B, S, Hi, Di]
    keys: jax.Array  # [B, S, Di]
    head_weights: jax.Array  # [B, S, Hi] float32
    indices: jax.Array | None  # [B, S, k] int32
    selection_bits: jax.Array | None  # [B, T / 32, S] int32, a bit a key (pallas_kernels' bits)
    # [B, S, T] float32: of the layers so far the sum of their targets, weighted as their divergences are; None where each layer
    # takes its own divergence.
    target: jax.Array | None = None


@flax.struct.dataclass
class UpProjections:
    """What makes every head's keys and values from latents."""

    k_up: jax.Array  # [H, dn, C]
    v_up: jax.Array  # [H, C, dv]


def no_state(positions: Positions, dtype: Any, config: Config, sparse: bool, by_kernels: bool, together: bool) -> IndexState:
    """The index state before the first layer, which is F and replaces all of it but the bits of dense attention."""
    batch, length = positions.queries.shape
    heads, width = config.index_n_heads, config.index_head_dim
    indices = jnp.zeros((batch, length, min(config.index_topk, length)), jnp.int32)
    return IndexState(
        constrain(jnp.zeros((batch, length, heads, width), dtype), *QUERIES, None, None),
        constrain(jnp.zeros((batch, length, width), dtype), *ROWS, None, None),
        constrain(jnp.zeros((batch, length, heads), jnp.float32), *QUERIES, None),
        constrain(indices, *QUERIES, None) if sparse and not by_kernels else None,
        constrain(bits.visible(positions.queries, length), *BITS) if by_kernels else None,
        constrain(jnp.zeros((batch, length, length), jnp.float32), *QUERIES, None) if together else None,
    )


def attend_layer(
    p: AttentionLayer,
    x: jax.Array,
    state: IndexState | None,
    positions: Positions,
    config: Config,
    full: bool | jax.Array,
    sparse: bool,
    share: jax.Array | None,
) -> tuple[jax.Array, IndexState | None, jax.Array]:
    """One layer's attention: x + attention(norm(x)), the index state after it, the divergence summed over its queries.

    state: None to train without indexers, by dense attention and with no divergence. full: whether the layer is F; a
    traced boolean compiles both kinds. share: what the layer's divergence counts, where its target is added to the state's:
    then only that part of the divergence is returned which no indexer changes, the entropies with their sign turned.
    """
    with jax.named_scope("project"):
        h = rms_norm(x, p.norm, config.rms_norm_eps)
        q_latent = attention.query_latents(p.attention, h, config)
        queries = jnp.concatenate(attention.queries(p.attention, q_latent, positions.cos_sin, config), axis=-1)
        latents = _gathered(attention.latents(p.attention, h, positions.cos_sin, config))
    if state is not None:
        with jax.named_scope("index"):
            target = state.target if share is None or state.target is None else jnp.zeros_like(state.target)
            index = functools.partial(_index, p, h, q_latent, positions, config, sparse, state.selection_bits, target)
            if not isinstance(full, bool):
                before = state
                state = jax.lax.cond(full, index, lambda: before)
            elif full:
                state = index()
    up = UpProjections(p.attention.k_up, p.attention.v_up)
    if state is None and _fused(queries, config):
        with jax.named_scope("attend"):
            out, kl = _causal(up, queries, latents, config), jnp.zeros((), jnp.float32)
    elif state is not None and state.selection_bits is not None:
        out, kl, target = _by_bits(up, queries, latents, state, state.selection_bits, positions, config, share)
        state = state if target is None else dataclasses.replace(state, target=target)
    else:
        out, kl = _by_blocks(up, queries, latents, state, positions, config)
    with jax.named_scope("attend"):
        return x + attention.output(p.attention, out), state, kl


def _index(
    p: AttentionLayer,
    h: jax.Array,
    q_latent: jax.Array,
    positions: Positions,
    config: Config,
    sparse: bool,
    selection_bits: jax.Array | None,
    target: jax.Array | None,
) -> IndexState:
    """The index state of an F layer with normalised input h [B, S, D] and query latents [B, S, R]; both are detached.

    selection_bits: those of the layer before, which dense attention keeps; None where no kernel attends. target: what the
    layer's own is added to, None where none are added up.
    """
    assert p.indexer is not None  # an F layer has one
    h, q_latent = jax.lax.stop_gradient((h, q_latent))
    state = IndexState(
        indexer.index_queries(p.indexer, q_latent, positions.cos_sin, config),
        _gathered(indexer.index_keys(p.indexer, h, positions.cos_sin, config)),
        indexer.head_weights(p.indexer, h, config),
        None,
        selection_bits,
        target,
    )
    if not sparse:
        return state
    indices = ops.select(*jax.lax.stop_gradient((state.queries, state.keys, state.head_weights)), positions, config)
    if selection_bits is not None:
        pack = on_each_device(functools.partial(bits.pack, keys=h.shape[1]), (QUERIES,), BITS)
        return dataclasses.replace(state, selection_bits=pack(indices))
    return dataclasses.replace(state, indices=indices)


def _gathered(x: jax.Array) -> jax.Array:
    """x [B, S, D] of all tokens of every row, in the order of their positions, on all devices that share the row."""
    return in_own_order(constrain(x, "batch", None, None), even_order(x.shape[1]))


def _by_bits(
    up: UpProjections,
    queries: jax.Array,
    latents: jax.Array,
    state: IndexState,
    selection_bits: jax.Array,
    positions: Positions,
    config: Config,
    share: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What the kernels do: attention [B, S, H, dv] to the keys whose bits are set, and its summed divergence.

    With a share, the summed entropies with their sign turned and the target [B, S, T] with this layer's.
    """
    scale, q_positions = config.attention_scale, _split_positions(positions)

    def attend(
        up: UpProjections, queries: jax.Array, latents: jax.Array, words: jax.Array, q_positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys, values = attention.expand(up, latents, config)
        out, lse = ops.selected_attention(queries, keys, values, words, scale=scale, q_positions=q_positions)
        return out, lse, jax.lax.stop_gradient(keys)

    def add_target(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        share, *arrays, q_positions = arguments
        return ops.attention_target(*arrays, share=share, scale=scale, q_positions=q_positions)

    def diverge(*arguments: Any) -> jax.Array:
        *arrays, q_positions = arguments
        return ops.index_divergence(*arrays, scale=scale, q_positions=q_positions)[None, None]

    with jax.named_scope("attend"):
        axes = ("heads",), HEADS, ROWS, BITS, ("queries",)
        call = on_each_device(attend, axes, (HEADS, LSE, ("batch", None, "heads")))
        out, lse, keys = call(up, queries, latents, selection_bits, q_positions)
    with jax.named_scope("divergence"):
        constants = *jax.lax.stop_gradient((queries, keys, lse)), selection_bits, q_positions
        # The probabilities are averaged over all heads, so every device needs those of its queries together.
        of_all_heads = QUERIES, ROWS, BITS, BITS, ("queries",)
        if share is not None and state.target is not None:
            call = on_each_device(add_target, ((), QUERIES, *of_all_heads), (QUERIES, QUERIES))
            target, entropy = call(share, state.target, *constants)
            return out, -jnp.sum(entropy), target
        index_factors = state.queries, state.keys, state.head_weights
        call = on_each_device(diverge, (QUERIES, ROWS, QUERIES, *of_all_heads), QUERIES)
        return out, jnp.sum(call(*index_factors, *constants)), None


def _split_positions(positions: Positions) -> jax.Array | None:
    """The positions [S] of the queries where devices share a row: all rows are as long, so one row's are those of all."""
    return positions.queries[0] if devices_along("queries") > 1 else None


def missed(state: IndexState, positions: Positions) -> jax.Array:
    """What the index scores of a state miss of its target, summed over queries: with the entropies, the divergence."""

    def miss(*arguments: Any) -> jax.Array:
        *arrays, q_positions = arguments
        return ops.index_cross_entropy(*arrays, q_positions=q_positions)[None, None]

    with jax.named_scope("divergence"):
        arrays = state.queries, state.keys, state.head_weights, jax.lax.stop_gradient(state.target), state.selection_bits
        axes = QUERIES, ROWS, QUERIES, QUERIES, BITS, ("queries",)
        return jnp.sum(on_each_device(miss, axes, QUERIES)(*arrays, _split_positions(positions)))


def _by_blocks(
    up: UpProjections,
    queries: jax.Array,
    latents: jax.Array,
    state: IndexState | None,
    positions: Positions,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """Attention [B, S, H, dv] and its summed divergence in XLA, for one block of queries at a time.

    Over all visible keys, or the selected ones where `state` has indices; without a state there is no divergence.
    """

    def attend(
        up: UpProjections, latents: jax.Array, index_keys: jax.Array | None, per_query: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Attention and the divergence of every query [B, S]."""
        keys, values = attention.expand(up, latents, config)

        def block(
            t: int, queries: jax.Array, visible: jax.Array, indices: jax.Array | None, index: tuple[jax.Array, ...]
        ) -> tuple[jax.Array, jax.Array]:
            """Of queries that see at most the first t keys; visible [B, Q] is how many each of them sees."""
            mask = jnp.arange(t) < visible[..., None]
            if indices is not None:
                mask = mask & selection_mask(indices, t)
            with jax.named_scope("attend"):
                out, target = attention.attend_expanded(queries, keys[:, :t], values[:, :t], mask, config.attention_scale)
            if index_keys is None:
                return out, jnp.zeros(visible.shape, jnp.float32)
            with jax.named_scope("divergence"):
                index_queries, head_weights = index
                scores = index_scores(index_queries, index_keys[:, :t], head_weights)
                return out, divergence(jax.lax.stop_gradient(target), scores, mask)

        return map_causal(block, per_query, keys.shape[1], keys.shape[2] + config.index_n_heads)

    index_keys = indices = None
    index: tuple[jax.Array, ...] = ()
    if state is not None:
        index_keys, indices, index = state.keys, state.indices, (state.queries, state.head_weights)
    per_query = queries, positions.queries + 1, indices, index
    # The divergence needs the probabilities of all heads together.
    heads, of_queries = (("heads",), HEADS) if state is None else ((), QUERIES)
    inputs = (heads, ROWS, ROWS, of_queries)
    out, kl = on_each_device(attend, inputs, (of_queries, QUERIES))(up, latents, index_keys, per_query)
    return out, jnp.sum(kl)


def _fused(queries: jax.Array, config: Config) -> bool:
    """Whether cuDNN's fused attention can run: on a GPU, in bfloat16, for heads of a multiple of 8 up to 128.

    Not where devices share a row's queries, which cuDNN expects to begin with the keys.
    """
    width = config.qk_head_dim
    fits = width % 8 == 0 and config.v_head_dim <= width <= 128 and devices_along("queries") == 1
    return fits and ops.platform() == "gpu" and queries.dtype == jnp.bfloat16


def _causal(up: UpProjections, queries: jax.Array, latents: jax.Array, config: Config) -> jax.Array:
    """Causal attention [B, S, H, dv] by cuDNN, without probabilities; it needs values as wide as keys, so they are padded."""

    def attend(up: UpProjections, queries: jax.Array, latents: jax.Array) -> jax.Array:
        keys, values = attention.expand(up, latents, config)
        values = jnp.pad(values, ((0, 0),) * 3 + ((0, config.qk_head_dim - config.v_head_dim),))
        out = jax.nn.dot_product_attention(
            queries, keys, values, scale=config.attention_scale, is_causal=True, implementation="cudnn"
        )
        return out[..., : config.v_head_dim]

    return on_each_device(attend, (("heads",), HEADS, ROWS), HEADS)(up, queries, latents)
