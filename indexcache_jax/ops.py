"""The only door from the model to the kernels: what a layer asks of `pallas_kernels`, in the model's own terms.

Model code is written for one device. Under a mesh every device calls a kernel on its own rows, queries and heads, or on its
own part of the cached positions (`sharding.on_each_device`, `split_cache`); kernels never hear of a mesh.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from indexcache_jax import split_cache
from indexcache_jax.config import Config
from indexcache_jax.positions import Positions
from indexcache_jax.sharding import Axes, current, on_each_device, split_over
from pallas_kernels import attention_denominators as attention_denominators
from pallas_kernels import attention_target as attention_target
from pallas_kernels import bits, device, dispatch, hopper, quant
from pallas_kernels import index_cross_entropy as index_cross_entropy
from pallas_kernels import index_divergence as index_divergence
from pallas_kernels import selected_attention as selected_attention
from pallas_kernels.attention_denominators import api as denominators_api
from pallas_kernels.attention_target import api as target_api
from pallas_kernels.decode_layer import api as decode_layer  # noqa: F401  for serving.fused
from pallas_kernels.grouped_matmul import api as grouped_matmul_api
from pallas_kernels.index_cross_entropy import api as cross_entropy_api
from pallas_kernels.index_divergence import api as index_divergence_api
from pallas_kernels.latent_cache import api as latent_cache
from pallas_kernels.quant import Scaled
from pallas_kernels.routed_mlp import api as routed_mlp  # noqa: F401  for serving.few_rows
from pallas_kernels.routing import api as routing
from pallas_kernels.scaled_matmul import api as scaled_matmul_api
from pallas_kernels.selected_attention import api as selected_attention_api

# The logical axes that arrays are split by: their rows; these and their cached positions, their queries, or queries and heads.
ROWS, TOKENS, QUERIES, HEADS = ("batch",), ("batch", "tokens"), ("batch", "queries"), ("batch", "queries", "heads")


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

    def select(
        queries: jax.Array,
        keys: jax.Array,
        head_weights: jax.Array,
        q_positions: jax.Array,
        kv_lengths: jax.Array,
        key_scales: jax.Array | None,
        return_scores: bool = False,
    ) -> Any:
        return pallas_kernels.indexer_topk(
            queries,
            keys,
            head_weights,
            k_select=min(config.index_topk, keys.shape[1]),
            q_positions=q_positions,
            kv_lengths=kv_lengths,
            key_scales=key_scales,
            return_scores=return_scores,
        )

    devices = split_cache.exchange(queries, keys)
    cached: Axes = ROWS
    run: Callable[..., jax.Array] = select
    if devices is not None:
        candidates = functools.partial(select, return_scores=True)
        best = functools.partial(pallas_kernels.select_topk, k_select=min(config.index_topk, keys.shape[1]))
        cached, run = TOKENS, functools.partial(split_cache.select, candidates, best, devices)
    inputs = QUERIES, cached, QUERIES, QUERIES, ROWS, cached
    arguments = queries, keys, head_weights, positions.queries, positions.kv_lengths, key_scales
    return on_each_device(run, inputs, QUERIES)(*arguments)


def attend(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    config: Config,
    positions: Positions | None = None,
) -> jax.Array:
    """Attention of absorbed queries [B, S, H, C + dr] to the selected latents [B, T, C + dr]: context [B, S, H, C].

    indices [B, S, k] int32, -1 for none. positions: where `select` made the indices from these, which tell how many a list has.
    """

    def attend(
        queries: jax.Array,
        latents: jax.Array | quant.Latents,
        indices: jax.Array,
        lengths: jax.Array | None = None,
        return_lse: bool = False,
    ) -> Any:
        return pallas_kernels.sparse_mla(
            queries,
            latents,
            indices,
            scale=config.attention_scale,
            value_dim=config.kv_lora_rank,
            lengths=lengths,
            return_lse=return_lse,
        )

    devices = split_cache.exchange(queries, latents)
    cached: Axes = ROWS
    run: Callable[..., jax.Array] = attend
    if devices is not None:
        cached, run = TOKENS, functools.partial(split_cache.attend, functools.partial(attend, return_lse=True), devices)
    elif positions is not None:
        visible = jnp.minimum(positions.queries + 1, positions.kv_lengths[:, None])
        lengths = jnp.clip(visible, 0, min(indices.shape[2], latents.shape[1])).astype(jnp.int32)
        return on_each_device(run, (HEADS, cached, QUERIES, QUERIES), HEADS)(queries, latents, indices, lengths)
    return on_each_device(run, (HEADS, cached, QUERIES), HEADS)(queries, latents, indices)


def trains_by_kernels(batch: int, length: int, dtype: Any, config: Config) -> bool:
    """Whether the kernels of selected attention and of the index divergence run both for activations of this shape.

    Otherwise attention and divergence are computed in XLA.
    """
    return "xla" not in {choice.name for choice in training_choices(batch, length, dtype, config).values()}


def distils_by_kernels(batch: int, length: int, dtype: Any, config: Config) -> bool:
    """Whether the kernels that make targets and what index scores miss of them run for activations of this shape."""

    def shape(*sizes: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((batch, *sizes), dtype)

    queries = shape(length, config.num_heads, config.qk_head_dim)
    index_queries = shape(length, config.index_n_heads, config.index_head_dim)
    index = index_queries, shape(length, config.index_head_dim), shape(length, config.index_n_heads, dtype=jnp.float32)
    words = shape(bits.num_words(length), length, dtype=jnp.int32)
    target, lse = shape(length, length, dtype=jnp.float32), shape(config.num_heads, length, dtype=jnp.float32)
    names = (
        dispatch.best(denominators_api.BACKENDS, queries, queries, words, scale=1.0),
        dispatch.best(target_api.BACKENDS, target, queries, queries, lse, words, 1.0, scale=1.0),
        dispatch.best(cross_entropy_api.BACKENDS, *index, target, words),
    )
    return "xla" not in names


def training_choices(batch: int, length: int, dtype: Any, config: Config) -> dict[str, dispatch.Choice]:
    """The implementations of selected attention and of the index divergence for activations of this shape, by operation."""

    def shape(*sizes: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((batch, *sizes), dtype)

    heads, index_heads, width = config.num_heads, config.index_n_heads, config.index_head_dim
    queries, values = shape(length, heads, config.qk_head_dim), shape(length, heads, config.v_head_dim)
    selection_bits = shape(bits.num_words(length), length, dtype=jnp.int32)
    index = shape(length, index_heads, width), shape(length, width), shape(length, index_heads, dtype=jnp.float32)
    lse = shape(heads, length, dtype=jnp.float32)
    attend, diverge = selected_attention_api.BACKENDS, index_divergence_api.BACKENDS
    return {
        "selected_attention": dispatch.choose(attend, queries, queries, values, selection_bits, scale=1.0),
        "index_divergence": dispatch.choose(diverge, *index, queries, queries, lse, selection_bits, scale=1.0),
    }


# Part of the key of every compiled program.
_ROUNDED_ROWS = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def rounded_rows() -> Iterator[None]:
    """Within, what matrices in 8 bits multiply is rounded to 8 bits first, as by kernels that multiply codes by codes."""
    with _ROUNDED_ROWS(True):
        yield


def _rows(rows: jax.Array | Scaled, matrix: jax.Array | Scaled) -> jax.Array | Scaled:
    if isinstance(matrix, Scaled) and not isinstance(rows, Scaled) and _ROUNDED_ROWS.value:
        return quant.dequantise(quant.quantise_rows(rows), rows.dtype)
    return rows


def quantises(x: jax.Array, matrix: jax.Array | Scaled | None, copies: int = 1) -> bool:
    """Whether the tokens of x [B, S, ...] would be rounded to 8 bits for a product with `matrix`.

    Then whoever makes what is multiplied may do so in 8 bits, by `normalise` or `swiglu`. matrix: [N, K] of `scaled_matmul`,
    or gate_up of `grouped_mlp`, for which every token is so many rows.
    """
    if not isinstance(matrix, Scaled):
        return False
    rows = jax.ShapeDtypeStruct((copies * x.size // x.shape[-1], matrix.shape[-1]), x.dtype)
    if matrix.ndim == 2:
        return scaled_matmul_api.quantises(rows, matrix)
    return grouped_matmul_api.quantises(rows, matrix, jax.ShapeDtypeStruct(matrix.shape[:1], jnp.int32))


def _flat(x: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), x)


def _on_tokens(function: Callable[..., Any], x: jax.Array, *others: jax.Array) -> Any:
    """`function` of the rows [M, K] of x [B, S, K] and of `others`; its result's arrays [M, ...] as [B, S, ...]."""

    def call(x: jax.Array, *others: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-1], -1), function(_flat(x), *others))

    return on_each_device(call, (QUERIES, *((),) * len(others)), QUERIES)(x, *others)


