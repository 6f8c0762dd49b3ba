"""Training losses of a DSA model: language modelling, and the multi-layer distillation of its indexers (paper 3.2).

The indexer of an F layer l scores keys as I and serves the layers l .. l+m, each with attention probabilities p averaged
over heads. It is trained on L = sum_j 1/(m+1) sum_t KL(p^(l+j) || softmax(I)). An S layer needs nothing of its F layer but
index queries, keys and head weights, so these are passed from layer to layer and every layer adds its own term.

Dense (warm-up): attention and the divergence run over all visible keys. Sparse: both run over the keys that I selects,
with p and softmax(I) renormalised on them. The indexer reads detached activations and p is a constant, so the divergence
trains only indexers; selection is discrete, so the language loss never reaches them.

In XLA, probabilities exist for one block of queries at a time and are recomputed in the backward pass; a selection is kept
as its indices, made once by the F layer. Where the kernels serve (Hopper, bfloat16, heads up to 192 wide, values and index
heads up to 128), a selection is kept as bits, attention is fused, and the divergence's gradient is made in the forward pass,
once for all layers that an indexer serves, which add their targets up, as long as these fit in TARGET_BYTES.

On a mesh every device computes what is per query for its own rows and queries. Where queries of a row are split, latents and
index keys are gathered and every device makes the attention's keys and values from them; the queries are dealt so that all
devices see as many keys (`positions.even_order`). A layer's weights are gathered for as long as it runs.

A schedule is static, as in inference, unless it is given as arrays (`TracedSchedule`): then one program trains for any
schedule, and layers that turn out S keep an indexer without a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import attention, indexer, language_loss, moe, ops
from indexcache_jax.config import Config
from indexcache_jax.model import AttentionLayer, decoded_layer
from indexcache_jax.norm import rms_norm
from indexcache_jax.ops import HEADS, QUERIES, ROWS
from indexcache_jax.params import MLP, MoE, Params, abstract, decoded, slots, weights_of
from indexcache_jax.positions import Positions, even_order, in_own_order, make_positions
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import constrain, devices_along, on_each_device
from pallas_kernels import bits
from pallas_kernels.blocks import block_rows, map_queries

SCORE_BYTES = 512 * 2**20  # of float32 attention and index logits at once, of all heads and rows of one block of queries
# Queries see only keys before them, so from CAUSAL_FROM tokens on a row is cut into CAUSAL_PARTS parts: the queries of the
# first quarter need no product with the keys of the other three. Not where devices share a row: each has early and late ones.
CAUSAL_PARTS, CAUSAL_FROM = 4, 1024
TARGET_BYTES = 8 * 2**30  # of the targets that layers add up, on a device
UNROLLED = 4  # layers of a run that are compiled one after the other, without a loop
REARRANGING = {
    *("sharding_constraint", "convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"),
    *("slice", "dynamic_slice", "copy", "optimization_barrier"),
}
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


@flax.struct.dataclass
class Losses:
    """Losses in nats a predicted token, and how many tokens each expert got.

    language: mean cross-entropy. indexer: the multi-layer divergence L, summed over F layers, mean over tokens.
    tokens_per_expert [N, E] int32: for each of the N layers with experts.
    """

    language: jax.Array
    indexer: jax.Array
    tokens_per_expert: jax.Array


@flax.struct.dataclass
class TracedSchedule:
    """A schedule as arrays, so that one program trains for any.

    full [L] bool: which layers are F. kl_weight [L] float32: what each layer's divergence counts in the indexer loss.
    """

    full: Any
    kl_weight: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers, start to stop - 1, of one kind: compiled once and scanned over.

    adds: the layers add their targets up, and the divergence from the sum is taken after the last layer that an indexer
    serves, which is the last of the run if `closes`. Otherwise each layer takes its own.
    """

    start: int
    stop: int
    full: bool
    experts: bool
    adds: bool = False
    closes: bool = False


Carry = tuple[jax.Array, jax.Array, Positions, IndexState | None]  # x, summed divergence, positions, index state
LayerWeights = tuple[AttentionLayer, MLP | MoE, jax.Array]  # attention, MLP, and the norm before the MLP


def runs(config: Config, schedule: Schedule, together: bool = False) -> list[Run]:
    """The layers cut into runs, wherever F/S or dense/experts changes.

    together: the layers that an indexer serves add their targets up.
    """
    served = [len(schedule.serves(source)) for source in schedule.source]
    kinds = list(zip(schedule.is_full, config.moe_layers, (together and count > 1 for count in served), strict=True))
    cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    full = [*schedule.is_full, True]
    return [Run(a, b, *kinds[a], closes=kinds[a][2] and full[b]) for a, b in itertools.pairwise(cuts)]


