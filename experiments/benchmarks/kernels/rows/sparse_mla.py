"""sparse_mla, over many queries and over one a row."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernels.arrays import FP8, key_scales, normal, repeated, selections
from experiments.benchmarks.kernels.cases import Case, Row, Sizes, on_hopper, row, without
from pallas_kernels import quant, sparse_mla

LATENT, VALUE_DIM = 576, 512


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


def prefill_attention_rows(sizes: Sizes) -> Iterator[Row]:
    """sparse_mla over many queries."""
    add = functools.partial(row, sizes)
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
    add = functools.partial(row, sizes)
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
