"""A distillation of the indexers alone, of a frozen model, group by group: what it reads, its training, its report."""

from __future__ import annotations

import dataclasses
import pathlib
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
    devices,
    fit,
    indexer_runs,
    inputs,
    journal,
    options,
    plots,
    processes,
    search_noise,
)
from experiments.common.devices import Layout
from experiments.common.report import Output, device, markdown_table, progress, text_table
from experiments.distill import export, goal
from indexcache_jax import indexer_training, memory
from indexcache_jax.layers import Layers, Resident
from indexcache_jax.params import FP8_BASE, Indexer, Params, abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.search.streamed import StreamedEvaluator
from indexcache_jax.sharding import SERVING
from indexcache_jax.training import Stage

SEQUENCES = 32  # by default, with --train=indexers
_STEPS = flags.DEFINE_integer(
    "steps", indexer_training.STEPS, "steps of each group of layers, with --train=indexers", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", indexer_training.LEARNING_RATE, "peak learning rate, with --train=indexers", lower_bound=0
)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A checkpoint whose indexers train, and text. cuts [N, S+1]: sequences to evaluate on."""

    output: Output
    checkpoint: inputs.Checkpoint
    training: indexer_training.Run
    cuts: np.ndarray


def form_of_layers(checkpoint: inputs.Checkpoint) -> dict[str, Any]:
    """The dtype and the form to read layers in: indexers are never in 8 bits, so that they can train."""
    return {"dtype": checkpoint.dtype, "weights": checkpoint.weights and FP8_BASE}


def layout_of(checkpoint: inputs.Checkpoint) -> Layout:
    """Sequences over all devices of all processes, with the weights that run whole on each, so that devices exchange nothing.

    Where these do not fit, by what process 0 has, the experts, which are most of them, are split over all devices.
    """
    config, base = inputs.described(checkpoint.directory)
    whole = Layout(data=jax.device_count())
    asked = form_of_layers(checkpoint)
    need = fit.search_need(config, base, rows=whole.data, stream=options.STREAM.value, **asked)
    found = need(options.CONTEXT.value, whole.abstract_mesh, whole.rules(SERVING))
    fits = processes.from_main(lambda: found.total <= memory.available())
    return whole if fits else dataclasses.replace(whole, expert=whole.data)


def open_layers(checkpoint: inputs.Checkpoint) -> Layers:
    """The checkpoint's layers, in memory or, with --stream, read as they are needed; ValueError where memory is too small."""
    asked = form_of_layers(checkpoint)
    if options.STREAM.value:
        return checkpoints_convert.Layers(checkpoint.directory, **asked)
    fit.search(*inputs.described(checkpoint.directory), rows=jax.device_count(), context=options.CONTEXT.value, **asked)
    return Resident(*checkpoints_convert.load(checkpoint.directory, **asked))


def indexer_stage(context: int, dtype: str) -> Stage:
    """What every group's indexer takes, as the flags describe it."""
    return indexer_training.indexer_stage(
        context,
        dtype,
        steps=_STEPS.value,
        rows=options.BATCH_SIZE.value,
        learning_rate=_LEARNING_RATE.value,
        cross_layer=goal.CROSS_LAYER.value,
    )


def read_frozen(checkpoint: inputs.Checkpoint, output_dir: str, seed: int) -> Frozen:
    """All that training indexers reads, checked before anything takes long."""
    config, base = inputs.described(checkpoint.directory)
    goal.target_schedule(base)
    orbax = is_orbax(pathlib.Path(checkpoint.directory))
    if orbax and options.STREAM.value:
        raise ValueError(f"--stream: new indexers are written beside safetensors, but {checkpoint.directory} is orbax")
    reader = inputs.reader(checkpoint.directory, config)
    stage = indexer_stage(reader.context, checkpoint.dtype)
    export.link_or_copy([stage], checkpoint.directory)
    sides = inputs.split(options.TEXT.value, options.HELD_OUT.value)
    tokens = reader.draw(sides.train, "text", options.calibration_sequences(SEQUENCES), seed)[:, :-1]
    cuts = reader.draw(sides.held_out, "held_out", options.HELD_OUT_SEQUENCES.value, seed)
    output = Output.create(output_dir)
    export.check_free(output, checkpoint.directory)
    indexer_runs.check_free(output.directory, options.RESUME.value)
    layers = open_layers(checkpoint)
    training = indexer_training.Run(layers, goal.target_schedule(layers.schedule), tokens, stage, seed, goal.SPANS.value)
    training, kept = indexer_runs.within(training, options.stream_memory(), output.directory)
    if options.STREAM.value:
        fit.indexers(training)
    of_all, trained = indexer_training.sizes(training)
    print(f"{checkpoint.directory}: {base.pattern} -> {aim(training)}; {checkpoint.dtype} on {device()['kind']}")
    print(f"{len(tokens)} sequences of {reader.context} tokens to train on, {len(cuts)} to evaluate on; {kept}")
    if (count := jax.device_count()) > 1:
        print(f"{count} devices: each takes its own sequences through the layers, and trains groups of its own")
    one = trained // training.schedule.num_full
    print(
        f"{trained:,} of {of_all:,} weights train, {one:,} at a time: {12 * one / 1e6:.1f} MB of float32 weights and optimiser "
        "state; the others have neither gradient nor optimiser state",
        flush=True,
    )
    return Frozen(output, checkpoint, training, cuts)


