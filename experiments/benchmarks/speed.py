"""Measures inference: prefill and decode of one model under several schedules, at several lengths, beside the paper's table.

How a time is taken: weights are random, made on the device, and all schedules share them. A prompt goes in chunk by chunk
and every chunk is waited for, so that one long prefill gives the time of every shorter one. Rounds go through the
schedules in turn; a figure is the median over the rounds and one more, which the look at the shares needs. One request
decodes from the cache that its prefill left. The full cache is as many rows as fit, each a copy of that request's cache; its
rate is that of all rows together. A step's time is that of a program of many steps, divided. Rows fit where weights, their
cache, the first layer's part of a request and what the compiler says a program needs beside them fit; where they do not
after all, fewer are tried.

Shares are the times of kernels by their names, seen through CUPTI in the chunk that ends at each length and in a decode
program; a whole prefill's are those of its chunks, interpolated between the ones that were looked at. A stage without a
kernel of its own is in the rest, as the experts of a decode step are. Layers are compiled anew for these chunks, to launch
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
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import options
from experiments.common.profiling import KERNEL_BY_KERNEL, kernels_of
from experiments.common.report import Output, markdown_table, text_table
from indexcache_jax import config as configs
from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, prefill_chunk
from indexcache_jax.serving.cache import formats
from indexcache_jax.serving.generation import CACHE_MULTIPLE, decode_program, padded_kv_length
from indexcache_jax.serving.layer import LayerFunction, layer_program, run_layer_in_place
from indexcache_jax.serving.model import last_hidden, last_logits

PRESETS = ("30b", "glm-5", "deepseek-v3.2", "demo")
_PRESET = flags.DEFINE_enum("preset", "30b", PRESETS, "the model's shape; demo is the small one shipped here")
flags.declare_key_flag("num_layers")
_LENGTHS = flags.DEFINE_list("lengths", ["10240", "61440", "122880", "204800"], "prompt tokens, multiples of the chunk")
_PATTERNS = flags.DEFINE_list("patterns", ["DSA", "1/2", "1/4"], "shares of indexers kept; DSA is all")
_CHUNK = flags.DEFINE_integer("chunk_size", 10240, "prompt tokens at a time")
_STEPS = flags.DEFINE_integer("decode_steps", 32, "decode steps of a program")
_INDEX = flags.DEFINE_enum("index_cache", "fp8", ["fp8", "bf16"], "what index keys are kept in")
_LATENT = flags.DEFINE_enum("latent_cache", "bf16", ["fp8", "bf16"], "what latents are kept in")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "through all schedules, as far as --time_limit allows")
flags.declare_key_flag("time_limit")
_FULL = flags.DEFINE_list("full_lengths", [], "lengths at which the full cache is measured too; default all of --lengths")
_ROWS = flags.DEFINE_integer("full_rows", 0, "rows of the full cache; default as many as fit", lower_bound=0)
_RUN = flags.DEFINE_integer("token_run", 1, "times that each random token of a prompt stands in a row: neighbours select alike")
_PRICE = flags.DEFINE_float("gpu_hour_price", 3.0, "of one device, for the cost of a million tokens", lower_bound=0)

SECONDS = 330.0  # by default, of a run
CUT_LAYERS = 4  # of a model that does not fit one device
CUT_VOCABULARY = 1024
ROWS_WITHOUT_MEMORY_FIGURES = 3
MARGIN = 2 * 2**30  # bytes of device memory left free, for what libraries take and the allocator rounds up
PAIRS = 64  # neighbouring queries whose selections are compared in every F layer
TIMED = 3  # decode programs a figure
SEEN = 0.85  # of a run's time: gaps between kernels take less than the rest, so below it kernels are missing
KINDS = {"fp8": jnp.float8_e4m3fn, "bf16": jnp.bfloat16}

# The searched patterns that the paper publishes (arXiv 2603.12201); other models keep indexers at even distances.
SEARCHED = {
    ("30b", "1/2"): "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
    ("30b", "1/4"): "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
    ("30b", "1/8"): "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
    ("glm-5", "1/2"): "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS",
    ("glm-5", "1/4"): "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS",
}

# What the paper reports for its 30B model in SGLang on H100s; lengths are its 10K, 60K, 120K and 200K.
PUBLISHED_LENGTHS = (10240, 61440, 122880, 204800)
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "prefill_seconds": {
        "DSA": (0.57, 3.38, 8.57, 19.5),
        "1/2": (0.47, 2.86, 6.57, 13.7),
        "1/4": (0.45, 2.59, 5.66, 10.7),
    },
    "decode_one": {"DSA": (73.5, 67.0, 63.0, 58.0), "1/2": (84.5, 80.0, 77.0, 73.0), "1/4": (91.0, 89.5, 88.0, 86.0)},
    "decode_full": {"DSA": (2700, 613, 341, 197), "1/2": (3070, 750, 431, 253), "1/4": (3310, 840, 498, 297)},
}

# A kernel's stage by what its name holds, first match.
STAGES = {
    "indexer_scores": "scores",
    "indexer_select": "top-k",
    "sparse_mla": "sparse MLA",
    "grouped_matmul": "experts",
}
OTHER = "projections and the rest"


def published(preset: str, metric: str, pattern: str, length: int) -> float | None:
    if preset != "30b" or pattern not in PUBLISHED[metric] or length not in PUBLISHED_LENGTHS:
        return None
    return PUBLISHED[metric][pattern][PUBLISHED_LENGTHS.index(length)]


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape that is measured, and by what its times are multiplied to be those of the whole model."""

    name: str
    config: Config
    layers: int  # of the whole model

    @property
    def scale(self) -> float:
        return self.layers / self.config.num_layers

    def schedule(self, pattern: str) -> Schedule:
        """ValueError for what is not DSA or a share such as 1/4."""
        n = self.config.num_layers
        if pattern == "DSA":
            return Schedule("F" * n)
        if self.scale == 1 and (self.name, pattern) in SEARCHED:
            return Schedule(SEARCHED[self.name, pattern])
        top, _, bottom = pattern.partition("/")
        if not (top.isdecimal() and bottom.isdecimal() and 0 < int(top) <= int(bottom)):
            raise ValueError(f"--patterns={pattern}: neither DSA nor a share such as 1/4")
        return Schedule.uniform(n, -(-n * int(top) // int(bottom)))


def model(name: str, num_layers: int) -> Model:
    """The preset, cut to `num_layers` expert layers where that is not 0, and the two largest always."""
    whole = Config.from_hf(options.DEMO if name == "demo" else configs.preset(name))
    if num_layers == 0 and name in ("glm-5", "deepseek-v3.2"):
        num_layers = CUT_LAYERS
    if num_layers == 0 or num_layers == whole.num_layers:
        return Model(name, whole, whole.num_layers)
    if not 0 < num_layers < whole.num_layers:
        raise ValueError(f"--num_layers={num_layers}: {name} has {whole.num_layers} layers")
    few = min(CUT_VOCABULARY, whole.vocab_size)
    cut = dataclasses.replace(
        whole,
        num_layers=num_layers,
        moe_layers=(True,) * num_layers,
        vocab_size=few,
        eos_token_ids=(),
        bos_token_id=None,
        pad_token_id=None,
    )
    return Model(name, cut, whole.num_layers)


@dataclasses.dataclass
class Row:
    """One schedule at one length; times in seconds of the model as measured, one entry a round."""

    pattern: str
    length: int
    prefill: list[float] = dataclasses.field(default_factory=list)
    step: list[float] = dataclasses.field(default_factory=list)
    full_step: float | None = None
    full_rows: int = 0
    cache_bytes: int = 0  # of one request, whole model
    prefill_stages: dict[str, float] = dataclasses.field(default_factory=dict)
    decode_stages: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def record(row: Row, model: Model, price: float) -> dict[str, Any]:
    """A row as results.json has it: seconds, tokens a second, bytes, and cost in the currency of `price`."""

    def shares(stages: Mapping[str, float]) -> dict[str, float] | None:
        total = sum(stages.values())
        return {name: value / total for name, value in stages.items()} if total else None

    prefill = statistics.median(row.prefill) * model.scale if row.prefill else None
    one = 1 / (statistics.median(row.step) * model.scale) if row.step else None
    full = row.full_rows / (row.full_step * model.scale) if row.full_step else None
    found = {
        "pattern": row.pattern,
        "length": row.length,
        "scaled": model.scale != 1,
        "prefill_seconds": prefill,
        "prefill_rounds": [t * model.scale for t in row.prefill],
        "decode_one": one,
        "decode_one_rounds": [1 / (t * model.scale) for t in row.step],
        "decode_full": full,
        "full_rows": row.full_rows,
        "cache_bytes": row.cache_bytes,
        "prefill_shares": shares(row.prefill_stages),
        "decode_shares": shares(row.decode_stages),
        "cost_of_a_million_prompt_tokens": None if prefill is None else prefill / row.length * 1e6 / 3600 * price,
        "cost_of_a_million_output_tokens": None if full is None else 1e6 / full / 3600 * price,
        "notes": row.notes,
    }
    return found | {f"published_{m}": published(model.name, m, row.pattern, row.length) for m in PUBLISHED}


# ---- measuring


looked_at_layer = layer_program(None, donate=True, compiler_options=tuple(KERNEL_BY_KERNEL.items()))


@dataclasses.dataclass(frozen=True)
class Look:
    """What CUPTI showed of one run."""

    stages: dict[str, float]  # milliseconds of kernels
    launches: int
    seen: float  # their part of the time that the same run takes without tracing


def look(function: Callable[[], Any]) -> Look:
    """ValueError where CUPTI does not show the device's kernels."""
    jax.block_until_ready(function())  # what it compiles is not timed
    began = time.perf_counter()
    jax.block_until_ready(function())
    seconds = time.perf_counter() - began
    kernels = kernels_of(function)
    found = dict.fromkeys([*STAGES.values(), OTHER], 0.0)
    for name, ms in kernels:
        found[next((stage for part, stage in STAGES.items() if part in name), OTHER)] += ms
    return Look(found, len(kernels), sum(found.values()) / 1000 / seconds)


@dataclasses.dataclass
class Bench:
    """Weights, programs and sizes of one run."""

    model: Model
    weights: dict[str, serving.Weights]  # by pattern
    schedules: dict[str, Schedule]
    lengths: list[int]
    full_lengths: list[int]
    chunk: int
    steps: int
    cache_format: CacheFormat
    decode_one: dict[str, Any] = dataclasses.field(default_factory=dict)  # compiled, by pattern
    decode_full: dict[tuple[str, int], tuple[int, Any]] = dataclasses.field(default_factory=dict)  # rows and program

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def max_len(self) -> int:
        return self.room(self.lengths[-1])

    def room(self, length: int) -> int:
        """Positions of a cache that holds `length` tokens and what is decoded after them."""
        return length + -(-self.steps // CACHE_MULTIPLE) * CACHE_MULTIPLE

    def cache(self, pattern: str, batch: int, max_len: int) -> serving.Cache:
        return serving.init_cache(self.config, self.schedules[pattern], batch, max_len, self.cache_format)

    def bytes_per_token(self, pattern: str) -> int:
        return serving.bytes_per_token(self.config, self.schedules[pattern], self.cache_format)

    def full_rows(self, pattern: str, length: int, asked: int, temporaries: int = 0) -> int:
        """Rows of `length` tokens that fit beside the weights and a program's temporary memory, at least one."""
        stats = jax.devices()[0].memory_stats()
        if asked or not stats or "bytes_limit" not in stats:
            return asked or ROWS_WITHOUT_MEMORY_FIGURES
        held = sum(x.nbytes for x in {id(x): x for w in self.weights.values() for x in jax.tree.leaves(w)}.values())
        row = self.bytes_per_token(pattern) * self.room(length)
        source = row // self.config.num_layers  # one layer's part of a request, of which the rows are made
        return max(1, (stats["bytes_limit"] - held - temporaries - source - MARGIN) // row)

    # Programs.

    def lower_decode(self, pattern: str, batch: int, max_len: int) -> Any:
        cache = jax.eval_shape(lambda: self.cache(pattern, batch, max_len))
        token = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return decode_program(formats(cache)).lower(self.weights[pattern], token, cache, self.config, steps=self.steps)

    def compile_full(self, pattern: str, length: int, rows: int) -> None:
        self.decode_full[pattern, length] = rows, self.lower_decode(pattern, rows, self.room(length)).compile()

    def warm_prefill(self) -> list[Callable[[], Any]]:
        """One call for every kind of layer, each of which compiles its program."""
        kinds: dict[Any, Callable[[], Any]] = {}
        for pattern, weights in self.weights.items():
            for p in weights.layers:
                kind = (p.full, type(p.mlp))
                kinds.setdefault(kind, functools.partial(self._call_layer, pattern, p))
        return list(kinds.values())

    def _call_layer(self, pattern: str, p: serving.Layer) -> Any:
        lengths = jnp.full((1,), self.chunk, jnp.int32)
        tokens = jnp.zeros((1, self.chunk), jnp.int32)
        x, positions = serving.embed(self.weights[pattern].embedding, tokens, 0 * lengths, lengths, self.config)
        one = serving.init_cache(
            dataclasses.replace(self.config, num_layers=1, moe_layers=(True,)),
            Schedule("F"),
            1,
            self.max_len,
            self.cache_format,
        ).layers[0]
        if not p.full:
            one = dataclasses.replace(one, index_keys=None, index_scales=None)
        kv_length = padded_kv_length(self.max_len, self.max_len)
        indices = None if p.full else jnp.zeros((1, self.chunk, min(self.config.index_topk, kv_length)), jnp.int32)
        return jax.block_until_ready(run_layer_in_place(p, x, indices, one, positions, kv_length, self.config)[0])

    def compile(self, asked_rows: int) -> None:
        """All programs, at the same time on the host's cores."""
        with futures.ThreadPoolExecutor() as pool:
            warm = [pool.submit(call) for call in self.warm_prefill()]
            for one in warm:
                one.result()  # before the rest, because choosing algorithms times them on the device
            print(f"{len(warm)} prefill programs, one for each kind of layer", flush=True)
            waiting = {}
            for pattern in self.weights:
                waiting[pattern, 0] = 1, pool.submit(self.lower_decode(pattern, 1, self.max_len).compile)
                for length in self.full_lengths:
                    rows = self.full_rows(pattern, length, asked_rows)
                    lowered = self.lower_decode(pattern, rows, self.room(length))
                    waiting[pattern, length] = rows, pool.submit(lowered.compile)
            for (pattern, length), (rows, program) in waiting.items():
                if not length:
                    self.decode_one[pattern] = program.result()
                    continue
                self.decode_full[pattern, length] = rows, program.result()
                if (fitting := self.full_rows(pattern, length, asked_rows, temporaries(program.result()))) < rows:
                    self.compile_full(pattern, length, fitting)
        for pattern in self.weights:  # what else a chunk takes is small, and compiled by running one
            logits, cache = self.prefill_chunk(
                pattern, jnp.zeros((1, self.chunk), jnp.int32), self.cache(pattern, 1, self.max_len)
            )
            jax.block_until_ready(self.decode(self.decode_one[pattern], pattern, cache))

    # Runs.

    def prefill_chunk(
        self, pattern: str, tokens: jax.Array, cache: serving.Cache, layer: LayerFunction = run_layer_in_place
    ) -> tuple[jax.Array, serving.Cache]:
        lengths = jnp.full((1,), self.chunk, jnp.int32)
        kv_length = padded_kv_length(self.max_len, self.max_len)
        weights = self.weights[pattern]
        x, cache = prefill_chunk(weights, tokens, lengths, cache, self.config, kv_length, layer)
        return last_logits(weights, last_hidden(x, lengths, jnp.zeros_like(x[:, 0])), self.config), cache

    def decode(self, program: Any, pattern: str, cache: serving.Cache) -> tuple[jax.Array, serving.Cache]:
        token = jnp.zeros_like(cache.lengths)
        return program(self.weights[pattern], token, cache, self.config)


def at(cache: serving.Cache, length: int) -> serving.Cache:
    """The cache as it was when it held `length` tokens: what is beyond does not count."""
    return dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, length))


def temporaries(program: Any) -> int:
    """Bytes that a compiled program needs beside its arguments."""
    found = program.memory_analysis()
    if found is None:
        return 0
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


_copies = jax.jit(lambda one, rows: jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), one), static_argnames="rows")


