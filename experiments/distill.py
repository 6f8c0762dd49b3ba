"""Training-aware IndexCache: distils a checkpoint's indexers for a schedule and writes the checkpoint that results.

Two stages (paper 3.2). Warm-up: dense attention, only the indexers of the F layers train, each towards the attention of
all layers that it serves. Sparse: attention over what they select; the indexers go on learning on the selected keys, the
rest of the model on the language loss, each at its own rate. F layers start from the checkpoint's own indexers.
"""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import flags

import checkpoints_convert
from experiments import search
from experiments.common import data, options, runs, text
from experiments.common.report import Output, device, markdown_table, text_table
from experiments.common.runs import Saving, TrainingRun
from indexcache_jax.config import Config
from indexcache_jax.params import Params, with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage, flops_per_token

SHARED_FLAGS = ("checkpoint", "retention", "context", "batch_size", "held_out", "held_out_sequences", "dtype", "resume")
for _name in SHARED_FLAGS:
    flags.declare_key_flag(_name)

_PATTERN = flags.DEFINE_string("pattern", "", "schedule to distil for, such as FSSF; default uniform at --retention")
_DATA = flags.DEFINE_string("data", "", "text files to train on, a glob; default the Python standard library's sources")
_WARMUP_STEPS = flags.DEFINE_integer(
    "warmup_steps", 1000, "steps of the dense warm-up, which trains indexers alone", lower_bound=0
)
_SPARSE_STEPS = flags.DEFINE_integer("sparse_steps", 4000, "steps of the sparse stage, which trains everything", lower_bound=0)
_ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "times --batch_size sequences to a step", lower_bound=1)
_WARMUP_LEARNING_RATE = flags.DEFINE_float(
    "warmup_learning_rate", 1e-3, "peak learning rate of the indexers in the warm-up", lower_bound=0
)
_INDEXER_LEARNING_RATE = flags.DEFINE_float(
    "indexer_learning_rate", 1e-4, "peak learning rate of the indexers in the sparse stage", lower_bound=0
)
_MODEL_LEARNING_RATE = flags.DEFINE_float(
    "model_learning_rate", 7.3e-6, "peak learning rate of the rest in the sparse stage", lower_bound=0
)
_CROSS_LAYER = flags.DEFINE_bool("cross_layer", True, "teach an indexer all layers it serves, not its own alone")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 500, "steps between checkpoints", lower_bound=1)
_KEEP = flags.DEFINE_integer("keep", 2, "checkpoints kept", lower_bound=1)


def stages(context: int, dtype: str) -> list[Stage]:
    """The stages the flags ask for."""

    def stage(name: str, kind: str, steps: int, model_learning_rate: float, indexer_learning_rate: float) -> Stage:
        return Stage(
            name,
            kind,
            steps,
            flags.FLAGS.batch_size,
            context,
            model_learning_rate,
            indexer_learning_rate,
            accumulate=_ACCUMULATE.value,
            cross_layer=_CROSS_LAYER.value,
            compute_dtype=dtype,
        )

    return [
        stage("warm-up", "warmup", _WARMUP_STEPS.value, 0.0, _WARMUP_LEARNING_RATE.value),
        stage("sparse", "sparse", _SPARSE_STEPS.value, _MODEL_LEARNING_RATE.value, _INDEXER_LEARNING_RATE.value),
    ]


def target_schedule(base: Schedule) -> Schedule:
    """--pattern, or uniform at --retention."""
    if _PATTERN.value:
        return Schedule.parse(_PATTERN.value, base.num_layers, f"--pattern={_PATTERN.value}")
    share = search.share("retention", flags.FLAGS.retention)
    return Schedule.uniform(base.num_layers, search.kept(base.num_layers, share))


def export(
    directory: pathlib.Path, params: Params, like: Params, config: Config, schedule: Schedule, source: str | pathlib.Path
) -> Params:
    """Writes params in the dtypes of `like`, with the tokenizer and whatever else goes along with checkpoint `source`.

    Returns what was written.
    """
    written = jax.tree.map(lambda a, b: a.astype(b.dtype), params, like)
    checkpoints_convert.save(directory, written, config, schedule, companions_of=source)
    return written


def plot(output: Output, entries: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4))
    for axes, name, title in zip(
        figure.subplots(1, 2), ("indexer", "language"), ("divergence of the indexers", "language loss"), strict=True
    ):
        for stage in dict.fromkeys(entry["stage"] for entry in entries):
            points = [(entry["step"], entry[name]) for entry in entries if entry["stage"] == stage]
            axes.plot(*zip(*points, strict=True), label=stage, linewidth=1)
        axes.set(xlabel="step", ylabel="nats per token", title=title)
        axes.legend()
    output.save_figure(figure, "training.png")


