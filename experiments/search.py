"""Searches an F/S schedule for a checkpoint on calibration text, and says what it costs and what it gains."""

from __future__ import annotations

import dataclasses
import fractions
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import devices, engines, fit, inputs, journal, options, plots, search_noise
from experiments.common.loss_journal import LossJournal
from experiments.common.report import Output, device, markdown_table, progress, text_table
from indexcache_jax import memory, search, serving
from indexcache_jax.config import Config
from indexcache_jax.layers import shardings_in_force
from indexcache_jax.params import Params, abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import overlap
from indexcache_jax.search.streamed import StreamedEvaluator
from indexcache_jax.sharding import SERVING

LOG = "evaluations.jsonl"
TIMED_RUNS = 3
STREAMED_GROWTH = 2.0  # of a race's comparisons, each of which reads all weights
OVERLAP_BATCHES = 2

for _name in (
    *("checkpoint", "dtype", "weights", "context", "text", "held_out", "sequences", "held_out_sequences", "batch_size"),
    *("retention", "retentions", "blocks", "stream", "stream_memory", "resume", "mesh"),
):
    flags.declare_key_flag(_name)
_LOSS_BUDGET = flags.DEFINE_float(
    "loss_budget", None, "instead of --retention: flip as long as the calibration loss grows by at most this share, as 0.01"
)
_STRATEGY = flags.DEFINE_enum(
    "strategy",
    "greedy",
    ["greedy", "floating", "similarity"],
    "greedy on the loss; floating, which also takes flips back or exchanges them; or the similarity DP",
)
_RACE = flags.DEFINE_float(
    "race",
    0.05,
    "probability, at most, that dropping schedules which cannot win changes the result; 0 measures each on all sequences",
    0.0,
    0.5,
)
_COMPARE = flags.DEFINE_list("compare", [], "patterns of F and S that the table has besides, such as published ones")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "check all that is read and say what the search takes, but search nothing")
_TIME = flags.DEFINE_bool(
    "time_prefill", True, "measure prefill under every schedule, once the search is done; not with --stream"
)

# ---- what is searched


class Model(Protocol):
    """A checkpoint's model, of which losses and selections can be measured."""

    @property
    def config(self) -> Config: ...

    @property
    def schedule(self) -> Schedule:
        """The checkpoint's own schedule, where the search starts."""

    def evaluator(
        self, batches: list[np.ndarray], progress: Callable[[int], object], log: search.LossLog | None = None
    ) -> search.Evaluator | StreamedEvaluator: ...

    def about(self, batches: list[np.ndarray]) -> dict[str, Any]:
        """What a loss depends on besides the schedule, for the log of the search."""

    def overlap(self, batches: list[np.ndarray]) -> np.ndarray:
        """Mean overlap |A n B| / k [num_full, num_full] of the F layers' selections."""


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A model whose params are on the device."""

    config: Config
    schedule: Schedule
    params: Params

    def evaluator(
        self, batches: list[np.ndarray], progress: Callable[[int], object], log: search.LossLog | None = None
    ) -> search.Evaluator:
        return search.Evaluator(self.params, self.config, self.schedule, batches, log, progress)

    def about(self, batches: list[np.ndarray]) -> dict[str, Any]:
        dtype = str(self.params.embedding.dtype)
        return {"pattern": self.schedule.pattern, "dtype": dtype, **search.fingerprint(self.params, batches)}

    def overlap(self, batches: list[np.ndarray]) -> np.ndarray:
        return overlap.layer_overlap(self.params, self.config, self.schedule, batches)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A model whose weights stay in the checkpoint. stream_memory: bytes of host memory for hidden states."""

    layers: checkpoints_convert.Layers
    stream_memory: int

    @property
    def config(self) -> Config:
        return self.layers.config

    @property
    def schedule(self) -> Schedule:
        return self.layers.schedule

    def evaluator(
        self, batches: list[np.ndarray], progress: Callable[[int], object], log: search.LossLog | None = None
    ) -> StreamedEvaluator:
        return StreamedEvaluator(self.layers, batches, log, progress, self.stream_memory)

    def about(self, batches: list[np.ndarray]) -> dict[str, Any]:
        """The first and the last layer speak for all: reading every one takes as long as a step of the search."""
        shardings, last = shardings_in_force(self.layers), self.config.num_layers - 1
        ends = self.layers.ends(shardings)
        weights = search.fingerprint((ends, self.layers.layer(0, shardings), self.layers.layer(last, shardings)), batches)
        return {"pattern": self.schedule.pattern, "dtype": str(ends.embedding.dtype), **weights}

    def overlap(self, batches: list[np.ndarray]) -> np.ndarray:
        queries = overlap.spread(batches[0].shape[1] - 1, self.config.index_topk)
        with progress(total=len(batches) * self.config.num_layers, unit="layer", desc="overlap") as bar:
            selections = self.evaluator(batches, bar.update).selections(self.schedule, range(len(batches)), queries)
        return overlap.mean_overlap(selections, self.config.index_topk)


