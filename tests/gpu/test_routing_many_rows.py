"""The experts of many rows, and sorting by them, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import moe
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from pallas_kernels import hopper
from pallas_kernels.routing import api
from tests.support.attention_cases import relative_error

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu" or hopper.why_not() is not None, reason=str(hopper.why_not()))


@pytest.mark.parametrize(
    "rows, experts, choices, groups", [(256, 64, 4, 1), (1000, 256, 8, 1), (10240, 64, 4, 1), (4096, 256, 8, 8)]
)
def test_choices_are_those_of_the_reference_but_for_near_ties(rows, experts, choices, groups):
    """groups: of experts, half of which are kept."""
    logits, bias = jax.random.normal(jax.random.key(rows), (rows, experts)), jax.random.normal(jax.random.key(1), (experts,))
    options = dict(choices=choices, normalised=True, scale=1.8, n_group=groups, topk_group=-(-groups // 2))
    (chosen, weights), (expected, exact) = (
        jax.jit(lambda a, b, name=name: api.choose(a, b, implementation=name, **options))(logits, bias)
        for name in ("mosaic_gpu", "xla")
    )
    scores = np.asarray(jax.nn.sigmoid(logits) + bias).reshape(rows, groups, -1)
    quality = np.sort(scores, axis=2)[..., -2:].sum(axis=2)
    kept = np.argsort(quality, axis=1)[:, groups // 2 :]
    best = np.sort(np.take_along_axis(scores, kept[..., None], axis=1).reshape(rows, -1), axis=1)[:, -choices - 1 :]
    clear = np.diff(best, axis=1).min(axis=1) > 1e-6
    if groups > 1:
        border = np.sort(quality, axis=1)[:, groups // 2 - 1 : groups // 2 + 1]
        clear &= np.diff(border, axis=1)[:, 0] > 1e-6
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


def test_experts_of_many_rows_have_the_gradient_of_xla(monkeypatch):
    fields = {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 64, "num_experts_per_tok": 4}
    config = Config.from_hf(preset("30b") | fields)
    keys = jax.random.split(jax.random.key(0), 4)
    gate_up = jax.random.normal(keys[0], (64, 128, 2, 128), jnp.bfloat16) / 12
    down = jax.random.normal(keys[1], (64, 128, 128), jnp.bfloat16) / 12
    logits, tokens = jax.random.normal(keys[2], (512, 64)), jax.random.normal(keys[3], (512, 128), jnp.bfloat16)

    def loss(logits, tokens, gate_up, down):
        out = moe.routed(moe.Matrices(gate_up, down), tokens, *moe.choose(logits, jnp.zeros(64), config), config)
        return jnp.sum(out**2)

    found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(logits, tokens, gate_up, down)
    monkeypatch.setattr(hopper, "why_not", lambda: "the kernels are left out")
    jax.clear_caches()
    expected = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(logits, tokens, gate_up, down)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 2e-2
