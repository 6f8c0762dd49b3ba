import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import indexer_topk, select_topk
from pallas_kernels.indexer_topk import mosaic_gpu, mosaic_gpu_select, mosaic_gpu_select_problem, reference, triton
from tests.support import indexer_topk_properties as properties
from tests.support.emulated.lockstep import GARBAGE, Block, turns
from tests.support.emulated.registers import PURE, arrays, of_registers, put_in_place, registers

FORMATS = list(properties.FORMATS)

# ---- the reference against NumPy


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("shape, k", [((2, 5, 4, 16, 50), 8), ((1, 3, 32, 128, 300), 64), ((3, 1, 1, 1, 7), 20)])
def test_reference_on_integers(number_format, shape, k):
    properties.check_integers("xla", number_format, shape=shape, k=k)


@pytest.mark.parametrize("name", properties.PATTERNS)
def test_reference_on_patterns(name):
    for k in (1, 64, 1000):
        properties.check_pattern("xla", "bfloat16", name, k)


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("name", properties.PROPERTIES)
def test_reference_properties(name, number_format):
    properties.PROPERTIES[name]("xla", number_format)


def test_reference_infinite_scores():
    properties.check_infinite_scores("xla")


@pytest.mark.parametrize("k", [1, 64, 300])
def test_reference_selects_from_given_scores(k):
    rows = [row for name, row in _rows(256).items() if name != "denormal"]  # which XLA takes for 0 on a CPU
    rows = np.stack(rows).astype(np.float32)[None]
    visible = np.array([[256, 255, 0, 1, 64, 65, 256, 256, -3, 256, 400, 256]])
    found = select_topk(jnp.asarray(rows), jnp.asarray(visible), k_select=k)
    np.testing.assert_array_equal(found, properties.numpy_select(rows, visible, k))


def test_given_scores_of_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected scores \[B, S, T\] and visible \[B, S\], got \(1, 2, 3\) and \(1, 3\)"):
        select_topk(jnp.zeros((1, 2, 3)), jnp.zeros((1, 3), int), k_select=1)
    with pytest.raises(ValueError, match="k_select 0"):
        select_topk(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), int), k_select=0)


# ---- the interface


def _arguments(b=1, s=2, heads=2, width=4, t=6, kind=jnp.float32):
    arrays = jnp.ones((b, s, heads, width), kind), jnp.ones((b, t, width), kind), jnp.ones((b, s, heads))
    return arrays, dict(k_select=3, q_positions=jnp.full((b, s), t - 1), kv_lengths=jnp.full((b,), t))


def test_named_implementations_say_why_they_cannot_serve():
    arrays, options = _arguments()
    for name in ("mosaic_gpu", "triton"):
        if jax.default_backend() == "cpu":
            with pytest.raises(NotImplementedError, match="'cpu'"):
                indexer_topk(*arrays, **options, implementation=name)
    with pytest.raises(ValueError, match="cuda"):
        indexer_topk(*arrays, **options, implementation="cuda")


def test_without_a_name_the_result_is_the_reference_s():
    arrays, options = _arguments()
    np.testing.assert_array_equal(indexer_topk(*arrays, **options), indexer_topk(*arrays, **options, implementation="xla"))


def test_key_scales_go_with_eight_bits():
    arrays, options = _arguments()
    with pytest.raises(ValueError, match="key_scales given"):
        indexer_topk(*arrays, **options, key_scales=jnp.ones((1, 6)))
    arrays, options = _arguments(kind=jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match="key_scales missing"):
        indexer_topk(*arrays, **options)
    with pytest.raises(ValueError, match=r"key_scales must be \(1, 6\)"):
        indexer_topk(*arrays, **options, key_scales=jnp.ones((6,)))


def test_wrong_shapes_are_refused():
    arrays, options = _arguments()
    with pytest.raises(ValueError, match="differ"):
        indexer_topk(arrays[0], arrays[1][..., :3], arrays[2], **options)
    with pytest.raises(ValueError, match="k_select 0"):
        indexer_topk(*arrays, **{**options, "k_select": 0})
    with pytest.raises(ValueError, match="q_positions"):
        indexer_topk(*arrays, **{**options, "q_positions": jnp.zeros((2,), int)})


