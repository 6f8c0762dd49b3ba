"""scaled_matmul on a GPU: many and few rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, scaled_matmul
from pallas_kernels.quant import Scaled, quantise_matrix, quantise_rows
from tests.support.attention_cases import relative_error
from tests.support.grouped_cases import decoded

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
needs_hopper = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))
implementations = pytest.mark.parametrize("implementation", [pytest.param("mosaic_gpu", marks=needs_hopper), "xla", None])


def inputs(m: int, k: int, n: int) -> tuple[jax.Array, Scaled]:
    rng = np.random.default_rng(m + k + n)
    rows = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    return rows, quantise_matrix(jnp.asarray(rng.normal(size=(n, k)), jnp.float32))


@implementations
@pytest.mark.parametrize("m, k, n", [(1, 256, 192), (17, 512, 576), (130, 384, 512), (700, 256, 576)])
def test_equals_the_product_of_the_decoded_matrix(implementation, m, k, n):
    rows, matrix = inputs(m, k, n)
    product = jax.jit(scaled_matmul, static_argnames="implementation")
    out = product(quantise_rows(rows), matrix, implementation=implementation)
    assert relative_error(out, decoded(quantise_rows(rows)) @ decoded(matrix).T) < 5e-3
    out = product(rows, matrix, implementation=implementation)
    assert relative_error(out, decoded(rows) @ decoded(matrix).T) < 4e-2  # many rows are quantised
    assert jnp.array_equal(out, product(rows, matrix, implementation=implementation))


@needs_hopper
@pytest.mark.parametrize("m", [3, 200])
def test_extreme_scales_codes_and_rows_that_are_not_finite(m):
    rows, matrix = inputs(m, 256, 256)
    codes = jnp.where(matrix.codes.astype(jnp.float32) > 0, 448.0, -448.0).astype(jnp.float8_e4m3fn)
    matrix = Scaled(codes, jnp.asarray([[1e-30, 1e-31], [1e30, 1e28]], jnp.float32))
    rows = rows.at[1, 7].set(jnp.nan).at[2, 9].set(jnp.inf)
    out = np.asarray(scaled_matmul(quantise_rows(rows), matrix, implementation="mosaic_gpu"), np.float64)
    expected = decoded(quantise_rows(rows)) @ decoded(matrix).T
    assert np.isnan(out[1:3]).all()
    finite = np.delete(np.arange(m), [1, 2])
    for columns in (slice(0, 128), slice(128, 256)):
        assert relative_error(out[finite, columns], expected[finite, columns]) < 5e-3


@needs_hopper
def test_rows_have_a_gradient():
    rows, matrix = inputs(200, 256, 128)
    found = jax.grad(lambda rows: jnp.sum(scaled_matmul(rows, matrix, implementation="mosaic_gpu").astype(jnp.float32)))(rows)
    assert relative_error(found, np.ones((200, 128)) @ decoded(matrix)) < 1e-2
