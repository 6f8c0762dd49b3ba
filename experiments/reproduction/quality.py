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
from experiments import distill
from experiments import search as search_experiment
from experiments.common import data, options, runs, text
from experiments.common.journal import Journal
from experiments.common.loss_journal import LossJournal
from experiments.common.report import Output, device, markdown_table, text_table
from experiments.common.runs import Saving, TrainingRun
from experiments.reproduction import ngram, retrieval
from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.distill import roles_of
from indexcache_jax.params import Params, abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import greedy as search
from indexcache_jax.search import layerwise
from indexcache_jax.search.overlap import overlap
from indexcache_jax.training import Stage

for _name in (
    *("checkpoint", "context", "batch_size", "held_out_sequences", "dtype", "resume", "retention"),
    *("retentions", "sequences", "blocks", "time_limit", "woven"),
    *("accumulate", "warmup_steps", "sparse_steps"),
    *("warmup_learning_rate", "indexer_learning_rate", "model_learning_rate"),
):
    flags.declare_key_flag(_name)

_SEEDS = flags.DEFINE_integer("seeds", 3, "how many seeds; fewer than 2 give no intervals", lower_bound=1)
_CODE = flags.DEFINE_string("code", "standard-library", "text of the model's own domain: globs, or installed-code")
_PROSE = flags.DEFINE_string("prose", "installed-prose", "text of another domain: globs")
_DISTILLED = flags.DEFINE_list(
    "distilled",
    ["DSA", "1/2 uniform", "1/2 searched", "1/2 uniform (own layer only)", "1/4 uniform"],
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
    "DSA": 50.2,
    "1/2 uniform": 47.4,
    "1/2 searched": 50.3,
    "1/4 uniform": 43.0,
    "1/4 searched": 49.9,
    "1/8 uniform": 35.3,
    "1/8 searched": 46.1,
}
PAPER_DISTILLED = {"DSA": 51.0, "1/2 uniform": 51.6, "1/2 searched": 50.6, f"1/2 uniform{OWN}": 49.8, "1/4 uniform": 50.6}


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
    """The checkpoint under study and how its text is read."""

    config: Config
    base: Schedule
    params: Params  # in the dtype to compute in
    stored: Params
    encoder: text.Bytes | text.FromFile
    separator: int | None
    dtype: str


@dataclasses.dataclass(frozen=True)
class Domain:
    """Documents to calibrate and train on, and documents to evaluate on."""

    train: list[text.Document]
    held_out: list[text.Document]


def domains() -> dict[str, Domain]:
    found = {
        "code": text.documents(_CODE.value),
        "prose": text.documents(_PROSE.value),
    }
    sides = {name: Domain([d for d in all_ if not d.held_out], [d for d in all_ if d.held_out]) for name, all_ in found.items()}
    for name, domain in sides.items():
        if not (domain.train and domain.held_out):
            raise ValueError(f"--{name}: {len(found[name])} file(s) are too few to keep some apart")
    return sides


def draw(studied: Model, documents: list[text.Document], flag: str, count: int, seed: int) -> np.ndarray:
    context = options.CONTEXT.value
    return search_experiment.draw(
        documents, f"--{flag}", studied.encoder, studied.separator, count, context, studied.config, seed
    )


def searched(studied: Model, cuts: np.ndarray, num_full: int, output: Output, name: str) -> list[search.Step]:
    """The steps of a greedy search; its evaluations are kept in the output's folder."""
    batches = search_experiment.batches(cuts)
    about = {"pattern": studied.base.pattern, "dtype": studied.dtype, **search.fingerprint(studied.params, batches)}
    with LossJournal(output.directory / f"search-{name}.jsonl", about) as log:
        losses = search.Evaluator(studied.params, studied.config, studied.base, batches, log)
        return search.greedy(losses, studied.base, num_full=num_full, blocks=flags.FLAGS.blocks)


@dataclasses.dataclass(frozen=True)
class Found:
    """The schedules of one seed by name, their losses on what they were searched on, and the search's steps beside the DP.

    steps[i]: F layers before a step of the greedy search, and of every flip it tried the likeness and the loss.
    """

    patterns: dict[str, str]
    calibration: dict[str, float]
    steps: list[dict[str, Any]]