@pytest.mark.parametrize(
    "batch, queries, keys",
    [(1, 4096, 122_880), (1, 5000, 4096), (8, 1, 10**6), (64, 3, 10**6), (2, 7, 300), (60, 40, 4096), (100, 50, 4096)],
)
def test_score_blocks_cover_the_queries_within_the_documented_size(batch, queries, keys):
    from pallas_kernels.indexer_topk import mosaic_gpu_scores

    rows = mosaic_gpu.block_rows(batch, queries, keys)
    blocks = -(-queries // rows)
    assert (blocks - 1) * rows < queries <= blocks * rows
    smallest = rows <= 4
    assert smallest or (batch * rows <= mosaic_gpu.BLOCK_ROWS and 4 * batch * rows * keys <= mosaic_gpu.SCORE_BYTES)
    assert rows == queries or rows % 4 == 0
    unit = mosaic_gpu_scores.default_config(batch, rows, 32, keys, jnp.bfloat16).unit_queries
    padded = -(-rows // unit) * unit
    assert smallest or batch * padded <= mosaic_gpu.BLOCK_ROWS


@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 8, 15, 16, 1024])
def test_default_units_of_the_scores_kernel_fit_a_multiprocessor(queries, heads):
    from pallas_kernels.indexer_topk import mosaic_gpu_scores as kernel

    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16):
        config = kernel.default_config(2, queries, heads, 10_000, dtype)
        assert config.unit_queries < 2 * queries and config.queries * heads <= kernel.COLUMNS
        row_bytes = kernel.WIDTH * jnp.dtype(dtype).itemsize + 4
        rows = config.query_slots * config.unit_queries * heads + config.stages * config.keys
        assert config.stages >= 2 and rows * row_bytes <= kernel.SHARED_BYTES
    with pytest.raises(ValueError, match="4 math warpgroups are not divided evenly by 3 tiles"):
        kernel.ScoresConfig(queries=4, tiles=3)


# ---- the Hopper selection, its program run on NumPy


