"""The TPU kernel that multiplies by matrices in 8 bits, interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, grouped_matmul, grouped_mlp, grouped_swiglu, scaled_matmul
from pallas_kernels.grouped_matmul import api, mosaic_tpu_codes
from pallas_kernels.quant import Scaled, quantise_rows
from pallas_kernels.scaled_matmul import api as scaled_api
from tests.support.attention_cases import relative_error
from tests.support.grouped_cases import (
    MANY_ROWS,
    SIZES,
    decoded,
    numpy_scaled_products,
    numpy_scaled_swiglu,
    scaled_inputs,
    scaled_swiglu_inputs,
)
from tests.support.tpu_interpreter import interpreted


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of rows, columns and depth in small arrays."""
    monkeypatch.setattr(mosaic_tpu_codes, "TILE_ROWS", 64)
    monkeypatch.setattr(mosaic_tpu_codes, "TILE_COLUMNS", 128)
    monkeypatch.setattr(mosaic_tpu_codes, "TILE_DEPTH", 128)


@pytest.mark.parametrize("sizes", [*SIZES.values(), MANY_ROWS["short at the end"]], ids=[*SIZES, "short at the end"])
def test_equals_the_product_of_the_decoded_matrices(sizes, small_tiles):
    rows, matrices, group_sizes = scaled_inputs(sizes, 256, 140, jnp.float32)
    with interpreted():
        out = grouped_matmul(rows, matrices, group_sizes)
    assert out.dtype == jnp.float32
    assert relative_error(out, numpy_scaled_products(rows, matrices, sizes)) < 1e-5


