"""Speed of distillation: tokens/s of both stages on a model with random weights, and the share of a matmul's rate.

A step is the whole of it: forward, backward, clipping and AdamW, on sequences of --train_context random tokens, one for
every device of the mesh's data axis, weights in float32 and arithmetic in bfloat16. Steps follow each other as in training,
which waits for none before it sends off the next. Model FLOPs count what the method needs, nothing that is computed twice or
masked out (`training.flops_per_token`); the rate they are held against is that of bfloat16 products of 8192 x 8192 matrices
in the same run, of all devices together. The model is a slice of dense layers in the proportions of the 30B shape: hidden
2048, 16 heads of 192 and 128, latents of 512, 16 index heads of 128, 62 million weights a layer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import devices, fit, inputs, options, profiling, runs
from experiments.common.report import Output, device, markdown_table, text_table
from indexcache_jax import ops, training
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import TRAINING
from indexcache_jax.training import Stage

for _name in ("num_layers", "schedule", "mesh"):
    flags.declare_key_flag(_name)
_CONTEXT = flags.DEFINE_integer("train_context", 8192, "tokens of a sequence", lower_bound=128)
_TOPK = flags.DEFINE_integer("train_topk", 512, "keys that a query selects in the sparse stage", lower_bound=1)
_STEPS = flags.DEFINE_integer("train_steps", 8, "steps timed, after two that are not", lower_bound=1)
_STAGES = flags.DEFINE_list("train_stages", ["sparse", "warmup"], "stages timed, of sparse and warmup")

LAYERS = 8
SCHEDULE = "FSSS"  # by default; a pattern is repeated over the layers
FIELDS = {
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Parts of kernels' names, in the order in which they are looked for.
PARTS = {
    "selected_attention_forward": "attention",
    "selected_attention_d": "attention's gradient",
    "denominators_kernel": "divergence",
    "target_kernel": "divergence",
    "scores_kernel": "divergence",
    "slopes_kernel": "divergence",
    "index_dq_kernel": "divergence",
    "index_dk_kernel": "divergence",
    "mosaic": "selection",
    "nccl": "exchange",
    "gemm": "products",
    "cutlass": "products",
    "nvjet": "products",
}
OTHER = "other"
UNTIMED = 2  # steps before those that are timed
SLOWEST, SLOWEST_SHOWN = 25, 15  # kernels by name, in results.json and on the terminal


def model(layers: int, context: int, topk: int, entry: str) -> tuple[Config, Schedule]:
    """The slice of the 30B shape, and the schedule that an entry of --schedule gives; a pattern is repeated over the layers."""
    fields = FIELDS | {
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "index_topk": topk,
        "max_position_embeddings": context,
    }
    config = Config.from_hf(fields)
    if set(entry.upper()) <= {"F", "S"}:
        return config, Schedule.parse((entry * layers)[:layers], layers, f"--schedule={entry}")
    return config, inputs.schedule(entry, layers)


def stage_of(kind: str, context: int, rows: int = 1) -> Stage:
    return Stage(kind, kind, 1000, rows, context, 1e-5 if kind == "sparse" else 0.0, 1e-4)


@dataclasses.dataclass(frozen=True)
class Speed:
    """One stage's speed. parts: milliseconds of a step's kernels by PARTS; slowest: those of the slowest kernels by name."""

    seconds: float
    tokens_per_second: float
    model_tflops: float
    of_matmul: float | None
    language: float
    divergence: float
    compile_seconds: float
    parts: dict[str, float]
    slowest: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is timed. topk: keys that a query selects; steps: timed; attention_by: what computes attention and divergence."""

    config: Config
    schedule: Schedule
    context: int
    topk: int
    stages: list[Stage]
    steps: int
    attention_by: str


def read_inputs(rows: int) -> Inputs:
    """The model and the stages that the flags give, for steps of so many sequences."""
    layers, context, topk = options.NUM_LAYERS.value or LAYERS, _CONTEXT.value, _TOPK.value
    if unknown := [kind for kind in _STAGES.value if kind not in ("sparse", "warmup")]:
        raise ValueError(f"--train_stages={unknown[0]}: not sparse or warmup")
    if not _STAGES.value:
        raise ValueError("--train_stages=: name sparse, warmup or both")
    options.check_positive("train_context")
    if topk >= context:
        raise ValueError(f"--train_topk={topk}: must be below --train_context={context}")
    entry = inputs.only_schedule()
    config, schedule = model(layers, context, topk, SCHEDULE if entry is None else entry)
    attention_by = "kernels" if ops.trains_by_kernels(1, context, jnp.bfloat16, config) else "XLA"
    print(
        f"{layers} layers, {schedule.pattern}, context {context}, top {topk}, {attention_by} on {device()['kind']}", flush=True
    )
    stages = [stage_of(kind, context, rows) for kind in _STAGES.value]
    fit.training(config, schedule, stages, smaller="a smaller --num_layers")
    return Inputs(config, schedule, context, topk, stages, _STEPS.value, attention_by)


