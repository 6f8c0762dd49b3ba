"""What training runs share: stages, the optimiser step, checkpoints that survive a kill, and metrics.

A run is a list of stages. Which weights a stage trains is a matter of their place in the tree (`distill.trainable`);
gradients, optimiser state and its checkpoints exist for those alone. Weights are float32, arithmetic is in the stage's
compute dtype. Data, losses and updates are functions of (seed, step), so on one device a run that was killed and resumed
goes through the same numbers, bit for bit, as one that was not.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX

from experiments.common.data import Rows, prefetch
from experiments.common.report import Output
from indexcache_jax import distill
from indexcache_jax.config import Config
from indexcache_jax.params import Params, abstract, shape_structs
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import fingerprint

LOG = "train.jsonl"
CHECKPOINTS = "training"
METRICS = ("language", "indexer", "largest_load", "gradient_norm")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One phase: what trains ("dense", "warmup" or "sparse"), on what, how fast.

    A step sees accumulate x rows sequences of `context` tokens. A rate rises linearly to its peak over `ramp` steps and
    falls along a cosine to `final` of it.
    """

    name: str
    kind: str
    steps: int
    rows: int
    context: int
    model_rate: float
    indexer_rate: float
    final: float = 0.1
    ramp: int = 100
    accumulate: int = 1
    clip: float = 1.0  # of the gradient's norm, of the model and of the indexers apart
    weight_decay: float = 0.1  # of matrices, the embedding left out
    balance_speed: float = 0.0  # of the router's bias
    cross_layer: bool = True
    compute_dtype: str = "bfloat16"

    @property
    def sequences(self) -> int:
        return self.accumulate * self.rows

    @property
    def program(self) -> Stage:
        """What a compiled step depends on: stages of different length share it."""
        return dataclasses.replace(self, name="", steps=0)


@dataclasses.dataclass(frozen=True)
class Saving:
    """Checkpoints every so many steps and at every stage's end, the last `keep` of them; metrics every `log_every`.

    every None: no checkpoints, so that a killed run starts again.
    """

    every: int | None = 500
    keep: int = 2
    log_every: int = 50


@dataclasses.dataclass(frozen=True)
class Trained:
    """Times are of all processes that a run took, without what their kills undid.

    seconds: up to the last step. tokens_per_second: a stage's median between two looks at the metrics, without a
    process's first, in which it compiles.
    """

    params: Params
    seconds: float
    tokens_per_second: dict[str, float]


def split(tree: Any, labels: Any) -> tuple[Any, Any]:
    """The tree's trained and frozen leaves, each with None in place of the others."""
    trained = jax.tree.map(lambda label, leaf: None if label == "frozen" else leaf, labels, tree)
    return trained, jax.tree.map(lambda label, leaf: leaf if label == "frozen" else None, labels, tree)