def open_model(checkpoint: inputs.Checkpoint) -> Model:
    """The checkpoint's model, in memory or, with --stream, read as it is needed.

    ValueError for one that is to be in memory and does not fit the device's.
    """
    asked: dict[str, Any] = {"dtype": checkpoint.dtype, "weights": checkpoint.weights}
    if options.STREAM.value:
        return Streamed(checkpoints_convert.Layers(checkpoint.directory, **asked), int(1e9 * options.STREAM_MEMORY.value))
    rows, context = options.BATCH_SIZE.value, options.CONTEXT.value
    fit.search(*inputs.described(checkpoint.directory), rows=rows, context=context, **asked)
    return InMemory(*checkpoints_convert.load(checkpoint.directory, **asked))


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a schedule is searched for. retentions: shares of F layers that the table compares; target: that of the result.

    budget: the share by which the calibration loss may grow, which then decides instead of `target`, or None.
    """

    retentions: list[fractions.Fraction]
    target: fractions.Fraction
    budget: float | None
    strategy: str
    blocks: int
    compare: tuple[Schedule, ...] = ()  # that the table has besides

    def sizes(self, base: Schedule) -> list[int]:
        """The numbers of F layers at all retentions, the most first."""
        return sorted({self.size(base, retention) for retention in [*self.retentions, self.target]}, reverse=True)

    def size(self, base: Schedule, retention: fractions.Fraction) -> int:
        """The number of F layers at a retention, but no more than the checkpoint has."""
        return min(base.num_full, inputs.kept(base.num_layers, retention))

    def label(self, base: Schedule, size: int) -> str:
        """What the table calls a number of F layers: the retention asked for, else a fraction of the layers."""
        asked = (r for r in self.retentions if inputs.kept(base.num_layers, r) == size)
        return str(next(asked, f"{size}/{base.num_layers}"))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a search reads besides the model: batches [B, S+1] to search on and to evaluate on, and its goal."""

    checkpoint: inputs.Checkpoint
    calibration: list[np.ndarray]
    held_out: list[np.ndarray]
    goal: Goal
    text: dict[str, Any]  # what was read, for the report


def read_goal(base: Schedule) -> Goal:
    """The goal that the flags give for a checkpoint's schedule; ValueError where they contradict each other or it."""
    budget, strategy = _LOSS_BUDGET.value, _STRATEGY.value
    if budget is not None and (not budget >= 0 or strategy == "similarity"):
        raise ValueError(f"--loss_budget={budget}: must be at least 0, and needs --strategy=greedy or floating")
    if budget is not None and options.RETENTION.present:
        raise ValueError(
            f"--retention={options.RETENTION.value}: counts for nothing beside --loss_budget={budget}; leave one out"
        )
    if options.BLOCKS.value > base.num_layers:
        raise ValueError(f"--blocks={options.BLOCKS.value}: the model has {base.num_layers} layers")
    if options.STREAM.value and strategy == "similarity":
        raise ValueError(f"--strategy={strategy}: needs the whole model in memory, so not with --stream")
    if strategy == "floating" and options.BLOCKS.value > 1:
        raise ValueError(f"--blocks={options.BLOCKS.value}: --strategy=floating has no blocks, it changes one layer at a time")
    retentions = [inputs.share("retentions", value) for value in options.RETENTIONS.value]
    target = inputs.share("retention", options.RETENTION.value)
    return Goal(retentions, target, budget, strategy, options.BLOCKS.value, patterns_to_compare(base))


