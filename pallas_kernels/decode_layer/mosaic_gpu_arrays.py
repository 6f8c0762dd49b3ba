"""Sizes and arrays of the decode kernels' stages, by name and with their shapes.

D: hidden size, R: rank of the query latent, H: heads, dn, dv: of a head's keys and values, Hi: index heads, T: the caches'
length, Nd, Nu: rows of the projections down and up; E: experts, k of a token, I: an expert's width, Is: the shared experts'
width, or that of a dense layer. A matrix [N, K] that has scales is in codes, with scales [N / 128, K / 128] in float32, else it
is in bfloat16. What a layer has not is None.

The kernels have one barrier, of the grid: barrier_count [1] int32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.latents import ROTARY, WIDTH
from pallas_kernels.routing.choice import Choice

INDEX_WIDTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSizes:
    """Sizes and formats of a token's projections down and of its rows in the caches."""

    q_rank: int
    max_len: int
    latent_eps: float
    index_heads: int = 0
    index_interleaved: bool = True
    index_scaled: bool = False  # keys in 8 bits with scales
    latents_scaled: bool = False  # latents in 8 bits with scales

    @property
    def latent_end(self) -> int:
        return self.q_rank + WIDTH

    @property
    def down(self) -> int:
        return self.latent_end + (INDEX_WIDTH + self.index_heads if self.index_heads else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSizes(TokenSizes):
    """Sizes and formats of the stages before an attention."""

    hidden: int
    heads: int
    nope: int
    value: int
    eps: float
    index_scale: float = 0.0
    codes: bool = False  # whether the projections up are in 8 bits

    @property
    def head_dim(self) -> int:
        return self.nope + ROTARY

    @property
    def up(self) -> int:
        return self.heads * self.head_dim + self.index_heads * INDEX_WIDTH


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputSizes:
    """Sizes and formats of the stages after an attention. choice None: a dense layer, whose width is `shared`."""

    hidden: int
    heads: int
    value: int
    eps: float
    shared: int
    choice: Choice | None = None
    width: int = 0  # of an expert
    out_codes: bool = False  # whether the output projection, and the matrices of the MLP, are in 8 bits
    mlp_codes: bool = False

    @property
    def experts(self) -> int:
        return self.choice.experts if self.choice else 0

    @property
    def num_experts_per_token(self) -> int:
        return self.choice.choices if self.choice else 0

    @property
    def first(self) -> int:
        return self.experts + 2 * self.shared


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TokenArrays:
    """Global addresses of what a token's rows in the caches are made of. Latents are one array, or three of 8 bits."""

    # Input
    down_out: Any  # [Nd] float32: query latent, latent, rotary part, index key, index heads' weights
    position: Any  # [1] int32
    cos: Any  # [32] float32
    sin: Any  # [32] float32
    q_norm: Any  # [R] bfloat16
    kv_norm: Any  # [512] bfloat16
    key_norm: Any = None  # [128] bfloat16
    key_norm_bias: Any = None  # [128] bfloat16
    # Output: the row `position` of each
    latents: Any = None  # [T, 576] bfloat16
    latent_codes: Any = None  # [T, 512] float8_e4m3fn
    latent_rotary: Any = None  # [T, 64] bfloat16
    latent_scales: Any = None  # [T] float32
    index_keys: Any = None  # [T, 128] bfloat16 or float8_e4m3fn
    index_scales: Any = None  # [T] float32


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InputArrays(TokenArrays):
    """Global addresses of what the stages before an attention read and write."""

    # Input
    x: Any  # [D] bfloat16
    norm: Any  # [D] bfloat16
    down: Any  # [Nd, D] bfloat16
    up: Any  # [H (dn + 64), R]
    up_scales: Any = None
    index_up: Any = None  # [Hi 128, R]
    index_up_scales: Any = None
    k_up: Any  # [H, 512, dn] bfloat16
    next_v_up: Any  # [H, dv, 512] bfloat16: of the stages after the attention, copied to L2
    next_out: Any  # [D, H dv]: the same
    next_out_scales: Any = None
    # Output
    queries: Any  # [H, 576] bfloat16
    index_queries: Any = None  # [Hi, 128] in the dtype of the index keys
    index_weights: Any = None  # [Hi] float32
    # Scratch, besides `down_out`
    up_out: Any  # [Nu] float32: queries, then index queries


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OutputArrays:
    """Global addresses of what the stages after an attention read and write."""

    # Input
    x: Any  # [D] bfloat16
    context: Any  # [H, 512] bfloat16
    v_up: Any  # [H, dv, 512] bfloat16
    out: Any  # [D, H dv]
    out_scales: Any = None
    mlp_norm: Any  # [D] bfloat16
    router: Any = None  # [E, D] bfloat16
    router_bias: Any = None  # [E] float32
    gate_up: Any = None  # [E, D, 2, I], codes [E, 2, I, D]
    gate_up_scales: Any = None
    expert_down: Any = None  # [E, I, D], codes [E, D, I]
    expert_down_scales: Any = None
    shared_gate_up: Any = None  # [2 Is, D]
    shared_gate_up_scales: Any = None
    shared_down: Any = None  # [D, Is]
    shared_down_scales: Any = None
    # Output
    y: Any  # [D] bfloat16
    # Scratch
    values: Any  # [H dv] float32
    middle: Any  # [D] bfloat16: after the attention's residual
    first: Any  # [E + 2 Is] float32: the router's logits, then the shared experts' gates and ups
    hidden: Any = None  # [k, 2, I] float32: gates and ups of the token's experts
