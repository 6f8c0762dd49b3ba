"""Searches an F/S schedule for a checkpoint on calibration text, and says what it costs and what it gains."""

from __future__ import annotations

import dataclasses
import fractions
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import devices, engines, fit, inputs, journal, options, plots, search_cost, search_noise, serving_times
from experiments.common.loss_journal import LossJournal
from experiments.common.report import Output, device, markdown_table, progress, text_table
from experiments.common.search_cost import Batches, Cost, Counter, Rate
from experiments.common.serving_times import Times
from indexcache_jax import search
from indexcache_jax.config import Config
from indexcache_jax.layers import shardings_in_force
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import overlap
from indexcache_jax.search.streamed import StreamedEvaluator, state_bytes
from indexcache_jax.sharding import SERVING

LOG = "evaluations.jsonl"
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
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "check all that is read but the weights, say what the search takes, and end")
_TIME = flags.DEFINE_bool(
    "time_prefill", True, "time prefill under every schedule, once the search is done; with --stream estimate it, and decoding"
)
_SERVING_LENGTH = flags.DEFINE_integer(
    "serving_length", None, "prompt tokens that prefill is timed at; default --context", lower_bound=1
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

    def rate(self, losses: search.Evaluator | StreamedEvaluator) -> Rate:
        """How fast the losses of an evaluator are measured, from the first of its batches."""

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

    def rate(self, losses: search.Evaluator | StreamedEvaluator) -> Rate:
        """Of the second evaluation; the first one compiles."""
        seconds = 0.0
        for _ in range(2):
            unlogged, began = self.evaluator(losses.batches[:1], lambda layers: None), time.perf_counter()
            unlogged.sequence_losses([self.schedule])
            seconds = time.perf_counter() - began
        return Rate(seconds / self.config.num_layers)

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

    def rate(self, losses: search.Evaluator | StreamedEvaluator) -> Rate:
        """Of one layer, which stands for all."""
        assert isinstance(losses, StreamedEvaluator)
        reading, running = losses.seconds_of_layer()
        return Rate(running, reading * self.config.num_layers)

    def overlap(self, batches: list[np.ndarray]) -> np.ndarray:
        queries = overlap.spread(batches[0].shape[1] - 1, self.config.index_topk)
        with progress(total=len(batches) * self.config.num_layers, unit="layer", desc="overlap") as bar:
            selections = self.evaluator(batches, bar.update).selections(self.schedule, range(len(batches)), queries)
        return overlap.mean_overlap(selections, self.config.index_topk)


def open_model(checkpoint: inputs.Checkpoint) -> Model:
    """The checkpoint's model, in memory or, with --stream, read as it is needed."""
    asked: dict[str, Any] = {"dtype": checkpoint.dtype, "weights": checkpoint.weights}
    if options.STREAM.value:
        return Streamed(checkpoints_convert.Layers(checkpoint.directory, **asked), options.stream_memory())
    return InMemory(*checkpoints_convert.load(checkpoint.directory, **asked))


def check_memory(checkpoint: inputs.Checkpoint, config: Config, schedule: Schedule, cost: Cost) -> None:
    """Says what the search needs of memory; ValueError where that does not fit."""
    rows, context = options.BATCH_SIZE.value, options.CONTEXT.value
    asked: dict[str, Any] = {"rows": rows, "context": context, "dtype": checkpoint.dtype, "weights": checkpoint.weights}
    if not options.STREAM.value:
        fit.search(config, schedule, **asked)
        return
    states = min(options.stream_memory(), cost.states * state_bytes(config, checkpoint.dtype, rows, context))
    smaller = "a smaller --context, --batch_size or --stream_memory"
    fit.streamed(config, schedule, host={"hidden states": states}, smaller=smaller, **asked)


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
    """What a search reads besides the model: batches [B, S+1] to search on and to evaluate on, and its goal.

    searching, evaluating: what the search takes, and then the table of its report.
    """

    checkpoint: inputs.Checkpoint
    calibration: list[np.ndarray]
    held_out: list[np.ndarray]
    goal: Goal
    searching: Cost
    evaluating: Cost
    text: dict[str, Any]  # what was read, for the report

    @property
    def to_serve(self) -> np.ndarray:
        """The rows [B, S] of held-out tokens that prefill is timed on, repeated up to --serving_length."""
        rows = self.held_out[0][:, :-1]
        return np.stack([np.resize(row, serving_length()) for row in rows])


def serving_length() -> int:
    """--serving_length, or --context."""
    return options.CONTEXT.value if _SERVING_LENGTH.value is None else _SERVING_LENGTH.value


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
    if strategy == "similarity":
        options.refuse("--strategy=similarity measures no losses", "blocks", "race", "resume")
    if not options.STREAM.value:
        options.refuse("needs --stream", "stream_memory")
    if not _TIME.value:
        options.refuse("nothing is timed without --time_prefill", "serving_length")
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


def read_inputs(seed: int) -> Inputs:
    """All that is read but the weights, checked before anything takes long. Says what the search takes."""
    options.check_positive("sequences", "held_out_sequences", "blocks")
    checkpoint = inputs.checkpoint()
    config, base = inputs.described(checkpoint.directory)
    reader = inputs.reader(checkpoint.directory, config)
    goal = read_goal(base)
    if serving_length() > config.max_position_embeddings:
        raise ValueError(f"--serving_length={serving_length()}: the model's longest is {config.max_position_embeddings}")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}")
        checkpoints_convert.Layers(checkpoint.directory, dtype=checkpoint.dtype, weights=checkpoint.weights)  # its headers
    sides = inputs.split(options.TEXT.value, options.HELD_OUT.value)
    reader.check_size(sides.train, "text", options.calibration_sequences())
    reader.check_size(sides.held_out, "held_out", options.HELD_OUT_SEQUENCES.value)
    searching, evaluating = costs(config, base, goal, checkpoint.dtype)
    rows, context = options.BATCH_SIZE.value, options.CONTEXT.value
    weights = inputs.stored_bytes(checkpoint.directory) if options.STREAM.value else None
    print(search_cost.counted(searching + evaluating, rows, context, weights))
    print(search_cost.estimated(searching + evaluating, config, rows, context, weights), flush=True)
    check_memory(checkpoint, config, base, searching + evaluating)
    calibration = reader.draw(sides.train, "text", options.calibration_sequences(), seed)
    held_out = reader.draw(sides.held_out, "held_out", options.HELD_OUT_SEQUENCES.value, seed)
    about = about_text(sides, reader, calibration, held_out)
    given = Inputs(checkpoint, inputs.batches(calibration), inputs.batches(held_out), goal, searching, evaluating, about)
    on = f"{checkpoint.dtype} on {device()['kind']}"
    print(f"{checkpoint.directory}: {config.num_layers} layers, {base.num_full} indexers; {on}")
    print(f"{len(calibration)} sequences of {reader.context} tokens to search on, {len(held_out)} to evaluate on", flush=True)
    return given


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


