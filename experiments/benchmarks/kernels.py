"""Times every kernel at the shapes of DeepSeek-V3.2-sized models, beside the best public CUDA kernels.

Rows with a target come first, then those with a published figure, then the rest; where --time_limit cuts a run short, another
one with --rows adds what is missing.

How a time is taken: a program is one XLA executable that calls the operation many times, one call after the other, on
sets of arguments that together exceed twice the L2 cache, so that a call finds nothing there from an earlier one. A
window queues the program many times and waits once; a row's time is the median of the windows' times per call. Launches on
the host overlap with the work of the device, so they count only where the device has to wait for them. What the kernels
alone take, without the gaps between them, is measured afterwards through CUPTI where that is to be had.

Random selections are one key of each of k even parts of the context: sorted, distinct and spread evenly. In "x % shared"
rows a query keeps that part of its predecessor's selection and draws the rest anew.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common import options
from experiments.common.profiling import kernels_of
from experiments.common.report import Output, command, device, markdown_table, time_left, versions
from pallas_kernels import (
    grouped_matmul,
    hopper,
    indexer_topk,
    normalise_rows,
    quant,
    quantise_rows,
    quantise_swiglu,
    scaled_matmul,
    sparse_mla,
)
from pallas_kernels.indexer_topk import reference as indexer_reference

_ROWS = flags.DEFINE_string(
    "rows", "", "measure only rows whose name matches this regular expression, and keep others that lie in the output folder"
)
flags.declare_key_flag("time_limit")
_VARIANTS = flags.DEFINE_bool("variants", True, "measure rows that miss their target also with single stages left out")

L2_BYTES = 50 * 2**20  # of an H100 and an H200
MAX_CALLS, PROGRAM_SECONDS = 64, 5e-4
SECONDS = 230.0  # by default, of a run
BYTES_PER_SECOND = 4e12  # about what such a GPU copies
WINDOWS, WINDOW_SECONDS = 5, 0.06
PROFILING_SECONDS = 20.0  # of the time limit, kept for the kernels alone
POOL = 2**24 - 3  # numbers drawn on the host, which longer arrays repeat; a prime, so that rows of an array differ
HEAD_DIM, LATENT, VALUE_DIM, SELECTED = 128, 576, 512, 2048
FP8 = jnp.float8_e4m3fn
# Calls of a program must not overlap, or their times would not add up.
GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}

Arguments = tuple[Any, ...]
ProgramArguments = tuple[list[Arguments], Arguments]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row runs: `kernel` on each of `sets` followed by `common`, which moves `bytes` or computes `flops` a call.

    reference: the same in XLA, and the factor from its arguments' work to the row's (measured on fewer queries).
    variants: the kernel with a stage left out, by what that is called.
    """

    kernel: Callable[..., Any]
    sets: list[Arguments]
    flops: float = 0.0
    bytes: float = 0.0
    common: Arguments = ()
    reference: tuple[Callable[..., Any], Arguments, int] | None = None
    variants: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    @property
    def program_arguments(self) -> ProgramArguments:
        return self.sets, self.common


