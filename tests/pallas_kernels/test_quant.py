"""Vectors in 8 bits and their scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant


def test_quantised_vectors_have_power_of_two_scales_and_small_errors():
    x = jax.random.normal(jax.random.key(0), (50, 128)) * jnp.logspace(-6, 4, 50)[:, None]
    values, scales = quant.quantise_index(x)
    assert values.dtype == jnp.float8_e4m3fn and scales.dtype == jnp.float32
    assert np.all(np.log2(scales) % 1 == 0)
    largest = np.maximum(np.abs(x).max(-1), 1e-4)
    assert np.all(scales * 448 >= largest) and np.all(scales * 224 < largest)
    restored = values.astype(jnp.float32) * scales[:, None]
    assert np.all(np.abs(restored - x) <= np.maximum(np.abs(x) / 16, scales[:, None] * 2.0**-10))


def test_quantised_powers_of_two_are_exact():
    values, scales = quant.quantise_index(jnp.array([[448.0, 7.0], [0.0, 0.0], [3.5, -1.75]]))
    np.testing.assert_array_equal(scales, [1, 2.0**-22, 2.0**-7])
    np.testing.assert_array_equal(values.astype(jnp.float32), [[448, 7], [0, 0], [448, -224]])


def test_what_is_not_finite_gets_no_scale():
    _, scales = quant.quantise_index(jnp.array([[1.0, jnp.nan], [jnp.inf, 1.0], [1.0, 1.0]]))
    assert np.isnan(scales).tolist() == [True, True, False]


def test_rotation_keeps_products_and_spreads_outliers():
    q, k = jax.random.normal(jax.random.key(1), (2, 64))
    matrix = quant.hadamard(64)
    np.testing.assert_allclose((q @ matrix) @ (k @ matrix), q @ k, rtol=1e-4)
    outlier = jnp.zeros((64,)).at[5].set(10.0)
    values, scale = quant.quantise_index(outlier, rotate=True)
    np.testing.assert_allclose(np.abs(values.astype(jnp.float32) * scale), 1.25, rtol=0.07)


def test_widths_that_cannot_be_quantised():
    with pytest.raises(ValueError, match="129"):
        quant.quantise_index(jnp.ones((129,)))
    with pytest.raises(ValueError, match="96"):
        quant.quantise_index(jnp.ones((96,)), rotate=True)


def test_int8_vectors_and_their_scales():
    x = jax.random.normal(jax.random.key(0), (50, 128)) * jnp.logspace(-6, 4, 50)[:, None]
    values, scales = quant.quantise_int8(x)
    assert values.dtype == jnp.int8 and scales.dtype == jnp.float32
    assert np.all(np.abs(values.astype(jnp.float32) * scales[:, None] - x) <= 0.501 * scales[:, None])
    assert np.isnan(quant.quantise_int8(jnp.array([[1.0, jnp.nan], [1.0, jnp.inf]]))[1]).all()


def test_latents_of_zeros_have_a_scale():
    small = quant.quantise_latents(jnp.zeros((1, 2, 24)), 16)
    assert np.all(np.asarray(small.scales) > 0) and not np.any(quant.dequantise_latents(small, jnp.float32))
