"""decode_layer: the dense parts of decoder layers for a single token, one launch between two attentions.

    h = rms_norm(x); q_latent, latent, ... = down h; up q_latent       attention_inputs: queries, and the token in the caches
    sparse_mla(queries, latents, indices)                              (and indexer_topk before it, where the layer selects)
    x + out (v_up context); + mlp(rms_norm(.))                         layer_outputs, with the next layer's inputs

Only where a whole device reads weights for one token is that worth having, so there is no implementation for anything but
Hopper: `why_not` says whether these two can be called, and whoever cannot call them writes the layer as XLA has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import device, hopper
from pallas_kernels.decode_layer.arrays import Before, Ready

MAX_HEADS = 128  # a block's share of the value and key matrices is of one head or two


def attention_inputs(
    x: jax.Array, given: Before, after: Mapping[str, jax.Array], counter: jax.Array
) -> tuple[Ready, jax.Array]:
    """What the first layer's attention needs of x [1, 1, D], and the counter for the next call.

    Args:
      after: the weights of the same layer for `layer_outputs`; the first of them are brought to L2.
      counter: [1] int32, 0 at the first of a sequence of calls: how often blocks have met.
    """
    from pallas_kernels.decode_layer import mosaic_gpu

    return mosaic_gpu.attention_inputs(x, given, after, counter)


def layer_outputs(
    x: jax.Array,
    context: jax.Array,
    weights: Mapping[str, jax.Array],
    counter: jax.Array,
    *,
    eps: float,
    chosen: int,
    normalised: bool,
    scale: float,
    following: Before | None = None,
    after: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Ready | None, jax.Array]:
    """x + attention and MLP of a layer, [1, 1, D]; what the following layer's attention needs of it; the counter.

    Args:
      x: the layer's input. context: [1, 1, H, C], what it attended to.
      weights: v_up [H, dv, C], out [D, H dv], mlp_norm [D]; with experts router [E, D], router_bias [E] float32,
        gate_up [E, D, 2, I], expert_down [E, I, D], and where there are shared ones shared_gate_up [2 Is, D] and
        shared_down [D, Is]; in a dense layer these two alone, [2 F, D] and [D, F].
      chosen, normalised, scale: experts a token, whether their weights are made to sum to 1, what they are multiplied by.
      following, after: the next layer's, as for `attention_inputs`.
    """
    from pallas_kernels.decode_layer import mosaic_gpu

    return mosaic_gpu.layer_outputs(
        x,
        context,
        weights,
        counter,
        eps=eps,
        chosen=chosen,
        normalised=normalised,
        scale=scale,
        following=following,
        after=after,
    )


def why_not(x: jax.Array, given: Before, after: Mapping[str, jax.Array], groups: int = 1) -> str | None:
    """Why these kernels cannot serve a layer, None where they can; `groups` are those that experts are chosen within."""
    latents, index_keys, weights = given.latents, given.index_keys, {**given.weights, **after}
    if reason := hopper.why_not():
        return reason
    if (count := device.num_sms() or hopper.NUM_SMS) < hopper.NUM_SMS:
        return f"it needs {hopper.NUM_SMS} multiprocessors at once, this device has {count}"
    if x.shape[:2] != (1, 1):
        return f"it is for a single token, not for {x.shape[0]} rows of {x.shape[1]}"
    kinds = {x.dtype, latents.dtype} | {w.dtype for name, w in weights.items() if name != "router_bias"}
    if kinds != {jnp.dtype(jnp.bfloat16)}:
        return f"it takes activations, latents and weights in bfloat16, not {sorted(map(str, kinds))}"
    if latents.shape[2] != 576 or weights["kv_norm"].shape != (512,):
        return f"it is laid out for C+R = 512+64, these are {weights['kv_norm'].size} of {latents.shape[2]}"
    if index_keys is not None and (index_keys.shape[2] != 128 or index_keys.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn)):
        return f"it keeps index keys of 128 in bfloat16 or float8_e4m3fn, not of {index_keys.shape[2]} in {index_keys.dtype}"
    heads, _, nope = weights["k_up"].shape
    value = weights["v_up"].shape[1]
    if heads > MAX_HEADS:
        return f"it takes up to {MAX_HEADS} heads, these are {heads}"
    widths = {"hidden size": x.shape[2], "query rank": weights["q_norm"].size, "nope": nope, "heads x value": heads * value}
    widths["second matrix"] = weights["shared_down"].shape[1] if "shared_down" in weights else 32
    for name, width in widths.items():
        if width % 32:
            return f"it reads rows in pieces of 32 numbers, the {name} is {width}"
    if "gate_up" in weights:
        experts, hidden, _, width = weights["gate_up"].shape
        if experts % 32 or width % 256 or hidden % 128:
            return f"it takes experts by 32, widths by 256 and hidden sizes by 128, not {experts}, {width} and {hidden}"
        if groups > 1:
            return f"it chooses among all experts, not within {groups} groups"
    return None
