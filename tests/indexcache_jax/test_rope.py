"""Rotary frequencies and layouts."""

import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax.config import Config, preset
from indexcache_jax.rope import cos_sin, frequencies, rotate


def test_plain_frequencies_fall_geometrically():
    f = frequencies(Config.from_hf(preset("glm-5")))
    assert f.shape == (32,)
    assert f[0] == 1.0
    np.testing.assert_allclose(f[1:] / f[:-1], 1e6 ** (-2 / 64))


def test_deepseeks_yarn_keeps_fast_pairs_and_divides_slow_ones():
    """With its 4096 positions and theta 10000 the blend runs from pair 10 to pair 23."""
    f = frequencies(Config.from_hf(preset("deepseek-v3.2")))
    plain = 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(f[:11], plain[:11])
    np.testing.assert_allclose(f[23:], plain[23:] / 40)
    np.testing.assert_allclose(f[11:23], plain[11:23] * (1 - np.arange(1, 13) / 13 * (1 - 1 / 40)))


@pytest.mark.parametrize("interleaved", [True, False])
def test_dot_products_depend_on_the_distance_only(interleaved):
    config = Config.from_hf(preset("deepseek-v3.2"))
    q, k = np.random.RandomState(0).standard_normal((2, 64)).astype(np.float32)

    def product(position, other):
        cos, sin = cos_sin(jnp.array([[position, other]]), config)
        turned = rotate(jnp.array([[q, k]]), cos, sin, interleaved=interleaved)[0]
        return float(turned[0] @ turned[1])

    assert product(700, 100) == pytest.approx(product(600, 0), abs=1e-3)
    assert abs(product(700, 100) - product(700, 699)) > 0.1


def test_layouts_pair_neighbours_or_halves():
    quarter = (jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2)))  # cos, sin of a right angle: (a, b) becomes (-b, a)
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    assert rotate(x, *quarter, interleaved=True)[0, 0].tolist() == [-2.0, 1.0, -4.0, 3.0]
    assert rotate(x, *quarter, interleaved=False)[0, 0].tolist() == [-3.0, -4.0, 1.0, 2.0]