@dataclasses.dataclass(frozen=True)
class Row:
    """published: milliseconds of the best public kernel on an H200, and whose; target: what this library aims at;
    note: what decides its time, where that is not plain."""

    name: str
    make: Callable[[], Case]
    published: tuple[float, str] | None = None
    target: float | None = None
    note: str = ""

    @property
    def priority(self) -> int:
        return 0 if self.target is not None else 1 if self.published is not None else 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes' scale: as they are on a Hopper GPU, small elsewhere, where only that everything runs can be shown."""

    small: bool

    def queries(self, n: int) -> int:
        return max(4, n // 1024) if self.small else n

    def keys(self, n: int) -> int:
        return max(256, n // 480) if self.small else n

    def selected(self, n: int = SELECTED) -> int:
        return n // 128 if self.small else n

    def batch(self, n: int) -> int:
        return min(2, n) if self.small else n

    def width(self, n: int) -> int:
        return n // 16 if self.small else n

    def seeds(self, bytes_of_call: float) -> list[int]:
        """Of the arguments of a program's calls: as many different ones as exceed twice the L2 cache, and so many calls
        that launching the program takes the host less time than running it takes the device."""
        if self.small:
            return [0]
        different = max(1, min(MAX_CALLS, math.ceil(2 * L2_BYTES / bytes_of_call)))
        calls = max(different, min(MAX_CALLS // 2, math.ceil(PROGRAM_SECONDS * BYTES_PER_SECOND / bytes_of_call)))
        return [call % different for call in range(calls)]


# ---- arguments: drawn on the host, because on the device every shape would be one more program to compile


@functools.cache
def _pool(dtype: Any) -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal(POOL, np.float32)
    return drawn if dtype == jnp.float32 else drawn.astype(jnp.bfloat16).astype(dtype)


def _drawn(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    start = 7919 * seed % (POOL // 2)
    return np.resize(_pool(dtype)[start:], shape)


@functools.cache
def normal(shape: tuple[int, ...], dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Kept, because rows share their largest arguments."""
    return jax.device_put(_drawn(shape, dtype, seed))


@functools.cache
def key_scales(shape: tuple[int, int], seed: int = 0) -> jax.Array:
    return jax.device_put(np.abs(_drawn(shape, jnp.float32, seed)))


@functools.cache
def scaled_normal(shape: tuple[int, ...], seed: int = 0) -> quant.Scaled:
    """Numbers in 8 bits, with scales by block."""
    *stacked, rows, columns = shape
    groups = (*stacked, -(-rows // quant.BLOCK), -(-columns // quant.BLOCK))
    return quant.Scaled(normal(shape, FP8, seed), jax.device_put(np.abs(_drawn(groups, jnp.float32, seed))))


@functools.cache
def repeated(times: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What takes long to send: [times, ...] copies of one array [1, ...]."""
    return jnp.tile(normal(shape, dtype), (times, *(1 for _ in shape[1:])))


@functools.cache
def block_maxima(shape: tuple[int, int, int], seed: int) -> jax.Array:
    return jnp.max(normal(shape, jnp.float32, seed).reshape(*shape[:2], -1, 16), axis=-1)


@functools.cache
def selections(shape: tuple[int, int], keys: int, k: int, shared: float = 0.0, seed: int = 0) -> jax.Array:
    """[B, S, k] int32, ascending."""
    rng = np.random.default_rng(seed)
    places = rng.random((*shape, k), np.float32)  # in [0, 1)
    if shared:
        kept = rng.random(places.shape, np.float32) < shared
        for s in range(1, shape[1]):
            places[:, s] = np.where(kept[:, s], places[:, s - 1], places[:, s])
    edges = np.ceil(np.arange(k + 1) * (keys / k)).astype(np.int32)
    sizes = np.diff(edges)
    return jax.device_put(edges[:-1] + np.minimum((places * sizes).astype(np.int32), sizes - 1))


def on_hopper() -> bool:
    return hopper.why_not() is None


# ---- the operations


def without(kernel: Callable[..., Any], stages: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The variants of a Case: the kernel with each of these stages left out, by what that is called."""
    return {name: functools.partial(kernel, leave_out=stage) for name, stage in stages.items()}


def index_scores(
    sizes: Sizes, batch: int, queries: int, keys: int, heads: int, dtype: Any, *, causal: bool = False, part: int = 1
) -> Case:
    """The indexer's scores alone, with the block maxima that the selection reads."""
    b, s, t = sizes.batch(batch), sizes.queries(queries) if queries > 1 else 1, sizes.keys(keys)
    scaled = dtype == FP8
    # Causal and ragged: the queries are the last of the context, and the keys end within a tile.
    positions = np.broadcast_to(np.arange(t - s, t) if causal else np.full(s, t - 1), (b, s)).astype(np.int32)
    length = t - 37 if causal else t
    lengths = np.full((b,), length, np.int32)
    visible = float(np.minimum(positions + 1, length).sum())
    read = b * t * (HEAD_DIM * jnp.dtype(dtype).itemsize + 4 * scaled)
    written = visible * 4 * (1 + 1 / 16)

    def one(seed: int) -> Arguments:
        q, k = normal((b, s, heads, HEAD_DIM), dtype, seed), normal((b, t, HEAD_DIM), dtype, seed)
        scales = key_scales((b, t), seed) if scaled else None
        return q, k, normal((b, s, heads), jnp.float32, seed), scales, jax.device_put(positions), jax.device_put(lengths)

    def kernel(q: Any, k: Any, w: Any, scales: Any, positions: Any, lengths: Any, leave_out: str = "") -> Any:
        from pallas_kernels.indexer_topk import mosaic_gpu_scores

        config = dataclasses.replace(mosaic_gpu_scores.default_config(b, s, heads, t, dtype), leave_out=leave_out)
        return mosaic_gpu_scores.scores(q, k, w, scales, positions, lengths, config=config)

    def in_xla(q: Any, k: Any, w: Any, scales: Any) -> Any:
        return jax.vmap(indexer_reference.scores)(q, k, w, scales)

    sets = [one(seed) for seed in sizes.seeds(read + written)]
    n = max(1, s // part)
    fewer = normal((b, n, heads, HEAD_DIM), dtype), sets[0][1], normal((b, n, heads), jnp.float32), sets[0][3]
    if not on_hopper():
        return Case(in_xla, [x[:4] for x in sets], flops=2 * visible * heads * HEAD_DIM)
    work: dict[str, Any] = dict(bytes=read + written) if queries == 1 else dict(flops=2 * visible * heads * HEAD_DIM)
    variants = without(
        kernel,
        {
            "without the product": "product",
            "without the epilogue": "epilogue",
            "scores and maxima not written": "stores",
            "keys not copied": "copies",
        },
    )
    return Case(kernel, sets, reference=(in_xla, fewer, s // n), variants=variants if queries > 1 else {}, **work)


def top_k(sizes: Sizes, rows: int, width: int, *, maxima: bool) -> Case:
    """The selection alone."""
    m, t, k = sizes.queries(rows), sizes.keys(width), sizes.selected()
    t = -(-t // 64) * 64
    positions, lengths = (jax.device_put(np.full(shape, value, np.int32)) for shape, value in (((1, m), t - 1), ((1,), t)))
    visible = jax.device_put(np.full((m,), t, np.int32))

    def kernel(scores: Any, maxima: Any, positions: Any, lengths: Any, leave_out: str = "") -> Any:
        from pallas_kernels.indexer_topk import mosaic_gpu_select

        config = dataclasses.replace(mosaic_gpu_select.default_config(m), leave_out=leave_out)
        return mosaic_gpu_select.select(scores, maxima, positions, lengths, k, clean=True, config=config)

    def in_xla(scores: Any, visible: Any) -> Any:
        return indexer_reference.select(scores[0], visible, k)

    shape = (1, m, t)
    seeds = sizes.seeds(4 * m * t)
    if not on_hopper():
        return Case(in_xla, [(normal(shape, jnp.float32, seed), visible) for seed in seeds], bytes=4 * m * t)
    sets = [
        (normal(shape, jnp.float32, seed), block_maxima(shape, seed) if maxima else None, positions, lengths) for seed in seeds
    ]
    variants = without(kernel, {"without the final search": "search", "scores read and compared only": "append"})
    return Case(kernel, sets, bytes=4 * m * t, reference=(in_xla, (sets[0][0], visible), 1), variants=variants)


def whole_indexer(sizes: Sizes, batch: int, queries: int, keys: int, dtype: Any, *, heads: int = 32, part: int = 1) -> Case:
    """indexer_topk as the model calls it."""
    b, s, t, k = sizes.batch(batch), sizes.queries(queries) if queries > 1 else 1, sizes.keys(keys), sizes.selected()
    scaled = dtype == FP8
    positions = np.broadcast_to(np.arange(t - s, t), (b, s)).astype(np.int32)
    read = b * t * (HEAD_DIM * jnp.dtype(dtype).itemsize + 4 * scaled)

    def one(seed: int) -> Arguments:
        q, keys = normal((b, s, heads, HEAD_DIM), dtype, seed), normal((b, t, HEAD_DIM), dtype, seed)
        scales = key_scales((b, t), seed) if scaled else None
        lengths = jax.device_put(np.full((b,), t, np.int32))
        return q, keys, normal((b, s, heads), jnp.float32, seed), jax.device_put(positions), lengths, scales

    def run(q: Any, keys: Any, w: Any, positions: Any, lengths: Any, scales: Any, implementation: str | None) -> Any:
        return indexer_topk(
            q,
            keys,
            w,
            k_select=k,
            q_positions=positions,
            kv_lengths=lengths,
            key_scales=scales,
            implementation=implementation,
        )

    written = 0 if queries == 1 else 4 * b * s * t
    sets = [one(seed) for seed in sizes.seeds(read + written)]
    n = max(1, s // part)
    _, keys_, _, _, lengths, scales = sets[0]
    places = jax.device_put(np.ascontiguousarray(positions[:, -n:]))
    fewer = normal((b, n, heads, HEAD_DIM), dtype), keys_, normal((b, n, heads), jnp.float32), places, lengths, scales
    pairs = float((positions + 1).sum())
    work: dict[str, Any] = dict(bytes=read) if queries == 1 else dict(flops=2 * pairs * heads * HEAD_DIM)
    return Case(
        functools.partial(run, implementation="mosaic_gpu" if on_hopper() else "xla"),
        sets,
        reference=(functools.partial(run, implementation="xla"), fewer, s // n) if on_hopper() else None,
        **work,
    )


def attention(
    sizes: Sizes,
    batch: int,
    queries: int,
    heads: int,
    keys: int,
    *,
    scaled: bool = False,
    shared: float = 0.0,
    part: int = 1,
) -> Case:
    """sparse_mla; with `scaled` over latents in 8 bits."""
    b, s, t, k = sizes.batch(batch), sizes.queries(queries) if queries > 1 else 1, sizes.keys(keys), sizes.selected()
    latents: Any
    if scaled:
        codes, rotary = (repeated(b, (1, t, n), kind) for n, kind in ((VALUE_DIM, FP8), (LATENT - VALUE_DIM, jnp.bfloat16)))
        latents = quant.Latents(codes, rotary, key_scales((b, t)))
    else:
        latents = repeated(b, (1, t, LATENT), jnp.bfloat16)
    read = b * s * k * sum(x.nbytes for x in jax.tree.leaves(latents)) // (b * t)

    def run(q: Any, indices: Any, kv: Any, implementation: str | None) -> Any:
        return sparse_mla(q, kv, indices, scale=LATENT**-0.5, value_dim=VALUE_DIM, implementation=implementation)

    sets = [(normal((b, s, heads, LATENT), seed=seed), selections((b, s), t, k, shared, seed)) for seed in sizes.seeds(read)]
    n = max(1, s // part)
    fewer = normal((b, n, heads, LATENT)), selections((b, n), t, k, shared), latents
    reference = (functools.partial(run, implementation="xla"), fewer, s // n)
    work: dict[str, Any] = dict(bytes=read) if queries == 1 else dict(flops=2 * b * s * heads * k * (LATENT + VALUE_DIM))

    def stages(q: Any, indices: Any, kv: Any, leave_out: str) -> Any:
        from pallas_kernels.sparse_mla import mosaic_gpu_attention
        from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import PAIR, Tasks

        tasks = Tasks(b, s, heads, t, pairs=k // PAIR)
        flat = q.reshape(-1, LATENT), kv.reshape(-1, LATENT), indices.reshape(-1, k), None
        return mosaic_gpu_attention.attend(*flat, tasks, scale=LATENT**-0.5, leave_out=leave_out)

    variants = without(
        stages,
        {
            "latents not gathered": "gather",
            "latents only gathered": "all but gather",
            "without softmax": "softmax",
            "without the product with values": "values",
        },
    )
    return Case(
        functools.partial(run, implementation="mosaic_gpu" if on_hopper() else "xla"),
        sets,
        common=(latents,),
        reference=reference if on_hopper() else None,
        variants=variants if heads >= 64 and queries > 1 and not scaled else {},
        **work,
    )


def activations(shape: tuple[int, int], seed: int, in_codes: bool) -> Any:
    """Rows [M, K], or as codes and scales [K / 128, M]: that is how the kernels that make them write scales."""
    if not in_codes:
        return normal(shape, seed=seed)
    return normal(shape, FP8, seed), key_scales((-(-shape[1] // quant.BLOCK), shape[0]), seed)


def rows_of(x: Any) -> Any:
    return quant.Scaled(x[0], x[1].T) if isinstance(x, tuple) else x


def experts(sizes: Sizes, rows: int, groups: int, k: int, n: int, *, scaled: bool = False, in_codes: bool = False) -> Case:
    """grouped_matmul; few rows read only the matrices of groups that have any.

    scaled: matrices in 8 bits. in_codes: rows too, which otherwise are quantised on the way where groups have many.
    """
    m, groups, k, n = sizes.queries(rows), sizes.batch(groups), sizes.width(k), sizes.width(n)
    counts = np.random.default_rng(0).multinomial(m, np.full(groups, 1 / groups)).astype(np.int32)
    many = rows >= 128 * groups
    read = (1 if scaled else 2) * k * n * int((counts > 0).sum())
    matrices = scaled_normal((groups, n, k)) if scaled else normal((groups, k, n))
    sets = [(activations((m, k), seed, in_codes), jax.device_put(counts)) for seed in sizes.seeds(read)]

    def run(x: Any, counts: Any, matrices: Any, implementation: str | None = None) -> Any:
        return grouped_matmul(rows_of(x), matrices, counts, implementation=implementation)

    in_xla = functools.partial(run, implementation="decoded" if scaled else "ragged_dot")
    work: dict[str, Any] = dict(flops=2 * m * k * n) if many else dict(bytes=read)
    reference = (in_xla, (*sets[0], matrices), 1) if on_hopper() else None
    return Case(run, sets, common=(matrices,), reference=reference, **work)


def scaled_product(sizes: Sizes, rows: int, k: int, n: int, *, in_codes: bool = False) -> Case:
    """scaled_matmul; `in_codes` of rows in 8 bits, which otherwise are quantised on the way where they are many."""
    m, k, n = sizes.queries(rows) if rows > 128 else rows, sizes.width(k), sizes.width(n)
    work: dict[str, Any] = dict(flops=2 * m * k * n) if rows >= 128 else dict(bytes=k * n)
    sets = [(activations((m, k), seed, in_codes), scaled_normal((n, k), seed=seed)) for seed in sizes.seeds(m * k + n * k)]

    def run(x: Any, matrix: Any, implementation: str | None = None) -> Any:
        return scaled_matmul(rows_of(x), matrix, implementation=implementation)

    reference = (functools.partial(run, implementation="xla"), sets[0], 1) if on_hopper() else None
    return Case(run, sets, reference=reference, **work)


def passes(sizes: Sizes, operation: Callable[..., Any], arguments: Callable[[Sizes, int], Arguments], written: float) -> Case:
    """An operation that reads its arguments once and writes `written` times the bytes of the first."""
    one = arguments(sizes, 0)
    moved = sum(x.nbytes for x in one) + written * one[0].nbytes
    sets = [arguments(sizes, seed) for seed in sizes.seeds(moved)]
    reference = (functools.partial(operation, implementation="xla"), sets[0], 1) if on_hopper() else None
    return Case(operation, sets, bytes=moved, reference=reference)


def matmul(sizes: Sizes, dtype: Any) -> Case:
    n = sizes.width(8192)

    def multiply(a: Any, b: Any) -> Any:  # [n, n] and the transpose of [n, n]
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    return Case(multiply, [(normal((n, n), dtype, 0), normal((n, n), dtype, 1))], flops=2 * n**3)


def copy(sizes: Sizes) -> Case:
    n = sizes.width(2**14) ** 2 * 4  # 2 GiB
    return Case(lambda x: x + 1, [(jnp.zeros((n,), jnp.bfloat16),)], bytes=2 * 2 * n)


def baselines(sizes: Sizes) -> list[Row]:
    return [
        Row("matmul, bf16, 8192 x 8192 x 8192", lambda: matmul(sizes, jnp.bfloat16)),
        Row("matmul, fp8, 8192 x 8192 x 8192", lambda: matmul(sizes, FP8)),
        Row("copy, 2 GiB", lambda: copy(sizes)),
    ]


# ---- the rows; published figures are those of one H200 with the L2 cache flushed, by CUDA events


def _row(
    sizes: Sizes,
    name: str,
    function: Callable[..., Case],
    *shape: Any,
    public: tuple[float, str] | None = None,
    target: float | None = None,
    note: str = "",
    **how: Any,
) -> Row:
    """The row of `function` at a shape. Small shapes have no figures to be compared with."""
    make = functools.partial(function, sizes, *shape, **how)
    return Row(f"{name}, small", make) if sizes.small else Row(name, make, public, target, note)


def score_rows(sizes: Sizes) -> Iterator[Row]:
    """The indexer's scores alone."""
    add = functools.partial(_row, sizes)
    bf16 = jnp.bfloat16
    prefill: dict[str, Any] = dict(part=16)
    cut = prefill | dict(causal=True)
    yield add("scores fp8, 4096 x 122880, Hi 32", index_scores, 1, 4096, 122880, 32, FP8, public=(4.27, "DeepGEMM"), **prefill)
    yield add("scores fp8, 4096 x 122880, Hi 32, causal, ragged", index_scores, 1, 4096, 122880, 32, FP8, target=4.2, **cut)
    yield add("scores fp8, 2048 x 204800, Hi 32", index_scores, 1, 2048, 204800, 32, FP8, public=(3.74, "DeepGEMM"), **prefill)
    yield add("scores fp8, 4096 x 122880, Hi 64", index_scores, 1, 4096, 122880, 64, FP8, public=(8.02, "DeepGEMM"), **prefill)
    yield add("scores bf16, 4096 x 122880, Hi 32, causal, ragged", index_scores, 1, 4096, 122880, 32, bf16, target=6.4, **cut)
    for b, t, ms in ((1, 122880, 0.0118), (8, 122880, 0.0426), (8, 204800, 0.0641), (64, 61440, 0.136)):
        yield add(f"scores fp8, decode, {b} x {t}, Hi 32", index_scores, b, 1, t, 32, FP8, public=(ms, "DeepGEMM, paged"))


def selection_rows(sizes: Sizes) -> Iterator[Row]:
    """The top-k alone."""
    add = functools.partial(_row, sizes)
    selectors = "SGLang v2, vLLM"
    for m, t, ms, alone, given in (
        (1024, 10240, 0.034, None, None),
        (1024, 61440, 0.141, None, None),
        (1024, 122880, 0.237, 0.21, 0.13),
        (1024, 204800, 0.317, 0.31, 0.15),
        (8, 122880, 0.0131, None, None),
        (64, 122880, 0.033, None, None),
    ):
        yield add(f"top-k, {m} x {t}, scores alone", top_k, m, t, maxima=False, public=(ms, selectors), target=alone)
        yield add(f"top-k, {m} x {t}, block maxima given", top_k, m, t, maxima=True, public=(ms, selectors), target=given)


def indexer_rows(sizes: Sizes) -> Iterator[Row]:
    """indexer_topk as the model calls it."""
    add = functools.partial(_row, sizes)
    bf16 = jnp.bfloat16
    whole = "DeepGEMM + selector"
    yield add("indexer_topk fp8, 4096 x 122880", whole_indexer, 1, 4096, 122880, FP8, public=(5.2, whole), target=4.7, part=16)
    yield add("indexer_topk bf16, 4096 x 122880", whole_indexer, 1, 4096, 122880, bf16, part=16)
    yield add("indexer_topk fp8, decode, 1 x 122880", whole_indexer, 1, 1, 122880, FP8, public=(0.022, whole), target=0.03)
    yield add("indexer_topk fp8, decode, 8 x 122880", whole_indexer, 8, 1, 122880, FP8, public=(0.056, whole), target=0.06)


def prefill_attention_rows(sizes: Sizes) -> Iterator[Row]:
    """sparse_mla over many queries."""
    add = functools.partial(_row, sizes)
    flash = "FlashMLA bf16"
    padded = "FlashMLA bf16, padded to 64 heads"
    few_heads = (
        "random selections have nothing in common, so every query goes alone through a kernel whose tiles have keys as rows "
        "and heads as columns, 24 of them here. The time is that of shared memory and of the way from logits to weights, so it "
        "falls little with the heads. Where neighbours share enough, which the lists themselves tell, three queries share a "
        "tile of 64 query rows over the union of their selections instead."
    )
    for heads, whose, times, targets in (
        (64, flash, (1.77, 2.03, 2.20), (None, None, 2.35)),
        (128, flash, (3.48, 3.98, 4.38), (None, None, None)),
        (20, padded, (1.85, 1.94, 2.15), (None, None, 2.2)),
    ):
        for t, ms, target in zip((10240, 61440, 122880), times, targets, strict=True):
            name = f"sparse MLA, 4096 x {t}, {heads} heads, random"
            note = few_heads if (heads, t) == (20, 122880) else ""
            yield add(name, attention, 1, 4096, heads, t, public=(ms, whose), target=target, note=note, part=8)
    for shared, target in ((0.85, 1.3), (0.7, None)):
        name = f"sparse MLA, 4096 x 122880, 20 heads, {shared:.0%} shared"
        yield add(name, attention, 1, 4096, 20, 122880, shared=shared, public=(2.15, padded), target=target, part=8)
    for heads in (16, 32):
        yield add(f"sparse MLA, 4096 x 122880, {heads} heads, random", attention, 1, 4096, heads, 122880, part=8)
    for heads, target in ((64, 2.2), (128, None), (20, 1.15)):
        name = f"sparse MLA, 4096 x 122880, {heads} heads, random, fp8 latents"
        yield add(name, attention, 1, 4096, heads, 122880, scaled=True, target=target, part=8)
    name = "sparse MLA, 4096 x 122880, 20 heads, 85% shared, fp8 latents"
    yield add(name, attention, 1, 4096, 20, 122880, shared=0.85, scaled=True, part=8)


def decode_attention_rows(sizes: Sizes) -> Iterator[Row]:
    """sparse_mla over one query a row."""
    add = functools.partial(_row, sizes)
    flash = "FlashMLA bf16"
    for b, t, ms, whose, targets in (
        (1, 122880, 0.0208, "FlashMLA fp8", (0.025, 0.025)),
        (8, 122880, 0.0251, "FlashMLA fp8", (0.029, 0.029)),
        (32, 122880, 0.0516, "FlashMLA fp8", (None, 0.048)),
        (128, 61440, 0.093, flash, (None, 0.088)),
    ):
        for scaled, target in zip((False, True), targets, strict=True):
            name = f"sparse MLA, decode, {b} x {t}, 64 heads" + ", fp8 latents" * scaled
            yield add(name, attention, b, 1, 64, t, scaled=scaled, public=(ms, whose), target=target)
    yield add("sparse MLA, decode, 8 x 122880, 20 heads", attention, 8, 1, 20, 122880)


def expert_rows(sizes: Sizes) -> Iterator[Row]:
    """grouped_matmul."""
    add = functools.partial(_row, sizes)
    yield add(
        "grouped matmul, 32768 x 2048 x 3072, 64 groups", experts, 32768, 64, 2048, 3072, public=(1.16, "JAX's ragged_dot_mgpu")
    )
    yield add("grouped matmul, 64 x 2048 x 3072, 64 groups", experts, 64, 64, 2048, 3072)
    for name, rows, groups, k, n, target in (
        ("32768 x 2048 x 3072, 64 groups", 32768, 64, 2048, 3072, 0.43),
        ("65536 x 6144 x 4096, 32 groups", 65536, 32, 6144, 4096, 2.87),
    ):
        note = "bfloat16 rows are quantised on the way"
        yield add(f"grouped matmul, fp8, {name}", experts, rows, groups, k, n, scaled=True, target=target, note=note)
        name = f"grouped matmul, fp8, {name}, rows in fp8"
        yield add(name, experts, rows, groups, k, n, scaled=True, in_codes=True, target=target)
    yield add("grouped matmul, fp8, 64 x 2048 x 3072, 64 groups", experts, 64, 64, 2048, 3072, scaled=True)
    yield add("scaled matmul, fp8, 4096 x 16384 x 7168", scaled_product, 4096, 16384, 7168, target=0.837)
    name = "scaled matmul, fp8, 4096 x 16384 x 7168, rows in fp8"
    yield add(name, scaled_product, 4096, 16384, 7168, in_codes=True, target=0.837)


def activation_rows(sizes: Sizes) -> Iterator[Row]:
    """What a prefill layer of the 30B shape does to its activations between products."""
    add = functools.partial(_row, sizes)

    def drawn(*shape: int) -> Callable[[Sizes, int], Arguments]:
        return lambda sizes, seed: (normal((sizes.queries(shape[0]), sizes.width(shape[1])), seed=seed),)

    def normalised(sizes: Sizes, seed: int) -> Arguments:
        return *drawn(10240, 2048)(sizes, seed), normal((sizes.width(2048),))

    def normalise(rows: Any, weight: Any, **options: Any) -> Any:
        return normalise_rows(rows, weight, 1e-5, **options)

    yield add("quantise rows, 10240 x 5120", passes, quantise_rows, drawn(10240, 5120), 0.5)
    yield add("quantise SwiGLU, 10240 x 2 x 1536", passes, quantise_swiglu, drawn(10240, 3072), 0.25)
    yield add("normalise rows, 10240 x 2048, also in fp8", passes, normalise, normalised, 1.5)


def table(sizes: Sizes) -> list[Row]:
    """Every row of the report, in its order."""
    attention_parts = score_rows, selection_rows, indexer_rows, prefill_attention_rows, decode_attention_rows
    parts = (*attention_parts, expert_rows, activation_rows)
    return [row for part in parts for row in part(sizes)]


# ---- measuring


def compiled(function: Callable[..., Any], arguments: ProgramArguments, pool: futures.Executor) -> futures.Future[Any]:
    """One executable that calls `function` on every set of arguments, in order."""
    one = jax.jit(function)  # so that the calls share one trace
    lowered = jax.jit(lambda sets, common: [one(*own, *common) for own in sets]).lower(*arguments)
    options = GPU_OPTIONS if jax.default_backend() == "gpu" else None
    return pool.submit(lambda: lowered.compile(compiler_options=options))


def milliseconds(program: Callable[..., Any], arguments: ProgramArguments) -> list[float]:
    """How long one call takes, in each of WINDOWS windows."""

    def window(repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            out = program(*arguments)
        jax.block_until_ready(out)
        return time.perf_counter() - began

    window(2)
    repeats = max(1, math.ceil(WINDOW_SECONDS / max(window(1), 1e-6)))
    return [1e3 * window(repeats) / repeats / len(arguments[0]) for _ in range(WINDOWS)]


@dataclasses.dataclass
class Measured:
    row: Row
    flops: float
    bytes: float
    windows: list[float]  # milliseconds of a call
    xla: float | None = None
    kernels: float | None = None  # milliseconds of the kernels of a call, without what lies between them
    launches: float | None = None
    variants: dict[str, float] = dataclasses.field(default_factory=dict)  # milliseconds with a stage left out

    @property
    def ms(self) -> float:
        return statistics.median(self.windows)

    @property
    def rate(self) -> float:
        """TFLOP/s or TB/s."""
        return (self.flops or self.bytes) / self.ms / 1e9

    @property
    def missed(self) -> bool:
        return self.row.target is not None and self.ms > self.row.target

    def of_baseline(self, baselines: dict[str, float]) -> float:
        return self.rate / baselines["matmul_tflops" if self.flops else "copy_tbps"]

    def record(self, baselines: dict[str, float]) -> dict[str, Any]:
        published, source = self.row.published or (None, None)
        return {
            "name": self.row.name,
            "ms": self.ms,
            "windows_ms": self.windows,
            "tflops" if self.flops else "tbps": self.rate,
            "of_matmul" if self.flops else "of_copy": self.of_baseline(baselines),
            "xla_ms": self.xla,
            "published_ms": published,
            "published_by": source,
            "target_ms": self.row.target,
            "kernels_ms": self.kernels,
            "launches": self.launches,
            "variants_ms": self.variants,
        }


HEADER = ["operation", "time", "rate", "of baseline", "than XLA", "best public kernel", "target", "kernels alone"]


def time_of(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.2f} ms" if ms >= 1 else f"{1e3 * ms:.1f} us"


def cells(record: dict[str, Any]) -> list[str]:
    """A row of the report."""
    ms, xla, launches = record["ms"], record["xla_ms"], record["launches"]
    public = "" if record["published_ms"] is None else f"{time_of(record['published_ms'])} ({record['published_by']})"
    return [
        record["name"],
        time_of(ms),
        f"{record['tflops']:.0f} TFLOP/s" if "tflops" in record else f"{record['tbps']:.2f} TB/s",
        f"{record['of_matmul']:.2f} of matmul" if "of_matmul" in record else f"{record['of_copy']:.2f} of copy",
        "" if xla is None else f"{xla / ms:.1f} x faster",
        public,
        time_of(record["target_ms"]),
        "" if launches is None else f"{time_of(record['kernels_ms'])} in {launches:g}",
    ]


def report(rows: list[Row], metrics: dict[str, Any]) -> str:
    """`rows` is the whole table: what of it `metrics` lacks is named."""
    lines = ["# Kernels", "", " ".join((__doc__ or "").split("\n\n", 1)[1].split()), ""]
    lines.append(
        '"Than XLA" compares with this library\'s "xla" implementation, for prefill measured on a part of the queries and '
        "multiplied; empty where it was left out for time or does not exist for a part of an operation. For rows that move "
        "bytes the rate counts what has to be read once: keys, scores, selected latents or matrices."
    )
    measured = {record["name"] for record in metrics["rows"]}
    lines += ["", markdown_table(HEADER, [cells(record) for record in metrics["rows"]]), ""]
    parts = [(record, name, ms) for record in metrics["rows"] for name, ms in record.get("variants_ms", {}).items()]
    if parts:
        lines.append("What stages cost: rows that miss their target, measured again with a stage left out.")
        rest = [[record["name"], time_of(record["ms"]), name, time_of(ms)] for record, name, ms in parts]
        lines += ["", markdown_table(["operation", "whole", "variant", "time"], rest), ""]
    lines += [f"- {row.name}: {row.note}" for row in rows if row.note and row.name in measured]
    missing = [row.name for row in rows if row.name not in measured]
    lines += ["", f"Not measured: {'; '.join(missing)}." if missing else "Every row was measured.", ""]
    lines.append("Runs, each with the baselines that its rows are compared with:")
    for one in metrics["runs"]:
        baselines = ", ".join(f"{name} {value:.4g}" for name, value in one["baselines"].items())
        complete = "" if one["complete"] else ", ended before all its rows were measured"
        lines.append(f"- `{one['command']}`: {len(one['rows'])} rows, {baselines}; {one['seconds']:.0f} s{complete}")
    return "\n".join(lines)


def earlier_metrics(output: Output) -> dict[str, Any]:
    """The metrics that lie in the output folder, where the same versions measured them on the same device; else none."""
    path = output.directory / "results.json"
    nothing: dict[str, Any] = {"runs": [], "rows": []}
    if not _ROWS.value or not path.exists():  # a run of all rows replaces what there is
        return nothing
    found = json.loads(path.read_text())
    if (found["experiment"], found["versions"], found["device"]) != ("kernels", versions(), device()):
        print(f"{path} is replaced: it is of another experiment, device or versions", flush=True)
        return nothing
    return found["metrics"]


def merged(rows: list[Row], earlier: dict[str, Any], run: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of earlier runs and this one: its rows replace those of their names."""
    by_name = {record["name"]: record for record in (*earlier["rows"], *records)}
    run = run | {"rows": [record["name"] for record in records]}
    runs = [one | {"rows": [name for name in one["rows"] if name not in run["rows"]]} for one in earlier["runs"]]
    return {
        "runs": [*(one for one in runs if one["rows"]), run],
        "rows": [by_name[row.name] for row in rows if row.name in by_name],
    }


def plot(output: Output, records: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.24 * len(records) + 1.2))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(records))
    left.barh(places, [(one["published_ms"] or 0) / one["ms"] for one in records], color="tab:blue")
    left.axvline(1, color="0.4", linewidth=1)
    left.set(xlabel="best public kernel's time / ours")
    left.set_yticks(places, [one["name"] for one in records], fontsize=7)
    left.invert_yaxis()
    right.barh(places, [(one["xla_ms"] or 0) / one["ms"] for one in records], color="tab:orange")
    right.set(xlabel="XLA implementation's time / ours", xscale="symlog")
    output.save_figure(figure, "kernels.png")


def kernel_times(program: Any, arguments: ProgramArguments) -> tuple[float, float]:
    """Milliseconds and number of the kernels of one call, by CUPTI."""
    found, calls = kernels_of(lambda: program(*arguments)), len(arguments[0])
    return sum(ms for _, ms in found) / calls, len(found) / calls


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The shapes' scale, every row of the table, and those to measure, in the order in which they are measured."""

    sizes: Sizes
    rows: list[Row]
    wanted: list[Row]


def read_inputs() -> Inputs:
    """The rows that --rows names; those with targets come first."""
    sizes = Sizes(small=not on_hopper())
    if sizes.small:
        print(f"small shapes and the XLA implementations only: {hopper.why_not()}", flush=True)
    try:
        pattern = re.compile(_ROWS.value)
    except re.error as error:
        raise ValueError(f"--rows={_ROWS.value}: not a regular expression: {error}") from None
    rows = table(sizes)
    wanted = [row for row in rows if pattern.search(row.name)]
    if not wanted:
        raise ValueError(f"--rows={_ROWS.value}: no row has such a name")
    return Inputs(sizes, rows, sorted(wanted, key=lambda row: row.priority))


Ready = tuple[Row, Case, Any]  # with the compiled program


class Session:
    """What one run has measured so far, written after each part of it."""

    def __init__(self, given: Inputs, output: Output, began: float, pool: futures.Executor) -> None:
        self.given, self.output, self.began = given, output, began
        self._pool = pool
        self._earlier = earlier_metrics(output)
        self._base: dict[str, float] = {}
        self.measured: list[tuple[Measured, Case, Any]] = []

    def seconds_left(self) -> float:
        return self.began + options.seconds_to_spend(SECONDS) - time.perf_counter()

    def write(self) -> dict[str, Any]:
        """results.json and report.md of what there is; returns the metrics."""
        run = {"command": command(), "baselines": self._base, "seconds": time.perf_counter() - self.began}
        run["complete"] = len(self.measured) == len(self.given.wanted)
        records = [one.record(self._base) for one, _, _ in self.measured]
        metrics = merged(self.given.rows, self._earlier, run, records)
        self.output.finish("kernels", metrics, report(self.given.rows, metrics))
        return metrics

    def compile(self, what: str, wanted: Iterable[tuple[Callable[..., Any], ProgramArguments]]) -> list[Any]:
        """Programs, compiled while the next ones are traced and their arguments drawn; nothing is measured meanwhile."""
        start = time.perf_counter()
        programs = [one.result() for one in [compiled(function, arguments, self._pool) for function, arguments in wanted]]
        print(f"{len(programs)} {what} compiled in {time.perf_counter() - start:.0f} s", flush=True)
        return programs

    def ready(self, what: str, rows: list[Row]) -> list[Ready]:
        """The rows' cases and programs."""
        cases: list[Case] = []

        def made() -> Iterator[tuple[Callable[..., Any], ProgramArguments]]:
            for row in rows:
                cases.append(row.make())
                yield cases[-1].kernel, cases[-1].program_arguments

        programs = self.compile(what, made())
        return list(zip(rows, cases, programs, strict=True))

    def measure_rows(self) -> None:
        """The wanted rows as far as there is time, between two measurements of the baselines."""
        names = ("matmul_tflops", "matmul_fp8_tflops", "copy_tbps")
        fixed = dict(zip(names, self.ready("baselines", baselines(self.given.sizes)), strict=True))
        to_measure = self.ready("kernels", self.given.wanted)
        self.measure_baselines(fixed, "")
        began = time.perf_counter()
        for row, case, program in to_measure:
            if self.seconds_left() < 0:
                print("nothing further is measured: --time_limit has passed", flush=True)
                break
            one = Measured(row, case.flops, case.bytes, milliseconds(program, case.program_arguments))
            self.measured.append((one, case, program))
            far = time_left(len(self.measured), len(to_measure), began)
            print("  ".join([*cells(one.record(self._base)), f"({far})"]), flush=True)
        self.measure_baselines(fixed, "_at_the_end")
        self.write()

    def measure_baselines(self, fixed: Mapping[str, Ready], when: str) -> None:
        for name, (row, case, program) in fixed.items():
            one = Measured(row, case.flops, case.bytes, milliseconds(program, case.program_arguments))
            self._base[f"{name}{when}"] = one.rate
            print(f"{row.name}: {one.rate:.4g} {'TFLOP/s' if case.flops else 'TB/s'}{when}", flush=True)

    def measure_variants(self) -> None:
        """Rows that miss their target, with single stages left out."""
        parts = [(one, case, name) for one, case, _ in self.measured if one.missed for name in case.variants]
        if not (parts and _VARIANTS.value and self.seconds_left() > 0):
            return
        programs = self.compile("variants", ((case.variants[name], case.program_arguments) for _, case, name in parts))
        for (one, case, name), program in zip(parts, programs, strict=True):
            one.variants[name] = statistics.median(milliseconds(program, case.program_arguments))
            print(f"{one.row.name}, {name}: {time_of(one.variants[name])}", flush=True)
        self.write()

    def compare_with_xla(self) -> None:
        """What the rows' references take, as far as there is time."""
        compared = [(one, case.reference) for one, case, _ in self.measured if case.reference is not None]
        if not compared or self.seconds_left() <= PROFILING_SECONDS:
            return
        programs = self.compile("XLA implementations", ((function, ([given], ())) for _, (function, given, _) in compared))
        for (one, (_, given, factor)), program in zip(compared, programs, strict=True):
            if self.seconds_left() < PROFILING_SECONDS:
                print("no further XLA comparisons: --time_limit is near", flush=True)
                break
            one.xla = factor * statistics.median(milliseconds(program, ([given], ())))
            print(f"XLA, {one.row.name}: {one.xla:.4g} ms, {one.xla / one.ms:.1f} x ours", flush=True)

    def profile(self) -> None:
        """The times of the kernels alone, where CUPTI shows them."""
        for one, case, program in self.measured:
            if self.given.sizes.small or self.seconds_left() < 0:
                break
            try:
                one.kernels, one.launches = kernel_times(program, case.program_arguments)
            except ValueError as error:
                print(error, flush=True)
                break
            print(f"kernels alone, {one.row.name}: {one.kernels:.4g} ms in {one.launches:g}", flush=True)


def measure_all(given: Inputs, output: Output, began: float) -> list[dict[str, Any]]:
    """Measures what there is time for, the most important first. The records of the report's rows."""
    with futures.ThreadPoolExecutor() as pool:
        session = Session(given, output, began, pool)
        session.measure_rows()
        session.measure_variants()
        session.compare_with_xla()
    session.write()
    session.profile()
    print(f"{len(session.measured)} rows in {time.perf_counter() - began:.0f} s, written to {output.directory}", flush=True)
    return session.write()["rows"]


def run(output_dir: str, seed: int) -> None:
    del seed  # the arguments are drawn from fixed ones: the times do not depend on them
    began = time.perf_counter()
    output = Output.create(output_dir)
    plot(output, measure_all(read_inputs(), output, began))