def index_scores(queries: jax.Array, keys: jax.Array, head_weights: jax.Array) -> jax.Array:
    """Scores I [B, Q, T] float32 of index queries [B, Q, Hi, Di] with head weights [B, Q, Hi] for index keys [B, T, Di].

    docs/model.md, Indexer.
    """
    dots = jnp.einsum("bqhd,btd->bqht", queries, keys, preferred_element_type=jnp.float32)
    return jnp.einsum("bqht,bqh->bqt", jax.nn.relu(dots), head_weights)


def divergence(target: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(target || softmax of the scores within the mask) of every query in nats: [B, Q, T] x 3 -> [B, Q].

    The target is a distribution within the mask, zeros outside. A query whose mask is empty gets 0.
    """
    return cross_entropy(target, scores, mask) - entropy(target)


def cross_entropy(target: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """What of `divergence` depends on the scores."""
    any_key = jnp.any(mask, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, jnp.where(any_key, -jnp.inf, 0.0)), axis=-1)
    return -jnp.sum(target * jnp.where(mask, log_q, 0.0), axis=-1)


def entropy(target: jax.Array) -> jax.Array:
    """The entropies [...] of distributions [..., T], in nats."""
    return -jnp.sum(jax.scipy.special.xlogy(target, target), axis=-1)


def averaged_divergence(targets: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(mean of the targets [n, B, Q, T] || softmax of the scores within the mask): [B, Q] (paper 3.2, averaged form).

    Its gradient is that of the mean of `divergence` over the targets, which is larger by their Jensen-Shannon divergence.
    Training takes the sum of divergences, or where kernels run, adds targets up layer by layer and takes this.
    """
    return divergence(jnp.mean(targets, axis=0), scores, mask)


def selection_mask(indices: jax.Array, num_keys: int) -> jax.Array:
    """Which of num_keys = T keys are selected, [B, Q, T] bool, by indices [B, Q, k] (-1 selects nothing)."""
    batch, query = (jax.lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (0, 1))
    keys = jnp.where(indices < 0, num_keys, indices)
    return jnp.zeros((*indices.shape[:2], num_keys), bool).at[batch, query, keys].set(True, mode="drop")


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


def _attend(
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


def _missed(state: IndexState, positions: Positions) -> jax.Array:
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


def map_causal(
    block: Callable[..., Any], per_query: tuple[Any, ...], keys: int, heads: int, most_rows: int | None = None
) -> Any:
    """`block(t, *inputs)` over blocks of queries that see at most the first t of `keys` keys, recomputed in the backward pass.

    per_query: trees of arrays [B, S, ...] of queries that stand in the order of their positions, unless devices share them.
    heads: scores that a block has for every query and key, which bound its rows, as `most_rows` does. Returns what the blocks
    do, for all queries.
    """
    b, s = jax.tree.leaves(per_query)[0].shape[:2]
    parts = CAUSAL_PARTS if keys >= CAUSAL_FROM and devices_along("queries") == 1 else 1
    found = []
    for first, stop in itertools.pairwise(i * s // parts for i in range(parts + 1)):
        part = jax.tree.map(lambda x, first=first, stop=stop: x[:, first:stop], per_query)
        seen = keys if parts == 1 else stop
        rows = block_rows(stop - first, 4 * b * seen * heads, SCORE_BYTES)
        rows = rows if most_rows is None else min(rows, most_rows)
        found.append(map_queries(jax.checkpoint(functools.partial(block, seen)), part, rows))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *found)


def _embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows [B, S, D] of the table [V, D] for tokens [B, S].

    For a small vocabulary by a matrix product: the gradient of a gather would add many rows in bfloat16, one by one.
    """
    if table.shape[0] <= 4096:
        x = jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype) @ _whole(table, ("vocab", "embed"))
    else:
        # A large table stays split: every device looks up its part of the vectors of all rows' tokens.
        x = constrain(table[constrain(tokens, None, "queries")], None, "queries", "embed")
    return constrain(x, "batch", "queries", None)


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


def _kept_for_the_backward_pass(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether what a primitive makes is kept: not what only gathers, rounds or rearranges numbers.

    So a gathered weight is gathered again and not kept, which would put all layers' weights on every device.
    """
    return primitive.name not in REARRANGING


def _whole(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight with these logical axes, gathered from the devices that it is split over as rows of a batch are (fsdp).

    Its gradient is added up over them and split again.
    """
    return constrain(constrain(weight, *axes), *(None if axis == "embed" else axis for axis in axes))


def losses(
    params: Params,
    tokens: jax.Array,
    config: Config,
    schedule: Schedule,
    *,
    indexers: bool,
    sparse: bool,
    cross_layer: bool = True,
    compute_dtype: Any = jnp.bfloat16,
    traced: TracedSchedule | None = None,
) -> Losses:
    """The losses of rows of tokens [B, S+1]: inputs and their successors (paper 3.2).

    Args:
        params: the weights, rounded to compute_dtype for the arithmetic; matrices in 8 bits are decoded layer by layer.
        tokens: int32, without padding.
        config: the weights' shape.
        schedule: the one the params are for, and the one trained for unless `traced` is given.
        indexers: train the indexers. False: dense language modelling, before there are any indexers worth running.
        sparse: attend to the selected keys only; needs `indexers`.
        cross_layer: False leaves out the terms of S layers, so that an indexer learns from its own layer alone (the
            paper's ablation).
        compute_dtype: of activations and weights, save those that the model keeps in float32.
        traced: the schedule trained for, as arrays. `schedule` must be all F then, and `cross_layer` is ignored.

    Raises:
        ValueError: sparse without indexers, or traced over a schedule with S layers.
    """
    if sparse and not indexers:
        raise ValueError("losses: sparse attention needs indexers=True")
    if traced is not None and schedule.num_full != schedule.num_layers:
        raise ValueError(
            f"losses: a traced schedule needs the indexers of all layers, but the params are for {schedule.pattern}"
        )
    tree = abstract(config, schedule, weights_of(params))
    params = jax.tree.map(lambda a, t: a if t.kind != "weights" else a.astype(t.dtype or compute_dtype), params, tree)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    b, s = inputs.shape
    order = even_order(s)
    if order is not None:
        inputs, targets = inputs[:, order], targets[:, order]
    x = _embed(params.embedding, inputs)
    positions = make_positions(jnp.zeros((b,), jnp.int32), jnp.full((b,), s, jnp.int32), s, config, order)
    by_kernels = ops.trains_by_kernels(b, s, x.dtype, config)
    together = by_kernels and indexers and cross_layer and traced is None and _has_room_for_targets(b, s)
    state = _no_state(positions, x.dtype, config, sparse, by_kernels, together) if indexers else None
    arrays = traced_schedule(schedule, cross_layer) if traced is None else traced
    carry: Carry = x, jnp.zeros((), jnp.float32), positions, state
    counts: list[jax.Array] = []
    for run in runs(config, schedule, together):
        weights = _run_weights(params, run, config, schedule), _slice(arrays, run.start, run)
        layer: Callable[..., Any] = functools.partial(
            _layer, run=run, tensors=_stacks(tree, run), config=config, sparse=sparse, full=run.full if traced is None else None
        )
        if devices_along("embed") > 1:
            layer = jax.checkpoint(layer, policy=_kept_for_the_backward_pass, prevent_cse=False)
        # Few layers stand one after the other where kernels keep a program small: a loop copies what it keeps of each.
        unrolled = run.stop - run.start if by_kernels and run.stop - run.start <= UNROLLED else 1
        carry, count = jax.lax.scan(layer, carry, weights, unroll=unrolled)
        if run.closes:
            x, kl_total, _, state = carry
            assert state is not None  # layers that add up targets have one
            carry = x, kl_total + _missed(state, positions), positions, state
        if count is not None:
            counts.append(count)
    x, kl_total, _, _ = carry
    ends = dataclasses.replace(
        params,
        final_norm=_whole(params.final_norm, tree.final_norm.axes),
        embedding=_whole(params.embedding, tree.embedding.axes) if params.head is None else params.embedding,
        head=None if params.head is None else _whole(params.head, tree.head.axes),
    )
    return Losses(
        _language(ends, x, targets, config),
        kl_total / (b * s),
        jnp.concatenate(counts) if counts else jnp.zeros((0, config.n_routed_experts), jnp.int32),
    )


def _has_room_for_targets(batch: int, length: int) -> bool:
    """Whether a device has room for its part of the targets [B, S, S] of rows, float32."""
    return 4 * batch * length * length <= TARGET_BYTES * devices_along("batch") * devices_along("queries")


def _language(params: Params, x: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """The mean of -log p(targets [B, S]) in nats, from hidden states x [B, S, D]."""

    def losses(head: jax.Array, h: jax.Array, targets: jax.Array) -> jax.Array:
        return language_loss.summed_loss(h.reshape(-1, h.shape[-1]), head, targets.reshape(-1))[None, None]

    head = params.embedding.T if params.head is None else params.head
    h = rms_norm(x, params.final_norm, config.rms_norm_eps)
    return jnp.sum(on_each_device(losses, ((), QUERIES, QUERIES), QUERIES)(head, h, targets)) / targets.size


def _slice(tree: Any, start: int, run: Run) -> Any:
    """As many entries of the first axis of every array in the tree as the run has layers."""
    return jax.tree.map(lambda a: a[start : start + run.stop - run.start], tree)


def _stacks(tree: Params, run: Run) -> Any:
    """Of a tree like the params what a run's layers use: attention, MLP, and the norm before the MLP, of all such layers."""
    attention_layers = AttentionLayer(tree.input_norm, tree.attention, tree.indexer if run.full else None)
    return attention_layers, tree.moe if run.experts else tree.dense, tree.mlp_norm


def _run_weights(params: Params, run: Run, config: Config, schedule: Schedule) -> LayerWeights:
    """The weights of a run's layers, stacked."""
    stacks, mlp, mlp_norm = _stacks(params, run)
    attention_layers = AttentionLayer(
        _slice(stacks.norm, run.start, run),
        _slice(stacks.attention, run.start, run),
        _slice(stacks.indexer, slots(schedule.full_layers)[run.start], run) if run.full else None,
    )
    layers = config.expert_layers if run.experts else config.dense_layers
    return attention_layers, _slice(mlp, slots(layers)[run.start], run), _slice(mlp_norm, run.start, run)


def _layer(
    carry: Carry,
    xs: tuple[LayerWeights, TracedSchedule],
    *,
    run: Run,
    tensors: Any,
    config: Config,
    sparse: bool,
    full: bool | None,
) -> tuple[Carry, jax.Array | None]:
    """One layer of a run: the carry after it, and how many tokens each of its experts got ([E] int32; None if dense).

    tensors: the abstract tree of the stacks that the layer's weights are from. full: whether the layer is F; None takes it
    from the traced schedule.
    """
    # The barrier hides that some of the carry never changes. JAX computes what follows from a scan's constants
    # ahead of it, and here that would be masks and index scores of all blocks, [S, T] together.
    x, kl_total, positions, state = jax.lax.optimization_barrier(carry)
    weights, this_layer = xs
    p, mlp, norm = jax.tree.map(lambda weight, tensor: _whole(weight, tensor.axes[1:]), weights, tensors)
    p, mlp = decoded_layer(p, config, x.dtype), decoded(mlp, config, x.dtype)
    share = this_layer.kl_weight if run.adds else None
    x, state, kl = _attend(p, x, state, positions, config, this_layer.full if full is None else full, sparse, share)
    kl_total = kl_total + this_layer.kl_weight * kl
    with jax.named_scope("mlp"):
        h = rms_norm(x, norm, config.rms_norm_eps)
        if not isinstance(mlp, MoE):
            out, tokens_per_expert = moe.mlp(mlp, h), None
        else:
            chosen, _ = moe.route(mlp, h, config)
            out, tokens_per_expert = moe.moe(mlp, h, config), moe.tokens_per_expert(chosen, config.n_routed_experts)
        return (constrain(x + out, "batch", "queries", None), kl_total, positions, state), tokens_per_expert


def _no_state(positions: Positions, dtype: Any, config: Config, sparse: bool, by_kernels: bool, together: bool) -> IndexState:
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


def traced_schedule(schedule: Schedule, cross_layer: bool = True) -> TracedSchedule:
    """A schedule as arrays [L] of NumPy, with the weights of the multi-layer distillation (paper 3.2).

    A layer's divergence counts 1/(m+1) where its F layer serves m+1 layers. cross_layer False: 1 for F layers, 0 for S.
    """
    full = np.array(schedule.is_full)
    shares = [1.0 / len(schedule.serves(source)) for source in schedule.source]
    return TracedSchedule(full, np.where(cross_layer, shares, full).astype(np.float32))


def balance(bias: jax.Array, tokens_per_expert: jax.Array, speed: float) -> jax.Array:
    """The router's biases [N, E] after a step of balancing without a loss (DeepSeek-V3).

    An expert's bias rises by `speed` where it got fewer tokens than the layer's mean, and falls where it got more.
    tokens_per_expert [N, E].
    """
    mean = jnp.mean(tokens_per_expert, axis=-1, keepdims=True)
    return bias + speed * jnp.sign(mean - tokens_per_expert)


def trainable(params: Params, stage: str) -> Any:
    """A label for every weight, for optax: "indexer", "model" or "frozen" in the stage "dense", "warmup" or "sparse".

    The router's bias is always frozen: it is set by `balance`. Raises ValueError for another stage.
    """
    if stage not in ("dense", "warmup", "sparse"):
        raise ValueError(f"stage: {stage!r} is not 'dense', 'warmup' or 'sparse'")
    model = "frozen" if stage == "warmup" else "model"
    labels = jax.tree.map(lambda _: model, params)
    labels = labels.replace(indexer=jax.tree.map(lambda _: "frozen" if stage == "dense" else "indexer", params.indexer))
    if isinstance(params.moe, MoE):
        labels = labels.replace(moe=labels.moe.replace(router_bias="frozen"))
    return labels
