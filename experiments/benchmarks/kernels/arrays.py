"""The rows' arguments: drawn on the host, because on the device every shape would be one more program to compile."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import quant

POOL = 2**24 - 3  # numbers drawn on the host, which longer arrays repeat; a prime, so that rows of an array differ
FP8 = jnp.float8_e4m3fn


@functools.cache
def _pool(dtype: Any) -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal(POOL, np.float32)
    return drawn if dtype == jnp.float32 else drawn.astype(jnp.bfloat16).astype(dtype)


def _drawn(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    start = 7919 * seed % (POOL // 2)
    return np.resize(_pool(dtype)[start:], shape)


@functools.cache
def normal(shape: tuple[int, ...], dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Kept, because rows share their largest arguments."""
    return jax.device_put(_drawn(shape, dtype, seed))


@functools.cache
def key_scales(shape: tuple[int, int], seed: int = 0) -> jax.Array:
    return jax.device_put(np.abs(_drawn(shape, jnp.float32, seed)))


@functools.cache
def scaled_normal(shape: tuple[int, ...], seed: int = 0) -> quant.Scaled:
    """Numbers in 8 bits, with scales by block."""
    *stacked, rows, columns = shape
    groups = (*stacked, -(-rows // quant.BLOCK), -(-columns // quant.BLOCK))
    return quant.Scaled(normal(shape, FP8, seed), jax.device_put(np.abs(_drawn(groups, jnp.float32, seed))))


@functools.cache
def repeated(times: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What takes long to send: [times, ...] copies of one array [1, ...]."""
    return jnp.tile(normal(shape, dtype), (times, *(1 for _ in shape[1:])))


@functools.cache
def block_maxima(shape: tuple[int, int, int], seed: int) -> jax.Array:
    return jnp.max(normal(shape, jnp.float32, seed).reshape(*shape[:2], -1, 16), axis=-1)


@functools.cache
def selections(shape: tuple[int, int], keys: int, k: int, shared: float = 0.0, seed: int = 0) -> jax.Array:
    """[B, S, k] int32, ascending."""
    rng = np.random.default_rng(seed)
    places = rng.random((*shape, k), np.float32)  # in [0, 1)
    if shared:
        kept = rng.random(places.shape, np.float32) < shared
        for s in range(1, shape[1]):
            places[:, s] = np.where(kept[:, s], places[:, s - 1], places[:, s])
    edges = np.ceil(np.arange(k + 1) * (keys / k)).astype(np.int32)
    sizes = np.diff(edges)
    return jax.device_put(edges[:-1] + np.minimum((places * sizes).astype(np.int32), sizes - 1))
