"""Training-aware IndexCache: distils a checkpoint's indexers for a schedule and writes the checkpoint that results.

--train=indexers: the model is frozen. Group by group, an F layer's indexer trains towards the attention of all layers that it
serves; with --stream on a model that no device holds. With --spans the schedule stays, and every F layer's indexer learns all
numbers of layers that it could serve, for a schedule to be searched for afterwards.

--train=all: two stages (paper 3.2). Warm-up: dense attention, only the indexers of the F layers train, each towards the
attention of all layers that it serves. Sparse: attention over what they select; the indexers go on learning on the selected
keys, the rest of the model on the language loss, each at its own rate.

F layers start from the checkpoint's own indexers.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import statistics
import time
import warnings
from typing import Any

import jax
import numpy as np
from absl import flags

import checkpoints_convert
from checkpoints_convert.orbax_io import is_orbax
from experiments.common import (
    data,
    devices,
    engines,
    fit,
    indexer_runs,
    inputs,
    journal,
    options,
    plots,
    processes,
    runs,
    search_noise,
)
from experiments.common.report import Output, device, markdown_table, progress, text_table
from experiments.common.runs import Saving, TrainingRun
from indexcache_jax import indexer_training
from indexcache_jax.config import Config
from indexcache_jax.foreign import read_json, shown
from indexcache_jax.layers import Layers, Resident
from indexcache_jax.params import FP8_BASE, Indexer, Params, abstract, weights_of, with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.search.streamed import StreamedEvaluator
from indexcache_jax.sharding import TRAINING
from indexcache_jax.training import Stage, flops_per_token

for _name in (
    *(
        "checkpoint",
        "dtype",
        "weights",
        "schedule",
        "retention",
        "context",
        "batch_size",
        "text",
        "held_out",
        "held_out_sequences",
    ),
    *("accumulate", "warmup_steps", "sparse_steps", "warmup_learning_rate", "indexer_learning_rate", "model_learning_rate"),
    *("sequences", "stream", "stream_memory", "resume", "mesh"),
):
    flags.declare_key_flag(_name)

SCHEDULE_FLAGS = "schedule", "retention"
SEQUENCES = 32  # by default, with --train=indexers

_TRAIN = flags.DEFINE_enum(
    "train",
    "indexers",
    ["indexers", "all"],
    "indexers: of a frozen model, group by group, on --sequences of text; all: a dense warm-up and a sparse stage",
)
_STEPS = flags.DEFINE_integer(
    "steps", indexer_training.STEPS, "steps of each group of layers, with --train=indexers", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", indexer_training.LEARNING_RATE, "peak learning rate, with --train=indexers", lower_bound=0
)
_SCHEDULE_FROM = flags.DEFINE_string(
    "schedule_from", "", "output folder of a search, such as out/search: train for the schedule that it chose"
)
_CROSS_LAYER = flags.DEFINE_bool("cross_layer", True, "teach an indexer all layers it serves, not its own alone")
_SPANS = flags.DEFINE_integer(
    "spans",
    None,
    "instead of --schedule and --retention: keep the checkpoint's schedule, and teach every indexer to serve 1, 2, ... and up "
    "to so many layers, for a search afterwards; with --train=indexers",
    lower_bound=1,
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 500, "steps between checkpoints", lower_bound=1)
_KEEP = flags.DEFINE_integer("keep", 2, "checkpoints kept", lower_bound=1)
_EXPORT = flags.DEFINE_enum(
    "export",
    "full",
    ["full", "linked"],
    "full: a checkpoint of its own; linked, where indexers alone train: new indexers beside links to --checkpoint's files",
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A checkpoint, the schedule to train it for, and text.

    loaded: its weights as they are; stored: those with the indexers of `schedule` alone. tokens: the stream to train on,
    kept in `output`; cuts [N, S+1]: sequences to evaluate on.
    """

    output: Output
    checkpoint: inputs.Checkpoint
    config: Config
    base: Schedule
    loaded: Params
    schedule: Schedule
    stored: Params
    stages: list[Stage]
    tokens: np.ndarray
    cuts: np.ndarray


def target_schedule(base: Schedule) -> Schedule:
    """The checkpoint's with --spans; else that of --schedule_from, --schedule, or uniform at --retention."""
    if _SPANS.value is not None:
        return base
    if _SCHEDULE_FROM.value:
        return schedule_of_search(_SCHEDULE_FROM.value, base.num_layers)
    if (entry := inputs.only_schedule()) is not None:
        return inputs.schedule(entry, base.num_layers)
    return Schedule.uniform(base.num_layers, inputs.kept_at_retention(base.num_layers))


