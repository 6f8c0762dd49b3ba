"""One layer over new tokens and a cache.

The formulas are those of `attention`, `indexer` and `moe`; the products are with serving weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from indexcache_jax import indexer, moe, ops, sharding
from indexcache_jax.attention import finish_latent, finish_queries, finish_query_latent
from indexcache_jax.config import Config
from indexcache_jax.norm import rms_norm
from indexcache_jax.positions import Positions
from indexcache_jax.rope import CosSin, rotate
from indexcache_jax.serving.cache import LayerCache, append, formats
from indexcache_jax.serving.weights import Dense, Layer
from pallas_kernels.quant import Scaled

MANY_TOKENS = 128  # the rows of a tile of products
FEW_SUMS = 4096  # so many numbers of a product are sums in one kernel, and no call of a library


def linear(x: jax.Array | Scaled, weight: jax.Array | Scaled, dtype: Any = None, inputs: str | None = None) -> jax.Array:
    """x [..., K] times weight [N, K] -> [..., N], accumulated in float32, in `dtype` or that of x.

    x is in 8 bits, for a result in bfloat16, only where the weight is.
    inputs: the logical axis of K, where a mesh may split it.
    On a GPU a single row, and few numbers in all such as the router's, are written as the sums that they are: a library's
    product would be a kernel that nothing fuses with, and for float32 results of bfloat16 it would first convert the matrix.
    """
    if isinstance(weight, Scaled):
        return ops.scaled_matmul(x, weight, dtype, inputs)
    assert not isinstance(x, Scaled)
    rows = x.size // x.shape[-1]
    if ops.platform() == "gpu" and (rows == 1 or rows * weight.shape[0] <= FEW_SUMS):
        products = x.astype(jnp.float32)[..., None, :] * weight.astype(jnp.float32)
        return jnp.sum(products, axis=-1).astype(dtype or x.dtype)
    exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, precision=exact, preferred_element_type=dtype or x.dtype)


def by_head(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """x [B, S, H, K] times the heads' matrices [H, N, K] -> [B, S, H, N].

    Of a decode step the product has the rows before N. einsum puts the rows last, and where they are no multiple of 8
    cuBLAS has slow kernels only for such a product. With many rows they are one axis: of two XLA would write the product
    head by head and turn it.
    """
    if x.shape[1] > 1:
        product = jnp.einsum("thk,hnk->thn", x.reshape(-1, *x.shape[2:]), matrices)
        return product.reshape(*x.shape[:3], -1)
    product = jax.lax.dot_general(x[:, 0], matrices, (((2,), (2,)), ((1,), (0,))))
    return product.swapaxes(0, 1)[:, None]


def _absorbed_queries(p: Layer, q_latent: jax.Array | Scaled, positions: Positions, config: Config) -> jax.Array:
    """The absorbed queries [B, S, H, C + dr] of query latents [B, S, R]."""
    inputs = ("heads",), ("heads",), ("batch", "queries"), ("batch", "queries")
    on_each = sharding.on_each_device(functools.partial(_absorb, config=config), inputs, ("batch", "queries", "heads"))
    return on_each(p.up, p.k_up, q_latent, positions.cos_sin)


def _absorb(
    up: jax.Array | Scaled, k_up: jax.Array, q_latent: jax.Array | Scaled, cos_sin: CosSin, config: Config
) -> jax.Array:
    """The absorbed queries [B, S, H, C + dr] of the H heads whose matrices are given, up [H dq, R] and k_up [H, C, dn].

    With one token a row a single product is cut into its parts. With many tokens the absorbing product leaves room for the
    rope part, which then is written into it: cutting and joining the queries themselves are two passes over them and a
    transposition. Slicing the weights is cheaper too. But a matrix in 8 bits is not cut, since parts of heads begin within its
    blocks: there the absorbing product takes whole heads, and multiplies their rope parts by zeros.
    """
    c, (b, s, _), heads = config, q_latent.shape, k_up.shape[0]
    if s == 1:
        # XLA would make one product of this and that with `index_up`, and join the two matrices at every step for it.
        q_latent = jax.lax.optimization_barrier(q_latent)
        product = linear(q_latent, up).reshape(b, s, heads, c.qk_head_dim)
        nope, rope = finish_queries(product, cos_sin, c)
        return jnp.concatenate([by_head(nope, k_up), rope], axis=-1)
    wide = jnp.pad(k_up, ((0, 0), (0, c.qk_rope_head_dim), (0, c.qk_rope_head_dim if isinstance(up, Scaled) else 0)))
    tokens = jax.tree.map(lambda x: x.reshape(b * s, -1), q_latent)
    if isinstance(up, Scaled):
        product = linear(tokens, up).reshape(b * s, heads, -1)
        absorbed = jnp.einsum("thd,hcd->thc", product, wide).reshape(b, s, heads, -1)
        rope = product[..., c.qk_nope_head_dim :].reshape(b, s, heads, -1)
    else:
        matrices = up.reshape(heads, c.qk_head_dim, -1)
        nope = linear(tokens, matrices[:, : c.qk_nope_head_dim].reshape(-1, tokens.shape[1]))
        absorbed = jnp.einsum("thn,hcn->thc", nope.reshape(b * s, heads, -1), wide).reshape(b, s, heads, -1)
        # XLA would make one product of two small ones again.
        tokens = jax.lax.optimization_barrier(tokens)
        rope = linear(tokens, matrices[:, c.qk_nope_head_dim :].reshape(-1, tokens.shape[1])).reshape(b, s, heads, -1)
    rope = rotate(rope, *cos_sin, interleaved=True)
    return absorbed.at[..., c.kv_lora_rank :].set(rope)


def select(
    p: Layer,
    q_latent: jax.Array | Scaled,
    weights: jax.Array,
    cache: LayerCache,
    positions: Positions,
    kv_length: int,
    config: Config,
) -> jax.Array:
    """The indices [B, S, k] of an F layer; `weights` [B, S, Hi] are the product that the head weights are made from."""
    assert cache.index_keys is not None  # an F layer's cache has them
    product = linear(q_latent, p.index_up).reshape(*q_latent.shape[:2], config.index_n_heads, config.index_head_dim)
    weights, key_scales = indexer.finish_head_weights(weights, config), None
    if cache.index_scales is None:
        queries = indexer.finish_queries(product, positions.cos_sin, config)
    else:
        queries, query_scales = ops.index_queries(product, positions, config)
        weights, key_scales = weights * query_scales, cache.index_scales[:, :kv_length]
    return ops.select(queries, cache.index_keys[:, :kv_length], weights, positions, config, key_scales)


def _query_latent(p: Layer, product: jax.Array, config: Config, dtype: Any) -> jax.Array | Scaled:
    """Query latents [B, S, R] from the product [B, S, R + ...] with `down`; in 8 bits where the product with `up` would be."""
    of_queries = product[..., : config.q_lora_rank]
    if p.down_bias is None and ops.quantises(of_queries.astype(dtype), p.up):
        return ops.normalise(product, p.q_norm, config.latent_norm_eps, plain=False)[1]
    bias = None if p.down_bias is None else p.down_bias[: config.q_lora_rank]
    return finish_query_latent(of_queries, bias, p.q_norm, config, dtype)


def _finish_latents(
    p: Layer, product: jax.Array, cache: LayerCache, positions: Positions, config: Config, dtype: Any
) -> tuple[LayerCache, jax.Array | None]:
    """The cache with new latents from the product with `down` in it, and None; or the cache as it is and the latents."""
    c, start = config, config.q_lora_rank
    arguments = product, p.kv_norm, positions, start, c.latent_norm_eps
    if p.down_bias is None and ops.appends(cache.latents, *arguments):
        return dataclasses.replace(cache, latents=ops.append_latents(cache.latents, *arguments)), None
    bias = None if p.down_bias is None else p.down_bias[start:]
    latents = product[..., start : start + c.latent_dim]
    return cache, finish_latent(latents, bias, p.kv_norm, positions.cos_sin, c, dtype)


def attention(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """x + attention(norm(x)), the indices [B, S, k] it attended with, and the cache with the new tokens in it.

    Only the first `kv_length` positions of the cache are read.
    """
    c, dtype = config, x.dtype
    with jax.named_scope("project"):
        h, _ = _normalised(x, p.norm, c.rms_norm_eps)
        product = linear(h, p.down, jnp.float32)
        q_latent = _query_latent(p, product, c, dtype)
        cache, latents = _finish_latents(p, product, cache, positions, c, dtype)
        absorbed = _absorbed_queries(p, q_latent, positions, c)

    if p.full:
        with jax.named_scope("index"):
            index_product = product[..., c.q_lora_rank + c.latent_dim :]
            key_product, weights = jnp.split(index_product, [c.index_head_dim], axis=-1)
            keys = indexer.finish_keys(key_product, p.key_norm, p.key_norm_bias, positions.cos_sin, c, dtype)
            cache = append(cache, latents, keys, positions.queries)
            indices = select(p, q_latent, weights, cache, positions, kv_length, c)
    else:
        cache = append(cache, latents, None, positions.queries)
    assert indices is not None  # the first layer is F

    return attend(p, x, absorbed, indices, cache, kv_length, c, positions), indices, cache


def attend(
    p: Layer,
    x: jax.Array,
    absorbed: jax.Array,
    indices: jax.Array,
    cache: LayerCache,
    kv_length: int,
    config: Config,
    positions: Positions | None = None,
) -> jax.Array:
    """x + the output of attention with absorbed queries [B, S, H, C + dr] to selected latents.

    positions: of the queries, where the indices are what these select.
    """
    with jax.named_scope("attend"):
        latents = jax.tree.map(lambda x: x[:, :kv_length], cache.latents)
        context = ops.attend(absorbed, latents, indices, config, positions)
        split = "batch", "queries", "heads"
        heads = sharding.on_each_device(by_head, (split, ("heads",)), split)(context, p.v_up)
        out = linear(heads.reshape(*x.shape[:2], -1), p.out, inputs="heads")
        x = x + (out if p.out_bias is None else out + p.out_bias)
        return sharding.constrain(x, "batch", "queries", None)


def _down_of_swiglu(gate_up: jax.Array, down: jax.Array | Scaled) -> jax.Array:
    if ops.quantises(gate_up, down):
        return linear(ops.swiglu(gate_up), down)
    return linear(moe.swiglu(*jnp.split(gate_up, 2, axis=-1)), down)


def _normalised(x: jax.Array, weight: jax.Array, eps: float, *in_8_bits: bool) -> tuple[jax.Array, list[jax.Array | Scaled]]:
    """norm(x), and once more for every value of in_8_bits, where it holds in 8 bits."""
    if not any(in_8_bits) and x.size // x.shape[-1] < MANY_TOKENS:  # XLA makes one kernel of a norm and what is around it
        return (h := rms_norm(x, weight, eps)), [h] * len(in_8_bits)
    h, codes = ops.normalise(x, weight, eps, in_8_bits=any(in_8_bits))
    return h, [codes if wanted else h for wanted in in_8_bits]


def mlp(p: Layer, x: jax.Array, config: Config) -> jax.Array:
    """x + mlp(norm(x)) of hidden states x [B, S, D]."""
    with jax.named_scope("mlp"):
        m, c = p.mlp, config
        if isinstance(m, Dense):
            _, (h,) = _normalised(x, p.mlp_norm, c.rms_norm_eps, ops.quantises(x, m.gate_up))
            return x + _down_of_swiglu(linear(h, m.gate_up), m.down)
        in_8_bits = ops.quantises(x, m.gate_up, c.num_experts_per_tok), ops.quantises(x, m.shared_gate_up)
        h, (of_experts, of_shared) = _normalised(x, p.mlp_norm, c.rms_norm_eps, *in_8_bits)
        experts, weights = moe.choose(linear(h, m.router, jnp.float32), m.router_bias, c)
        others = (x,) if m.shared_down is None else (_down_of_swiglu(linear(of_shared, m.shared_gate_up), m.shared_down), x)
        out = moe.routed(m, of_experts, experts, weights, c, others, x.dtype)
        return sharding.constrain(out, "batch", "queries", None)


def layer(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
    """One layer over new tokens x [B, S, D]: hidden states, an F layer's indices for those that follow, and its cache.

    An S layer returns None for the indices that it was given: as a program's result they would be copied. Only the first
    `kv_length` positions of the cache are read.
    """
    x, indices, cache = attention(p, x, indices, cache, positions, kv_length, config)
    return mlp(p, x, config), indices if p.full else None, cache


LayerFunction = Callable[..., tuple[jax.Array, jax.Array | None, LayerCache]]  # called as `layer` is


@functools.cache
def layer_program(
    cache_formats: LayerCache | None, donate: bool, compiler_options: tuple[tuple[str, Any], ...] = ()
) -> jax.stages.Wrapped:
    """`layer` as one compiled program for all layers of a kind.

    cache_formats: the layouts of the cache it returns, None for those the compiler chooses. donate: x and the cache are
    updated in place. Indices are never donated: an S layer leaves them to the layer that follows.
    """
    return jax.jit(
        layer,
        static_argnames="kv_length",
        donate_argnames=("x", "cache") if donate else (),
        out_shardings=None if cache_formats is None else (None, None, cache_formats),
        compiler_options=dict(compiler_options) or None,
    )


def run_layer(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
    """`layer` as a program, whose arguments stay as they are."""
    return layer_program(formats(cache), donate=False)(p, x, indices, cache, positions, kv_length, config)


def run_layer_in_place(
    p: Layer, x: jax.Array, indices: jax.Array | None, cache: LayerCache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
    """`layer` as a program that donates x and the cache: those passed in must not be used again."""
    return layer_program(formats(cache), donate=True)(p, x, indices, cache, positions, kv_length, config)
