"""Routing chooses as described, and both ways of running the experts compute the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import moe
from indexcache_jax.params import at_layer
from tests.support.tiny_models import CASES

CASE = CASES["deepseek-all-full"]
LAYER = at_layer(CASE.params.moe, 0)
TOKENS = jnp.asarray(np.random.RandomState(0).standard_normal((50, 64)), jnp.float32)


def test_both_ways_of_running_the_experts_compute_the_same():
    routing = moe.route(LAYER, TOKENS, CASE.config)
    few, many = moe._every_expert(LAYER, TOKENS, *routing), moe._sorted_by_expert(LAYER, TOKENS, *routing)
    np.testing.assert_allclose(few, many, atol=1e-5, rtol=0)
    assert float(jnp.std(many)) > 0.1


def test_loads_count_the_tokens_of_every_expert():
    assert moe.tokens_per_expert(jnp.array([[3, 1], [1, 0], [1, 3]]), 5).tolist() == [1, 3, 0, 2, 0]


def test_experts_come_from_the_best_groups_only():
    """4 groups of 2, 2 kept: a group counts by its two best experts together, here the sum of all it has."""
    experts, _ = moe.route(LAYER, TOKENS, CASE.config)
    choice = 1 / (1 + np.exp(-np.asarray(TOKENS @ LAYER.router))) + np.asarray(LAYER.router_bias)
    groups = choice.reshape(-1, 4, 2).sum(axis=-1)
    kept = np.argsort(-groups, axis=1)[:, :2]
    assert all(set(chosen // 2) <= set(allowed) for chosen, allowed in zip(np.asarray(experts), kept, strict=True))
    free, _ = moe.route(LAYER, TOKENS, dataclasses.replace(CASE.config, n_group=1, topk_group=1))
    assert np.any(np.sort(free, axis=1) != np.sort(experts, axis=1))


def test_the_bias_moves_the_choice_and_not_the_weights():
    config = dataclasses.replace(CASE.config, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    pushed = dataclasses.replace(LAYER, router_bias=LAYER.router_bias.at[5].set(10.0))
    experts, weights = moe.route(pushed, TOKENS, config)
    assert bool(jnp.all(jnp.any(experts == 5, axis=1)))
    scores = 1 / (1 + np.exp(-np.asarray(TOKENS @ LAYER.router)))
    np.testing.assert_allclose(weights, np.take_along_axis(scores, np.asarray(experts), axis=1), atol=1e-6)


@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_normalised_weights_sum_to_the_scaling_factor(scaling):
    config = dataclasses.replace(CASE.config, routed_scaling_factor=scaling)
    _, weights = moe.route(LAYER, TOKENS, config)
    np.testing.assert_allclose(jnp.sum(weights, axis=1), scaling, rtol=1e-5)