def schedule_of_search(folder: str, num_layers: int) -> Schedule:
    """The schedule that the search with this output folder chose. ValueError for another folder, and for another model's."""
    path = pathlib.Path(folder) / "results.json"
    results = read_json(path)
    if results.get("experiment") != "search":
        raise ValueError(
            f"--schedule_from={folder}: the experiment of {path} is {shown(results.get('experiment'))}, not 'search'"
        )
    metrics = results.get("metrics")
    pattern: Any = metrics.get("pattern") if isinstance(metrics, dict) else None
    return Schedule.parse(pattern, num_layers, f"--schedule_from={folder}: metrics.pattern of {path}")


def check_schedule_flags() -> None:
    """ValueError for flags that name a schedule beside --spans or --schedule_from, where they would count for nothing."""
    if _SPANS.value is not None:
        options.refuse(f"counts for nothing beside --spans={_SPANS.value}; leave one out", "schedule_from", *SCHEDULE_FLAGS)
    if _SCHEDULE_FROM.value:
        options.refuse(f"counts for nothing beside --schedule_from={_SCHEDULE_FROM.value}; leave one out", *SCHEDULE_FLAGS)


def form_to_train(checkpoint: inputs.Checkpoint) -> str | None:
    """The form to load the checkpoint in: on a base in 8 bits only indexers can be trained, so the warm-up alone.

    ValueError where the flags ask for a base in 8 bits and for the stage that trains it.
    """
    if checkpoint.weights is None:
        return None
    if not options.SPARSE_STEPS.value:
        return FP8_BASE
    if options.WEIGHTS.value is not None:
        raise ValueError(
            f"--weights={options.WEIGHTS.value}: only with --sparse_steps=0, since the sparse stage trains all weights"
        )
    return None


def checkpoint_folder(output: Output) -> pathlib.Path:
    """Where the distilled checkpoint goes."""
    return output.directory / "checkpoint"


def link_or_copy(stages: list[Stage], source: str) -> bool | None:
    """Whether what does not change is exported by links or as copies of the files of `source`; None where all is written anew.

    That is where more than indexers trains or there are no such files; ValueError where --export=linked asks for links then.
    """
    linked = _EXPORT.value == "linked"
    for stage in stages:
        if stage.steps and stage.model_learning_rate:
            if linked:
                raise ValueError(
                    f"--export=linked: the {stage.name} stage trains all weights; --sparse_steps=0 or --model_learning_rate=0 "
                    "trains indexers alone"
                )
            return None
    if is_orbax(pathlib.Path(source)):
        if linked:
            raise ValueError(f"--export=linked: {source} is an orbax checkpoint, there are no safetensors files to link to")
        return None
    return linked


def check_output(output: Output) -> None:
    """ValueError for a folder that holds an earlier run which is not to be resumed."""
    folder, resume = checkpoint_folder(output), options.RESUME.value
    if folder.exists() and not resume:
        raise ValueError(f"{folder}: exists; choose another --output_dir, or --resume")
    runs.check_free(output.directory, resume)


def read_inputs(output_dir: str, seed: int) -> Inputs:
    """All that a distillation reads, checked before anything takes long."""
    options.check_positive("held_out_sequences")
    checkpoint = inputs.checkpoint()
    config, base = inputs.described(checkpoint.directory)
    weights = form_to_train(checkpoint)
    planned = inputs.distillation_stages(options.CONTEXT.value, checkpoint.dtype)
    taken = [stage for stage in planned if stage.steps] or planned
    fit.training(config, target_schedule(base), taken, checkpoint=base, weights=weights)
    config, base, loaded = checkpoints_convert.load(checkpoint.directory, weights=weights)
    schedule = target_schedule(base)
    stored = with_schedule(loaded, base, schedule)
    reader = inputs.reader(checkpoint.directory, config)
    output = Output.create(output_dir)
    check_output(output)
    stages = inputs.distillation_stages(reader.context, checkpoint.dtype, _CROSS_LAYER.value)
    if not any(stage.steps for stage in stages):
        raise ValueError("--warmup_steps=0 --sparse_steps=0: nothing is trained")
    link_or_copy(stages, checkpoint.directory)
    sides = inputs.split(options.TEXT.value, options.HELD_OUT.value)
    cuts = reader.draw(sides.held_out, "held_out", options.HELD_OUT_SEQUENCES.value, seed)
    try:
        tokens = data.pack(sides.train, reader.encoder, reader.separator, output.directory / "tokens.bin", seed)
        data.Rows(tokens, reader.context, (seed,))  # before anything takes long: are there enough for a row?
    except ValueError as error:
        raise ValueError(f"--text={options.TEXT.value}: {error}") from None
    reader.check_tokens(tokens, "text")
    print(f"{checkpoint.directory}: {base.pattern} -> {schedule.pattern}; {checkpoint.dtype} on {device()['kind']}")
    about_text = f"{len(sides.train)} documents, {tokens.size:,} tokens to train on"
    print(f"{about_text}; {len(cuts)} x {reader.context} held out")
    return Inputs(output, checkpoint, config, base, loaded, schedule, stored, stages, tokens, cuts)


