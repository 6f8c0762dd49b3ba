"""The paper's tables 2 and 3 in small: what schedules cost in quality, training-free and distilled, on a model at hand.

Training-free: all F against uniform, searched and similarity-DP schedules at every retention. Distilled: the same
training for all F, uniform, searched, and uniform without the cross-layer loss. Each is measured by the held-out language
loss, by the loss on long-range tokens (whose n-gram last occurred far back) and by retrieval at the full context. Every
seed draws its own calibration, training order, held-out text and prompts; intervals are over seeds. Beside them a matrix
of the domains that schedules are searched on against those they are evaluated on, and how well the similarity that the DP
maximises predicts the loss.

All schedules go through the same compiled programs, in training too. Every finished row is kept in rows.jsonl; after a
kill, --resume goes on with the next.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import flags

import checkpoints_convert
from experiments.common import data, devices, inputs, options, plots, runs, text
from experiments.common.journal import Journal
from experiments.common.loss_journal import LossJournal
from experiments.common.options import ALL_F
from experiments.common.report import Output, device, markdown_table, text_table, time_left
from experiments.common.runs import Saving, TrainingRun
from experiments.reproduction import ngram, retrieval
from indexcache_jax import model, search
from indexcache_jax.config import Config
from indexcache_jax.distill import traced_schedule
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

_SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds; fewer than 2 give no intervals", lower_bound=1)
_OTHER_TEXT = flags.DEFINE_string(
    "other_text", "installed-prose", "text of another domain than the model's own, named like --text"
)
_DISTILLED = flags.DEFINE_list(
    "distilled",
    [ALL_F, "1/2 uniform", "1/2 searched", "1/2 uniform (own layer only)", "1/4 uniform"],
    "schedules to train for; empty for none",
)
_ORDER = flags.DEFINE_integer("ngram_order", 8, "tokens that must have occurred before for a token to count as long-range", 1)
_LONG = flags.DEFINE_integer("long_range", 1024, "and how many positions back, at least, they last did", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("retrieval_prompts", 8, "retrieval prompts of each task and seed", lower_bound=1)

KINDS = ("uniform", "searched", "similarity")  # of schedules, at every retention
OWN = " (own layer only)"
ROWS = "rows.jsonl"
PLAN = "plan.json"
WARMUP_SHARE = 0.6  # of the time that --time_limit leaves a distillation
FINISH_SECONDS = 10.0  # of --time_limit, for plots and the report
LEAST_STEPS = 10  # of a stage that --time_limit cuts: in fewer the rate hardly rises, and what they make is no distillation
# 30B, mean of five long-context benchmarks (arXiv 2603.12201, tables 2 and 3): to compare orders with, not numbers.
PAPER = {
    ALL_F: 50.2,
    "1/2 uniform": 47.4,
    "1/2 searched": 50.3,
    "1/4 uniform": 43.0,
    "1/4 searched": 49.9,
    "1/8 uniform": 35.3,
    "1/8 searched": 46.1,
}
PAPER_DISTILLED = {ALL_F: 51.0, "1/2 uniform": 51.6, "1/2 searched": 50.6, f"1/2 uniform{OWN}": 49.8, "1/4 uniform": 50.6}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one seed evaluates on: cuts [N, S+1], which of their targets [N, S] are long-range, prompts by task."""

    cuts: np.ndarray
    long_range: np.ndarray
    prompts: Mapping[str, Sequence[retrieval.Prompt]]


def sample(cuts: np.ndarray, encoder: text.Bytes | text.FromFile, context: int, seed: int) -> Sample:
    far = np.stack([ngram.distance(cut, _ORDER.value)[1:] > _LONG.value for cut in cuts])
    return Sample(cuts, far, retrieval.prompts(cuts, encoder, context, _PROMPTS.value, seed))


_token_losses = jax.jit(model.token_losses)


