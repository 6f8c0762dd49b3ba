"""The dense parts of a decoder layer for one token on Hopper: two kernels around the attention.

With one token a layer reads its weights once and computes next to nothing, so its time is the number of kernel calls, each
of which drains the device, and how fast weights stream. Here one thread block stays on every SM for a whole kernel, and its
stages are separated by grid barriers (`ptx.grid_arrive`, `ptx.grid_wait`). A stage's first weights do not depend on what the
barrier waits for, so they are loaded before it and stream while the thread blocks wait for each other and compute the stage's
input, which every thread block computes whole for itself.

`attention_inputs`: norm and the projections down | latent norms, rope, cache, the projections up | absorption, index
queries. `layer_outputs`: value projection | output projection and residual | norm, router and shared experts' first
matrix | choice and first matrices of the experts | second matrices and residual; or the three of a dense layer.

Stages pass float32 vectors to each other through L2. No sum is split between thread blocks, so the results do not depend on
the order in which they run.

From here on: `mosaic_gpu_stages` (what a stage is, and the kernel around them), `mosaic_gpu_arrays` (sizes, and every array
with its shape), `mosaic_gpu_inputs` and `mosaic_gpu_token`, `mosaic_gpu_outputs` and the two of experts, and below them
`mosaic_gpu_products` and `mosaic_gpu_codes` (a matrix times a vector) and `hopper.persistent`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import quant
from pallas_kernels.decode_layer.arrays import AttentionOperands, AttentionWeights, latents_of
from pallas_kernels.decode_layer.mosaic_gpu_arrays import INDEX_WIDTH, InputArrays, InputSizes, OutputArrays, OutputSizes
from pallas_kernels.decode_layer.mosaic_gpu_inputs import input_stages
from pallas_kernels.decode_layer.mosaic_gpu_outputs import output_stages
from pallas_kernels.decode_layer.mosaic_gpu_stages import Stage, arrays_of, call_kernel
from pallas_kernels.hopper.persistent import SharedMemory, Thread
from pallas_kernels.hopper.ptx import Address
from pallas_kernels.latents import WIDTH
from pallas_kernels.quant import Scaled
from pallas_kernels.routing.choice import Choice


def _arrays(weights: Mapping[str, jax.Array | Scaled]) -> dict[str, jax.Array]:
    """The weights' arrays by name; a matrix in codes is one of codes and NAME_scales in float32."""
    arrays: dict[str, jax.Array] = {}
    for name, w in weights.items():
        if isinstance(w, Scaled):
            arrays |= {name: w.codes, f"{name}_scales": quant.float_scales(w.scales)}
        else:
            arrays[name] = w
    return arrays


def _inputs(
    hidden: int, layer: AttentionWeights, outputs: Mapping[str, jax.Array | Scaled]
) -> tuple[InputSizes, dict[str, Any], dict[str, Any]]:
    """Sizes, operands and outputs of the stages before an attention; `outputs`: the layer's weights for `layer_outputs`."""
    w = layer.weights
    full, scaled = layer.index_keys is not None, layer.index_scales is not None
    p = InputSizes(
        hidden=hidden,
        q_rank=w["q_norm"].shape[0],
        heads=w["k_up"].shape[0],
        nope=w["k_up"].shape[2],
        value=outputs["v_up"].shape[1],
        max_len=layer.latents.shape[1],
        eps=layer.eps,
        latent_eps=layer.latent_eps,
        index_heads=w["down"].shape[0] - w["q_norm"].shape[0] - WIDTH - INDEX_WIDTH if full else 0,
        index_scale=layer.index_scale,
        index_interleaved=layer.index_interleaved,
        index_scaled=scaled,
        latents_scaled=isinstance(layer.latents, quant.Latents),
        codes=isinstance(w["up"], Scaled),
    )
    cos, sin = layer.cos_sin
    operands: dict[str, Any] = {
        "position": layer.position,
        "cos": cos,
        "sin": sin,
        **_arrays({"next_v_up": outputs["v_up"], "next_out": outputs["out"], **w}),
    }
    for name, array in layer.caches().items():
        operands[name] = jax.new_ref(array)
    outs = {
        "down_out": jax.ShapeDtypeStruct((p.down,), jnp.float32),
        "up_out": jax.ShapeDtypeStruct((p.up,), jnp.float32),
        "queries": jax.ShapeDtypeStruct((1, 1, p.heads, WIDTH), jnp.bfloat16),
    }
    if full:
        kind = jnp.float8_e4m3fn if scaled else jnp.bfloat16
        outs["index_queries"] = jax.ShapeDtypeStruct((1, 1, p.index_heads, INDEX_WIDTH), kind)
        outs["index_weights"] = jax.ShapeDtypeStruct((1, 1, p.index_heads), jnp.float32)
    return p, operands, outs


