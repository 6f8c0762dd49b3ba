"""The language loss with its gradient made in the forward pass, against autodiff of the written-out one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import language_loss


def written_out(h, head, targets):
    log_p = jax.nn.log_softmax(jnp.dot(h, head, precision="highest"), axis=-1)
    return -jnp.sum(jnp.take_along_axis(log_p, targets[:, None], axis=-1))


@pytest.mark.parametrize("rows", [37, 10, 1])
def test_equals_the_written_out_loss_and_its_gradient_in_any_blocks(rows, monkeypatch):
    monkeypatch.setattr(language_loss, "LOGIT_BYTES", 4 * 50 * rows)
    rng = np.random.default_rng(0)
    h, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((37, 8), (8, 50)))
    targets = jnp.asarray(rng.integers(50, size=37), jnp.int32)
    found = jax.value_and_grad(lambda *x: 0.3 * language_loss.summed_loss(*x, targets), argnums=(0, 1))(h, head)
    expected = jax.value_and_grad(lambda *x: 0.3 * written_out(*x, targets), argnums=(0, 1))(h, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)
    np.testing.assert_allclose(language_loss.summed_loss(h, head, targets), written_out(h, head, targets), rtol=1e-6)


def test_the_gradient_of_bfloat16_arrays_is_as_close_as_its_rounding():
    rng = np.random.default_rng(1)
    h, head = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((64, 32), (32, 200)))
    targets = jnp.asarray(rng.integers(200, size=64), jnp.int32)
    found = jax.grad(language_loss.summed_loss, argnums=(0, 1))(h, head, targets)
    expected = jax.grad(written_out, argnums=(0, 1))(h.astype(jnp.float32), head.astype(jnp.float32), targets)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))) < 0.02 * float(jnp.max(jnp.abs(b)))
