"""Measures inference: prefill and decode of one model under several schedules, at several lengths, beside the paper's table.

How a time is taken: weights are random, made on the device, and all schedules share them. A prompt goes in chunk by chunk
and every chunk is waited for, so that one long prefill gives the time of every shorter one. Rounds go through the schedules
in turn; a figure is the median over the rounds and one more, which the profile needs. One request decodes from the cache
that its prefill left. The full cache is as many rows as fit, each a copy of that request's cache with a token of its own to
go on from, so that rows choose experts of their own; its rate is that of all rows together. A step's time is that of a
program of many steps, divided. Rows fit where weights, their cache, the first layer's part of a request and what the
compiler says a program needs beside them fit; where they do not after all, fewer are tried.

Shares are the times of kernels by their names, seen through CUPTI in the chunk that ends at each length and in a decode
program; a whole prefill's are those of its chunks, interpolated between the ones that were profiled. A stage without a
kernel of its own is in the rest, as the experts of a decode step are. Several devices' times are averaged; what they
exchange counts whole, also where it is hidden behind other kernels. Layers are compiled anew for these chunks, to launch
their kernels one by one: CUPTI loses some of those in CUDA graphs. Where the kernels that it showed take less than 85 % of
the time of the same run without it, there are no shares.

How much neighbouring queries of a prompt select alike decides how much of the gathering they can share. Random weights and
tokens give them little in common, where real text gives them much: the overlap of this run is in the report.

A model that is cut to fewer layers than it has is measured without its dense layers, embedding and head, and times are
multiplied by how many times as many layers the whole has; such rows say "scaled". Their full cache is what fits beside the
layers there are.

For one H200 set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, so that the cache gets what the weights leave, and
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false: cuBLAS picks its algorithm in milliseconds where Triton tries dozens of
kernels for every shape of product.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks.speed.bench import ROWS_WITHOUT_MEMORY_FIGURES, Bench, Sizes
from experiments.benchmarks.speed.models import Model, model
from experiments.benchmarks.speed.rounds import Rounds, random_prompt
from experiments.benchmarks.speed.rows import record
from experiments.benchmarks.speed.tables import HEADER, cells, plot, report
from experiments.common import devices, fit, inputs, options
from experiments.common.report import Output, text_table
from indexcache_jax import ops, serving
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import SERVING

for _name in ("preset", "num_layers", "schedule", "chunk", "latent_cache", "index_cache", "weights", "time_limit", "mesh"):
    flags.declare_key_flag(_name)
_LENGTHS = flags.DEFINE_list("lengths", ["10240", "61440", "122880", "204800"], "prompt tokens, multiples of the chunk")
_STEPS = flags.DEFINE_integer("decode_steps", 32, "decode steps of a program")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "through all schedules, as far as --time_limit allows")
_FULL = flags.DEFINE_list("full_lengths", [], "lengths at which the full cache is measured too; default all of --lengths")
_ROWS = flags.DEFINE_integer("full_rows", 0, "rows of the full cache; default as many as fit", lower_bound=0)
_RUN = flags.DEFINE_integer("token_run", 1, "times that each random token of a prompt stands in a row: neighbours select alike")
_KERNEL_BY_KERNEL = flags.DEFINE_bool(
    "kernel_by_kernel", False, "prefill also with its kernels launched one by one, in turn with the usual CUDA graphs of them"
)
_PRICE = flags.DEFINE_float("gpu_hour_price", 3.0, "of one device, for the cost of a million tokens", lower_bound=0)

# What --schedule and --chunk are by default.
SCHEDULES = (options.ALL_F, "1/2", "1/4")
CHUNK = 10240
SECONDS = 330.0  # by default, of a run


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is measured. schedules: by the entries of --schedule; prompt: the tokens of the longest length."""

    model: Model
    schedules: dict[str, Schedule]
    sizes: Sizes
    cache_format: serving.CacheFormat
    weights: str | None  # "fp8" for matrices in 8 bits
    rounds: int
    prompt: np.ndarray

    @property
    def model_name(self) -> str:
        layers = f"{self.model.config.num_layers} of {self.model.layers} layers"
        return f"{self.model.name}, {layers}, random {self.weights or 'bf16'} weights"


def integers(flag: str, values: list[str]) -> Iterator[int]:
    """ValueError, naming the flag, for what is not a number of at least 1."""
    for value in values:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--{flag}={value}: not a number of at least 1")
        yield int(value)


def read_sizes() -> Sizes:
    """Lengths, chunk and steps that the flags give; ValueError where they do not go together."""
    if not _LENGTHS.value:
        raise ValueError("--lengths=: name at least one")
    lengths, chunk = sorted(integers("lengths", _LENGTHS.value)), options.CHUNK.value or CHUNK
    for length in lengths:
        if length % chunk:
            raise ValueError(f"--lengths={length}: not a multiple of --chunk={chunk}")
    full_lengths = sorted(integers("full_lengths", _FULL.value)) or lengths
    if foreign := set(full_lengths) - set(lengths):
        raise ValueError(f"--full_lengths={min(foreign)}: not one of --lengths")
    return Sizes(lengths, full_lengths, chunk, _STEPS.value)


