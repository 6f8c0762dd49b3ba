"""Queries in 8 bits in the order of the scores' columns: the kernel for Hopper, run on NumPy, against plain JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.support.rows import run_program


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.parametrize("queries, heads, tile, multiple", [(18, 32, 4, 4), (5, 64, 2, 4), (5, 8, 1, 2), (4, 16, 4, 1)])
def test_the_kernel_orders_columns_as_plain_jax_and_finds_nan(monkeypatch, queries, heads, tile, multiple):
    from pallas_kernels.indexer_topk import mosaic_gpu_scores_columns, mosaic_gpu_scores_epilogue

    random = np.random.default_rng(heads)
    codes = random.integers(0, 256, (2, queries, heads, 128)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    holes = random.random((2, queries, heads)) < 0.3
    codes[*np.nonzero(holes), random.integers(0, 128, holes.sum())] = random.choice([0x7F, 0xFF], holes.sum())
    weights = random.standard_normal((2, queries, heads)).astype(np.float32)

    expected = mosaic_gpu_scores_epilogue.in_columns(jnp.asarray(codes), tile, multiple)
    is_nan = np.isnan(codes.view(ml_dtypes.float8_e4m3fn)).any(-1)
    np.testing.assert_array_equal(is_nan, holes)
    expected_weights = mosaic_gpu_scores_epilogue.in_columns(jnp.where(is_nan, jnp.nan, weights), tile, multiple)

    columns = expected.shape[1]
    program, blocks = mosaic_gpu_scores_columns.columns_program(2, queries, heads, tile, columns)
    outputs = [np.full(2 * columns * 32, -1, np.int32), np.full(2 * columns, -1, np.int32)]
    found, found_weights = run_program(monkeypatch, program, blocks, [codes, weights], outputs)
    np.testing.assert_array_equal(found.view(np.uint8).reshape(expected.shape), expected)
    np.testing.assert_array_equal(found_weights.view(np.float32).reshape(2, columns), expected_weights)
