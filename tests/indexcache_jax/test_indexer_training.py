"""Indexers of a frozen model trained group by group: what the whole model's warm-up makes of them, one group at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from indexcache_jax import distill, indexer_training, memory, ops, training
from indexcache_jax.indexer_training import Run, distil_indexers, groups, step, targets
from indexcache_jax.layers import Resident
from indexcache_jax.params import with_schedule
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise
from indexcache_jax.tensors import leaves
from tests.support.tiny_models import GLM_FIELDS, Case

LENGTH = 25
# Every key is selected, so that a model with all layers F runs as under dense attention, as in a warm-up.
FIELDS = GLM_FIELDS | {"num_hidden_layers": 4, "index_topk": 32}
CASE = Case(FIELDS, "FFFF", 2, (LENGTH + 1,) * 3)
SPARSE = Case(FIELDS | {"index_topk": 8}, "FFSF", 2, (LENGTH + 1,) * 3)
TARGET, ALL_FULL = Schedule("FFSS"), Schedule("FFFF")
STAGE = training.Stage("indexers", "warmup", 4, 3, LENGTH, 0.0, 3e-3, clip_norm=1e9, compute_dtype="float32")


def resident(case=CASE):
    return Resident(case.config, case.schedule, case.params)


def run(case=CASE, schedule=TARGET, **changes):
    stage = changes.pop("stage", STAGE)
    return Run(resident(case), schedule, case.tokens[:, :-1], stage, **changes)


def trained(given, finished=()):
    return {group.layer: group for group in indexer_training.train(given, finished)}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "keeps_targets", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept targets", "computed at every step"]
)
def test_a_group_learns_what_the_whole_model_s_warm_up_teaches_it(keeps_targets):
    """Of all rows in every step, where no clipping ties indexers to each other."""
    found = trained(run(keeps_targets=keeps_targets))
    params = jax.tree.map(jnp.array, with_schedule(CASE.params, CASE.schedule, TARGET))
    state = training.init_optimiser_state(params, STAGE, CASE.config, TARGET)
    divergences = []
    for _ in range(STAGE.steps):
        params, state, metrics = training.step(params, state, CASE.tokens[None], CASE.config, TARGET, STAGE)
        divergences.append(float(metrics[1]))
    np.testing.assert_allclose(sum(group.divergence for group in found.values()), divergences, rtol=2e-5)
    assert divergences[-1] < 0.95 * divergences[0]
    for slot, layer in enumerate(TARGET.full_layers):
        jax.tree.map(
            lambda a, b, slot=slot: np.testing.assert_allclose(a, b[slot], atol=2e-5), found[layer].indexer, params.indexer
        )


@functools.cache
def gradient_of_the_whole_model():
    params = with_schedule(CASE.params, CASE.schedule, TARGET)

    def divergence(indexers):
        given = dataclasses.replace(params, indexer=indexers)
        options = {"indexers": True, "sparse": False, "compute_dtype": jnp.float32}
        return distill.losses(given, CASE.tokens, CASE.config, TARGET, **options).indexer

    return jax.jit(jax.grad(divergence))(params.indexer)


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of the indexers of a run, by layer: those that a step of plain gradient descent subtracts."""

    def of(given):
        given = dataclasses.replace(given, stage=dataclasses.replace(given.stage, steps=1))
        before = CASE.params.indexer
        return {
            layer: jax.tree.map(lambda a, b, layer=layer: np.float32(a[layer]) - b, before, group.indexer)
            for layer, group in trained(given).items()
        }

    monkeypatch.setattr(step, "optimiser", lambda *_: optax.sgd(1.0))
    step.take_step.clear_cache()
    yield of
    step.take_step.clear_cache()


def assert_same_gradients(found, expected):
    for (name, a), (_, b) in zip(leaves(found), leaves(expected), strict=True):
        scale = float(np.max(np.abs(b)))
        assert scale > 1e-4
        np.testing.assert_allclose(a, b, atol=1e-3 * scale + 2e-7, err_msg=name)


@pytest.mark.parametrize("keeps_targets", [True, False], ids=["kept targets", "computed at every step"])
def test_the_gradient_of_a_group_is_that_of_the_whole_model_s_divergence(keeps_targets, gradients):
    found = gradients(run(keeps_targets=keeps_targets))
    for slot, layer in enumerate(TARGET.full_layers):
        of_layer = jax.tree.map(lambda a, slot=slot: a[slot], gradient_of_the_whole_model())
        assert_same_gradients(found[layer], of_layer)