def merge(trained: Any, frozen: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def rate(stage: Stage, peak: float, steps: jax.Array | int) -> optax.Schedule:
    """The learning rate by the number of updates made, for a stage of `steps`, which may be traced."""
    steps = jnp.asarray(steps, jnp.float32)
    ramp = jnp.maximum(1.0, jnp.minimum(stage.ramp, jnp.floor(steps / 5)))

    def at(count: jax.Array) -> jax.Array:
        fallen = jnp.clip((count - ramp) / jnp.maximum(steps - ramp, 1.0), 0.0, 1.0)
        cosine = stage.final + (1 - stage.final) * 0.5 * (1 + jnp.cos(jnp.pi * fallen))
        return peak * jnp.where(count < ramp, count / ramp, cosine)

    return at


def optimiser(
    stage: Stage, config: Config, schedule: Schedule, steps: jax.Array | int | None = None
) -> optax.GradientTransformation:
    """AdamW with a rate and a clipping norm for the model and for the indexers, over the stage's trained leaves.

    steps: the stage's length where it is not stage.steps.
    """
    length = stage.steps if steps is None else steps
    tree = abstract(config, schedule)
    labels = distill.trainable(tree, stage.kind)
    decayed = split(jax.tree.map(lambda t: t.init == "normal", tree), labels)[0]

    def adamw(peak: float) -> optax.GradientTransformation:
        rule = optax.adamw(rate(stage, peak, length), b1=0.9, b2=0.95, weight_decay=stage.weight_decay, mask=decayed)
        return optax.chain(optax.clip_by_global_norm(stage.clip), rule)

    rules = {"model": adamw(stage.model_rate), "indexer": adamw(stage.indexer_rate)}
    return optax.multi_transform(rules, split(labels, labels)[0])


def start(params: Params, stage: Stage, config: Config, schedule: Schedule) -> Any:
    """The optimiser's state before a stage."""
    labels = distill.trainable(params, stage.kind)
    return optimiser(stage, config, schedule).init(split(params, labels)[0])


@functools.partial(jax.jit, static_argnames="stage", donate_argnames=("params", "state"))
def step(
    params: Params,
    state: Any,
    tokens: jax.Array,
    config: Config,
    schedule: Schedule,
    stage: Stage,
    steps: jax.Array | int | None = None,
    roles: distill.TracedSchedule | None = None,
) -> tuple[Params, Any, jax.Array]:
    """One update on tokens [accumulate, rows, S+1]: params, optimiser state and METRICS [4], means over the micro-batches.

    steps, roles: the stage's length and the schedule trained for, as data, so that one program serves all.
    """
    labels = distill.trainable(params, stage.kind)
    trained, frozen = split(params, labels)

    def objective(trained: Any, tokens: jax.Array) -> tuple[jax.Array, distill.Losses]:
        found = distill.losses(
            merge(trained, frozen),
            tokens,
            config,
            schedule,
            indexers=stage.kind != "dense",
            sparse=stage.kind == "sparse",
            cross_layer=stage.cross_layer,
            compute_dtype=jnp.dtype(stage.compute_dtype),
            traced=roles,
        )
        total = {"dense": found.language, "warmup": found.indexer, "sparse": found.language + found.indexer}[stage.kind]
        return total, found

    def micro(tokens: jax.Array) -> tuple[Any, distill.Losses]:
        return jax.grad(objective, has_aux=True)(trained, tokens)

    if stage.accumulate == 1:
        grads, found = micro(tokens[0])
    else:
        shapes = jax.eval_shape(micro, tokens[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(lambda sums, rows: (jax.tree.map(jnp.add, sums, micro(rows)), None), zeros, tokens)
        grads, found = jax.tree.map(lambda x: x / stage.accumulate, total)
    updates, state = optimiser(stage, config, schedule, steps).update(grads, state, trained)
    params = merge(optax.apply_updates(trained, updates), frozen)
    if params.moe is not None and stage.balance_speed:
        bias = distill.balance(params.moe.router_bias, found.tokens_per_expert, stage.balance_speed)
        params = dataclasses.replace(params, moe=dataclasses.replace(params.moe, router_bias=bias))
    share = jnp.max(found.tokens_per_expert / jnp.sum(found.tokens_per_expert, axis=-1, keepdims=True), initial=0.0)
    return params, state, jnp.stack([found.language, found.indexer, share, optax.tree.norm(grads)])


@functools.partial(jax.jit, static_argnames="kind")
def _finite(params: Params, kind: str) -> Any:
    """Of each tensor that a stage of this kind trains, whether it is finite."""
    trained, _ = split(params, distill.trainable(params, kind))
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), trained)


class Metrics:
    """train.jsonl and TensorBoard events of a run that goes on at `step`: later entries of an earlier process are dropped."""

    def __init__(self, directory: pathlib.Path, step: int) -> None:
        path = directory / LOG
        path.touch()
        kept = path.read_bytes().splitlines(keepends=True)[:step]  # a line a step
        self._file = path.open("r+b")
        self._file.truncate(sum(len(line) for line in kept))
        self._file.seek(0, 2)
        self._events = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=step)

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        self._file.write((json.dumps({"step": step, "stage": stage, **values}) + "\n").encode())
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


