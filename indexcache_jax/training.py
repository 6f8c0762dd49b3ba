"""A training step: which weights a stage trains, the optimiser with its learning rates, one update, and what it costs.

A run is a list of stages (paper 3.2: a dense warm-up of the indexers, then the sparse stage that trains everything).
Which weights a stage trains follows from their place in the tree (`distill.trainable`); gradients and optimiser state
exist for those alone. Weights are float32, arithmetic is in the stage's compute dtype. What a stage does not train may be in
8 bits: the warm-up takes params of weights="fp8 base" (`params.abstract`).

On a mesh, by the rules `sharding.TRAINING`, weights and what the optimiser keeps of them are split over all devices of the
data axis (fsdp), and experts over all devices; a step leaves them where they lay.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from indexcache_jax import arguments, distill, sharding, tensors
from indexcache_jax.config import Config
from indexcache_jax.params import DTYPES, Params, abstract, check_params, weights_of
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import CODE

KINDS = ("dense", "warmup", "sparse")  # of stages
# What a step returns: both losses in nats a token, the largest share of a layer's tokens that one expert gets, and the
# norm of the gradient before clipping.
METRICS = ("language", "indexer", "largest_load", "gradient_norm")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One phase of training: what trains, on how much text, how fast.

    kind: "dense" (everything but the indexers, dense attention), "warmup" (the indexers alone, dense attention) or
        "sparse" (everything, attention over what the indexers select). The router's bias is never trained.
    rows, context, accumulate: an update sees `accumulate` micro-batches of `rows` sequences of `context` tokens.
    model_learning_rate, indexer_learning_rate: the peaks of the two learning rates. A rate is 0 at the first update, rises
        linearly over `lr_warmup_steps` (at least 1, at most a fifth of the stage) and falls along a cosine to
        `final_lr_fraction` of its peak. A stage of one update therefore changes nothing.
    clip_norm: largest norm of the gradient, of the model's and of the indexers' apart.
    weight_decay: of matrices; not of norms, biases and the embedding.
    balance_speed: by how much an update moves the router's bias towards equally loaded experts; 0 leaves it as it is.
    neighbour_decay: of the attention's and the indexers' matrices, drawn to those of the layers below and above as weight
        decay draws to 0 (`neighbour_decay`); with it neighbouring layers select alike.
    cross_layer: an F layer's indexer learns from all layers that it serves, not from its own alone.

    Raises ValueError, naming the field, for values out of range.
    """

    name: str
    kind: str
    steps: int
    rows: int
    context: int
    model_learning_rate: float
    indexer_learning_rate: float
    final_lr_fraction: float = 0.1
    lr_warmup_steps: int = 100
    accumulate: int = 1
    clip_norm: float = 1.0
    weight_decay: float = 0.1
    balance_speed: float = 0.0
    neighbour_decay: float = 0.0
    cross_layer: bool = True
    compute_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        arguments.choice("kind", self.kind, KINDS)
        for field, least in (("steps", 0), ("rows", 1), ("context", 1), ("accumulate", 1), ("lr_warmup_steps", 0)):
            arguments.integer(field, getattr(self, field), least)
        fractions = "final_lr_fraction", "weight_decay", "balance_speed", "neighbour_decay"
        for field in ("model_learning_rate", "indexer_learning_rate", *fractions):
            value = getattr(self, field)
            if not (arguments.is_real(value) and 0 <= value < float("inf")):
                raise ValueError(f"{field}: {arguments.described(value)} is not a number of at least 0")
        if not (arguments.is_real(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"clip_norm: {arguments.described(self.clip_norm)} is not a number above 0")
        arguments.dtype("compute_dtype", self.compute_dtype, DTYPES)

    @property
    def sequences(self) -> int:
        """Sequences of an update."""
        return self.accumulate * self.rows

    @property
    def program(self) -> Stage:
        """The stage without its name and length: what a compiled step depends on, so that stages of any length share it."""
        return dataclasses.replace(self, name="", steps=0)


def split(tree: Any, labels: Any) -> tuple[Any, Any]:
    """The leaves that train and those labelled "frozen", as two trees with None in place of the other's leaves."""
    trained = jax.tree.map(lambda label, leaf: None if label == "frozen" else leaf, labels, tree)
    return trained, jax.tree.map(lambda label, leaf: leaf if label == "frozen" else None, labels, tree)


def merge(trained: Any, frozen: Any) -> Any:
    """The tree of which `split` made two."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def learning_rate(stage: Stage, peak: float, steps: jax.Array | int) -> optax.Schedule:
    """The learning rate by the number of updates made, for a stage of `steps` updates, which may be traced."""
    steps = jnp.asarray(steps, jnp.float32)
    warmup = jnp.maximum(1.0, jnp.minimum(stage.lr_warmup_steps, jnp.floor(steps / 5)))

    def at(count: jax.Array) -> jax.Array:
        progress = jnp.clip((count - warmup) / jnp.maximum(steps - warmup, 1.0), 0.0, 1.0)
        cosine = stage.final_lr_fraction + (1 - stage.final_lr_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(count < warmup, count / warmup, cosine)

    return at


def neighbour_decay(rate: float) -> optax.GradientTransformation:
    """Adds the gradient of rate/4 sum_l |w_l - w_(l+1)|^2 to the updates of stacks of weights w [L, ...].

    Before the learning rate, as `optax.add_decayed_weights` stands in AdamW. Adam would scale such a gradient to the size of
    the losses' own, however strong the pull is.
    """

    def pull(update: jax.Array, weights: jax.Array) -> jax.Array:
        steps = jnp.diff(weights, axis=0)  # from each layer to the next
        none = jnp.zeros_like(weights[:1])
        return update + 0.5 * rate * (jnp.concatenate([none, steps]) - jnp.concatenate([steps, none]))

    return optax.stateless(lambda updates, params: jax.tree.map(pull, updates, params))


def adamw(stage: Stage, peak: float, steps: jax.Array | int, decayed: Any, alike: Any = None) -> optax.GradientTransformation:
    """AdamW at a peak learning rate, for a stage of `steps` updates.

    decayed, alike: trees of booleans, which weights decay, and to which stacks stage.neighbour_decay applies.
    """
    rate = learning_rate(stage, peak, steps)
    clip = optax.clip_by_global_norm(stage.clip_norm)
    if not stage.neighbour_decay or alike is None:
        return optax.chain(clip, optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=stage.weight_decay, mask=decayed))
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(stage.weight_decay, decayed),
        optax.masked(neighbour_decay(stage.neighbour_decay), alike),
        optax.scale_by_learning_rate(rate),
    )


def optimiser(
    stage: Stage, config: Config, schedule: Schedule, steps: jax.Array | int | None = None, weights: str | None = None
) -> optax.GradientTransformation:
    """AdamW over the stage's trained leaves, with a learning rate and a clipping norm for the model and for the indexers.

    steps: the stage's length where it is not stage.steps; may be traced. weights: the form of the params
    (`params.weights_of`).
    """
    length = stage.steps if steps is None else steps
    tree = abstract(config, schedule, weights)
    labels = distill.trainable(tree, stage.kind)
    matrices = jax.tree.map(lambda t: t.init == "normal", tree)
    nothing: Params = jax.tree.map(lambda _: False, tree)
    attending = dataclasses.replace(nothing, attention=matrices.attention, indexer=matrices.indexer)
    decayed, alike = (split(which, labels)[0] for which in (matrices, attending))
    peaks = {"model": stage.model_learning_rate, "indexer": stage.indexer_learning_rate}
    rules = {name: adamw(stage, peak, length, decayed, alike) for name, peak in peaks.items()}
    return optax.multi_transform(rules, split(labels, labels)[0])


def init_optimiser_state(params: Params, stage: Stage, config: Config, schedule: Schedule) -> Any:
    """The optimiser's state before a stage's first step; on a mesh, what it keeps of a weight lies where the weight does."""

    def init(params: Params) -> Any:
        labels = distill.trainable(params, stage.kind)
        state = optimiser(stage, config, schedule, weights=weights_of(params)).init(split(params, labels)[0])
        return _in_place(params, state, config, schedule)[1]

    return init(params) if sharding.current()[0] is None else jax.jit(init)(params)


def _in_place(params: Params, state: Any, config: Config, schedule: Schedule) -> tuple[Params, Any]:
    """Traced params and optimiser state where they lie on the mesh in force."""
    mesh, rules = sharding.current()
    if mesh is None:
        return params, state
    of_params = sharding.shardings(abstract(config, schedule, weights_of(params)), mesh, rules)
    return jax.lax.with_sharding_constraint((params, state), (of_params, optimiser_shardings(state, of_params)))


def optimiser_shardings(state: Any, params_shardings: Any) -> Any:
    """The shardings of an optimiser's state, which may be abstract: what it keeps of a weight lies where the weight does.

    params_shardings: a tree of NamedShardings like the params. A leaf of the state belongs to the weight whose path in the
    params its own path ends with; counts and whatever belongs to no weight are replicated.
    """
    of_weights = {tuple(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params_shardings)}
    replicated = NamedSharding(next(iter(of_weights.values())).mesh, PartitionSpec())

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        endings = (path[start:] for start in range(len(path)))
        return next((of_weights[ending] for ending in endings if ending in of_weights), replicated)

    return jax.tree_util.tree_map_with_path(of, state)


@functools.partial(jax.jit, static_argnames="stage", donate_argnames=("params", "state"))
def step(
    params: Params,
    state: Any,
    tokens: jax.Array,
    config: Config,
    schedule: Schedule,
    stage: Stage,
    steps: jax.Array | int | None = None,
    traced: distill.TracedSchedule | None = None,
) -> tuple[Params, Any, jax.Array]:
    """One update on tokens [accumulate, rows, S+1]: the params, the optimiser's state, and METRICS [4] float32.

    The metrics are means over the micro-batches, of the params before the update. `params` (float32) and `state` are
    donated: their buffers are used again. ValueError for params that the stage trains and that are in 8 bits, for those of
    another model or schedule, and for tokens with other axes or another number of micro-batches. The caller makes sure that
    they are tokens of the model, in the stage's rows and context.

    steps, traced: the stage's length and the schedule to train for, as data. With `stage.program`, one compiled step serves
    stages of any length; with `traced`, params that have all indexers are trained for any schedule by it.
    """
    check_params(params, config, schedule)
    tokens = jnp.asarray(arguments.integers("tokens", tokens, ("accumulate", "rows", "S+1")))
    if tokens.shape[0] != stage.accumulate:
        raise ValueError(f"tokens: {tokens.shape[0]} micro-batches for a stage that accumulates {stage.accumulate}")
    labels = distill.trainable(params, stage.kind)
    trained, frozen = split(params, labels)
    if in_codes := [path for path, leaf in tensors.leaves(trained) if leaf.dtype == CODE]:
        raise ValueError(f"{in_codes[0]}: is in 8 bits, which stage {stage.kind} cannot train; load it with weights=None")

    def objective(trained: Any, tokens: jax.Array) -> tuple[jax.Array, distill.Losses]:
        losses = distill.losses(
            merge(trained, frozen),
            tokens,
            config,
            schedule,
            indexers=stage.kind != "dense",
            sparse=stage.kind == "sparse",
            cross_layer=stage.cross_layer,
            compute_dtype=jnp.dtype(stage.compute_dtype),
            traced=traced,
        )
        totals = {"dense": losses.language, "warmup": losses.indexer, "sparse": losses.language + losses.indexer}
        return totals[stage.kind], losses

    def micro_batch(tokens: jax.Array) -> tuple[Any, distill.Losses]:
        return jax.grad(objective, has_aux=True)(trained, tokens)

    if stage.accumulate == 1:
        gradients, losses = micro_batch(tokens[0])
    else:
        shapes = jax.eval_shape(micro_batch, tokens[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(lambda sums, rows: (jax.tree.map(jnp.add, sums, micro_batch(rows)), None), zeros, tokens)
        gradients, losses = jax.tree.map(lambda x: x / stage.accumulate, total)
    updates, state = optimiser(stage, config, schedule, steps, weights_of(params)).update(gradients, state, trained)
    params = merge(optax.apply_updates(trained, updates), frozen)
    if params.moe is not None and stage.balance_speed:
        bias = distill.balance(params.moe.router_bias, losses.tokens_per_expert, stage.balance_speed)
        params = dataclasses.replace(params, moe=dataclasses.replace(params.moe, router_bias=bias))
    params, state = _in_place(params, state, config, schedule)
    largest_load = jnp.max(losses.tokens_per_expert / jnp.sum(losses.tokens_per_expert, axis=-1, keepdims=True), initial=0.0)
    return params, state, jnp.stack([losses.language, losses.indexer, largest_load, optax.tree.norm(gradients)])


@functools.partial(jax.jit, static_argnames="kind")
def _are_finite(params: Params, kind: str) -> Any:
    trained, _ = split(params, distill.trainable(params, kind))
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), trained)


def non_finite_weights(params: Params, kind: str) -> list[str]:
    """The tensors that a stage of this kind trains and that hold NaN or infinity, by their path in the tree.

    A step's metrics do not show it: its loss comes before its update.
    """
    finite = jax.device_get(_are_finite(params, kind))
    return [jax.tree_util.keystr(path) for path, whole in jax.tree_util.tree_leaves_with_path(finite) if not whole]


def flops_per_token(config: Config, schedule: Schedule, stage: Stage) -> float:
    """Floating-point operations that a step needs per token: 2 for a multiplication and its addition.

    Nothing counts that is computed twice or masked out. A matrix counts once forward, and once each backward for its
    input's and its own gradient where these are needed. Attention and divergence count over the keys attended to, the
    selection over all visible ones. Index scores and their gradient count once for each indexer, however many layers it serves:
    the divergences of these have the gradient of that from their mean target.
    """
    c, k, s = config, min(config.index_topk, stage.context), stage.context
    visible = (s + 1) / 2
    attended = visible if stage.kind != "sparse" else (k * (k + 1) / 2 + (s - k) * k) / s
    heads, experts = c.num_heads, c.num_experts_per_tok + c.n_shared_experts
    attention: float = c.hidden_size * (c.q_lora_rank + c.latent_dim) + heads * c.v_head_dim * c.hidden_size
    attention += heads * (c.q_lora_rank * c.qk_head_dim + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim))
    attention += attended * heads * (c.qk_head_dim + c.v_head_dim)
    moe = sum(c.moe_layers)
    mlps = 3 * c.hidden_size * ((c.num_layers - moe) * c.intermediate_size + moe * experts * c.moe_intermediate_size)
    model = c.num_layers * attention + mlps + moe * c.hidden_size * c.n_routed_experts + c.hidden_size * c.vocab_size
    projections = c.q_lora_rank * c.index_n_heads * c.index_head_dim + c.hidden_size * (c.index_head_dim + c.index_n_heads)
    scores = c.index_n_heads * (c.index_head_dim + 1)
    total: float = model * (1 if stage.kind == "warmup" else 3)
    if stage.kind != "dense":
        total += schedule.num_full * (2 * projections + 3 * attended * scores)
    if stage.kind == "sparse":
        total += schedule.num_full * visible * scores
    return 2.0 * total
