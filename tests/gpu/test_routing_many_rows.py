"""The experts of many rows, and sorting by them, on a GPU."""

import jax
import numpy as np
import pytest

from pallas_kernels.hopper import device as hopper
from pallas_kernels.routing import api

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu" or hopper.why_not() is not None, reason=str(hopper.why_not()))


@pytest.mark.parametrize("rows, experts, choices", [(256, 64, 4), (1000, 256, 8), (10240, 64, 4)])
def test_choices_are_those_of_the_reference_but_for_near_ties(rows, experts, choices):
    logits, bias = jax.random.normal(jax.random.key(rows), (rows, experts)), jax.random.normal(jax.random.key(1), (experts,))
    options = {"choices": choices, "normalised": True, "scale": 1.8}
    (chosen, weights), (expected, exact) = (
        jax.jit(lambda a, b, name=name: api.choose(a, b, implementation=name, **options))(logits, bias)
        for name in ("mosaic_gpu", "xla")
    )
    scores = np.sort(np.asarray(jax.nn.sigmoid(logits) + bias), axis=1)[:, -choices - 1 :]
    clear = np.diff(scores, axis=1).min(axis=1) > 1e-6
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(np.asarray(chosen)[clear], np.asarray(expected)[clear])
    np.testing.assert_allclose(np.asarray(weights)[clear], np.asarray(exact)[clear], rtol=1e-5)


@pytest.mark.parametrize("size, groups", [(256, 1), (40960, 64), (81999, 256)])
def test_sorting_by_group_is_that_of_the_reference(size, groups):
    given = jax.random.randint(jax.random.key(size), (size,), 0, groups + 1)
    sort = jax.jit(api.sort_by_group, static_argnums=1, static_argnames="implementation")
    found, expected = (sort(given, groups, implementation=name) for name in ("mosaic_gpu", "xla"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