def measure(params: Params, config: Config, base: Schedule, schedule: Schedule, on: Sample) -> dict[str, float]:
    """Losses in nats per token and the share of prompts whose whole answer is the likeliest continuation, token by token."""
    full, losses = jnp.array(schedule.is_full), []
    for cut in on.cuts:
        tokens = jnp.asarray(cut[None])
        x = layerwise.hidden_states(params, tokens[:, :-1], full, config, base)
        losses.append(_token_losses(params, x, tokens[:, 1:], config))
    found = np.concatenate([np.asarray(of_cut) for of_cut in losses])
    measured = {"loss": float(found.mean())}
    if on.long_range.any():
        measured["long-range loss"] = float(found[on.long_range].mean())
    return measured | retrieval.accuracy(params, config, base, schedule, on.prompts)


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
    """The model's own domain, of --text, and another one; the tables call them after what they are by default."""
    return {
        "code": Domain("text", inputs.split(options.TEXT.value, None, "text")),
        "prose": Domain("other_text", inputs.split(_OTHER_TEXT.value, None, "other_text")),
    }


def searched(studied: Model, cuts: np.ndarray, num_full: int, output: Output, name: str) -> list[search.Step]:
    """The steps of a greedy search; its evaluations are kept in the output's folder."""
    batches = inputs.batches(cuts)
    about = {"pattern": studied.base.pattern, "dtype": studied.dtype, **search.fingerprint(studied.params, batches)}
    with LossJournal(output.directory / f"search-{name}.jsonl", about) as log:
        losses = search.Evaluator(studied.params, studied.config, studied.base, batches, log)
        return search.greedy_search(losses, studied.base, num_full=num_full, blocks=options.BLOCKS.value)


@dataclasses.dataclass(frozen=True)
class Found:
    """The schedules of one seed by name, their losses on what they were searched on, and the search's steps beside the DP.

    steps[i]: the number of F layers before a step of the greedy search, and for every flip that it tried the DP's total
    similarity and the loss.
    """

    patterns: dict[str, str]
    calibration: dict[str, float]
    steps: list[dict[str, Any]]


def schedules(studied: Model, cuts: np.ndarray, output: Output, seed: int) -> dict[str, Any]:
    """Every schedule of the tables, searched on the cuts [N, S+1]: the fields of `Found`."""
    layers, batches = studied.base.num_layers, inputs.batches(cuts)
    sizes = {r: inputs.kept(layers, inputs.share("retentions", r)) for r in options.RETENTIONS.value}
    steps = searched(studied, cuts, min(sizes.values()), output, f"code-{seed}")
    similarity = search.similarities(studied.params, studied.config, studied.base, batches)
    named = {ALL_F: studied.base}
    for retention, size in sizes.items():
        of_kinds = (
            Schedule.uniform(layers, size),
            search.first_step_with_at_most(steps, size).schedule,
            search.most_similar(similarity, size),
        )
        named |= {f"{retention} {kind}": schedule for kind, schedule in zip(KINDS, of_kinds, strict=True)}
    losses = search.Evaluator(studied.params, studied.config, studied.base, batches)
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
    calibration = {name: losses.loss(schedule) for name, schedule in named.items()}
    return dataclasses.asdict(Found(patterns, calibration, tried))


