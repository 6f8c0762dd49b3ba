"""A distillation of all weights in two stages (paper 3.2): what it reads, its training, its report.

Warm-up: dense attention, only the indexers of the F layers train, each towards the attention of all layers that it serves.
Sparse: attention over what they select; the indexers go on learning on the selected keys, the rest of the model on the
language loss, each at its own rate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import (
    data,
    devices,
    fit,
    inputs,
    journal,
    options,
    plots,
    runs,
)
from experiments.common.report import Output, device, markdown_table, text_table
from experiments.common.runs import Saving, TrainingRun
from experiments.distill import export, goal
from indexcache_jax.config import Config
from indexcache_jax.params import FP8_BASE, Params, with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage, flops_per_token

_SAVE_EVERY = flags.DEFINE_integer("save_every", 500, "steps between checkpoints", lower_bound=1)
_KEEP = flags.DEFINE_integer("keep", 2, "checkpoints kept", lower_bound=1)


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


def read_inputs(output_dir: str, seed: int) -> Inputs:
    """All that a distillation reads, checked before anything takes long."""
    options.check_positive("held_out_sequences")
    checkpoint = inputs.checkpoint()
    config, base = inputs.described(checkpoint.directory)
    weights = form_to_train(checkpoint)
    planned = inputs.distillation_stages(options.CONTEXT.value, checkpoint.dtype)
    taken = [stage for stage in planned if stage.steps] or planned
    fit.training(config, goal.target_schedule(base), taken, checkpoint=base, weights=weights)
    config, base, loaded = checkpoints_convert.load(checkpoint.directory, weights=weights)
    schedule = goal.target_schedule(base)
    stored = with_schedule(loaded, base, schedule)
    reader = inputs.reader(checkpoint.directory, config)
    output = Output.create(output_dir)
    export.check_free(output, checkpoint.directory)
    stages = inputs.distillation_stages(reader.context, checkpoint.dtype, goal.CROSS_LAYER.value)
    if not any(stage.steps for stage in stages):
        raise ValueError("--warmup_steps=0 --sparse_steps=0: nothing is trained")
    export.link_or_copy(stages, checkpoint.directory)
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
    folder = export.folder_of(given.output)
    journal.remove(folder)  # of an earlier --resume
    source = given.checkpoint.directory
    written = export.write(
        folder, trained.params, given.stored, config, schedule, source, export.link_or_copy(given.stages, source)
    )
    held_out["distilled"] = runs.evaluate(written, given.cuts, config, schedule, dtype)
    return Result(held_out, speeds(trained, given.stages, config, schedule), trained.seconds)


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
    after = export.what_to_do_with(given.output, schedule, given.config)
    output.finish("distill", metrics, f"{text}![training](training.png)\n\n{after}\n", layout)
    print(f"\n{text_table(header, cells)}\n\n{note}\n\n{about_stages}\n\n{after}\n\nwritten to {output.directory}/")
