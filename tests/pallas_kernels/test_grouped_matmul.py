import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_swiglu, hopper
from pallas_kernels.grouped_matmul import api, mosaic_gpu, mosaic_gpu_prefill, mosaic_tpu, per_row, reference
from tests.support.attention_cases import relative_error
from tests.support.grouped_cases import MANY_ROWS, SIZES, inputs, numpy_products, numpy_swiglu

# What runs on a CPU; the kernel of the TPU interpreted, that of Hopper has tests of its own.
IMPLEMENTATIONS = {
    "xla": reference.grouped_matmul,
    "ragged_dot": api.ragged_dot,
    "per_row": per_row.grouped_matmul,
    "mosaic_tpu": functools.partial(mosaic_tpu.grouped_matmul, interpret=True),
}
implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)


interpreted = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")


@interpreted
@pytest.mark.parametrize("sizes", [SIZES["ragged"], SIZES["decode"]], ids=["ragged", "decode"])
def test_hoppers_kernel_interpreted_equals_numpy(sizes):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, matrices, group_sizes = inputs(sizes, 128, 128)
    blocks = mosaic_gpu.Blocks(m=64, n=64, stages=2)
    out = mosaic_gpu.forward(rows, matrices, group_sizes, blocks=blocks, interpret=plgpu.InterpretGPUParams())
    assert relative_error(out, numpy_products(rows, matrices, sizes)) < 4e-3


@interpreted
@pytest.mark.parametrize("name, gated", [*((name, False) for name in MANY_ROWS), ("ragged", True), ("single row", True)])
def test_hoppers_kernel_for_many_rows_interpreted_equals_numpy(monkeypatch, name, gated):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    sizes = MANY_ROWS[name]
    monkeypatch.setattr(hopper, "NUM_SMS", 3)  # several tiles a block
    rows, matrices, group_sizes = inputs(sizes, 192, 256)
    tiling = mosaic_gpu_prefill.Tiling(n=64 if gated else 128, stages=2, slots=1 if gated else 2, gated=gated)
    out = mosaic_gpu_prefill.forward(
        rows, matrices, group_sizes, gated=gated, tiling=tiling, interpret=plgpu.InterpretGPUParams()
    )
    expected = numpy_products(rows, matrices, sizes)
    if gated:
        expected = numpy_swiglu(rows, matrices.reshape(len(sizes), 192, 2, 128), sizes)
    assert relative_error(out, expected) < 4e-3