def distilled(
    studied: Model, name: str, schedule: Schedule, stages: list[Stage], tokens: np.ndarray, output: Output, seed: int
) -> Params:
    """The checkpoint after both stages, in the dtype to compute in. S layers keep an indexer, which nothing reads."""
    log_every = max(1, min([50, *(stage.steps // 4 for stage in stages if stage.steps)]))
    traced = traced_schedule(schedule, cross_layer=not name.endswith(OWN))
    training_run = TrainingRun(tokens, stages, studied.config, studied.base, seed, traced)
    folder = Output.create(str(run_folder(output, name, seed)))
    trained = runs.train(studied.stored, training_run, folder, resume=False, saving=Saving(every=None, log_every=log_every))
    return jax.tree.map(lambda a, b: a.astype(b.dtype), trained.params, studied.params)


def run_folder(output: Output, name: str, seed: int) -> pathlib.Path:
    return output.directory / "runs" / f"{seed}-{''.join(c if c.isalnum() else '-' for c in name)}"


class Rows:
    """The finished parts of the tables, by part, seed and name, in a `Journal` about one checkpoint and one set of flags.

    ValueError as for a `Journal`.
    """

    def __init__(self, path: pathlib.Path, about: dict[str, Any], resume: bool) -> None:
        fields = {"part": str, "seed": int, "name": str, "value": object}
        self._journal = Journal(path, about, fields=fields, resume=resume)
        self._known = {(row["part"], row["seed"], row["name"]): row["value"] for row in self._journal.entries}

    def begun(self, part: str) -> bool:
        return any(key[0] == part for key in self._known)

    def has(self, part: str, seed: int, name: str) -> bool:
        return (part, seed, name) in self._known

    def once(self, part: str, seed: int, name: str, make: Callable[[], Any]) -> Any:
        """The value that is known, or what `make` returns, kept and shown."""
        key = part, seed, name
        if key not in self._known:
            began = time.perf_counter()
            self._known[key] = value = make()
            self._journal.append({"part": part, "seed": seed, "name": name, "value": value})
            seconds = time.perf_counter() - began
            numbers = {k: round(v, 4) for k, v in value.items() if isinstance(v, float)} if isinstance(value, dict) else {}
            shown_ = f": {numbers}" if numbers else ""
            print(f"seed {seed}, {part}{', ' + name if name else ''}{shown_} ({seconds:.1f} s)", flush=True)
        return self._known[key]

    def close(self) -> None:
        self._journal.close()


Scores = dict[str, dict[int, dict[str, float]]]  # of a table's rows, by seed


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); NaN for a single value."""
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(scipy.stats.t.ppf(0.975, max(1, len(values) - 1)) * spread)


def shown(values: Sequence[float], digits: int = 4, unit: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}{unit}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def score_table(
    scores: Scores, patterns: Mapping[str, Mapping[int, str]], paper: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """A row a schedule. The change is that of the language loss against all F of the same seed, in per cent."""
    reference = next(iter(scores.values()))
    names = [name for name in next(iter(reference.values())) if all(name in e for row in scores.values() for e in row.values())]
    rows = []
    for row, entries in scores.items():
        changes = [100 * (entry["loss"] / reference[seed]["loss"] - 1) for seed, entry in entries.items()]
        cells = [shown([entry[name] for entry in entries.values()], 4 if "loss" in name else 2) for name in names]
        indexers = "/".join(dict.fromkeys(str(patterns[row][seed].count("F")) for seed in entries))
        rows.append([row, indexers, cells[0], shown(changes, 2), *cells[1:], str(paper.get(row, "-"))])
    return ["", "indexers", names[0], "change, %", *names[1:], "paper, Long"], rows


def proxy_table(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """How a step's flips are ordered by similarity and by loss: a row for every number of F layers before the step."""
    rows = []
    for steps in zip(*(one.steps for one in found), strict=False):
        if len(steps[0]["loss"]) < 3:
            continue
        correlations = [float(scipy.stats.spearmanr(step["similarity"], step["loss"]).statistic) for step in steps]
        spreads = [100 * (max(step["loss"]) / min(step["loss"]) - 1) for step in steps]
        chosen = [step["loss"][int(np.argmax(step["similarity"]))] for step in steps]
        regrets = [100 * (loss / min(step["loss"]) - 1) for loss, step in zip(chosen, steps, strict=True)]
        rows.append([str(steps[0]["full"]), shown(correlations, 2), shown(spreads, 2), shown(regrets, 2)])
    return ["F layers before", "rank correlation", "worst flip over best, %", "most similar flip over best, %"], rows


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
        steps = searched(studied, chosen, size, output, f"{name}-{seed}-{size}")
        rows[f"searched on {name}"] = search.first_step_with_at_most(steps, size).schedule
    return {
        row: {
            name: search.Evaluator(studied.params, studied.config, studied.base, inputs.batches(on)).loss(schedule)
            for name, on in held_out.items()
        }
        for row, schedule in rows.items()
    }


def load(checkpoint: inputs.Checkpoint) -> Model:
    """ValueError for a checkpoint that lacks the indexer of any layer."""
    config, base, stored = checkpoints_convert.load(checkpoint.directory)
    if base.num_full != base.num_layers:
        raise ValueError(
            f"--checkpoint={checkpoint.directory}: {base.pattern} lacks indexers; the tables start from all of them"
        )
    reader = inputs.reader(checkpoint.directory, config)
    params = jax.tree.map(lambda a, t: a.astype(t.dtype or checkpoint.dtype), stored, abstract(config, base))
    return Model(config, base, params, stored, reader, checkpoint.dtype)


def compile_all(studied: Model, stages: list[Stage]) -> None:
    """Compiles side by side what takes long: the search's programs and both stages' steps."""
    config, base, dtype = studied.config, studied.base, jnp.int32
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), studied.params)
    context, rows, layers = options.CONTEXT.value, options.BATCH_SIZE.value, base.num_layers
    one, batch = (jax.ShapeDtypeStruct((n, context), dtype) for n in (1, rows))
    number, choice, choices = (jax.ShapeDtypeStruct(*of) for of in (((), dtype), ((), bool), ((layers,), bool)))
    state = jax.eval_shape(layerwise.start, params, batch, config)
    traced = traced_schedule(base)
    programs: list[Callable[[], Any]] = [
        lambda: layerwise.hidden_states.lower(params, one, choices, config, base).compile(),
        lambda: layerwise.advance.lower(params, state, number, choice, config, base).compile(),
        lambda: layerwise.finish.lower(params, state, number, choices, batch, config, base).compile(),
        lambda: layerwise.compare.lower(params, state, number, state.indices, config, base).compile(),
        lambda: runs.compile_steps([stage for stage in stages if stage.steps], config, base, traced),
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(program) for program in programs]:
            done.result()


def within_the_limit(
    studied: Model, stages: list[Stage], count: int, begun: bool, other_seconds: float, output: Output, deadline: float
) -> list[Stage]:
    """The stages of one distillation, cut so that `count` of them, with other_seconds each for the rest, end in time.

    All rows of a table are trained alike, and the report says how long: the numbers are kept in the output's folder, a
    resumed run takes them from there, and cuts nothing where distillations have `begun` uncut, whatever time it is given.
    No stages where the time is not enough for any distillation.
    """
    path = output.directory / PLAN
    planned = options.RESUME.value and path.exists()
    if not planned and (not math.isfinite(deadline) or not count or begun):
        path.unlink(missing_ok=True)  # of another run
        return stages
    if not planned:
        traced = traced_schedule(studied.base)
        costs = [runs.seconds_per_step(studied.stored, s, studied.config, studied.base, traced) for s in stages]
        each = (deadline - FINISH_SECONDS - time.perf_counter()) / count - other_seconds
        fitted = runs.fit(stages, costs, (WARMUP_SHARE, 1 - WARMUP_SHARE), max(0.0, each))
        entries = [{"stage": s.name, "steps": s.steps, "seconds_per_step": c} for s, c in zip(fitted, costs, strict=True)]
        shown_ = ", ".join(f"{entry['stage']} {entry['steps']} x {entry['seconds_per_step']:.3f} s" for entry in entries)
        print(f"{each:.1f} s for each of {count} distillations: {shown_}", flush=True)
        if any(cut.steps < min(LEAST_STEPS, whole.steps) for cut, whole in zip(fitted, stages, strict=True)):
            print(f"--time_limit={options.TIME_LIMIT.value:g}: too little for them; --resume with more makes up for it")
            return []
        output.write(PLAN, json.dumps(entries, indent=1) + "\n")
    steps = [entry["steps"] for entry in json.loads(path.read_text(encoding="utf-8"))]
    return [dataclasses.replace(stage, steps=n) for stage, n in zip(stages, steps, strict=True)]


# ---- reading


def check_flags() -> None:
    """ValueError for what would else come to light when the searches are done."""
    options.check_positive("batch_size", "held_out_sequences", "sequences")
    inputs.share("retention", options.RETENTION.value)
    retentions, batch_size = options.RETENTIONS.value, options.BATCH_SIZE.value
    for retention in retentions:
        inputs.share("retentions", retention)
    counts = {"sequences": options.calibration_sequences(), "held_out_sequences": options.HELD_OUT_SEQUENCES.value}
    for name, count in counts.items():
        if count % batch_size:
            raise ValueError(f"--batch_size={batch_size}: does not divide --{name}={count}")
    free = [ALL_F, *(f"{retention} {kind}" for retention in retentions for kind in KINDS)]
    known = [*free, *(name + OWN for name in free)]
    if unknown := [name for name in _DISTILLED.value if name and name not in known]:
        raise ValueError(f"--distilled: {unknown[0]!r} is not one of {', '.join(map(repr, known))}")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is studied. distilled: the names of the schedules to train for, in `stages`; deadline: of time.perf_counter."""

    checkpoint: inputs.Checkpoint
    studied: Model
    domains: dict[str, Domain]
    seeds: range
    stages: list[Stage]
    distilled: list[str]
    deadline: float


def read_inputs(seed: int, deadline: float) -> Inputs:
    """All that is read, checked before anything takes long."""
    check_flags()
    checkpoint = inputs.checkpoint()
    studied, domains = load(checkpoint), read_domains()
    stages = inputs.distillation_stages(studied.reader.context, studied.dtype)
    names = [name for name in _DISTILLED.value if name] if any(stage.steps for stage in stages) else []
    print(f"{checkpoint.directory}: {studied.base.num_layers} layers; {studied.dtype} on {device()['kind']}")
    return Inputs(checkpoint, studied, domains, range(seed, seed + _SEEDS.value), stages, names, deadline)


def open_rows(given: Inputs, output: Output) -> Rows:
    """The rows that are finished; those of other weights or flags are refused."""
    not_asked = ("resume", "seeds", "time_limit", "distilled", "mesh")
    asked = {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(__name__) if f.name not in not_asked}
    weights = search.fingerprint(given.studied.params, [])["weights"]
    about = {"weights": weights, "dtype": given.studied.dtype, "flags": asked}
    return Rows(output.directory / ROWS, about, options.RESUME.value)


# ---- measuring


@dataclasses.dataclass(frozen=True)
class Result:
    """The tables: searches by seed, scores without training and after it, domains by seed, overlap of all F's selections.

    stages: as they were trained, none where nothing was.
    """

    searches: dict[int, Found]
    free: Scores
    trained: Scores
    domains: list[dict[str, dict[str, float]]]
    overlap: np.ndarray
    stages: list[Stage]

    @property
    def patterns(self) -> dict[str, dict[int, str]]:
        """By the name of a row and by seed."""
        return {
            name: {seed: found.patterns[name.removesuffix(OWN)] for seed, found in self.searches.items()}
            for name in [*self.free, *self.trained]
        }


def draw_all(given: Inputs, seed: int) -> tuple[np.ndarray, Sample]:
    """Cuts [N, S+1] to search on, with retrieval tasks as in the training text, and what to evaluate on."""
    domain, reader, count = given.domains["code"], given.studied.reader, options.calibration_sequences()
    cuts = reader.draw(domain.sides.train, domain.flag, count, seed)
    if options.WOVEN.value:
        stream = retrieval.weave(cuts.reshape(-1), reader.encoder, options.WOVEN.value, seed)
        cuts = text.sequences(stream, count, reader.context, seed)
    held_out = reader.draw(domain.sides.held_out, domain.flag, options.HELD_OUT_SEQUENCES.value, seed)
    return cuts, sample(held_out, reader.encoder, reader.context, seed)


def training_tokens(given: Inputs, stages: list[Stage], output: Output, seed: int) -> np.ndarray:
    """A stream for one seed's distillations, about as long as they need."""
    reader, documents = given.studied.reader, given.domains["code"].sides.train
    needed = sum(stage.steps * stage.sequences * stage.context for stage in stages) + 4 * reader.context
    tokens = data.pack(documents, reader.encoder, reader.separator, output.directory / f"tokens-{seed}.bin", seed, needed)
    return retrieval.weave(tokens, reader.encoder, options.WOVEN.value, seed) if options.WOVEN.value else tokens


def overlap_of(studied: Model, cuts: np.ndarray) -> list[list[float]]:
    """The mean overlap of the layers' selections [L][L] on cuts [N, S+1], to four digits."""
    matrix = layer_overlap(studied.params, studied.config, studied.base, inputs.batches(cuts))
    return [[round(float(value), 4) for value in row] for row in matrix]


def score_untrained(
    given: Inputs, drawn: Mapping[int, tuple[np.ndarray, Sample]], rows: Rows, output: Output
) -> tuple[dict[int, Found], Scores, float]:
    """The searches by seed, the scores of what they found, and the median of seconds that measuring one score took."""
    studied = given.studied
    searches: dict[int, Found] = {}
    scores: Scores = {}
    seconds: list[float] = []
    for seed in given.seeds:
        cuts, on = drawn[seed]
        searches[seed] = Found(**rows.once("schedules", seed, "", functools.partial(schedules, studied, cuts, output, seed)))
        for name, pattern in searches[seed].patterns.items():
            began = time.perf_counter()
            score = functools.partial(measure, studied.params, studied.config, studied.base, Schedule(pattern), on)
            scores.setdefault(name, {})[seed] = rows.once("training-free", seed, name, score)
            seconds.append(time.perf_counter() - began)
    return searches, scores, statistics.median(seconds)


def score_distilled(
    given: Inputs,
    searches: Mapping[int, Found],
    samples: Mapping[int, Sample],
    stages: list[Stage],
    rows: Rows,
    output: Output,
) -> Scores:
    """The scores of the schedules that are trained for; those for which no time is left are named and left out."""
    studied = given.studied
    scores: Scores = {}
    tokens_of = functools.cache(functools.partial(training_tokens, given, stages, output))

    def score(seed: int, name: str, schedule: Schedule) -> dict[str, float]:
        params = distilled(studied, name, schedule, stages, tokens_of(seed), output, seed)
        return measure(params, studied.config, studied.base, schedule, samples[seed])

    jobs = [*itertools.product(given.seeds, given.distilled)]
    total, done, began = sum(not rows.has("distilled", *job) for job in jobs), 0, time.perf_counter()
    for seed, name in jobs:
        known = rows.has("distilled", seed, name)
        if not known and time.perf_counter() > given.deadline - FINISH_SECONDS:
            limit = f"--time_limit={options.TIME_LIMIT.value:g}"
            print(f"{limit}: no time left for {name!r} of seed {seed}; --resume makes up for it")
            continue
        schedule = Schedule(searches[seed].patterns[name.removesuffix(OWN)])
        made = functools.partial(score, seed, name, schedule)
        scores.setdefault(name, {})[seed] = rows.once("distilled", seed, name, made)
        if not known:
            done += 1
            print(f"distillations: {time_left(done, total, began)}", flush=True)
    return scores


def measure_all(given: Inputs, rows: Rows, output: Output) -> Result:
    """Every row of the tables, as far as it is not known; distillations as far as there is time."""
    studied, first = given.studied, given.seeds[0]
    drawn = {seed: draw_all(given, seed) for seed in given.seeds}
    searches, free, seconds = score_untrained(given, drawn, rows, output)
    matrices = [
        rows.once("domains", seed, "", functools.partial(domain_matrix, studied, given.domains, seed, output))
        for seed in given.seeds
    ]
    heat = rows.once("overlap", first, "", lambda: overlap_of(studied, drawn[first][0]))
    count = sum(not rows.has("distilled", *job) for job in itertools.product(given.seeds, given.distilled))
    begun = rows.begun("distilled")
    stages = within_the_limit(studied, given.stages, count, begun, seconds + 2.0, output, given.deadline)
    samples = {seed: sample_ for seed, (_, sample_) in drawn.items()}
    trained = score_distilled(given, searches, samples, stages, rows, output) if stages else {}
    return Result(searches, free, trained, matrices, np.array(heat), stages if given.distilled else [])


# ---- the report


def plot_training(output: Output, names: Sequence[str], seed: int) -> None:
    """training.png: the divergence of every distillation of a seed over its steps; none where nothing was trained here."""
    folders = {name: run_folder(output, name, seed) for name in names}
    lines = {
        name: [(entry["step"], entry["indexer"]) for entry in runs.read_log(folder)]
        for name, folder in folders.items()
        if (folder / runs.LOG).exists()
    }
    if lines:
        panel = plots.Panel("Divergence of the indexers", "nats per token, all F layers", lines)
        plots.training_curves(output, [panel], "step (warm-up, then sparse)", (7, 4))


Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def tables(result: Result) -> list[Table]:
    """The report's tables."""
    found: list[Table] = [("Training-free", *score_table(result.free, result.patterns, PAPER))]
    if result.trained:
        found.append(("Distilled", *score_table(result.trained, result.patterns, PAPER_DISTILLED)))
    matrices, searches = result.domains, list(result.searches.values())
    columns = list(matrices[0][ALL_F])
    matrix_rows = [[row, *(shown([m[row][column] for m in matrices]) for column in columns)] for row in matrices[0]]
    found.append((f"Domains: held-out loss at {options.RETENTION.value}", ["", *(f"on {c}" for c in columns)], matrix_rows))
    calibration_rows = [[name, shown([one.calibration[name] for one in searches])] for name in searches[0].calibration]
    found.append(("Loss on what was searched on", ["", "loss"], calibration_rows))
    if (proxy := proxy_table(searches))[1]:
        found.append(("Similarity (the DP's measure) against loss, over the flips of each greedy step", *proxy))
    return found


def adjacent_and_all(matrix: np.ndarray) -> tuple[float, float]:
    """The mean overlap of adjacent layers and that of all pairs, of a matrix [L, L]."""
    return float(np.mean(np.diag(matrix, 1))), float(np.mean(matrix[np.triu_indices(len(matrix), 1)]))


def note(result: Result) -> str:
    """What the tables' figures are of."""
    adjacent, pairs = adjacent_and_all(result.overlap)
    able = [task for task in retrieval.TASKS if np.mean([entry[task] for entry in result.free[ALL_F].values()]) >= 0.5]
    lines = [
        f"Seeds: {_SEEDS.value}; intervals are 95 %, over seeds. Losses in nats per token at a context of",
        f"{options.CONTEXT.value}; long-range: the {_ORDER.value}-gram last occurred more than {_LONG.value} positions back;",
        f"retrieval: share of prompts answered; what all F answers at least half of: {', '.join(able) or 'nothing'}.",
        f"Overlap of selections: adjacent layers {adjacent:.3f} (paper 0.733), all pairs {pairs:.3f} (paper 0.622).",
        "A rank correlation of -1 says that similarity orders flips as the loss does; near 0 it says nothing about it.",
    ]
    lines += [
        f"Distillation, {stage.name}: {stage.steps} steps of {stage.sequences} x {stage.context} tokens, rates "
        f"{stage.model_learning_rate:g} (model) and {stage.indexer_learning_rate:g} (indexers)."
        for stage in result.stages
    ]
    return "\n".join(lines)


def report(result: Result, given: Inputs, output: Output, layout: devices.Layout) -> None:
    """Writes the plots, results.json and report.md, and prints the tables."""
    plots.overlap(output, result.overlap, given.studied.base, given.studied.base)
    plot_training(output, given.distilled, given.seeds[0])
    adjacent, pairs = adjacent_and_all(result.overlap)
    metrics: dict[str, Any] = {
        "checkpoint": given.checkpoint.directory,
        "training_free": result.free,
        "distilled": result.trained,
        "stages": [dataclasses.asdict(stage) for stage in result.stages],
        "patterns": result.patterns,
        "searches": [dataclasses.asdict(one) for one in result.searches.values()],
        "domains": result.domains,
        "overlap": {"matrix": result.overlap.tolist(), "adjacent": adjacent, "all pairs": pairs},
    }
    every, about = tables(result), note(result)
    sections = "\n\n".join(f"## {title}\n\n{markdown_table(header, rows)}" for title, header, rows in every)
    images = "![overlap](overlap.png)\n" + ("\n![training](training.png)\n" if result.trained else "")
    text = f"# Quality of {given.checkpoint.directory}\n\n{sections}\n\n{about}\n\n{images}"
    output.finish("quality", metrics, text, layout)
    for title, header, rows in every:
        print(f"\n{title}\n{text_table(header, rows)}")
    print(f"\n{about}\n\nwritten to {output.directory}/")


def run(output_dir: str, seed: int) -> None:
    began = time.perf_counter()
    layout = devices.layout(rows=1)
    with devices.in_force(layout, TRAINING):
        given = read_inputs(seed, began + options.seconds_to_spend(math.inf))
        output = Output.create(output_dir)
        rows = open_rows(given, output)
        if layout.num_devices == 1:  # a mesh's programs depend on where their arguments are
            compile_all(given.studied, given.stages if given.distilled else [])
        print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
        result = measure_all(given, rows, output)
    rows.close()
    report(result, given, output, layout)
