"""Selections as bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bits
from tests.support.selection_cases import KINDS, Case, indices_of, inputs

CASE = Case(2, 37, 3, 16, 8, 2, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_hold_a_selection(kind):
    given = inputs(CASE, kind, jnp.float32)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), CASE.s)
    assert words.shape == (CASE.b, 2, CASE.s)
    np.testing.assert_array_equal(bits.unpack(words, CASE.s), given.mask)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_causal_bits(size):
    words = bits.causal(2, size, size)
    np.testing.assert_array_equal(
        bits.unpack(words, size), np.broadcast_to(np.tril(np.ones((size, size), bool)), (2, size, size))
    )


def test_more_words_than_an_index_counts_are_refused():
    def words(batch, queries, keys):
        return jax.eval_shape(functools.partial(bits.pack, keys=keys), jax.ShapeDtypeStruct((batch, queries, 4), jnp.int32))

    assert words(1, 262_143, 262_144).shape == (1, 8192, 262_143)
    with pytest.raises(ValueError, match=r"at most 2147483647 words, 2 x ceil\(131073 / 32\) x 262144 are 2148007936"):
        words(2, 262_144, 131_073)