def race_of(goal: Goal) -> search.Race | None:
    """How a search drops schedules that cannot win, None where it measures all on all sequences."""
    growth = STREAMED_GROWTH if options.STREAM.value else search.Race.growth
    return search.Race(_RACE.value, growth=growth) if _RACE.value and goal.strategy != "similarity" else None


def find(model: Model, given: Inputs, output: Output) -> tuple[list[search.Step], dict[int, Schedule]]:
    """The search's steps, none with the similarity DP, and the schedule found for each number of F layers that was reached."""
    config, base, goal, calibration = model.config, model.schedule, given.goal, given.calibration
    sizes = goal.sizes(base)
    with progress(total=given.searching.layers, unit="layer", desc="search", smoothing=0.05) as bar:
        if isinstance(model, InMemory) and goal.strategy == "similarity":
            matrix = search.similarities(model.params, config, base, calibration, bar.update)
            return [], {size: search.most_similar(matrix, size) for size in sizes}
        path = output.directory / LOG
        if not options.RESUME.value:
            journal.set_aside(path)
        with LossJournal(path, model.about(calibration)) as log:
            losses = model.evaluator(calibration, bar.update, log)
            for line in losses.advice():
                bar.write(f"note: {line}")
            bar.write(search_cost.timed(given.searching + given.evaluating, model.rate(losses), device()["kind"]))
            steps = search_down(losses, base, goal, race_of(goal))
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


