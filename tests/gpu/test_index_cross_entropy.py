"""Hopper's kernels of denominators, targets and what index scores miss of them against full arrays in float32, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import bits, hopper
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

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

CASES = [
    Case(1, 300, 2, 192, 128, 4, 128),
    Case(2, 640, 3, 128, 128, 2, 64),  # two rows of a batch, an odd number of heads
    Case(1, 1500, 4, 256, 64, 8, 128),  # wide heads, which take keys 64 at a time
    Case(1, 100, 1, 64, 64, 1, 64),  # below a tile
    Case(1, 2048, 16, 192, 128, 16, 128),
    Case(2, 200, 3, 48, 80, 3, 24),  # widths that are padded
]
kernels = (
    functools.partial(pallas_kernels.attention_denominators, scale=SCALE, implementation="mosaic_gpu"),
    functools.partial(pallas_kernels.attention_target, scale=SCALE, implementation="mosaic_gpu"),
    functools.partial(pallas_kernels.index_cross_entropy, implementation="mosaic_gpu"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_the_written_out_form_and_repeat_themselves(case):
    run = jax.jit(lambda given, words: computed_by_parts(*kernels, given, words, 0.5))
    for kind in KINDS:
        given = inputs(case, kind, jnp.bfloat16)
        words = bits.pack(jnp.asarray(indices_of(given.mask)), case.s)
        found, again = (jax.device_get(run(given, words)) for _ in range(2))
        for name, x in found.items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(again[name]), err_msg=f"{kind} {name}")
        assert_close(found, written_out(given, 0.5), 1.2e-2, rounded=2e-3)


def test_blocks_of_queries_do_not_change_the_gradient(monkeypatch):
    from pallas_kernels.index_cross_entropy import mosaic_gpu

    case = CASES[2]
    given = inputs(case, "random", jnp.bfloat16)
    words = bits.pack(jnp.asarray(indices_of(given.mask)), case.s)
    whole = computed_by_parts(*kernels, given, words, 1.0)
    monkeypatch.setattr(mosaic_gpu, "BLOCK_BYTES", 4 * case.s * 128)
    assert_close(computed_by_parts(*kernels, given, words, 1.0), whole, 1e-2, 1e-5, rounded=1e-4)


def test_queries_at_any_ascending_positions_see_their_own_keys():
    """Two pieces of a row, as a device has them that shares it with three others; the keys after the second go unread."""
    case = Case(2, 2048, 4, 192, 128, 4, 128)
    queries = np.concatenate([np.arange(256, 512), np.arange(1536, 1792)]).astype(np.int32)
    of_pieces = [functools.partial(kernel, q_positions=jnp.asarray(queries)) for kernel in kernels]
    for kind in KINDS:
        given = some_queries(inputs(case, kind, jnp.bfloat16), queries)
        words = bits.pack(jnp.asarray(indices_of(given.mask)), case.s)
        found = jax.jit(lambda *given: computed_by_parts(*of_pieces, *given, 0.5))(given, words)
        assert_close(found, written_out(given, 0.5), 1.2e-2, rounded=2e-3)
