"""Training losses of a DSA model: language modelling, and the multi-layer distillation of its indexers (paper 3.2).

An F layer l scores keys as I and serves the layers l .. l+m, each with attention probabilities p averaged over heads.
Its indexer is trained on L = sum_j 1/(m+1) sum_t KL(p^(l+j) || softmax(I)): an S layer needs nothing of its source but
its index queries, keys and head weights, so these travel down the layers and every layer adds its own term.

Dense (warm-up): attention and the divergence run over all visible keys. Sparse: both run over the keys that I selects,
p and softmax(I) renormalised on them. The indexer reads detached activations and p is a constant, so the divergence
trains only indexers; selection is discrete, so the language loss never reaches them.

Probabilities exist for one block of queries at a time and are recomputed in the backward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from indexcache_jax import attention, indexer, moe
from indexcache_jax.config import Config
from indexcache_jax.model import AttentionLayer, Positions, mlp_layers, place, token_losses
from indexcache_jax.norm import rms_norm
from indexcache_jax.params import MoE, Params, abstract, slots
from indexcache_jax.schedule import Schedule
from pallas_kernels.indexer_topk.reference import select

SCORE_BYTES = 512 * 2**20  # of one block's float32 attention logits, all heads and rows
SELECTION = "selection"  # saved for the backward pass: selecting again would cost more than it keeps


@flax.struct.dataclass
class IndexState:
    """What an F layer hands to the layers it serves: its scores, before they are made."""

    queries: jax.Array  # [B, S, Hi, Di]
    keys: jax.Array  # [B, S, Di]
    head_weights: jax.Array  # [B, S, Hi]


@flax.struct.dataclass
class Losses:
    """Means over predicted tokens. `indexer` is the sum of L over F layers; `loads` [N, E] counts each expert's tokens."""

    language: jax.Array
    indexer: jax.Array
    loads: jax.Array


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
    return [Run(a, b, *kinds[a]) for a, b in zip(cuts, cuts[1:], strict=False)]


def index_scores(state: IndexState, queries: jax.Array, head_weights: jax.Array) -> jax.Array:
    """I [B, Q, T] float32 of a block of index queries [B, Q, Hi, Di] against all index keys."""
    dots = jnp.einsum("bqhd,btd->bqht", queries, state.keys, preferred_element_type=jnp.float32)
    return jnp.einsum("bqht,bqh->bqt", jax.nn.relu(dots), head_weights)


