"""The paper's tables 2 and 3 in small: what schedules cost in quality, by the way to their indexers, on a model at hand.

Schedules at every retention: uniform, found by the greedy and by the floating search, and by the similarity DP. Ways to
their indexers: those that the model came with; distilled for the schedule on the frozen model, or for their own layer alone;
distilled once for all spans, with a search on these; and everything distilled: a sparse stage of all weights after that of
the indexers. Each is measured by the held-out language loss, by the loss on long-range tokens (whose n-gram last occurred far
back) and by retrieval at the full context. Every seed draws its own calibration and training text, held-out text and prompts.

Beside them a matrix of the domains that schedules are searched on against those they are evaluated on, how well the
similarity that the DP maximises predicts the loss, and the overlap of the layers' selections.

All schedules go through the same compiled programs, in training too. Every finished row is kept in rows.jsonl; after a
kill, --resume goes on with the next, on another machine too. Indexers are not kept: rows that are missing train theirs again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import data, devices, inputs, options, runs, text
from experiments.common.loss_journal import LossJournal
from experiments.common.options import ALL_F
from experiments.common.report import Output, device
from experiments.common.runs import Saving, TrainingRun
from experiments.reproduction import indexers, ngram, quality_tables, retrieval, scoring
from experiments.reproduction.quality_tables import KINDS, WAYS, Found, Result, Rows
from experiments.reproduction.scoring import Sample
from indexcache_jax import search
from indexcache_jax.config import Config
from indexcache_jax.distill import traced_schedule
from indexcache_jax.foreign import read_json
from indexcache_jax.indexer_training import indexer_stage
from indexcache_jax.params import Params, abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.search.overlap import layer_overlap
from indexcache_jax.sharding import TRAINING
from indexcache_jax.training import Stage

for _name in (
    *("checkpoint", "dtype", "context", "text", "sequences", "held_out_sequences", "batch_size", "woven"),
    *("retention", "retentions", "blocks", "resume", "time_limit", "mesh"),
    *("accumulate", "warmup_steps", "sparse_steps"),
    *("warmup_learning_rate", "indexer_learning_rate", "model_learning_rate"),
):
    flags.declare_key_flag(_name)

_SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds", lower_bound=1)
_OTHER_TEXT = flags.DEFINE_string(
    "other_text", "installed-prose", "text of another domain than the model's own, named like --text; empty for no domains"
)
_WAYS = flags.DEFINE_list("ways", list(WAYS), f"ways to the indexers of a schedule, of {', '.join(WAYS)}")
_EVERYTHING_FOR = flags.DEFINE_list(
    "everything_for", [], "schedules that everything is distilled for, such as 1/4 uniform; default all"
)
_SPANS = flags.DEFINE_integer("most_span", 4, "layers up to which indexers distilled once learn to serve", lower_bound=1)
_TRAINING_SEQUENCES = flags.DEFINE_integer("training_sequences", 32, "sequences that indexers are distilled on", lower_bound=1)
_ORDER = flags.DEFINE_integer("ngram_order", 8, "tokens that must have occurred before for a token to count as long-range", 1)
_LONG = flags.DEFINE_integer("long_range", 1024, "and how many positions back, at least, they last did", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("retrieval_prompts", 8, "times that each retrieval task is asked, of each seed", lower_bound=1)
_TOGETHER = flags.DEFINE_integer("retrieval_together", 1, "retrieval tasks asked at the end of one text", lower_bound=1)
_BESIDE = flags.DEFINE_list("beside", [], "results.json of this experiment or of pretrain on other models, to compare overlaps")

ROWS = "rows.jsonl"
FINISH_SECONDS = 10.0  # of --time_limit, for plots and the report


@dataclasses.dataclass(frozen=True)
class Model:
    """The checkpoint under study and how its text is read. params: its weights in `dtype`; stored: as they are."""

    config: Config
    base: Schedule
    params: Params
    stored: Params
    reader: inputs.Reader
    dtype: str


@dataclasses.dataclass(frozen=True)
class Domain:
    """Documents to calibrate and train on and others to evaluate on, all of the flag's text."""

    flag: str
    sides: inputs.Sides


def read_domains() -> dict[str, Domain]:
    """The model's own domain, of --text, and another one, if any; the tables call them after what they are by default."""
    found = {"code": Domain("text", inputs.split(options.TEXT.value, None, "text"))}
    if _OTHER_TEXT.value:
        found["prose"] = Domain("other_text", inputs.split(_OTHER_TEXT.value, None, "other_text"))
    return found