def test_what_hoppers_kernels_are_given_has_the_same_gradient(gradients, monkeypatch):
    """Here with their references: targets layer by layer, then what the scores miss of their sum."""
    monkeypatch.setattr(ops, "distils_by_kernels", lambda *_: True)
    targets.add_target.clear_cache()
    try:
        found = gradients(run())
    finally:
        targets.add_target.clear_cache()
    of_first = jax.tree.map(lambda a: a[0], gradient_of_the_whole_model())
    assert_same_gradients(found[TARGET.full_layers[0]], of_first)


@pytest.mark.parametrize("keeps_targets", [True, False], ids=["kept targets", "computed at every step"])
def test_rows_on_the_device_are_those_on_the_host(keeps_targets, monkeypatch):
    given = run(keeps_targets=keeps_targets, stage=dataclasses.replace(STAGE, rows=2))
    on_host = trained(given)
    monkeypatch.setattr(groups, "rows_on_device", lambda *_: 2)
    on_both = trained(given)
    for layer in TARGET.full_layers:
        assert_same(on_both[layer].indexer, on_host[layer].indexer)
        np.testing.assert_array_equal(on_both[layer].divergence, on_host[layer].divergence)


@pytest.mark.parametrize(
    ("pattern", "layer", "most", "spans"),
    [
        ("FFFFF", 0, 4, [1, 2, 3, 4]),
        ("FFFFF", 0, 9, [1, 2, 3, 4, 5]),
        ("FFFFF", 3, 4, [1, 2]),  # the last layers serve fewer
        ("FFFFF", 4, 4, [1]),
        ("FSSFS", 0, 4, [3]),  # a search cannot make an S layer F
        ("FSSFS", 0, 5, [3, 5]),
        ("FSSFS", 3, 1, [2]),
    ],
)
def test_spans_are_those_of_schedules_that_a_search_can_find(pattern, layer, most, spans):
    assert indexer_training.spans_of(Schedule(pattern), layer, most) == spans


def test_near_layers_count_more_since_more_spans_hold_them():
    np.testing.assert_allclose(indexer_training.shares_of_spans([1, 2, 3, 4]), np.array([25, 13, 7, 3]) / 48)
    np.testing.assert_allclose(indexer_training.shares_of_spans([2, 3]), np.array([5, 5, 2]) / 12)


@pytest.mark.parametrize(
    "keeps_targets", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept targets", "computed at every step"]
)
def test_the_gradient_of_several_spans_is_the_mean_of_each_span_s(keeps_targets, gradients):
    given = run(schedule=ALL_FULL, spans=3, keeps_targets=keeps_targets)
    assert given.groups == [(0, 1, 2), (1, 2, 3), (2, 3), (3,)]
    found = gradients(given)
    by_pattern = {
        pattern: gradients(run(schedule=Schedule(pattern), keeps_targets=keeps_targets)) for pattern in ("FFFF", "FFSF", "FFSS")
    }
    of_spans = [by_pattern[pattern][1] for pattern in ("FFFF", "FFSF", "FFSS")]  # 1, 2 and 3 layers
    assert_same_gradients(found[1], jax.tree.map(lambda *a: np.mean(a, axis=0), *of_spans))
    assert_same_gradients(found[3], by_pattern["FFFF"][3])


def test_spans_of_one_layer_teach_every_indexer_its_own_layer():
    found, own = (trained(run(schedule=ALL_FULL, spans=spans)) for spans in (1, None))
    assert list(found) == [0, 1, 2, 3]
    for layer in found:
        assert_same(found[layer].indexer, own[layer].indexer)
        np.testing.assert_array_equal(found[layer].divergence, own[layer].divergence)


def test_rows_of_a_step_are_drawn_by_seed_and_layer_and_all_are_seen():
    given = run(stage=dataclasses.replace(STAGE, steps=7, rows=2), seed=1)
    rows = given.rows(0)
    assert rows.shape == (7, 2) and sorted(rows.reshape(-1)[:6]) == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(given.rows(0), rows)
    assert not np.array_equal(given.rows(1), rows) and not np.array_equal(dataclasses.replace(given, seed=2).rows(0), rows)
    assert run(stage=dataclasses.replace(STAGE, steps=0)).rows(0).shape == (0, 3)