class _Run:
    """Where a run is: a step counted over all stages, and what belongs to it in a checkpoint.

    seconds, rates: of this process and the earlier ones, the rates in tokens/s and by stage.
    """

    def __init__(self, stages: Sequence[Stage], tokens: np.ndarray, seed: int) -> None:
        self.stages, self.tokens, self.seed = stages, tokens, seed
        self.starts = [sum(s.steps for s in stages[:i]) for i in range(len(stages))]
        self.total = sum(s.steps for s in stages)
        self.seconds = 0.0
        self.rates: dict[str, list[float]] = {}
        self._compiled: set[str] = set()
        self._counted = time.perf_counter()

    def stage(self, step: int) -> int:
        """The stage that takes the given step; after the last step, the last stage."""
        return max(i for i, start in enumerate(self.starts) if start <= min(step, self.total - 1))

    def rows(self, stage: int) -> Rows:
        return Rows(self.tokens, self.stages[stage].context, (self.seed, stage))

    def batch(self, rows: Rows, step: int) -> np.ndarray:
        i = self.stage(step)
        stage = self.stages[i]
        found = rows.batch((step - self.starts[i]) * stage.sequences, stage.sequences)
        return found.reshape(stage.accumulate, stage.rows, -1)

    def add_rate(self, rate: float, stage: str) -> None:
        """A rate between two looks at a stage; this process's first, in which it compiles, is dropped."""
        if stage in self._compiled:
            self.rates.setdefault(stage, []).append(rate)
        self._compiled.add(stage)

    def add_seconds(self) -> None:
        """Those since the last call, or since this process began."""
        now = time.perf_counter()
        self.seconds += now - self._counted
        self._counted = now

    def spent(self) -> dict[str, Any]:
        """The times for a checkpoint; a copy, as it is written while steps go on."""
        return {"seconds": self.seconds, "rates": {name: [*rates] for name, rates in self.rates.items()}}

    def trained(self, params: Params) -> Trained:
        return Trained(params, self.seconds, {name: statistics.median(rates) for name, rates in self.rates.items()})

    def about(self, params: Params, config: Config, schedule: Schedule) -> dict[str, Any]:
        """What must not change under a run that is resumed; `params` are those it started from."""
        return {
            "seed": self.seed,
            "schedule": schedule.pattern,
            "tokens": [int(self.tokens.size), zlib.crc32(np.ascontiguousarray(self.tokens).data)],
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "model": json.loads(json.dumps(config.to_hf())),
            "weights": fingerprint(params, [])["weights"],
        }


def train(
    params: Params,
    tokens: np.ndarray,
    stages: Sequence[Stage],
    config: Config,
    schedule: Schedule,
    output: Output,
    *,
    seed: int,
    resume: bool,
    saving: Saving,
    roles: distill.TracedSchedule | None = None,
) -> Trained:
    """Float32 params after all stages on a stream of tokens. Checkpoints and metrics go into the output's folder.

    `params` of any dtype stay as they are: training starts from a copy. roles: the schedule to train for, where it is not
    the `schedule` of the params.

    resume: go on from the newest whole checkpoint there, if any. ValueError, with the step, where a loss, a gradient or a
    weight to be saved or returned is not finite (the checkpoints before it stay); for a folder that holds another run, or
    one and not `resume`.
    """
    run = _Run([stage for stage in stages if stage.steps], tokens, seed)
    params = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), params)
    if not run.total:
        return run.trained(params)
    if saving.every is None:
        return _without_checkpoints(run, params, config, schedule, output, saving, roles)
    check_free(output.directory, resume)
    about = run.about(params, config, schedule) | ({} if roles is None else {"roles": jax.tree.map(np.ndarray.tolist, roles)})
    folder = (output.directory / CHECKPOINTS).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=saving.keep, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        done = 0
        stage = run.stage(done)
        if (latest := manager.latest_step()) is not None:
            saved = manager.restore(latest, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            check_same(saved, about, folder)
            run.seconds, run.rates = saved["spent"]["seconds"], saved["spent"]["rates"]
            done = latest
            stage = run.stage(done)
        state = start(params, run.stages[stage], config, schedule)
        if done:
            like = {"params": params, "optimiser": state}
            restored = manager.restore(done, args=ocp.args.Composite(weights=ocp.args.StandardRestore(like)))["weights"]
            params, state = restored["params"], restored["optimiser"]
        metrics = Metrics(output.directory, done)
        try:
            while done < run.total:
                stage = run.stage(done)
                stop = min(run.starts[stage] + run.stages[stage].steps, done + saving.every - done % saving.every)
                params, state = _some_steps(
                    run, params, state, range(done, stop), config, schedule, metrics, saving, folder, roles
                )
                done = stop
                if run.stage(done) != stage:
                    state = start(params, run.stages[run.stage(done)], config, schedule)
                _save(manager, done, params, state, about | {"spent": run.spent()})
        finally:
            metrics.close()
    return run.trained(params)


def _without_checkpoints(
    run: _Run,
    params: Params,
    config: Config,
    schedule: Schedule,
    output: Output,
    saving: Saving,
    roles: distill.TracedSchedule | None,
) -> Trained:
    metrics = Metrics(output.directory, 0)
    try:
        for stage, first in zip(run.stages, run.starts, strict=True):
            steps, state = range(first, first + stage.steps), start(params, stage, config, schedule)
            params, _ = _some_steps(run, params, state, steps, config, schedule, metrics, saving, None, roles)
    finally:
        metrics.close()
    return run.trained(params)


def _save(manager: ocp.CheckpointManager, step: int, params: Params, state: Any, about: dict[str, Any]) -> None:
    weights = ocp.args.StandardSave({"params": params, "optimiser": state})
    manager.save(step, args=ocp.args.Composite(weights=weights, about=ocp.args.JsonSave(about)))


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], place: pathlib.Path) -> None:
    """ValueError that names the first thing in which what was `saved` at a place differs from what is asked for now."""
    for field, value in now.items():
        if saved.get(field) != value:
            name, there, here = _differing(field, saved.get(field), value)
            raise ValueError(f"{place}: was made with another {name}: {there!r} there, {here!r} here")


