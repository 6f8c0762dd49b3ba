"""The absorbed and the expanded form of the attention are one function."""

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import attention
from indexcache_jax.params import at_layer
from indexcache_jax.rope import cos_sin
from tests.support.tiny_models import CASES


def test_absorbed_equals_expanded_over_the_same_selection():
    case, length = CASES["deepseek-all-full"], 24
    config, p = case.config, at_layer(case.params.attention, 1)
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, length, config.hidden_size)), jnp.float32)
    turned = cos_sin(jnp.broadcast_to(jnp.arange(length), (2, length)), config)
    q_latent, latents = attention.query_latents(p, x, config), attention.latents(p, x, turned, config)
    offsets = jnp.array([7, 5, 2, 0])  # every query attends to itself and to a few before it
    indices = jnp.broadcast_to(jnp.maximum(jnp.arange(length)[:, None] - offsets, -1), (2, length, 4))

    absorbed = attention.attend(p, q_latent, latents, indices, turned, config)
    keys, values = attention.expand(p, latents, config)
    queries = jnp.concatenate(attention.queries(p, q_latent, turned, config), axis=-1)
    mask = jnp.any(indices[..., None] == jnp.arange(length), axis=2)
    heads, probabilities = attention.attend_expanded(queries, keys, values, mask, config.attention_scale)

    np.testing.assert_allclose(attention.output(p, heads), absorbed, atol=1e-5, rtol=0)
    np.testing.assert_allclose(jnp.sum(probabilities, axis=-1), 1, atol=1e-6)
    assert bool(jnp.all(jnp.where(mask, 0, probabilities) == 0))


def test_a_query_that_attends_to_nothing_gets_zeros_and_no_nan_gradient():
    ones = jnp.ones((1, 2, 1, 4))
    mask = jnp.array([[[False, False], [True, True]]])

    def total(q):
        out, probabilities = attention.attend_expanded(q, ones, ones, mask, 1.0)
        return jnp.sum(out) + jnp.sum(probabilities), out

    gradient, out = jax.grad(total, has_aux=True)(ones)
    assert out[0, 0].tolist() == [[0.0] * 4]
    assert out[0, 1].tolist() == [[1.0] * 4]
    assert bool(jnp.all(jnp.isfinite(gradient)))
