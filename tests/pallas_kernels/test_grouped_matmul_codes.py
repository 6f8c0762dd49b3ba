"""grouped_matmul, grouped_swiglu and grouped_mlp with matrices in 8 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_mlp, grouped_swiglu, hopper
from pallas_kernels.grouped_matmul import (
    api,
    mosaic_gpu_codes,
    mosaic_gpu_codes_few_rows,
    mosaic_gpu_codes_prefill,
    per_row,
    reference,
)
from pallas_kernels.quant import Scaled, quantise_rows
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

IMPLEMENTATIONS = {
    "xla": reference.grouped_matmul,
    "per_row": per_row.grouped_matmul_of_codes,
    "decoded": api.decoded,
}
implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)
interpreted = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


@implementations
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_the_product_of_the_decoded_matrices(name, sizes):
    rows, matrices, group_sizes = scaled_inputs(sizes, 200, 140, jnp.float32)
    out = jax.jit(IMPLEMENTATIONS[name])(rows, matrices, group_sizes)
    assert out.dtype == jnp.float32
    assert relative_error(out, numpy_scaled_products(rows, matrices, sizes)) < 1e-5


@implementations
def test_rows_may_be_in_8_bits_too(name):
    rows, matrices, group_sizes = scaled_inputs(SIZES["ragged"], 200, 140)
    rows = quantise_rows(rows)
    out = IMPLEMENTATIONS[name](rows, matrices, group_sizes)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, numpy_scaled_products(rows, matrices, SIZES["ragged"])) < 5e-3


@implementations
def test_extreme_scales_and_codes(name):
    rows, matrices, group_sizes = scaled_inputs(SIZES["ragged"], 256, 130, jnp.float32)
    scales = matrices.scales.at[:, 0, 0].set(1e-30).at[:, 0, 1].set(1e-28).at[:, 1].set(1e25)
    codes = jnp.where(matrices.codes.astype(jnp.float32) > 0, 448.0, -448.0).astype(jnp.float8_e4m3fn)
    matrices = Scaled(codes, scales)
    out = np.asarray(IMPLEMENTATIONS[name](rows, matrices, group_sizes))
    expected = numpy_scaled_products(rows, matrices, SIZES["ragged"])
    for columns in (slice(0, 128), slice(128, None)):
        assert relative_error(out[:, columns] / 1.0, expected[:, columns]) < 1e-5


@implementations
@pytest.mark.parametrize("by_row", [False, True])
def test_scales_of_checkpoints(by_row, name):
    rows, matrices, group_sizes = scaled_inputs(SIZES["even"], 200, 140, jnp.float32)
    scales = jnp.repeat(matrices.scales, 128, axis=1)[:, :140] if by_row else matrices.scales
    powers = jnp.exp2(jnp.round(jnp.log2(scales)))
    stored = (jax.lax.bitcast_convert_type(powers, jnp.int32) >> 23).astype(jnp.uint8)  # exponents, as float8_e8m0fnu
    expected = numpy_scaled_products(rows, Scaled(matrices.codes, powers), SIZES["even"])
    for kind in (powers, powers.astype(jnp.bfloat16), stored):
        out = IMPLEMENTATIONS[name](rows, Scaled(matrices.codes, kind), group_sizes)
        assert relative_error(out, expected) < 1e-5


@implementations
def test_a_row_that_is_not_finite_stays_alone(name):
    sizes = SIZES["ragged"]
    rows, matrices, group_sizes = scaled_inputs(sizes, 128, 140, jnp.float32)
    for given in (rows.at[3, 5].set(jnp.nan), quantise_rows(rows.at[3, 5].set(jnp.inf))):
        out = np.asarray(IMPLEMENTATIONS[name](given, matrices, group_sizes), np.float32)
        assert np.isnan(out[3]).all() and np.isfinite(np.delete(out, 3, axis=0)).all()


@implementations
def test_the_gradient_of_rows_is_that_of_the_decoded_product_and_matrices_have_none(name):
    rows, matrices, group_sizes = scaled_inputs(SIZES["ragged"], 48, 40, jnp.float32)

    def loss(rows, scales):
        return jnp.sum(grouped_matmul(rows, Scaled(matrices.codes, scales), group_sizes, implementation=name) ** 2)

    backends = {name: api.dispatch.Backend(IMPLEMENTATIONS[name])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "CODES_BACKENDS", backends)
        found, of_scales = jax.grad(loss, (0, 1))(rows, matrices.scales)
    out = numpy_scaled_products(rows, matrices, SIZES["ragged"])
    expected = numpy_scaled_products(2 * out, jnp.swapaxes(decoded(matrices), 1, 2), SIZES["ragged"])
    assert relative_error(found, expected) < 1e-5
    assert not np.asarray(of_scales).any()


@pytest.mark.parametrize("implementation", ["unfused", "xla", None])
@pytest.mark.parametrize("width", [128, 140])
def test_swiglu_equals_numpy(implementation, width):
    sizes = SIZES["ragged"]
    rows, gate_up, group_sizes = scaled_swiglu_inputs(sizes, 200, width, jnp.float32)
    out = grouped_swiglu(rows, gate_up, group_sizes, implementation=implementation)
    assert relative_error(out, numpy_scaled_swiglu(rows, gate_up, sizes)) < 1e-5


def test_mlp_is_both_products():
    sizes = SIZES["ragged"]
    rows, gate_up, group_sizes = scaled_swiglu_inputs(sizes, 200, 128, jnp.float32)
    _, down, _ = scaled_inputs(sizes, 128, 200)
    out = grouped_mlp(rows, gate_up, down, group_sizes)
    expected = numpy_scaled_products(numpy_scaled_swiglu(rows, gate_up, sizes), down, sizes)
    assert relative_error(out, expected) < 1e-5
    in_16_bits = decoded(gate_up).transpose(0, 3, 1, 2), decoded(down).swapaxes(1, 2)
    out = grouped_mlp(rows, *(jnp.asarray(x, jnp.float32) for x in in_16_bits), group_sizes)
    assert relative_error(out, expected) < 1e-5


def test_what_does_not_fit_is_named():
    sizes = jnp.zeros((2,), jnp.int32)
    matrices = Scaled(jnp.zeros((2, 6, 5), jnp.float8_e4m3fn), jnp.ones((2, 1, 1)))
    with pytest.raises(ValueError, match=r"\(3, 4\), \(2, 6, 5\) and \(2,\)"):
        grouped_matmul(jnp.zeros((3, 4)), matrices, sizes)
    with pytest.raises(ValueError, match=r"\(3, 5\), \(2, 6, 5\) and \(2,\)"):
        grouped_swiglu(jnp.zeros((3, 5)), matrices, sizes)
    with pytest.raises(ValueError, match="in 8 bits"):
        grouped_matmul(quantise_rows(jnp.zeros((3, 5))), jnp.zeros((2, 5, 6)), sizes)
    with pytest.raises(ValueError, match="cuda"):
        grouped_matmul(jnp.zeros((3, 5)), matrices, sizes, implementation="cuda")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="they may serve there")
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "decoded"])
def test_what_cannot_serve_says_why(implementation):
    rows, matrices, group_sizes = scaled_inputs(SIZES["even"], 128, 64)
    with pytest.raises(NotImplementedError, match=implementation):
        grouped_matmul(rows, matrices, group_sizes, implementation=implementation)


@pytest.mark.parametrize(
    "rows, matrices, reason",
    [
        (jnp.zeros((3, 128)), Scaled(jnp.zeros((2, 64, 128), jnp.float8_e4m3fn), jnp.ones((2, 1, 1))), "not float32"),
        (jnp.zeros((3, 130), jnp.bfloat16), Scaled(jnp.zeros((2, 64, 130), jnp.float8_e4m3fn), jnp.ones((2, 1, 2))), "130"),
        (jnp.zeros((3, 128), jnp.bfloat16), Scaled(jnp.zeros((2, 40, 128), jnp.float8_e4m3fn), jnp.ones((2, 1, 1))), "40"),
        (jnp.zeros((3, 128), jnp.bfloat16), Scaled(jnp.zeros((2, 64, 128), jnp.float8_e4m3fn), jnp.ones((2, 64, 1))), "single"),
        (jnp.zeros((0, 128), jnp.bfloat16), Scaled(jnp.zeros((2, 64, 128), jnp.float8_e4m3fn), jnp.ones((2, 1, 1))), "no rows"),
    ],
)
def test_what_hoppers_kernels_do_not_take(monkeypatch, rows, matrices, reason):
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    assert reason in mosaic_gpu_codes.why_not(rows, matrices, jnp.zeros((2,), jnp.int32))


def run_interpreted(monkeypatch, forward, *args, **options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(hopper, "NUM_SMS", 3)  # several tiles a block
    return forward(*args, **options, interpret=plgpu.InterpretGPUParams())


@interpreted
@pytest.mark.parametrize("name, n", [("short groups", 256), ("single row", 192), ("short at the end", 256)])
def test_hoppers_kernel_for_many_rows_interpreted_equals_numpy(monkeypatch, name, n):
    sizes = MANY_ROWS[name]
    rows, matrices, group_sizes = scaled_inputs(sizes, 256, n)
    rows = quantise_rows(rows.at[2, 3].set(jnp.nan))
    tiling = mosaic_gpu_codes_prefill.Tiling(stages=2)
    out = run_interpreted(monkeypatch, mosaic_gpu_codes_prefill.forward, rows, matrices, group_sizes, tiling=tiling)
    expected = numpy_scaled_products(rows, matrices, sizes)
    assert np.isnan(np.asarray(out[2], np.float32)).all()
    assert relative_error(np.delete(out, 2, axis=0), np.delete(expected, 2, axis=0)) < 4e-3


@interpreted
def test_hoppers_activations_between_products_are_those_of_quantise_rows(monkeypatch):
    sizes = MANY_ROWS["short at the end"]
    rows, gate_up, group_sizes = scaled_swiglu_inputs(sizes, 128, 128)
    rows = quantise_rows(rows)
    side_by_side = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, x.shape[-1]), gate_up)
    tiling = mosaic_gpu_codes_prefill.Tiling(stages=2, gated=True, coded=True)
    out = run_interpreted(
        monkeypatch, mosaic_gpu_codes_prefill.forward, rows, side_by_side, group_sizes, gated=True, coded=True, tiling=tiling
    )
    expected = quantise_rows(jnp.asarray(numpy_scaled_swiglu(rows, gate_up, sizes), jnp.float32))
    np.testing.assert_allclose(out.scales, expected.scales, rtol=1e-5)
    assert np.mean(np.asarray(out.codes, np.float32) != np.asarray(expected.codes, np.float32)) < 1e-3


@interpreted
@pytest.mark.parametrize("sizes, n", [(SIZES["ragged"], 192), (SIZES["decode"], 64)], ids=["ragged", "decode"])
def test_hoppers_kernel_for_few_rows_interpreted_equals_numpy(monkeypatch, sizes, n):
    rows, matrices, group_sizes = scaled_inputs(sizes, 256, n)
    blocks = mosaic_gpu_codes_few_rows.Blocks(rows=16, workers=1 if n == 64 else 2, stages=2)
    out = run_interpreted(monkeypatch, mosaic_gpu_codes_few_rows.forward, rows, matrices, group_sizes, blocks=blocks)
    assert relative_error(out, numpy_scaled_products(rows, matrices, sizes)) < 4e-3


def test_rows_in_float16_keep_what_bfloat16_has():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(9, 64)) * np.logspace(-30, 30, 9)[:, None], jnp.bfloat16)
    rows = rows.at[3].set(0.0).at[5, 0].set(jnp.inf)
    halves, factors = mosaic_gpu_codes_few_rows.to_float16(rows)
    whole = np.delete(np.arange(9), 5)
    restored = np.asarray(halves, np.float64) * np.asarray(factors, np.float64)[:, None]
    largest = np.abs(np.asarray(rows, np.float64)).max(axis=1)
    assert np.all(np.abs(restored - np.asarray(rows, np.float64))[whole].max(axis=1) <= 2.0**-24 * largest[whole])
    assert np.isnan(np.asarray(factors)[5])


def test_columns_of_rows_follow_the_order_of_lanes():
    rows = jnp.arange(128)[None]
    ordered = np.asarray(mosaic_gpu_codes_few_rows._in_lanes_order(rows))[0]
    for step, half, quarter, b in np.ndindex(4, 2, 4, 2):
        assert ordered[16 * step + 8 * half + 2 * quarter + b] == 16 * quarter + 4 * step + 2 * half + b
    np.testing.assert_array_equal(ordered[64:], ordered[:64] + 64)


def test_hoppers_backward_pass_is_right():
    rows, matrices, group_sizes = scaled_inputs(SIZES["ragged"], 48, 40, jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(rows.shape[0], 40)), jnp.float32)
    _, pull = jax.vjp(functools.partial(reference.grouped_matmul, matrices=matrices, group_sizes=group_sizes), rows)
    found, *others = mosaic_gpu_codes._backward((matrices, group_sizes), cotangent)
    assert others == [None, None]
    assert relative_error(found, pull(cotangent)[0]) < 1e-5


def test_blocks_and_tilings():
    assert mosaic_gpu_codes_few_rows.blocks_for(64, 64, 3072).rows == 8
    assert mosaic_gpu_codes_few_rows.blocks_for(2000, 64, 3072).rows == 64
    assert mosaic_gpu_codes_few_rows.blocks_for(1, 1, 4096).workers == 1
    for fields in ({"rows": 12}, {"rows": 72}, {"rows": 8, "workers": 3}):
        with pytest.raises(ValueError, match=f"rows={fields['rows']}"):
            mosaic_gpu_codes_few_rows.Blocks(**fields)
