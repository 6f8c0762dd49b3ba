"""Selections as bits."""

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