def read_inputs(seed: int) -> Inputs:
    """What the flags ask for, checked."""
    shape = model(options.PRESET.value, options.NUM_LAYERS.value)
    options.check_positive("chunk", "decode_steps", "rounds", "token_run")
    sizes = read_sizes()
    return Inputs(
        model=shape,
        schedules={entry: shape.schedule(entry) for entry in dict.fromkeys(options.SCHEDULE.value or SCHEDULES)},
        sizes=sizes,
        cache_format=inputs.cache_format(jnp.bfloat16, serving.FP8),
        weights=inputs.made_weights(),
        rounds=_ROUNDS.value,
        prompt=random_prompt(seed, shape.config.vocab_size, sizes.lengths[-1], _RUN.value),
    )


def make_bench(given: Inputs, seed: int) -> Bench:
    """The model under every schedule, its programs still to be compiled."""
    shape, sizes, began = given.model, given.sizes, time.perf_counter()
    asked: dict[str, Any] = {
        "rows": 1,
        "length": sizes.max_len,
        "chunk": sizes.chunk,
        "dtype": jnp.bfloat16,
        "form": given.cache_format,
    }
    asked |= {"weights": given.weights, "flag": "lengths", "smaller": "a smaller --num_layers or --lengths, or --weights=fp8"}
    all_full = Schedule.all_full(shape.config.num_layers)
    # A request's cache stays on the host, for the rows of the full cache; on a CPU these lie there as well.
    copies = 1 + (ops.platform() == "cpu") * (_ROWS.value or ROWS_WITHOUT_MEMORY_FIGURES)
    row = sizes.max_len * serving.bytes_per_token(shape.config, all_full, given.cache_format)
    fit.serving(shape.config, all_full, **asked, host={"copies of the cache": copies * row})
    whole = jax.block_until_ready(serving.random_weights(jax.random.key(seed), shape.config, weights=given.weights))
    print(f"weights made in {time.perf_counter() - began:.0f} s", flush=True)
    return Bench(
        model=shape,
        weights={entry: serving.restrict(whole, shape.config, schedule) for entry, schedule in given.schedules.items()},
        schedules=given.schedules,
        sizes=given.sizes,
        cache_format=given.cache_format,
    )


class Reporter:
    """Writes results.json and report.md of what a run has measured so far. about: what they say of the whole run."""

    def __init__(self, given: Inputs, output: Output, layout: devices.Layout) -> None:
        self.given, self.output, self.layout = given, output, layout
        self.price = layout.num_devices * _PRICE.value  # of an hour
        names = {dtype: name for name, dtype in inputs.CACHE_DTYPES.items()}
        self.about: dict[str, Any] = {
            "model": given.model_name,
            "index_cache": names[given.cache_format.index_dtype],
            "latent_cache": names[given.cache_format.latent_dtype],
            "chunk": given.sizes.chunk,
        }

    def records(self, measured: Rounds) -> list[dict[str, Any]]:
        return [record(row, self.given.model, self.price) for row in measured.rows.values()]

    def write(self, measured: Rounds) -> None:
        if measured.overlap:
            shares = ", ".join(f"{entry} {100 * share:.0f} %" for entry, share in measured.overlap.items())
            self.about["selected_alike_by_neighbouring_queries"] = shares
        if measured.peak is not None:
            self.about["peak_memory_of_one_request"] = f"{measured.peak / 1e9:.1f} GB"
        records = self.records(measured)
        metrics = self.about | {
            "neighbours_overlap": measured.overlap,
            "patterns": {entry: schedule.pattern for entry, schedule in self.given.schedules.items()},
            "rows": records,
        }
        how = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
        self.output.finish("speed", metrics, report(records, self.about, how), self.layout)

    def finish(self, measured: Rounds) -> None:
        """Writes everything, the plot too, and prints the table."""
        self.write(measured)
        shape, records = self.given.model, self.records(measured)
        scaled = "" if shape.scale == 1 else f", times scaled to {shape.layers}"
        plot(self.output, records, f"{self.about['model']}{scaled}, on {self.layout.text}")
        print(text_table(HEADER, [cells(r) for r in records]))


def measure(given: Inputs, reporter: Reporter, deadline: float, seed: int) -> Rounds:
    """Compiles the programs and goes through the rounds for which there is time."""
    bench, start = make_bench(given, seed), time.perf_counter()
    bench.compile(_ROWS.value)
    seconds = reporter.about["seconds_to_compile"] = round(time.perf_counter() - start, 1)
    print(f"{len(bench.decode_one) + len(bench.decode_full)} decode programs, {seconds} s", flush=True)
    measured = Rounds(bench, given.prompt, deadline, reporter.price, reporter.write, _KERNEL_BY_KERNEL.value)
    reporter.about["rounds"] = measured.run(given.rounds)
    if not any(row.prefill for row in measured.rows.values()):
        raise ValueError(f"--time_limit={options.seconds_to_spend(SECONDS):g}: over before the first prefill")
    return measured


def run(output_dir: str, seed: int) -> None:
    began = time.perf_counter()
    given, layout = read_inputs(seed), devices.layout(rows=1)
    reporter = Reporter(given, Output.create(output_dir), layout)
    with devices.in_force(layout, SERVING):
        measured = measure(given, reporter, began + options.seconds_to_spend(SECONDS), seed)
    reporter.finish(measured)
    print(f"{time.perf_counter() - began:.0f} s, written to {output_dir}", flush=True)