def patterns_to_compare(base: Schedule) -> tuple[Schedule, ...]:
    """The schedules of --compare; ValueError for one that the checkpoint has no indexers for."""
    found = []
    for pattern in _COMPARE.value:
        schedule = Schedule.parse(pattern, base.num_layers, f"--compare={pattern}")
        if lacking := [layer for layer in schedule.full_layers if not base.is_full[layer]]:
            raise ValueError(f"--compare={pattern}: layer {lacking[0]} is F, but the checkpoint has no indexer for it")
        found.append(schedule)
    return tuple(dict.fromkeys(found))


def read_inputs(seed: int) -> tuple[Inputs, Model]:
    """All that is read, checked before anything takes long. The model comes apart, so that it can be let go of first."""
    options.check_positive("sequences", "held_out_sequences", "blocks")
    checkpoint = inputs.checkpoint()
    config, base = inputs.described(checkpoint.directory)
    goal = read_goal(base)
    if goal.strategy == "greedy":
        size = None
        if options.STREAM.value:
            size = memory.tree_bytes(abstract(config, base), checkpoint.dtype, memory.mesh_of(), SERVING)
        rows = options.BATCH_SIZE.value
        batches = options.calibration_sequences() // rows
        print(cost(base, goal, batches, rows * options.CONTEXT.value, size), flush=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}")
        model = open_model(checkpoint)
    reader = inputs.reader(checkpoint.directory, model.config)
    sides = inputs.split(options.TEXT.value, options.HELD_OUT.value)
    calibration = reader.draw(sides.train, "text", options.calibration_sequences(), seed)
    held_out = reader.draw(sides.held_out, "held_out", options.HELD_OUT_SEQUENCES.value, seed)
    about = about_text(sides, reader, calibration, held_out)
    given = Inputs(checkpoint, inputs.batches(calibration), inputs.batches(held_out), goal, about)
    config, base = model.config, model.schedule
    on = f"{checkpoint.dtype} on {device()['kind']}"
    print(f"{checkpoint.directory}: {config.num_layers} layers, {base.num_full} indexers; {on}")
    print(f"{len(calibration)} sequences of {reader.context} tokens to search on, {len(held_out)} to evaluate on")
    return given, model


