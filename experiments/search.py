"""Searches an F/S schedule for a checkpoint on calibration text, and says what it costs and what it gains."""

from __future__ import annotations

import dataclasses
import fractions
import json
import math
import pathlib
import shlex
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
import tqdm
from absl import flags

import checkpoints_convert
from checkpoints_convert.orbax_io import is_orbax
from experiments.common import options, text
from experiments.common.report import Output, device, markdown_table, text_table
from indexcache_jax import serving
from indexcache_jax.config import ARCHITECTURES, GLM, Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import ENGINES, Schedule
from indexcache_jax.search import greedy as search
from indexcache_jax.search import overlap
from indexcache_jax.search.streamed import StreamedEvaluator

LOG = "evaluations.jsonl"
TIMED_RUNS = 3

for _name in (
    "checkpoint",
    "context",
    "held_out",
    "held_out_sequences",
    "batch_size",
    "dtype",
    "retention",
    "resume",
):
    flags.declare_key_flag(_name)
_CALIBRATION = flags.DEFINE_string("calibration", "", "text files, a glob; default the Python standard library's sources")
_SEQUENCES = flags.DEFINE_integer("sequences", 2, "calibration sequences")
_RETENTIONS = flags.DEFINE_list("retentions", ["1/2", "1/4", "1/8"], "shares of indexers kept that the table compares")
_LOSS_BUDGET = flags.DEFINE_float(
    "loss_budget", None, "instead of --retention: keep flipping while the calibration loss grows by at most this share, as 0.01"
)
_STRATEGY = flags.DEFINE_enum("strategy", "greedy", ["greedy", "similarity"], "greedy on the loss, or the similarity DP")
_BLOCKS = flags.DEFINE_integer("blocks", 1, "contiguous blocks of layers; greedy commits the best flip of each per step")
_TIME = flags.DEFINE_bool("time_prefill", True, "measure prefill, for which the weights are in memory twice")
_STREAM = flags.DEFINE_bool(
    "stream", False, "read the weights layer by layer, for a model larger than the device; prefill is not measured then"
)
_STREAM_MEMORY = flags.DEFINE_float("stream_memory", 64.0, "GB of host memory for hidden states, with --stream", 0.0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to give a schedule to an engine: the config fields, and where they go."""

    engine: str
    fields: dict[str, Any]
    usage: str


class Model(Protocol):
    """What is searched."""

    @property
    def config(self) -> Config: ...

    @property
    def schedule(self) -> Schedule:
        """That of the checkpoint."""

    def evaluator(
        self, batches: list[np.ndarray], progress: Callable[[int], object], log: search.Log | None = None
    ) -> search.Evaluator | StreamedEvaluator: ...

    def about(self, batches: list[np.ndarray]) -> dict[str, Any]:
        """What an evaluation depends on."""

    def overlap(self, batches: list[np.ndarray]) -> np.ndarray:
        """Of the F layers' selections [num_full, num_full]."""

    def prefill_seconds(self, schedules: list[Schedule], tokens: np.ndarray) -> list[float | None]:
        """Of tokens [B, S] under each schedule; None where it is not measured."""


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A model whose params are on the device."""

    config: Config
    schedule: Schedule
    params: Params

    def evaluator(
        self, batches: list[np.ndarray], progress: Callable[[int], object], log: search.Log | None = None
    ) -> search.Evaluator:
        return search.Evaluator(self.params, self.config, self.schedule, batches, log, progress)

    def about(self, batches: list[np.ndarray]) -> dict[str, Any]:
        dtype = str(self.params.embedding.dtype)
        return {"pattern": self.schedule.pattern, "dtype": dtype, **search.fingerprint(self.params, batches)}

    def overlap(self, batches: list[np.ndarray]) -> np.ndarray:
        return overlap.overlap(self.params, self.config, self.schedule, batches)

    def prefill_seconds(self, schedules: list[Schedule], tokens: np.ndarray) -> list[float | None]:
        """The median, the schedules taking turns, into an empty cache."""
        if not _TIME.value:
            return [None for _ in schedules]
        weights = serving.from_params(self.params, self.config, self.schedule)
        models = [serving.restrict(weights, self.config, schedule) for schedule in schedules]
        times: list[list[float]] = [[] for _ in schedules]
        fewest = min(range(len(schedules)), key=lambda i: schedules[i].num_full)
        warm_up = {0, fewest}  # a program is one layer's, F or S: these two run all of them
        for round in tqdm.trange(1 + TIMED_RUNS, unit="round", desc="prefill"):
            for i, (model, schedule, taken) in enumerate(zip(models, schedules, times, strict=True)):
                if round == 0 and i not in warm_up:
                    continue
                batch, length = tokens.shape
                cache = serving.init_cache(self.config, schedule, batch, length, self.params.embedding.dtype)
                jax.block_until_ready(cache)
                began = time.perf_counter()
                serving.prefill_prompts(model, list(tokens), cache, self.config)[0].block_until_ready()
                if round:
                    taken.append(time.perf_counter() - began)
        return [statistics.median(taken) for taken in times]


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A model whose weights stay in the checkpoint."""

    layers: checkpoints_convert.Layers

    @property
    def config(self) -> Config:
        return self.layers.config

    @property
    def schedule(self) -> Schedule:
        return self.layers.schedule

    def evaluator(
        self, batches: list[np.ndarray], progress: Callable[[int], object], log: search.Log | None = None
    ) -> StreamedEvaluator:
        return StreamedEvaluator(self.layers, batches, log, progress, int(1e9 * _STREAM_MEMORY.value))

    def about(self, batches: list[np.ndarray]) -> dict[str, Any]:
        """The first and the last layer speak for all: reading every one takes as long as a step of the search."""
        ends, last = self.layers.ends(), self.config.num_layers - 1
        weights = search.fingerprint((ends, self.layers.layer(0), self.layers.layer(last)), batches)
        return {"pattern": self.schedule.pattern, "dtype": str(ends.embedding.dtype), **weights}

    def overlap(self, batches: list[np.ndarray]) -> np.ndarray:
        queries = overlap.spread(batches[0].shape[1] - 1, self.config.index_topk)
        with tqdm.tqdm(total=len(batches) * self.config.num_layers, unit="layer", desc="overlap") as bar:
            found = self.evaluator(batches, bar.update).selections(self.schedule, range(len(batches)), queries)
        return overlap.mean_overlap(found, self.config.index_topk)

    def prefill_seconds(self, schedules: list[Schedule], tokens: np.ndarray) -> list[float | None]:
        return [None for _ in schedules]


def opened(checkpoint: str, dtype: str) -> Model:
    """The checkpoint, streamed or in memory. ValueError where it does not fit the device's memory."""
    if _STREAM.value:
        return Streamed(checkpoints_convert.Layers(checkpoint, dtype=dtype))
    stats = jax.devices()[0].memory_stats() or {}
    if room := stats.get("bytes_limit"):
        with warnings.catch_warnings(action="ignore"):  # they come once more, with the weights
            size = checkpoints_convert.Layers(checkpoint, dtype=dtype).num_bytes
        if size > room:
            raise ValueError(
                f"--checkpoint={checkpoint}: its weights take {size / 1e9:.0f} GB as {dtype}, the device has "
                f"{room / 1e9:.0f}; --stream reads them layer by layer"
            )
    return InMemory(*checkpoints_convert.load(checkpoint, dtype=dtype))


@dataclasses.dataclass(frozen=True)
class Row:
    """One schedule in the table. Losses in nats per token, time in seconds per batch; None where it was not measured."""

    name: str
    schedule: Schedule
    held_out_loss: float
    seconds: float | None


def share(flag: str, value: str) -> fractions.Fraction:
    try:
        found = fractions.Fraction(value)
    except (ValueError, ZeroDivisionError):
        found = fractions.Fraction(0)
    if not 0 < found <= 1:
        raise ValueError(f"--{flag}={value}: not a share such as 1/4 or 0.25")
    return found


def kept(num_layers: int, retention: fractions.Fraction) -> int:
    """F layers at a retention, rounded up: 12 of 47 at 1/4."""
    return math.ceil(num_layers * retention)


def settings(schedule: Schedule, checkpoint: str, config: Config) -> list[Setting]:
    path = shlex.quote(checkpoint)
    found = []
    for engine in ENGINES:
        fields = schedule.to_engine(engine)
        pasted = shlex.quote(json.dumps(fields))
        usage = {
            "transformers": f"AutoModelForCausalLM.from_pretrained({checkpoint!r}, **{fields!r})",
            "sglang": f"python -m sglang.launch_server --model-path {path} --json-model-override-args {pasted}",
            "vllm": f"vllm serve {path} --hf-overrides {pasted}",
            "tensorrt-llm": f"in {checkpoint}/config.json: {json.dumps(fields)[1:-1]}",
        }[engine]
        if engine == "transformers" and config.family != GLM:
            usage = f"not supported: transformers runs every layer of a {ARCHITECTURES[config.family]} as full"
        found.append(Setting(engine, fields, usage))
    return found


def for_engines(checkpoint: str) -> tuple[str, str]:
    """The directory that engines are to read, and the command that makes it, "" where `checkpoint` is of their format."""
    if not is_orbax(pathlib.Path(checkpoint)):
        return checkpoint, ""
    made = f"{checkpoint.rstrip('/')}-safetensors"
    return made, f"python -m checkpoints_convert {shlex.quote(checkpoint)} {shlex.quote(made)} --format=safetensors"


def separator(config: Config) -> int | None:
    """The token that ends a document: the first of the model's end-of-text tokens, if it has one."""
    return next((token for token in config.eos_token_ids if 0 <= token < config.vocab_size), None)


def positive(**values: int) -> None:
    for flag, value in values.items():
        if value < 1:
            raise ValueError(f"--{flag}={value}: must be at least 1")


def draw(
    found: list[text.Document],
    flag: str,
    encoder: Any,
    end: int | None,
    sequences: int,
    context: int,
    config: Config,
    seed: int,
) -> np.ndarray:
    """`sequences` cuts [N, context + 1] of the documents, which are taken in random order until there is enough of them."""
    order = np.random.default_rng(seed).permutation(len(found))
    tokens = text.stream([found[i] for i in order], encoder, end, limit=2 * sequences * context + 1)
    if tokens.size and tokens.max() >= config.vocab_size:
        raise ValueError(f"{flag}: token {tokens.max()} of the {encoder.name} tokenizer, but vocab_size is {config.vocab_size}")
    try:
        return text.sequences(tokens, sequences, context, seed)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}; give more text, or less --context or fewer sequences") from None


