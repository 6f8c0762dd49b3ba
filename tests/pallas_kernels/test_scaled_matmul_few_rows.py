"""Few rows times a matrix in 8 bits: the kernel for Hopper, run on NumPy, against the product with the decoded numbers."""

import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import hopper, quant
from pallas_kernels.scaled_matmul import mosaic_gpu_few_rows as few_rows
from tests.support.emulated import lockstep


def emulated(monkeypatch, rows, matrix, cluster):
    """[M, N] as the kernel with clusters of that many blocks computes it."""
    split = few_rows.Split(rows.shape[0], *matrix.shape, cluster)

    def words(x):
        flat = np.asarray(x).view(np.uint8).reshape(-1)
        return np.pad(flat, (0, -flat.size % 4)).view(np.int32).copy()

    out = np.zeros((split.rows, split.outputs), ml_dtypes.bfloat16)
    arrays = {"rows": words(rows), "codes": words(matrix.codes), "scales": words(quant.float_scales(matrix.scales))}
    arrays["out"] = words(out)

    def stages(a, block, shared):
        tile, rank = block // cluster, block % cluster
        parts = few_rows.stages(few_rows.Block(split, a["rows"], a["codes"], a["scales"], a["out"], shared, tile, rank))
        return [types.SimpleNamespace(begin=lambda: None, prefetches=(), run=part) for part in parts]

    blocks = split.tiles * cluster
    lockstep.run_grid(monkeypatch, arrays, blocks, few_rows.THREADS, split.shared_bytes, stages, cluster)
    return arrays["out"].view(ml_dtypes.bfloat16)[: out.size].reshape(out.shape)


def check(ours, rows, matrix):
    decoded, numbers = np.asarray(quant.dequantise(matrix, jnp.float32), np.float64), np.asarray(rows, np.float64)
    exact = numbers @ decoded.T
    sizes = np.abs(numbers) @ np.abs(decoded).T
    assert (np.abs(ours.astype(np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 1e-5 * sizes).all()


@pytest.mark.parametrize(
    "rows,outputs,width,cluster",
    [(1, 128, 128, 1), (3, 200, 384, 2), (8, 256, 640, 4), (15, 136, 1152, 8), (16, 130, 640, 4)],
)
def test_few_rows_times_a_matrix_are_the_product_of_the_decoded_numbers(monkeypatch, rows, outputs, width, cluster):
    """Some blocks of a cluster have fewer pieces of K than others, or none."""
    random = np.random.default_rng(rows)
    matrix = quant.quantise_matrix(jnp.asarray(random.standard_normal((outputs, width)), jnp.float32))
    x = jnp.asarray(random.standard_normal((rows, width)), jnp.bfloat16)
    check(emulated(monkeypatch, x, matrix, cluster), x, matrix)


def test_rows_that_do_not_fit_shared_memory_come_in_phases(monkeypatch):
    monkeypatch.setattr(few_rows, "PIECES_IN_FLIGHT", 2)
    monkeypatch.setattr(few_rows, "SHARED_BYTES", 52 << 10)
    assert few_rows.Split(16, 128, 1152, 2).phase == 2
    random = np.random.default_rng(0)
    matrix = quant.quantise_matrix(jnp.asarray(random.standard_normal((128, 1152)), jnp.float32))
    x = jnp.asarray(random.standard_normal((16, 1152)), jnp.bfloat16)
    check(emulated(monkeypatch, x, matrix, 2), x, matrix)


def test_codes_scales_and_rows_of_very_different_sizes(monkeypatch):
    random = np.random.default_rng(1)
    codes = random.integers(0, 127, (128, 512)).astype(np.uint8) | random.integers(0, 2, (128, 512)).astype(np.uint8) << 7
    scales = jnp.asarray(10.0 ** random.uniform(-30, 3, (1, 4)), jnp.float32)
    matrix = quant.Scaled(jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), scales)
    x = jnp.asarray(random.standard_normal((5, 512)) * 10.0 ** random.uniform(-4, 6, (5, 512)), jnp.bfloat16)
    check(emulated(monkeypatch, x, matrix, 2), x, matrix)


@pytest.mark.parametrize("scale", [1e-30, 1e3])
def test_extreme_codes_and_scales_keep_the_products_of_small_rows(monkeypatch, scale):
    matrix = quant.Scaled(jnp.full((16, 256), 448, jnp.float8_e4m3fn), jnp.full((1, 2), scale, jnp.float32))
    x = jnp.full((2, 256), 1e4, jnp.bfloat16).at[1].set(1e-6)
    check(emulated(monkeypatch, x, matrix, 1), x, matrix)


def test_a_row_that_is_not_finite_leaves_the_others_alone(monkeypatch):
    matrix = quant.quantise_matrix(jnp.ones((8, 256)))
    x = jnp.ones((3, 256), jnp.bfloat16).at[1, 5].set(jnp.nan)
    ours = emulated(monkeypatch, x, matrix, 2).astype(np.float32)
    assert np.isnan(ours[1]).all() and np.isfinite(ours[[0, 2]]).all()


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("outputs,width", [(5120, 768), (5120, 2048), (2048, 5120), (2048, 1536), (6144, 16384)])
def test_every_split_fits_an_sm_and_the_chosen_one_is_the_fastest(rows, outputs, width):
    splits = [few_rows.Split(rows, outputs, width, cluster) for cluster in few_rows.CLUSTERS]
    for split in splits:
        assert split.phase >= 1 and split.shared_bytes <= few_rows.SHARED_BYTES
        assert split.cluster * split.pieces >= split.all_pieces and split.tiles * few_rows.TILE >= outputs
    assert few_rows.split_of(rows, outputs, width).time == min(split.time for split in splits)


def test_what_the_kernel_does_not_serve(monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    matrix, x = quant.quantise_matrix(jnp.ones((256, 256))), jnp.ones((8, 256), jnp.bfloat16)
    assert few_rows.why_not(x, matrix) is None
    assert few_rows.why_not(jnp.ones((17, 256), jnp.bfloat16), matrix) == "it takes 1 to 16 rows, not 17"
    assert few_rows.why_not(x, quant.quantise_rows(x)) == "it takes a scale for every 128 x 128 codes, not for every row"
    ragged = quant.quantise_matrix(jnp.ones((256, 192)))
    assert few_rows.why_not(x[:, :192], ragged) == "it reads pieces of 128 codes, K is 192"
