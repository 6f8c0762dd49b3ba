"""The experts of many rows, and sorting by them: the kernels for Hopper, run on NumPy, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.routing import api, reference
from pallas_kernels.routing.choice import Choice
from tests.support.rows import run_program

interpreted = pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")


@interpreted
@pytest.mark.parametrize(
    "rows, experts, choices, tied, groups",
    [(19, 64, 4, False, (1, 1)), (9, 256, 8, True, (8, 4)), (8, 96, 3, True, (1, 1))],
)
def test_hoppers_choice_is_that_of_the_reference(monkeypatch, rows, experts, choices, tied, groups):
    from pallas_kernels.routing import mosaic_gpu_many_rows as many

    random = np.random.default_rng(rows)
    logits, bias = (
        random.standard_normal((rows, experts)).astype(np.float32),
        random.standard_normal(experts).astype(np.float32),
    )
    logits, bias = (np.round(x) for x in (logits, bias)) if tied else (logits, bias)
    n_group, topk_group = groups
    options = dict(choices=choices, normalised=rows % 2 == 1, scale=1.8, n_group=n_group, topk_group=topk_group)
    outputs = [np.zeros(rows * choices, np.int32) for _ in range(2)]
    program = many.choose_program(rows, Choice(experts, **options))
    chosen, weights = run_program(monkeypatch, program, -(-rows // 8), [logits, bias], outputs)
    expected = reference.choose(jnp.asarray(logits), jnp.asarray(bias), **options)
    np.testing.assert_array_equal(chosen.reshape(rows, choices), expected[0])
    np.testing.assert_allclose(weights.view(np.float32).reshape(rows, choices), expected[1], rtol=1e-5)


@interpreted
@pytest.mark.parametrize("size, groups", [(1, 1), (256, 5), (700, 64), (1100, 300)])
def test_hoppers_sort_is_stable_and_complete(monkeypatch, size, groups):
    from pallas_kernels.routing import mosaic_gpu_many_rows as many

    given = np.random.default_rng(size).integers(0, groups + 1, size).astype(np.int32)  # `groups` stands for none
    starts, sizes = many.starts_of(jnp.asarray(given), groups)
    outputs = [np.full(size, -1, np.int32) for _ in range(2)]
    program = many.sort_program(size, groups + 1)
    order, back = run_program(monkeypatch, program, starts.shape[0], [given, starts], outputs, 8 * (groups + 1))
    for found, expected in zip((order, back, sizes), reference.sort_by_group(jnp.asarray(given), groups), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_weights_have_a_gradient():
    logits, bias = jax.random.normal(jax.random.key(0), (5, 32)), jnp.zeros(32)
    options = {"choices": 3, "normalised": True, "scale": 2.0}

    def loss(logits):
        return jnp.sum(api.choose(logits, bias, **options)[1] ** 2)

    step = 1e-2 * jax.random.normal(jax.random.key(1), logits.shape)
    found = jnp.sum(jax.grad(loss)(logits) * step)
    np.testing.assert_allclose(found, (loss(logits + step) - loss(logits - step)) / 2, rtol=2e-2)


@interpreted
def test_what_hoppers_kernels_do_not_take():
    from pallas_kernels.routing import mosaic_gpu_many_rows as many

    options = {"choices": 4, "normalised": True, "scale": 1.0}
    assert many.why_not(jnp.zeros((256, 64)), jnp.zeros(64), **options) is None
    assert "not 255" in many.why_not(jnp.zeros((255, 64)), jnp.zeros(64), **options)
    assert "not 40 and 4" in many.why_not(jnp.zeros((256, 40)), jnp.zeros(40), **options)
    assert "not bfloat16" in many.why_not(jnp.zeros((256, 64), jnp.bfloat16), jnp.zeros(64), **options)
    assert many.why_not_sort(jnp.zeros(256, jnp.int32), 64) is None
    assert "not 255 of 64" in many.why_not_sort(jnp.zeros(255, jnp.int32), 64)
    assert "of 1024" in many.why_not_sort(jnp.zeros(256, jnp.int32), 1024)
    with pytest.raises(ValueError, match=r"got \(2, 32\), \(31,\), 4"):
        api.choose(jnp.zeros((2, 32)), jnp.zeros(31), choices=4, normalised=True, scale=1.0)
