"""The search on a mesh of eight devices finds what it finds on one device."""

import functools

import numpy as np
import pytest

from indexcache_jax import search, sharding
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise, overlap
from tests.indexcache_jax.search.test_streamed import OneByOne
from tests.support import meshes
from tests.support.loss_log import MemoryLog
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS, UNUSUAL, Case

MESHES = [name for name in meshes.MESHES if name != "split cache"]  # there is no cache
CASES = {
    "glm": Case(GLM_FIELDS, "FFFFF", 2),
    "deepseek": Case(DEEPSEEK_FIELDS, "FFFFF", 0),
    "unusual": Case(GLM_FIELDS | UNUSUAL, "FFFFF", 2),
}
SCHEDULES = [Schedule(pattern) for pattern in ("FFFFF", "FSFSF", "FFSFS", "FSSSS")]
ROWS, WIDTH = 8, 32  # divided by the devices of every mesh


def batches(rows=ROWS, width=WIDTH):
    return [np.random.RandomState(0).randint(0, GLM_FIELDS["vocab_size"], (rows, width + 1)).astype(np.int32)]


def placed(case):
    return sharding.put(case.params, abstract(case.config, case.schedule))


def resident(case, params, given, log=None):
    return search.Evaluator(params, case.config, case.schedule, given, log)


def streamed(case, given):
    return search.StreamedEvaluator(OneByOne(case), given)


@functools.cache
def expected(name, rows=ROWS, width=WIDTH):
    """The greedy search's steps, and the losses of SCHEDULES, on one device."""
    case = CASES[name]
    evaluator = resident(case, case.params, batches(rows, width))
    return search.greedy_search(evaluator, case.schedule), evaluator.losses(SCHEDULES)


def assert_same(found, expected):
    steps, losses = found
    assert [step.schedule for step in steps] == [step.schedule for step in expected[0]]
    for step, other in zip(steps, expected[0], strict=True):
        assert step.loss == pytest.approx(other.loss, abs=1e-5)
        assert step.candidates == pytest.approx(other.candidates, abs=1e-5)
    np.testing.assert_allclose(losses, expected[1], atol=1e-5, rtol=0)


def every_mesh(*fast, others):
    """One model on every mesh, the others on those of `others`; pairs that are not `fast` are slow."""
    pairs = [(mesh, name) for mesh in MESHES for name in CASES if name == "glm" or mesh in others]
    marked = [pytest.param(*pair, marks=() if pair in fast else pytest.mark.slow) for pair in pairs]
    return pytest.mark.parametrize("mesh, name", marked)


@every_mesh(("all", "deepseek"), others=("tensor", "context, expert", "all"))
def test_a_model_in_memory(mesh, name):
    case = CASES[name]
    with meshes.use(mesh):
        evaluator = resident(case, placed(case), batches())
        assert_same((search.greedy_search(evaluator, case.schedule), evaluator.losses(SCHEDULES)), expected(name))
        assert evaluator.advice() == []


@every_mesh(("context, expert", "glm"), others=("all",))  # the layers are those of a model in memory
def test_a_model_that_is_streamed(mesh, name):
    case = CASES[name]
    with meshes.use(mesh):
        evaluator = streamed(case, batches())
        found = search.greedy_search(evaluator, case.schedule), evaluator.losses(SCHEDULES)
        assert evaluator.advice() == []
    assert_same(found, expected(name))


@pytest.mark.parametrize(
    "mesh, at_once", [("data", 8), *(pytest.param(mesh, 1, marks=pytest.mark.slow) for mesh in ("expert", "all"))]
)
def test_rows_that_devices_do_not_divide(mesh, at_once):
    """Devices that hold the whole model then run a schedule each; others compute the same, and the search says so."""
    case, rows = CASES["glm"], 3
    with meshes.use(mesh):
        assert layerwise.schedules_at_once(rows, case.config) == at_once
        evaluator = resident(case, placed(case), batches(rows))
        assert_same((search.greedy_search(evaluator, case.schedule), evaluator.losses(SCHEDULES)), expected("glm", rows))
        assert bool(evaluator.advice()) == (at_once == 1)


def test_without_a_mesh_as_many_devices_as_divide_the_rows_share_a_streamed_model():
    evaluator = streamed(CASES["glm"], batches(rows=3))
    assert evaluator._mesh.size == 3
    np.testing.assert_allclose(evaluator.losses(SCHEDULES), expected("glm", 3)[1], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_tokens_that_devices_do_not_divide():
    case, width = CASES["glm"], 27
    with meshes.use("all"):
        losses = resident(case, placed(case), batches(width=width)).losses(SCHEDULES)
    assert losses == pytest.approx(expected("glm", width=width)[1], abs=1e-5)


def test_advice_says_what_devices_cannot_divide():
    with meshes.use("all"):
        assert streamed(CASES["glm"], batches(rows=3, width=27)).advice() == [
            "3 rows a batch cannot be divided by 2 devices, which therefore all compute the same; "
            "a multiple of 2 would be shared",
            "27 tokens a row cannot be divided by 2 devices, which therefore all compute the same; "
            "a multiple of 2 would be shared",
        ]


def test_a_log_is_continued_on_another_mesh():
    case, log = CASES["glm"], MemoryLog()
    resident(case, case.params, batches(), log).losses(SCHEDULES[:2])
    with meshes.use("all"):
        params = placed(case)
        assert search.fingerprint(params, batches()) == search.fingerprint(case.params, batches())
        found = resident(case, params, batches(), log).losses(SCHEDULES)  # a log is told no loss twice
    assert found == pytest.approx(expected("glm")[1], abs=1e-5)


def test_overlap_and_similarity():
    case, given = CASES["glm"], batches()
    positions = overlap.spread(WIDTH, case.config.index_topk)
    one = search.layer_overlap(case.params, case.config, case.schedule, given)
    cosines = search.similarities(case.params, case.config, case.schedule, given)
    with meshes.use("all"):
        params = placed(case)
        np.testing.assert_array_equal(search.layer_overlap(params, case.config, case.schedule, given), one)
        selections = streamed(case, given).selections(case.schedule, [0], positions)
        found = search.similarities(params, case.config, case.schedule, given)
    np.testing.assert_array_equal(overlap.mean_overlap(selections, case.config.index_topk), one)
    np.testing.assert_allclose(found, cosines, atol=1e-5)