def load(checkpoint: inputs.Checkpoint) -> Model:
    """ValueError for a --context that is not the model's, and for a checkpoint that lacks the indexer of any layer."""
    reader = inputs.reader(checkpoint.directory, inputs.described(checkpoint.directory)[0])
    config, base, stored = checkpoints_convert.load(checkpoint.directory)
    if base.num_full != base.num_layers:
        raise ValueError(
            f"--checkpoint={checkpoint.directory}: {base.pattern} lacks indexers; the tables start from all of them"
        )
    params = jax.tree.map(lambda a, t: a.astype(t.dtype or checkpoint.dtype), stored, abstract(config, base))
    return Model(config, base, params, stored, reader, checkpoint.dtype)


def schedule_names() -> list[str]:
    """All F, and every kind of schedule at every retention."""
    return [ALL_F, *(f"{retention} {kind}" for retention in options.RETENTIONS.value for kind in KINDS)]


def names_of(way: str) -> list[str]:
    """The schedules that are measured with a way's indexers."""
    names = schedule_names()
    if way.startswith("everything") and _EVERYTHING_FOR.value:
        names = [name for name in names if name in _EVERYTHING_FOR.value]
    if way == "own":  # with all F there is no other layer
        return names[1:]
    return [name for name in names if name.endswith("uniform")] if way == "everything-own" else names


def check_flags() -> None:
    """ValueError for what would else come to light when the searches are done."""
    options.check_positive("batch_size", "held_out_sequences", "sequences", "blocks")
    inputs.share("retention", options.RETENTION.value)
    retentions, batch_size = options.RETENTIONS.value, options.BATCH_SIZE.value
    for retention in retentions:
        inputs.share("retentions", retention)
    counts = {"sequences": options.calibration_sequences(), "held_out_sequences": options.HELD_OUT_SEQUENCES.value}
    for name, count in counts.items():
        if count % batch_size:
            raise ValueError(f"--batch_size={batch_size}: does not divide --{name}={count}")
    for flag, given, known in (("ways", _WAYS.value, [*WAYS]), ("everything_for", _EVERYTHING_FOR.value, schedule_names())):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"--{flag}: {unknown[0]!r} is not one of {', '.join(map(repr, known))}")
    for way, first in (("own", "untrained"), ("everything", "untrained"), ("everything-own", "everything")):
        if way in _WAYS.value and first not in _WAYS.value:
            raise ValueError(f"--ways={','.join(_WAYS.value)}: {way!r} is compared with {first!r}, which is missing")
    if "everything" in _WAYS.value and _EVERYTHING_FOR.value and ALL_F not in _EVERYTHING_FOR.value:
        names = ",".join(_EVERYTHING_FOR.value)
        raise ValueError(f"--everything_for={names}: they are compared with {ALL_F!r}, which is missing")
    if trained := [way for way in _WAYS.value if way != "untrained"]:
        options.check_positive("warmup_steps", *(["sparse_steps"] if any("everything" in way for way in trained) else []))


def overlaps_beside() -> dict[str, tuple[float, float]]:
    """The overlap of adjacent layers and of all pairs in each results.json of --beside, by folder."""
    found = {}
    for name in _BESIDE.value:
        path = pathlib.Path(name)
        overlap = read_json(path).get("metrics", {}).get("overlap", {})
        if not all(isinstance(overlap.get(key), float) for key in ("adjacent", "all pairs")):
            raise ValueError(f"--beside={name}: holds no metrics.overlap, as this experiment and pretrain write it")
        found[path.parent.name] = overlap["adjacent"], overlap["all pairs"]
    return found


