"""The losses of rows of tokens: all layers, scanned over in runs of one kind, between embedding and head."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from indexcache_jax import language_loss, moe, ops
from indexcache_jax.config import Config
from indexcache_jax.distill.attention import IndexState, attend_layer, missed, no_state
from indexcache_jax.distill.stages import TracedSchedule, traced_schedule
from indexcache_jax.model import AttentionLayer, decoded_layer
from indexcache_jax.norm import rms_norm
from indexcache_jax.ops import QUERIES
from indexcache_jax.params import MLP, MoE, Params, abstract, decoded, slots, weights_of
from indexcache_jax.positions import Positions, even_order, make_positions
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import constrain, devices_along, on_each_device

TARGET_BYTES = 8 * 2**30  # of the targets that layers add up, on a device
UNROLLED = 4  # layers of a run that are compiled one after the other, without a loop
REARRANGING = {
    *("sharding_constraint", "convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"),
    *("slice", "dynamic_slice", "copy", "optimization_barrier"),
}

Carry = tuple[jax.Array, jax.Array, Positions, IndexState | None]  # x, summed divergence, positions, index state
LayerWeights = tuple[AttentionLayer, MLP | MoE, jax.Array]  # attention, MLP, and the norm before the MLP


@flax.struct.dataclass
class Losses:
    """Losses in nats a predicted token, and how many tokens each expert got.

    language: mean cross-entropy. indexer: the multi-layer divergence L, summed over F layers, mean over tokens.
    tokens_per_expert [N, E] int32: for each of the N layers with experts.
    """

    language: jax.Array
    indexer: jax.Array
    tokens_per_expert: jax.Array


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


def runs(config: Config, schedule: Schedule, together: bool = False) -> list[Run]:
    """The layers cut into runs, wherever F/S or dense/experts changes.

    together: the layers that an indexer serves add their targets up.
    """
    served = [len(schedule.serves(source)) for source in schedule.source]
    kinds = list(zip(schedule.is_full, config.moe_layers, (together and count > 1 for count in served), strict=True))
    cuts = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    full = [*schedule.is_full, True]
    return [Run(a, b, *kinds[a], closes=kinds[a][2] and full[b]) for a, b in itertools.pairwise(cuts)]


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
    state = no_state(positions, x.dtype, config, sparse, by_kernels, together) if indexers else None
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
            carry = x, kl_total + missed(state, positions), positions, state
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


def _language(params: Params, x: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """The mean of -log p(targets [B, S]) in nats, from hidden states x [B, S, D]."""

    def losses(head: jax.Array, h: jax.Array, targets: jax.Array) -> jax.Array:
        return language_loss.summed_loss(h.reshape(-1, h.shape[-1]), head, targets.reshape(-1))[None, None]

    head = params.embedding.T if params.head is None else params.head
    h = rms_norm(x, params.final_norm, config.rms_norm_eps)
    return jnp.sum(on_each_device(losses, ((), QUERIES, QUERIES), QUERIES)(head, h, targets)) / targets.size


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
    x, state, kl = attend_layer(p, x, state, positions, config, this_layer.full if full is None else full, sparse, share)
    kl_total = kl_total + this_layer.kl_weight * kl
    with jax.named_scope("mlp"):
        h = rms_norm(x, norm, config.rms_norm_eps)
        if not isinstance(mlp, MoE):
            out, tokens_per_expert = moe.mlp(mlp, h), None
        else:
            chosen, _ = moe.route(mlp, h, config)
            out, tokens_per_expert = moe.moe(mlp, h, config), moe.tokens_per_expert(chosen, config.n_routed_experts)
        return (constrain(x + out, "batch", "queries", None), kl_total, positions, state), tokens_per_expert