def split(calibration: str, held_out: str, flag: str = "calibration") -> tuple[list[text.Document], list[text.Document]]:
    """Calibration and held-out documents; without --held_out, a share of the files by their names' hash.

    A file that both name is held out.
    """
    found = text.documents(calibration)
    if held_out:
        kept_apart = text.documents(held_out)
        paths = {d.path.resolve() for d in kept_apart}
        if not (rest := [d for d in found if d.path.resolve() not in paths]):
            raise ValueError(f"--{flag}={calibration}: --held_out={held_out} names all of its files, none is left")
        return rest, kept_apart
    sides = [d for d in found if not d.held_out], [d for d in found if d.held_out]
    if not all(sides):
        raise ValueError(
            f"--{flag}={calibration}: {len(found)} file(s) are too few to keep some apart; name others with --held_out"
        )
    return sides


def batches(cuts: np.ndarray) -> list[np.ndarray]:
    if len(cuts) % options.BATCH_SIZE.value:
        raise ValueError(f"--batch_size={options.BATCH_SIZE.value}: does not divide {len(cuts)} sequences")
    return np.split(cuts, len(cuts) // options.BATCH_SIZE.value)


def plot_losses(output: Output, steps: list[search.Step], rows: list[Row], budget: float | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    start = steps[0].schedule.num_full
    if steps[-1].candidates:
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


def plot_overlap(output: Output, matrix: np.ndarray, base: Schedule, chosen: Schedule) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.2))
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="|A ∩ B| / k")
    labels = [f"{layer} {'F' if chosen.is_full[layer] else 'S'}" for layer in base.full_layers]
    step = -(-len(labels) // 26)
    ticks = range(0, len(labels), step)
    axes.set_xticks(ticks, [labels[i] for i in ticks], rotation=90)
    axes.set_yticks(ticks, [labels[i] for i in ticks])
    axes.set(title="Overlap of the layers' selections", xlabel="layer, with its letter in the schedule", ylabel="layer")
    output.save_figure(figure, "overlap.png")


def find(
    model: Model, calibration: list[np.ndarray], sizes: list[int], output: Output
) -> tuple[list[search.Step], dict[int, Schedule]]:
    """The search's steps and the schedule it found for each number of F layers."""
    config, base = model.config, model.schedule
    with tqdm.tqdm(unit="layer", desc="search", smoothing=0.05) as bar:
        if isinstance(model, InMemory) and _STRATEGY.value == "similarity":
            bar.total = len(calibration) * sum(range(1, config.num_layers + 1))
            matrix = search.similarities(model.params, config, base, calibration, bar.update)
            return [], {size: search.most_similar(matrix, size) for size in sizes}
        path = output.directory / LOG
        if path.exists() and not options.RESUME.value:
            path.replace(path.with_name(f"previous-{LOG}"))
        log = search.Log(path, model.about(calibration))
        smallest = min(sizes)
        bar.total = len(calibration) * search.layers_to_run(base, smallest, _BLOCKS.value)
        losses = model.evaluator(calibration, bar.update, log)
        steps = search.greedy(losses, base, num_full=smallest, blocks=_BLOCKS.value)
        if _LOSS_BUDGET.value is not None and steps[-1].loss <= (most := steps[0].loss * (1 + _LOSS_BUDGET.value)):
            steps += search.greedy(losses, steps[-1].schedule, max_loss=most, blocks=_BLOCKS.value)[1:]
        log.close()
        bar.total = bar.n
        bar.refresh()
    reached = [size for size in sizes if size >= steps[-1].schedule.num_full]
    return steps, {size: search.with_at_most(steps, size).schedule for size in reached}


def within_budget(steps: list[search.Step], budget: float) -> search.Step:
    """The last step before the calibration loss first exceeds the start's by more than `budget`."""
    allowed = steps[0].loss * (1 + budget)
    first_over = next((i for i, step in enumerate(steps) if step.loss > allowed), len(steps))
    return steps[first_over - 1]


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["schedule", "pattern", "indexers", "removed", "held-out loss", "change", "prefill s", "speed-up"]
    first = rows[0]
    layers = first.schedule.num_layers
    cells = [
        [
            row.name,
            row.schedule.pattern,
            str(row.schedule.num_full),
            f"{1 - row.schedule.num_full / layers:.0%}",
            f"{row.held_out_loss:.4f}",
            f"{row.held_out_loss / first.held_out_loss - 1:+.2%}",
            "-" if row.seconds is None else f"{row.seconds:.3f}",
            "-" if row.seconds is None or first.seconds is None else f"{first.seconds / row.seconds:.2f}x",
        ]
        for row in rows
    ]
    return header, cells


def run(output_dir: str, seed: int) -> None:
    checkpoint = options.CHECKPOINT.value or str(options.DEMO)
    positive(
        sequences=_SEQUENCES.value,
        held_out_sequences=options.HELD_OUT_SEQUENCES.value,
        batch_size=options.BATCH_SIZE.value,
        blocks=_BLOCKS.value,
    )
    retentions = [share("retentions", value) for value in _RETENTIONS.value]
    target = share("retention", options.RETENTION.value)
    budget = _LOSS_BUDGET.value
    if budget is not None and (not budget >= 0 or _STRATEGY.value != "greedy"):
        raise ValueError(f"--loss_budget={budget}: must be at least 0, and needs --strategy=greedy")
    if _STREAM.value and _STRATEGY.value != "greedy":
        raise ValueError(f"--strategy={_STRATEGY.value}: needs the whole model in memory, so not with --stream")
    dtype = options.DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}")
        model = opened(checkpoint, dtype)
    config, base = model.config, model.schedule
    context = options.CONTEXT.value
    if not config.index_topk < context <= config.max_position_embeddings:
        raise ValueError(
            f"--context={context}: must be above index_topk = {config.index_topk}, below which all schedules are one, "
            f"and at most {config.max_position_embeddings}, the model's longest"
        )
    encoder, end = text.tokenizer(checkpoint), separator(config)
    sides = split(_CALIBRATION.value, options.HELD_OUT.value)
    drawn = [
        draw(side, flag, encoder, end, count, context, config, seed)
        for side, flag, count in zip(
            sides, ("--calibration", "--held_out"), (_SEQUENCES.value, options.HELD_OUT_SEQUENCES.value), strict=True
        )
    ]
    calibration, held_out = (batches(cuts) for cuts in drawn)
    output = Output.create(output_dir)
    print(f"{checkpoint}: {config.num_layers} layers, {base.num_full} indexers; {dtype} on {device()['kind']}")
    print(f"{len(drawn[0])} sequences of {context} tokens to search on, {len(drawn[1])} to evaluate on")

    sizes = sorted({min(base.num_full, kept(config.num_layers, r)) for r in [*retentions, target]}, reverse=True)
    steps, found = find(model, calibration, sizes, output)
    if budget is not None:
        chosen = within_budget(steps, budget).schedule
    elif (size := min(base.num_full, kept(config.num_layers, target))) in found:
        chosen = found[size]
    else:
        raise ValueError(f"--retention={target}: --blocks={_BLOCKS.value} keeps more layers F than that; use fewer blocks")

    name = "searched" if _STRATEGY.value == "greedy" else "similarity"
    named = [("all F" if base.num_full == base.num_layers else "as shipped", base)]
    for size in sizes:
        label = (
            f"{size}/{config.num_layers}"
            if size not in [kept(config.num_layers, r) for r in retentions]
            else str(next(r for r in retentions if kept(config.num_layers, r) == size))
        )
        uniform = Schedule.uniform(config.num_layers, size)
        if all(base.is_full[layer] for layer in uniform.full_layers):
            named.append((f"{label} uniform", uniform))
        if size in found:
            named.append((f"{label} {name}", found[size]))
    if chosen not in [schedule for _, schedule in named]:
        named.append(("within the budget", chosen))
    schedules = [schedule for _, schedule in named]
    with tqdm.tqdm(total=len(schedules) * len(held_out) * config.num_layers, unit="layer", desc="held-out") as bar:
        held_out_losses = model.evaluator(held_out, bar.update).losses(schedules)
        bar.total = bar.n  # streamed schedules share layers
    times = model.prefill_seconds(schedules, held_out[0][:, :-1])
    rows = [Row(n, s, loss, t) for (n, s), loss, t in zip(named, held_out_losses, times, strict=True)]
    matrix = model.overlap(calibration[:2])
    plot_losses(output, steps or [search.Step(base, rows[0].held_out_loss)], rows, budget)
    plot_overlap(output, matrix, base, chosen)
    report_on(output, checkpoint, config, rows, steps, chosen, matrix, len(held_out[0]))


