"""Training losses of a DSA model: language modelling, and the multi-layer distillation of its indexers (paper 3.2).

An F layer l scores keys as I and serves the layers l .. l+m, each with attention probabilities p averaged over heads.
Its indexer is trained on L = sum_j 1/(m+1) sum_t KL(p^(l+j) || softmax(I)): an S layer needs nothing of its source but
its index queries, keys and head weights, so these travel down the layers and every layer adds its own term.

Dense (warm-up): attention and the divergence run over all visible keys. Sparse: both run over the keys that I selects,
p and softmax(I) renormalised on them. The indexer reads detached activations and p is a constant, so the divergence
trains only indexers; selection is discrete, so the language loss never reaches them.

In XLA, probabilities exist for one block of queries at a time and are recomputed in the backward pass; what is kept of
a selection is its indices, made once by the F layer and handed down like the rest. Where the kernels serve (Hopper,
bfloat16, heads up to 192 wide, values and index heads up to 128), a selection is handed down as bits, attention is fused,
and the divergence's gradient is made in the forward pass.

A schedule is static, as in inference, unless its roles are given as arrays: then one program trains for any schedule, as
layerwise.py searches over them, and layers that turn out S keep an indexer without a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from indexcache_jax import attention, indexer, moe
from indexcache_jax.config import Config
from indexcache_jax.model import AttentionLayer, token_losses
from indexcache_jax.norm import rms_norm
from indexcache_jax.params import MoE, Params, abstract, slots
from indexcache_jax.positions import Positions, whole_rows
from indexcache_jax.schedule import Schedule
from pallas_kernels import dispatch
from pallas_kernels.index_divergence import api as index_divergence
from pallas_kernels.selected_attention import api as selected_attention
from pallas_kernels.selected_attention import bits

SCORE_BYTES = 512 * 2**20  # of one block's float32 logits, all attention and index heads and rows
# Queries see only keys before them: those of the first quarter of a long row need no product with the other three.
CAUSAL_PARTS, CAUSAL_FROM = 4, 2048


@flax.struct.dataclass
class IndexState:
    """What an F layer hands to the layers it serves: its scores, before they are made, and its selection if sparse."""

    queries: jax.Array  # [B, S, Hi, Di]
    keys: jax.Array  # [B, S, Di]
    head_weights: jax.Array  # [B, S, Hi]
    indices: jax.Array | None  # [B, S, k]
    words: jax.Array | None  # [B, T / 32, S], what is attended to, for the kernels; then there are no indices


@flax.struct.dataclass
class Losses:
    """Means over predicted tokens. `indexer` is the sum of L over F layers; `loads` [N, E] counts each expert's tokens."""

    language: jax.Array
    indexer: jax.Array
    loads: jax.Array


@flax.struct.dataclass
class Roles:
    """A schedule as data: which layers are F, and what each layer's divergence counts, [L] each."""

    full: Any
    share: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers of one kind, compiled once and scanned over."""

    start: int
    stop: int
    full: bool
    experts: bool


def runs(config: Config, schedule: Schedule) -> list[Run]:
    """The layers, cut wherever F/S or dense/experts changes."""
    kinds = list(zip(schedule.is_full, config.moe_layers, strict=True))
    cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    return [Run(a, b, *kinds[a]) for a, b in itertools.pairwise(cuts)]


def index_scores(queries: jax.Array, keys: jax.Array, head_weights: jax.Array) -> jax.Array:
    """I [B, Q, T] float32 of index queries [B, Q, Hi, Di] and head weights [B, Q, Hi] against index keys [B, T, Di]."""
    dots = jnp.einsum("bqhd,btd->bqht", queries, keys, preferred_element_type=jnp.float32)
    return jnp.einsum("bqht,bqh->bqt", jax.nn.relu(dots), head_weights)


def divergence(target: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(target || softmax of the scores within the mask) of every query: [B, Q, T] x 3 -> [B, Q], 0 for an empty mask.

    The target is a distribution within the mask: zeros outside.
    """
    some = jnp.any(mask, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, jnp.where(some, -jnp.inf, 0.0)), axis=-1)
    return jnp.sum(jax.scipy.special.xlogy(target, target) - target * jnp.where(mask, log_q, 0.0), axis=-1)