@dataclasses.dataclass(frozen=True)
class Seed:
    """What a seed draws: cuts [N, S+1] to search on, and what to evaluate on."""

    cuts: np.ndarray
    sample: Sample


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is studied.

    indexer_stage: what each group's indexer takes; sparse: the stage that trains everything after that. deadline: of
    time.perf_counter().
    """

    checkpoint: inputs.Checkpoint
    studied: Model
    domains: dict[str, Domain]
    drawn: Mapping[int, Seed]
    indexer_stage: Stage
    sparse: Stage
    beside: dict[str, tuple[float, float]]
    deadline: float

    @property
    def seeds(self) -> list[int]:
        return list(self.drawn)


def read_inputs(seed: int, deadline: float) -> Inputs:
    """All that is read, checked before anything takes long."""
    check_flags()
    beside, checkpoint = overlaps_beside(), inputs.checkpoint()
    studied, domains = load(checkpoint), read_domains()
    context = studied.reader.context
    _, sparse = inputs.distillation_stages(context, studied.dtype)
    stage = indexer_stage(
        context,
        studied.dtype,
        steps=options.WARMUP_STEPS.value,
        rows=options.BATCH_SIZE.value,
        learning_rate=options.WARMUP_LEARNING_RATE.value,
    )
    drawn = {number: draw(studied, domains["code"], number) for number in range(seed, seed + _SEEDS.value)}
    print(f"{checkpoint.directory}: {studied.base.num_layers} layers; {studied.dtype} on {device()['kind']}")
    return Inputs(checkpoint, studied, domains, drawn, stage, sparse, beside, deadline)


def draw(studied: Model, domain: Domain, seed: int) -> Seed:
    """Cuts to search on, with retrieval tasks as in the training text, and what to evaluate on."""
    reader, count = studied.reader, options.calibration_sequences()
    cuts = reader.draw(domain.sides.train, domain.flag, count, seed)
    if options.WOVEN.value:
        stream = retrieval.weave(cuts.reshape(-1), reader.encoder, options.WOVEN.value, seed)
        cuts = text.sequences(stream, count, reader.context, seed)
    held_out = reader.draw(domain.sides.held_out, domain.flag, options.HELD_OUT_SEQUENCES.value, seed)
    far = np.stack([ngram.distance(cut, _ORDER.value)[1:] > _LONG.value for cut in held_out])
    asked = retrieval.prompts(held_out, reader.encoder, reader.context, _PROMPTS.value, seed, _TOGETHER.value)
    return Seed(cuts, Sample(held_out, far, asked))


def training_tokens(given: Inputs, output: Output, seed: int) -> np.ndarray:
    """A stream to distil on, of which the indexers' text and the sparse stage take what they need."""
    reader, documents, stage = given.studied.reader, given.domains["code"].sides.train, given.sparse
    needed = max(stage.steps * stage.sequences, 2 * _TRAINING_SEQUENCES.value) * reader.context + 4 * reader.context
    tokens = data.pack(documents, reader.encoder, reader.separator, output.directory / f"tokens-{seed}.bin", seed, needed)
    return retrieval.weave(tokens, reader.encoder, options.WOVEN.value, seed) if options.WOVEN.value else tokens


def open_rows(given: Inputs, output: Output) -> Rows:
    """The rows that are finished; those of other weights, text or flags are refused."""
    not_asked = ("checkpoint", "resume", "seeds", "time_limit", "ways", "everything_for", "mesh", "beside")
    asked = {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(__name__) if f.name not in not_asked}
    weights = search.fingerprint(given.studied.params, [])["weights"]
    first = given.drawn[given.seeds[0]]
    checksum = 0
    for tokens in (first.cuts, first.sample.cuts, *(prompt.tokens for prompt in first.sample.prompts)):
        checksum = zlib.crc32(np.ascontiguousarray(tokens, np.int32).tobytes(), checksum)
    about = {"weights": weights, "tokens": checksum, "dtype": given.studied.dtype, "flags": asked}
    return Rows(output.directory / ROWS, about, options.RESUME.value, given.deadline - FINISH_SECONDS)


# ---- searches


def searched(
    studied: Model, params: Params, cuts: np.ndarray, num_full: int, output: Output, name: str, floating: bool = False
) -> list[search.Step]:
    """The steps of a search; its evaluations are kept in the output's folder, for the same weights."""
    batches = inputs.batches(cuts)
    about = {"pattern": studied.base.pattern, "dtype": studied.dtype, **search.fingerprint(params, batches)}
    path = output.directory / f"search-{name}-{about['weights']:08x}.jsonl"
    with LossJournal(path, about) as log:
        losses = search.Evaluator(params, studied.config, studied.base, batches, log)
        if floating:
            return search.floating_search(losses, studied.base, num_full=num_full, race=search.Race())
        return search.greedy_search(losses, studied.base, num_full=num_full, blocks=options.BLOCKS.value, race=search.Race())