def _differing(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """The innermost name, such as stages[1].steps, under which two values differ."""
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.keys() == here.keys():
        key = next(key for key in here if there[key] != here[key])
        return _differing(f"{name}.{key}", there[key], here[key])
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        i = next(i for i in range(len(here)) if there[i] != here[i])
        return _differing(f"{name}[{i}]", there[i], here[i])
    return name, there, here


def begun(directory: pathlib.Path) -> bool:
    """Whether a run's output folder holds checkpoints to go on from."""
    folder = directory / CHECKPOINTS
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def check_free(directory: pathlib.Path, resume: bool) -> None:
    """ValueError for a folder that holds an earlier run, and not `resume`: before anything there is written over."""
    if not resume and begun(directory):
        folder = (directory / CHECKPOINTS).absolute()
        raise ValueError(f"{folder}: holds an earlier run; --resume goes on with it, or choose another --output_dir")


def _some_steps(
    run: _Run,
    params: Params,
    state: Any,
    steps: range,
    config: Config,
    schedule: Schedule,
    metrics: Metrics,
    saving: Saving,
    folder: pathlib.Path | None,
    roles: distill.TracedSchedule | None,
) -> tuple[Params, Any]:
    """Steps within one stage, their metrics written. folder: of the checkpoints, if there are any.

    ValueError where a metric is not finite, or a weight after the last step: its loss came before its update.
    """
    stage_index = run.stage(steps.start)
    stage, rows = run.stages[stage_index], run.rows(stage_index)
    pending: list[jax.Array] = []
    began = time.perf_counter()
    batches = prefetch(lambda at: jax.device_put(run.batch(rows, at)), steps)
    length = jnp.int32(stage.steps)
    kept = f"; {folder} keeps the last good state" if folder is not None and steps.start else ""  # steps start at a save
    for at, tokens in zip(steps, batches, strict=True):
        params, state, found = step(params, state, tokens, config, schedule, stage.program, length, roles)
        pending.append(found)
        if at + 1 == steps.stop or (at + 1) % saving.log_every == 0:
            values = np.array([np.asarray(found) for found in pending])
            for number, row in enumerate(values.tolist(), start=at + 1 - len(pending)):
                if not all(math.isfinite(value) for value in row):
                    metrics.flush()
                    shown = ", ".join(f"{name} {value}" for name, value in zip(METRICS, row, strict=True))
                    raise ValueError(f"{stage.name}: step {number} is not finite ({shown}){kept}")
                metrics.write(number, stage.name, dict(zip(METRICS, row, strict=True)))
            metrics.flush()
            rate = len(pending) * stage.sequences * stage.context / (time.perf_counter() - began)
            run.add_rate(rate, stage.name)
            means = ", ".join(f"{name} {value:.4f}" for name, value in zip(METRICS, values.mean(axis=0), strict=True))
            print(
                f"{stage.name}: step {at + 1 - run.starts[stage_index]}/{stage.steps}, {means}, {rate:,.0f} tokens/s",
                flush=True,
            )
            pending, began = [], time.perf_counter()
    finite = jax.device_get(_finite(params, stage.kind))
    if broken := [jax.tree_util.keystr(path) for path, whole in jax.tree_util.tree_leaves_with_path(finite) if not whole]:
        shown = f"{broken[0]}, the first of {len(broken)}"
        raise ValueError(f"{stage.name}: the weights after step {steps[-1]} are not finite ({shown}){kept}")
    run.add_seconds()
    return params, state


def compile_steps(
    stages: Sequence[Stage], config: Config, schedule: Schedule, roles: distill.TracedSchedule | None = None
) -> None:
    """Compiles the stages' steps side by side; calls of `step` with these find them compiled."""
    params = shape_structs(config, schedule, jnp.float32)

    def compile_one(stage: Stage) -> None:
        state = jax.eval_shape(lambda params: start(params, stage, config, schedule), params)
        tokens = jax.ShapeDtypeStruct((stage.accumulate, stage.rows, stage.context + 1), jnp.int32)
        step.lower(params, state, tokens, config, schedule, stage.program, jnp.int32(0), roles).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(compile_one, stage) for stage in stages]:
            done.result()


