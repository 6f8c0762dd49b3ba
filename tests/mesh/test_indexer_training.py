"""Groups of a frozen model's indexers trained side by side: on eight devices what one device makes of them, bit for bit."""

import dataclasses
import threading
import types

import jax
import numpy as np
import pytest
from absl import flags
from jax._src import distributed
from jax._src.lib import _jax

import checkpoints_convert
from experiments import run as command  # noqa: F401  (defines flags that every experiment has)
from experiments.common import inputs
from experiments.common.devices import Layout
from experiments.distill import indexers
from indexcache_jax import indexer_training, memory, sharding
from indexcache_jax.indexer_training import Run, groups, share, step
from indexcache_jax.layers import Resident
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import SERVING
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

LENGTH = 24
CASE = Case(GLM_FIELDS, "FFFFF", 2, (LENGTH,) * 3)
WHOLE = SERVING.whole_experts()
STAGE = Stage("indexers", "warmup", 3, 1, LENGTH, 0.0, 3e-3, compute_dtype="float32")


def run(schedule=CASE.schedule, **changes):
    changes = {"layers": Resident(CASE.config, CASE.schedule, CASE.params), "stage": STAGE} | changes
    return Run(schedule=schedule, tokens=CASE.tokens, **changes)


def use(devices, rules=WHOLE):
    return sharding.use(sharding.make_mesh(data=devices, devices=jax.devices()[:devices]), rules)


def on_mesh(devices, given, finished=(), rules=WHOLE):
    """The groups of a run whose weights lie on a mesh of so many devices, by layer."""
    with use(devices, rules):
        params = sharding.put(given.layers.params, abstract(CASE.config, CASE.schedule))
        given = dataclasses.replace(given, layers=dataclasses.replace(given.layers, params=params))
        return of_layer(indexer_training.train(given, finished))


def of_layer(groups):
    return {group.layer: group for group in groups}


@pytest.fixture
def side_by_side(monkeypatch):
    """As on accelerators. Two of eight simulated devices leave XLA threads enough."""
    monkeypatch.setattr(groups, "_may_train_beside_layers", lambda devices: True)


def test_groups_train_at_the_same_time_and_become_what_they_become_on_one_device(side_by_side, monkeypatch):
    """The sequences, which two devices do not divide, run through the layers on both."""
    schedule, used, both, take_step = Schedule("FSFSS"), {}, threading.Barrier(2, timeout=300), step.take_step

    def after_both_have_begun(*arguments):
        if threading.get_ident() not in used:
            both.wait()
        result = take_step(*arguments)
        used.setdefault(threading.get_ident(), set()).update(jax.tree.leaves(result)[0].devices())
        return result

    expected = of_layer(indexer_training.train(run(schedule)))
    with monkeypatch.context() as patch:
        patch.setattr(step, "take_step", after_both_have_begun)
        found = on_mesh(2, run(schedule))
    assert sorted(map(str, used.values())) == [str({device}) for device in jax.devices()[:2]]
    assert_same(found, expected)


def test_on_cpus_which_could_hang_nothing_else_runs_while_a_group_trains(monkeypatch):
    at_work, steps, take_step = threading.Lock(), [], step.take_step

    def alone(*arguments):
        assert at_work.acquire(blocking=False)
        steps.append(take_step(*arguments))
        at_work.release()
        return steps[-1]

    def layer(*arguments, **options):
        assert at_work.acquire(blocking=False)
        after = advanced(*arguments, **options)
        at_work.release()
        return after

    advanced = groups.advanced
    expected = of_layer(indexer_training.train(run(spans=2)))
    monkeypatch.setattr(step, "take_step", alone)
    monkeypatch.setattr(groups, "advanced", layer)
    assert_same(on_mesh(2, run(spans=2)), expected)
    assert len(steps) == STAGE.steps * len(expected)


@pytest.mark.parametrize(
    "keeps_targets", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept targets", "computed at every step"]
)
def test_more_groups_than_devices_take_turns(side_by_side, keeps_targets):
    given = run(spans=2, keeps_targets=keeps_targets)
    one, two = of_layer(indexer_training.train(given)), on_mesh(2, given)
    assert list(one) == [0, 1, 2, 3, 4]
    assert_same(two, one)
    rest = on_mesh(2, given, finished={0, 3})
    assert_same(rest, {layer: group for layer, group in one.items() if layer not in (0, 3)})