def report_on(
    output: Output,
    checkpoint: str,
    config: Config,
    rows: list[Row],
    steps: list[search.Step],
    chosen: Schedule,
    matrix: np.ndarray,
    batch: int,
) -> None:
    header, cells = table(rows)
    removed = 1 - chosen.num_full / chosen.num_layers
    summary = f"{chosen.pattern}: {chosen.num_full} of {chosen.num_layers} indexers, {removed:.0%} removed"
    directory, first = for_engines(checkpoint)
    pasted = settings(chosen, directory, config)
    metrics = {
        "pattern": chosen.pattern,
        "removed": removed,
        "schedules": [
            {"name": r.name, "pattern": r.schedule.pattern, "held_out_loss": r.held_out_loss, "prefill_seconds": r.seconds}
            for r in rows
        ],
        "steps": [
            {"pattern": s.schedule.pattern, "loss": s.loss, "flipped": s.flipped, "candidates": dict(s.candidates)}
            for s in steps
        ],
        "overlap": matrix.round(4).tolist(),
        "settings": {s.engine: s.fields for s in pasted},
    }
    note = "Losses in nats per token, on held-out text."
    if rows[0].seconds is not None:
        tokens = f"{batch} x {options.CONTEXT.value} tokens"
        note += f" Prefill: the median of {TIMED_RUNS} runs over {tokens}, the schedules taking turns."
    lines = "\n\n".join(f"{s.engine}:\n\n    {s.usage}" for s in pasted)
    if first:
        lines = f"Engines read safetensors, so first:\n\n    {first}\n\n{lines}"
    report = f"# Schedule for {checkpoint}\n\n`{summary}`\n\n{markdown_table(header, cells)}\n\n{note}\n\n"
    report += f"![loss](loss.png)\n\n![overlap](overlap.png)\n\n## To use it\n\n{lines}\n"
    output.finish("search", metrics, report)
    print(f"\n{text_table(header, cells)}\n\n{note}\n\n{summary}\n\n{lines}\n\nwritten to {output.directory}/")
