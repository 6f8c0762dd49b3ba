"""Rows in 8 bits on a GPU: the kernels against the reference on the same device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, normalise_rows, quantise_index_queries, quantise_rows, quantise_swiglu
from pallas_kernels.quantised import reference
from tests.pallas_kernels.test_quantised import check_same, drawn

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu" or hopper.why_not() is not None, reason=str(hopper.why_not()))


@pytest.mark.parametrize("rows, width", [(1, 128), (300, 2048), (77, 7168), (4096, 640)])
def test_rows_are_those_of_the_reference_bit_for_bit(rows, width):
    x = drawn(rows, width).at[rows - 1, 5].set(jnp.nan)
    check_same(quantise_rows(x, implementation="mosaic_gpu"), jax.jit(reference.quantise_rows)(x))


@pytest.mark.parametrize("rows, width", [(1, 128), (300, 1536), (1000, 10240)])
def test_swiglu_is_that_of_the_reference(rows, width):
    x = drawn(rows, 2 * width) * jnp.asarray(1e-3, jnp.bfloat16)
    found, expected = quantise_swiglu(x, implementation="mosaic_gpu"), jax.jit(reference.quantise_swiglu)(x)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-5)
    assert np.mean(np.asarray(found.codes, np.float32) != np.asarray(expected.codes, np.float32)) < 1e-3


@pytest.mark.parametrize(
    "rows, of_row, width, dtype",
    [(300, 1344, 768, jnp.float32), (77, 2048, 2048, jnp.bfloat16), (1000, 7168, 7168, jnp.bfloat16)],
)
def test_normalised_rows_are_those_of_the_reference(rows, of_row, width, dtype):
    x, weight = drawn(rows, of_row, dtype), drawn(1, width, seed=2)[0]
    normalised, found = jax.jit(lambda *args: normalise_rows(*args, 1e-6, implementation="mosaic_gpu"))(x, weight)
    expected, _ = jax.jit(lambda *args: reference.normalise_rows(*args, 1e-6))(x, weight)
    np.testing.assert_allclose(normalised.astype(jnp.float32), expected.astype(jnp.float32), rtol=2.0**-6)
    check_same(found, jax.jit(reference.quantise_rows)(normalised))


@pytest.mark.parametrize("rows, heads", [(2, 1), (300, 32), (1000, 64)])
def test_index_queries_are_those_of_the_reference(rows, heads):
    product = drawn(rows, heads * 128).reshape(rows, heads, 128).at[-1, -1, 0].set(jnp.inf)
    angles = jnp.asarray(np.random.default_rng(rows).uniform(0, 6, (rows, 32)), jnp.float32)
    (codes, scales), (expected, exact) = (
        jax.jit(lambda *args, name=name: quantise_index_queries(*args, interleaved=True, implementation=name))(
            product, jnp.cos(angles), jnp.sin(angles)
        )
        for name in ("mosaic_gpu", "xla")
    )
    # A rotation's last bit, and what of it XLA rounds, may move a scale to the next power of two.
    same = np.asarray(scales == exact) | np.isnan(exact)
    assert same.mean() > 0.99 and np.isnan(scales[-1, -1])
    differ = np.asarray(codes, np.float32) != np.asarray(expected, np.float32)
    assert np.mean(differ[same & ~np.isnan(exact)]) < 0.01
