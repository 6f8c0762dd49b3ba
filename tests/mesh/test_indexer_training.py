"""Groups of a frozen model's indexers trained side by side: on eight devices what one device makes of them, bit for bit."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from indexcache_jax import indexer_training
from indexcache_jax.indexer_training import Run
from indexcache_jax.layers import Resident
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

LENGTH = 24
CASE = Case(GLM_FIELDS, "FFFFF", 2, (LENGTH,) * 3)
STAGE = Stage("indexers", "warmup", 3, 1, LENGTH, 0.0, 3e-3, compute_dtype="float32")


def run(devices, schedule=CASE.schedule, **changes):
    changes = {"layers": Resident(CASE.config, CASE.schedule, CASE.params), "stage": STAGE} | changes
    return Run(schedule=schedule, tokens=CASE.tokens, devices=tuple(jax.devices()[:devices]), **changes)


def of_layer(groups):
    return {group.layer: group for group in groups}


def test_groups_train_at_the_same_time_and_become_what_they_become_on_one_device(monkeypatch):
    schedule, used, both, step = Schedule("FSFSS"), {}, threading.Barrier(2, timeout=300), indexer_training._step

    def after_both_have_begun(*arguments):
        if threading.get_ident() not in used:
            both.wait()
        result = step(*arguments)
        used.setdefault(threading.get_ident(), set()).update(jax.tree.leaves(result)[0].devices())
        return result

    expected = of_layer(indexer_training.train(run(0, schedule)))
    with monkeypatch.context() as patch:
        patch.setattr(indexer_training, "_step", after_both_have_begun)
        found = of_layer(indexer_training.train(run(2, schedule)))
    assert sorted(map(str, used.values())) == [str({device}) for device in jax.devices()[:2]]
    assert_same(found, expected)


@pytest.mark.parametrize(
    "keeps_targets", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept targets", "computed at every step"]
)
def test_more_groups_than_devices_take_turns(keeps_targets):
    one, two = (of_layer(indexer_training.train(run(n, spans=2, keeps_targets=keeps_targets))) for n in (0, 2))
    assert list(one) == [0, 1, 2, 3, 4]
    assert_same(two, one)
    rest = of_layer(indexer_training.train(run(2, spans=2, keeps_targets=keeps_targets), finished={0, 3}))
    assert_same(rest, {layer: group for layer, group in one.items() if layer not in (0, 3)})


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for layer, group in found.items():
        jax.tree.map(np.testing.assert_array_equal, group.indexer, expected[layer].indexer)
        np.testing.assert_array_equal(group.divergence, expected[layer].divergence)


def test_as_much_is_kept_on_the_host_as_for_so_many_groups():
    one, five = indexer_training.need(run(1)), indexer_training.need(run(8))
    assert (five.states, five.targets) == (5 * one.states, 5 * one.targets)


def test_an_error_of_one_group_is_the_run_s():
    indexers = jax.tree.map(lambda a: a.at[1].set(np.nan), CASE.params.indexer)
    layers = Resident(CASE.config, CASE.schedule, dataclasses.replace(CASE.params, indexer=indexers))
    given = run(2, layers=layers, stage=dataclasses.replace(STAGE, steps=8))
    with pytest.raises(ValueError, match="layer 1: its divergence at step 0 is not finite"):
        list(indexer_training.train(given))


def test_a_run_that_is_left_ends_its_threads():
    before, steps = threading.active_count(), []
    given = indexer_training.train(
        run(2, stage=dataclasses.replace(STAGE, steps=100_000)), see=lambda work, what: _left_after(20, steps, what)
    )
    with pytest.raises(KeyboardInterrupt):
        next(given)
    assert threading.active_count() == before


def _left_after(count, steps, what):
    steps.append(what)
    if len(steps) == count:
        raise KeyboardInterrupt