def costs(config: Config, base: Schedule, goal: Goal, dtype: str) -> tuple[Cost, Cost]:
    """What the search takes, at most, and then the table of its report, with the sequences that the flags ask for."""
    rows, layers, states = options.BATCH_SIZE.value, base.num_layers, None
    if options.STREAM.value:
        states = options.stream_memory() // state_bytes(config, dtype, rows, options.CONTEXT.value)
    counts = options.calibration_sequences(), options.HELD_OUT_SEQUENCES.value
    batches, held_out = (Batches(inputs.num_batches(count), rows, states) for count in counts)
    steps: list[search.Step] = []
    if goal.strategy == "similarity":
        searching = Cost(passes=(batches.count * layers * (layers + 1) // 2,))
    else:
        counter = Counter(layers, batches, race_of(goal))
        without_end = dataclasses.replace(goal, budget=None if goal.budget is None else math.inf)
        steps = search_down(counter, base, without_end)
        searching = dataclasses.replace(counter.cost, steps=len(steps) - 1)
    by_size = {step.schedule.num_full: step.schedule for step in steps}
    chosen = choose(steps, by_size, base, goal) if steps else base
    table = Counter(layers, held_out)
    table.sequence_losses([schedule for _, schedule in compared(by_size, base, chosen, goal)])
    return searching, table.cost + Cost(passes=(min(OVERLAP_BATCHES, batches.count) * layers,))


def choose(steps: list[search.Step], by_size: dict[int, Schedule], base: Schedule, goal: Goal) -> Schedule:
    """The schedule that the goal asks for, of those that were found: the last within the budget, or that of its size."""
    return by_size[goal.size(base, goal.target)] if goal.budget is None else steps[-1].schedule


def compared(by_size: dict[int, Schedule], base: Schedule, chosen: Schedule, goal: Goal) -> list[tuple[str, Schedule]]:
    """The table's schedules with their names: the checkpoint's, and at every size a uniform one and the one found."""
    strategy = "similarity" if goal.strategy == "similarity" else "searched"
    named = [(options.ALL_F if base.num_full == base.num_layers else "as shipped", base)]
    for size in goal.sizes(base):
        if size == base.num_full:  # nothing is to be searched
            continue
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
    steps, by_size = find(model, given, output)
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


def times_of(given: Inputs, config: Config, schedules: list[Schedule]) -> Times:
    """What the schedules take of inference: measured, or estimated for a model that is streamed."""
    checkpoint, tokens = given.checkpoint, given.to_serve
    if not _TIME.value:
        return Times.none(schedules)
    if options.STREAM.value:
        return serving_times.estimate(config, schedules, tokens[:1], checkpoint.dtype, checkpoint.weights)
    return serving_times.of_checkpoint(checkpoint, schedules, tokens)


# ---- the report


def table(rows: list[Row], times: Times, chosen: Schedule) -> tuple[list[str], list[list[str]]]:
    """Header and cells, the chosen schedule's row marked."""
    estimate = ", estimate" if times.estimated else ""
    header = ["schedule", "pattern", "indexers", "removed", "held-out loss", "change", f"prefill s{estimate}", "speed-up"]
    decodes = any(seconds is not None for seconds in times.decode)
    if decodes:
        header += [f"decode ms a token{estimate}", "speed-up"]
    first = rows[0]
    layers = first.schedule.num_layers
    cells = [
        [
            f"{row.name} (chosen)" if row.schedule == chosen else row.name,
            row.schedule.pattern,
            str(row.schedule.num_full),
            f"{1 - row.schedule.num_full / layers:.0%}",
            f"{row.held_out_loss:.4f}",
            search_noise.change(row.losses, first.losses),
            *_time_cells(prefill, times.prefill[0], 1),
            *(_time_cells(decode, times.decode[0], 1e3) if decodes else []),
        ]
        for row, prefill, decode in zip(rows, times.prefill, times.decode, strict=True)
    ]
    return header, cells


def _time_cells(seconds: float | None, first: float | None, unit: float) -> list[str]:
    """A time, in so many to a second, and how many times shorter it is than the first."""
    return ["-", "-"] if seconds is None or first is None else [f"{unit * seconds:.3f}", f"{first / seconds:.2f}x"]


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


def metrics_of(result: Result, times: Times, pasted: list[engines.Setting]) -> dict[str, Any]:
    """What results.json holds of a search."""
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
                **serving_times.as_json(times, number),
            }
            for number, row in enumerate(result.rows)
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


def report(result: Result, times: Times, given: Inputs, output: Output, layout: devices.Layout) -> None:
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
    if times.how:
        note += f" {times.how}"
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
        given = read_inputs(seed)
        if _DRY_RUN.value:
            return
        output = Output.create(output_dir)
        with warnings.catch_warnings(action="ignore"):  # they came with the headers
            model = open_model(given.checkpoint)
        result = run_search(model, given, output)
        del model  # its weights make room for those of inference
        times = times_of(given, result.config, result.schedules)
    report(result, times, given, output, layout)
