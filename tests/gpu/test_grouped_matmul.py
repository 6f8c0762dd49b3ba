"""Every implementation of grouped_matmul that can serve, on a GPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import grouped_matmul, grouped_swiglu, hopper
from tests.support.attention_cases import relative_error
from tests.support.grouped_cases import MANY_ROWS, SIZES, inputs, numpy_products, numpy_swiglu

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
needs_hopper = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))
implementations = pytest.mark.parametrize(
    "implementation", [pytest.param("mosaic_gpu", marks=needs_hopper), "ragged_dot", "xla", None]
)


@implementations
@pytest.mark.parametrize("sizes", [*SIZES.values(), [500, 3, 0, 260]], ids=[*SIZES, "long"])
@pytest.mark.parametrize("k, n", [(128, 192), (64, 320)])
def test_equals_numpy(implementation, sizes, k, n):
    rows, matrices, group_sizes = inputs(sizes, k, n)
    out = jax.jit(grouped_matmul, static_argnames="implementation")(rows, matrices, group_sizes, implementation=implementation)
    assert relative_error(out, numpy_products(rows, matrices, sizes)) < 4e-3


@needs_hopper
def test_sizes_that_the_kernel_does_not_take_are_named():
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        grouped_matmul(*inputs([4, 4], 32, 64), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="float32"):
        grouped_matmul(*inputs([4, 4], 64, 64, jnp.float32), implementation="mosaic_gpu")


@needs_hopper
@pytest.mark.parametrize("sizes", [*MANY_ROWS.values(), [700, 3, 1291, 0, 640, 128]], ids=[*MANY_ROWS, "long"])
@pytest.mark.parametrize("k, width", [(128, 256), (512, 192), (64, 320)])
def test_kernel_for_many_rows_equals_numpy_and_itself(sizes, k, width):
    rows, matrices, group_sizes = inputs(sizes, k, 2 * width)
    product = jax.jit(lambda *args: grouped_matmul(*args, implementation="mosaic_gpu"))
    expected = numpy_products(rows, matrices, sizes)
    first = product(rows, matrices, group_sizes)
    assert relative_error(first, expected) < 4e-3
    for _ in range(10):  # a race would differ
        assert jnp.array_equal(first, product(rows, matrices, group_sizes))
    gate_up = matrices.reshape(len(sizes), k, 2, width)
    out = jax.jit(lambda *args: grouped_swiglu(*args, implementation="mosaic_gpu"))(rows, gate_up, group_sizes)
    assert relative_error(out, numpy_swiglu(rows, gate_up, sizes)) < 4e-3


@needs_hopper
def test_swiglu_has_the_gradient_of_its_parts():
    rows, matrices, group_sizes = inputs(MANY_ROWS["ragged"], 64, 256)
    gate_up = matrices.reshape(matrices.shape[0], 64, 2, 128) / 8

    def loss(r, m, implementation):
        return jnp.sum(grouped_swiglu(r, m, group_sizes, implementation=implementation).astype(jnp.float32))

    found, expected = (jax.grad(loss, (0, 1))(rows, gate_up, name) for name in ("mosaic_gpu", "unfused"))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-2


@implementations
def test_has_a_gradient(implementation):
    rows, matrices, group_sizes = inputs(SIZES["ragged"], 64, 64)

    def loss(r, m):
        return jnp.sum(grouped_matmul(r, m, group_sizes, implementation=implementation).astype(jnp.float32))

    expected = jax.grad(lambda r, m: jnp.sum(jax.lax.ragged_dot(r, m, group_sizes).astype(jnp.float32)), (0, 1))(rows, matrices)
    for one, other in zip(jax.grad(loss, (0, 1))(rows, matrices), expected, strict=True):
        assert relative_error(one, other) < 1e-2
