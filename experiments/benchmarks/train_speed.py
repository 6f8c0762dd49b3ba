"""Speed of distillation: tokens/s of both stages on a model with random weights, and the share of a matmul's rate.

A step is the whole of it: forward, backward, clipping and AdamW, on one sequence of --context random tokens, weights in
float32 and arithmetic in bfloat16. Model FLOPs count what the method needs, nothing that is computed twice or masked out
(`training.flops_per_token`); the rate they are held against is that of bfloat16 products of 8192 x 8192 matrices in the
same run. The model is a slice of dense layers in the proportions of the 30B shape: hidden 2048, 16 heads of 192 and 128,
latents of 512, 16 index heads of 128, 62 million weights a layer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import options, profiling, runs
from experiments.common.report import Output, device, markdown_table, text_table
from indexcache_jax import distill, training
from indexcache_jax.config import Config
from indexcache_jax.params import init
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage

flags.declare_key_flag("num_layers")
_CONTEXT = flags.DEFINE_integer("train_context", 8192, "tokens of the sequence of a step", lower_bound=128)
_TOPK = flags.DEFINE_integer("train_topk", 512, "keys that a query selects in the sparse stage", lower_bound=1)
_PATTERN = flags.DEFINE_string("train_pattern", "FSSS", "schedule, repeated over the layers")
_STEPS = flags.DEFINE_integer("train_steps", 8, "steps timed, after two that are not", lower_bound=1)
_STAGES = flags.DEFINE_list("train_stages", ["sparse", "warmup"], "stages timed, of sparse and warmup")

LAYERS = 8
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
    "target_kernel": "divergence",
    "scores_kernel": "divergence",
    "index_dq_kernel": "divergence",
    "index_dk_kernel": "divergence",
    "mosaic": "selection",
    "gemm": "products",
    "cutlass": "products",
    "nvjet": "products",
}
OTHER = "other"


def model(layers: int, context: int, topk: int, pattern: str) -> tuple[Config, Schedule]:
    fields = FIELDS | {
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "index_topk": topk,
        "max_position_embeddings": context,
    }
    repeated = (pattern * layers)[:layers]
    return Config.from_hf(fields), Schedule.parse(repeated, layers, f"--train_pattern={pattern}")


def stage_of(kind: str, context: int) -> Stage:
    return Stage(kind, kind, 1000, 1, context, 1e-5 if kind == "sparse" else 0.0, 1e-4)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of one stage. `parts`: milliseconds of a step's kernels by PARTS, `slowest` of the slowest single names."""

    seconds: float
    tokens_per_second: float
    model_tflops: float
    of_matmul: float | None
    language: float
    divergence: float
    compile_seconds: float
    parts: dict[str, float]
    slowest: dict[str, float]


def measure(
    config: Config, schedule: Schedule, stage: Stage, steps: int, matmul: float | None, seed: int, profile: bool = True
) -> Speed:
    params = jax.jit(init, static_argnums=3)(jax.random.key(seed), config, schedule, jnp.float32)
    state = training.init_optimiser_state(params, stage, config, schedule)
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(config.vocab_size, size=(1, 1, stage.context + 1)), jnp.int32)
    began = time.perf_counter()
    run = training.step.lower(params, state, tokens, config, schedule, stage=stage).compile()
    compiled = time.perf_counter() - began
    found = jnp.zeros(())

    def step() -> jax.Array:
        nonlocal params, state, found
        params, state, found = run(params, state, tokens, config, schedule)
        return found

    times = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    language, divergence = (float(x) for x in found[:2])
    if not np.isfinite([language, divergence]).all():
        raise ValueError(f"{stage.kind}: the losses are {language} and {divergence}")
    parts: dict[str, float] = {}
    names: dict[str, float] = {}
    if profile and jax.default_backend() == "gpu":
        for name, ms in profiling.kernels_of(step):
            part = next((part for key, part in PARTS.items() if key in name), OTHER)
            parts[part] = parts.get(part, 0.0) + ms
            names[name] = names.get(name, 0.0) + ms
    rate = stage.context / seconds
    flops = training.flops_per_token(config, schedule, stage) * rate
    slowest = dict(sorted(names.items(), key=lambda item: -item[1])[:25])
    share = None if matmul is None else flops / matmul
    return Speed(seconds, rate, flops / 1e12, share, language, divergence, compiled, parts, slowest)


HEADER = ["stage", "ms a step", "tokens/s", "model TFLOP/s", "of the matmul's rate", "seconds to compile"]


def cells(kind: str, speed: Speed) -> list[str]:
    share = "-" if speed.of_matmul is None else f"{speed.of_matmul:.1%}"
    rate = f"{speed.tokens_per_second:,.0f}"
    return [kind, f"{1e3 * speed.seconds:.1f}", rate, f"{speed.model_tflops:.0f}", share, f"{speed.compile_seconds:.0f}"]


def run(output_dir: str, seed: int) -> None:
    output = Output.create(output_dir)
    layers, context = options.NUM_LAYERS.value or LAYERS, _CONTEXT.value
    if unknown := [kind for kind in _STAGES.value if kind not in ("sparse", "warmup")]:
        raise ValueError(f"--train_stages={unknown[0]}: not sparse or warmup")
    if _TOPK.value >= context:
        raise ValueError(f"--train_topk={_TOPK.value}: must be below --train_context={context}")
    config, schedule = model(layers, context, _TOPK.value, _PATTERN.value)
    matmul = None if jax.default_backend() == "cpu" else runs.matmul_rate()
    way = "kernels" if distill.by_kernels(1, context, jnp.bfloat16, config) else "XLA"
    print(f"{layers} layers, {schedule.pattern}, context {context}, top {_TOPK.value}, {way} on {device()['kind']}", flush=True)
    speeds: dict[str, Speed] = {}
    for kind in _STAGES.value:
        speeds[kind] = measure(config, schedule, stage_of(kind, context), _STEPS.value, matmul, seed)
        print(text_table(HEADER, [cells(kind, speeds[kind])]), flush=True)
    rows = [cells(kind, speed) for kind, speed in speeds.items()]
    parts = [[kind, part, f"{ms:.2f}"] for kind, speed in speeds.items() for part, ms in speed.parts.items()]
    metrics = {
        "layers": layers,
        "pattern": schedule.pattern,
        "context": context,
        "index_topk": _TOPK.value,
        "way": way,
        "matmul_tflops": None if matmul is None else matmul / 1e12,
        "stages": {kind: dataclasses.asdict(speed) for kind, speed in speeds.items()},
    }
    about = (
        f"{layers} layers, `{schedule.pattern}`, context {context}, {_TOPK.value} selected keys, attention and divergence by "
        f"{way}" + ("" if matmul is None else f"; bfloat16 matmul {matmul / 1e12:.0f} TFLOP/s") + "."
    )
    text = [f"# Speed of distillation\n\n{' '.join((__doc__ or '').split(chr(10) * 2, 1)[1].split())}", about]
    text.append(markdown_table(HEADER, rows))
    if parts:
        text.append("Milliseconds of a step's kernels:\n\n" + markdown_table(["stage", "part", "ms"], parts))
    output.finish("train_speed", metrics, "\n\n".join(text))
    print(f"\n{about}\n\n{text_table(HEADER, rows)}")
    for kind, speed in speeds.items():
        print(f"\n{kind}: " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in speed.parts.items()))
        for name, ms in list(speed.slowest.items())[:15]:
            print(f"  {ms:8.2f}  {name[:110]}")
    print(f"\nwritten to {output.directory}/")
