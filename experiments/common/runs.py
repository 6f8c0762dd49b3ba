"""Training runs: stages one after the other, with metrics, and with checkpoints from which a killed run goes on.

Data, losses and updates are functions of (seed, step), so on one device a run that was killed and resumed goes through
the same numbers, bit for bit, as one that was not. The step itself is `indexcache_jax.training`.

Under a mesh, weights and optimiser state lie where its rules split them, and rows over its data axis. A run may go on on
another mesh, or on one device.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import secrets
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorboardX
from jax.sharding import NamedSharding

from experiments.common import journal, processes
from experiments.common.data import Rows, prefetch
from experiments.common.report import Output, duration
from indexcache_jax import distill, sharding, training
from indexcache_jax.config import Config
from indexcache_jax.foreign import escaped
from indexcache_jax.params import Params, abstract, init, shape_structs, weights_of
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import fingerprint
from indexcache_jax.training import METRICS, Stage

T = TypeVar("T")
LOG = "train.jsonl"
CHECKPOINTS = "training"


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What a run trains with and for; a resumed run must have the same. Its steps are counted from 0 over all stages.

    tokens: the stream [N] to train on. schedule: that of the params. traced: the schedule to train for, where it is another.
    """

    tokens: np.ndarray
    stages: Sequence[Stage]
    config: Config
    schedule: Schedule
    seed: int
    traced: distill.TracedSchedule | None = None

    @functools.cached_property
    def bounds(self) -> list[int]:
        """Stage i takes the steps from bounds[i] up to bounds[i + 1]."""
        return [0, *itertools.accumulate(stage.steps for stage in self.stages)]

    @property
    def num_steps(self) -> int:
        return self.bounds[-1]

    def stage_number(self, step: int) -> int:
        """The number of the stage that takes the step; after the last step, the last stage's."""
        return max(i for i, start in enumerate(self.bounds[:-1]) if start <= min(step, self.num_steps - 1))

    def batch(self, step: int) -> np.ndarray:
        """The tokens [accumulate, rows, context + 1] of a step."""
        number = self.stage_number(step)
        stage = self.stages[number]
        rows = Rows(self.tokens, stage.context, (self.seed, number))
        found = rows.batch((step - self.bounds[number]) * stage.sequences, stage.sequences)
        return found.reshape(stage.accumulate, stage.rows, -1)

    def about(self, params: Params) -> dict[str, Any]:
        """What a checkpoint of the run says it was made with, as JSON; `params` are those the run started from."""
        about = {
            "seed": self.seed,
            "schedule": self.schedule.pattern,
            "tokens": [int(self.tokens.size), zlib.crc32(np.ascontiguousarray(self.tokens).data)],
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "model": self.config.to_hf(),
            "weights": fingerprint(params, [])["weights"],
        }
        if self.traced is not None:
            about["traced schedule"] = {name: np.asarray(of_layers).tolist() for name, of_layers in vars(self.traced).items()}
        return about


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
    """What a run made, and its times: of all processes that it took, without what their kills undid.

    seconds: up to the last step. tokens_per_second: by stage, the median of the rates between two writes of metrics; a
    process's first rate in a stage is left out, as it compiles the step then.
    """

    params: Params
    seconds: float
    tokens_per_second: dict[str, float]


class Metrics:
    """METRICS by step in train.jsonl and as TensorBoard events, for a run that goes on at `step`.

    What an earlier run wrote about this step and later ones is dropped. Of several processes, process 0 alone writes.
    """

    def __init__(self, directory: pathlib.Path, step: int) -> None:
        self._journal = journal.Journal(directory / LOG, None, keep=step)
        self._events = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=step, write_to_disk=processes.is_main()
        )

    def write(self, step: int, stage: str, values: dict[str, float]) -> None:
        self._journal.append({"step": step, "stage": stage, **values})
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        self._events.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()
        self._events.close()