def _output_sizes(hidden: int, outputs: Mapping[str, jax.Array | Scaled], eps: float, choice: Choice | None) -> OutputSizes:
    heads, value, _ = outputs["v_up"].shape
    routed = "gate_up" in outputs
    mlp_codes = isinstance(outputs["gate_up" if routed else "shared_gate_up"], Scaled)
    return OutputSizes(
        hidden=hidden,
        heads=heads,
        value=value,
        eps=eps,
        shared=outputs["shared_gate_up"].shape[0] // 2 if "shared_gate_up" in outputs else 0,
        choice=choice,
        width=outputs["expert_down"].shape[2 if mlp_codes else 1] if routed else 0,
        out_codes=isinstance(outputs["out"], Scaled),
        mlp_codes=mlp_codes,
    )


def _attention_operands(
    layer: AttentionWeights, operands: Mapping[str, Any], outs: Mapping[str, jax.Array]
) -> AttentionOperands:
    caches = {name: jax.freeze(operands[name]) for name in layer.caches()}
    return AttentionOperands(
        outs["queries"],
        latents_of(caches),
        outs.get("index_queries"),
        outs.get("index_weights"),
        caches.get("index_keys"),
        caches.get("index_scales"),
    )


def attention_inputs(
    x: jax.Array, layer: AttentionWeights, outputs: Mapping[str, jax.Array | Scaled], barrier_count: jax.Array
) -> tuple[AttentionOperands, jax.Array]:
    p, operands, outs = _inputs(x.size, layer, outputs)
    operands |= {"x": x, "barrier_count": jax.new_ref(barrier_count)}

    def stages(addresses: Mapping[str, Address], thread: Thread | None, shared: SharedMemory) -> Sequence[Stage]:
        return input_stages(p, arrays_of(InputArrays, addresses), thread, shared, is_first_kernel=True)

    results = call_kernel("decode_inputs", stages, operands, outs)
    return _attention_operands(layer, operands, results), jax.freeze(operands["barrier_count"])


def layer_outputs(
    x: jax.Array,
    context: jax.Array,
    outputs: Mapping[str, jax.Array | Scaled],
    barrier_count: jax.Array,
    *,
    eps: float,
    choice: Choice | None,
    next_layer: AttentionWeights | None,
    next_outputs: Mapping[str, jax.Array | Scaled] | None,
) -> tuple[jax.Array, AttentionOperands | None, jax.Array]:
    p = _output_sizes(x.size, outputs, eps, choice)
    operands: dict[str, Any] = {"x": x, "context": context, **_arrays(outputs), "barrier_count": jax.new_ref(barrier_count)}
    outs: dict[str, Any] = {
        "values": jax.ShapeDtypeStruct((p.heads * p.value,), jnp.float32),
        "middle": jax.ShapeDtypeStruct((p.hidden,), jnp.bfloat16),
        "first": jax.ShapeDtypeStruct((p.first,), jnp.float32),
        "y": jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
    }
    if p.experts:
        outs["hidden"] = jax.ShapeDtypeStruct((p.num_experts_per_token * 2 * p.width,), jnp.float32)
    next_sizes: InputSizes | None = None
    if next_layer is not None:
        assert next_outputs is not None
        next_sizes, more_operands, more_outs = _inputs(x.size, next_layer, next_outputs)
        operands, outs = operands | more_operands, outs | more_outs

    def stages(addresses: Mapping[str, Address], thread: Thread | None, shared: SharedMemory) -> Sequence[Stage]:
        a, following = arrays_of(OutputArrays, addresses), None
        if next_sizes is not None and addresses:
            following = arrays_of(InputArrays, {**addresses, "x": addresses["y"]})
        return output_stages(p, a, next_sizes, following, thread, shared)

    results = call_kernel("decode_outputs" if next_sizes is None else "decode_outputs_inputs", stages, operands, outs)
    attention = None if next_layer is None else _attention_operands(next_layer, operands, results)
    return results["y"], attention, jax.freeze(operands["barrier_count"])