def schedules(studied: Model, cuts: np.ndarray, output: Output, seed: int) -> dict[str, Any]:
    """Every schedule of the tables, searched on the cuts [N, S+1]: the fields of `Found`."""
    layers, batches = studied.base.num_layers, search_experiment.batches(cuts)
    sizes = {r: search_experiment.kept(layers, search_experiment.share("retentions", r)) for r in flags.FLAGS.retentions}
    steps = searched(studied, cuts, min(sizes.values()), output, f"code-{seed}")
    alike = search.similarities(studied.params, studied.config, studied.base, batches)
    found = {"DSA": studied.base}
    for retention, size in sizes.items():
        of_kinds = Schedule.uniform(layers, size), search.with_at_most(steps, size).schedule, search.most_similar(alike, size)
        found |= {f"{retention} {kind}": schedule for kind, schedule in zip(KINDS, of_kinds, strict=True)}
    losses = search.Evaluator(studied.params, studied.config, studied.base, batches)
    tried = [
        {
            "full": before.schedule.num_full,
            "likeness": [search.likeness(alike, before.schedule.shared(layer)) for layer in step.candidates],
            "loss": list(step.candidates.values()),
        }
        for before, step in itertools.pairwise(steps)
    ]
    patterns = {name: schedule.pattern for name, schedule in found.items()}
    calibration = {name: losses.loss(schedule) for name, schedule in found.items()}
    return dataclasses.asdict(Found(patterns, calibration, tried))


def plan(studied: Model) -> list[Stage]:
    return distill.stages(options.CONTEXT.value, studied.dtype)


