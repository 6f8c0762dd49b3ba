"""scaled_matmul: rows times a matrix in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, scaled_matmul
from pallas_kernels.quant import Scaled, quantise_matrix, quantise_rows
from pallas_kernels.scaled_matmul import mosaic_gpu
from tests.support.attention_cases import relative_error
from tests.support.grouped_cases import decoded


def inputs(m: int, k: int, n: int, dtype=jnp.float32) -> tuple[jax.Array, Scaled]:
    rng = np.random.default_rng(m + k + n)
    rows = jnp.asarray(rng.normal(size=(m, k)), dtype)
    return rows, quantise_matrix(jnp.asarray(rng.normal(size=(n, k)), jnp.float32))


@pytest.mark.parametrize("m, k, n", [(5, 128, 128), (1, 576, 200), (70, 100, 130)])
def test_equals_the_product_of_the_decoded_matrix(m, k, n):
    rows, matrix = inputs(m, k, n)
    out = jax.jit(scaled_matmul)(rows, matrix)
    assert out.dtype == rows.dtype
    assert relative_error(out, decoded(rows) @ decoded(matrix).T) < 1e-5


def test_results_have_the_dtype_of_the_rows_or_what_is_asked():
    rows, matrix = inputs(3, 200, 40)
    assert scaled_matmul(rows.astype(jnp.bfloat16), matrix).dtype == jnp.bfloat16
    assert scaled_matmul(rows.astype(jnp.bfloat16), matrix, dtype=jnp.float32).dtype == jnp.float32
    in_codes = quantise_rows(rows)
    assert scaled_matmul(in_codes, matrix).dtype == jnp.bfloat16
    out = scaled_matmul(in_codes, matrix, dtype=jnp.float32)
    assert relative_error(out, decoded(in_codes) @ decoded(matrix).T) < 1e-5


def test_extreme_scales_and_codes():
    rows, matrix = inputs(7, 256, 256)
    codes = jnp.where(matrix.codes.astype(jnp.float32) > 0, 448.0, -448.0).astype(jnp.float8_e4m3fn)
    matrix = Scaled(codes, jnp.asarray([[1e-30, 1e-31], [1e30, 1e28]], jnp.float32))
    out, expected = np.asarray(scaled_matmul(rows, matrix), np.float64), decoded(rows) @ decoded(matrix).T
    for columns in (slice(0, 128), slice(128, 256)):
        assert relative_error(out[:, columns], expected[:, columns]) < 1e-5


def test_a_row_that_is_not_finite_stays_alone():
    rows, matrix = inputs(4, 128, 40)
    out = np.asarray(scaled_matmul(quantise_rows(rows.at[1, 2].set(jnp.nan)), matrix), np.float32)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2, 3]]).all()


def test_rows_have_a_gradient_and_the_matrix_none():
    rows, matrix = inputs(4, 200, 40)

    def loss(rows, scales):
        return jnp.sum(scaled_matmul(rows, Scaled(matrix.codes, scales)) ** 2)

    found, of_scales = jax.grad(loss, (0, 1))(rows, matrix.scales)
    assert relative_error(found, 2 * decoded(rows) @ decoded(matrix).T @ decoded(matrix)) < 1e-5
    assert not np.asarray(of_scales).any()


def test_hoppers_backward_pass_is_right():
    rows, matrix = inputs(4, 200, 40)
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(4, 40)), jnp.float32)
    found, none = mosaic_gpu._backward(matrix, cotangent)
    assert none is None
    assert relative_error(found, decoded(cotangent) @ decoded(matrix)) < 1e-5
    with pytest.raises(NotImplementedError, match="no gradient"):
        mosaic_gpu._forward_and_keep(quantise_rows(rows), matrix)


def test_what_does_not_fit_is_named():
    _, matrix = inputs(1, 128, 40)
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(40, 128\)"):
        scaled_matmul(jnp.zeros((3, 4)), matrix)


def test_what_hoppers_kernel_does_not_take(monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    rows, matrix = inputs(8, 128, 64, jnp.bfloat16)
    assert mosaic_gpu.why_not(rows, matrix) is None
    assert "float32" in mosaic_gpu.why_not(rows, matrix, jnp.float32)
    assert "float32" in mosaic_gpu.why_not(rows.astype(jnp.float32), matrix)
    assert "576" not in str(mosaic_gpu.why_not(*inputs(8, 128, 576, jnp.bfloat16)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it may serve there")
def test_the_kernel_says_why_it_cannot_serve():
    with pytest.raises(NotImplementedError, match=r"scaled_matmul.*Hopper"):
        scaled_matmul(*inputs(8, 128, 64, jnp.bfloat16), implementation="mosaic_gpu")
