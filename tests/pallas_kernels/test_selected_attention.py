"""Attention by bits and the divergence: the reference, and Hopper's kernels interpreted, against full arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import bits
from pallas_kernels.index_divergence import reference as divergence_reference
from pallas_kernels.selected_attention import reference as attention_reference
from tests.support.interpreted_products import multiply_plainly
from tests.support.selection_cases import (
    KINDS,
    SCALE,
    Case,
    assert_close,
    computed,
    indices_of,
    inputs,
    some_queries,
    written_out,
)

SMALL = Case(2, 37, 3, 16, 8, 2, 8)
# A ragged end, several tiles of queries and of keys; the width of values below that of keys.
TILES = Case(1, 300, 2, 128, 64, 2, 64)
# Two tiles of queries of which the first sees two tiles of keys, the second three.
TWO_PIECES = np.concatenate([np.arange(20, 148), np.arange(200, 290)]).astype(np.int32)
xla = (
    functools.partial(pallas_kernels.selected_attention, scale=SCALE, implementation="xla"),
    functools.partial(pallas_kernels.index_divergence, scale=SCALE, implementation="xla"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_the_written_out_form(kind):
    given = inputs(SMALL, kind, jnp.float32)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), SMALL.s)
    found = jax.jit(lambda: computed(*xla, given, words, 0.7))()
    assert_close(found, written_out(given, 0.7), 1e-5, 1e-5)
    if kind == "nothing":
        assert not any(np.any(x) for x in found.values())


def test_blocks_do_not_change_the_reference(monkeypatch):
    given = inputs(SMALL, "random", jnp.float32)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), SMALL.s)
    row = 4 * SMALL.b * SMALL.s
    monkeypatch.setattr(attention_reference, "LOGIT_BYTES", 5 * row * SMALL.heads)
    monkeypatch.setattr(divergence_reference, "LOGIT_BYTES", 5 * row * (SMALL.heads + SMALL.index_heads))
    assert_close(computed(*xla, given, words, 1.0), written_out(given, 1.0), 1e-5, 1e-5)


def test_the_divergence_has_the_slope_of_finite_differences():
    given = inputs(SMALL, "random", jnp.float32)
    q, k, v = given.attention
    words = bits.pack(jnp.asarray(indices_of(given.mask)), SMALL.s)
    lse = xla[0](q, k, v, words)[1]
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) * jnp.std(x), given.index)

    @jax.jit
    def value(step):
        moved = jax.tree.map(lambda x, d: x + step * d, given.index, direction)
        return xla[1](*moved, q, k, lse, words)

    slope = float(value(1e-3) - value(-1e-3)) / 2e-3
    assert abs(slope) > 0.1
    np.testing.assert_allclose(float(jax.grad(value)(0.0)), slope, rtol=0.02)


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.parametrize("kind", ["random", pytest.param("causal", marks=pytest.mark.slow)])
@pytest.mark.parametrize("queries", [None, pytest.param(TWO_PIECES, marks=pytest.mark.slow)], ids=["all", "two pieces"])
def test_hoppers_kernels_interpreted_equal_the_written_out_form(kind, queries, monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.attention_target import mosaic_gpu as target
    from pallas_kernels.index_cross_entropy import mosaic_gpu as cross_entropy
    from pallas_kernels.index_divergence import mosaic_gpu as divergence
    from pallas_kernels.selected_attention import mosaic_gpu as attention

    multiply_plainly(monkeypatch, attention, target, cross_entropy)
    monkeypatch.setattr(divergence, "BLOCK_BYTES", 4 * TILES.s * 128)  # three blocks of queries
    given = inputs(TILES, kind, jnp.bfloat16)
    given = given if queries is None else some_queries(given, queries)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), TILES.s)
    options = {
        "scale": SCALE,
        "q_positions": None if queries is None else jnp.asarray(queries),
        "interpret": plgpu.InterpretGPUParams(),
    }
    attend = functools.partial(attention.selected_attention, **options)
    diverge = functools.partial(divergence.index_divergence, **options)
    found = computed(attend, diverge, given, words, 0.7)
    assert_close(found, written_out(given, 0.7), 1e-2, rounded=2e-3)


def test_the_tiles_seen_are_those_of_the_last_query_of_each_tile():
    tiles = pytest.importorskip("pallas_kernels.hopper.tiles", reason="it needs JAX's Mosaic GPU", exc_type=ImportError)
    every = tiles.tiles_seen(None, 300, 300)
    np.testing.assert_array_equal(every, [1, 2, 3])
    np.testing.assert_array_equal(tiles.first_seeing(every, 300), [0, 1, 2])
    pieces = tiles.tiles_seen(jnp.asarray(TWO_PIECES), 218, 400)
    np.testing.assert_array_equal(pieces, [2, 3])
    np.testing.assert_array_equal(tiles.first_seeing(pieces, 400), [0, 0, 1, 2])


def test_what_does_not_fit_is_named():
    given = inputs(SMALL, "causal", jnp.float32)
    words = bits.causal(SMALL.b, SMALL.s, SMALL.s)
    q, k, v = given.attention
    with pytest.raises(ValueError, match=r"selected_attention: shapes do not fit together: queries \[B, S, H, D\] is"):
        xla[0](q, k, v, words[:, :1])
    with pytest.raises(ValueError, match=r"index_divergence: .*selection_bits \[B, ceil\(T / 32\), S\] is"):
        xla[1](*given.index, q, k, jnp.zeros((SMALL.b, SMALL.s)), words)
    with pytest.raises(ValueError, match=r"selected_attention: .*q_positions \[S\] is \(36,\)"):
        xla[0](q, k, v, words, q_positions=jnp.arange(SMALL.s - 1))
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="it needs a Hopper GPU"):
            pallas_kernels.selected_attention(q, k, v, words, scale=SCALE, implementation="mosaic_gpu")
