"""A streamed evaluation through the Hopper kernels, inside shard_map, against the one in memory."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import search
from indexcache_jax.config import Config
from indexcache_jax.params import init
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import streamed
from pallas_kernels import hopper
from tests.indexcache_jax.search.test_streamed import OneByOne

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

FIELDS = preset("30b") | {"num_hidden_layers": 3, "vocab_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256}
FIELDS |= {"index_topk": 256, "eos_token_id": None, "pad_token_id": None}


def test_losses_are_those_of_the_model_in_memory():
    config, base = Config.from_hf(FIELDS), Schedule("FFF")
    params = init(jax.random.key(0), config, base, jnp.bfloat16)
    # The bias chooses the experts: a near-tie of a random router would fall either way by rounding.
    bias = jnp.broadcast_to(2.0 * jnp.arange(config.n_routed_experts), params.moe.router_bias.shape)
    params = params.replace(moe=params.moe.replace(router_bias=bias))
    batches = [np.random.default_rng(i).integers(0, 512, (2, 1025)).astype(np.int32) for i in range(2)]
    layers = OneByOne(types.SimpleNamespace(config=config, schedule=base, params=params))
    schedules = [Schedule(pattern) for pattern in ("FFF", "FSF", "FSS")]
    found = streamed.StreamedEvaluator(layers, batches).losses(schedules)
    expected = search.Evaluator(params, config, base, batches).losses(schedules)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert streamed.StreamedEvaluator(layers, batches).losses(schedules) == found
