"""The TPU kernels interpreted, held against NumPy on the cases of every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant, sparse_mla, tpu
from pallas_kernels.sparse_mla import mosaic_tpu, reference
from tests.support.attention_cases import Case, inputs, numpy_attention, numpy_lse, relative_error, selections
from tests.support.tpu_interpreter import interpreted

SCALE = 0.11
PROMPT = Case(2, 19, 4, 700, 90, 64, 16)
STEP = Case(2, 2, 5, 301, 40, 64, 16)  # three rounds of rows, an odd number of keys
KINDS = ["ascending", "overlapping", "causal", "nothing", "mixed", "shuffled"]
PAGES = [16, 32, 128, 256]


def pairs(latents):
    """bfloat16 [B, T, W] -> int32 [B, T / 2, W], as its memory reads on a TPU."""
    b, t, width = latents.shape
    rows = jnp.pad(latents, ((0, 0), (0, t % 2), (0, 0))).reshape(b, -1, 2, width)
    return jax.lax.bitcast_convert_type(rows.swapaxes(2, 3), jnp.int32)


@pytest.fixture(autouse=True)
def interpretable_rows(monkeypatch):
    def run(queries, latents, indices, attend=mosaic_tpu.attend_rows, **options):
        return attend(queries, pairs(latents) if latents.dtype == jnp.bfloat16 else latents, indices, **options)

    monkeypatch.setattr(mosaic_tpu, "attend_rows", run)
    monkeypatch.setattr(mosaic_tpu, "ROWS", 16)  # every interpreted DMA takes milliseconds


def chosen(case, kind):
    indices = selections(case, "ascending" if kind == "shuffled" else kind)
    return np.random.default_rng(3).permuted(indices, axis=-1) if kind == "shuffled" else indices


def check(out, queries, latents, indices, value_dim, bound=5e-3):
    expected = numpy_attention(queries, latents, indices, SCALE, value_dim)
    assert out.shape == expected.shape and out.dtype == queries.dtype
    if expected.any():
        assert relative_error(out, expected) < bound
    assert not np.asarray(out, np.float32)[(indices < 0).all(-1)].any()


@pytest.mark.parametrize("kind", ["mixed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "mixed")])
@pytest.mark.parametrize("case", [PROMPT, STEP], ids=str)
def test_equals_numpy(case, kind):
    queries, latents = inputs(case)
    indices = chosen(case, kind)
    with interpreted():
        out = sparse_mla(queries, latents, jnp.asarray(indices), scale=SCALE, value_dim=case.c, implementation="mosaic_tpu")
    check(out, queries, latents, indices, case.c)


@pytest.mark.parametrize("page", [32, *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES if page != 32)])
def test_pages_of_any_size_are_exact_in_float32(page):
    queries, latents = inputs(PROMPT, jnp.float32)
    indices = chosen(PROMPT, "overlapping")
    with interpreted():
        out = mosaic_tpu.attend_pages(
            queries, latents, jnp.asarray(indices), scale=SCALE, value_dim=PROMPT.c, block=8, page=page
        )
    check(out, queries, latents, indices, PROMPT.c, bound=1e-6)


@pytest.mark.slow
def test_rows_are_exact_in_float32():
    queries, latents = inputs(STEP, jnp.float32)
    indices = selections(STEP, "scattered")  # by rows a position counts as often as it is listed
    with interpreted():
        out = mosaic_tpu.attend_rows(queries, latents, jnp.asarray(indices), scale=SCALE, value_dim=STEP.c)
    check(out, queries, latents, indices, STEP.c, bound=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_the_log_sum_exp_comes_with_the_context_of_a_step(dtype):
    queries, latents = inputs(STEP, dtype)
    indices = chosen(STEP, "ascending")
    indices[0, 1] = -1
    with interpreted():
        options = dict(scale=SCALE, value_dim=STEP.c, implementation="mosaic_tpu", return_lse=True)
        out, lse = sparse_mla(queries, latents, jnp.asarray(indices), **options)
    check(out, queries, latents, indices, STEP.c)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, numpy_lse(queries, latents, indices, SCALE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [PROMPT, STEP], ids=str)
def test_what_is_not_selected_may_be_anything(case):
    queries, latents = inputs(case)
    found = chosen(case, "ascending")
    indices = jnp.asarray(np.where(found == 2, 1, found) if case is STEP else np.where(found == 2, -1, found))
    with interpreted():
        run = functools.partial(sparse_mla, queries, scale=SCALE, value_dim=case.c, implementation="mosaic_tpu")
        outs = [run(latents.at[:, 2].set(value), indices) for value in (0, jnp.nan, jnp.inf)]
    for out in outs[1:]:
        np.testing.assert_array_equal(np.asarray(outs[0]), np.asarray(out))


def test_a_query_that_selects_nan_gets_nan_and_no_other():
    queries, latents = inputs(PROMPT)
    indices = np.full((PROMPT.b, PROMPT.s, PROMPT.k), -1, np.int32)
    indices[..., :3] = [4, 5, 300]
    indices[0, 7, 1] = 6
    with interpreted():
        out = mosaic_tpu.attend_pages(
            queries, latents.at[0, 6].set(jnp.nan), jnp.asarray(indices), scale=SCALE, value_dim=PROMPT.c
        )
    wrong = ~np.isfinite(np.asarray(out, np.float32)).all((2, 3))
    assert np.argwhere(wrong).tolist() == [[0, 7]]


@pytest.mark.slow
def test_8_bit_latents_are_their_products():
    for case in (PROMPT, STEP):
        queries, latents = inputs(case)
        small = quant.quantise_latents(latents, case.c)
        indices = chosen(case, "ascending")
        with interpreted():
            out = sparse_mla(
                queries,
                small,
                jnp.asarray(indices),
                scale=SCALE,
                value_dim=case.c,
                implementation="mosaic_tpu",
            )
        products = quant.dequantise_latents(small, jnp.float32)
        check(out, queries, products, indices, case.c, bound=6e-3)


@pytest.mark.slow
def test_it_has_the_gradient_of_the_reference():
    case = Case(1, 8, 2, 60, 20, 16, 16)
    queries, latents = inputs(case, jnp.float32)
    indices = jnp.asarray(chosen(case, "ascending"))

    def loss(f, q, kv):
        return jnp.sum(f(q, kv, indices, scale=SCALE, value_dim=case.c) ** 2)

    expected = jax.grad(functools.partial(loss, reference.sparse_mla), (0, 1))(queries, latents)
    with interpreted():
        found = jax.grad(functools.partial(loss, mosaic_tpu.sparse_mla), (0, 1))(queries, latents)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("kind", ["mixed", "causal"])
@pytest.mark.parametrize("page", [32, 256])
def test_unions_are_what_the_queries_select(kind, page):
    case = Case(1, 24, 1, 5000, 128)
    indices = chosen(case, kind)
    with interpreted():
        words, pages = mosaic_tpu.unite(jnp.asarray(indices), case.t, 8, page)
    words, pages = np.asarray(words), np.asarray(pages)
    positions = np.arange(case.t)
    rows, shifts = (np.asarray(x) for x in mosaic_tpu._word_place(jnp.asarray(positions), words.shape[2]))
    for i in range(3):
        group = indices[0, 8 * i : 8 * i + 8]
        first = np.unique(group[group >= 0] // page * page)
        assert pages[0, i, 0, -1] == first.size
        np.testing.assert_array_equal(pages[0, i, 0, : first.size], first)
        for query, row in enumerate(group):
            held = words[0, i, rows, query, positions % 128] >> shifts & 1
            np.testing.assert_array_equal(positions[held == 1], np.sort(row[row >= 0]))


@pytest.mark.parametrize("heads, queries, expected", [(20, 4096, 16), (64, 4096, 8), (128, 4096, 8), (4, 4096, 32), (4, 9, 16)])
def test_how_many_queries_share_pages(heads, queries, expected):
    assert mosaic_tpu.queries_per_block(heads, queries) == expected


def test_short_contexts_are_read_whole():
    assert mosaic_tpu.page_size(4096, 2048) == mosaic_tpu.TILE
    assert mosaic_tpu.page_size(131_072, 2048) == mosaic_tpu.PAGE


def test_what_it_cannot_serve():
    def why_not(kind=jnp.bfloat16, latents=jnp.bfloat16, k=3, s=2, return_lse=False):
        arrays = jnp.zeros((1, s, 4, 80), kind), jnp.zeros((1, 9, 80), latents), jnp.zeros((1, s, k), jnp.int32)
        return mosaic_tpu.why_not(*arrays, scale=1.0, value_dim=64, return_lse=return_lse)

    assert "needs a TPU" in why_not() or jax.default_backend() == "tpu"
    with interpreted():
        assert why_not() is None and why_not(latents=jnp.float8_e4m3fn) is None
        assert "float16" in why_not(jnp.float16)
        assert "nothing" in why_not(k=0)
        assert why_not(return_lse=True) is None
        assert "fewer than 8 queries" in why_not(s=8, return_lse=True)


def test_chips_are_those_that_pallas_knows():
    from jax.experimental.pallas import tpu as pltpu

    for chip in tpu.CHIPS.values():
        info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(chip.name), 1)
        assert chip.vmem == info.vmem_capacity_bytes
        for ours, theirs in (
            (chip.bandwidth, info.mem_bw_bytes_per_second),
            (chip.bf16, info.bf16_ops_per_second),
            (chip.int8, info.int8_ops_per_second),
            (chip.hbm, info.hbm_capacity_bytes),
        ):
            assert ours == pytest.approx(chip.cores * theirs, rel=0.02)
