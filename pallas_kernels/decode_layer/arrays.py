"""What goes into the stages before an attention and what they make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Before:
    """A layer's attention before its token has come: weights, caches of one row and the token's place in them.

    weights: norm [D], down [R + C + dr (+ Di + Hi), D], q_norm [R], kv_norm [C], up [H (dn + dr), R], k_up [H, C, dn], and
    where the layer selects index_up [Hi Di, R], key_norm and key_norm_bias [Di].
    """

    weights: Mapping[str, jax.Array]
    latents: jax.Array  # [1, T, C + dr]
    index_keys: jax.Array | None  # [1, T, Di], None where the layer does not select
    index_scales: jax.Array | None  # [1, T], where the keys are float8_e4m3fn
    position: jax.Array  # [1, 1] int32; one past the end takes the last place
    angles: tuple[jax.Array, jax.Array]  # cosines and sines, [1, 1, dr / 2] float32 each
    eps: float
    latent_eps: float
    index_scale: float  # of the index heads' weights
    index_interleaved: bool

    def caches(self) -> dict[str, jax.Array]:
        """Those there are, by their names here."""
        found = {"latents": self.latents, "index_keys": self.index_keys, "index_scales": self.index_scales}
        return {name: array for name, array in found.items() if array is not None}


@dataclasses.dataclass(frozen=True)
class Ready:
    """What an attention and its selection take, and the caches with the token in them."""

    queries: jax.Array  # [1, 1, H, C + dr]
    latents: jax.Array
    index_queries: jax.Array | None  # [1, 1, Hi, Di], as the keys are kept
    index_weights: jax.Array | None  # [1, 1, Hi] float32, the queries' scales in them
    index_keys: jax.Array | None
    index_scales: jax.Array | None