def schedules(studied: Model, params: Params, cuts: np.ndarray, output: Output, name: str) -> dict[str, Any]:
    """Every schedule of the tables, searched on the cuts [N, S+1] with these params: the fields of `Found`."""
    layers, batches = studied.base.num_layers, inputs.batches(cuts)
    sizes = {r: inputs.kept(layers, inputs.share("retentions", r)) for r in options.RETENTIONS.value}
    least = min(sizes.values())
    steps, floating = (searched(studied, params, cuts, least, output, name, floating) for floating in (False, True))
    similarity = search.similarities(params, studied.config, studied.base, batches)
    named = {ALL_F: studied.base}
    for retention, size in sizes.items():
        of_kinds = (
            Schedule.uniform(layers, size),
            search.first_step_with_at_most(steps, size).schedule,
            search.first_step_with_at_most(floating, size).schedule,
            search.most_similar(similarity, size),
        )
        named |= {f"{retention} {kind}": schedule for kind, schedule in zip(KINDS, of_kinds, strict=True)}
    losses = search.Evaluator(params, studied.config, studied.base, batches)
    tried = [
        {
            "full": before.schedule.num_full,
            "similarity": [
                search.total_similarity(similarity, before.schedule.with_shared(layer)) for layer in step.candidates
            ],
            "loss": list(step.candidates.values()),
        }
        for before, step in itertools.pairwise(steps)
    ]
    patterns = {name: schedule.pattern for name, schedule in named.items()}
    calibration = dict(zip(named, losses.losses(list(named.values())), strict=True))
    return dataclasses.asdict(Found(patterns, calibration, tried))