def seconds_per_step(
    params: Params,
    stage: Stage,
    config: Config,
    schedule: Schedule,
    roles: distill.TracedSchedule | None = None,
    repeats: int = 3,
) -> float:
    """How long a step takes here, once compiled, on random tokens and a copy of the params.

    ValueError where even these come out not finite: better before a run than at its last stage.
    """
    shape = (stage.accumulate, stage.rows, stage.context + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    params = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), params)
    state = start(params, stage, config, schedule)
    began = 0.0
    for i in range(repeats + 1):
        params, state, found = step(params, state, tokens, config, schedule, stage.program, jnp.int32(stage.steps), roles)
        if i == 0:
            found.block_until_ready()
            began = time.perf_counter()
    found.block_until_ready()
    seconds = (time.perf_counter() - began) / repeats
    if not np.isfinite(found).all():
        raise ValueError(f"{stage.name}: a step on random tokens is not finite ({np.asarray(found).tolist()})")
    return seconds


def fit(stages: Sequence[Stage], costs: Sequence[float], shares: Sequence[float], seconds: float) -> list[Stage]:
    """The stages, cut so that together they take at most `seconds` at costs[i] seconds a step.

    A stage gets its share of the time, and of what others leave that need less than theirs; at least one step.
    """
    steps: dict[int, int] = {}
    left = seconds
    while len(steps) < len(stages):
        open_ = [i for i in range(len(stages)) if i not in steps]
        given = {i: left * shares[i] / sum(shares[i] for i in open_) for i in open_}
        whole = [i for i in open_ if stages[i].steps * costs[i] <= given[i]]
        for i in whole or open_:
            steps[i] = stages[i].steps if whole else max(1, int(given[i] / costs[i]))
        left -= sum(steps[i] * costs[i] for i in whole)
    return [dataclasses.replace(stage, steps=steps[i]) for i, stage in enumerate(stages)]


def flops_per_token(config: Config, schedule: Schedule, stage: Stage) -> float:
    """What a step needs per token, 2 for a multiplication and its addition; nothing that is computed twice or masked out.

    A matrix counts once forward, and once each backward for its input's and its own gradient where these are needed.
    Attention and divergence count over the keys attended to, the selection over all visible ones.
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
        total += 2 * schedule.num_full * projections + 3 * c.num_layers * attended * scores
    if stage.kind == "sparse":
        total += schedule.num_full * visible * scores
    return 2.0 * total


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of this device on bfloat16 matrices of size x size, each product the next one's factor."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16) / size**0.5

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, x: x @ a, x)

    products(a).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        products(a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size**3 * repeats / min(times)


def read_log(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a run's train.jsonl, one a step."""
    return [json.loads(line) for line in (directory / LOG).read_text(encoding="utf-8").splitlines()]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Mean losses in nats a token."""

    language: float
    indexer: float


@functools.partial(jax.jit, static_argnames=("sparse", "compute_dtype"))
def held_out(params: Params, tokens: jax.Array, config: Config, schedule: Schedule, sparse: bool, compute_dtype: str) -> Any:
    """The language loss and the divergence of tokens [B, S+1]."""
    dtype = jnp.dtype(compute_dtype)
    found = distill.losses(params, tokens, config, schedule, indexers=sparse, sparse=sparse, compute_dtype=dtype)
    return found.language, found.indexer


def evaluate(
    params: Params, cuts: np.ndarray, config: Config, schedule: Schedule, compute_dtype: str, sparse: bool = True
) -> HeldOut:
    """The losses on cuts [N, S+1], one at a time; sparse False: with dense attention, no divergence."""
    found = [held_out(params, jnp.asarray(cut[None]), config, schedule, sparse, compute_dtype) for cut in cuts]
    language, indexer = np.mean(np.array(found, np.float64), axis=0)
    return HeldOut(float(language), float(indexer))