@pytest.mark.parametrize("changes", [{}, {"schedule": ALL_FULL, "spans": 3}], ids=["a schedule's", "spans"])
def test_groups_do_not_depend_on_which_were_trained_before(changes):
    given = run(stage=dataclasses.replace(STAGE, rows=1), **changes)
    layers = list(given.schedule.full_layers)
    whole = trained(given)
    rest = trained(given, finished=layers[::2])
    assert list(rest) == layers[1::2] and list(whole) == layers and trained(given, finished=layers) == {}
    for layer, group in rest.items():
        assert_same(group.indexer, whole[layer].indexer)
        np.testing.assert_array_equal(group.divergence, whole[layer].divergence)


def test_the_hidden_states_are_those_of_the_model_itself():
    """Of one with an S layer of its own, in which a layer reuses indices; layers pass through the arrays of finished groups."""
    made = []

    def allocate(shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    given = run(SPARSE, Schedule("FSSF"), stage=dataclasses.replace(STAGE, steps=1), allocate=allocate)
    trained(given)
    width = SPARSE.config.hidden_size
    states = [a for a in made if a.shape[-1] == width]
    config, base = SPARSE.config, SPARSE.schedule
    state = layerwise.start(SPARSE.params, given.tokens, config)
    for layer, found in enumerate(states):
        np.testing.assert_allclose(found, state.x, atol=2e-5)
        state = layerwise.advance(SPARSE.params, state, layer, base.is_full[layer], config, base)
    assert len(states) == config.num_layers
    made.clear()
    trained(given, finished={0})
    assert len([a for a in made if a.shape[-1] == width]) == 1


@pytest.mark.parametrize("changes", [{"schedule": Schedule("FSSS")}, {"schedule": Schedule("FFFF"), "spans": 4}])
def test_what_is_kept_is_what_was_announced(changes):
    made = []

    def allocate(shape, dtype):
        made.append((shape, np.dtype(dtype).itemsize * int(np.prod(shape))))
        return np.empty(shape, dtype)

    given = run(allocate=allocate, stage=dataclasses.replace(STAGE, steps=1), **changes)
    trained(given, finished=(1, 2, 3))
    need = indexer_training.need(given)
    assert sum(size for shape, size in made if shape[-1] == LENGTH) == need.targets
    states = sum(size for shape, size in made if shape[-1] == CASE.config.hidden_size)
    assert 0.7 * need.states < states <= need.states


@pytest.mark.parametrize("keeps_targets", [True, False], ids=["kept targets", "computed at every step"])
def test_a_step_s_program_needs_no_more_memory_than_was_announced(keeps_targets, monkeypatch):
    programs, take_step = [], step.take_step

    def compiled(*arguments):
        if not programs:
            programs.append(take_step.lower(*arguments).compile().memory_analysis())
        return take_step(*arguments)

    monkeypatch.setattr(step, "take_step", compiled)
    given = run(keeps_targets=keeps_targets, stage=dataclasses.replace(STAGE, steps=1))
    trained(given)
    need = memory.streamed_indexers_need(
        CASE.config, CASE.schedule, group=3, rows=3, length=LENGTH, dtype=jnp.float32, keeps_targets=keeps_targets
    )
    taken = programs[0].argument_size_in_bytes + programs[0].temp_size_in_bytes
    assert taken <= need.parts["group"] + need.parts["temporaries"] <= 8 * taken


def test_only_an_indexer_has_optimiser_state():
    p = jax.tree.map(lambda a: a[0], CASE.params.indexer)
    state = indexer_training.optimiser(STAGE, CASE.config).init(p)
    sizes = [a.size for a in jax.tree.leaves(state) if a.ndim]
    assert sum(sizes) == 2 * sum(a.size for a in jax.tree.leaves(p))
    of_all, train = indexer_training.sizes(run())
    assert train == 2 * sum(a.size for a in jax.tree.leaves(p)) and of_all > 5 * train


def test_the_frozen_weights_stay_as_they_were():
    before = jax.tree.map(np.array, CASE.params)
    trained(run(stage=dataclasses.replace(STAGE, steps=2)))
    assert_same(CASE.params, before)


@pytest.mark.parametrize(
    "keeps_targets", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["kept targets", "computed at every step"]
)
def test_bfloat16_arithmetic_is_close_and_trains_float32_indexers(keeps_targets):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), CASE.params)
    given = dataclasses.replace(run(), layers=Resident(CASE.config, CASE.schedule, params), keeps_targets=keeps_targets)
    found, exact = trained(given), trained(run())
    for layer in TARGET.full_layers:
        np.testing.assert_allclose(found[layer].divergence, exact[layer].divergence, rtol=0.05)
        assert {a.dtype for a in jax.tree.leaves(found[layer].indexer)} == {np.dtype(np.float32)}


