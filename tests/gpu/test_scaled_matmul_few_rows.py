"""Few rows times a matrix in 8 bits on a Hopper GPU: against the product with the decoded numbers, and repeated."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper, quant
from pallas_kernels.scaled_matmul import mosaic_gpu_few_rows as few_rows

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))


@pytest.mark.parametrize("outputs,width", [(5120, 768), (2048, 5120), (200, 1152)])
@pytest.mark.parametrize("rows", [1, 8, 11, 16])
def test_few_rows_equal_the_product_of_the_decoded_numbers_and_each_other_bit_for_bit(rows, outputs, width):
    keys = jax.random.split(jax.random.key(rows), 2)
    matrix = quant.quantise_matrix(jax.random.normal(keys[0], (outputs, width)))
    x = jax.random.normal(keys[1], (rows, width), jnp.bfloat16)
    ours = few_rows.few_rows(x, matrix)
    assert (few_rows.few_rows(x, matrix) == ours).all()
    exact = jnp.dot(x.astype(jnp.float32), quant.dequantise(matrix, jnp.float32).T, precision="highest")
    assert jnp.abs(ours.astype(jnp.float32) - exact).max() <= 2.0**-8 * jnp.abs(exact).max()


@pytest.mark.parametrize("cluster", list(few_rows.CLUSTERS))
def test_every_size_of_clusters_gives_the_product(cluster):
    matrix = quant.quantise_matrix(jax.random.normal(jax.random.key(0), (384, 2176)))
    x = jax.random.normal(jax.random.key(1), (13, 2176), jnp.bfloat16)
    ours = few_rows.multiply(x, matrix, few_rows.Split(13, 384, 2176, cluster))
    exact = jnp.dot(x.astype(jnp.float32), quant.dequantise(matrix, jnp.float32).T, precision="highest")
    assert jnp.abs(ours.astype(jnp.float32) - exact).max() <= 2.0**-8 * jnp.abs(exact).max()


@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_extreme_codes_and_rows_keep_their_products(scale):
    matrix = quant.Scaled(jnp.full((256, 512), 448, jnp.float8_e4m3fn), jnp.full((2, 4), scale, jnp.float32))
    x = jnp.full((3, 512), 1e4, jnp.bfloat16).at[1].set(1e-6)
    exact = x.astype(jnp.float32) @ quant.dequantise(matrix, jnp.float32).T
    ours = few_rows.few_rows(x, matrix).astype(jnp.float32)
    assert (jnp.abs(ours - exact) <= 2.0**-8 * exact).all()
