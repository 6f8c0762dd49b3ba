"""Rows in another order and weighted sums of rows on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gather_rows, hopper, quant, sum_rows
from pallas_kernels.permuted import reference

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu" or hopper.why_not() is not None, reason=str(hopper.why_not()))


@pytest.mark.parametrize("source, rows, width", [(7, 20, 128), (1000, 4000, 2048), (300, 1, 7168)])
def test_gathered_rows_are_those_of_the_reference(source, rows, width):
    x = quant.quantise_rows(jax.random.normal(jax.random.key(0), (source, width), jnp.bfloat16))
    index = jax.random.randint(jax.random.key(1), (rows,), 0, source)
    found, expected = gather_rows(x, index, implementation="mosaic_gpu"), gather_rows(x, index, implementation="xla")
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(*(np.asarray(one.codes, np.float32) for one in (found, expected)))


@pytest.mark.parametrize("tokens, k, width, others", [(1, 1, 128, 0), (500, 4, 2048, 2), (77, 8, 7168, 1)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_weighted_sums_and_their_gradients_are_those_of_the_reference(tokens, k, width, others, dtype):
    keys = jax.random.split(jax.random.key(tokens), 3 + others)
    rows = jax.random.normal(keys[0], (tokens * k, width), jnp.bfloat16)
    places = jax.random.permutation(keys[1], tokens * k).reshape(tokens, k)
    weights = jax.random.uniform(keys[2], (tokens, k))
    added = tuple(jax.random.normal(key, (tokens, width), jnp.bfloat16) for key in keys[3:])
    product = jax.jit(lambda *args: sum_rows(*args, dtype=dtype, implementation="mosaic_gpu"))
    found, expected = product(rows, places, weights, added), reference.sum_rows(rows, places, weights, added, dtype)
    tolerance = 2.0**-7 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=1e-5)

    def loss(rows, implementation):
        return jnp.sum(sum_rows(rows, places, weights, added, implementation=implementation) ** 2)

    ours, theirs = (jax.grad(loss)(rows, name).astype(jnp.float32) for name in ("mosaic_gpu", "xla"))
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=1e-3)
