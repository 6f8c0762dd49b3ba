"""decode_layer: the dense parts of decoder layers for a single token, one kernel between two attentions.

    h = rms_norm(x); q_latent, latent, ... = down h; up q_latent       attention_inputs: queries, and the token in the caches
    sparse_mla(queries, latents, indices)                              (and indexer_topk before it, where the layer selects)
    x + out (v_up context); + mlp(rms_norm(.))                         layer_outputs, with the next layer's inputs

This pays only where a whole device reads weights for one token, so there is no implementation for anything but Hopper:
`why_not` says whether the kernels serve a layer; a caller whose layer they do not serve computes it in XLA.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import device, hopper
from pallas_kernels.decode_layer.arrays import AttentionOperands, AttentionWeights
from pallas_kernels.latents import ROTARY, VALUE_DIM, WIDTH
from pallas_kernels.quant import BLOCK, Latents, Scaled
from pallas_kernels.routing.choice import Choice

MAX_NOPE = 192  # of a head: all its loads are in registers at once
MAX_HEADS = 128  # a thread block's share of the value and key matrices is of one head or two
# Matrices that may be `Scaled`: those of a group all or none.
IN_CODES = (("up", "index_up"), ("out",), ("gate_up", "expert_down", "shared_gate_up", "shared_down"))


def attention_inputs(
    x: jax.Array, layer: AttentionWeights, outputs: Mapping[str, jax.Array | Scaled], barrier_count: jax.Array
) -> tuple[AttentionOperands, jax.Array]:
    """What the first layer's attention takes, and the new barrier count.

    Args:
      x: [1, 1, D] bfloat16, the layer's input.
      layer: the weights, caches and position.
      outputs: the weights of the same layer that `layer_outputs` takes; the first of them are copied to L2.
      barrier_count: [1] int32, arrivals at the grid barrier so far: zeros for the first call of a sequence, then the value
        that the last call returned.

    Arguments are those that `why_not` has nothing against; they are not checked again.
    """
    from pallas_kernels.decode_layer import mosaic_gpu

    return mosaic_gpu.attention_inputs(x, layer, outputs, barrier_count)


def layer_outputs(
    x: jax.Array,
    context: jax.Array,
    outputs: Mapping[str, jax.Array | Scaled],
    barrier_count: jax.Array,
    *,
    eps: float,
    choice: Choice | None,
    next_layer: AttentionWeights | None = None,
    next_outputs: Mapping[str, jax.Array | Scaled] | None = None,
) -> tuple[jax.Array, AttentionOperands | None, jax.Array]:
    """A layer's output [1, 1, D], what the next layer's attention takes (None without next_layer), the new barrier count.

    Args:
      x: [1, 1, D] bfloat16, the layer's input. context: [1, 1, H, C], the attention's result.
      outputs: v_up [H, dv, C], out [D, H dv], mlp_norm [D]; with experts router [E, D], router_bias [E] float32,
        gate_up [E, D, 2, I], expert_down [E, I, D], and where there are shared ones shared_gate_up [2 Is, D] and
        shared_down [D, Is]; in a dense layer these two alone, [2 F, D] and [D, F]. `out` and the MLP's matrices but for the
        router may be `Scaled`, with blocks of 128 x 128; gate_up then is [E, 2, I, D] and expert_down [E, D, I]. Sums are
        those of the decoded weights in float32.
      barrier_count: as for `attention_inputs`.
      eps: of the norm before the MLP.
      choice: how the token's experts are chosen, None in a dense layer.
      next_layer, next_outputs: of the next layer, as for `attention_inputs`.

    Arguments are those that `why_not` has nothing against; they are not checked again.
    """
    from pallas_kernels.decode_layer import mosaic_gpu

    return mosaic_gpu.layer_outputs(
        x,
        context,
        outputs,
        barrier_count,
        eps=eps,
        choice=choice,
        next_layer=next_layer,
        next_outputs=next_outputs,
    )


def latents_of_rows(
    product: jax.Array, layer: AttentionWeights
) -> tuple[jax.Array, jax.Array | Latents, jax.Array | None, jax.Array | None]:
    """Query latents [N, 1, R] bfloat16 of few rows' projections down, and the caches with the rows' tokens in them.

    The caches are the layer's latents, index keys and their scales.

    Args:
      product: [N, 1, R + C + dr (+ Di + Hi)] float32.
      layer: weights, of which the norms are used, caches of N rows, positions [N, 1] and angles [N, 1, dr / 2]. Tokens outside
        0 .. T - 1 are dropped.

    Arguments are those that `why_not_rows` has nothing against; they are not checked again.
    """
    from pallas_kernels.decode_layer import mosaic_gpu_rows

    return mosaic_gpu_rows.latents_of_rows(product, layer)


def absorbed_queries(product: jax.Array, k_up: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries [N, 1, H, C + dr] bfloat16 of few rows: a head's part without rope times its key matrix, and the rotated part.

    product: [N, 1, H (dn + dr)] bfloat16, the queries' projection up. k_up: [H, C, dn] bfloat16. cos_sin: of the rope angles,
    [N, 1, dr / 2] float32 each. Arguments are those that `why_not_rows` has nothing against; they are not checked again.
    """
    from pallas_kernels.decode_layer import mosaic_gpu_rows

    return mosaic_gpu_rows.absorbed_queries(product, k_up, cos_sin)