@pytest.mark.parametrize("sizes", [*SIZES.values(), *MANY_ROWS.values()])
def test_every_tile_visits_the_groups_that_have_rows_in_it_in_turn(sizes):
    tile, rows = 64, sum(sizes)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    expected = sorted({(row // tile, group) for row, group in enumerate(groups)})
    tiles, found, count = mosaic_tpu_codes.visits(jnp.asarray(sizes), rows, tile)
    listed = list(zip(tiles.tolist(), found.tolist(), strict=True))
    assert listed[: int(count[0])] == expected
    assert set(listed[int(count[0]) :]) <= {expected[-1]}, "further visits read nothing new"


def test_rows_after_the_last_group_change_nothing(small_tiles):
    sizes = [3, 0, 70]
    rows, matrices, group_sizes = scaled_inputs(sizes, 128, 130, jnp.float32)
    with interpreted():
        out = grouped_matmul(jnp.pad(rows, ((0, 100), (0, 0))), matrices, group_sizes)
        nothing = grouped_matmul(rows, matrices, jnp.zeros_like(group_sizes))
    assert relative_error(out[:73], numpy_scaled_products(rows, matrices, sizes)) < 1e-5
    assert nothing.shape == out[:73].shape


def test_rows_may_be_in_8_bits_too():
    rows, matrices, group_sizes = scaled_inputs(SIZES["ragged"], 256, 140)
    rows = quantise_rows(rows)
    with interpreted():
        out = grouped_matmul(rows, matrices, group_sizes)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, numpy_scaled_products(rows, matrices, SIZES["ragged"])) < 5e-3


def test_extreme_scales_codes_and_rows():
    rows, matrices, group_sizes = scaled_inputs(SIZES["ragged"], 256, 130, jnp.float32)
    scales = matrices.scales.at[:, 0, 0].set(1e-30).at[:, 0, 1].set(1e-28).at[:, 1].set(1e25)
    codes = jnp.where(matrices.codes.astype(jnp.float32) > 0, 448.0, -448.0).astype(jnp.float8_e4m3fn)
    matrices = Scaled(codes.at[0, 0, 0].set(2.0**-9), scales)  # the smallest code
    with interpreted():
        out = np.asarray(grouped_matmul(rows, matrices, group_sizes))
        beside_nan = np.asarray(grouped_matmul(rows.at[3, 5].set(jnp.nan), matrices, group_sizes))
    expected = numpy_scaled_products(rows, matrices, SIZES["ragged"])
    for columns in (slice(0, 128), slice(128, None)):
        assert relative_error(out[:, columns], expected[:, columns]) < 1e-5
    assert np.isnan(beside_nan[3]).all() and np.isfinite(np.delete(beside_nan, 3, axis=0)).all()


def test_scales_of_checkpoints():
    rows, matrices, group_sizes = scaled_inputs(SIZES["even"], 256, 140, jnp.float32)
    powers = jnp.exp2(jnp.round(jnp.log2(matrices.scales)))
    stored = (jax.lax.bitcast_convert_type(powers, jnp.int32) >> 23).astype(jnp.uint8)
    expected = numpy_scaled_products(rows, Scaled(matrices.codes, powers), SIZES["even"])
    for kind in (powers.astype(jnp.bfloat16), stored):
        with interpreted():
            out = grouped_matmul(rows, Scaled(matrices.codes, kind), group_sizes)
        assert relative_error(out, expected) < 1e-5


def test_a_swiglu_layer_equals_numpy(small_tiles):
    sizes = SIZES["ragged"]
    rows, gate_up, group_sizes = scaled_swiglu_inputs(sizes, 256, 128, jnp.float32)
    down = scaled_inputs(sizes, 128, 140)[1]
    with interpreted():
        hidden = grouped_swiglu(rows, gate_up, group_sizes)
        out = grouped_mlp(rows, gate_up, down, group_sizes)
    expected = numpy_scaled_swiglu(rows, gate_up, sizes)
    assert relative_error(hidden, expected) < 1e-5
    assert relative_error(out, numpy_scaled_products(expected, down, sizes)) < 1e-5


def test_the_gradient_of_rows_is_that_of_the_decoded_product_and_matrices_have_none():
    sizes = SIZES["single rows"]
    rows, gate_up, group_sizes = scaled_swiglu_inputs(sizes, 128, 128, jnp.float32)
    down = scaled_inputs(sizes, 128, 40)[1]

    def loss(rows, scales, implementation=None):
        hidden = grouped_swiglu(rows, Scaled(gate_up.codes, scales), group_sizes, implementation=implementation)
        return jnp.sum(grouped_matmul(hidden, down, group_sizes, implementation=implementation) ** 2)

    with interpreted():
        found, of_scales = jax.grad(loss, (0, 1))(rows, gate_up.scales)
    assert relative_error(found, jax.grad(loss)(rows, gate_up.scales, "xla")) < 1e-5
    assert not np.asarray(of_scales).any()


@pytest.mark.parametrize("m, k, n", [(1, 384, 576), (70, 128, 130)])
def test_a_single_matrix(m, k, n, small_tiles):
    rows, matrices, _ = scaled_inputs([m], k, n)
    matrix = jax.tree.map(lambda x: x[0], matrices)
    with interpreted():
        out, wide = (scaled_matmul(rows, matrix, dtype=dtype) for dtype in (None, jnp.float32))
    assert (out.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    # Matrices are decoded to the dtype of the rows.
    assert relative_error(wide, decoded(rows) @ decoded(matrix).T) < 5e-3
    assert relative_error(out, wide) < 5e-3


def test_what_it_does_not_take():
    rows, matrices, sizes = scaled_inputs([4, 4], 256, 140)
    single = jax.tree.map(lambda x: x[0], matrices)
    assert "needs a TPU" in mosaic_tpu_codes.why_not(rows, matrices, sizes)
    with interpreted():
        assert dispatch.best(api.CODES_BACKENDS, rows, matrices, sizes) == "mosaic_tpu"
        assert dispatch.best(scaled_api.BACKENDS, rows, single, dtype=jnp.float32) == "mosaic_tpu"
        assert "no rows" in mosaic_tpu_codes.why_not(rows[:0], matrices, sizes)
        assert "K = 200 is not a multiple" in mosaic_tpu_codes.why_not(*scaled_inputs([4, 4], 200, 140))
        by_row = Scaled(matrices.codes, jnp.repeat(matrices.scales, 128, axis=1)[:, :140])
        assert "128 codes of a row" in mosaic_tpu_codes.why_not(rows, by_row, sizes)
