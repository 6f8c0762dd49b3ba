"""The GPU implementations of indexer_topk against NumPy and the reference: `pytest tests/gpu` on a machine with a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, quant, select_topk
from pallas_kernels.indexer_topk import mosaic_gpu_scores, mosaic_gpu_select, reference
from tests.support import indexer_topk_properties as properties

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
FORMATS = list(properties.FORMATS)
on_hopper = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))
IMPLEMENTATIONS = [pytest.param("mosaic_gpu", marks=on_hopper), "triton"]
# Heads and widths as they are and padded, tiles of 1, 2 and 4 queries, keys that end within a tile, decoding.
SHAPES = [
    ((1, 64, 32, 128, 5000), 512),
    ((2, 37, 64, 128, 3001), 300),
    ((3, 1, 32, 128, 4096), 64),
    ((2, 3, 16, 128, 1000), 50),
    ((3, 7, 12, 64, 301), 100),
    ((2, 5, 4, 32, 777), 8),
    ((8, 1, 64, 128, 9000), 2048),
    ((1, 2, 8, 128, 70000), 4096),
    ((2, 3, 8, 128, 40), 64),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("shape, k", SHAPES)
def test_integers(implementation, number_format, shape, k):
    properties.check_integers(implementation, number_format, shape=shape, k=k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", properties.PATTERNS)
def test_patterns(implementation, name):
    for number_format in FORMATS:
        for k in (1, 64, 1000):
            properties.check_pattern(implementation, number_format, name, k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("name", properties.PROPERTIES)
def test_properties(implementation, name, number_format):
    properties.PROPERTIES[name](implementation, number_format)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_scores(implementation):
    properties.check_infinite_scores(implementation)


@on_hopper
@pytest.mark.parametrize(
    "number_format, heads, queries",
    [("fp8", 32, 16), ("bfloat16", 32, 16), ("fp8", 64, 5), ("bfloat16", 64, 1), ("fp8", 16, 7), ("bfloat16", 8, 3)],
)
def test_scores_and_their_block_maxima(number_format, heads, queries):
    """Within rounding of the reference, hidden ones and NaN as -inf, and the maxima those of the scores."""
    rng = np.random.default_rng(0)
    b, t = 2, 3000
    q, k, w = (rng.standard_normal(shape) for shape in ((b, queries, heads, 128), (b, t, 128), (b, queries, heads)))
    q, k, w, scales = jnp.asarray(q), jnp.asarray(k).at[0, 5].set(jnp.nan), jnp.asarray(w, jnp.float32), None
    if number_format == "fp8":
        (q, q_scales), (k, scales) = quant.quantise_index(q), quant.quantise_index(k)
        w = w * q_scales
    else:
        q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    positions, lengths = jnp.asarray(rng.integers(100, t, (b, queries)), jnp.int32), jnp.array([t, 1777], jnp.int32)
    scores, maxima = (np.asarray(x) for x in jax.jit(mosaic_gpu_scores.scores)(q, k, w, scales, positions, lengths))
    wanted = np.asarray(jax.vmap(reference.scores)(q, k, w, scales))
    for i, j in np.ndindex(b, queries):
        seen = int(min(positions[i, j] + 1, lengths[i]))
        end = -(-seen // 16) * 16
        want = np.where(np.isnan(wanted[i, j]), -np.inf, wanted[i, j])[:seen]
        tolerance = 5e-4 * np.abs(want[np.isfinite(want)]).max()  # 8-bit products are summed with fewer bits
        np.testing.assert_allclose(scores[i, j, :seen], want, atol=tolerance)
        assert np.all(np.isneginf(scores[i, j, seen:end]))
        np.testing.assert_array_equal(maxima[i, j, : end // 16], scores[i, j, :end].reshape(-1, 16).max(1))


@on_hopper
@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("heads", mosaic_gpu_scores.HEADS)
def test_a_score_is_the_same_in_units_of_every_shape(number_format, heads):
    rng = np.random.default_rng(0)
    b, s, t = 2, 21, 1000
    q, k, w = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((b, s, heads, 128), (b, t, 128), (b, s, heads))
    )
    scales = None
    if number_format == "fp8":
        (q, q_scales), (k, scales) = quant.quantise_index(q), quant.quantise_index(k)
        w = w * q_scales
    else:
        q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    positions, lengths = jnp.full((b, s), t - 1, jnp.int32).at[0, 3:9].set(100), jnp.array([t, t // 2], jnp.int32)
    config = mosaic_gpu_scores.default_config(b, s, heads, t, q.dtype)
    found = []
    for queries, tiles in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
        columns = queries * heads
        if columns <= mosaic_gpu_scores.COLUMNS and (tiles == 1 or columns % 32 == 0):
            unit = dataclasses.replace(config, queries=queries, tiles=tiles, stages=2, run=2)
            run = functools.partial(mosaic_gpu_scores.scores, config=unit)
            scores = np.asarray(jax.jit(run)(q, k, w, scales, positions, lengths)[0])
            seen = np.minimum(np.asarray(positions) + 1, np.asarray(lengths)[:, None])
            found.append([scores[i, j, : seen[i, j]] for i, j in np.ndindex(b, s)])
    for other in found[1:]:
        np.testing.assert_array_equal(np.concatenate(other), np.concatenate(found[0]))


@on_hopper
@pytest.mark.parametrize("width, k", [(122_880, 2048), (32_768, 2048), (4096, 64), (2**20, 4096)])
@pytest.mark.parametrize("config", [mosaic_gpu_select.SelectConfig(), mosaic_gpu_select.SelectConfig(threads=1024, rows=1)])
def test_selection_of_given_scores(width, k, config):
    rng = np.random.default_rng(0)
    normal, place = rng.standard_normal(width).astype(np.float32), np.arange(width)
    rows = np.stack(
        [
            normal,
            np.round(normal * 8) / 8,
            np.full_like(normal, -1.5),
            np.sort(normal),
            np.sort(normal)[::-1],
            np.where(normal > 2.2, normal, np.where(normal > 0, 0.0, -0.0)),
            np.full_like(normal, -np.inf),
            np.where(place % 3 == 0, np.nan, normal),
            np.where(place % (width // 128) < 32, normal + 20, normal - 50 * (place > width // 2)),
        ]
    ).astype(np.float32)
    visible = width - np.arange(len(rows)) * 3
    want = properties.numpy_select(rows, visible, k)
    positions, lengths = jnp.asarray(visible - 1, jnp.int32)[None], jnp.full((1,), width, jnp.int32)
    run = jax.jit(
        lambda scores, maxima, clean: mosaic_gpu_select.select(
            scores[None], maxima, positions, lengths, k, clean=clean, config=config
        ),
        static_argnums=2,
    )
    np.testing.assert_array_equal(run(rows, None, False)[0], want)
    hidden = np.isnan(rows) | (place >= visible[:, None])
    clean = np.where(hidden, -np.inf, rows)
    maxima = clean.reshape(1, len(rows), -1, 16).max(-1)
    first, second = run(clean, maxima, True), run(clean, maxima, True)
    np.testing.assert_array_equal(first[0], want)
    np.testing.assert_array_equal(first, second)


@on_hopper
@pytest.mark.parametrize("width, k", [(16_384, 2048), (8192, 2048), (1000, 64), (40, 64), (131_072, 2048)])
def test_candidates_of_several_devices_are_selected_from(width, k):
    """Rows that see all, a part, less than k and nothing; ties, NaN and -inf."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((2, 3, width)).astype(np.float32)
    scores = np.where(normal > 1, np.nan, np.where(normal < -1, -np.inf, np.round(normal * 64) / 64))
    visible = np.array([[width, width - 5, 1], [0, k, width // 2]])
    run = jax.jit(functools.partial(select_topk, k_select=k, implementation="mosaic_gpu"))
    np.testing.assert_array_equal(run(scores, visible), properties.numpy_select(scores, visible, k))