@pytest.mark.parametrize("sizes", [*SIZES.values(), *MANY_ROWS.values()], ids=[*SIZES, *(f"many {name}" for name in MANY_ROWS)])
def test_halves_of_hoppers_tiles_cover_every_row_and_stay_in_their_group(sizes):
    rows, half = max(sum(sizes), mosaic_gpu_prefill.HALF), mosaic_gpu_prefill.HALF
    tiles, count = mosaic_gpu_prefill.tiles_of(jnp.asarray(sizes, jnp.int32), rows)
    assert count[0] == sum(-(-size // 128) for size in sizes) <= tiles.shape[1]
    ends = np.cumsum(sizes)
    covered = set()
    for group, first, second, start, end in np.asarray(tiles).T[: int(count[0])]:
        assert (start, end) == (ends[group] - sizes[group], ends[group]) and end > start
        assert 0 <= first <= rows - half
        if end - start < half:
            assert first <= start and end <= first + half and second == -1
            covered.update(range(start, end))
        for begin in (first, second):
            if end - start >= half and begin != -1:
                assert start <= begin and begin + half <= end
                covered.update(range(begin, begin + half))
    assert covered == set(range(sum(sizes)))


def test_tilings_that_do_not_fit_are_refused():
    for fields in (
        {"n": 100},
        {"n": 320},
        {"n": 256, "gated": True},
        {"n": 256, "slots": 5},
        {"n": 256, "stages": 5},
        {"n": 128, "cluster": 3},
    ):
        with pytest.raises(ValueError, match=f"n={fields['n']}"):
            mosaic_gpu_prefill.Tiling(**{"stages": 4, "slots": 2, **fields})
    rows, matrices, group_sizes = inputs([256], 64, 192)
    with pytest.raises(ValueError, match="192 columns"):
        mosaic_gpu_prefill.forward(rows, matrices, group_sizes, tiling=mosaic_gpu_prefill.Tiling(n=128, stages=4))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("block", [64, 128])
def test_hoppers_tiles_cover_every_row_once_and_no_group_without_rows(sizes, block):
    rows = sum(sizes)
    tiles = np.asarray(mosaic_gpu.tiles_of(jnp.asarray(sizes, jnp.int32), rows, block))
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    covered = []
    for group, row_block, begin, end in tiles.T:
        covered += range(begin, end)
        assert (group_of_row[begin:end] == group).all()
        assert row_block * block <= begin and end <= (row_block + 1) * block
    assert covered == list(range(rows))


@pytest.mark.parametrize("m, n", [(32, 64), (64, 100), (64, 512)])
def test_blocks_that_wgmma_does_not_take_are_refused(m, n):
    with pytest.raises(ValueError, match=f"{m} x {n}"):
        mosaic_gpu.Blocks(m=m, n=n, stages=2)


def test_blocks_divide_the_columns_and_fit_the_groups():
    assert mosaic_gpu.blocks_for(576) == mosaic_gpu.Blocks(m=64, n=64, stages=6)
    assert mosaic_gpu.blocks_for(3072) == mosaic_gpu.Blocks(m=64, n=128, stages=6)
    widths = {columns: mosaic_gpu_prefill.tiling_for(columns, gated=False).n for columns in (3072, 576, 640, 320)}
    assert widths == {3072: 256, 576: 192, 640: 128, 320: 64}
    clusters = {columns: mosaic_gpu_prefill.tiling_for(columns, gated=False).cluster for columns in (3072, 576, 640, 320)}
    assert clusters == {3072: 2, 576: 1, 640: 1, 320: 1}
    assert mosaic_gpu_prefill.tiling_for(1536, gated=True) == mosaic_gpu_prefill.Tiling(n=128, stages=4, gated=True, cluster=2)
    assert mosaic_gpu_prefill.tiling_for(192, gated=True).n == 64
    assert mosaic_gpu_prefill.serves(32768, 64) and not mosaic_gpu_prefill.serves(64, 256)


@implementations
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_numpy(name, sizes):
    rows, matrices, group_sizes = inputs(sizes, 24, 40)
    out = jax.jit(IMPLEMENTATIONS[name])(rows, matrices, group_sizes)
    assert out.dtype == rows.dtype
    assert relative_error(out, numpy_products(rows, matrices, sizes)) < 4e-3


@pytest.mark.parametrize("name", ["xla", "per_row"])
def test_is_exact_in_float32(name):
    rows, matrices, group_sizes = inputs(SIZES["ragged"], 24, 40, jnp.float32)
    assert (
        relative_error(IMPLEMENTATIONS[name](rows, matrices, group_sizes), numpy_products(rows, matrices, SIZES["ragged"]))
        < 1e-6
    )


@implementations
def test_gradients_are_those_of_the_reference(name):
    rows, matrices, group_sizes = inputs(SIZES["ragged"], 16, 24, jnp.float32)

    def loss(f, r, m):
        return jnp.sum(f(r, m, group_sizes) ** 2)

    expected = jax.grad(functools.partial(loss, reference.grouped_matmul), (0, 1))(rows, matrices)
    found = jax.jit(jax.grad(functools.partial(loss, IMPLEMENTATIONS[name]), (0, 1)))(rows, matrices)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-5


def test_hoppers_backward_pass_is_right():
    rows, matrices, group_sizes = inputs(SIZES["ragged"], 16, 24, jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(rows.shape[0], 24)), jnp.float32)
    _, pull = jax.vjp(lambda r, m: reference.grouped_matmul(r, m, group_sizes), rows, matrices)
    found = mosaic_gpu._backward((rows, matrices, group_sizes), cotangent)
    assert found[2] is None
    for one, other in zip(found, pull(cotangent), strict=False):
        assert relative_error(one, other) < 1e-5


def swiglu_inputs(sizes, k: int, width: int, dtype=jnp.bfloat16):
    rows, matrices, group_sizes = inputs(sizes, k, 2 * width, dtype)
    return rows, matrices.reshape(len(sizes), k, 2, width), group_sizes


@pytest.mark.parametrize("implementation", ["unfused", "xla", None])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_swiglu_equals_numpy(implementation, sizes):
    rows, gate_up, group_sizes = swiglu_inputs(sizes, 24, 40, jnp.float32)
    out = jax.jit(grouped_swiglu, static_argnames="implementation")(rows, gate_up, group_sizes, implementation=implementation)
    assert out.dtype == rows.dtype
    assert relative_error(out, numpy_swiglu(rows, gate_up, sizes)) < 1e-5


def test_hoppers_backward_pass_of_swiglu_is_right():
    rows, gate_up, group_sizes = swiglu_inputs(SIZES["ragged"], 16, 24, jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(rows.shape[0], 24)), jnp.float32)
    _, pull = jax.vjp(lambda r, m: grouped_swiglu(r, m, group_sizes, implementation="xla"), rows, gate_up)
    found = mosaic_gpu._backward_swiglu((rows, gate_up, group_sizes), cotangent, multiply=api.ragged_dot)
    assert found[2] is None
    for one, other in zip(found, pull(cotangent), strict=False):
        assert relative_error(one, other) < 1e-5


def test_few_rows_of_many_groups_read_one_matrix_each():
    rows, matrices, group_sizes = inputs(SIZES["decode"], 16, 24)
    assert per_row.why_not(rows, matrices, group_sizes) is None
    assert "5 rows are too many" in per_row.why_not(jnp.zeros((5, 16)), matrices, group_sizes)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\), \(2, 5, 6\) and \(2,\)"):
        grouped_matmul(jnp.zeros((3, 4)), jnp.zeros((2, 5, 6)), jnp.zeros((2,), jnp.int32))
    with pytest.raises(ValueError, match="'cuda'"):
        grouped_matmul(jnp.zeros((3, 5)), jnp.zeros((2, 5, 6)), jnp.zeros((2,), jnp.int32), implementation="cuda")
    with pytest.raises(ValueError, match=r"\(3, 5\), \(2, 5, 6\) and \(2,\)"):
        grouped_swiglu(jnp.zeros((3, 5)), jnp.zeros((2, 5, 6)), jnp.zeros((2,), jnp.int32))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="they may serve there")
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu", "ragged_dot"])
def test_what_cannot_serve_says_why_and_none_falls_back(implementation):
    rows, matrices, group_sizes = inputs(SIZES["even"], 64, 64)
    with pytest.raises(NotImplementedError, match=implementation):
        grouped_matmul(rows, matrices, group_sizes, implementation=implementation)
    assert grouped_matmul(rows, matrices, group_sizes).shape == (rows.shape[0], 64)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it may serve there")
def test_swiglus_kernel_says_why_it_cannot_serve():
    with pytest.raises(NotImplementedError, match="grouped_swiglu.*Hopper"):
        grouped_swiglu(*swiglu_inputs(MANY_ROWS["whole"], 64, 64), implementation="mosaic_gpu")