def aim(training: indexer_training.Run) -> str:
    """What indexers are trained for, for a reader."""
    pattern = training.schedule.pattern
    return pattern if training.spans is None else f"{pattern}, to serve up to {training.spans} layers each"


def held_out_losses(layers: Layers, schedules: list[Schedule], cuts: np.ndarray) -> list[list[float]]:
    """The losses of a model under schedules, for every sequence, in nats a token: one at a time, or one on each device."""
    devices = jax.device_count()
    batches = np.split(cuts, len(cuts) // devices if len(cuts) % devices == 0 else len(cuts))
    total = len(schedules) * len(batches) * layers.config.num_layers
    with progress(total=total, unit="layer", desc="held-out") as bar:
        losses = StreamedEvaluator(layers, batches, progress=bar.update).sequence_losses(schedules)
        bar.total = bar.n  # schedules share layers
    return losses.tolist()


def write_indexers(given: Frozen, indexers: dict[int, Indexer]) -> None:
    """Writes the checkpoint with its new indexers and schedule, once for all processes."""
    training, source, folder = given.training, given.checkpoint.directory, export.folder_of(given.output)
    config, schedule = training.config, training.schedule
    journal.remove(folder)  # of an earlier --resume
    link = export.link_or_copy([training.stage], source)
    if link is None:
        _, base, stored = checkpoints_convert.load(source)
        new = indexer_training.with_indexers(stored, base, schedule, indexers)
        checkpoints_convert.save(folder, new, config, schedule, companions_of=source)
        return
    nothing: Params = jax.tree.map(lambda _: None, abstract(config, schedule))
    alone = dataclasses.replace(nothing, indexer=indexer_training.stacked(indexers, schedule))
    notes = processes.from_main(lambda: checkpoints_convert.save_indexers(folder, alone, config, schedule, source, link))
    for note in notes:
        print(f"note: {note}")


def run(output_dir: str, seed: int) -> None:
    """Trains a frozen model's indexers for a schedule, writes the checkpoint that results, and evaluates it."""
    options.check_positive("held_out_sequences", "sequences", "batch_size")
    checkpoint = inputs.checkpoint()
    layout = layout_of(checkpoint)
    with devices.in_force(layout, SERVING):
        given = read_frozen(checkpoint, output_dir, seed)
        groups, evaluated, seconds = distil(given)
    report(given, groups, evaluated, seconds, layout)


def distil(given: Frozen) -> tuple[list[indexer_runs.Group], list[Evaluated], float]:
    """The trained groups; the rows of the table, the last of the checkpoint that was written; the seconds of training."""
    layers, schedule = given.training.layers, given.training.schedule
    began = time.perf_counter()
    groups = indexer_runs.train(given.training, given.output, options.RESUME.value)
    seconds = time.perf_counter() - began
    write_indexers(given, {group.layer: group.indexer for group in groups})
    with warnings.catch_warnings(action="ignore"):  # what is left out was said of the checkpoint that it comes from
        written = checkpoints_convert.Layers(export.folder_of(given.output), **form_of_layers(given.checkpoint))
    before = {options.ALL_F if layers.schedule.num_full == schedule.num_layers else "as it came": layers.schedule}
    if schedule != layers.schedule:
        before["the schedule, untrained"] = schedule
    losses = held_out_losses(layers, list(before.values()), given.cuts) + held_out_losses(written, [schedule], given.cuts)
    rows = [*before.items(), ("distilled", schedule)]
    evaluated = [Evaluated(name, of.num_full, by_sequence) for (name, of), by_sequence in zip(rows, losses, strict=True)]
    return groups, evaluated, seconds


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A row of the table: what was evaluated, how many indexers it has, and its held-out losses by sequence, nats a token."""

    name: str
    indexers: int
    losses: list[float]

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


def report(given: Frozen, groups: list[indexer_runs.Group], evaluated: list[Evaluated], seconds: float, layout: Layout) -> None:
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
    after = export.what_to_do_with(output, schedule, training.config, to_be_searched=training.spans is not None)
    output.finish("distill", metrics, f"{text}![training](training.png)\n\n{after}\n", layout)
    print(f"\n{text_table(header, cells)}\n\n{note}\n\n{of_groups}\n\n{after}\n\nwritten to {output.directory}/")


def span(layers: tuple[int, ...]) -> str:
    """Consecutive layers for a reader, such as "4-7"."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
