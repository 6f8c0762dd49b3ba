"""Indexers out of one store: those that training group by group makes."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.reproduction import indexers
from indexcache_jax import indexer_training
from indexcache_jax.indexer_training import Run, indexer_stage
from indexcache_jax.layers import Resident
from indexcache_jax.params import at_layer
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import GLM_FIELDS, Case

FIELDS = GLM_FIELDS | {"num_hidden_layers": 4, "index_topk": 8}
CASE = Case(FIELDS, "FFFF", 2, (26,) * 3)
STAGE = indexer_stage(25, "float32", steps=5, rows=2, learning_rate=1e-2)
RUN = Run(Resident(CASE.config, CASE.schedule, CASE.params), CASE.schedule, CASE.tokens[:, :-1], STAGE, 3)


def assert_close(found, expected):
    for layer, one in found.items():
        np.testing.assert_allclose(one.divergence, expected[layer].divergence, rtol=2e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one.indexer, expected[layer].indexer)


def trained(run):
    return {group.layer: group for group in indexer_training.train(run)}


def test_a_store_trains_what_training_group_by_group_does_and_each_group_once():
    store = indexers.Store(CASE.params, CASE.config, CASE.schedule, CASE.tokens[:, :-1], STAGE, 3)
    first, second = Schedule("FSSF"), Schedule("FSFS")
    found = store.for_schedule(first)
    assert len(store) == 2 and found[0].divergence[-1] < found[0].divergence[0]
    assert set(store.for_schedule(second)) == {0, 2} and len(store) == 4
    again = store.for_schedule(first)
    assert len(store) == 4 and again[0] is found[0]
    own = store.for_schedule(first, cross_layer=False)
    assert own[3] is found[3] and len(store) == 5  # the last layer serves itself alone
    assert not np.array_equal(own[0].indexer.keys, found[0].indexer.keys)
    spans = store.for_spans(2)
    assert_close(spans, trained(dataclasses.replace(RUN, spans=2)))

    params = indexers.with_indexers(CASE.params, found)
    for layer in range(4):
        now, before = at_layer(params.indexer, layer), at_layer(CASE.params.indexer, layer)
        expected = found[layer].indexer if layer in found else before
        jax.tree.map(np.testing.assert_array_equal, now, expected)
    curve = indexers.curve(found)
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4]
    assert curve[0][1] == pytest.approx(np.mean([found[0].divergence[0], found[3].divergence[0]]))