def read_log(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of the train.jsonl of a run's output folder, one a step."""
    return journal.read(directory / LOG)


class _Times:
    """The time that a run took: of this process, and of earlier ones where their checkpoint was loaded."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rates: dict[str, list[float]] = {}  # tokens/s by stage
        self._compiled: set[str] = set()
        self._counted = time.perf_counter()

    def load(self, saved: dict[str, Any]) -> None:
        """Goes on from what `saved` returned."""
        self.seconds, self.rates = saved["seconds"], saved["rates"]

    def saved(self) -> dict[str, Any]:
        """The times as JSON; a copy, as it is written while steps go on."""
        return {"seconds": self.seconds, "rates": {name: [*rates] for name, rates in self.rates.items()}}

    def add_rate(self, rate: float, stage: str) -> None:
        """Counts a rate of a stage, but for this process's first, in which it compiles."""
        if stage in self._compiled:
            self.rates.setdefault(stage, []).append(rate)
        self._compiled.add(stage)

    def add_seconds(self) -> None:
        """Counts the time since the last call, or since this process began."""
        now = time.perf_counter()
        self.seconds += now - self._counted
        self._counted = now

    def of(self, params: Params) -> Trained:
        return Trained(params, self.seconds, {name: statistics.median(rates) for name, rates in self.rates.items()})


class Torn(ValueError):
    """A checkpoint of training that is not whole."""


class _Checkpoints:
    """The checkpoints in a run's output folder: params, optimiser state, times, and what the run is made with."""

    def __init__(self, directory: pathlib.Path, keep: int, about: dict[str, Any]) -> None:
        self.folder, self._about = (directory / CHECKPOINTS).absolute(), about
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def times(self, step: int) -> dict[str, Any]:
        """A checkpoint's times. ValueError for another run's, Torn for one that cannot be read."""
        with self._reading(step):
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            times = about.pop("spent")
        journal.check_same(about, self._about, self.folder)
        return times

    def restore(self, step: int, params: Params, state: Any) -> tuple[Params, Any]:
        """A checkpoint's params and optimiser state, of the shapes, dtypes and shardings of those given.

        They may be ShapeDtypeStructs. The mesh that the checkpoint was saved on need not be there. Torn where they cannot be
        read.
        """
        like = jax.tree.map(_abstract, {"params": params, "optimiser": state})
        with self._reading(step):
            weights = ocp.args.StandardRestore(like)
            restored = self._manager.restore(step, args=ocp.args.Composite(weights=weights))["weights"]
        return restored["params"], restored["optimiser"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Makes whatever orbax raises for a checkpoint that is not whole a Torn."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise Torn(f"{self.folder / str(step)}: cannot be read ({escaped(str(error), 200)})") from None

    def set_aside(self, step: int) -> None:
        """Takes a checkpoint that cannot be read out of the way of those that are to be saved."""
        folder = self.folder / str(step)
        folder.replace(self.folder.with_name(f"{self.folder.name}-torn-{step}-{secrets.token_hex(2)}"))
        self._manager.reload()

    def save(self, step: int, params: Params, state: Any, times: dict[str, Any]) -> None:
        weights = ocp.args.StandardSave({"params": params, "optimiser": state})
        about = ocp.args.JsonSave(self._about | {"spent": times})
        self._manager.save(step, args=ocp.args.Composite(weights=weights, about=about))

    def __enter__(self) -> _Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def begun(directory: pathlib.Path) -> bool:
    """Whether a run's output folder holds checkpoints to go on from."""
    folder = directory / CHECKPOINTS
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def check_free(directory: pathlib.Path, resume: bool) -> None:
    """ValueError where the output folder holds checkpoints of an earlier run that is not to be resumed."""
    journal.check_resumed((directory / CHECKPOINTS).absolute(), begun(directory), resume)


def train(params: Params, run: TrainingRun, output: Output, *, resume: bool, saving: Saving) -> Trained:
    """Params after all stages of a run, float32 but for matrices in 8 bits.

    Checkpoints and metrics go into the output's folder. `params` of any dtype stay as they are: training starts from a copy.

    resume: go on from the newest whole checkpoint there, if any; a newer one that is torn is named.

    ValueError, with the step, where a loss, a gradient or a weight to be saved or returned is not finite (the checkpoints
    before it stay); for a folder that holds another run, or one and not `resume`.
    """
    run, times = dataclasses.replace(run, stages=[stage for stage in run.stages if stage.steps]), _Times()
    params = _copied(params, run.config, run.schedule)
    if not run.num_steps:
        return times.of(params)
    with contextlib.ExitStack() as stack:
        checkpoints, done, state = None, 0, None
        if saving.every is not None:
            check_free(output.directory, resume)
            checkpoints = stack.enter_context(_Checkpoints(output.directory, saving.keep, run.about(params)))
            done, params, state = _newest(checkpoints, run, params, times)
        number = run.stage_number(done)
        if state is None:
            state = training.init_optimiser_state(params, run.stages[number], run.config, run.schedule)
        metrics = stack.enter_context(Metrics(output.directory, done))
        process = _Process(run, saving, metrics, times, checkpoints)
        while done < run.num_steps:
            stop = run.bounds[number + 1]
            if saving.every is not None:
                stop = min(stop, done + saving.every - done % saving.every)
            params, state = _take_steps(process, params, state, range(done, stop))
            done = stop
            if run.stage_number(done) != number:
                number = run.stage_number(done)
                state = training.init_optimiser_state(params, run.stages[number], run.config, run.schedule)
            if checkpoints is not None:
                checkpoints.save(done, params, state, times.saved())
    return times.of(params)


def _newest(checkpoints: _Checkpoints, run: TrainingRun, params: Params, times: _Times) -> tuple[int, Params, Any]:
    """Step, params and optimiser state of the newest whole checkpoint, whose times are loaded; (0, params, None) for none.

    Torn where there are checkpoints but none is whole, and in one of several processes, of which others may read on.
    """
    torn: list[tuple[int, Torn]] = []
    for step in checkpoints.steps:
        try:
            earlier = checkpoints.times(step)
            state = training.init_optimiser_state(params, run.stages[run.stage_number(step)], run.config, run.schedule)
            found = checkpoints.restore(step, params, state)
        except Torn as error:
            if processes.count() > 1:
                raise Torn(f"{error}; without that folder the run goes on from an older one") from None
            torn.append((step, error))
            continue
        for newer, reason in torn:
            print(f"warning: {reason}; going on from step {step}")
            checkpoints.set_aside(newer)
        times.load(earlier)
        return step, *found
    if torn:
        raise Torn(f"{torn[0][1]}, nor an older one; choose another --output_dir to start again")
    return 0, params, None


def _copied(params: Params, config: Config, schedule: Schedule) -> Params:
    """The params in float32 in arrays of their own, where they lie on the mesh in force; codes and scales as they are."""
    tree = abstract(config, schedule, weights_of(params))
    params = sharding.put(params, tree)
    return jax.tree.map(lambda a, t: jnp.array(a, jnp.float32 if t.kind == "weights" else a.dtype, copy=True), params, tree)


def random_params(key: jax.Array, config: Config, schedule: Schedule) -> Params:
    """Random float32 params, made where they lie on the mesh in force."""

    def make(key: jax.Array) -> Params:
        tree = abstract(config, schedule)
        return jax.tree.map(lambda a, t: sharding.constrain(a, *t.axes), init(key, config, schedule, jnp.float32), tree)

    return jax.jit(make)(key)


def _tokens_sharding(stage: Stage) -> NamedSharding | None:
    """Where the tokens [accumulate, rows, context + 1] of a step lie on the mesh in force; None without one."""
    return sharding.fitting((stage.accumulate, stage.rows, stage.context + 1), (None, "batch", None))


def put_tokens(tokens: np.ndarray, stage: Stage) -> jax.Array:
    """The tokens [accumulate, rows, context + 1] of a step where it expects them."""
    return _put(tokens, _tokens_sharding(stage))


def _put(x: np.ndarray, where: NamedSharding | None) -> jax.Array:
    """An array that every process has whole, on the devices; each process copies what its own hold."""
    return jax.device_put(x) if where is None else jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def in_a_thread(function: Callable[..., T]) -> Callable[..., T]:
    """`function` to be called in another thread, with the mesh and the rules that are in force here."""
    mesh, rules = sharding.current()
    if mesh is None:
        return function
    devices = jax.sharding.get_mesh()

    def call(*arguments: Any) -> T:
        with sharding.use(devices, rules):
            return function(*arguments)

    return call


@dataclasses.dataclass(frozen=True)
class _Process:
    """What the steps of one process share."""

    run: TrainingRun
    saving: Saving
    metrics: Metrics
    times: _Times
    checkpoints: _Checkpoints | None


def _take_steps(process: _Process, params: Params, state: Any, steps: range) -> tuple[Params, Any]:
    """The params and the optimiser's state after steps of one stage, whose metrics are written.

    ValueError where a metric is not finite, or a weight after the last step.
    """
    run = process.run
    number = run.stage_number(steps.start)
    stage, length = run.stages[number], jnp.int32(run.stages[number].steps)
    kept = ""
    if process.checkpoints is not None and steps.start:  # where the newest checkpoint is
        kept = f"; {process.checkpoints.folder} keeps the last good state"
    pending: list[jax.Array] = []
    began = time.perf_counter()
    where = _tokens_sharding(stage)
    batches = prefetch(lambda i: _put(run.batch(i), where), steps)
    for i, tokens in zip(steps, batches, strict=True):
        arguments = tokens, run.config, run.schedule, stage.program, length, run.traced
        params, state, values = training.step(params, state, *arguments)
        pending.append(values)
        if i + 1 == steps.stop or (i + 1) % process.saving.log_every == 0:
            means = _write_metrics(process.metrics, stage, range(i + 1 - len(pending), i + 1), pending, kept)
            seconds = (time.perf_counter() - began) / len(pending)
            rate = stage.sequences * stage.context / seconds
            process.times.add_rate(rate, stage.name)
            at, left = f"step {i + 1 - run.bounds[number]}/{stage.steps}", duration(seconds * (run.bounds[number + 1] - i - 1))
            print(f"{stage.name}: {at}, {means}, {rate:,.0f} tokens/s, {left} left", flush=True)
            pending, began = [], time.perf_counter()
    if broken := training.non_finite_weights(params, stage.kind):
        which = f"{broken[0]}, the first of {len(broken)}"
        raise ValueError(f"{stage.name}: the weights after step {steps[-1]} are not finite ({which}){kept}")
    process.times.add_seconds()
    return params, state


def _write_metrics(metrics: Metrics, stage: Stage, steps: range, values: Sequence[jax.Array], kept: str) -> str:
    """Writes the METRICS [4] of each of some steps and returns their means as text. ValueError where one is not finite."""
    rows = np.array([np.asarray(row) for row in values])
    for step, row in zip(steps, rows.tolist(), strict=True):
        named = dict(zip(METRICS, row, strict=True))
        if not all(math.isfinite(value) for value in row):
            shown = ", ".join(f"{name} {value}" for name, value in named.items())
            raise ValueError(f"{stage.name}: step {step} is not finite ({shown}){kept}")
        metrics.write(step, stage.name, named)
    metrics.flush()
    return ", ".join(f"{name} {mean:.4f}" for name, mean in zip(METRICS, rows.mean(axis=0), strict=True))


def compile_steps(
    stages: Sequence[Stage], config: Config, schedule: Schedule, traced: distill.TracedSchedule | None = None
) -> None:
    """Compiles the stages' steps side by side; later calls of `training.step` by `train` find them compiled."""
    of_params = None
    if sharding.current()[0] is not None:
        of_params = sharding.shardings(abstract(config, schedule), jax.sharding.get_mesh(), sharding.current()[1])
    params = shape_structs(config, schedule, jnp.float32, of_params)

    def compile_one(stage: Stage) -> None:
        state = jax.eval_shape(lambda params: training.init_optimiser_state(params, stage, config, schedule), params)
        if of_params is not None:
            lies = training.optimiser_shardings(state, of_params)
            state = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state, lies)
        shape = stage.accumulate, stage.rows, stage.context + 1
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=_tokens_sharding(stage))
        training.step.lower(params, state, tokens, config, schedule, stage.program, jnp.int32(0), traced).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(in_a_thread(compile_one), stage) for stage in stages]:
            done.result()