def averaged_divergence(targets: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(mean of the targets [n, B, Q, T] || softmax of the scores within the mask): [B, Q] (paper 3.2, averaged form).

    Its gradient is that of the mean of `divergence` over the targets, which is larger by their Jensen-Shannon divergence.
    It needs every served layer's target at once, so training takes the sum.
    """
    return divergence(jnp.mean(targets, axis=0), scores, mask)


def within(indices: jax.Array, keys: int) -> jax.Array:
    """The mask [B, Q, T] of selected indices [B, Q, k] among T = `keys`; -1 selects nothing."""
    row_of_batch, row = (jax.lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (0, 1))
    places = jnp.where(indices < 0, keys, indices)
    return jnp.zeros((*indices.shape[:2], keys), bool).at[row_of_batch, row, places].set(True, mode="drop")


def _index(
    p: AttentionLayer,
    h: jax.Array,
    q_latent: jax.Array,
    positions: Positions,
    config: Config,
    sparse: bool,
    words: jax.Array | None,
) -> IndexState:
    """An F layer's index state from its normalised input h [B, S, D] and query latents [B, S, R], both detached.

    `words`: those of the layer before, where the kernels attend.
    """
    assert p.indexer is not None  # an F layer has one
    h, q_latent = jax.lax.stop_gradient((h, q_latent))
    state = IndexState(
        indexer.index_queries(p.indexer, q_latent, positions.cos_sin, config),
        indexer.index_keys(p.indexer, h, positions.cos_sin, config),
        indexer.head_weights(p.indexer, h, config),
        None,
        words,
    )
    if not sparse:
        return state
    indices = pallas_kernels.indexer_topk(
        *jax.lax.stop_gradient((state.queries, state.keys, state.head_weights)),
        k_select=min(config.index_topk, h.shape[1]),
        q_positions=positions.queries,
        kv_lengths=positions.kv_lengths,
    )
    if words is not None:
        return dataclasses.replace(state, words=bits.pack(indices, h.shape[1]))
    return dataclasses.replace(state, indices=indices)


def _attend(
    p: AttentionLayer,
    x: jax.Array,
    state: IndexState | None,
    positions: Positions,
    config: Config,
    full: bool | jax.Array,
    sparse: bool,
) -> tuple[jax.Array, IndexState | None, jax.Array]:
    """One layer's attention: x + attention(norm(x)), the index state after it, the summed divergence of its queries.

    `state` None stands for training without indexers: dense attention, no divergence. `full` traced compiles both.
    """
    h = rms_norm(x, p.norm, config.rms_norm_eps)
    q_latent = attention.query_latents(p.attention, h, config)
    queries = jnp.concatenate(attention.queries(p.attention, q_latent, positions.cos_sin, config), axis=-1)
    latents = attention.latents(p.attention, h, positions.cos_sin, config)
    keys, values = attention.expand(p.attention, latents, config)
    if state is None and _fused(queries, values):
        out = _causal(queries, keys, values, config.attention_scale)
        return x + attention.output(p.attention, out), None, jnp.zeros((), jnp.float32)
    if state is not None and not isinstance(full, bool):
        select = functools.partial(_index, p, h, q_latent, positions, config, sparse, state.words)
        state = jax.lax.cond(full, select, lambda: state)
    elif state is not None and full:
        state = _index(p, h, q_latent, positions, config, sparse, state.words)
    if state is not None and state.words is not None:
        out, lse = pallas_kernels.selected_attention(queries, keys, values, state.words, scale=config.attention_scale)
        scored = state.queries, state.keys, state.head_weights
        kl = pallas_kernels.index_divergence(*scored, queries, keys, lse, state.words, scale=config.attention_scale)
        return x + attention.output(p.attention, out), state, kl

    def block(
        t: int, queries: jax.Array, visible: jax.Array, indices: jax.Array | None, index: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Of queries that see at most the first t keys."""
        mask = jnp.arange(t) < visible[..., None]
        if indices is not None:
            mask = mask & within(indices, t)
        out, target = attention.attend_expanded(queries, keys[:, :t], values[:, :t], mask, config.attention_scale)
        if state is None:
            return out, jnp.zeros(visible.shape, jnp.float32)
        index_queries, head_weights = index
        scores = index_scores(index_queries, state.keys[:, :t], head_weights)
        return out, divergence(jax.lax.stop_gradient(target), scores, mask)

    indices, index = (None, ()) if state is None else (state.indices, (state.queries, state.head_weights))
    inputs = (queries, positions.queries + 1, indices, index)
    s = queries.shape[1]
    parts = CAUSAL_PARTS if s >= CAUSAL_FROM else 1
    outs, kls = [], []
    for first, stop in itertools.pairwise(i * s // parts for i in range(parts + 1)):
        part = jax.tree.map(lambda x, first=first, stop=stop: x[:, first:stop], inputs)
        out, kl = _blockwise(functools.partial(block, stop), part, 4 * stop * (config.num_heads + config.index_n_heads))
        outs.append(out)
        kls.append(jnp.sum(kl))
    return x + attention.output(p.attention, jnp.concatenate(outs, axis=1)), state, sum(kls, start=jnp.zeros(()))


def _embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table. With few of them the gather's gradient would add up, in bfloat16, in a handful of places."""
    return jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype) @ table if table.shape[0] <= 4096 else table[tokens]


def _fused(queries: jax.Array, values: jax.Array) -> bool:
    """Whether cuDNN's fused attention serves: on a GPU, in 16 bits, heads of a multiple of 8 up to 128."""
    width = queries.shape[-1]
    fits = width % 8 == 0 and values.shape[-1] <= width <= 128
    return fits and jax.default_backend() == "gpu" and queries.dtype == jnp.bfloat16


def _causal(queries: jax.Array, keys: jax.Array, values: jax.Array, scale: float) -> jax.Array:
    """Causal attention where nobody asks for its probabilities; cuDNN wants values as wide as keys."""
    width = values.shape[-1]
    values = jnp.pad(values, ((0, 0),) * 3 + ((0, queries.shape[-1] - width),))
    out = jax.nn.dot_product_attention(queries, keys, values, scale=scale, is_causal=True, implementation="cudnn")
    return out[..., :width]


def _blockwise(block: Any, inputs: Any, bytes_per_query: int) -> tuple[jax.Array, jax.Array]:
    """`block(*inputs)` over blocks of queries of a tree of inputs [B, S, ...], each recomputed in the backward pass.

    The last block is filled up with zeros, of which the results are dropped.
    """
    b, s = inputs[0].shape[:2]
    blocks = min(s, -(-b * s * bytes_per_query // SCORE_BYTES))
    rows = -(-s // blocks)
    block = jax.checkpoint(block)
    if blocks == 1:
        return block(*inputs)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * rows - s)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, blocks, rows, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(b, blocks * rows, *x.shape[3:])[:, :s]

    out, kl = jax.lax.map(lambda xs: block(*xs), jax.tree.map(cut, inputs))
    return join(out), join(kl)


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
    roles: Roles | None = None,
) -> Losses:
    """The losses of tokens [B, S+1] (inputs and their successors), in nats a token.

    indexers: train them (False for dense language modelling before there are any worth running). sparse: attend to the
    selected keys only; needs `indexers`. cross_layer: False leaves the S layers' terms out, so that an indexer learns
    from its own layer alone (the paper's ablation). Weights are rounded to compute_dtype for the arithmetic.

    roles: another schedule's F layers and shares, as arrays; `schedule`, which the params are made for, is all F then, and
    cross_layer counts for nothing.

    Raises ValueError for sparse without indexers, and for roles over a schedule with S layers.
    """
    if sparse and not indexers:
        raise ValueError("losses: sparse attention needs indexers=True")
    if roles is not None and schedule.num_full != schedule.num_layers:
        raise ValueError(f"losses: roles need the indexers of all layers, the params are made for {schedule.pattern}")
    params = jax.tree.map(lambda a, t: a.astype(t.dtype or compute_dtype), params, abstract(config, schedule))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    b, s = inputs.shape
    positions = whole_rows(inputs, config)
    x = _embed(params.embedding, inputs)
    state = _no_state(b, s, x.dtype, config, sparse, by_kernels(b, s, x.dtype, config)) if indexers else None
    dense, sparse_layers = config.dense_layers, config.expert_layers
    stack_slots = {False: slots(dense), True: slots(sparse_layers)}
    full_slots = slots(schedule.full_layers)
    given = roles_of(schedule, cross_layer) if roles is None else roles
    kl_total, loads = jnp.zeros((), jnp.float32), []
    for run in runs(config, schedule):

        def cut(tree: Any, start: int, span: int = run.stop - run.start) -> Any:
            return jax.tree.map(lambda a: a[start : start + span], tree)

        layers = (
            AttentionLayer(
                cut(params.input_norm, run.start),
                cut(params.attention, run.start),
                cut(params.indexer, full_slots[run.start]) if run.full else None,
            ),
            cut(params.moe if run.experts else params.dense, stack_slots[run.experts][run.start]),
            cut(params.mlp_norm, run.start),
            cut(given, run.start),
        )

        def layer(carry: Any, xs: Any, run: Run = run) -> Any:
            # The barrier hides that some of the carry never changes. JAX computes what follows from a scan's constants
            # ahead of it, and here that would be masks and index scores of all blocks, [S, T] together.
            x, kl_total, positions, state = jax.lax.optimization_barrier(carry)
            p, mlp, norm, role = xs
            full = run.full if roles is None else role.full
            x, state, kl = _attend(p, x, state, positions, config, full, sparse)
            carry = kl_total + role.share * kl, positions, state
            h = rms_norm(x, norm, config.rms_norm_eps)
            if not run.experts:
                return (x + moe.mlp(mlp, h), *carry), None
            chosen, _ = moe.route(mlp, h.reshape(-1, h.shape[-1]), config)
            return (x + moe.moe(mlp, h, config), *carry), moe.tokens_per_expert(chosen, config.n_routed_experts)

        (x, kl_total, positions, state), load = jax.lax.scan(layer, (x, kl_total, positions, state), layers)
        if run.experts:
            loads.append(load)
    language = jnp.mean(token_losses(params, x, targets, config))
    return Losses(
        language,
        kl_total / (b * s),
        jnp.concatenate(loads) if loads else jnp.zeros((0, config.n_routed_experts), jnp.int32),
    )


def by_kernels(batch: int, length: int, dtype: Any, config: Config) -> bool:
    """Whether the kernels of attention by bits and of the divergence serve such activations; else all is done in XLA."""

    def shape(*sizes: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((batch, *sizes), dtype)

    heads, index_heads, width = config.num_heads, config.index_n_heads, config.index_head_dim
    queries, values = shape(length, heads, config.qk_head_dim), shape(length, heads, config.v_head_dim)
    words = shape(bits.words_of(length), length, dtype=jnp.int32)
    index = shape(length, index_heads, width), shape(length, width), shape(length, index_heads, dtype=jnp.float32)
    lse = shape(heads, length, dtype=jnp.float32)
    attend, diverge = selected_attention.BACKENDS, index_divergence.BACKENDS
    found = (
        dispatch.best(attend, queries, queries, values, words, scale=1.0),
        dispatch.best(diverge, *index, queries, queries, lse, words, scale=1.0),
    )
    return "xla" not in found


def _no_state(batch: int, length: int, dtype: Any, config: Config, sparse: bool, by_kernels: bool) -> IndexState:
    """What stands before the first layer, which is F and replaces it but for the bits of dense attention."""
    heads, width = config.index_n_heads, config.index_head_dim
    indices = jnp.zeros((batch, length, min(config.index_topk, length)), jnp.int32)
    return IndexState(
        jnp.zeros((batch, length, heads, width), dtype),
        jnp.zeros((batch, length, width), dtype),
        jnp.zeros((batch, length, heads), jnp.float32),
        indices if sparse and not by_kernels else None,
        bits.causal(batch, length, length) if by_kernels else None,
    )


def roles_of(schedule: Schedule, cross_layer: bool = True) -> Roles:
    """A layer's divergence counts 1/(m+1) where its source serves m+1 layers; not cross_layer: an F layer's 1, else 0."""
    full = np.array(schedule.is_full)
    served = [1.0 / len(schedule.serves(schedule.source[layer])) for layer in range(schedule.num_layers)]
    return Roles(full, np.where(cross_layer, served, full).astype(np.float32))


def balance(bias: jax.Array, loads: jax.Array, speed: float) -> jax.Array:
    """DeepSeek's balancing without a loss: nudge an expert's bias [N, E] up where it got less than its share, else down."""
    return bias + speed * jnp.sign(jnp.mean(loads, axis=-1, keepdims=True) - loads)


def trainable(params: Params, stage: str) -> Any:
    """A tree of labels for optax: "indexer", "model" or "frozen" for every weight in stage "dense", "warmup" or "sparse".

    The router's bias is balanced by rule, never by gradient.
    """
    if stage not in ("dense", "warmup", "sparse"):
        raise ValueError(f"stage: {stage!r} is not 'dense', 'warmup' or 'sparse'")
    model = "frozen" if stage == "warmup" else "model"
    labels = jax.tree.map(lambda _: model, params)
    labels = labels.replace(indexer=jax.tree.map(lambda _: "frozen" if stage == "dense" else "indexer", params.indexer))
    if isinstance(params.moe, MoE):
        labels = labels.replace(moe=labels.moe.replace(router_bias="frozen"))
    return labels