def distilled(
    studied: Model, name: str, schedule: Schedule, stages: list[Stage], tokens: np.ndarray, output: Output, seed: int
) -> Params:
    """The checkpoint after both stages, in the dtype to compute in. S layers keep an indexer, which nothing reads."""
    looks = max(1, min([50, *(stage.steps // 4 for stage in stages if stage.steps)]))
    roles = roles_of(schedule, cross_layer=not name.endswith(OWN))
    training_run = TrainingRun(tokens, stages, studied.config, studied.base, seed, roles)
    folder = Output.create(str(run_folder(output, name, seed)))
    trained = runs.train(studied.stored, training_run, folder, resume=False, saving=Saving(every=None, log_every=looks))
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
    """How a step's flips are ordered by likeness and by loss: a row for every number of F layers before the step."""
    rows = []
    for steps in zip(*(one.steps for one in found), strict=False):
        if len(steps[0]["loss"]) < 3:
            continue
        correlations = [float(scipy.stats.spearmanr(step["likeness"], step["loss"]).statistic) for step in steps]
        spreads = [100 * (max(step["loss"]) / min(step["loss"]) - 1) for step in steps]
        chosen = [step["loss"][int(np.argmax(step["likeness"]))] for step in steps]
        regrets = [100 * (loss / min(step["loss"]) - 1) for loss, step in zip(chosen, steps, strict=True)]
        rows.append([str(steps[0]["full"]), shown(correlations, 2), shown(spreads, 2), shown(regrets, 2)])
    return ["F layers before", "rank correlation", "worst flip over best, %", "likest flip over best, %"], rows


def domain_matrix(studied: Model, found: dict[str, Domain], seed: int, output: Output) -> dict[str, dict[str, float]]:
    """Held-out loss by the domain that a schedule at --retention was searched on (rows) and is evaluated on."""
    layers, count = studied.base.num_layers, flags.FLAGS.sequences
    size = search_experiment.kept(layers, search_experiment.share("retention", options.RETENTION.value))
    cuts = {name: draw(studied, domain.train, name, count, seed) for name, domain in found.items()}
    held_out = {
        name: draw(studied, domain.held_out, name, options.HELD_OUT_SEQUENCES.value, seed) for name, domain in found.items()
    }
    cuts["both"] = np.concatenate([part[: -(-count // 2)] for part in cuts.values()])[: max(count, 2)]
    rows = {"DSA": studied.base, "uniform": Schedule.uniform(layers, size)}
    for name, chosen in cuts.items():
        steps = searched(studied, chosen, size, output, f"{name}-{seed}-{size}")
        rows[f"searched on {name}"] = search.with_at_most(steps, size).schedule
    return {
        row: {
            name: search.Evaluator(studied.params, studied.config, studied.base, search_experiment.batches(on)).loss(schedule)
            for name, on in held_out.items()
        }
        for row, schedule in rows.items()
    }


def load(checkpoint: str) -> Model:
    dtype = options.DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config, base, stored = checkpoints_convert.load(checkpoint)
    if base.num_full != base.num_layers:
        raise ValueError(f"--checkpoint={checkpoint}: {base.pattern} lacks indexers; the tables start from all of them")
    context = options.CONTEXT.value
    if not config.index_topk < context <= config.max_position_embeddings:
        raise ValueError(
            f"--context={context}: must be above index_topk = {config.index_topk}, up to which everything is selected, "
            f"and at most {config.max_position_embeddings}, the model's longest"
        )
    params = jax.tree.map(lambda a, t: a.astype(t.dtype or dtype), stored, abstract(config, base))
    return Model(config, base, params, stored, text.tokenizer(checkpoint), search_experiment.separator(config), dtype)


def compile_all(studied: Model, stages: list[Stage]) -> None:
    """Compiles side by side what takes long: the search's programs and both stages' steps."""
    config, base, dtype = studied.config, studied.base, jnp.int32
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), studied.params)
    context, rows, layers = options.CONTEXT.value, options.BATCH_SIZE.value, base.num_layers
    one, batch = (jax.ShapeDtypeStruct((n, context), dtype) for n in (1, rows))
    number, choice, choices = (jax.ShapeDtypeStruct(*of) for of in (((), dtype), ((), bool), ((layers,), bool)))
    state = jax.eval_shape(layerwise.start, params, batch, config)
    roles = roles_of(base)
    programs: list[Callable[[], Any]] = [
        lambda: layerwise.hidden_states.lower(params, one, choices, config, base).compile(),
        lambda: layerwise.advance.lower(params, state, number, choice, config, base).compile(),
        lambda: layerwise.finish.lower(params, state, number, choices, batch, config, base).compile(),
        lambda: layerwise.compare.lower(params, state, number, state.indices, config, base).compile(),
        lambda: runs.compile_steps([stage for stage in stages if stage.steps], config, base, roles),
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
        roles = roles_of(studied.base)
        costs = [runs.seconds_per_step(studied.stored, s, studied.config, studied.base, roles) for s in stages]
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


def check_flags() -> None:
    """ValueError for what would else come to light when the searches are done."""
    values = flags.FLAGS
    search_experiment.share("retention", options.RETENTION.value)
    for retention in values.retentions:
        search_experiment.share("retentions", retention)
    for flag in ("sequences", "held_out_sequences"):
        if values[flag].value % values.batch_size:
            raise ValueError(f"--batch_size={values.batch_size}: does not divide --{flag}={values[flag].value}")
    free = ["DSA", *(f"{retention} {kind}" for retention in values.retentions for kind in KINDS)]
    known = [*free, *(name + OWN for name in free)]
    if unknown := [name for name in _DISTILLED.value if name and name not in known]:
        raise ValueError(f"--distilled: {unknown[0]!r} is not one of {', '.join(map(repr, known))}")


def run(output_dir: str, seed: int) -> None:
    began = time.perf_counter()
    deadline = began + options.seconds_to_spend(math.inf)
    values = flags.FLAGS
    search_experiment.positive(
        batch_size=values.batch_size, held_out_sequences=values.held_out_sequences, sequences=values.sequences
    )
    check_flags()
    checkpoint = options.CHECKPOINT.value or str(options.DEMO)
    studied, found = load(checkpoint), domains()
    output, seeds = Output.create(output_dir), range(seed, seed + _SEEDS.value)
    not_asked = ("resume", "seeds", "time_limit", "distilled")
    asked = {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(__name__) if f.name not in not_asked}
    weights = search.fingerprint(studied.params, [])["weights"]
    rows = Rows(output.directory / ROWS, {"weights": weights, "dtype": studied.dtype, "flags": asked}, options.RESUME.value)
    print(f"{checkpoint}: {studied.base.num_layers} layers; {studied.dtype} on {device()['kind']}")
    stages = plan(studied)
    wanted = [name for name in _DISTILLED.value if name] if any(stage.steps for stage in stages) else []
    compile_all(studied, stages if wanted else [])
    print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)

    drawn = {s: draw_all(studied, found, s) for s in seeds}
    searches: dict[int, Found] = {}
    free: Scores = {}
    times: list[float] = []
    for s in seeds:
        cuts, on = drawn[s]
        searches[s] = Found(**rows.once("schedules", s, "", functools.partial(schedules, studied, cuts, output, s)))
        for name, pattern in searches[s].patterns.items():
            started = time.perf_counter()
            untrained = functools.partial(measure, studied.params, studied.config, studied.base, Schedule(pattern), on)
            free.setdefault(name, {})[s] = rows.once("training-free", s, name, untrained)
            times.append(time.perf_counter() - started)
    matrices = [rows.once("domains", s, "", functools.partial(domain_matrix, studied, found, s, output)) for s in seeds]
    heat = rows.once("overlap", seed, "", lambda: overlap_of(studied, drawn[seed][0]))

    trained: Scores = {}
    jobs = [(s, name) for s in seeds for name in wanted]
    to_do = sum(not rows.has("distilled", s, name) for s, name in jobs)
    begun_ = rows.begun("distilled")
    stages = within_the_limit(studied, stages, to_do, begun_, statistics.median(times) + 2.0, output, deadline)
    jobs = jobs if stages else []
    tokens_of = functools.cache(lambda s: training_tokens(studied, found, stages, output, s))
    for s, name in jobs:
        if not rows.has("distilled", s, name) and time.perf_counter() > deadline - FINISH_SECONDS:
            print(f"--time_limit={options.TIME_LIMIT.value:g}: no time left for {name!r} of seed {s}; --resume makes up for it")
            continue
        schedule = Schedule(searches[s].patterns[name.removesuffix(OWN)])

        def after_training(s: int = s, name: str = name, schedule: Schedule = schedule) -> dict[str, float]:
            params = distilled(studied, name, schedule, stages, tokens_of(s), output, s)
            return measure(params, studied.config, studied.base, schedule, drawn[s][1])

        trained.setdefault(name, {})[s] = rows.once("distilled", s, name, after_training)
    rows.close()
    patterns = {name: {s: searches[s].patterns[name.removesuffix(OWN)] for s in seeds} for name in [*free, *trained]}
    search_experiment.plot_overlap(output, np.array(heat), studied.base, studied.base)
    plot_training(output, wanted, seeds)
    finish(
        output, checkpoint, free, trained, patterns, list(searches.values()), matrices, np.array(heat), stages if wanted else []
    )


def draw_all(studied: Model, found: dict[str, Domain], seed: int) -> tuple[np.ndarray, Sample]:
    """Cuts [N, S+1] to search on, with retrieval tasks as in the training text, and what to evaluate on."""
    context, count = options.CONTEXT.value, flags.FLAGS.sequences
    cuts = draw(studied, found["code"].train, "code", count, seed)
    if options.WOVEN.value:
        stream = retrieval.weave(cuts.reshape(-1), studied.encoder, options.WOVEN.value, seed)
        cuts = text.sequences(stream, count, context, seed)
    held_out = draw(studied, found["code"].held_out, "code", flags.FLAGS.held_out_sequences, seed)
    return cuts, sample(held_out, studied.encoder, context, seed)


def training_tokens(studied: Model, found: dict[str, Domain], stages: list[Stage], output: Output, seed: int) -> np.ndarray:
    """A stream for one seed's distillations, about as long as they need."""
    needed = sum(stage.steps * stage.sequences * stage.context for stage in stages) + 4 * options.CONTEXT.value
    path = output.directory / f"tokens-{seed}.bin"
    tokens = data.pack(found["code"].train, studied.encoder, studied.separator, path, seed, needed)
    return retrieval.weave(tokens, studied.encoder, options.WOVEN.value, seed) if options.WOVEN.value else tokens


def overlap_of(studied: Model, cuts: np.ndarray) -> list[list[float]]:
    found = overlap(studied.params, studied.config, studied.base, search_experiment.batches(cuts))
    return [[round(float(value), 4) for value in row] for row in found]


def plot_training(output: Output, names: Sequence[str], seeds: Sequence[int]) -> None:
    """The divergence of every distillation of the first seed, over its steps."""
    from matplotlib.figure import Figure

    logs = {name: run_folder(output, name, seeds[0]) for name in names}
    logs = {name: folder for name, folder in logs.items() if (folder / runs.LOG).exists()}
    if not logs:
        return
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, folder in logs.items():
        entries = runs.read_log(folder)
        axes.plot([entry["step"] for entry in entries], [entry["indexer"] for entry in entries], label=name, linewidth=1)
    axes.set(xlabel="step (warm-up, then sparse)", ylabel="nats per token, all F layers", title="Divergence of the indexers")
    axes.legend()
    output.save_figure(figure, "training.png")


def finish(
    output: Output,
    checkpoint: str,
    free: Scores,
    trained: Scores,
    patterns: dict[str, dict[int, str]],
    searches: list[Found],
    matrices: list[dict[str, dict[str, float]]],
    heat: np.ndarray,
    stages: list[Stage],
) -> None:
    tables: list[tuple[str, list[str], list[list[str]]]] = [("Training-free", *score_table(free, patterns, PAPER))]
    if trained:
        tables.append(("Distilled", *score_table(trained, patterns, PAPER_DISTILLED)))
    columns = list(matrices[0]["DSA"])
    matrix_rows = [[row, *(shown([m[row][column] for m in matrices]) for column in columns)] for row in matrices[0]]
    tables.append((f"Domains: held-out loss at {options.RETENTION.value}", ["", *(f"on {c}" for c in columns)], matrix_rows))
    calibration_rows = [[name, shown([one.calibration[name] for one in searches])] for name in searches[0].calibration]
    tables.append(("Loss on what was searched on", ["", "loss"], calibration_rows))
    if (proxy := proxy_table(searches))[1]:
        tables.append(("Likeness (the DP's measure) against loss, over the flips of each greedy step", *proxy))
    adjacent = float(np.mean(np.diag(heat, 1)))
    pairs = float(np.mean(heat[np.triu_indices(len(heat), 1)]))
    able = [task for task in retrieval.TASKS if np.mean([entry[task] for entry in free["DSA"].values()]) >= 0.5]
    lines = [
        f"Seeds: {_SEEDS.value}; intervals are 95 %, over seeds. Losses in nats per token at a context of",
        f"{options.CONTEXT.value}; long-range: the {_ORDER.value}-gram last occurred more than {_LONG.value} positions back;",
        f"retrieval: share of prompts answered; what all F answers at least half of: {', '.join(able) or 'nothing'}.",
        f"Overlap of selections: adjacent layers {adjacent:.3f} (paper 0.733), all pairs {pairs:.3f} (paper 0.622).",
        "A rank correlation of -1 says that likeness orders flips as the loss does; near 0 it says nothing about it.",
    ]
    lines += [
        f"Distillation, {stage.name}: {stage.steps} steps of {stage.sequences} x {stage.context} tokens, rates "
        f"{stage.model_learning_rate:g} (model) and {stage.indexer_learning_rate:g} (indexers)."
        for stage in stages
    ]
    note = "\n".join(lines)
    metrics: dict[str, Any] = {
        "checkpoint": checkpoint,
        "training_free": free,
        "distilled": trained,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "patterns": patterns,
        "searches": [dataclasses.asdict(one) for one in searches],
        "domains": matrices,
        "overlap": {"matrix": heat.tolist(), "adjacent": adjacent, "all pairs": pairs},
    }
    sections = "\n\n".join(f"## {title}\n\n{markdown_table(header, rows)}" for title, header, rows in tables)
    images = "![overlap](overlap.png)\n" + ("\n![training](training.png)\n" if trained else "")
    output.finish("quality", metrics, f"# Quality of {checkpoint}\n\n{sections}\n\n{note}\n\n{images}")
    for title, header, rows in tables:
        print(f"\n{title}\n{text_table(header, rows)}")
    print(f"\n{note}\n\nwritten to {output.directory}/")