def kernel_parts(step: Callable[[], Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of the kernels of one step, by PARTS and by name, means over devices. Neither where there is no GPU."""
    parts: dict[str, float] = {}
    names: dict[str, float] = {}
    if jax.default_backend() == "gpu":
        for name, ms in profiling.kernels_of(step):
            part = next((part for key, part in PARTS.items() if key in name), OTHER)
            parts[part] = parts.get(part, 0.0) + ms / jax.local_device_count()
            names[name] = names.get(name, 0.0) + ms / jax.local_device_count()
    return parts, dict(sorted(names.items(), key=lambda item: -item[1])[:SLOWEST])


def measure(config: Config, schedule: Schedule, stage: Stage, steps: int, matmul: float | None, seed: int) -> Speed:
    """The mean of so many steps. matmul: FLOP/s to hold the step's against, or None."""
    params = runs.random_params(jax.random.key(seed), config, schedule)
    state = training.init_optimiser_state(params, stage, config, schedule)
    rng = np.random.default_rng(seed)
    tokens = runs.put_tokens(rng.integers(config.vocab_size, size=(1, stage.rows, stage.context + 1), dtype=np.int32), stage)
    began = time.perf_counter()
    program = training.step.lower(params, state, tokens, config, schedule, stage=stage).compile()
    compile_seconds = time.perf_counter() - began
    fit.program(program, f"--train_context={stage.context}: a {stage.kind} step", "a smaller one or --num_layers")
    metrics = jnp.zeros(())

    def step() -> jax.Array:
        nonlocal params, state, metrics
        params, state, metrics = program(params, state, tokens, config, schedule)
        return metrics

    for _ in range(UNTIMED):
        jax.block_until_ready(step())
    began = time.perf_counter()
    for _ in range(steps):
        step()
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - began) / steps
    language, divergence = (float(x) for x in metrics[:2])
    if not np.isfinite([language, divergence]).all():
        raise ValueError(f"{stage.kind}: the losses are {language} and {divergence}")
    tokens_per_second = stage.sequences * stage.context / seconds
    flops = training.flops_per_token(config, schedule, stage) * tokens_per_second
    share = None if matmul is None else flops / matmul
    parts, slowest = kernel_parts(step)
    return Speed(seconds, tokens_per_second, flops / 1e12, share, language, divergence, compile_seconds, parts, slowest)


@dataclasses.dataclass(frozen=True)
class Result:
    """The speeds by stage, and the FLOP/s of bfloat16 matmuls on all devices, None on a CPU."""

    speeds: dict[str, Speed]
    matmul: float | None


def measure_all(given: Inputs, seed: int) -> Result:
    """Every stage, shown as it is measured."""
    matmul = None if jax.default_backend() == "cpu" else runs.matmul_rate() * jax.device_count()
    speeds: dict[str, Speed] = {}
    for stage in given.stages:
        speeds[stage.kind] = measure(given.config, given.schedule, stage, given.steps, matmul, seed)
        print(text_table(HEADER, [cells(stage.kind, speeds[stage.kind])]), flush=True)
    return Result(speeds, matmul)


HEADER = ["stage", "ms a step", "tokens/s", "model TFLOP/s", "of the matmul's rate", "seconds to compile"]


def cells(kind: str, speed: Speed) -> list[str]:
    """A row of the report."""
    share = "-" if speed.of_matmul is None else f"{speed.of_matmul:.1%}"
    rate = f"{speed.tokens_per_second:,.0f}"
    return [kind, f"{1e3 * speed.seconds:.1f}", rate, f"{speed.model_tflops:.0f}", share, f"{speed.compile_seconds:.0f}"]


def report(result: Result, given: Inputs, output: Output, layout: devices.Layout) -> None:
    """Writes results.json and report.md, and prints the table and the slowest kernels."""
    speeds, matmul = result.speeds, None if result.matmul is None else result.matmul / 1e12
    rows = [cells(kind, speed) for kind, speed in speeds.items()]
    parts = [[kind, part, f"{ms:.2f}"] for kind, speed in speeds.items() for part, ms in speed.parts.items()]
    metrics = {
        "layers": given.config.num_layers,
        "pattern": given.schedule.pattern,
        "context": given.context,
        "sequences": given.stages[0].sequences if given.stages else 0,
        "index_topk": given.topk,
        "way": given.attention_by,
        "matmul_tflops": matmul,
        "stages": {kind: dataclasses.asdict(speed) for kind, speed in speeds.items()},
    }
    about = f"{given.config.num_layers} layers, `{given.schedule.pattern}`, context {given.context}, "
    about += f"{given.topk} selected keys, attention and divergence by {given.attention_by}"
    about += "." if matmul is None else f"; bfloat16 matmul {matmul:.0f} TFLOP/s."
    text = [f"# Speed of distillation\n\n{' '.join((__doc__ or '').split(chr(10) * 2, 1)[1].split())}", about]
    text.append(markdown_table(HEADER, rows))
    if parts:
        text.append("Milliseconds of a step's kernels:\n\n" + markdown_table(["stage", "part", "ms"], parts))
    output.finish("train_speed", metrics, "\n\n".join(text), layout)
    print(f"\n{about}\n\n{text_table(HEADER, rows)}")
    for kind, speed in speeds.items():
        print(f"\n{kind}: " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in speed.parts.items()))
        for name, ms in list(speed.slowest.items())[:SLOWEST_SHOWN]:
            print(f"  {ms:8.2f}  {name[:110]}")
    print(f"\nwritten to {output.directory}/")


def run(output_dir: str, seed: int) -> None:
    layout = devices.layout(1)
    output = Output.create(output_dir)
    with devices.in_force(layout, TRAINING):
        given = read_inputs(layout.data)
        report(measure_all(given, seed), given, output, layout)