def _emulate(scores, maxima, visible, k, config, kind=Block):
    """scores [rows, T'], maxima [rows, T' / 16] or None, visible [rows] -> positions [rows, k] and races seen."""
    rows, width = scores.shape
    problem = mosaic_gpu_select.Problem(
        rows=rows,
        batch_rows=1,
        pitch=1,
        width=width,
        keys=width,
        k=k,
        has_maxima=maxima is not None,
        clean=maxima is not None,
        config=config,
    )
    out = np.full((rows, k), -7, np.int32)
    lengths = np.full(rows, width, np.int32)
    arrays = [scores, scores if maxima is None else maxima, np.asarray(visible - 1, np.int32), lengths, out]
    races = 0
    with turns(pytest.MonkeyPatch(), kind) as take:
        for row in range(rows):
            block, shared = kind(config.threads), np.full(-(-problem.row_bytes // 4), GARBAGE, np.int32)
            block.count_races(shared)
            addresses = mosaic_gpu_select.Arrays(*(registers(block.global_address(array)) for array in arrays))
            of_block = problem, registers(block.spread(row)), addresses, registers(block.global_address(shared))
            take(block, functools.partial(mosaic_gpu_select.select_rows, *of_block))
            races += block.races
    return out, races


def _as_the_scores_kernel_leaves_them(scores, visible):
    """NaN and what is hidden in a last block are -inf; beyond it nothing was written, so anything may stand there."""
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float32)
    for row, seen in zip(scores, visible, strict=True):
        end = -(-seen // 16) * 16
        row[seen:end], row[end:] = -np.inf, 1e30
    return scores, np.ascontiguousarray(scores.reshape(len(visible), -1, 16).max(-1))


def _rows(width):
    normal = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    place, inf = np.arange(width), np.float32(np.inf)
    return {
        "random": normal,
        "tied": np.round(normal * 8) / 8,
        "constant": np.full_like(normal, -1.5),
        "rising": np.sort(normal),
        "falling": np.sort(normal)[::-1],
        "best in one place": normal + 5 * (abs(place - width // 3) < width // 13),
        "zeros of both signs": np.where(normal > 2.2, normal, np.where(normal > 0, 0.0, -0.0)),
        "all -inf": np.full_like(normal, -inf),
        "mostly -inf": np.where(place % 97 == 0, normal, -inf),
        "a third NaN": np.where(place % 3 == 0, np.nan, normal),
        "some +inf": np.where(normal > 2, inf, normal),
        "denormal": normal * np.float32(1e-41),
        "a sample that misleads": np.where(place % (width // 128) < 32, normal + 20, normal - 50 * (place > width // 2)),
    }


# Widths and k such that a row fits the buffer, needs a sampled threshold, and is long enough for the block maxima.
SELECTIONS = [
    (256, 30, mosaic_gpu_select.SelectConfig(threads=128, rows=1, loads=1)),
    (1024, 1, mosaic_gpu_select.SelectConfig(threads=128, rows=1, loads=1)),
    (2048, 51, mosaic_gpu_select.SelectConfig(threads=128, rows=1, loads=1)),
    (8192, 700, mosaic_gpu_select.SelectConfig(threads=256, rows=1, loads=2)),
    (8192, 300, mosaic_gpu_select.SelectConfig(threads=128, rows=1, loads=4)),
    (16384, 64, mosaic_gpu_select.SelectConfig(threads=1024, rows=1, loads=1)),
]


@pytest.mark.parametrize("with_maxima", [True, False])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("width, k, config", SELECTIONS)
def test_emulated_selection(width, k, config, with_maxima, resident, monkeypatch):
    if not resident:
        monkeypatch.setattr(mosaic_gpu_select.Problem, "resident", 0)
    rows = _rows(width)
    scores = np.stack(list(rows.values())).astype(np.float32)
    visible = np.full(len(rows), width, np.int32) - np.arange(len(rows), dtype=np.int32)
    want = properties.numpy_select(scores, visible, k)
    maxima = None
    if with_maxima:
        scores, maxima = _as_the_scores_kernel_leaves_them(scores, visible)
    out, races = _emulate(scores, maxima, visible, k, config)
    wrong = [name for name, a, b in zip(rows, out, want, strict=True) if not np.array_equal(a, b)]
    assert (wrong, races) == ([], 0)


@pytest.mark.parametrize("resident", [True, False])
def test_emulated_selection_of_short_rows(resident, monkeypatch):
    if not resident:
        monkeypatch.setattr(mosaic_gpu_select.Problem, "resident", 0)
    visible = np.array([0, 1, 15, 16, 17, 63, 64, 65, 200], np.int32)
    scores = np.random.default_rng(1).standard_normal((len(visible), 256)).astype(np.float32)
    want = properties.numpy_select(scores, visible, 64)
    scores, maxima = _as_the_scores_kernel_leaves_them(scores, visible)
    out, races = _emulate(scores, maxima, visible, 64, SELECTIONS[0][2])
    np.testing.assert_array_equal(out, want)
    assert races == 0


def test_rows_longer_than_shared_memory_are_emulated_too():
    config = mosaic_gpu_select.SelectConfig(threads=256, rows=1, loads=1)
    problem = mosaic_gpu_select.Problem(1, 1, 1, 64, 64, 8, False, False, config)
    assert 64 < problem.resident < 65536  # of no problem of a test above, but what every launch has
    scores = np.random.default_rng(1).standard_normal((2, 65536)).astype(np.float32)
    visible = np.array([65536, 3000], np.int32)
    out, races = _emulate(scores, None, visible, 100, config)
    np.testing.assert_array_equal(out, properties.numpy_select(scores, visible, 100))
    assert races == 0


def test_the_emulator_sees_a_missing_barrier():
    class WithoutBarriers(Block):
        def barrier_aligned(self, identity, threads):
            pass

    scores = np.random.default_rng(1).standard_normal((1, 1024)).astype(np.float32)
    assert _emulate(scores, None, np.array([1024], np.int32), 64, SELECTIONS[0][2], WithoutBarriers)[1] > 0


def test_the_emulator_sees_a_copy_that_is_not_awaited():
    class WithoutWaiting(Block):
        def copies_done(self, pending=None):
            pass

    scores = np.random.default_rng(1).standard_normal((1, 1024)).astype(np.float32)
    visible = np.array([1024], np.int32)
    out, _ = _emulate(scores, None, visible, 64, SELECTIONS[0][2], WithoutWaiting)
    assert not np.array_equal(out, properties.numpy_select(scores, visible, 64))


def test_configurations_that_cannot_be_launched():
    with pytest.raises(ValueError, match="threads 100"):
        mosaic_gpu_select.SelectConfig(threads=100)
    with pytest.raises(ValueError, match="3 rows of 512"):
        mosaic_gpu_select.SelectConfig(threads=512, rows=3)
    with pytest.raises(ValueError, match="loads 5"):
        mosaic_gpu_select.SelectConfig(loads=5)


@pytest.mark.parametrize("rows", [1, 1024])
@pytest.mark.parametrize("k", [1, 2048, 4096])
@pytest.mark.parametrize("width", [256, 122_880, 2**20])
def test_default_configurations_fit_a_multiprocessor(rows, k, width):
    config = mosaic_gpu_select.default_config(rows)
    problem = mosaic_gpu_select.Problem(rows, 1, 1, width, width, k, True, True, config)
    assert config.rows * problem.row_bytes <= mosaic_gpu_select_problem.SHARED_BYTES


@pytest.mark.parametrize("k", range(1, 18))
def test_what_arrives_in_pieces_of_16_bytes_lies_so(k):
    for has_maxima in (True, False):
        config = mosaic_gpu_select.SelectConfig()
        problem = mosaic_gpu_select.Problem(2, 1, 1, 4096, 4096, k, has_maxima, True, config)
        assert (problem.buffer % 16, problem.staging % 16, problem.row_bytes % 16) == (0, 0, 0)


# ---- the Triton selection, interpreted


def test_interpreted_triton_selection():
    rows = _rows(2048)
    scores = jnp.asarray(np.stack(list(rows.values())), jnp.float32)
    for k, visible in ((64, [2048, 2047, 64, 65, 0, 1, 63, 2048, 2000, 1999, 1025, 1024, 1023]), (1100, [2040] * len(rows))):
        visible = jnp.asarray(visible, jnp.int32)
        out = triton.select(scores, visible, k, interpret=True)
        np.testing.assert_array_equal(out, reference.select(scores, visible, k))


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.parametrize("heads", [8, 32, 64])
def test_head_sums_of_hoppers_tiles_have_one_order_whatever_the_number_of_queries(heads, monkeypatch):
    """The epilogue of a warp, on arrays of its 32 lanes, where wgmma puts 16 keys and the columns of 1, 2 and 4 queries."""
    from pallas_kernels.indexer_topk import mosaic_gpu_scores_epilogue as epilogue

    lanes = np.arange(32)
    put_in_place(monkeypatch, {name: of_registers(word) for name, word in PURE.items()})
    monkeypatch.setattr(epilogue.ptx, "constant", lambda value: registers(np.full(32, value)))
    monkeypatch.setattr(epilogue, "element", lambda x, i: x[i])
    monkeypatch.setattr(epilogue, "relu", lambda x, saturate: np.maximum(x, 0))
    operators = {"mulf": of_registers(np.multiply), "addf": of_registers(np.add)}
    monkeypatch.setattr(epilogue, "fragmented_array", types.SimpleNamespace(**operators))
    shuffle = of_registers(lambda x, distance: x[lanes ^ distance])
    monkeypatch.setattr(epilogue, "utils", types.SimpleNamespace(shfl_bfly=shuffle))

    rng = np.random.default_rng(0)
    products = rng.standard_normal((4, heads, 16)).astype(np.float32)
    weights = rng.standard_normal((4, heads)).astype(np.float32)
    exact = np.einsum("qhk,qh->qk", np.maximum(products, 0).astype(np.float64), weights)

    def scores(queries: int) -> np.ndarray:
        """[4, 16], tile by tile."""
        found = np.full((4, 16), np.nan, np.float32)
        for first in range(0, 4, queries):
            tile = slice(first, first + queries)
            by_column = np.asarray(epilogue.in_columns(products[None, tile], queries))[0]
            weight = np.asarray(epilogue.in_columns(weights[None, tile], queries))[0]
            acc, of_columns = np.empty((queries * heads // 8, 2), object), np.empty(queries * heads // 8, object)
            for i in range(len(acc)):
                columns = [8 * i + 2 * (lanes % 4) + e for e in range(2)]
                of_columns[i] = [weight[c] for c in columns]
                for half in range(2):
                    acc[i, half] = [by_column[c, lanes // 4 + 8 * half] for c in columns]
            tile_of_64 = types.SimpleNamespace(shape=(64, queries * heads), registers=acc)
            of_tile = types.SimpleNamespace(registers=of_columns)
            sums = epilogue.sums_of_lane(tile_of_64, of_tile, queries, False, registers(lanes))
            place = epilogue.Place(queries)
            query, half = arrays(place.query(registers(lanes))), arrays(place.half(registers(lanes)))
            for i, x in enumerate(sums):
                found[first + query, lanes // 4 + 8 * (half + i)] = arrays(x)
        return found

    alone = scores(1)
    np.testing.assert_allclose(alone, exact, atol=1e-5 * np.abs(exact).max())
    for queries in (2, 4):
        np.testing.assert_array_equal(scores(queries), alone)
