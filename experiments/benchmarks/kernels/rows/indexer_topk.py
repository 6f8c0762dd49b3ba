"""indexer_topk: its scores alone, its selection alone, and whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.kernels.arrays import FP8, block_maxima, key_scales, normal
from experiments.benchmarks.kernels.cases import Arguments, Case, Row, Sizes, on_hopper, row, without
from pallas_kernels import indexer_topk
from pallas_kernels.indexer_topk import reference

HEAD_DIM = 128


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
        return jax.vmap(reference.scores)(q, k, w, scales)

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
        return reference.select(scores[0], visible, k)

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


def score_rows(sizes: Sizes) -> Iterator[Row]:
    """The indexer's scores alone."""
    add = functools.partial(row, sizes)
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
    add = functools.partial(row, sizes)
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
    add = functools.partial(row, sizes)
    bf16 = jnp.bfloat16
    whole = "DeepGEMM + selector"
    yield add("indexer_topk fp8, 4096 x 122880", whole_indexer, 1, 4096, 122880, FP8, public=(5.2, whole), target=4.7, part=16)
    yield add("indexer_topk bf16, 4096 x 122880", whole_indexer, 1, 4096, 122880, bf16, part=16)
    yield add("indexer_topk fp8, decode, 1 x 122880", whole_indexer, 1, 1, 122880, FP8, public=(0.022, whole), target=0.03)
    yield add("indexer_topk fp8, decode, 8 x 122880", whole_indexer, 8, 1, 122880, FP8, public=(0.056, whole), target=0.06)
