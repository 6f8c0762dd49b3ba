"""decode_layer: the dense parts of a decoder layer for a single token, one launch before its attention and one after.

    h = rms_norm(x); q_latent, latent, ... = down h; up q_latent       attention_inputs: queries, and the token in the caches
    sparse_mla(queries, latents, indices)                              (and indexer_topk before it, where the layer selects)
    x + out (v_up context); + mlp(rms_norm(.))                         layer_outputs

Only where a whole device reads weights for one token is that worth having, so there is no implementation for anything but
Hopper: `why_not` says whether these two can be called, and whoever cannot call them writes the layer as XLA has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper

def _later(name: str) -> Callable[..., Any]:
    """`name` of the kernels' module, imported when first called: not every JAX has what they need."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module("pallas_kernels.decode_layer.mosaic_gpu"), name)(*args, **options)

    return call


attention_inputs, layer_outputs = _later("attention_inputs"), _later("layer_outputs")

MAX_HEADS = 128  # a block's share of the value and key matrices is of one head or two


def why_not(
    x: jax.Array, latents: jax.Array, index_keys: jax.Array | None, weights: Mapping[str, jax.Array], groups: int = 1
) -> str | None:
    """Why the two kernels cannot serve a layer of these arrays, None where they can. Arguments as for them."""
    if reason := hopper.why_not():
        return reason
    if (count := hopper.multiprocessors()) < hopper.MULTIPROCESSORS:
        return f"it needs {hopper.MULTIPROCESSORS} multiprocessors at once, this device has {count}"
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