def run(output_dir: str, seed: int) -> None:
    values = flags.FLAGS
    checkpoint = values.checkpoint or str(options.DEMO)
    dtype = values.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    search.positive(batch_size=values.batch_size, held_out_sequences=values.held_out_sequences)
    config, base, loaded = checkpoints_convert.load(checkpoint)
    schedule = target_schedule(base)
    stored = with_schedule(loaded, base, schedule)
    if not config.index_topk < values.context <= config.max_position_embeddings:
        raise ValueError(
            f"--context={values.context}: must be above index_topk = {config.index_topk}, up to which everything is "
            f"selected, and at most {config.max_position_embeddings}, the model's longest"
        )
    output = Output.create(output_dir)
    target = output.directory / "checkpoint"
    if target.exists() and not values.resume:
        raise ValueError(f"{target}: exists; choose another --output_dir, or --resume")
    runs.check_free(output.directory, values.resume)
    plan = stages(values.context, dtype)
    if not any(stage.steps for stage in plan):
        raise ValueError("--warmup_steps=0 --sparse_steps=0: nothing is trained")
    encoder, end = text.tokenizer(checkpoint), search.separator(config)
    train_documents, held_out_documents = search.split(_DATA.value, values.held_out, "data")
    cuts = search.draw(held_out_documents, "--held_out", encoder, end, values.held_out_sequences, values.context, config, seed)
    try:
        tokens = data.pack(train_documents, encoder, end, output.directory / "tokens.bin", seed)
        data.Rows(tokens, values.context, (seed,))  # before anything takes long: are there enough for a row?
    except ValueError as error:
        raise ValueError(f"--data={_DATA.value}: {error}") from None
    if (largest := int(tokens.max())) >= config.vocab_size:
        raise ValueError(f"--data: token {largest} of the {encoder.name} tokenizer, but vocab_size is {config.vocab_size}")
    print(f"{checkpoint}: {base.pattern} -> {schedule.pattern}; {dtype} on {device()['kind']}")
    print(f"{len(train_documents)} documents, {tokens.size:,} tokens to train on; {len(cuts)} x {values.context} held out")

    rows = {
        "as it came": runs.evaluate(loaded, cuts, config, base, dtype),
        "the schedule, untrained": runs.evaluate(stored, cuts, config, schedule, dtype),
    }
    look = max(1, min([50, *(stage.steps // 5 for stage in plan if stage.steps)]))
    saving = Saving(every=_SAVE_EVERY.value, keep=_KEEP.value, log_every=look)
    training_run = TrainingRun(tokens, plan, config, schedule, seed)
    trained = runs.train(stored, training_run, output, resume=values.resume, saving=saving)
    shutil.rmtree(target, ignore_errors=True)  # of an earlier --resume
    written = export(target, trained.params, stored, config, schedule, checkpoint)
    rows["distilled"] = runs.evaluate(written, cuts, config, schedule, dtype)
    rates = speeds(trained, plan, config, schedule)
    finish(output, checkpoint, base, schedule, rows, plan, rates, tokens, trained.seconds)


def speeds(trained: runs.Trained, plan: list[Stage], config: Config, schedule: Schedule) -> dict[str, Any]:
    """By stage tokens/s and, on an accelerator, the model FLOPs' share of the rate of a bfloat16 matmul of the same run."""
    matmul = None if jax.default_backend() == "cpu" else runs.matmul_rate()
    found: dict[str, Any] = {"matmul_tflops": None if matmul is None else matmul / 1e12}
    for stage in plan:
        if (rate := trained.tokens_per_second.get(stage.name)) is not None:
            flops = flops_per_token(config, schedule, stage) * rate
            found[stage.name] = {
                "tokens_per_second": rate,
                "model_tflops": flops / 1e12,
                "of_matmul": None if matmul is None else flops / matmul,
            }
    return found


def _speed_cells(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    return [f"{found['tokens_per_second']:,.0f}", "-" if found["of_matmul"] is None else f"{found['of_matmul']:.1%}"]


def finish(
    output: Output,
    checkpoint: str,
    base: Schedule,
    schedule: Schedule,
    rows: dict[str, runs.HeldOut],
    plan: list[Stage],
    rates: dict[str, Any],
    tokens: np.ndarray,
    seconds: float,
) -> None:
    entries = runs.read_log(output.directory)
    plot(output, entries)
    header = ["", "indexers", "language loss", "indexers' divergence"]
    sizes = [base.num_full, schedule.num_full, schedule.num_full]
    cells = [
        [name, size, f"{found.language:.4f}", f"{found.indexer:.4f}"]
        for (name, found), size in zip(rows.items(), sizes, strict=True)
    ]
    about_stages = markdown_table(
        ["stage", "steps", "sequences", "context", "model's rate", "indexers' rate", "tokens/s", "model FLOPs of matmul rate"],
        [
            [
                s.name,
                s.steps,
                s.sequences,
                s.context,
                s.model_learning_rate or "-",
                s.indexer_learning_rate,
                *_speed_cells(rates.get(s.name)),
            ]
            for s in plan
        ],
    )
    note = "Nats per token on held-out text; the divergence is summed over the F layers, over the selected keys."
    metrics = {
        "checkpoint": checkpoint,
        "pattern": schedule.pattern,
        "held_out": {name: {"language": found.language, "indexer": found.indexer} for name, found in rows.items()},
        "tokens": int(tokens.size),
        "seconds": seconds,
        "speed": rates,
    }
    report = f"# Distillation for `{schedule.pattern}`\n\n{markdown_table(header, cells)}\n\n{note}\n\n{about_stages}\n\n"
    output.finish("distill", metrics, report + "![training](training.png)\n\nThe checkpoint is in checkpoint/.\n")
    print(f"\n{text_table(header, cells)}\n\n{note}\n\n{about_stages}\n\nwritten to {output.directory}/, with checkpoint/")