@pytest.mark.slow
def test_hidden_states_on_eight_devices_are_those_of_one_bit_for_bit():
    """Of a model with S layers of its own, which reuse indices that stay with their sequences."""
    case = Case(GLM_FIELDS, "FFSFS", 2, (LENGTH,) * 11)
    tokens, made = case.tokens, {}

    def states(devices):
        arrays = made.setdefault(devices, [])

        def allocate(shape, dtype):
            arrays.append(np.zeros(shape, dtype))
            return arrays[-1]

        with use(devices):
            params = sharding.put(case.params, abstract(case.config, case.schedule))
            layers = Resident(case.config, case.schedule, params)
            given = Run(layers, Schedule("FSSFS"), tokens, STAGE, allocate=allocate)
            list(indexer_training.train(given))
        return [array for array in arrays if array.shape[-1] in (case.config.hidden_size, case.config.index_topk)]

    one, eight = states(1), states(8)
    assert len(one) == len(eight) and len(one) >= case.config.num_layers + 2
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_experts_that_no_device_holds_whole_are_split_and_give_the_same_to_rounding():
    found, expected = on_mesh(4, run(), rules=SERVING), of_layer(indexer_training.train(run()))
    for layer, group in found.items():
        np.testing.assert_allclose(group.divergence, expected[layer].divergence, rtol=1e-4)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for layer, group in found.items():
        jax.tree.map(np.testing.assert_array_equal, group.indexer, expected[layer].indexer)
        np.testing.assert_array_equal(group.divergence, expected[layer].divergence)


def test_as_much_is_kept_on_the_host_as_for_the_groups_that_train_and_the_next_one():
    one = indexer_training.need(run())
    for devices, kept in ((2, 3), (8, 5)):
        with use(devices):
            several = indexer_training.need(run())
        assert (several.states, several.targets) == (kept * one.states, kept * one.targets)


def test_an_error_of_one_group_is_the_run_s(side_by_side):
    indexers = jax.tree.map(lambda a: a.at[1].set(np.nan), CASE.params.indexer)
    layers = Resident(CASE.config, CASE.schedule, dataclasses.replace(CASE.params, indexer=indexers))
    with pytest.raises(ValueError, match="layer 1: its divergence at step 0 is not finite"):
        on_mesh(2, run(layers=layers, stage=dataclasses.replace(STAGE, steps=8)))


def test_experts_are_whole_on_each_device_where_these_fit(tmp_path, monkeypatch):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    checkpoints_convert.save(tmp_path / "model", CASE.params, CASE.config, CASE.schedule)
    given = inputs.Checkpoint(str(tmp_path / "model"), "float32")
    assert indexers.layout_of(given) == Layout(data=8)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    assert indexers.layout_of(given) == Layout(data=8, expert=8)


def test_a_mesh_that_splits_more_than_rows_is_refused():
    with sharding.use(sharding.make_mesh(data=4, context=2)), pytest.raises(ValueError, match="whose only axis is data"):
        next(indexer_training.train(run()))


def test_jax_has_the_barrier_at_which_processes_wait_on_their_hosts(monkeypatch):
    """Nothing public has it, so a release may move it: then several processes are refused with a reason."""
    assert _jax.DistributedRuntimeClient.wait_at_barrier
    names = []
    client = types.SimpleNamespace(wait_at_barrier=lambda name, milliseconds: names.append(name))
    monkeypatch.setattr(distributed.global_state, "client", client)
    for _ in range(2):
        share.Share(processes=2).wait_for_others()
    assert len(set(names)) == 2
    monkeypatch.delattr(distributed, "global_state")
    with pytest.raises(NotImplementedError, match="indexers do not train in several processes with this release"):
        share.Share(processes=2).wait_for_others()


def test_a_run_that_is_left_ends_its_threads(side_by_side):
    before, steps = threading.active_count(), []
    with use(2):
        params = sharding.put(CASE.params, abstract(CASE.config, CASE.schedule))
        given = indexer_training.train(
            run(layers=Resident(CASE.config, CASE.schedule, params), stage=dataclasses.replace(STAGE, steps=100_000)),
            progress=lambda work, what: _left_after(20, steps, what),
        )
        with pytest.raises(KeyboardInterrupt):
            list(given)
    assert threading.active_count() == before


def _left_after(count, steps, what):
    steps.append(what)
    if len(steps) == count:
        raise KeyboardInterrupt
