"""The store of distilled indexers under a mesh: it works on one device, and the params that take its indexers lie on all."""

import jax
import numpy as np
import pytest

from experiments.reproduction import indexers
from indexcache_jax import sharding
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import TRAINING
from tests.experiments.reproduction.test_indexers import CASE, STAGE


@pytest.mark.slow
def test_indexers_are_those_of_one_device():
    def trained(params):
        store = indexers.Store(params, CASE.config, CASE.schedule, CASE.tokens[:, :-1], STAGE, 3)
        return store.for_schedule(Schedule("FSSF"))

    expected = trained(CASE.params)
    with sharding.use(sharding.make_mesh(data=2, context=4), TRAINING):
        params = sharding.put(CASE.params, abstract(CASE.config, CASE.schedule))
        found = trained(params)
        whole = indexers.with_indexers(params, found)
    for layer in (0, 3):
        np.testing.assert_array_equal(found[layer].divergence, expected[layer].divergence)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found[layer].indexer, expected[layer].indexer)
    np.testing.assert_array_equal(sharding.to_host(whole.indexer.keys)[3], found[3].indexer.keys)
    assert len(whole.indexer.keys.sharding.device_set) == 8
