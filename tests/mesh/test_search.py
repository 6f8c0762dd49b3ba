"""The search on a mesh of eight devices finds what it finds on one device."""

import functools

import jax
import numpy as np
import pytest

from indexcache_jax import search, sharding
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise, overlap
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


def batches(rows, count=1, width=32):
    rng = np.random.RandomState(0)
    return [rng.randint(0, GLM_FIELDS["vocab_size"], (rows, width + 1)).astype(np.int32) for _ in range(count)]


def placed(case):
    return sharding.put(case.params, abstract(case.config, case.schedule))


def evaluator(case, params, rows, **options):
    return search.Evaluator(params, case.config, case.schedule, batches(rows), **options)


@functools.cache
def expected_losses(name, rows):
    return evaluator(CASES[name], CASES[name].params, rows).losses(SCHEDULES)


@functools.cache
def expected_steps(name, rows):
    case = CASES[name]
    return search.greedy_search(evaluator(case, case.params, rows), case.schedule)


def assert_same(steps, expected):
    assert [step.schedule for step in steps] == [step.schedule for step in expected]
    np.testing.assert_allclose([step.loss for step in steps], [step.loss for step in expected], atol=1e-5, rtol=0)
    for step, other in zip(steps, expected, strict=True):
        assert step.candidates == pytest.approx(other.candidates, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_greedy_search_is_that_of_one_device(mesh, name):
    case, rows = CASES[name], 8
    with meshes.use(mesh):
        losses = evaluator(case, placed(case), rows)
        steps = search.greedy_search(losses, case.schedule)
        found = losses.losses(SCHEDULES)
    assert_same(steps, expected_steps(name, rows))
    np.testing.assert_allclose(found, expected_losses(name, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mesh", ["data", "expert", "all"])
def test_rows_that_devices_do_not_divide(mesh):
    case, rows = CASES["glm"], 3
    with meshes.use(mesh):
        steps = search.greedy_search(evaluator(case, placed(case), rows), case.schedule)
    assert_same(steps, expected_steps("glm", rows))
