"""What the stages before an attention take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from pallas_kernels.quant import Latents, Scaled


@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """What a layer's attention inputs are computed from, besides the hidden state: weights, caches of rows, positions.

    weights: norm [D], down [R + C + dr (+ Di + Hi), D], q_norm [R], kv_norm [C], up [H (dn + dr), R], k_up [H, C, dn], and
    where the layer selects index_up [Hi Di, R], key_norm and key_norm_bias [Di]. The two matrices of the query latent, up and
    index_up, may be `Scaled`.
    """

    weights: Mapping[str, jax.Array | Scaled]
    latents: jax.Array | Latents  # [N, T, C + dr]
    index_keys: jax.Array | None  # [N, T, Di], None where the layer does not select
    index_scales: jax.Array | None  # [N, T], where the keys are float8_e4m3fn
    position: jax.Array  # [N, 1] int32; of a single row T, one past the end, is taken as T - 1
    cos_sin: tuple[jax.Array, jax.Array]  # of the rope angles, [N, 1, dr / 2] float32 each
    eps: float
    latent_eps: float
    index_scale: float  # the index heads' weights are multiplied by it
    index_interleaved: bool

    def caches(self) -> dict[str, jax.Array]:
        """The cache arrays that the layer has, by name: latents in 8 bits are three."""
        arrays = {"index_keys": self.index_keys, "index_scales": self.index_scales}
        if isinstance(self.latents, Latents):
            arrays |= {f"latent_{name}": array for name, array in vars(self.latents).items()}
        else:
            arrays["latents"] = self.latents
        return {name: array for name, array in arrays.items() if array is not None}


def latents_of(caches: Mapping[str, jax.Array]) -> jax.Array | Latents:
    """The latents among arrays that are named as `AttentionWeights.caches` names them."""
    in_codes = "latents" not in caches
    return Latents(*(caches[f"latent_{name}"] for name in ("codes", "rotary", "scales"))) if in_codes else caches["latents"]


@dataclasses.dataclass(frozen=True)
class AttentionOperands:
    """What a layer's selection and attention take: queries, and the caches with the new token in them."""

    queries: jax.Array  # [1, 1, H, C + dr]
    latents: jax.Array | Latents  # [1, T, C + dr]
    index_queries: jax.Array | None  # [1, 1, Hi, Di], in the dtype of the index keys
    index_weights: jax.Array | None  # [1, 1, Hi] float32; the scales of 8-bit index queries are multiplied in
    index_keys: jax.Array | None  # [1, T, Di]
    index_scales: jax.Array | None  # [1, T]
