"""What a model makes of a sample on a mesh: what it makes of it on one device."""

import numpy as np
import pytest

from experiments.common import text
from experiments.reproduction import retrieval, scoring
from indexcache_jax import sharding
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import TRAINING
from tests.experiments.reproduction.test_scoring import BASE

SCHEDULE = Schedule("FSF")


def sample():
    rng = np.random.default_rng(0)
    cuts = rng.integers(97, 123, (2, 201)).astype(np.int32)
    return scoring.Sample(cuts, rng.random((2, 200)) < 0.3, retrieval.prompts(cuts, text.Bytes(), 200, 1, 0)[:1])


@pytest.mark.slow
def test_measures_are_those_of_one_device():
    on = sample()
    expected = scoring.score(BASE.params, BASE.config, BASE.schedule, SCHEDULE, on)
    with sharding.use(sharding.make_mesh(context=8), TRAINING):
        params = sharding.put(BASE.params, abstract(BASE.config, BASE.schedule))
        found = scoring.score(params, BASE.config, BASE.schedule, SCHEDULE, on)
    assert found.means == pytest.approx(expected.means, rel=1e-5)
