"""Rows in 8 bits: the reference, and the kernels for Hopper run on NumPy against it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import normalise_rows, quant, quantise_index_queries, quantise_rows, quantise_swiglu
from pallas_kernels.quantised import reference
from tests.support.rows import run_program

interpreted = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


def drawn(rows: int, width: int, dtype=jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Rows of very different sizes, one of zeros, and codes that are ties."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, width)) * 10.0 ** random.uniform(-6, 6, (rows, 1))
    x[rows // 2] = 0
    x[0, : width // 2] = random.integers(-448, 449, width // 2) / 16
    return jnp.asarray(x, dtype)


def scaled(found: list[np.ndarray], rows: int, width: int) -> quant.Scaled:
    codes = found[0].view(ml_dtypes.float8_e4m3fn).reshape(rows, width)
    return quant.Scaled(codes, found[1].view(np.float32).reshape(-1, rows).T)


def check_same(found: quant.Scaled, expected: quant.Scaled) -> None:
    np.testing.assert_array_equal(found.scales, expected.scales)
    for x in (found.codes, expected.codes):
        assert x.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(*(np.asarray(x.codes, np.float32) for x in (found, expected)))


def emulated(monkeypatch, rows: jax.Array, width: int, name: str) -> quant.Scaled:
    from pallas_kernels.quantised import mosaic_gpu

    program, blocks = mosaic_gpu.groups_program(rows.shape[0], width, getattr(mosaic_gpu, name))
    outputs = [np.zeros(rows.shape[0] * width // 4, np.int32), np.zeros(rows.shape[0] * width // 128, np.int32)]
    return scaled(run_program(monkeypatch, program, blocks, [rows], outputs), rows.shape[0], width)


@interpreted
@pytest.mark.parametrize("rows, width", [(1, 128), (5, 384), (37, 256)])
def test_hoppers_rows_in_8_bits_are_those_of_the_reference_bit_for_bit(monkeypatch, rows, width):
    x = drawn(rows, width)
    check_same(emulated(monkeypatch, x, width, "_plain"), jax.jit(quant.quantise_rows)(x))


@interpreted
def test_a_group_that_is_not_finite_is_alone(monkeypatch):
    x = drawn(6, 256).at[1, 3].set(jnp.nan).at[4, 200].set(-jnp.inf)
    found, expected = emulated(monkeypatch, x, 256, "_plain"), quant.quantise_rows(x)
    check_same(found, expected)
    np.testing.assert_array_equal(np.argwhere(np.isnan(found.scales)), [[1, 0], [4, 1]])


@interpreted
def test_hoppers_swiglu_in_8_bits_is_that_of_the_reference(monkeypatch):
    x = drawn(9, 512, seed=1) * jnp.asarray(1e-3, jnp.bfloat16)
    found, expected = emulated(monkeypatch, x, 256, "_swiglu"), reference.quantise_swiglu(x)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-5)
    assert np.mean(np.asarray(found.codes, np.float32) != np.asarray(expected.codes, np.float32)) < 2e-3


@interpreted
@pytest.mark.parametrize(
    "width, of_row, dtype", [(128, 128, jnp.bfloat16), (640, 1344, jnp.float32), (3584, 3584, jnp.bfloat16)]
)
def test_hoppers_normalised_rows_are_those_of_the_reference(monkeypatch, width, of_row, dtype):
    from pallas_kernels.quantised import mosaic_gpu

    x, weight = drawn(9, of_row, dtype), drawn(1, width, seed=2)[0]
    program = mosaic_gpu.normalise_program(9, of_row, width, 1e-6, dtype == jnp.float32)
    outputs = [np.zeros(9 * width // n, np.int32) for n in (2, 4, 128)]
    normalised, *found = run_program(monkeypatch, program, 2, [x, weight], outputs)
    normalised = normalised.view(ml_dtypes.bfloat16).reshape(9, width)
    expected, _ = reference.normalise_rows(x, weight, 1e-6)
    np.testing.assert_allclose(np.asarray(normalised, np.float32), np.asarray(expected, np.float32), rtol=2.0**-7)
    assert np.mean(np.asarray(normalised) != np.asarray(expected)) < 0.01  # where a sum's last bit decides
    check_same(scaled(found, 9, width), quant.quantise_rows(jnp.asarray(normalised)))


@interpreted
@pytest.mark.parametrize("rows, heads, rotary", [(3, 5, 64), (40, 2, 32), (1, 1, 128)])
def test_hoppers_index_queries_are_those_of_the_reference(monkeypatch, rows, heads, rotary):
    from pallas_kernels.quantised import mosaic_gpu_index

    random = np.random.default_rng(rows)
    product = drawn(rows, heads * 128, seed=rows).at[-1, -1].set(jnp.inf)
    angles = random.uniform(0, 6, (rows, rotary // 2))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    outputs = [np.zeros(rows * heads * 32, np.int32), np.zeros(rows * heads, np.int32)]
    program, blocks = mosaic_gpu_index.index_program(rows, heads, rotary)
    codes, scales = run_program(monkeypatch, program, blocks, [product, cos, sin], outputs)
    product = product.reshape(rows, heads, 128)
    expected, exact = quantise_index_queries(product, cos, sin, interleaved=True)
    np.testing.assert_array_equal(scales.view(np.float32).reshape(rows, heads), exact)
    assert np.isnan(exact[-1, -1])
    found = codes.view(ml_dtypes.float8_e4m3fn).reshape(rows, heads, 128).astype(np.float32)
    # Where a rotated number is about halfway between two others, its last bit decides.
    assert np.mean((found != np.asarray(expected, np.float32)) & ~np.isnan(exact)[..., None]) < 0.01
    halves = quantise_index_queries(_halves_first(product, rotary), cos, sin, interleaved=False)[0]
    np.testing.assert_array_equal(_halves_first(expected.astype(jnp.float32), rotary), halves.astype(jnp.float32))


def _halves_first(x: jax.Array, rotary: int) -> jax.Array:
    """Every head's rotated numbers with the first of all pairs before the second ones."""
    return x[..., np.r_[np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, 128)]]


