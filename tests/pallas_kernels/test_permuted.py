"""Rows in another order and weighted sums of rows: the kernels for Hopper, run on NumPy, against the reference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import gather_rows, quant, sum_rows
from tests.support.rows import run_program

interpreted = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


@interpreted
@pytest.mark.parametrize("source, rows, width", [(7, 20, 128), (40, 33, 1152), (3, 1, 4224)])
def test_hoppers_gathered_rows_are_those_of_the_reference(monkeypatch, source, rows, width):
    from pallas_kernels.permuted import mosaic_gpu

    random = np.random.default_rng(rows)
    x = quant.quantise_rows(jnp.asarray(random.standard_normal((source, width)), jnp.bfloat16))
    index = random.integers(0, source, rows).astype(np.int32)
    groups = width // 128
    program = mosaic_gpu.gather_program(source, rows, width, groups)
    outputs = [np.zeros(rows * width // 4, np.int32), np.zeros(rows * groups, np.int32)]
    codes, scales = run_program(monkeypatch, program, -(-rows // 16), [index, x.codes, x.scales.T], outputs)
    expected = gather_rows(x, index)
    np.testing.assert_array_equal(codes.view(np.uint8).reshape(rows, width), np.asarray(expected.codes).view(np.uint8))
    np.testing.assert_array_equal(scales.view(np.float32).reshape(groups, rows).T, expected.scales)


@interpreted
@pytest.mark.parametrize("tokens, k, width, others, dtype", [(5, 4, 256, 2, jnp.bfloat16), (9, 8, 1032, 0, jnp.float32)])
def test_hoppers_weighted_sums_are_those_of_the_reference(monkeypatch, tokens, k, width, others, dtype):
    from pallas_kernels.permuted import mosaic_gpu

    random = np.random.default_rng(width)
    rows = jnp.asarray(random.standard_normal((30, width)), jnp.bfloat16)
    places = random.integers(0, 30, (tokens, k)).astype(np.int32)
    weights = random.uniform(0, 2, (tokens, k)).astype(np.float32)
    added = tuple(jnp.asarray(random.standard_normal((tokens, width)), jnp.bfloat16) for _ in range(others))
    program, blocks = mosaic_gpu.sum_program(tokens, k, width, others, dtype == jnp.float32)
    outputs = [np.zeros(tokens * width * jnp.dtype(dtype).itemsize // 4, np.int32)]
    (out,) = run_program(monkeypatch, program, blocks, [places, weights, rows, *added], outputs)
    out = out.view(ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else np.float32).reshape(tokens, width)
    expected = np.asarray(sum_rows(rows, places, weights, added, dtype=dtype), np.float32)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, rtol=2.0**-7 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
    )


def test_sums_are_those_of_numpy_and_have_gradients():
    random = np.random.default_rng(0)
    rows, added = (jnp.asarray(random.standard_normal((n, 12)), jnp.float32) for n in (9, 4))
    places, weights = random.integers(0, 9, (4, 3)), jnp.asarray(random.standard_normal((4, 3)), jnp.float32)
    expected = np.einsum("nkd,nk->nd", np.asarray(rows)[places], weights) + np.asarray(added)
    np.testing.assert_allclose(sum_rows(rows, jnp.asarray(places), weights, (added,)), expected, rtol=1e-5, atol=1e-6)
    found = jax.grad(lambda rows: jnp.sum(sum_rows(rows, jnp.asarray(places), weights)))(rows)
    of_row = np.zeros(9)
    np.add.at(of_row, places, weights)
    np.testing.assert_allclose(found, np.repeat(of_row[:, None], 12, axis=1), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named():
    rows = jnp.ones((4, 8))
    with pytest.raises(ValueError, match=r"\(4, 8\), \(2, 2\)"):
        gather_rows(rows, jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"\(3, 2\), \(3, 1\)"):
        sum_rows(rows, jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"\(5, 8\)"):
        sum_rows(rows, jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2)), (jnp.ones((5, 8)),))


@interpreted
def test_what_hoppers_kernels_do_not_take():
    from pallas_kernels.permuted import mosaic_gpu

    x, index = quant.quantise_rows(jnp.ones((4, 128))), jnp.zeros((3,), jnp.int32)
    assert mosaic_gpu.why_not(x, index) is None
    assert "in 8 bits" in mosaic_gpu.why_not(jnp.ones((4, 128)), index)
    assert "they have 120" in mosaic_gpu.why_not(quant.Scaled(x.codes[:, :120], x.scales), index)
    places, weights = jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 2))
    assert mosaic_gpu.why_not_sum(jnp.ones((4, 128), jnp.bfloat16), places, weights) is None
    assert "in bfloat16" in mosaic_gpu.why_not_sum(jnp.ones((4, 128)), places, weights)
    assert "they have 12" in mosaic_gpu.why_not_sum(jnp.ones((4, 12), jnp.bfloat16), places, weights)