def why_not_rows(layer: AttentionWeights) -> str | None:
    """Why `latents_of_rows` and `absorbed_queries` cannot serve a layer, None where they can."""
    if reason := hopper.why_not():
        return reason
    if layer.position.shape[1] != 1:
        return f"it takes a token a row, not {layer.position.shape[1]}"
    kinds = {layer.weights[name].dtype for name in ("q_norm", "kv_norm", "k_up")}
    if kinds != {jnp.dtype(jnp.bfloat16)}:
        return f"it takes norms and key matrices in bfloat16, not in {sorted(map(str, kinds))}"
    if (nope := layer.weights["k_up"].shape[2]) % 32 or nope > MAX_NOPE:
        return f"it takes up to {MAX_NOPE} numbers of a head without rope, in multiples of 32, not {nope}"
    if (width := layer.weights["down"].shape[0]) % 4:
        return f"it reads projections in pieces of 4 numbers, not {width}"
    return _why_not_caches(layer)


def why_not(
    x: jax.Array, layer: AttentionWeights, outputs: Mapping[str, jax.Array | Scaled], choice: Choice | None
) -> str | None:
    """Why these kernels cannot serve a layer, None where they can; arguments are those of `layer_outputs`."""
    weights = {**layer.weights, **outputs}
    if reason := hopper.why_not():
        return reason
    if (count := device.num_sms() or hopper.NUM_SMS) < hopper.NUM_SMS:
        return f"it needs {hopper.NUM_SMS} SMs at once, this device has {count}"
    if x.shape[:2] != (1, 1):
        return f"it is for a single token, not for {x.shape[0]} rows of {x.shape[1]}"
    kinds = {x.dtype} | {w.dtype for name, w in weights.items() if not isinstance(w, Scaled) and name != "router_bias"}
    if kinds != {jnp.dtype(jnp.bfloat16)}:
        return f"it takes activations and weights in bfloat16, not {sorted(map(str, kinds))}"
    if reason := _why_not_codes(weights) or _why_not_caches(layer):
        return reason
    heads, _, nope = weights["k_up"].shape
    value = weights["v_up"].shape[1]
    if heads > MAX_HEADS:
        return f"it takes up to {MAX_HEADS} heads, these are {heads}"
    widths = {"hidden size": x.shape[2], "query rank": weights["q_norm"].shape[0], "nope": nope, "heads x value": heads * value}
    widths["second matrix"] = weights["shared_down"].shape[1] if "shared_down" in weights else 32
    for name, width in widths.items():
        if width % 32:
            return f"it reads rows in pieces of 32 numbers, the {name} is {width}"
    if "gate_up" in weights:
        hidden = x.shape[2]
        width, multiple = (
            (weights["gate_up"].shape[2], BLOCK)
            if isinstance(weights["gate_up"], Scaled)
            else (weights["gate_up"].shape[3], 256)
        )
        if width % multiple or hidden % 128:
            return f"it takes widths by {multiple} and hidden sizes by 128, not {width} and {hidden}"
    return None if choice is None else choice.why_not()


def _why_not_caches(layer: AttentionWeights) -> str | None:
    """Why these kernels cannot write to a layer's caches, None where they can."""
    latents, index_keys, compressed = layer.latents, layer.index_keys, layer.weights["kv_norm"].shape[0]
    if isinstance(latents, Latents):
        in_16_bits, kind = latents.rotary.dtype, latents.dtype
    else:
        in_16_bits = kind = latents.dtype
    if in_16_bits != jnp.bfloat16 or kind not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"it keeps latents in bfloat16 or float8_e4m3fn, not in {kind}"
    if latents.shape[2] != WIDTH or compressed != VALUE_DIM:
        return f"it is laid out for C+R = {VALUE_DIM}+{ROTARY}, these are {compressed} of {latents.shape[2]}"
    if index_keys is not None and (index_keys.shape[2] != 128 or index_keys.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn)):
        return f"it keeps index keys of 128 in bfloat16 or float8_e4m3fn, not of {index_keys.shape[2]} in {index_keys.dtype}"
    return None


def _why_not_codes(weights: Mapping[str, jax.Array | Scaled]) -> str | None:
    """Why these kernels cannot read the `Scaled` of a layer's weights, None where they can."""
    codes = {name: w for name, w in weights.items() if isinstance(w, Scaled)}
    for group in IN_CODES:
        both = [name for name in group if name in weights]
        if {name in codes for name in both} == {True, False}:
            return f"it takes {', '.join(both)} all in 8 bits or none, in 8 bits are {', '.join(n for n in both if n in codes)}"
    if others := codes.keys() - {name for group in IN_CODES for name in group}:
        return f"it takes {', '.join(sorted(others))} in bfloat16, not in 8 bits"
    for name, w in codes.items():
        if w.codes.dtype != jnp.float8_e4m3fn:
            return f"it reads codes in float8_e4m3fn, those of {name} are {w.codes.dtype}"
        if w.by_row:
            return f"it takes a scale for every {BLOCK} x {BLOCK} codes, {name} has one for every row"
        if w.shape[-1] % BLOCK or (w.ndim > 2 and w.shape[-2] % BLOCK):
            return f"it takes whole blocks of {BLOCK} x {BLOCK} codes, {name} is {w.shape}"
    return None
