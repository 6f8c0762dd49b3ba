"""The similarity search: cosines against a layer run by hand, the dynamic programme against trying all schedules."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import model, search
from indexcache_jax.config import Config
from indexcache_jax.params import at_layer
from indexcache_jax.positions import whole_rows
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import GLM_FIELDS, state, to_params

CONFIG = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 6})
ALL = Schedule.all_full(6)


@pytest.fixture(scope="module")
def params():
    return to_params(state(CONFIG, ALL, 3), CONFIG, ALL)


def test_similarities_compare_a_layers_outputs_with_anothers_indices(params):
    batch = np.random.RandomState(2).randint(0, CONFIG.vocab_size, (1, 41)).astype(np.int32)
    found = search.similarities(params, CONFIG, ALL, [batch])
    np.testing.assert_allclose(np.diag(found), 1.0)
    assert np.isnan(found[0, 1]) and np.all(np.abs(found[np.tril_indices(6)]) <= 1 + 1e-6)
    # Layer 1 by hand.
    x = model.embed(params, jnp.asarray(batch[:, :-1]))
    positions = whole_rows(x, CONFIG)
    x, theirs = model.attention_block(model.attention_layer(params, 0, 0), x, None, positions, CONFIG, True)
    x = model.mlp_block(at_layer(params.dense, 0), params.mlp_norm[0], x, CONFIG)
    layer = model.attention_layer(params, 1, 1)
    a, b = (np.asarray(model.attention_block(layer, x, theirs, positions, CONFIG, full)[0] - x)[0] for full in (True, False))
    cosines = np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    assert found[1, 0] == pytest.approx(cosines.mean(), abs=1e-5) and cosines.mean() < 0.99
    np.testing.assert_allclose(search.similarities(params, CONFIG, ALL, [batch, batch]), found, atol=1e-12)  # a mean
    with pytest.raises(ValueError, match="indexers of all layers"):
        search.similarities(params, CONFIG, Schedule("FFSFFF"), [batch])


def test_most_similar_equals_trying_all_schedules():
    similarity = np.tril(np.random.RandomState(0).rand(7, 7))
    np.fill_diagonal(similarity, 1.0)
    for num_full in range(1, 8):
        every = [Schedule("F" + "".join(c)) for c in itertools.product("FS", repeat=6)]
        every = [s for s in every if s.num_full == num_full]
        totals = {s: sum(similarity[i, j] for i, j in enumerate(s.source)) for s in every}
        assert totals[search.most_similar(similarity, num_full)] == pytest.approx(max(totals.values()))
    assert search.most_similar(np.ones((5, 5)), 2).pattern == "FFSSS"  # of equal sums the one with the lower layers
    with pytest.raises(ValueError, match="num_full: 8"):
        search.most_similar(similarity, 8)