def about_text(sides: inputs.Sides, reader: inputs.Reader, calibration: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """What was read, for the report: where from, documents, and the tokens of the sequences drawn from them."""
    return {
        "text": options.TEXT.value or "standard-library",
        "held_out": options.HELD_OUT.value or "a tenth of the documents, by the hash of their names",
        "documents": len(sides.train),
        "held_out_documents": len(sides.held_out),
        "calibration_tokens": int(calibration[:, 1:].size),
        "held_out_tokens": int(held_out[:, 1:].size),
        "tokenizer": reader.encoder.identity,
    }


# ---- the search


@dataclasses.dataclass(frozen=True)
class Row:
    """One schedule of the table and its losses in nats per token on each held-out sequence."""

    name: str
    schedule: Schedule
    losses: tuple[float, ...]

    @property
    def held_out_loss(self) -> float:
        return statistics.fmean(self.losses)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found: its steps (none with the similarity DP), the table's rows, the first of them the checkpoint's own
    schedule, the schedule it chose, and the mean overlap [num_full, num_full] of the F layers' selections."""

    config: Config
    base: Schedule
    steps: list[search.Step]
    rows: list[Row]
    chosen: Schedule
    overlap: np.ndarray

    @property
    def schedules(self) -> list[Schedule]:
        return [row.schedule for row in self.rows]


def find(
    model: Model, calibration: list[np.ndarray], goal: Goal, output: Output
) -> tuple[list[search.Step], dict[int, Schedule]]:
    """The search's steps, none with the similarity DP, and the schedule found for each number of F layers that was reached."""
    config, base, sizes = model.config, model.schedule, goal.sizes(model.schedule)
    with progress(unit="layer", desc="search", smoothing=0.05) as bar:
        if isinstance(model, InMemory) and goal.strategy == "similarity":
            bar.total = len(calibration) * sum(range(1, config.num_layers + 1))
            matrix = search.similarities(model.params, config, base, calibration, bar.update)
            return [], {size: search.most_similar(matrix, size) for size in sizes}
        path = output.directory / LOG
        if not options.RESUME.value:
            journal.set_aside(path)
        if goal.strategy == "greedy":  # what the floating search will try is not known
            bar.total = len(calibration) * search.layers_to_run(base, min(sizes), goal.blocks)
        with LossJournal(path, model.about(calibration)) as log:
            losses = model.evaluator(calibration, bar.update, log)
            for line in losses.advice():
                bar.write(f"note: {line}")
            growth = STREAMED_GROWTH if options.STREAM.value else search.Race.growth
            race = search.Race(_RACE.value, growth=growth) if _RACE.value else None
            steps = search_down(losses, base, goal, race)
        bar.total = bar.n
        bar.refresh()
    by_size = {step.schedule.num_full: step.schedule for step in steps}
    return steps, {size: by_size[size] for size in sizes if size in by_size}


def search_down(losses: search.LossOracle, base: Schedule, goal: Goal, race: search.Race | None = None) -> list[search.Step]:
    """The steps of the goal's strategy: a schedule at every size of the goal, as far as the budget allows, and to its end.

    race: how schedules are dropped that cannot win, with an error for all steps together.
    """
    most = math.inf
    if goal.budget is not None:
        most = float(losses.sequence_losses([base])[0].mean()) * (1 + goal.budget)
    end = min(goal.sizes(base)) if goal.budget is None else 1
    # Steps of several flips would pass a size by, so each is a search of its own.
    ends = sorted({*goal.sizes(base), end}, reverse=True) if goal.blocks > 1 and goal.strategy == "greedy" else [end]
    dropping = race and dataclasses.replace(race, error=race.error / len(ends))
    steps: list[search.Step] = []
    for size in ends:
        start = steps[-1].schedule if steps else base
        if goal.strategy == "floating":
            found = search.floating_search(losses, start, race=dropping, num_full=size, max_loss=most)
        else:
            found = search.greedy_search(losses, start, race=dropping, blocks=goal.blocks, num_full=size, max_loss=most)
        steps += found[1:] if steps else found
        if steps[-1].schedule.num_full > size:  # the next step would exceed the budget
            break
    return steps


class _Counter:
    """A `search.LossOracle` that counts the schedules it is asked for, each of which it takes for nothing.

    passes: how often it was asked for some, which a streamed model is read for.
    """

    num_batches = rows = 1

    def __init__(self) -> None:
        self.known: set[Schedule] = set()
        self.passes = 0

    def sequence_losses(
        self, schedules: Sequence[Schedule], base: Schedule | None = None, batches: Sequence[int] | None = None
    ) -> np.ndarray:
        self.passes += not self.known.issuperset(schedules)
        self.known |= set(schedules)
        return np.zeros((len(schedules), 1 if batches is None else len(batches)))


def cost(base: Schedule, goal: Goal, batches: int, tokens: int, model_bytes: int | None) -> str:
    """What a greedy search takes at most, in a sentence. model_bytes: of a streamed model, which every pass reads."""
    counter = _Counter()
    search_down(counter, base, goal)
    layers = batches * search.layers_to_run(base, min(goal.sizes(base)), goal.blocks)
    found = f"the search measures at most {len(counter.known):,} losses on {batches} batches of {tokens:,} tokens"
    found += f", about {layers:,} layers of a batch"
    if model_bytes is not None:
        found += f", and reads the weights at least {counter.passes:,} times, {counter.passes * model_bytes / 1e12:,.1f} TB"
    return found


def choose(steps: list[search.Step], by_size: dict[int, Schedule], base: Schedule, goal: Goal) -> Schedule:
    """The schedule that the goal asks for, of those that were found: the last within the budget, or that of its size."""
    return by_size[goal.size(base, goal.target)] if goal.budget is None else steps[-1].schedule


def compared(by_size: dict[int, Schedule], base: Schedule, chosen: Schedule, goal: Goal) -> list[tuple[str, Schedule]]:
    """The table's schedules with their names: the checkpoint's, and at every size a uniform one and the one found."""
    strategy = "similarity" if goal.strategy == "similarity" else "searched"
    named = [(options.ALL_F if base.num_full == base.num_layers else "as shipped", base)]
    for size in goal.sizes(base):
        uniform = Schedule.uniform(base.num_layers, size)
        if all(base.is_full[layer] for layer in uniform.full_layers):
            named.append((f"{goal.label(base, size)} uniform", uniform))
        if size in by_size:
            named.append((f"{goal.label(base, size)} {strategy}", by_size[size]))
    if chosen not in [schedule for _, schedule in named]:
        named.append(("within the budget", chosen))
    given = (schedule for schedule in goal.compare if schedule not in [other for _, other in named])
    return named + [(f"{schedule.num_full}/{schedule.num_layers} given", schedule) for schedule in given]


def run_search(model: Model, given: Inputs, output: Output) -> Result:
    """Searches, and evaluates what was found and what it is compared with on the held-out batches."""
    base, goal = model.schedule, given.goal
    steps, by_size = find(model, given.calibration, goal, output)
    chosen = choose(steps, by_size, base, goal)
    named = compared(by_size, base, chosen, goal)
    schedules = [schedule for _, schedule in named]
    total = len(schedules) * len(given.held_out) * model.config.num_layers
    with progress(total=total, unit="layer", desc="held-out") as bar:
        losses = model.evaluator(given.held_out, bar.update).sequence_losses(schedules)
        bar.total = bar.n  # streamed schedules share layers
    rows = [
        Row(name, schedule, tuple(by_sequence)) for (name, schedule), by_sequence in zip(named, losses.tolist(), strict=True)
    ]
    return Result(model.config, base, steps, rows, chosen, model.overlap(given.calibration[:OVERLAP_BATCHES]))


def prefill_seconds(checkpoint: inputs.Checkpoint, schedules: list[Schedule], tokens: np.ndarray) -> list[float | None]:
    """The median time of prefilling tokens [B, S] into an empty cache under each schedule, the schedules taking turns.

    The weights are read from the checkpoint once more, as inference runs them, so that they are in memory once where the
    caller has let go of the search's. None for every schedule where nothing is to be measured.
    """
    if options.STREAM.value or not _TIME.value:
        return [None for _ in schedules]
    with warnings.catch_warnings(action="ignore"):  # they came when the model was opened
        config, _, weights = checkpoints_convert.load(
            checkpoint.directory, dtype=checkpoint.dtype, form="serving", weights=checkpoint.weights
        )
    batch, length = tokens.shape
    models = [serving.restrict(weights, config, schedule) for schedule in schedules]
    seconds: list[list[float]] = [[] for _ in schedules]
    fewest = min(range(len(schedules)), key=lambda i: schedules[i].num_full)
    warm_up = {0, fewest}  # a program is one layer's, F or S: these two run all of them
    for round in progress(iterable=range(1 + TIMED_RUNS), unit="round", desc="prefill"):
        for i, (model, schedule) in enumerate(zip(models, schedules, strict=True)):
            if round == 0 and i not in warm_up:
                continue
            cache = serving.init_cache(config, schedule, batch, length, weights.embedding.dtype)
            jax.block_until_ready(cache)
            began = time.perf_counter()
            serving.prefill_prompts(model, list(tokens), cache, config)[0].block_until_ready()
            if round:
                seconds[i].append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds]


