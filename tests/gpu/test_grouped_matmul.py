"""Every implementation of grouped_matmul that can serve, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_mlp, grouped_swiglu, hopper
from pallas_kernels.quant import Scaled, quantise_matrix, quantise_rows
from tests.support.attention_cases import relative_error
from tests.support.grouped_cases import (
    MANY_ROWS,
    SIZES,
    inputs,
    numpy_products,
    numpy_scaled_products,
    numpy_scaled_swiglu,
    numpy_swiglu,
    scaled_inputs,
)

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


LONG = [700, 3, 1291, 0, 640, 128]
FEW_SHAPES = {"long": LONG, **{name: MANY_ROWS[name] for name in ("short groups", "single row")}}  # each is compiled anew


@needs_hopper
@pytest.mark.parametrize("sizes", FEW_SHAPES.values(), ids=FEW_SHAPES)
@pytest.mark.parametrize("k, n", [(256, 512), (128, 576)])
def test_codes_by_codes_equal_numpy_and_themselves(sizes, k, n):
    rows, matrices, group_sizes = scaled_inputs(sizes, k, n)
    rows = quantise_rows(rows)
    product = jax.jit(lambda *args: grouped_matmul(*args, implementation="mosaic_gpu"))
    first = product(rows, matrices, group_sizes)
    assert relative_error(first, numpy_scaled_products(rows, matrices, sizes)) < 4e-3
    for _ in range(10):  # a race would differ
        assert jnp.array_equal(first, product(rows, matrices, group_sizes))


@needs_hopper
@pytest.mark.parametrize("sizes, width", [(LONG, 256), (MANY_ROWS["short groups"], 384), (MANY_ROWS["single row"], 256)])
def test_swiglu_and_mlp_in_8_bits_equal_numpy_and_themselves(sizes, width):
    k = 256
    rows, _, group_sizes = scaled_inputs(sizes, k, 1)
    rng = np.random.default_rng(width)
    gate_up = quantise_matrix(jnp.asarray(rng.normal(size=(len(sizes), 2, width, k)) / k**0.5, jnp.float32))
    down = quantise_matrix(jnp.asarray(rng.normal(size=(len(sizes), 320, width)), jnp.float32))
    rows = quantise_rows(rows)
    hidden = numpy_scaled_swiglu(rows, gate_up, sizes)
    out = jax.jit(lambda *args: grouped_swiglu(*args, implementation="mosaic_gpu"))(rows, gate_up, group_sizes)
    assert relative_error(out, hidden) < 4e-3
    mlp = jax.jit(lambda *args: grouped_mlp(*args, implementation="mosaic_gpu"))
    first = mlp(rows, gate_up, down, group_sizes)
    assert relative_error(first, numpy_scaled_products(hidden, down, sizes)) < 4e-2  # between the products 8 bits
    for _ in range(10):
        assert jnp.array_equal(first, mlp(rows, gate_up, down, group_sizes))


@needs_hopper
@pytest.mark.parametrize(
    "sizes, k, n", [([190, 3, 0, 130], 256, 192), (SIZES["ragged"], 128, 320), (SIZES["decode"], 256, 192)]
)
def test_codes_by_few_rows_equal_numpy_and_themselves(sizes, k, n):
    rows, matrices, group_sizes = scaled_inputs(sizes * 3, k, n)
    product = jax.jit(lambda *args: grouped_matmul(*args, implementation="mosaic_gpu"))
    first = product(rows, matrices, group_sizes)
    assert relative_error(first, numpy_scaled_products(rows, matrices, sizes * 3)) < 4e-3
    for _ in range(10):
        assert jnp.array_equal(first, product(rows, matrices, group_sizes))


@needs_hopper
@pytest.mark.parametrize("sizes", [MANY_ROWS["ragged"], SIZES["ragged"]], ids=["many rows", "few rows"])
def test_extreme_codes_and_rows_that_are_not_finite(sizes):
    rows, matrices, group_sizes = scaled_inputs(sizes, 256, 128)
    codes = jnp.where(matrices.codes.astype(jnp.float32) > 0, 448.0, -448.0).astype(jnp.float8_e4m3fn)
    matrices = Scaled(codes, jnp.full_like(matrices.scales, 1e-30).at[1].set(1e30))
    rows = quantise_rows(rows.at[3, 5].set(jnp.nan).at[30, 8].set(jnp.inf))
    out = np.asarray(grouped_matmul(rows, matrices, group_sizes, implementation="mosaic_gpu"), np.float64)
    expected = numpy_scaled_products(rows, matrices, sizes)
    assert np.isnan(out[[3, 30]]).all()
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for group in (groups == 1, groups != 1):
        kept = group & ~np.isin(np.arange(len(groups)), [3, 30])
        if kept.any():
            assert relative_error(out[kept], expected[kept]) < 5e-3


@needs_hopper
@pytest.mark.parametrize("sizes", [MANY_ROWS["ragged"], SIZES["ragged"]], ids=["many rows", "few rows"])
def test_rows_have_a_gradient_with_matrices_in_8_bits(sizes):
    rows, matrices, group_sizes = scaled_inputs(sizes, 128, 128)

    def loss(rows):
        return jnp.sum(grouped_matmul(rows, matrices, group_sizes, implementation="mosaic_gpu").astype(jnp.float32))

    expected = numpy_scaled_products(
        np.ones((sum(sizes), 128)), Scaled(jnp.swapaxes(matrices.codes, 1, 2), matrices.scales), sizes
    )
    assert relative_error(jax.grad(loss)(rows), expected) < 1e-2