def refill(one: serving.Cache, rows: int, length: int, max_len: int) -> serving.Cache:
    """`rows` copies of the first `length` tokens of `one`, the cache of a request on the host.

    There it takes no room, and leaves no holes where layers of another size have to go.
    """
    layers = []
    for layer in one.layers:
        source = jax.device_put(jax.tree.map(lambda x: x[:1, :max_len], layer))
        layers.append(jax.block_until_ready(_copies(source, rows)))
    return serving.Cache(tuple(layers), jnp.full((rows,), length, jnp.int32))


@jax.jit
def neighbours_overlap(indices: jax.Array) -> jax.Array:
    """Of indices [1, S, k]: the share of a query's selection that the next one's has too, over up to PAIRS even pairs."""
    queries = indices.shape[1]
    first = jnp.arange(min(PAIRS, queries - 1)) * max(1, (queries - 1) // PAIRS)
    one, next_one = indices[0, first], indices[0, first + 1]  # [P, k]
    both = jax.vmap(lambda a, b: jnp.sum(jnp.isin(a, b) & (a >= 0)))(one, next_one)
    return jnp.sum(both) / jnp.maximum(jnp.sum(one >= 0), 1)


def random_prompt(seed: int, vocab_size: int, length: int, run: int) -> np.ndarray:
    """[length] tokens, every one drawn standing `run` times."""
    drawn = np.random.default_rng(seed).integers(0, vocab_size, -(-length // run))
    return np.repeat(drawn, run)[:length]


def shown(row: Row, found: Look, what: str) -> dict[str, float]:
    """The stages of a look; none, and a note in the row, where kernels are missing from it."""
    if found.seen >= SEEN:
        return found.stages
    row.notes.append(f"CUPTI showed kernels of {100 * found.seen:.0f} % of the {what}'s time: no shares")
    return {}


class Run:
    """The rounds, and the rows they fill."""

    def __init__(self, bench: Bench, prompt: np.ndarray, deadline: float, update: Callable[[], None]) -> None:
        self.bench, self.deadline, self.update = bench, deadline, update
        self.rows = {(p, n): Row(p, n) for p in bench.weights for n in bench.lengths}
        for (pattern, length), row in self.rows.items():
            row.cache_bytes = int(bench.bytes_per_token(pattern) * length * bench.model.scale)
        self.prompt = jnp.asarray(prompt[None], jnp.int32)
        self.overlap: dict[str, float] = {}  # of neighbours' selections, by pattern
        self.peak: int | None = None

    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def chunk_at(self, end: int) -> jax.Array:
        return self.prompt[:, end - self.bench.chunk : end]

    def one_schedule(self, pattern: str, first: bool) -> None:
        """A prefill with its decodes; in the first round the full cache too."""
        cache = self.prefill(pattern)
        if first:
            stats = jax.devices()[0].memory_stats() or {}
            self.peak = self.peak or stats.get("peak_bytes_in_use")
            if not self.late():
                one = jax.device_get(cache)
                del cache
                self.decode_full(pattern, one)

    def prefill(self, pattern: str) -> serving.Cache:
        """Timed, with one request's decoding at every length; the cache that is left holds the longest."""
        bench = self.bench
        cache = bench.cache(pattern, 1, bench.max_len)
        total = 0.0
        for end in range(bench.chunk, bench.lengths[-1] + 1, bench.chunk):
            tokens = jax.block_until_ready(self.chunk_at(end))
            began = time.perf_counter()
            logits, cache = bench.prefill_chunk(pattern, tokens, cache)
            logits.block_until_ready()
            total += time.perf_counter() - began
            if end in bench.lengths:
                row = self.rows[pattern, end]
                row.prefill.append(total)
                cache = self.decode_one(row, cache)
                self.show(row)
        return cache

    def decode_one(self, row: Row, cache: serving.Cache) -> serving.Cache:
        bench, times = self.bench, []
        for _ in range(TIMED):
            began = time.perf_counter()
            out, cache = bench.decode(bench.decode_one[row.pattern], row.pattern, at(cache, row.length))
            out.block_until_ready()
            times.append((time.perf_counter() - began) / bench.steps)
        row.step.append(statistics.median(times))
        return at(cache, row.length)

    def look_inside(self, pattern: str, cache: serving.Cache) -> serving.Cache:
        """Kernel times of the chunk that ends at each length, and of decoding there. `cache` is donated and comes back."""
        bench = self.bench
        found: dict[int, dict[str, float]] = {}  # stages of a chunk by the length at its end
        for length in bench.lengths:
            row = self.rows[pattern, length]
            held = [cache]

            def chunk(length: int = length, held: list[serving.Cache] = held) -> Any:
                before, tokens = at(held[0], length - bench.chunk), self.chunk_at(length)
                logits, held[0] = bench.prefill_chunk(pattern, tokens, before, looked_at_layer)
                return logits

            def decode(length: int = length, held: list[serving.Cache] = held) -> Any:
                out, held[0] = bench.decode(bench.decode_one[pattern], pattern, at(held[0], length))
                return out

            try:
                decoding = look(decode)  # first: without CUPTI no layer is compiled for the other
                filling = look(chunk)
            except ValueError as error:
                row.notes.append(str(error))
                return held[0]
            cache = held[0]
            row.decode_stages = shown(row, decoding, "decode program")
            if row.decode_stages:
                row.notes.append(f"{decoding.launches / bench.steps:.0f} launches a decode step")
            found[length] = shown(row, filling, "prefill chunk")
            if all(found.values()):
                # A stage's time grows evenly with the keys between the chunks that were looked at.
                every = range(bench.chunk, length + 1, bench.chunk)
                for stage in filling.stages:
                    seen = [one[stage] for one in found.values()]
                    row.prefill_stages[stage] = float(np.interp(every, list(found), seen).sum())
            elif found[length]:
                row.notes.append("no shares of the prefill, because a shorter one has none")
        return cache

    def measure_overlap(self, pattern: str, cache: serving.Cache) -> None:
        """Of neighbouring queries' selections in the last chunk, the mean over the F layers."""
        bench, length = self.bench, self.bench.lengths[-1]
        weights, lengths = bench.weights[pattern], jnp.full((1,), bench.chunk, jnp.int32)
        cache = at(cache, length - bench.chunk)
        x, positions = serving.embed(weights.embedding, self.chunk_at(length), cache.lengths, lengths, bench.config)
        overlaps = []

        def record(layer: int, x: jax.Array, selected: jax.Array | None) -> jax.Array:
            if selected is not None:
                overlaps.append(neighbours_overlap(selected))
            return x

        kv_length = padded_kv_length(bench.max_len, bench.max_len)
        serving.walk(weights, x, cache, positions, kv_length, bench.config, run_layer_in_place, record)
        self.overlap[pattern] = float(np.mean(jax.device_get(overlaps)))

    def full_step(self, pattern: str, one: serving.Cache, length: int) -> float:
        """Seconds of a step of the full cache, made of `one`, a request's on the host."""
        bench, (rows, program) = self.bench, self.bench.decode_full[pattern, length]
        cache = refill(one, rows, length, bench.room(length))
        times = []
        for _ in range(TIMED):
            began = time.perf_counter()
            out, cache = bench.decode(program, pattern, at(cache, length))
            out.block_until_ready()
            times.append((time.perf_counter() - began) / bench.steps)
        return statistics.median(times)

    def decode_full(self, pattern: str, one: serving.Cache) -> None:
        bench = self.bench
        for length in reversed(bench.full_lengths):
            row = self.rows[pattern, length]
            while row.full_step is None and not self.late():
                rows = bench.decode_full[pattern, length][0]
                failed = ""
                try:
                    row.full_step, row.full_rows = self.full_step(pattern, one, length), rows
                except jax.errors.JaxRuntimeError as error:
                    failed = str(error).splitlines()[0][:120]
                if failed:
                    print(f"{rows} rows of {length}: {failed}", flush=True)
                    if rows == 1 or "RESOURCE_EXHAUSTED" not in failed:
                        row.notes.append(f"{rows} rows of {length}: {failed}")
                        break
                    bench.compile_full(pattern, length, rows - max(1, rows // 20))
            self.show(row)

    def show(self, row: Row) -> None:
        print("  ".join(cells(record(row, self.bench.model, _PRICE.value))), flush=True)
        self.update()

    def all(self, rounds: int) -> int:
        """Runs the rounds there is time for, returns how many, and then looks inside: tracing might slow what follows."""
        done, began = 0, time.perf_counter()
        while done < rounds:
            for pattern in self.bench.weights:
                if self.late():
                    return done
                self.one_schedule(pattern, first=done == 0)
            done += 1
            # Later rounds have no full cache and take less than the first; the last look takes one more.
            if time.perf_counter() + 1.4 * (time.perf_counter() - began) / done > self.deadline:
                break
        for pattern in self.bench.weights:
            if self.late():
                break
            self.measure_overlap(pattern, self.look_inside(pattern, self.prefill(pattern)))
        self.update()
        return done


# ---- reporting

HEADER = ["schedule", "length", "prefill", "published", "one request", "published", "full cache", "published", "rows"]
HEADER += ["cache of a request", "indexer in prefill", "in decode", "1M prompt tokens", "1M output tokens"]


def cells(r: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, unit: str, form: str = ".3g") -> str:
        return "" if value is None else f"{value:{form}} {unit}".strip()

    def indexer(shares: Mapping[str, float] | None) -> float | None:
        return None if shares is None else 100 * (shares["scores"] + shares["top-k"])

    return [
        r["pattern"] + (" scaled" if r["scaled"] else ""),
        str(r["length"]),
        number(r["prefill_seconds"], "s"),
        number(r["published_prefill_seconds"], "s"),
        number(r["decode_one"], "tok/s", ".1f"),
        number(r["published_decode_one"], "tok/s", ".1f"),
        number(r["decode_full"], "tok/s", ".0f"),
        number(r["published_decode_full"], "tok/s", ".0f"),
        str(r["full_rows"] or ""),
        number(r["cache_bytes"] / 1e9, "GB", ".2f"),
        number(indexer(r["prefill_shares"]), "%", ".0f"),
        number(indexer(r["decode_shares"]), "%", ".0f"),
        number(r["cost_of_a_million_prompt_tokens"], ""),
        number(r["cost_of_a_million_output_tokens"], ""),
    ]


def savings(records: list[dict[str, Any]]) -> list[str]:
    """What each schedule saves against DSA, one line a schedule and length."""
    dense = {r["length"]: r for r in records if r["pattern"] == "DSA"}
    lines = []
    for r in records:
        base = dense.get(r["length"])
        if base is None or r is base:
            continue
        parts = []
        for name, kind in (("prompt", "cost_of_a_million_prompt_tokens"), ("output", "cost_of_a_million_output_tokens")):
            if r[kind] is not None and base[kind] is not None:
                parts.append(f"{100 * (1 - r[kind] / base[kind]):.0f} % of the cost of {name} tokens")
        if parts:
            lines.append(f"- {r['pattern']} at {r['length']} saves {' and '.join(parts)} of DSA's.")
    return lines


def shares_table(records: list[dict[str, Any]]) -> str:
    rows = []
    for r in records:
        for what in ("prefill", "decode"):
            shares = r[f"{what}_shares"]
            if shares is not None:
                cells_ = [f"{100 * share:.0f} %" if share else "-" for share in shares.values()]
                rows.append([r["pattern"], r["length"], what, *cells_])
    if not rows:
        return ""
    return markdown_table(["schedule", "length", "of", *STAGES.values(), OTHER], rows)


def report(records: list[dict[str, Any]], about: Mapping[str, Any]) -> str:
    parts = ["# Speed of inference", " ".join((__doc__ or "").split("\n\n", 1)[1].split())]
    parts.append("; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()) + ".")
    parts.append(markdown_table(HEADER, [cells(r) for r in records]))
    parts.append(
        'Columns "published" are what the paper reports for its own 30B model in SGLang on H100s: another model of about this '
        "shape on another device. Costs are in the currency of --gpu_hour_price, output tokens those of the full cache."
    )
    parts += ["\n".join(savings(records)), shares_table(records)]
    parts += ["\n".join(f"- {r['pattern']} at {r['length']}: {note}." for r in records for note in r["notes"])]
    return "\n\n".join(part for part in parts if part)


def plot(output: Output, records: list[dict[str, Any]], title: str) -> None:
    from matplotlib.figure import Figure

    patterns = list(dict.fromkeys(r["pattern"] for r in records))
    panels = {
        "prefill_seconds": "prefill, s",
        "decode_one": "decode, one request, tok/s",
        "decode_full": "decode, full cache, tok/s",
    }
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        lengths = sorted({r["length"] for r in records if r[metric] or r[f"published_{metric}"]})
        bars = [(p, kind) for p in patterns for kind in ("ours", "published")]
        if not any(r[f"published_{metric}"] for r in records):
            bars = [(p, "ours") for p in patterns]
        width = 0.8 / len(bars)
        for place, (pattern, kind) in enumerate(bars):
            field = metric if kind == "ours" else f"published_{metric}"
            by_length = {r["length"]: r[field] or 0 for r in records if r["pattern"] == pattern}
            ours = kind == "ours"
            axis.bar(
                [i + (place - (len(bars) - 1) / 2) * width for i in range(len(lengths))],
                [by_length.get(n, 0) for n in lengths],
                width,
                color=f"C{patterns.index(pattern)}",
                alpha=1.0 if ours else 0.4,
                hatch=None if ours else "//",
                label=pattern if ours else f"{pattern}, published (paper, H100)",
            )
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:.0f}K" for n in lengths])
        axis.set(ylabel=label, xlabel="prompt tokens")
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle(title)
    output.save_figure(figure, "speed.png")


def integers(flag: str, values: list[str]) -> Iterator[int]:
    """ValueError, naming the flag, for what is not a number of at least 1."""
    for value in values:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--{flag}={value}: not a number of at least 1")
        yield int(value)


def run(output_dir: str, seed: int) -> None:
    began = time.perf_counter()
    output = Output.create(output_dir)
    shape = model(_PRESET.value, options.NUM_LAYERS.value)
    for name, values in (("lengths", _LENGTHS.value), ("patterns", _PATTERNS.value)):
        if not values:
            raise ValueError(f"--{name}=: name at least one")
    lengths, chunk = sorted(integers("lengths", _LENGTHS.value)), _CHUNK.value
    for name, value in (
        ("chunk_size", chunk),
        ("decode_steps", _STEPS.value),
        ("rounds", _ROUNDS.value),
        ("token_run", _RUN.value),
    ):
        if value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1")
    for length in lengths:
        if length % chunk:
            raise ValueError(f"--lengths={length}: not a multiple of --chunk_size={chunk}")
    full_lengths = sorted(integers("full_lengths", _FULL.value)) or lengths
    if foreign := set(full_lengths) - set(lengths):
        raise ValueError(f"--full_lengths={min(foreign)}: not one of --lengths")
    schedules = {pattern: shape.schedule(pattern) for pattern in dict.fromkeys(_PATTERNS.value)}

    whole = jax.block_until_ready(serving.random_weights(jax.random.key(seed), shape.config))
    print(f"weights made in {time.perf_counter() - began:.0f} s", flush=True)
    bench = Bench(
        model=shape,
        weights={pattern: serving.restrict(whole, shape.config, schedule) for pattern, schedule in schedules.items()},
        schedules=schedules,
        lengths=lengths,
        full_lengths=full_lengths,
        chunk=chunk,
        steps=_STEPS.value,
        cache_format=CacheFormat(KINDS[_LATENT.value], KINDS[_INDEX.value]),
    )
    del whole
    about: dict[str, Any] = {
        "model": f"{shape.name}, {shape.config.num_layers} of {shape.layers} layers, random bf16 weights",
        "index_cache": _INDEX.value,
        "latent_cache": _LATENT.value,
        "chunk": chunk,
    }
    start = time.perf_counter()
    bench.compile(_ROWS.value)
    about["seconds_to_compile"] = round(time.perf_counter() - start, 1)
    print(f"{len(bench.decode_one) + len(bench.decode_full)} decode programs, {about['seconds_to_compile']} s", flush=True)

    def records() -> list[dict[str, Any]]:
        return [record(row, shape, _PRICE.value) for row in measured.rows.values()]

    def update() -> None:
        if measured.overlap:
            shares = ", ".join(f"{pattern} {100 * share:.0f} %" for pattern, share in measured.overlap.items())
            about["selected_alike_by_neighbouring_queries"] = shares
        if measured.peak is not None:
            about["peak_memory_of_one_request"] = f"{measured.peak / 1e9:.1f} GB"
        metrics = about | {
            "neighbours_overlap": measured.overlap,
            "patterns": {p: s.pattern for p, s in schedules.items()},
            "rows": records(),
        }
        output.finish("speed", metrics, report(records(), about))

    prompt = random_prompt(seed, shape.config.vocab_size, lengths[-1], _RUN.value)
    measured = Run(bench, prompt, began + options.seconds_to_spend(SECONDS), update)
    about["rounds"] = measured.all(_ROUNDS.value)
    if not any(row.prefill for row in measured.rows.values()):
        raise ValueError(f"--time_limit={options.seconds_to_spend(SECONDS):g}: over before the first prefill")
    update()
    scaled = "" if shape.scale == 1 else f", times scaled to {shape.layers}"
    plot(output, records(), f"{about['model']}{scaled}, on {jax.devices()[0].device_kind}")
    print(text_table(HEADER, [cells(r) for r in records()]))
    print(f"{time.perf_counter() - began:.0f} s, written to {output_dir}", flush=True)