# ---- the report


def table(rows: list[Row], times: list[float | None], chosen: Schedule) -> tuple[list[str], list[list[str]]]:
    """Header and cells, the chosen schedule's row marked. times: seconds of prefill, None where it was not measured."""
    header = ["schedule", "pattern", "indexers", "removed", "held-out loss", "change", "prefill s", "speed-up"]
    first, first_time = rows[0], times[0]
    layers = first.schedule.num_layers
    cells = [
        [
            f"{row.name} (chosen)" if row.schedule == chosen else row.name,
            row.schedule.pattern,
            str(row.schedule.num_full),
            f"{1 - row.schedule.num_full / layers:.0%}",
            f"{row.held_out_loss:.4f}",
            search_noise.change(row.losses, first.losses),
            "-" if seconds is None else f"{seconds:.3f}",
            "-" if seconds is None or first_time is None else f"{first_time / seconds:.2f}x",
        ]
        for row, seconds in zip(rows, times, strict=True)
    ]
    return header, cells


def plot_losses(output: Output, result: Result, budget: float | None) -> None:
    """loss.png: loss against removed indexers, of the search's steps and of the table's schedules."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    rows = result.rows
    steps = result.steps
    start = result.base.num_full
    if steps:
        axes.plot([start - s.schedule.num_full for s in steps], [s.loss for s in steps], "o-", label="searched, calibration")
    for name, marker in (("searched", "D"), ("similarity", "P"), ("uniform", "s")):
        points = [(start - r.schedule.num_full, r.held_out_loss) for r in rows if r.name.endswith(name)]
        if points:
            axes.plot(*zip(*points, strict=True), marker, linestyle="--", label=f"{name}, held-out")
    axes.axhline(rows[0].held_out_loss, color="0.6", linewidth=1, label="all F, held-out")
    if budget is not None:
        axes.axhline(steps[0].loss * (1 + budget), color="tab:red", linewidth=1, label="loss budget, calibration")
    axes.set(xlabel=f"indexers removed, of {start}", ylabel="loss, nats per token", title="Loss against removed indexers")
    axes.legend()
    output.save_figure(figure, "loss.png")


def metrics_of(result: Result, times: list[float | None], pasted: list[engines.Setting]) -> dict[str, Any]:
    """What results.json holds of a search."""
    rows = zip(result.rows, times, strict=True)
    return {
        "pattern": result.chosen.pattern,
        "removed": 1 - result.chosen.num_full / result.chosen.num_layers,
        "schedules": [
            {
                "name": row.name,
                "pattern": row.schedule.pattern,
                "held_out_loss": row.held_out_loss,
                "held_out_losses": row.losses,
                "change": search_noise.as_json(search.Margin.between(row.losses, result.rows[0].losses)),
                "prefill_seconds": seconds,
            }
            for row, seconds in rows
        ],
        "steps": [
            {
                "pattern": step.schedule.pattern,
                "loss": step.loss,
                "losses": step.losses,
                "flipped": step.flipped,
                "restored": step.restored,
                "candidates": dict(step.candidates),
                "rivals": {pattern: search_noise.as_json(margin) for pattern, margin in step.rivals.items()},
            }
            for step in result.steps
        ],
        "overlap": result.overlap.round(4).tolist(),
        "settings": {s.engine: s.fields for s in pasted},
    }


def report(result: Result, times: list[float | None], given: Inputs, output: Output, layout: devices.Layout) -> None:
    """Writes plots, results.json and report.md, and prints the table and how to use the schedule."""
    plot_losses(output, result, given.goal.budget)
    plots.overlap(output, result.overlap, result.base, result.chosen)
    chosen, checkpoint = result.chosen, given.checkpoint.directory
    header, cells = table(result.rows, times, chosen)
    removed = 1 - chosen.num_full / chosen.num_layers
    summary = f"{chosen.pattern}: {chosen.num_full} of {chosen.num_layers} indexers, {removed:.0%} removed"
    pasted = engines.settings(chosen, engines.for_engines(checkpoint)[0], result.config)
    note = "Losses in nats per token, on held-out text"
    if len(result.rows[0].losses) > 1:
        note += f"; ± is the standard error of the change, from differences on the same {len(result.rows[0].losses)} sequences"
    note += "."
    if times[0] is not None:
        tokens = f"{len(given.held_out[0])} x {options.CONTEXT.value} tokens"
        note += f" Prefill: the median of {TIMED_RUNS} runs over {tokens}, the schedules taking turns."
    lines = engines.to_paste(chosen, checkpoint, result.config)
    certainty = ""
    if result.steps:
        certainty = "\n".join(search_noise.sentences(result.steps, chosen, name_cheaper=given.goal.budget is None))
    text = f"# Schedule for {checkpoint}\n\n`{summary}`\n\n{markdown_table(header, cells)}\n\n{note}\n\n"
    text += "![loss](loss.png)\n\n![overlap](overlap.png)\n\n"
    if result.steps:
        text += f"## How sure the search is\n\n{certainty}\n\n{markdown_table(*search_noise.steps_table(result.steps))}\n\n"
    text += f"## To use it\n\n{lines}\n"
    text += f"\n## The text\n\n{markdown_table(['what', 'value'], [[k.replace('_', ' '), v] for k, v in given.text.items()])}\n"
    output.finish("search", metrics_of(result, times, pasted) | {"text": given.text}, text, layout)
    parts = [text_table(header, cells), note, summary, *([certainty] if certainty else []), lines]
    print("\n" + "\n\n".join(parts) + f"\n\nwritten to {output.directory}/")


def run(output_dir: str, seed: int) -> None:
    options.check_positive("batch_size")
    layout = devices.layout(options.BATCH_SIZE.value)
    with devices.in_force(layout, SERVING):
        given, model = read_inputs(seed)
        if _DRY_RUN.value:
            return
        output = Output.create(output_dir)
        result = run_search(model, given, output)
        del model  # its weights make room for those of inference
        times = prefill_seconds(given.checkpoint, result.schedules, given.held_out[0][:, :-1])
    report(result, times, given, output, layout)