def divergence(p: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """KL(p || softmax of the scores within the mask) of every query: [B, Q, T] x 3 -> [B, Q], 0 for an empty mask."""
    some = jnp.any(mask, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(jnp.where(mask, scores, jnp.where(some, -jnp.inf, 0.0)), axis=-1)
    return jnp.sum(jnp.where(mask & (p > 0), p * (jnp.log(jnp.where(p > 0, p, 1.0)) - log_q), 0.0), axis=-1)


def selected(scores: jax.Array, visible: jax.Array, k: int) -> jax.Array:
    """The keys [B, Q, T] (bool) among each query's first visible [B, Q] that its k best scores select."""
    t = scores.shape[-1]
    indices = checkpoint_name(jax.vmap(lambda s, v: select(s, v, k))(jax.lax.stop_gradient(scores), visible), SELECTION)
    rows = jax.lax.broadcasted_iota(jnp.int32, indices.shape, 1)
    row_of_batch = jax.lax.broadcasted_iota(jnp.int32, indices.shape, 0)
    places = jnp.where(indices < 0, t, indices)
    return jnp.zeros(scores.shape, bool).at[row_of_batch, rows, places].set(True, mode="drop")


def _attend(
    p: AttentionLayer,
    x: jax.Array,
    state: IndexState | None,
    positions: Positions,
    config: Config,
    full: bool,
    sparse: bool,
) -> tuple[jax.Array, IndexState | None, jax.Array]:
    """One layer's attention: x + attention(norm(x)), the index state after it, the summed divergence of its queries.

    `state` None stands for training without indexers: dense attention, no divergence.
    """
    h = rms_norm(x, p.norm, config.rms_norm_eps)
    q_latent = attention.query_latents(p.attention, h, config)
    queries = jnp.concatenate(attention.queries(p.attention, q_latent, positions.angles, config), axis=-1)
    latents = attention.latents(p.attention, h, positions.angles, config)
    keys, values = attention.expand(p.attention, latents, config)
    if full and state is not None:
        frozen, frozen_latent = jax.lax.stop_gradient(h), jax.lax.stop_gradient(q_latent)
        state = IndexState(
            indexer.index_queries(p.indexer, frozen_latent, positions.angles, config),
            indexer.index_keys(p.indexer, frozen, positions.angles, config),
            indexer.head_weights(p.indexer, frozen, config),
        )
    if state is None and _fused(queries, values):
        out = _causal(queries, keys, values, config.attention_scale)
        return x + attention.output(p.attention, out), None, jnp.zeros((), jnp.float32)
    t = keys.shape[1]
    visible = jnp.clip(jnp.minimum(positions.queries + 1, positions.kv_lengths[:, None]), 0, t)

    def block(queries: jax.Array, visible: jax.Array, *index: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask = jnp.arange(t) < visible[..., None]
        scores = None if state is None else index_scores(state, *index)
        if sparse:
            mask = mask & selected(scores, visible, min(config.index_topk, t))
        out, p = attention.attend_expanded(queries, keys, values, mask, config.attention_scale)
        if scores is None:
            return out, jnp.zeros(visible.shape, jnp.float32)
        return out, divergence(jax.lax.stop_gradient(p), scores, mask)

    index = () if state is None else (state.queries, state.head_weights)
    out, kl = _blockwise(block, (queries, visible, *index), config.num_heads * t * 4)
    return x + attention.output(p.attention, out), state, jnp.sum(kl)


def _embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table. With few of them, as of bytes, the gather's gradient would add up in a handful of places."""
    return jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype) @ table if table.shape[0] <= 1024 else table[tokens]


def _fused(queries: jax.Array, values: jax.Array) -> bool:
    """Whether cuDNN's fused attention serves: on a GPU, in 16 bits, heads of a multiple of 8 up to 128."""
    width = queries.shape[-1]
    return jax.default_backend() == "gpu" and queries.dtype == jnp.bfloat16 and width % 8 == 0 and values.shape[-1] <= width <= 128


def _causal(queries: jax.Array, keys: jax.Array, values: jax.Array, scale: float) -> jax.Array:
    """Causal attention where nobody asks for its probabilities; cuDNN wants values as wide as keys."""
    width = values.shape[-1]
    values = jnp.pad(values, ((0, 0),) * 3 + ((0, queries.shape[-1] - width),))
    out = jax.nn.dot_product_attention(queries, keys, values, scale=scale, is_causal=True, implementation="cudnn")
    return out[..., :width]


def _blockwise(block: Any, inputs: tuple[jax.Array, ...], bytes_per_query: int) -> tuple[jax.Array, jax.Array]:
    """`block` over equal blocks of queries, each recomputed in the backward pass but for its selection."""
    b, s = inputs[0].shape[:2]
    rows = s
    while rows % 2 == 0 and b * rows * bytes_per_query > SCORE_BYTES:
        rows //= 2
    block = jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(SELECTION))
    if rows == s:
        return block(*inputs)
    cut = tuple(x.reshape(b, s // rows, rows, *x.shape[2:]).swapaxes(0, 1) for x in inputs)
    outs = jax.lax.map(lambda xs: block(*xs), cut)
    return tuple(o.swapaxes(0, 1).reshape(b, s, *o.shape[3:]) for o in outs)  # type: ignore[return-value]


def losses(
    params: Params,
    tokens: jax.Array,
    config: Config,
    schedule: Schedule,
    *,
    indexers: bool,
    sparse: bool,
    compute_dtype: Any = jnp.bfloat16,
) -> Losses:
    """The losses of tokens [B, S+1] (inputs and their successors), in nats a token.

    indexers: train them (False for dense language modelling before there are any worth running). sparse: attend to the
    selected keys only; needs `indexers`. Raises ValueError for sparse without indexers.
    """
    if sparse and not indexers:
        raise ValueError("losses: sparse attention needs indexers=True")
    params = jax.tree.map(lambda a, t: a.astype(t.dtype or compute_dtype), params, abstract(config, schedule))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    b, s = inputs.shape
    positions = place(jnp.zeros((b,), jnp.int32), jnp.full((b,), s, jnp.int32), s, config)
    x = _embed(params.embedding, inputs)
    heads, width = config.index_n_heads, config.index_head_dim
    state = None
    if indexers:
        state = IndexState(
            jnp.zeros((b, s, heads, width), x.dtype), jnp.zeros((b, s, width), x.dtype), jnp.zeros((b, s, heads), jnp.float32)
        )
    dense, sparse_layers = mlp_layers(config)
    stack_slots = {False: slots(dense), True: slots(sparse_layers)}
    full_slots = slots(schedule.full_layers)
    serving = [1.0 / len(schedule.serves(source)) for source in schedule.source]
    kl_total, loads = jnp.zeros((), jnp.float32), []
    for run in runs(config, schedule):
        span, mlp_start = run.stop - run.start, stack_slots[run.experts][run.start]
        stack = params.moe if run.experts else params.dense
        full_start = full_slots[run.start] if run.full else 0

        def cut(tree: Any, start: int, span: int = span) -> Any:
            return jax.tree.map(lambda a: a[start : start + span], tree)

        layers = (
            AttentionLayer(
                cut(params.input_norm, run.start),
                cut(params.attention, run.start),
                cut(params.indexer, full_start) if run.full else None,
            ),
            cut(stack, mlp_start),
            cut(params.mlp_norm, run.start),
            jnp.array(serving[run.start : run.stop], jnp.float32),
        )

        def layer(carry: Any, xs: Any, full: bool = run.full, experts: bool = run.experts) -> Any:
            x, state, kl_total = carry
            p, mlp, norm, weight = xs
            x, state, kl = _attend(p, x, state, positions, config, full, sparse)
            h = rms_norm(x, norm, config.rms_norm_eps)
            if not experts:
                return (x + moe.mlp(mlp, h), state, kl_total + weight * kl), None
            chosen, _ = moe.route(mlp, h.reshape(-1, h.shape[-1]), config)
            load = moe.loads(chosen, config.n_routed_experts)
            return (x + moe.moe(mlp, h, config), state, kl_total + weight * kl), load

        (x, state, kl_total), load = jax.lax.scan(layer, (x, state, kl_total), layers)
        if run.experts:
            loads.append(load)
    language = jnp.mean(token_losses(params, x, targets, config))
    return Losses(
        language,
        kl_total / (b * s),
        jnp.concatenate(loads) if loads else jnp.zeros((0, config.n_routed_experts), jnp.int32),
    )


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
