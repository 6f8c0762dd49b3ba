"""The Hopper kernel of sparse_mla over latents in 8 bits, emulated on NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, quant
from pallas_kernels.sparse_mla import mosaic_gpu
from tests.support.attention_cases import Case, inputs, numpy_attention, relative_error, selections
from tests.support.emulated import warpgroups
from tests.support.emulated.registers import PURE

kernel = pytest.importorskip("pallas_kernels.sparse_mla.mosaic_gpu_scaled")
scaled = pytest.importorskip("pallas_kernels.sparse_mla.mosaic_gpu_scaled_tasks")
columns_of = pytest.importorskip("pallas_kernels.hopper.columns")
pytestmark = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")

SCALE = 0.11
KINDS = ["ascending", "causal", "scattered", "nothing", "mixed"]


def emulated(monkeypatch, queries, latents, indices, *, splits=1, seed=0, num_sms=2):
    """What the kernel makes of a case, each multiprocessor doing every `num_sms`-th task, or a cluster a query."""
    (b, s, h, width), t = queries.shape, latents.shape[1]
    lists = np.pad(indices.reshape(b * s, -1), ((0, 0), (0, -indices.shape[2] % columns_of.KEYS)), constant_values=-1)
    tasks = scaled.Tasks(b, s, h, t, lists.shape[1] // columns_of.KEYS, splits)
    counts = np.asarray(mosaic_gpu.blocks_to_visit(jnp.asarray(lists), columns_of.KEYS)) if splits == 1 else None
    parts = [np.asarray(x).reshape(b * t, *x.shape[2:]) for x in (latents.codes, latents.rotary, latents.scales)]
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "NUM_SMS", num_sms)
        flat = np.asarray(queries).reshape(-1, width), *parts, lists, counts
        out = warpgroups.run(patch, kernel, kernel.attend, *flat, tasks, scale=SCALE, seed=seed)
    return np.asarray(out, np.float32).reshape(b, s, h, -1)


def expected_of(queries, latents, indices):
    products = quant.dequantise_latents(latents, jnp.float32)
    return numpy_attention(queries, products, indices, SCALE, latents.codes.shape[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 5, 20, 300, 400),  # several tasks a block of the grid, more key blocks than slots
        Case(2, 2, 64, 200, 70),
        Case(1, 2, 100, 300, 130),  # two tiles a query, rounded up to 56 columns each
        Case(1, 3, 3, 90, 1),
    ],
    ids=str,
)
def test_equals_numpy(case, kind, monkeypatch):
    queries, latents = inputs(case)
    small, indices = quant.quantise_latents(latents, case.c), selections(case, kind)
    expected = expected_of(queries, small, indices)
    for seed in range(2):
        out = emulated(monkeypatch, queries, small, indices, seed=seed)
        if expected.any():
            assert relative_error(out, expected) < 3e-3
        assert not out[(indices < 0).all(-1)].any()


@pytest.mark.parametrize("kind", ["ascending", "scattered", "nothing"])
@pytest.mark.parametrize(
    "case, splits",
    [(Case(2, 1, 64, 300, 512), 4), (Case(1, 1, 20, 300, 290), 3), (Case(1, 1, 128, 300, 512), 8), (Case(1, 1, 5, 90, 130), 3)],
    ids=str,
)
def test_a_cluster_shares_a_list(case, splits, kind, monkeypatch):
    """Some of its blocks find nothing in their parts, and five key blocks are not evenly divided among three."""
    queries, latents = inputs(case)
    small, indices = quant.quantise_latents(latents, case.c), selections(case, kind)
    expected = expected_of(queries, small, indices)
    out = emulated(monkeypatch, queries, small, indices, splits=splits)
    assert relative_error(out, expected) < 4e-3 if expected.any() else not out.any()


def test_logits_and_scales_may_grow_along_the_list(monkeypatch):
    """Every later key beats all before it by far, then none does; and what is not selected may be anything."""
    case = Case(1, 2, 20, 384, 384)
    rng = np.random.default_rng(0)
    growing = np.linspace(-40, 40, case.t)[None, :, None] + rng.normal(size=(1, case.t, case.c + case.r))
    queries = jnp.ones((1, case.s, case.h, case.c + case.r), jnp.bfloat16)
    indices = np.broadcast_to(np.arange(case.k, dtype=np.int32), (1, case.s, case.k)).copy()
    indices[:, 1] = indices[:, 1, ::-1]
    indices[indices == 200] = -1
    small = quant.quantise_latents(jnp.asarray(growing, jnp.bfloat16), case.c)
    expected = expected_of(queries, small, indices)
    poisoned = jax.tree.map(lambda x: x.at[:, 200].set(jnp.nan), small)
    assert relative_error(emulated(monkeypatch, queries, poisoned, indices), expected) < 3e-3


def test_scales_and_heads_of_very_different_sizes(monkeypatch):
    """Weights refer to their products with the scales, so neither small nor large scales are lost in float16."""
    case = Case(1, 1, 8, 200, 150)
    queries, latents = inputs(case)
    sizes = np.random.default_rng(1).choice([1e-30, 1e-4, 1.0, 1e4], case.t)
    latents = dataclasses.replace(small := quant.quantise_latents(latents, case.c), scales=small.scales * sizes[None])
    queries = queries * jnp.asarray(10.0 ** np.arange(-case.h, 0), jnp.bfloat16)[:, None] * 1e-2
    indices = selections(case, "ascending")
    expected = expected_of(queries, latents, indices)
    out = emulated(monkeypatch, queries, dataclasses.replace(latents, scales=latents.scales.astype(jnp.float32)), indices)
    for head in range(case.h):
        assert relative_error(out[:, :, head], expected[:, :, head]) < 4e-3


def test_queries_are_sums_of_two_codes_exactly():
    rng = np.random.default_rng(0)
    numbers = (rng.uniform(0.25, 448, 512) * rng.choice([-1, 1], 512)).astype(jnp.bfloat16)
    words = [x.astype(np.int64) for x in numbers.view(np.int32).reshape(128 // 2, 4).T]
    high, low = (
        np.stack(x, 1).astype(np.int32).view(jnp.float8_e4m3fn) for x in PURE["to_e4m3_sum"](words, np.ones(64, np.float32))
    )
    np.testing.assert_array_equal((high.astype(np.float32) + low.astype(np.float32)).reshape(-1), numbers.astype(np.float32))


def test_slots_fit_shared_memory():
    for columns in range(8, scaled.MAX_COLUMNS + 1, 8):
        memory = scaled.Memory.of(columns)
        assert memory.end <= columns_of.SHARED_BYTES and memory.slots >= 3
        assert memory.codes % 1024 == memory.rotary % 1024 == memory.queries % 1024 == memory.weights % 1024 == 0
        assert columns * scaled.STAGED_LINE <= memory.weights - memory.queries


def test_registers_are_those_that_a_block_is_launched_with():
    for registers in kernel.REGISTERS.values():
        assert sum(registers) * hopper.WARPGROUP <= hopper.REGISTER_FILE and not any(one % 8 for one in registers)


@pytest.mark.parametrize(
    "tiles, blocks, expected",
    [(1, 32, 8), (13, 32, 8), (14, 32, 4), (30, 32, 2), (67, 32, 1), (1, 5, 2), (1, 9, 2), (1, 1, 1)],
)
def test_splits_are_those_that_run_at_once(tiles, blocks, expected):
    splits = scaled.splits_of(tiles, blocks)
    assert splits == expected
    scaled.Tasks(tiles, 1, 64, 1000, blocks, splits)


def test_tasks_that_cannot_be_launched():
    with pytest.raises(ValueError, match="6 key blocks do not divide into 4 of at most 8 splits"):
        scaled.Tasks(1, 1, 64, 1000, blocks=6, splits=4)
    with pytest.raises(ValueError, match="no task of 0 heads"):
        scaled.Tasks(1, 1, 0, 1000, blocks=6)
    with pytest.raises(ValueError, match="lists that are split into 3 have no counts"):
        kernel.attend(*[None] * 5, np.ones(1), scaled.Tasks(1, 1, 64, 1000, blocks=6, splits=3), scale=1.0)
    assert [scaled.Tasks(1, 1, heads, 1000, 1).columns for heads in (1, 20, 64, 65, 96, 128)] == [8, 24, 64, 40, 48, 64]


@pytest.mark.parametrize(
    "case",
    [Case(1, 3, 64, 300, 130), Case(1, 1, 128, 4096, 2048), Case(1, 301, 20, 2000, 256), Case(1, 1, 32, 300, 1)],
    ids=["one query a tile", "decode", "few heads", "few heads, one key"],
)
def test_the_kernel_lowers(case):
    """All of Pallas' checks and layout inference run without a GPU; what they make is compiled on one."""
    shape = jax.ShapeDtypeStruct
    tokens = (case.b, case.t)
    latents = quant.Latents(
        shape((*tokens, case.c), jnp.float8_e4m3fn), shape((*tokens, case.r), jnp.bfloat16), shape(tokens, jnp.float32)
    )
    queries = shape((case.b, case.s, case.h, case.c + case.r), jnp.bfloat16)
    run = jax.jit(functools.partial(mosaic_gpu.sparse_mla, scale=SCALE, value_dim=case.c))
    traced = run.trace(queries, latents, shape((case.b, case.s, case.k), jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