def test_without_the_cross_layer_loss_only_the_own_layer_teaches():
    stage = dataclasses.replace(STAGE, cross_layer=False)
    alone = trained(run(schedule=Schedule("FFFF"), stage=STAGE))
    found = trained(run(stage=stage))
    assert_same(found[1].indexer, alone[1].indexer)
    assert not np.array_equal(trained(run())[1].indexer.keys, alone[1].indexer.keys)


def test_indexers_are_distilled_by_one_call():
    """Only they change, in the dtype of the weights."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), SPARSE.params)
    given = params, SPARSE.config, SPARSE.schedule, SPARSE.tokens[:, :-1]
    found = distil_indexers(*given, TARGET, steps=3, batch_size=2, learning_rate=3e-3, seed=5)
    stage = dataclasses.replace(STAGE, steps=3, rows=2, lr_warmup_steps=20, clip_norm=1.0, compute_dtype="bfloat16")
    expected = trained(Run(Resident(SPARSE.config, SPARSE.schedule, params), TARGET, given[3], stage, 5))
    kept = with_schedule(params, SPARSE.schedule, TARGET)
    for slot, layer in enumerate(TARGET.full_layers):
        for (_, a), (_, b) in zip(leaves(found.indexer), leaves(expected[layer].indexer), strict=True):
            np.testing.assert_array_equal(a[slot], b.astype(a.dtype))
    assert not np.array_equal(found.indexer.keys, kept.indexer.keys)
    assert_same(dataclasses.replace(found, indexer=kept.indexer), kept)
    every = distil_indexers(*given, SPARSE.schedule, steps=1, spans=3)
    assert every.full_layers == SPARSE.schedule.full_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": CASE.schedule}, "F are the layers"),
        ({"tokens": CASE.tokens + 1000}, "is not one of the model's"),
        ({"tokens": CASE.tokens[0]}, r"not \[B, S\] of integers"),
        ({"target": Schedule("FFFS")}, "layer 2 of FFFS is F, but it has no indexer"),
        ({"steps": 0}, "steps: 0 is not an integer of at least 1"),
        ({"batch_size": 0}, "batch_size: 0 is not an integer of at least 1"),
        ({"spans": 0}, "spans: 0 is below 1"),
    ],
)
def test_what_one_call_cannot_distil_is_named(changes, message):
    given = {"params": SPARSE.params, "config": SPARSE.config, "schedule": SPARSE.schedule, "tokens": SPARSE.tokens}
    with pytest.raises(ValueError, match=message):
        distil_indexers(**given | {"target": TARGET} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": Schedule("FFF")}, "has 3 entries for 4 layers"),
        ({"stage": dataclasses.replace(STAGE, kind="sparse")}, "stage: 'sparse' is not 'warmup'"),
        ({"stage": dataclasses.replace(STAGE, context=24)}, r"tokens: \[3, 25\] are not rows of the stage's context, 24"),
        ({"spans": 0}, "spans: 0 is below 1"),
        ({"spans": 2, "stage": dataclasses.replace(STAGE, cross_layer=False)}, "spans: 2, but the stage teaches"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_a_layer_without_an_indexer_cannot_be_f():
    with pytest.raises(ValueError, match="layer 2 of FFFS is F, but it has no indexer"):
        run(SPARSE, Schedule("FFFS"))


def test_a_divergence_that_is_not_finite_is_named():
    broken = dataclasses.replace(CASE.params, indexer=jax.tree.map(lambda a: a.at[1].set(jnp.nan), CASE.params.indexer))
    given = Run(Resident(CASE.config, CASE.schedule, broken), TARGET, CASE.tokens[:, :-1], STAGE)
    with pytest.raises(ValueError, match="layer 1: its divergence at step 0 is not finite"):
        trained(given, finished={0})


@pytest.mark.parametrize("changes", [{}, {"schedule": ALL_FULL, "spans": 2}], ids=["a schedule's", "spans"])
def test_the_work_that_is_reported_is_the_work_that_was_announced(changes):
    given, done = run(**changes), []
    list(indexer_training.train(given, progress=lambda work, what: done.append(work)))
    np.testing.assert_allclose(sum(done), indexer_training.work(given), rtol=1e-9)
    done.clear()
    list(indexer_training.train(given, {0}, lambda work, what: done.append(work)))
    np.testing.assert_allclose(sum(done), indexer_training.work(given, {0}), rtol=1e-9)