def test_rows_of_any_width_and_dtype_have_the_reference():
    x = drawn(3, 200, jnp.float32)
    found = quantise_rows(x)
    assert found.scales.shape == (3, 2) and found.codes.shape == (3, 200)
    restored = np.asarray(quant.dequantise(found, jnp.float32))
    largest = np.repeat(np.asarray(found.scales), 128, axis=1)[:, :200]
    assert (np.abs(restored - x) <= np.maximum(np.abs(x) / 16, largest * 2.0**-10) * 1.0001).all()
    gate, up = np.split(np.asarray(drawn(3, 256, jnp.float32, 3), np.float64), 2, axis=1)
    found = quant.dequantise(quantise_swiglu(jnp.asarray(np.concatenate([gate, up], 1), jnp.float32)), jnp.float32)
    exact = gate / (1 + np.exp(-gate)) * up
    assert (np.abs(found - exact) <= np.abs(exact) / 15.9 + np.abs(exact).max(1, keepdims=True) * 2.0**-18 + 1e-9).all()


def test_what_does_not_fit_is_named():
    x, weight = jnp.ones((2, 128), jnp.bfloat16), jnp.ones((128,), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"\(2, 3, 128\)"):
        quantise_rows(jnp.ones((2, 3, 128)))
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        quantise_swiglu(jnp.ones((2, 7)))
    with pytest.raises(ValueError, match=r"\(2, 3, 6\), \(2, 4\), \(2, 4\)"):
        quantise_index_queries(jnp.ones((2, 3, 6)), jnp.ones((2, 4)), jnp.ones((2, 4)), interleaved=True)
    with pytest.raises(ValueError, match="both False"):
        normalise_rows(x, weight, 1e-6, plain=False, in_8_bits=False)
    with pytest.raises(ValueError, match=r"got \(2, 64\) and \(128,\)"):
        normalise_rows(x[:, :64], weight, 1e-6)


@interpreted
def test_what_hoppers_kernels_do_not_take():
    from pallas_kernels.quantised import mosaic_gpu

    x, weight = jnp.ones((2, 256), jnp.bfloat16), jnp.ones((256,), jnp.bfloat16)
    assert mosaic_gpu.why_not(x) is None and mosaic_gpu.why_not_swiglu(x) is None
    assert mosaic_gpu.why_not_normalise(x, weight, 1e-6) is None
    assert "not float32" in mosaic_gpu.why_not(x.astype(jnp.float32))
    assert "[2, 192]" in mosaic_gpu.why_not(x[:, :192])
    assert "[2, 64]" in mosaic_gpu.why_not_swiglu(x[:, :128])
    assert "weight is in bfloat16" in mosaic_gpu.why_not_normalise(x, weight.astype(jnp.float32), 1e-6)
    wide = jnp.ones((1, 16384), jnp.bfloat16)
    assert "16384" in mosaic_gpu.why_not_normalise(wide, wide[0], 1e-6)
