"""Denominators, targets and what index scores miss of them: the references, and Hopper's kernels interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import bits
from pallas_kernels.attention_denominators import reference as denominators_reference
from pallas_kernels.index_cross_entropy import reference as cross_entropy_reference
from tests.support.interpreted_products import multiply_plainly
from tests.support.selection_cases import (
    KINDS,
    SCALE,
    Case,
    assert_close,
    computed_by_parts,
    indices_of,
    inputs,
    some_queries,
    written_out,
)

SMALL = Case(2, 37, 3, 16, 8, 2, 8)
# A ragged end and several tiles of queries and of keys; heads in pairs, and wide ones beside an odd number of index heads.
TILES, WIDE = Case(1, 300, 2, 128, 64, 2, 64), Case(1, 140, 1, 256, 64, 3, 64)
TWO_PIECES = np.concatenate([np.arange(20, 148), np.arange(200, 290)]).astype(np.int32)
xla = (
    functools.partial(pallas_kernels.attention_denominators, scale=SCALE, implementation="xla"),
    functools.partial(pallas_kernels.attention_target, scale=SCALE, implementation="xla"),
    functools.partial(pallas_kernels.index_cross_entropy, implementation="xla"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_references_equal_the_written_out_form(kind):
    given = inputs(SMALL, kind, jnp.float32)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), SMALL.s)
    found = jax.jit(lambda: computed_by_parts(*xla, given, words, 0.7))()
    assert_close(found, written_out(given, 0.7), 1e-5, 1e-5, rounded=2e-4)
    if kind == "nothing":
        assert not any(np.any(x) for x in found.values())


def test_blocks_do_not_change_the_references(monkeypatch):
    given = inputs(SMALL, "random", jnp.float32)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), SMALL.s)
    row = 4 * SMALL.b * SMALL.s
    monkeypatch.setattr(denominators_reference, "LOGIT_BYTES", 5 * row * SMALL.heads)
    monkeypatch.setattr(cross_entropy_reference, "LOGIT_BYTES", 5 * row * (SMALL.index_heads + 1))
    assert_close(computed_by_parts(*xla, given, words, 1.0), written_out(given, 1.0), 1e-5, 1e-5, rounded=2e-4)


def test_a_mean_of_targets_has_the_gradient_of_the_mean_of_divergences():
    given = inputs(SMALL, "random", jnp.float32)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), SMALL.s)
    q, k, _ = given.attention
    layers = [(q, k), (2 * q, k), (q, -k)]
    _, add_target, miss = xla
    diverge = functools.partial(pallas_kernels.index_divergence, scale=SCALE, implementation="xla")

    def of_each(*index):
        return sum(diverge(*index, q, k, xla[0](q, k, words), words) for q, k in layers) / 3

    def of_mean(*index):
        total, entropies = jnp.zeros((SMALL.b, SMALL.s, SMALL.s)), 0.0
        for q, k in layers:
            total, entropy = add_target(total, q, k, xla[0](q, k, words), words, share=1 / 3)
            entropies = entropies + jnp.sum(entropy) / 3
        return miss(*index, total, words) - entropies

    expected, found = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*given.index) for f in (of_each, of_mean))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.parametrize("case", [TILES, pytest.param(WIDE, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", ["random", pytest.param("causal", marks=pytest.mark.slow)])
@pytest.mark.parametrize("queries", [None, pytest.param(TWO_PIECES, marks=pytest.mark.slow)], ids=["all", "two pieces"])
def test_hoppers_kernels_interpreted_equal_the_written_out_form(case, kind, queries, monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.attention_denominators import mosaic_gpu as denominators
    from pallas_kernels.attention_target import mosaic_gpu as target
    from pallas_kernels.index_cross_entropy import mosaic_gpu as cross_entropy

    multiply_plainly(monkeypatch, denominators, target, cross_entropy)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 4 * 384 * 128)  # blocks of one tile of queries
    given = inputs(case, kind, jnp.bfloat16)
    queries = None if queries is None else queries[queries < case.s]
    given = given if queries is None else some_queries(given, queries)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), case.s)
    options = {"q_positions": None if queries is None else jnp.asarray(queries), "interpret": plgpu.InterpretGPUParams()}

    def add_target(*arrays, share):
        return target.attention_target(*arrays, jnp.asarray(share, jnp.float32), scale=SCALE, **options)

    denominate = functools.partial(denominators.attention_denominators, scale=SCALE, **options)
    miss = functools.partial(cross_entropy.index_cross_entropy, **options)
    found = computed_by_parts(denominate, add_target, miss, given, words, 0.7)
    assert_close(found, written_out(given, 0.7), 1e-2, rounded=2e-3)


def test_what_does_not_fit_is_named():
    given = inputs(SMALL, "causal", jnp.float32)
    words = bits.causal(SMALL.b, SMALL.s, SMALL.s)
    q, k, _ = given.attention
    total, lse = jnp.zeros((SMALL.b, SMALL.s, SMALL.s)), jnp.zeros((SMALL.b, SMALL.heads, SMALL.s))
    with pytest.raises(ValueError, match=r"attention_denominators: .*selection_bits \[B, ceil\(T / 32\), S\] is"):
        xla[0](q, k, words[:, :1])
    with pytest.raises(ValueError, match=r"attention_target: shapes do not fit together: total \[B, S, T\] is"):
        xla[1](total[:, 1:], q, k, lse, words, share=1.0)
    with pytest.raises(ValueError, match=r"index_cross_entropy: .*target \[B, S, T\] is"):
        xla[2](*given.index, total[..., 1:], words)
    with pytest.raises(ValueError, match=r"index_cross_entropy: selection_bits must be int32, got float32"):
        xla[2](*given.index, total, words.astype(jnp.float32))
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="it needs a Hopper GPU"):
            pallas_kernels.index_cross_entropy(*given.index, total, words, implementation="mosaic_gpu")
