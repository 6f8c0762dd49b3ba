"""Trains the indexers of a frozen model, group after group: an F layer and the S layers that it serves.

The divergence of distill.py trains nothing but indexers, and an indexer reads nothing but the input of its own layer. On a
frozen model that input and the attention that an indexer is to predict are constants. So groups do not depend on each other:
a group needs the hidden states of the text before each of its layers, the attention weights of these layers, and one indexer.

The layers are read once, from the first to the last, and run as the model itself runs them, each with its own indexer. What a
group needs stays in host memory. Where that has room, every query's mean target is computed once, and a step computes index
scores and their gradient alone:

    sum_j 1/(m+1) KL(p_j || q) = cross entropy(mean_j p_j, q) - mean_j entropy(p_j)

Otherwise a step computes the targets again from hidden states and the softmax's denominators. Either way the scores and their
gradient are computed once for a group, not for each of its layers. What a step reads of the first rows stays on the device, as
many as half of its free memory holds, so that the host need not send it.

For a schedule that is searched afterwards, an indexer learns from every number of layers that it could serve at once
(docs/model.md, Distillation): that is the same loss with other weights.

A group's result depends on the seed, its F layer and the text alone, not on which groups were trained before. So groups train
side by side, on as many devices as there are, and devices exchange nothing: a thread for each takes a group's hidden states,
attention weights and indexer, while the layers after the group run on the default device.

    params = distil_indexers(params, config, schedule, tokens, target)

does it for a model in memory; `Run` and `train` for one whose layers are read one by one, group by group.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from indexcache_jax import arguments, attention, distill, indexer, model, ops, tensors, training
from indexcache_jax.config import Config
from indexcache_jax.layers import Layers, Resident, in_order
from indexcache_jax.memory import ROW_TARGET_BYTES
from indexcache_jax.model import AttentionLayer
from indexcache_jax.norm import rms_norm
from indexcache_jax.params import FP8_BASE, Indexer, Params, abstract, at_layer, check_schedule, with_schedule
from indexcache_jax.positions import whole_rows
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage
from pallas_kernels import bits

STEPS, LEARNING_RATE, LR_WARMUP_STEPS = 400, 3e-3, 20  # of a group, by default
CPU_ROWS = 64
DEVICE_SHARE = 0.5  # of a device's free memory that rows may fill

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
See = Callable[[float, str], object]


def see_nothing(work: float, what: str) -> None:
    """Progress that nobody follows."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a run keeps on the host: hidden states, and targets where a step reads them."""

    states: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What indexers are trained with and for.

    layers: the frozen model. schedule: the one to train for, whose F layers have an indexer there. tokens [N, S] int32: the
    text. stage: of kind "warmup"; a step sees `stage.sequences` of the N rows, and every group takes `stage.steps` steps.
    spans: instead of the layers that an F layer serves under `schedule`, teach its indexer every number of layers, up to this
    one, that it serves under some schedule searched from `schedule`. keeps_targets: compute every target once. allocate:
    makes the arrays of shape and dtype that are kept on the host. devices: those that groups train on side by side; by
    default one after the other on the default device.

    ValueError where an F layer has no indexer, the stage has another kind or its compute_dtype is not that of the weights, the
    tokens are not of its context, or there are spans below 1 or of a stage that teaches own layers alone.
    """

    layers: Layers
    schedule: Schedule
    tokens: np.ndarray
    stage: Stage
    seed: int = 0
    spans: int | None = None
    keeps_targets: bool = True
    allocate: Allocate = np.empty
    devices: tuple[jax.Device, ...] = ()

    def __post_init__(self) -> None:
        base = self.layers.schedule
        self.schedule.check_layers(base.num_layers)
        if lacking := [layer for layer in self.schedule.full_layers if not base.is_full[layer]]:
            raise ValueError(f"schedule pattern: layer {lacking[0]} of {self.schedule.pattern} is F, but it has no indexer")
        if self.stage.kind != "warmup":
            raise ValueError(f"stage: {self.stage.kind!r} is not 'warmup', the kind that trains indexers alone")
        if self.tokens.ndim != 2 or self.tokens.shape[1] != self.stage.context:
            raise ValueError(f"tokens: {list(self.tokens.shape)} are not rows of the stage's context, {self.stage.context}")
        if not len(self.tokens):
            raise ValueError("tokens: there are none")
        if self.spans is not None and self.spans < 1:
            raise ValueError(f"spans: {self.spans} is below 1")
        if self.spans is not None and not self.stage.cross_layer:
            raise ValueError(f"spans: {self.spans}, but the stage teaches an indexer its own layer alone")

    @property
    def config(self) -> Config:
        return self.layers.config

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The layers that every F layer's indexer learns from, ascending: itself first."""
        return [tuple(self.shares(layer)) for layer in self.schedule.full_layers]

    def shares(self, layer: int) -> dict[int, float]:
        """The layers that the indexer of F layer `layer` learns from, ascending, and what the divergence of each counts."""
        if self.spans is not None:
            found = shares_of_spans(spans_of(self.schedule, layer, self.spans))
        else:
            served = len(self.schedule.serves(layer)) if self.stage.cross_layer else 1
            found = [1 / served] * served
        return dict(enumerate(found, start=layer))

    @property
    def side_by_side(self) -> int:
        """How many groups are held on the host and trained at once."""
        return max(1, min(len(self.devices), self.schedule.num_full))

    def rows(self, layer: int) -> np.ndarray:
        """Which rows [steps, sequences] the steps of the group of F layer `layer` see: all in turn, in random orders."""
        count, wanted = len(self.tokens), self.stage.steps * self.stage.sequences
        rng = np.random.default_rng((self.seed, layer))
        orders = [rng.permutation(count) for _ in range(-(-wanted // count))]
        return np.concatenate([np.zeros(0, np.int64), *orders])[:wanted].reshape(self.stage.steps, self.stage.sequences)


def spans_of(schedule: Schedule, layer: int, most: int) -> list[int]:
    """The numbers of layers, ascending, that F layer `layer` serves under schedules which turn F layers of `schedule` to S.

    Those up to `most`, but always the smallest.
    """
    ends = [*(end for end in schedule.full_layers if end > layer), schedule.num_layers]
    smallest, *others = (end - layer for end in ends)
    return [smallest, *(span for span in others if span <= most)]


def shares_of_spans(spans: Sequence[int]) -> list[float]:
    """What the divergence at every distance counts in the mean of the multi-layer losses of spans; they add up to 1."""
    return [sum(1 / span for span in spans if span > distance) / len(spans) for distance in range(max(spans))]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A group's indexer in host memory, float32, as that of a single layer; its divergence L at every step, in nats.

    seconds: what its targets and its steps took.
    """

    layer: int
    indexer: Indexer
    divergence: np.ndarray
    seconds: float


Job = Callable[[jax.Device | None], Trained]  # trains a group on a device
Factors = tuple[jax.Array, jax.Array, jax.Array]  # of index scores: index queries, index keys, head weights


@dataclasses.dataclass(frozen=True)
class States:
    """Hidden states x [N, S, D] before a layer on the host, and the indices [N, S, k] that it reuses if the model has it S."""

    x: np.ndarray
    indices: np.ndarray | None


@dataclasses.dataclass
class Gathered:
    """What a group is trained from: its indexer, and by layer its attention weights and the hidden states before it."""

    indexer: Indexer
    layers: list[AttentionLayer] = dataclasses.field(default_factory=list)
    x: list[np.ndarray] = dataclasses.field(default_factory=list)


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


# ---- programs


@functools.partial(jax.jit, static_argnames="full")
def _after(params: Params, x: jax.Array, indices: jax.Array | None, config: Config, full: bool) -> tuple[jax.Array, jax.Array]:
    return model.single_layer(params, x, indices, config, full)


def _inputs(p: AttentionLayer, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Normalised input [B, S, D] and query latents [B, S, R] of a layer with hidden states x before it."""
    h = rms_norm(x, p.norm, config.rms_norm_eps)
    return h, attention.query_latents(p.attention, h, config)


def _queries_and_keys(p: AttentionLayer, x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys [B, S, H, dn + dr] and values [B, S, H, dv] of a layer with hidden states x before it."""
    cos_sin = whole_rows(x, config).cos_sin
    h, q_latent = _inputs(p, x, config)
    queries = jnp.concatenate(attention.queries(p.attention, q_latent, cos_sin, config), axis=-1)
    return queries, *attention.expand(p.attention, attention.latents(p.attention, h, cos_sin, config), config)


@jax.jit
def _add_target(
    target: jax.Array, entropy: jax.Array, p: AttentionLayer, x: jax.Array, share: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
    """target [B, S, T] and entropy [B], float32, with a layer's: its heads' mean probabilities over all visible keys."""
    p = model.decoded_layer(p, config, x.dtype)
    queries, keys, values = _queries_and_keys(p, x, config)
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

    found, entropies = distill.map_causal(block, (queries, _visible(x)), keys.shape[1], config.num_heads, _most_rows())
    return target + share * found, entropy + share * jnp.mean(entropies, axis=1)


def _most_rows() -> int | None:
    """Queries of a block: on a CPU so few that their scores stay in its cache, which makes a step four times faster."""
    return CPU_ROWS if ops.platform() == "cpu" else None


def _visible(x: jax.Array) -> jax.Array:
    """How many keys each query of whole rows [B, S, ...] sees: [B, S]."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1) + 1


@jax.jit
def _denominators(p: AttentionLayer, x: jax.Array, config: Config) -> jax.Array:
    """The logarithms of the softmax's denominators [B, H, S] float32 of a layer, over all visible keys."""
    queries, keys, _ = _queries_and_keys(model.decoded_layer(p, config, x.dtype), x, config)
    words = bits.causal(x.shape[0], x.shape[1], x.shape[1])
    return ops.attention_denominators(queries, keys, words, scale=config.attention_scale)


def divergence(p: Indexer, layer: AttentionLayer, x: jax.Array, targets: Kept | Recomputed, config: Config) -> jax.Array:
    """L of an indexer of `layer` with hidden states x [B, S, D] before it: the mean over rows and queries, in nats.

    Arithmetic is in the dtype of x.
    """
    tree = abstract(config, Schedule.all_full(config.num_layers)).indexer
    p = jax.tree.map(lambda a, t: a.astype(t.dtype or x.dtype), p, tree)
    layer = model.decoded_layer(layer, config, x.dtype)
    h, q_latent = _inputs(layer, x, config)
    cos_sin = whole_rows(x, config).cos_sin
    factors = (
        indexer.index_queries(p, q_latent, cos_sin, config),
        indexer.index_keys(p, h, cos_sin, config),
        indexer.head_weights(p, h, config),
    )
    if isinstance(targets, Recomputed):
        return _from_recomputed(factors, targets, config)
    if ops.distils_by_kernels(x.shape[0], x.shape[1], x.dtype, config):
        return _missed(factors, targets.target) - jnp.mean(targets.entropy)
    return _from_kept(*factors, targets)


def _missed(factors: Factors, target: jax.Array) -> jax.Array:
    """What the scores of index queries, keys and head weights miss of a target [B, S, S]: the mean over queries."""
    b, s = target.shape[:2]
    queries, keys, head_weights = factors
    return ops.index_cross_entropy(queries, keys, head_weights, target, bits.causal(b, s, s)) / (b * s)


def _from_kept(queries: jax.Array, keys: jax.Array, head_weights: jax.Array, targets: Kept) -> jax.Array:
    def block(t: int, queries: jax.Array, head_weights: jax.Array, target: jax.Array, visible: jax.Array) -> jax.Array:
        mask = jnp.arange(t) < visible[..., None]
        scores = distill.index_scores(queries, keys[:, :t], head_weights)
        return distill.cross_entropy(target[..., :t].astype(jnp.float32), scores, mask)

    per_query = queries, head_weights, targets.target, _visible(keys)
    found = distill.map_causal(block, per_query, keys.shape[1], queries.shape[2] + 1, _most_rows())
    return jnp.mean(found) - jnp.mean(targets.entropy)


def _from_recomputed(factors: Factors, targets: Recomputed, config: Config) -> jax.Array:
    b, s = targets.x[0].shape[:2]
    words, scale, zero = bits.causal(b, s, s), config.attention_scale, jnp.zeros((), jnp.float32)
    together = 4 * b * s * s <= ROW_TARGET_BYTES
    target = jnp.zeros((b, s, s), jnp.float32) if together else None
    each = entropy = zero
    for layer, x, lse, share in zip(targets.layers, targets.x, targets.lse, targets.share, strict=True):
        queries, keys, _ = _queries_and_keys(model.decoded_layer(layer, config, x.dtype), x, config)
        arrays = *jax.lax.stop_gradient((queries, keys, lse)), words
        if target is None:
            each = each + share * ops.index_divergence(*factors, *arrays, scale=scale) / (b * s)
            continue
        target, entropies = ops.attention_target(target, *arrays, share=share, scale=scale)
        entropy = entropy + share * jnp.mean(entropies)
    return each if target is None else _missed(factors, target) - entropy


@functools.partial(jax.jit, static_argnames="stage", donate_argnames=("p", "state"))
def _step(
    p: Indexer,
    state: Any,
    layer: AttentionLayer,
    x: jax.Array,
    targets: Kept | Recomputed,
    config: Config,
    stage: Stage,
    steps: jax.Array,
) -> tuple[Indexer, Any, jax.Array]:
    """One update on rows x [B, S, D]: the indexer, the optimiser's state, and L before the update. One row at a time."""

    def of_row(row: jax.Array) -> tuple[jax.Array, Indexer]:
        of_rows = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1), (x, _by_row(targets)))
        return jax.value_and_grad(divergence)(p, layer, of_rows[0], _with_rows(targets, of_rows[1]), config)

    shapes = jax.eval_shape(of_row, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    count = x.shape[0]
    if count == 1:
        value, gradient = of_row(jnp.int32(0))
    else:
        total, _ = jax.lax.scan(lambda sums, row: (jax.tree.map(jnp.add, sums, of_row(row)), None), zeros, jnp.arange(count))
        value, gradient = jax.tree.map(lambda a: a / count, total)
    updates, state = optimiser(stage, config, steps).update(gradient, state, p)
    return optax.apply_updates(p, updates), state, value


def _by_row(targets: Kept | Recomputed) -> Any:
    """What of the targets has an entry for every row."""
    return (targets.target, targets.entropy) if isinstance(targets, Kept) else (targets.x, targets.lse)


def _with_rows(targets: Kept | Recomputed, by_row: Any) -> Kept | Recomputed:
    """The targets with other rows."""
    if isinstance(targets, Kept):
        return Kept(*by_row)
    x, lse = by_row
    return dataclasses.replace(targets, x=x, lse=lse)


def optimiser(stage: Stage, config: Config, steps: jax.Array | int | None = None) -> optax.GradientTransformation:
    """AdamW over the indexer of a single layer, which is all that trains. steps: the stage's length where it is traced."""
    tree = abstract(config, Schedule.all_full(config.num_layers)).indexer
    decayed = jax.tree.map(lambda tensor: tensor.init == "normal", tree)
    return training.adamw(stage, stage.indexer_learning_rate, stage.steps if steps is None else steps, decayed)


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
        return _add_target(*sums, *layer_of(j), config)

    target, entropy = jax.lax.fori_loop(0, count, add, (jnp.zeros((b, s, s), jnp.float32), jnp.zeros(b, jnp.float32)))
    return Kept(target.astype(like.dtype), entropy)


# ---- a run


def distil_indexers(
    params: Params,
    config: Config,
    schedule: Schedule,
    tokens: Any,
    target: Schedule,
    *,
    spans: int | None = None,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 1,
    seed: int = 0,
    keeps_targets: bool = True,
    see: See = see_nothing,
) -> Params:
    """The params for `target`, with its indexers trained on tokens [N, S]; nothing else of them changes.

    schedule: the params' own. A step sees batch_size of the N sequences; every indexer takes `steps` of them, with a learning
    rate that peaks at `learning_rate`, in the arithmetic of the params' dtype. spans and keeps_targets, which takes N S S
    numbers of host memory, are as of `Run`; see as of `train`.

    ValueError where an argument does not fit the model, indexers are in 8 bits, or training gives what is not finite.
    """
    check_schedule(params, schedule)
    rows = np.asarray(arguments.tokens("tokens", tokens, config.vocab_size), np.int32)
    layers = Resident(config, schedule, params)
    if layers.weights not in (None, FP8_BASE):
        raise ValueError(f"params: in the form {layers.weights!r}, but indexers in 8 bits do not train; load {FP8_BASE!r}")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        arguments.integer(name, value, 1)
    dtype = str(params.embedding.dtype)
    stage = indexer_stage(rows.shape[1], dtype, steps=steps, rows=batch_size, learning_rate=learning_rate)
    run = Run(layers, target, rows, stage, seed, spans, keeps_targets)
    return with_indexers(params, schedule, target, {group.layer: group.indexer for group in train(run, see=see)})


def indexer_stage(
    context: int,
    compute_dtype: str,
    *,
    steps: int = STEPS,
    rows: int = 1,
    learning_rate: float = LEARNING_RATE,
    cross_layer: bool = True,
) -> Stage:
    """The stage of a `Run`: what every group's indexer takes."""
    return Stage(
        *("indexers", "warmup", steps, rows, context, 0.0, learning_rate),
        lr_warmup_steps=LR_WARMUP_STEPS,
        cross_layer=cross_layer,
        compute_dtype=compute_dtype,
    )


def stacked(indexers: Mapping[int, Indexer], schedule: Schedule) -> Indexer:
    """The indexers of a schedule's F layers, given by layer, as params hold them."""
    return jax.tree.map(lambda *stack: np.stack(stack), *(indexers[layer] for layer in schedule.full_layers))


def with_indexers(params: Params, schedule: Schedule, target: Schedule, indexers: Mapping[int, Indexer]) -> Params:
    """Params of `schedule` as `target` wants them, with other indexers, which take the dtypes of those that they replace."""
    kept = with_schedule(params, schedule, target)
    new = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), stacked(indexers, target), kept.indexer)
    return dataclasses.replace(kept, indexer=new)


def train(run: Run, finished: Collection[int] = (), see: See = see_nothing) -> Iterator[Trained]:
    """The indexers of a run, group after group, but for those of the F layers in `finished`, which are only passed through.

    Groups on several devices come in the order in which they end. see: called with the floating-point operations done since its
    last call, of `work` altogether, and what is being done; by one thread at a time. ValueError where a divergence or a trained
    weight is not finite.
    """
    if not run.devices:
        yield from (train_on(None) for train_on in _jobs(run, finished, see))
        return
    lock, ended = threading.Lock(), threading.Event()

    def see_in_turn(work: float, what: str) -> None:
        with lock:
            if ended.is_set():
                raise InterruptedError("the run has ended")  # in a thread whose result nobody waits for
            see(work, what)

    free = list(run.devices)

    def train_on_a_free_device(job: Job) -> Trained:
        device = free.pop()  # the first one, on which layers run too, is taken last
        try:
            return job(device)
        finally:
            free.append(device)

    running: set[futures.Future[Trained]] = set()
    with futures.ThreadPoolExecutor(run.side_by_side) as pool:
        try:
            for job in _jobs(run, finished, see_in_turn):
                running.add(pool.submit(train_on_a_free_device, job))
                if len(running) == run.side_by_side:
                    ended_now, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                    yield from (future.result() for future in ended_now)
            yield from (future.result() for future in futures.as_completed(running))
        finally:
            ended.set()  # so that an error or an interrupt waits for a step of the others, not for all of them


def _jobs(run: Run, finished: Collection[int], see: See) -> Iterator[Job]:
    """What trains each unfinished group, made once the layers of the group have run."""
    if not (groups := _unfinished(run, finished)):
        return
    states, reading, last = _embedded(run), in_order(run.layers), _last_layer(groups)
    gathered: dict[int, Gathered] = {}
    for layer in range(last + 1):
        _, params = next(reading)
        taught_by_it = [group for group in groups if layer in group]
        if taught_by_it:
            attention_layer = AttentionLayer(params.input_norm[0], at_layer(params.attention, 0), None)
        for first, *_ in taught_by_it:
            if layer == first:
                gathered[first] = Gathered(at_layer(params.indexer, 0))
            gathered[first].layers.append(attention_layer)
            gathered[first].x.append(states.x)
        if layer != last:
            states = _advanced(run, params, layer, states, in_place=not taught_by_it)
            see(layer_work(run) * len(run.tokens), f"layer {layer}")
        del params
        for group in taught_by_it:
            if layer == group[-1]:
                yield functools.partial(_train_group, run, group, gathered.pop(group[0]), see=see)


def _unfinished(run: Run, finished: Collection[int]) -> list[tuple[int, ...]]:
    return [group for group in run.groups if group[0] not in finished]


def _last_layer(groups: list[tuple[int, ...]]) -> int:
    return max(group[-1] for group in groups)


def _embedded(run: Run) -> States:
    """The hidden states before layer 0."""
    table = run.layers.ends().embedding
    x = run.allocate((*run.tokens.shape, run.config.hidden_size), table.dtype)
    for row, tokens in enumerate(run.tokens):
        x[row] = table[tokens]
    return States(x, None)


def _advanced(run: Run, params: Params, layer: int, before: States, in_place: bool) -> States:
    """The hidden states after a layer, run as the model itself runs it; in the arrays of those before it if `in_place`."""
    base, config = run.layers.schedule, run.config
    config = dataclasses.replace(config, num_layers=1, moe_layers=config.moe_layers[layer : layer + 1])
    x = before.x if in_place else run.allocate(before.x.shape, before.x.dtype)
    reused, indices = layer + 1 < base.num_layers and not base.is_full[layer + 1], None
    if reused:
        indices = run.allocate((*x.shape[:2], min(config.index_topk, x.shape[1])), np.int32)

    def keep(row: int, after: tuple[jax.Array, jax.Array]) -> None:
        x[row] = np.asarray(after[0][0])
        if indices is not None:
            indices[row] = np.asarray(after[1][0])

    running: tuple[int, tuple[jax.Array, jax.Array]] | None = None  # taken to the host while the device computes the next
    for row in range(len(x)):
        given = None if before.indices is None or base.is_full[layer] else before.indices[row : row + 1]
        after = _after(params, before.x[row : row + 1], given, config, base.is_full[layer])
        if running is not None:
            keep(*running)
        running = row, after
    assert running is not None  # a run has rows
    keep(*running)
    return States(x, indices)


def _train_group(run: Run, group: tuple[int, ...], gathered: Gathered, device: jax.Device | None, see: See) -> Trained:
    """The indexer of a group, trained on a device. `gathered` loses its hidden states as soon as nothing needs them."""
    began = time.perf_counter()
    with jax.default_device(device):
        p, divergence = _steps(run, group, gathered, device, see)
    return _checked(Trained(group[0], p, divergence, time.perf_counter() - began))


def _steps(
    run: Run, group: tuple[int, ...], gathered: Gathered, device: jax.Device | None, see: See
) -> tuple[Indexer, np.ndarray]:
    """The indexer and its divergence at every step."""
    gathered.layers[:] = jax.device_put(gathered.layers, device)
    share = [jnp.float32(share) for share in run.shares(group[0]).values()]
    kept = rows_on_device(device, run, len(group))
    make = _kept_targets if run.keeps_targets else _recomputed_targets
    first, inputs = gathered.layers[0], _states(gathered.x[0], kept)
    others = (_states(x, 0 if run.keeps_targets else kept) for x in gathered.x[1:])
    states = [inputs, *others]
    gathered.x.clear()
    targets_of = make(run, gathered.layers[:], states, share, kept, lambda work: see(work, f"layer {group[0]}: targets"))
    gathered.layers.clear()
    states.clear()  # targets that are kept need no hidden states but the first layer's
    p = jax.tree.map(lambda a: jnp.array(a, jnp.float32), jax.device_put(gathered.indexer, device))
    state = optimiser(run.stage, run.config).init(p)
    steps, cost = jnp.int32(run.stage.steps), step_work(run, len(group))
    values: list[jax.Array] = []
    shown = ""
    for number, rows in enumerate(run.rows(group[0])):
        p, state, value = _step(p, state, first, inputs.of(rows), targets_of(rows), run.config, run.stage.program, steps)
        values.append(value)
        if number >= 2:
            shown = f", divergence {float(values[number - 2]):.4f}"  # of an earlier step, so that devices are not waited for
        see(cost, f"layer {group[0]}: step {number + 1}/{run.stage.steps}{shown}")
    return jax.device_get(p), np.array(values, np.float32)


def _states(x: np.ndarray, on_device: int) -> Rows:
    """Hidden states [N, S, D], the first `on_device` rows of them on the device."""
    return Rows([jnp.asarray(x[row : row + 1]) for row in range(on_device)], x[on_device:])


def rows_on_device(device: jax.Device | None, run: Run, layers: int) -> int:
    """Of how many rows a device keeps what the steps of a group of `layers` layers read.

    On a CPU there are none, since the host's memory is at hand.
    """
    stats = (device or jax.local_devices()[0]).memory_stats() if ops.platform() != "cpu" else None
    if stats is None or "bytes_limit" not in stats:
        return 0
    c, length, size = run.config, run.tokens.shape[1], jnp.dtype(run.stage.compute_dtype).itemsize
    of_row = size * length * c.hidden_size
    of_row = of_row + size * length * length if run.keeps_targets else layers * (of_row + 4 * length * c.num_heads)
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return max(0, min(len(run.tokens), int(DEVICE_SHARE * free / of_row)))


def _checked(trained: Trained) -> Trained:
    finite = np.isfinite(trained.divergence)
    if not finite.all():
        raise ValueError(f"indexer of layer {trained.layer}: its divergence at step {np.argmin(finite)} is not finite")
    for name, array in tensors.leaves(trained.indexer):
        if not np.isfinite(array).all():
            raise ValueError(f"indexer of layer {trained.layer}: {name} is not finite after training")
    return trained


@dataclasses.dataclass(frozen=True)
class Rows:
    """An entry for each of the N rows of a run: of the first ones on the device, [1, ...] each, of the others on the host."""

    on_device: list[jax.Array]
    on_host: np.ndarray

    def of(self, rows: Sequence[int] | np.ndarray) -> jax.Array:
        """The entries of rows by their numbers, [B, ...] on the device."""
        there = len(self.on_device)
        if not there and len(rows) > 1:
            return jnp.asarray(self.on_host[rows])
        found = [self.on_device[row] if row < there else self.on_host[row - there : row - there + 1] for row in rows]
        return jnp.asarray(found[0]) if len(found) == 1 else jnp.concatenate(found)

    def put(self, row: int, entry: jax.Array, on_device: int) -> None:
        """Keeps the entry [1, ...] of the next row: of the first `on_device` rows on the device."""
        if row < on_device:
            self.on_device.append(entry)
        else:
            self.on_host[row - on_device] = np.asarray(entry[0])


TargetsOf = Callable[[np.ndarray], Kept | Recomputed]  # of rows by their numbers [B]


def _kept_targets(
    run: Run,
    layers: list[AttentionLayer],
    states: list[Rows],
    share: list[jax.Array],
    on_device: int,
    see: Callable[[float], object],
) -> TargetsOf:
    (count, length), dtype = run.tokens.shape, states[0].on_host.dtype
    kept, entropies = Rows([], run.allocate((count - on_device, length, length), dtype)), np.empty(count, np.float32)
    for row in range(count):
        target, entropy = jnp.zeros((1, length, length), jnp.float32), jnp.zeros(1, jnp.float32)
        for layer, x, weight in zip(layers, states, share, strict=True):
            target, entropy = _add_target(target, entropy, layer, x.of([row]), weight, run.config)
        kept.put(row, target.astype(dtype), on_device)
        entropies[row] = np.asarray(entropy[0])
        see(target_work(run) * len(layers))
    return lambda rows: Kept(kept.of(rows), jnp.asarray(entropies[rows]))


def _recomputed_targets(
    run: Run,
    layers: list[AttentionLayer],
    states: list[Rows],
    share: list[jax.Array],
    on_device: int,
    see: Callable[[float], object],
) -> TargetsOf:
    count, length = run.tokens.shape
    lse = [Rows([], np.empty((count - on_device, run.config.num_heads, length), np.float32)) for _ in layers]
    states = states[:]
    for row in range(count):
        for layer, x, kept in zip(layers, states, lse, strict=True):
            kept.put(row, _denominators(layer, x.of([row]), run.config), on_device)
        see(target_work(run) * len(layers))
    return lambda rows: Recomputed(
        tuple(layers), tuple(x.of(rows) for x in states), tuple(kept.of(rows) for kept in lse), tuple(share)
    )


# ---- what a run costs


def need(run: Run) -> Need:
    """What a run keeps on the host at most, of all groups that are trained side by side."""
    count, length = run.tokens.shape
    size = jnp.dtype(run.stage.compute_dtype).itemsize
    longest = max(map(len, run.groups)) + 1
    indices = 0 if all(run.layers.schedule.is_full) else 4 * min(run.config.index_topk, length)
    states = count * length * (longest * run.config.hidden_size * size + 2 * indices)
    return Need(run.side_by_side * states, run.side_by_side * count * length * length * size)


def sizes(run: Run) -> tuple[int, int]:
    """How many weights the model has under the schedule, and how many of them train."""
    tree = abstract(run.config, run.schedule)
    return tensors.count(tree), tensors.count(tree.indexer)


def can_keep_targets(run: Run) -> bool:
    """Whether a device can make the targets of a whole row at once, as it does to keep them."""
    return 4 * run.tokens.shape[1] ** 2 <= ROW_TARGET_BYTES


def layer_work(run: Run) -> float:
    """Floating-point operations of a layer for one sequence, experts and selected attention included."""
    c, s = run.config, run.tokens.shape[1]
    one = dataclasses.replace(c, vocab_size=1)  # without the logits
    per_token = training.flops_per_token(one, run.schedule, dataclasses.replace(run.stage, kind="sparse", context=s))
    return per_token * s / (3 * c.num_layers)


def target_work(run: Run) -> float:
    """Floating-point operations of one layer's target for one sequence."""
    c, s = run.config, run.tokens.shape[1]
    projections = s * (c.hidden_size * (c.q_lora_rank + c.latent_dim) + c.num_heads * c.q_lora_rank * c.qk_head_dim)
    projections += s * c.num_heads * c.kv_lora_rank * c.qk_nope_head_dim
    return 2.0 * (projections + s * (s + 1) / 2 * c.num_heads * c.qk_head_dim)


def step_work(run: Run, layers: int) -> float:
    """Floating-point operations of a step for a group of so many layers."""
    c, s = run.config, run.tokens.shape[1]
    projections = s * (c.hidden_size * c.q_lora_rank + 2 * c.q_lora_rank * c.index_n_heads * c.index_head_dim)
    projections += 2 * s * c.hidden_size * (c.index_head_dim + c.index_n_heads)
    scores = 3 * s * (s + 1) / 2 * c.index_n_heads * (c.index_head_dim + 1)
    again = 0.0 if run.keeps_targets else layers * target_work(run)
    return run.stage.sequences * (2.0 * (projections + scores) + again)


def work(run: Run, finished: Collection[int] = ()) -> float:
    """Floating-point operations of the rest of a run, as `train` reports them."""
    if not (groups := _unfinished(run, finished)):
        return 0.0
    of_groups = sum(run.stage.steps * step_work(run, len(group)) for group in groups)
    return len(run.tokens) * (_last_layer(groups) * layer_work(run) + sum(map(len, groups)) * target_work(run)) + of_groups
