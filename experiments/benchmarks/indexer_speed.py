"""Speed of training one group's indexer on a frozen model of a released model's shape, with random weights.

A group is an F layer and the S layers that it serves. Its layers run once over all sequences of random tokens, the targets are
made (or the softmax's denominators, where targets are computed at every step), and the F layer's indexer takes some steps of a
sequence each: what `--experiment=distill --train=indexers` does for every group of a checkpoint. One layer's experts at a time
are on the device. FLOPs are those that the method needs; the rate they are held against is that of bfloat16 products of 8192 x
8192 matrices in the same run. For a whole model targets are taken to be computed at every step where those of all its sequences
have no room on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import fit, indexer_runs, inputs, options, runs
from experiments.common.report import Output, device, markdown_table, text_table
from indexcache_jax import indexer_training, tensors
from indexcache_jax.config import Config
from indexcache_jax.indexer_training import Run
from indexcache_jax.params import FP8_BASE, Params, abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage

for _name in ("preset", "weights", "context", "sequences", "num_layers", "stream_memory"):
    flags.declare_key_flag(_name)
_TIMED = flags.DEFINE_integer("timed_steps", 20, "steps of the group's indexer, of which the first three are not timed", 6)

LAYERS = 4  # of a group, by default
UNTIMED = 3  # calls of a program before those that are timed
WHOLE = 64, 400  # sequences, and steps of a group, of the run that is estimated
DEVICES = 1, 8  # of the run that is estimated


@dataclasses.dataclass(frozen=True)
class RandomLayers:
    """Layers that all have the same random weights, which are made once: making them is not what is measured."""

    config: Config
    weights: str | None
    seed: int

    @property
    def schedule(self) -> Schedule:
        return Schedule.all_full(self.config.num_layers)

    def _some(self, stacked: bool) -> Params:
        one = dataclasses.replace(self.config, num_layers=1, moe_layers=self.config.moe_layers[:1])
        return _random(one, self.weights, self.seed, stacked)

    def ends(self, shardings: Params | None = None) -> Params:
        return self._some(stacked=False)

    def layer(self, layer: int, shardings: Params | None = None) -> Params:
        return self._some(stacked=True)


@functools.cache
def _random(config: Config, weights: str | None, seed: int, stacked: bool) -> Params:
    """Random params: those that belong to layers, or the others; the rest is None."""
    tree = abstract(config, Schedule.all_full(1), weights)
    tree = jax.tree.map(lambda tensor: tensor if tensor.stacked == stacked else None, tree)
    return jax.jit(lambda key: tensors.init(key, tree, jnp.bfloat16))(jax.random.key(seed))


class Clock:
    """The seconds between calls of `progress`, by what was done: "layer", "targets" or "step"."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._last = time.perf_counter()

    def progress(self, work: float, what: str) -> None:
        now = time.perf_counter()
        kind = next((kind for kind in ("targets", "step") if kind in what), "layer")
        self.seconds.setdefault(kind, []).append(now - self._last)
        self._last = now

    def median(self, kind: str, untimed: int) -> float:
        """The median of a kind without the first calls, or of all where there are no others."""
        found = self.seconds[kind]
        return statistics.median(found[untimed:] or found)


def model(name: str, layers: int) -> Config:
    """So many layers of a released model, all of the kind of its last."""
    config, _ = inputs.preset_model(name)
    return dataclasses.replace(config, num_layers=layers, moe_layers=config.moe_layers[-1:] * layers)


def read_run(output: Output, seed: int) -> tuple[Run, str]:
    """The run that the flags describe, and what it keeps on the host, for a reader."""
    options.check_positive("sequences", "context")
    # One more layer, so that the group's last one runs too, as it does in a model.
    layers, context = options.NUM_LAYERS.value or LAYERS, options.CONTEXT.value
    config = model(options.PRESET.value, layers + 1)
    if context > config.max_position_embeddings:
        raise ValueError(f"--context={context}: the model's longest is {config.max_position_embeddings}")
    count = options.calibration_sequences()
    tokens = np.random.default_rng(seed).integers(config.vocab_size, size=(count, context), dtype=np.int32)
    stage = Stage("indexers", "warmup", _TIMED.value, 1, context, 0.0, 1e-3)
    weights = inputs.made_weights() and FP8_BASE
    run = Run(RandomLayers(config, weights, seed), Schedule("F" + "S" * (layers - 1) + "F"), tokens, stage, seed)
    need, available = indexer_training.need(run), options.stream_memory()
    run, memory = indexer_runs.within(run, available, output.directory)
    host = {
        "targets": need.targets if run.keeps_targets else 0,
        "hidden states": need.states if need.states <= available else 0,
    }
    smaller = "a smaller --context, --sequences or --stream_memory, or --weights=fp8"
    all_full = Schedule.all_full(config.num_layers)
    fit.streamed(config, all_full, rows=1, context=context, dtype="bfloat16", weights=weights, host=host, smaller=smaller)
    return run, memory


