"""The kernels of sparse_mla's backward pass by themselves, small enough for compute-sanitizer's racecheck, on a Hopper GPU.

As in test_attention_tasks.py inputs are made and results compared on the host.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from tests.support.attention_cases import relative_error

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

SCALE, WIDTH, VALUE_DIM = 0.04, 576, 512
BF16 = jnp.dtype(jnp.bfloat16)


def words_of(mask: np.ndarray) -> np.ndarray:
    """[B, M, T] bool -> words [B, T / 32, M] int32, bit i of a word is key i of its 32."""
    return np.ascontiguousarray(np.packbits(mask, axis=-1, bitorder="little").view(np.int32).swapaxes(1, 2))


def test_weights_and_their_gradients_equal_numpy_and_repeat_themselves():
    from pallas_kernels.hopper.tiles import TILE
    from pallas_kernels.sparse_mla import mosaic_gpu_gradient as kernels

    rng, (b, m, t) = np.random.default_rng(0), (2, 2 * TILE, 3 * TILE)
    q, kv, grad = (rng.normal(size=(b, rows, WIDTH)).astype(BF16) for rows in (m, t, m))
    grad[..., VALUE_DIM:] = 0
    mask = rng.random((b, m, t)) < 0.3
    mask[:, :TILE, TILE : 2 * TILE] = False  # a tile that is left out
    mask[:, TILE + 5] = False  # a row that selects nothing
    taken = mask.reshape(b, m // TILE, TILE, t // TILE, TILE).any((2, 4)).astype(np.int32)
    delta = rng.normal(size=(b, m)).astype(np.float32)

    exact_q, exact_kv, exact_grad = (x.astype(np.float64) for x in (q, kv, grad))
    weights = np.where(mask, np.exp(exact_q @ exact_kv.swapaxes(1, 2) * SCALE), 0)
    sums = weights.sum(-1, keepdims=True)
    p = weights / np.where(sums > 0, sums, 1)
    ds = p * (exact_grad @ exact_kv.swapaxes(1, 2) - delta[..., None]) * SCALE
    lse = np.log(np.where(sums > 0, sums, 1))[..., 0] / math.log(2)

    denominators = jax.jit(functools.partial(kernels._denominators, scale=SCALE, interpret=None))
    given = jax.device_put((q, kv, words_of(mask), taken))
    found, again = (np.asarray(denominators(*given)) for _ in range(2))
    np.testing.assert_array_equal(found, again)
    np.testing.assert_allclose(found, lse, atol=1e-4)

    pairs = jax.jit(functools.partial(kernels._pairs, scale=SCALE, interpret=None))
    given = jax.device_put((q, kv, grad, words_of(mask), taken, lse.astype(np.float32), delta))
    for one, same, exact in zip(pairs(*given), pairs(*given), (p, ds), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(same))
        assert not np.asarray(one)[~mask].any()
        assert relative_error(one, exact) < 5e-3
