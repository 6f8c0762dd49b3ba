"""The only door from the model to the kernels: what a layer asks of `pallas_kernels`, in the model's own terms.

Model code is written for one device. A mesh will enter here and nowhere else in the model: these functions are where a
call to a kernel can be wrapped for the devices that share it.
"""

from __future__ import annotations

import jax

import pallas_kernels
from indexcache_jax.config import Config
from indexcache_jax.positions import Positions
from pallas_kernels import dispatch, hopper
from pallas_kernels import grouped_matmul as grouped_matmul
from pallas_kernels import grouped_swiglu as grouped_swiglu
from pallas_kernels.decode_layer import api as decode_layer  # noqa: F401  for serving.fused
from pallas_kernels.indexer_topk import fp8 as index_fp8
from pallas_kernels.sparse_mla import fp8 as latent_fp8


def select(
    queries: jax.Array,
    keys: jax.Array,
    head_weights: jax.Array,
    positions: Positions,
    config: Config,
    key_scales: jax.Array | None = None,
) -> jax.Array:
    """The positions [B, S, min(index_topk, T)] int32 that every query selects, ascending, -1 where fewer are visible.

    queries [B, S, Hi, Di], keys [B, T, Di], head_weights [B, S, Hi] float32 with every scale folded in; key_scales [B, T]
    where the keys are kept in 8 bits, whose queries must be in 8 bits too.
    """
    return pallas_kernels.indexer_topk(
        queries,
        keys,
        head_weights,
        k_select=min(config.index_topk, keys.shape[1]),
        q_positions=positions.queries,
        kv_lengths=positions.kv_lengths,
        key_scales=key_scales,
    )


def attend(
    queries: jax.Array, latents: jax.Array, indices: jax.Array, config: Config, latent_scales: jax.Array | None = None
) -> jax.Array:
    """Attention of absorbed queries [B, S, H, C + dr] to the selected latents [B, T, C + dr]: context [B, S, H, C].

    indices [B, S, k] int32, -1 for none; latent_scales [B, T] where the latents are kept in 8 bits.
    """
    return pallas_kernels.sparse_mla(
        queries, latents, indices, scale=config.attention_scale, value_dim=config.kv_lora_rank, latent_scales=latent_scales
    )


def quantise_latents(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents [..., C + dr] in float8_e4m3fn, and their scales [...] float32."""
    return latent_fp8.quantise(latents)


def quantise_index(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index queries or keys [..., Di] in float8_e4m3fn, and their scales [...] float32."""
    return index_fp8.quantise(vectors)


def platform() -> str:
    """The platform that programs are compiled for: "cpu", "gpu" or "tpu"."""
    return dispatch.platform()


def skips_invisible_keys() -> bool:
    """Whether the kernels of this device read only the cached tokens that are visible, however long the cache."""
    return hopper.why_not() is None