def normalise(x: jax.Array, weight: jax.Array, eps: float, *, plain: bool = True, in_8_bits: bool = True) -> Any:
    """rms_norm by weight [K] of the first K numbers of x [B, S, W >= K], in the dtype of `weight`, and in 8 bits.

    A pair, in which what is not asked for is None.
    """
    return _on_tokens(functools.partial(pallas_kernels.normalise_rows, eps=eps, plain=plain, in_8_bits=in_8_bits), x, weight)


def swiglu(gate_up: jax.Array) -> Scaled:
    """silu(gate) * up of gate_up [B, S, 2 F], gate first, in 8 bits [B, S, F]."""
    return _on_tokens(pallas_kernels.quantise_swiglu, gate_up)


def choice_options(config: Config) -> dict[str, Any]:
    """How a model chooses a token's experts, in the words of `pallas_kernels.choose` and `route`."""
    return {
        "choices": config.num_experts_per_tok,
        "normalised": config.norm_topk_prob,
        "scale": config.routed_scaling_factor,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
    }


def choose(logits: jax.Array, bias: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """The experts [..., k] of router logits [..., E] float32 and their weights."""
    experts, weights = routing.choose(_flat(logits), bias, **choice_options(config))
    return experts.reshape(*logits.shape[:-1], -1), weights.reshape(*logits.shape[:-1], -1)


def sort_by_group(groups: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """groups [M] from 0 to num_groups, which stands for none, sorted: the order [M], its inverse, and the groups' sizes."""
    return routing.sort_by_group(groups, num_groups)


def gather_rows(rows: jax.Array | Scaled, index: jax.Array) -> Any:
    """rows [N, K] at index [M]."""
    return pallas_kernels.gather_rows(rows, index)


def sum_rows(
    rows: jax.Array, places: jax.Array, weights: jax.Array, added: tuple[jax.Array, ...] = (), dtype: Any = jnp.float32
) -> jax.Array:
    """The sums over j of weights[n, j] * rows[places[n, j]] and of `added` [N, D]: [N, D] in `dtype`, added up in float32."""
    return pallas_kernels.sum_rows(rows, places, weights, added, dtype=dtype)


def grouped_mlp(
    rows: jax.Array | Scaled, gate_up: jax.Array | Scaled, down: jax.Array | Scaled, group_sizes: jax.Array
) -> jax.Array:
    """SwiGLU layers of rows [M, D] in groups of group_sizes [E] -> [M, D]; undefined for rows after the last group.

    gate_up [E, D, 2, I] and down [E, I, D], or in 8 bits [E, 2, I, D] and [E, D, I].
    """
    if _ROUNDED_ROWS.value:
        hidden = pallas_kernels.grouped_swiglu(_rows(rows, gate_up), gate_up, group_sizes)
        return pallas_kernels.grouped_matmul(_rows(hidden, down), down, group_sizes)
    return pallas_kernels.grouped_mlp(rows, gate_up, down, group_sizes)


def scaled_matmul(x: jax.Array | Scaled, matrix: Scaled, dtype: Any = None, inputs: str | None = None) -> jax.Array:
    """x [B, S, K] or [M, K] times a matrix in 8 bits [N, K] -> [..., N] in `dtype` or that of x, bfloat16 for x in 8 bits.

    inputs: the logical axis of K, along which devices that split it add up their products.
    """
    axes = ("batch", "queries")[: x.ndim - 1]
    dtype = dtype or (None if isinstance(x, Scaled) else x.dtype)

    def multiply(x: jax.Array | Scaled, matrix: Scaled) -> jax.Array:
        product = pallas_kernels.scaled_matmul(_rows(_flat(x), matrix), matrix, dtype=dtype)
        product = jax.lax.psum(product, split) if split else product
        return product.reshape(*x.shape[:-1], -1)

    split = split_over(inputs, matrix.shape[1])
    return on_each_device(multiply, ((*axes, inputs), (None, inputs)), axes)(x, matrix)


def quantise_latents(latents: jax.Array, value_dim: int) -> quant.Latents:
    """Latents [..., C + dr] in 8 bits, C = value_dim."""
    return quant.quantise_latents(latents, value_dim)


def appends(cache: Any, product: jax.Array, norm: jax.Array, positions: Positions, start: int, eps: float) -> bool:
    """Whether `append_latents` serves: a kernel, on a device that computes alone, for a cache in 8 bits."""
    if not isinstance(cache, quant.Latents) or current()[0] is not None:
        return False
    arguments = cache, product, norm, *positions.cos_sin, positions.queries
    return dispatch.best(latent_cache.BACKENDS, *arguments, start=start, eps=eps) != "xla"


def append_latents(
    cache: quant.Latents, product: jax.Array, norm: jax.Array, positions: Positions, start: int, eps: float
) -> quant.Latents:
    """The cache [B, T, C + dr] with new tokens' latents, whose projections are product[..., start : start + C + dr].

    product [B, S, W] float32; norm [C].
    """
    return pallas_kernels.append_latents(cache, product, norm, *positions.cos_sin, positions.queries, start=start, eps=eps)


def index_queries(product: jax.Array, positions: Positions, config: Config) -> tuple[jax.Array, jax.Array]:
    """Rotated index queries [B, S, Hi, Di] of their projection in float8_e4m3fn, and their scales [B, S, Hi] float32."""

    def quantise(product: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
        tokens = (x.reshape(-1, *x.shape[2:]) for x in (product, cos, sin))
        found = pallas_kernels.quantise_index_queries(*tokens, interleaved=config.index_rope_interleave)
        return jax.tree.map(lambda x: x.reshape(*product.shape[:2], *x.shape[1:]), found)

    return on_each_device(quantise, (QUERIES,) * 3, QUERIES)(product, *positions.cos_sin)


def quantise_index(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index queries or keys [..., Di] in float8_e4m3fn, and their scales [...] float32."""
    return quant.quantise_index(vectors)


def platform() -> str:
    """The platform that programs are compiled for: "cpu", "gpu" or "tpu"."""
    return device.platform()


def skips_invisible_keys() -> bool:
    """Whether the kernels of this device read only the cached tokens that are visible, however long the cache."""
    return hopper.why_not() is None
