"""What stands between the projections down and up of few rows on Hopper: a thread block normalises a row and caches its token.

XLA takes ten kernels for it, most of them scatters into the caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer import mosaic_gpu_parts as parts
from pallas_kernels.decode_layer.arrays import AttentionWeights, latents_of
from pallas_kernels.decode_layer.mosaic_gpu import INDEX_WIDTH, Inputs, Token
from pallas_kernels.decode_layer.mosaic_gpu_parts import SharedMemory, Thread, Value
from pallas_kernels.hopper import ptx
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.quant import Latents

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


class Row:
    """The row with the number of the thread block: its query latent, and its token in the caches if its position is in them."""

    def __init__(self, p: Inputs, a: Mapping[str, Value], thread: Any, shared: SharedMemory):
        self.p, self.thread = p, thread
        self.a = {name: self._of_row(name, address) for name, address in a.items()}
        self.sums, self.token = shared.allocate(64), Token(p, self.a, thread, shared)

    def _of_row(self, name: str, address: Value) -> Value:
        """Where the row's part of an array begins."""
        p = self.p
        key_bytes = INDEX_WIDTH if p.index_scaled else 2 * INDEX_WIDTH
        row_bytes = {
            "down_out": 4 * p.down,
            "q_latents": 2 * p.q_rank,
            "position": 4,
            "cos": 2 * ROTARY,
            "sin": 2 * ROTARY,
            "latents": 2 * WIDTH * p.max_len,
            "latent_codes": VALUE_DIM * p.max_len,
            "latent_rotary": 2 * ROTARY * p.max_len,
            "latent_scales": 4 * p.max_len,
            "index_keys": key_bytes * p.max_len,
            "index_scales": 4 * p.max_len,
        }
        return ptx.offset(address, self.thread.block, row_bytes[name]) if name in row_bytes else address

    def run(self) -> None:
        p, a, thread = self.p, self.a, self.thread

        def sink(i: Value, word: Value, exists: Value) -> None:
            ptx.store_global(ptx.offset(a["q_latents"], i, 4), word, exists)

        pair = parts.fresh_pair(a["down_out"])
        parts.normalise(thread, p.q_rank // 2, pair, a["q_norm"], p.latent_eps, self.sums, sink, in_bfloat16=False)
        position = ptx.load_global(a["position"])
        with ptx.when(ptx.both(ptx.compare("sge", position, 0), ptx.compare("slt", position, p.max_len))):
            self.token.write(position)


def sizes(product: jax.Array, layer: AttentionWeights) -> Inputs:
    full, q_rank = layer.index_keys is not None, layer.weights["q_norm"].shape[0]
    return Inputs(
        hidden=0,
        q_rank=q_rank,
        heads=0,
        nope=0,
        value=0,
        max_len=layer.latents.shape[1],
        eps=layer.eps,
        latent_eps=layer.latent_eps,
        index_heads=product.shape[-1] - q_rank - WIDTH - INDEX_WIDTH if full else 0,
        index_interleaved=layer.index_interleaved,
        index_scaled=layer.index_scales is not None,
        latents_scaled="latents" not in layer.caches(),
    )


def operands(product: jax.Array, layer: AttentionWeights) -> dict[str, Any]:
    """What the kernel reads, and as references what it writes to, by name."""
    cos, sin = layer.cos_sin
    vectors = [name for name in ("q_norm", "kv_norm", "key_norm", "key_norm_bias") if name in layer.weights]
    return {
        "down_out": product,
        "position": layer.position,
        "cos": cos,
        "sin": sin,
        **{name: layer.weights[name] for name in vectors},
        **{name: jax.new_ref(array) for name, array in layer.caches().items()},
    }


def latents_of_rows(
    product: jax.Array, layer: AttentionWeights
) -> tuple[jax.Array, jax.Array | Latents, jax.Array | None, jax.Array | None]:
    p, given = sizes(product, layer), operands(product, layer)
    counted = SharedMemory()
    Row(p, {}, None, counted)
    names = [*given, "q_latents"]

    def latents_of_rows(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,) * len(refs) + (_SCALAR,))
        def program(ctx: Any, *values: Any) -> None:
            *arrays, memory, block = values
            a = {n: ptx.global_address(v) for n, v in zip(names, arrays, strict=True)}
            thread = Thread.current(ptx.scalar(block))
            Row(p, a, thread, SharedMemory(ptx.shared_address(memory))).run()

        program(*refs, jax.lax.axis_index("block"))

    rows = product.shape[0]
    kernel = plgpu.kernel(
        latents_of_rows,
        out_type=(jax.ShapeDtypeStruct((rows, 1, p.q_rank), jnp.bfloat16),),
        scratch_types=(plgpu.SMEM((counted.used // 4,), jnp.int32),),
        grid=(rows,),
        grid_names=("block",),
        num_threads=parts.THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    (q_latents,) = kernel(*given.values())
    caches = {name: jax.freeze(given[name]) for name in layer.caches()}
    return q_latents, latents_of(caches), caches.get("index_keys"), caches.get("index_scales")
