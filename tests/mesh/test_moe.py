"""Experts split over devices compute every choice, however the tokens choose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import moe, params, sharding
from indexcache_jax.params import at_layer
from tests.support.tiny_models import CASES

CASE = CASES["glm-mixed"]
LAYER = at_layer(CASE.params.moe, 0)
TOKENS = jnp.asarray(np.random.RandomState(0).standard_normal((8, 64, 64)), jnp.float32)
E, K = CASE.config.n_routed_experts, CASE.config.num_experts_per_tok

ROUTINGS = {
    "the router's": np.asarray(moe.route(LAYER, TOKENS, CASE.config)[0]),
    "all to the first device": np.broadcast_to(np.arange(K), (8, 64, K)) % 2,
    "all to the last": np.broadcast_to(E - 1 - np.arange(K), (8, 64, K)),
    "none to most": np.where(np.arange(64)[:, None] < 60, np.arange(K), E - K + np.arange(K))[None].repeat(8, axis=0),
}


@pytest.fixture
def little_room(monkeypatch):
    """Room for an even share of these few tokens' choices, so that an uneven share takes several pieces."""
    monkeypatch.setattr(moe, "SMALL_BUFFER", 0)
    jax.clear_caches()


def on_mesh(function, sizes, *arguments):
    with sharding.use(sharding.make_mesh(**sizes)):
        layer = sharding.put(LAYER, at_layer_of_tree())
        return jax.jit(function)(layer, *arguments)


def at_layer_of_tree():
    tree = params.abstract(CASE.config, CASE.schedule).moe
    return jax.tree.map(lambda t: dataclasses.replace(t, shape=t.shape[1:], axes=t.axes[1:], stacked=False), tree)


def loss(layer, tokens, experts, weights):
    return jnp.sum(jnp.sin(moe.routed(layer, tokens, experts, weights, CASE.config)))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
def test_results_and_gradients_are_those_of_one_device(little_room, sizes, routing):
    experts = ROUTINGS[routing]
    weights = jnp.asarray(np.random.RandomState(1).uniform(0.1, 1, experts.shape), jnp.float32)
    step = jax.value_and_grad(loss, argnums=(0, 1, 3), allow_int=True)
    step = jax.value_and_grad(lambda layer, tokens, weights: loss(layer, tokens, experts, weights), argnums=(0, 1, 2))
    expected, found = jax.jit(step)(LAYER, TOKENS, weights), on_mesh(step, sizes, TOKENS, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)
    assert float(jnp.max(jnp.abs(expected[1][0].gate_up))) > 0