def seconds_per_step(
    params: Params,
    stage: Stage,
    config: Config,
    schedule: Schedule,
    traced: distill.TracedSchedule | None = None,
    repeats: int = 3,
) -> float:
    """The seconds that a compiled step takes on random tokens and a copy of the params, a mean over `repeats`.

    ValueError where the step is not finite even here, so that it shows before a run and not at its last stage.
    """
    shape = (stage.accumulate, stage.rows, stage.context + 1)
    tokens = put_tokens(np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32), stage)
    params = _copied(params, config, schedule)
    state = training.init_optimiser_state(params, stage, config, schedule)
    length, began = jnp.int32(stage.steps), 0.0
    for i in range(repeats + 1):
        params, state, metrics = training.step(params, state, tokens, config, schedule, stage.program, length, traced)
        if i == 0:
            metrics.block_until_ready()
            began = time.perf_counter()
    metrics.block_until_ready()
    seconds = (time.perf_counter() - began) / repeats
    if not np.isfinite(metrics).all():
        raise ValueError(f"{stage.name}: a step on random tokens is not finite ({np.asarray(metrics).tolist()})")
    return seconds


def fit(stages: Sequence[Stage], costs: Sequence[float], shares: Sequence[float], seconds: float) -> list[Stage]:
    """The stages with their steps cut, so that together they take at most `seconds` at costs[i] seconds a step.

    Stage i gets the share shares[i] / sum(shares) of the time, and of the time that stages leave which need less than
    their share; at least one step.
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


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s that this device reaches on products of bfloat16 matrices [size, size], each product a factor of the next."""
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


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Mean losses on held-out text, nats a token: of the language, and the indexers' divergence summed over F layers."""

    language: float
    indexer: float


@functools.partial(jax.jit, static_argnames=("sparse", "compute_dtype"))
def held_out(params: Params, tokens: jax.Array, config: Config, schedule: Schedule, sparse: bool, compute_dtype: str) -> Any:
    """The language loss and the indexers' divergence (0 if not `sparse`: attention is dense then) on tokens [B, S+1]."""
    dtype = jnp.dtype(compute_dtype)
    losses = distill.losses(params, tokens, config, schedule, indexers=sparse, sparse=sparse, compute_dtype=dtype)
    return losses.language, losses.indexer


def evaluate(
    params: Params, cuts: np.ndarray, config: Config, schedule: Schedule, compute_dtype: str, sparse: bool = True
) -> HeldOut:
    """The mean losses on cuts [N, S+1], computed one at a time; not `sparse`: with dense attention and no divergence."""
    where = sharding.fitting((1, cuts.shape[1]), ("batch", None))
    losses = [held_out(params, _put(cut[None], where), config, schedule, sparse, compute_dtype) for cut in cuts]
    language, indexer = np.mean(np.array(losses, np.float64), axis=0)
    return HeldOut(float(language), float(indexer))