def measure(run: Run) -> dict[str, Any]:
    """Seconds of a step, of a layer and of its target for one sequence, and what follows from them."""
    matmul = None if jax.default_backend() == "cpu" else runs.matmul_rate()
    group, clock = run.groups[0], Clock()
    trained = next(indexer_training.train(run, progress=clock.progress))
    step, target = clock.median("step", UNTIMED), clock.median("targets", 1) / len(group)
    layer = clock.median("layer", 1) / len(run.tokens)
    work = indexer_training.step_work(run, len(group))
    whole = dataclasses.replace(run, tokens=np.zeros((WHOLE[0], run.tokens.shape[1]), np.int32))
    fit_all = matmul is None or indexer_training.rows_on_device(None, whole, len(group)) == WHOLE[0]
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "seconds_per_step": step,
        "seconds_per_layer": layer,
        "seconds_per_target": target,
        "tokens_per_second": run.tokens.shape[1] / step,
        "model_tflops": work / step / 1e12,
        "of_matmul": None if matmul is None else work / step / matmul,
        "matmul_tflops": None if matmul is None else matmul / 1e12,
        "peak_device_bytes": peak,
        "targets_kept": run.keeps_targets,
        "all_targets_fit": fit_all,
        "divergence": trained.divergence.tolist(),
    }


def whole_hours(found: dict[str, Any], layers: int, group: int, devices: int) -> float:
    """Hours for a whole model of so many layers, reading its weights not counted.

    Devices take sequences in turn through its layers, and groups in turn: the most that one of them has decides.
    """
    sequences, steps = WHOLE
    again = found["targets_kept"] and not found["all_targets_fit"]
    step = found["seconds_per_step"] + (group * found["seconds_per_target"] if again else 0.0)
    of_group = group * sequences * found["seconds_per_target"] + steps * step
    of_layers = layers * math.ceil(sequences / devices) * found["seconds_per_layer"]
    return (of_layers + math.ceil(layers / group / devices) * of_group) / 3600


def run(output_dir: str, seed: int) -> None:
    output = Output.create(output_dir)
    given, memory = read_run(output, seed)
    group, context = len(given.groups[0]), given.tokens.shape[1]
    print(f"{options.PRESET.value}: {group} layers, {len(given.tokens)} x {context} tokens; {memory}", flush=True)
    found = measure(given)
    layers = inputs.preset_model(options.PRESET.value)[0].num_layers
    hours = {devices: whole_hours(found, layers, group, devices) for devices in DEVICES}
    header = ["s a step", "tokens/s", "model TFLOP/s", "of the matmul's rate", "s a layer", "s a target", "GB of the device"]
    cells = [
        f"{found['seconds_per_step']:.3f}",
        f"{found['tokens_per_second']:,.0f}",
        f"{found['model_tflops']:.1f}",
        "-" if found["of_matmul"] is None else f"{found['of_matmul']:.1%}",
        f"{found['seconds_per_layer']:.3f}",
        f"{found['seconds_per_target']:.3f}",
        "-" if found["peak_device_bytes"] is None else f"{found['peak_device_bytes'] / 1e9:.1f}",
    ]
    kept = "kept" if found["targets_kept"] else "computed at every step"
    on_devices = " and ".join(f"{of_devices:.2f} hours on {devices}" for devices, of_devices in hours.items())
    again = "" if found["all_targets_fit"] else ", with targets computed at every step"
    estimate = (
        f"Targets are {kept}; seconds a layer and a target are of one sequence. For all {layers} layers in groups of {group}, "
        f"{WHOLE[0]} sequences of {context} tokens and {WHOLE[1]} steps a group, this makes {on_devices} {device()['kind']}"
        f"{again}, reading the weights not counted."
    )
    about = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    text = f"# Speed of training an indexer\n\n{about}\n\n{markdown_table(header, [cells])}\n\n{estimate}\n"
    output.finish("indexer_speed", found | {"layers": group, "hours": hours}, text)
    print(f"\n{text_table(header, [cells])}\n\n{estimate}\n\nwritten to {output.directory}/")