@dataclasses.dataclass(frozen=True)
class Result:
    """Held-out losses before and after by the table's rows, tokens/s by stage (of `speeds`), and seconds of training."""

    held_out: dict[str, runs.HeldOut]
    speeds: dict[str, Any]
    seconds: float


def distil(given: Inputs, seed: int) -> Result:
    """Trains, writes the checkpoint that results, and evaluates it beside what it came from."""
    config, schedule, dtype = given.config, given.schedule, given.checkpoint.dtype
    held_out = {
        "as it came": runs.evaluate(given.loaded, given.cuts, config, given.base, dtype),
        "the schedule, untrained": runs.evaluate(given.stored, given.cuts, config, schedule, dtype),
    }
    log_every = max(1, min([50, *(stage.steps // 5 for stage in given.stages if stage.steps)]))
    saving = Saving(every=_SAVE_EVERY.value, keep=_KEEP.value, log_every=log_every)
    training_run = TrainingRun(given.tokens, given.stages, config, schedule, seed)
    trained = runs.train(given.stored, training_run, given.output, resume=options.RESUME.value, saving=saving)
    folder = checkpoint_folder(given.output)
    journal.remove(folder)  # of an earlier --resume
    source = given.checkpoint.directory
    written = export(folder, trained.params, given.stored, config, schedule, source, link_or_copy(given.stages, source))
    held_out["distilled"] = runs.evaluate(written, given.cuts, config, schedule, dtype)
    return Result(held_out, speeds(trained, given.stages, config, schedule), trained.seconds)


def export(
    directory: pathlib.Path,
    params: Params,
    like: Params,
    config: Config,
    schedule: Schedule,
    source: str | pathlib.Path,
    link: bool | None = None,
) -> Params:
    """Writes params in the dtypes of `like`, with the tokenizer and whatever else goes along with checkpoint `source`.

    link: only the indexers are those of `params`, the rest are links to the files of `source` or copies; None writes all.
    Returns what was written: of a base in 8 bits the indexers as they are quantised.
    """
    written = jax.tree.map(lambda a, b: a.astype(b.dtype), params, like)
    if link is None:
        checkpoints_convert.save(directory, written, config, schedule, companions_of=source)
    else:
        for note in checkpoints_convert.save_indexers(directory, written, config, schedule, source, link):
            print(f"note: {note}")
    if (weights := weights_of(like)) is None:
        return written
    return checkpoints_convert.load(directory, weights=weights)[2]


def speeds(trained: runs.Trained, stages: list[Stage], config: Config, schedule: Schedule) -> dict[str, Any]:
    """By stage tokens/s and, on an accelerator, the model FLOPs' share of the rate of bfloat16 matmuls on all devices."""
    matmul = None if jax.default_backend() == "cpu" else runs.matmul_rate() * jax.device_count()
    by_stage: dict[str, Any] = {"matmul_tflops": None if matmul is None else matmul / 1e12}
    for stage in stages:
        if (tokens_per_second := trained.tokens_per_second.get(stage.name)) is not None:
            flops = flops_per_token(config, schedule, stage) * tokens_per_second
            by_stage[stage.name] = {
                "tokens_per_second": tokens_per_second,
                "model_tflops": flops / 1e12,
                "of_matmul": None if matmul is None else flops / matmul,
            }
    return by_stage


def plot(output: Output, entries: list[dict[str, Any]]) -> None:
    """training.png: divergence and language loss over the steps, a line a stage."""
    stages = dict.fromkeys(entry["stage"] for entry in entries)
    panels = [
        plots.Panel(
            title,
            "nats per token",
            {stage: [(entry["step"], entry[name]) for entry in entries if entry["stage"] == stage] for stage in stages},
        )
        for name, title in (("indexer", "divergence of the indexers"), ("language", "language loss"))
    ]
    plots.training_curves(output, panels, "step", (8, 3.4))


def _speed_cells(speed: dict[str, float] | None) -> list[str]:
    if speed is None:
        return ["-", "-"]
    return [f"{speed['tokens_per_second']:,.0f}", "-" if speed["of_matmul"] is None else f"{speed['of_matmul']:.1%}"]


def what_to_do_with(output: Output, schedule: Schedule, config: Config, to_be_searched: bool = False) -> str:
    """How the checkpoint that was written is used, in Markdown. to_be_searched: its schedule is not the one to use it with."""
    folder = str(checkpoint_folder(output))
    text = f"## To use it\n\nThe checkpoint is in {folder}/."
    if to_be_searched:
        command = f"python -m experiments.run --experiment=search --checkpoint={shlex.quote(folder)}"
        return f"{text} A search finds its schedule:\n\n    {command}"
    return f"{text}\n\n{engines.to_paste(schedule, folder, config)}"


def report(result: Result, given: Inputs, layout: devices.Layout) -> None:
    """Writes the plot, results.json and report.md, and prints the tables."""
    output, schedule = given.output, given.schedule
    plot(output, runs.read_log(output.directory))
    header = ["", "indexers", "language loss", "indexers' divergence"]
    sizes = [given.base.num_full, schedule.num_full, schedule.num_full]
    cells = [
        [name, size, f"{losses.language:.4f}", f"{losses.indexer:.4f}"]
        for (name, losses), size in zip(result.held_out.items(), sizes, strict=True)
    ]
    stage_rows = [
        [
            *(s.name, s.steps, s.sequences, s.context, s.model_learning_rate or "-", s.indexer_learning_rate),
            *_speed_cells(result.speeds.get(s.name)),
        ]
        for s in given.stages
    ]
    about_stages = markdown_table(
        ["stage", "steps", "sequences", "context", "model's rate", "indexers' rate", "tokens/s", "model FLOPs of matmul rate"],
        stage_rows,
    )
    note = "Nats per token on held-out text; the divergence is summed over the F layers, over the selected keys."
    metrics = {
        "checkpoint": given.checkpoint.directory,
        "pattern": schedule.pattern,
        "held_out": {name: {"language": one.language, "indexer": one.indexer} for name, one in result.held_out.items()},
        "tokens": int(given.tokens.size),
        "seconds": result.seconds,
        "speed": result.speeds,
    }
    text = f"# Distillation for `{schedule.pattern}`\n\n{markdown_table(header, cells)}\n\n{note}\n\n{about_stages}\n\n"
    after = what_to_do_with(given.output, schedule, given.config)
    output.finish("distill", metrics, f"{text}![training](training.png)\n\n{after}\n", layout)
    print(f"\n{text_table(header, cells)}\n\n{note}\n\n{about_stages}\n\n{after}\n\nwritten to {output.directory}/")


# ---- indexers of a frozen model


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A checkpoint whose indexers train, and text. cuts: batches [1, S+1] to evaluate on."""

    output: Output
    checkpoint: inputs.Checkpoint
    training: indexer_training.Run
    cuts: list[np.ndarray]


def form_of_layers(checkpoint: inputs.Checkpoint) -> dict[str, Any]:
    """The dtype and the form to read layers in: indexers are never in 8 bits, so that they can train."""
    return {"dtype": checkpoint.dtype, "weights": checkpoint.weights and FP8_BASE}


def open_layers(checkpoint: inputs.Checkpoint) -> Layers:
    """The checkpoint's layers, in memory or, with --stream, read as they are needed; ValueError where memory is too small."""
    asked = form_of_layers(checkpoint)
    if options.STREAM.value:
        return checkpoints_convert.Layers(checkpoint.directory, **asked)
    fit.search(*inputs.described(checkpoint.directory), rows=1, context=options.CONTEXT.value, **asked)
    return Resident(*checkpoints_convert.load(checkpoint.directory, **asked))


def indexer_stage(context: int, dtype: str) -> Stage:
    """What every group's indexer takes, as the flags describe it."""
    return indexer_training.indexer_stage(
        context,
        dtype,
        steps=_STEPS.value,
        rows=options.BATCH_SIZE.value,
        learning_rate=_LEARNING_RATE.value,
        cross_layer=_CROSS_LAYER.value,
    )


def read_frozen(output_dir: str, seed: int) -> Frozen:
    """All that training indexers reads, checked before anything takes long."""
    options.check_positive("held_out_sequences", "sequences", "batch_size")
    checkpoint = inputs.checkpoint()
    config, base = inputs.described(checkpoint.directory)
    target_schedule(base)
    orbax = is_orbax(pathlib.Path(checkpoint.directory))
    if orbax and options.STREAM.value:
        raise ValueError(f"--stream: new indexers are written beside safetensors, but {checkpoint.directory} is orbax")
    reader = inputs.reader(checkpoint.directory, config)
    stage = indexer_stage(reader.context, checkpoint.dtype)
    link_or_copy([stage], checkpoint.directory)
    sides = inputs.split(options.TEXT.value, options.HELD_OUT.value)
    tokens = reader.draw(sides.train, "text", options.calibration_sequences(SEQUENCES), seed)[:, :-1]
    cuts = reader.draw(sides.held_out, "held_out", options.HELD_OUT_SEQUENCES.value, seed)
    output = Output.create(output_dir)
    check_output(output)
    indexer_runs.check_free(output.directory, options.RESUME.value)
    layers = open_layers(checkpoint)
    local = jax.local_devices()
    training = indexer_training.Run(
        layers,
        target_schedule(layers.schedule),
        tokens,
        stage,
        seed,
        _SPANS.value,
        devices=tuple(local) if len(local) > 1 else (),
    )
    training, memory = indexer_runs.within(training, options.stream_memory(), output.directory)
    if options.STREAM.value:
        fit.indexers(training)
    of_all, trained = indexer_training.sizes(training)
    print(f"{checkpoint.directory}: {base.pattern} -> {aim(training)}; {checkpoint.dtype} on {device()['kind']}")
    print(f"{len(tokens)} sequences of {reader.context} tokens to train on, {len(cuts)} to evaluate on; {memory}")
    if training.side_by_side > 1:
        print(f"{training.side_by_side} groups at a time, each on a device of its own")
    one = trained // training.schedule.num_full
    print(
        f"{trained:,} of {of_all:,} weights train, {one:,} at a time: {12 * one / 1e6:.1f} MB of float32 weights and optimiser "
        "state; the others have neither gradient nor optimiser state",
        flush=True,
    )
    return Frozen(output, checkpoint, training, [cut[None] for cut in cuts])


def aim(training: indexer_training.Run) -> str:
    """What indexers are trained for, for a reader."""
    pattern = training.schedule.pattern
    return pattern if training.spans is None else f"{pattern}, to serve up to {training.spans} layers each"


def held_out_losses(layers: Layers, schedules: list[Schedule], cuts: list[np.ndarray]) -> list[list[float]]:
    """The losses of a model under schedules, for every sequence, in nats a token."""
    total = len(schedules) * len(cuts) * layers.config.num_layers
    with progress(total=total, unit="layer", desc="held-out") as bar:
        losses = StreamedEvaluator(layers, cuts, progress=bar.update).sequence_losses(schedules)
        bar.total = bar.n  # schedules share layers
    return losses.tolist()


def write_indexers(given: Frozen, indexers: dict[int, Indexer]) -> None:
    """Writes the checkpoint with its new indexers and schedule."""
    training, source, folder = given.training, given.checkpoint.directory, checkpoint_folder(given.output)
    config, schedule = training.config, training.schedule
    journal.remove(folder)  # of an earlier --resume
    link = link_or_copy([training.stage], source)
    if link is None:
        _, base, stored = checkpoints_convert.load(source)
        new = indexer_training.with_indexers(stored, base, schedule, indexers)
        checkpoints_convert.save(folder, new, config, schedule, companions_of=source)
        return
    nothing: Params = jax.tree.map(lambda _: None, abstract(config, schedule))
    alone = dataclasses.replace(nothing, indexer=indexer_training.stacked(indexers, schedule))
    for note in checkpoints_convert.save_indexers(folder, alone, config, schedule, source, link):
        print(f"note: {note}")


def train_indexers(output_dir: str, seed: int) -> None:
    """Trains a frozen model's indexers for a schedule, writes the checkpoint that results, and evaluates it."""
    given = read_frozen(output_dir, seed)
    layers, schedule = given.training.layers, given.training.schedule
    began = time.perf_counter()
    groups = indexer_runs.train(given.training, given.output, options.RESUME.value)
    seconds = time.perf_counter() - began
    write_indexers(given, {group.layer: group.indexer for group in groups})
    with warnings.catch_warnings(action="ignore"):  # what is left out was said of the checkpoint that it comes from
        written = checkpoints_convert.Layers(checkpoint_folder(given.output), **form_of_layers(given.checkpoint))
    before = {options.ALL_F if layers.schedule.num_full == schedule.num_layers else "as it came": layers.schedule}
    if schedule != layers.schedule:
        before["the schedule, untrained"] = schedule
    losses = held_out_losses(layers, list(before.values()), given.cuts) + held_out_losses(written, [schedule], given.cuts)
    rows = [*before.items(), ("distilled", schedule)]
    evaluated = [Evaluated(name, of.num_full, by_sequence) for (name, of), by_sequence in zip(rows, losses, strict=True)]
    report_indexers(given, groups, evaluated, seconds)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A row of the table: what was evaluated, how many indexers it has, and its held-out losses by sequence, nats a token."""

    name: str
    indexers: int
    losses: list[float]

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


def report_indexers(given: Frozen, groups: list[indexer_runs.Group], evaluated: list[Evaluated], seconds: float) -> None:
    """Writes the plot, results.json and report.md, and prints the tables."""
    output, schedule, training = given.output, given.training.schedule, given.training
    curves = {f"layer {group.layer}": list(enumerate(group.divergence)) for group in groups}
    plots.training_curves(output, [plots.Panel("divergence of the indexers", "nats per token", curves)], "step", (5, 3.4))
    first = evaluated[0].losses
    header = ["", "indexers", "held-out loss", "change"]
    cells = [[row.name, row.indexers, f"{row.loss:.4f}", search_noise.change(row.losses, first)] for row in evaluated]
    of_groups = markdown_table(
        ["layers", "divergence before", "after", "seconds"],
        [
            [layers, *(f"{value:.3f}" for value in group.ends), f"{group.seconds:.0f}"]
            for group, layers in zip(groups, map(span, training.groups), strict=True)
        ],
    )
    note = (
        f"Held-out loss in nats per token of {len(first)} sequences, ± the standard error of the change. Divergences in nats "
        "per token of the training text, over all visible keys, the mean of the first and of the last ten steps."
    )
    metrics = {
        "checkpoint": given.checkpoint.directory,
        "pattern": schedule.pattern,
        "spans": training.spans,
        "held_out": {row.name: row.loss for row in evaluated},
        "held_out_losses": {row.name: row.losses for row in evaluated},
        "tokens": int(training.tokens.size),
        "seconds": seconds,
        "groups": [{"layer": group.layer, "seconds": group.seconds, "divergence": group.divergence} for group in groups],
        "flops": {"step": indexer_training.step_work(training, max(map(len, training.groups)))},
    }
    text = f"# Indexers for `{aim(training)}`\n\n{markdown_table(header, cells)}\n\n{note}\n\n{of_groups}\n\n"
    after = what_to_do_with(output, schedule, training.config, to_be_searched=training.spans is not None)
    output.finish("distill", metrics, f"{text}![training](training.png)\n\n{after}\n")
    print(f"\n{text_table(header, cells)}\n\n{note}\n\n{of_groups}\n\n{after}\n\nwritten to {output.directory}/")


def span(layers: tuple[int, ...]) -> str:
    """Consecutive layers for a reader, such as "4-7"."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


# ---- the command


def run(output_dir: str, seed: int) -> None:
    check_schedule_flags()
    if _TRAIN.value == "indexers":
        needs_all = "needs --train=all; --train=indexers trains indexers alone, with --steps and --learning_rate"
        options.refuse(needs_all, "warmup_steps", "sparse_steps", "accumulate", "save_every", "keep")
        options.refuse(needs_all, "warmup_learning_rate", "indexer_learning_rate", "model_learning_rate")
        if _SPANS.value is not None and not _CROSS_LAYER.value:
            raise ValueError(f"--spans={_SPANS.value}: teaches other layers too, so not with --nocross_layer")
        options.refuse("needs --train=all; --train=indexers trains a group on each device that this machine has", "mesh")
        if processes.count() > 1:
            raise NotImplementedError("--train=indexers: runs in one process, on all devices of one machine")
        train_indexers(output_dir, seed)
        return
    options.refuse("needs --train=indexers", "steps", "learning_rate", "sequences", "spans", "stream", "stream_memory")
    options.check_positive("batch_size")
    layout = devices.layout(options.BATCH_SIZE.value)
    with devices.in_force(layout, TRAINING):
        given = read_inputs(output_dir, seed)
        result = distil(given, seed)
    report(result, given, layout)