def domain_matrix(studied: Model, domains: dict[str, Domain], seed: int, output: Output) -> dict[str, dict[str, float]]:
    """Held-out loss by the domain that a schedule at --retention was searched on (rows) and is evaluated on."""
    layers, count, reader = studied.base.num_layers, options.calibration_sequences(), studied.reader
    size = inputs.kept_at_retention(layers)
    cuts = {name: reader.draw(domain.sides.train, domain.flag, count, seed) for name, domain in domains.items()}
    held_out = {
        name: reader.draw(domain.sides.held_out, domain.flag, options.HELD_OUT_SEQUENCES.value, seed)
        for name, domain in domains.items()
    }
    cuts["both"] = np.concatenate([part[: -(-count // 2)] for part in cuts.values()])[: max(count, 2)]
    rows = {ALL_F: studied.base, "uniform": Schedule.uniform(layers, size)}
    for name, chosen in cuts.items():
        steps = searched(studied, studied.params, chosen, size, output, f"{name}-{seed}-{size}")
        rows[f"searched on {name}"] = search.first_step_with_at_most(steps, size).schedule
    return {
        row: {
            name: search.Evaluator(studied.params, studied.config, studied.base, inputs.batches(on)).loss(schedule)
            for name, on in held_out.items()
        }
        for row, schedule in rows.items()
    }


def overlap_of(studied: Model, cuts: np.ndarray) -> list[list[float]]:
    """The mean overlap of the layers' selections [L][L] on cuts [N, S+1], to four digits."""
    matrix = layer_overlap(studied.params, studied.config, studied.base, inputs.batches(cuts))
    return [[round(float(value), 4) for value in row] for row in matrix]


# ---- training


class Training:
    """The training text and the distilled indexers of every seed, made when they are first asked for."""

    def __init__(self, given: Inputs, output: Output) -> None:
        self._given, self._output = given, output
        self.tokens = functools.cache(functools.partial(training_tokens, given, output))
        self.store = functools.cache(self._store)

    def _store(self, seed: int) -> indexers.Store:
        studied = self._given.studied
        context = studied.reader.context
        cuts = text.sequences(self.tokens(seed), _TRAINING_SEQUENCES.value, context, seed)
        arguments = studied.params, studied.config, studied.base, cuts[:, :-1], self._given.indexer_stage, seed
        return indexers.Store(*arguments)

    def for_spans(self, seed: int) -> dict[int, indexers.Trained]:
        return self.store(seed).for_spans(min(_SPANS.value, self._given.studied.base.num_layers))

    def everything(self, schedule: Schedule, cross_layer: bool, seed: int) -> Params:
        """The model after the indexers were distilled for a schedule and then the sparse stage, in the dtype to compute in."""
        studied, stage = self._given.studied, self._given.sparse
        start = jax.tree.map(lambda a: a.astype(jnp.float32), studied.stored)
        start = indexers.with_indexers(start, self.store(seed).for_schedule(schedule, cross_layer=cross_layer))
        traced = traced_schedule(schedule, cross_layer)
        training_run = TrainingRun(self.tokens(seed), [stage], studied.config, studied.base, seed, traced)
        log_every = max(1, min(50, stage.steps // 4))
        folder = Output.create(str(self._output.directory / "runs" / f"{seed}-{schedule.pattern}-{cross_layer}"))
        trained = runs.train(start, training_run, folder, resume=False, saving=Saving(every=None, log_every=log_every))
        return jax.tree.map(lambda a, b: a.astype(b.dtype), trained.params, studied.params)


# ---- measuring


@dataclasses.dataclass(frozen=True)
class Study:
    """All that measuring needs."""

    given: Inputs
    rows: Rows
    output: Output
    training: Training

    def score(self, way: str, seed: int, schedule: Schedule) -> dict[str, Any]:
        """The scores of a schedule with a way's indexers, as JSON, with the seconds and the course of their training."""
        studied, began = self.given.studied, time.perf_counter()
        extra: dict[str, Any] = {}
        params = studied.params
        if way.startswith("everything"):
            params = self.training.everything(schedule, way == "everything", seed)
        elif way != "untrained":
            trained = self.trained(way, seed, schedule)
            params, extra["curve"] = indexers.with_indexers(params, trained), indexers.curve(trained)
        if way != "untrained":
            jax.block_until_ready(params)
            extra["seconds"] = time.perf_counter() - began
        scores = scoring.score(params, studied.config, studied.base, schedule, self.given.drawn[seed].sample)
        return dataclasses.asdict(scores) | extra

    def trained(self, way: str, seed: int, schedule: Schedule) -> dict[int, indexers.Trained]:
        """The indexers of a way that trains nothing else."""
        if way == "once":
            return self.training.for_spans(seed)
        return self.training.store(seed).for_schedule(schedule, cross_layer=way == "indexers")

    def search(self, way: str, seed: int) -> Found | None:
        """The schedules of a seed, found with the indexers as they came or, "once", with those distilled for all spans."""

        def make() -> dict[str, Any]:
            params = self.given.studied.params
            if way == "once":
                params = indexers.with_indexers(params, self.training.for_spans(seed))
            return schedules(self.given.studied, params, self.given.drawn[seed].cuts, self.output, f"{way}-{seed}")

        found = self.rows.once("schedules", seed, way, make)
        return None if found is None else Found(**found)


def jobs(seeds: Sequence[int]) -> Iterator[tuple[str, int, str]]:
    """Way, seed and schedule of all rows, in the order in which they are measured.

    Of what trains everything, which takes longest, all seeds of a schedule come one after the other.
    """
    asked = [way for way in WAYS if way in _WAYS.value]
    for way in asked:
        if way == "untrained":
            yield from ((way, seed, name) for seed in seeds for name in names_of(way))
    frozen = [way for way in asked if way in ("indexers", "own", "once")]
    yield from ((way, seed, name) for seed in seeds for way in frozen for name in names_of(way))
    trained = [(way, name) for way in asked if way.startswith("everything") for name in names_of(way)]
    yield from ((way, seed, name) for way, name in trained for seed in seeds)


def measure_all(study: Study) -> Result:
    """Every part of the tables, as far as it is not known and there is time."""
    given, rows, output = study.given, study.rows, study.output
    studied, first = given.studied, given.seeds[0]
    asked = list(jobs(given.seeds))
    rows.left = len(asked)
    search_ways = ["untrained", *(["once"] if "once" in _WAYS.value else [])]
    searches: dict[str, dict[int, Found]] = {way: {} for way in search_ways}
    heat = rows.once("overlap", first, "", lambda: overlap_of(studied, given.drawn[first].cuts))
    measured: dict[str, dict[str, dict[int, Any]]] = {way: {} for way in WAYS if way in _WAYS.value}
    for seed in given.seeds:
        if found := study.search("untrained", seed):
            searches["untrained"][seed] = found
    for way, seed, name in asked:
        ran_on = "once" if way == "once" else "untrained"
        if ran_on == "once" and seed not in searches["once"] and (found := study.search("once", seed)):
            searches["once"][seed] = found
        rows.left -= 1
        if seed in searches[ran_on]:
            pattern = searches[ran_on][seed].patterns[name]
            value = rows.once(way, seed, pattern, functools.partial(study.score, way, seed, Schedule(pattern)), name)
            if value is not None:
                measured[way].setdefault(name, {})[seed] = value
    matrices = []
    if len(given.domains) > 1:
        made = (
            rows.once("domains", seed, "", functools.partial(domain_matrix, studied, given.domains, seed, output))
            for seed in given.seeds
        )
        matrices = [matrix for matrix in made if matrix is not None]
    if rows.skipped:
        limit = f"--time_limit={options.TIME_LIMIT.value:g}"
        print(f"{limit}: no time was left for {rows.skipped} parts; --resume makes up for it", flush=True)
    overlap = None if heat is None else np.array(heat)
    return Result(searches, measured, matrices, overlap, given.beside, about(given))


def about(given: Inputs) -> list[str]:
    """Sentences on how all was measured."""
    stage, sparse = given.indexer_stage, given.sparse
    lines = [
        f"Losses in nats per token at a context of {options.CONTEXT.value}, on {options.HELD_OUT_SEQUENCES.value} held-out "
        f"sequences a seed; long-range: the {_ORDER.value}-gram last occurred more than {_LONG.value} positions back; "
        f"retrieval: share of {_PROMPTS.value} prompts a task and seed, {_TOGETHER.value} asked at the end of one text.",
        f"Searches on {options.calibration_sequences()} sequences a seed.",
    ]
    if set(_WAYS.value) - {"untrained"}:
        lines.append(
            f"Indexers distilled: {stage.steps} steps of {stage.sequences} of {_TRAINING_SEQUENCES.value} sequences for each "
            f"group of layers, rate {stage.indexer_learning_rate:g}; once: for spans of up to {_SPANS.value} layers."
        )
    if any(way.startswith("everything") for way in _WAYS.value):
        lines.append(
            f"Everything distilled: after that {sparse.steps} steps of {sparse.sequences} sequences, rates "
            f"{sparse.model_learning_rate:g} (model) and {sparse.indexer_learning_rate:g} (indexers)."
        )
    return lines


def compile_all(given: Inputs) -> None:
    """Compiles side by side what takes long."""
    studied, ways = given.studied, _WAYS.value
    config, base, dtype = studied.config, studied.base, jnp.int32
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), studied.params)
    context, rows, layers = options.CONTEXT.value, options.BATCH_SIZE.value, base.num_layers
    batch = jax.ShapeDtypeStruct((rows, context), dtype)
    number, choice, choices = (jax.ShapeDtypeStruct(*of) for of in (((), dtype), ((), bool), ((layers,), bool)))
    state = jax.eval_shape(layerwise.start, params, batch, config)
    programs: list[Callable[[], Any]] = [
        lambda: layerwise.advance.lower(params, state, number, choice, config, base).compile(),
        lambda: layerwise.finish.lower(params, state, number, choices, batch, config, base).compile(),
        lambda: layerwise.compare.lower(params, state, number, state.indices, config, base).compile(),
    ]
    for one in given.drawn.values():
        shape = len(one.sample.cuts) + len(one.sample.prompts), context, one.sample.tail
        programs.append(functools.partial(_compiled, functools.partial(scoring.lower, params, config, base, *shape)))
    if set(ways) - {"untrained"}:
        programs += indexers.programs(params, config, base, given.indexer_stage, _TRAINING_SEQUENCES.value)
    if any(way.startswith("everything") for way in ways):
        programs.append(lambda: runs.compile_steps([given.sparse], config, base, traced_schedule(base)))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(program) for program in programs]:
            done.result()


def _compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
    return lower().compile()


def report(result: Result, given: Inputs, output: Output, layout: devices.Layout) -> None:
    """Writes the plots, results.json and report.md, and prints the overview."""
    images = quality_tables.write_plots(output, result, given.studied.base, given.seeds[0])
    metrics = {"checkpoint": given.checkpoint.name, **quality_tables.metrics(result)}
    title = f"Quality of {given.checkpoint.name}"
    output.finish("quality", metrics, quality_tables.markdown(title, result, options.RETENTION.value, images), layout)
    print(f"\n{quality_tables.terminal(result)}\n\nwritten to {output.directory}/")


def run(output_dir: str, seed: int) -> None:
    began = time.perf_counter()
    layout = devices.layout(rows=1)
    with devices.in_force(layout, TRAINING):
        given = read_inputs(seed, began + options.seconds_to_spend(math.inf))
        output = Output.create(output_dir)
        rows = open_rows(given, output)
        if layout.num_devices == 1:  # a mesh's programs depend on where their arguments are
            compile_all(given)
        print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
        result = measure_all(Study(given, rows, output, Training(given, output)))
    rows.close()
    report(result, given, output, layout)
