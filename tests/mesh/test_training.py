"""A training step on a mesh of eight devices is one device's: losses, gradients, weights, and where arrays lie."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import distill, moe, ops, params, sharding, training
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import TRAINING
from indexcache_jax.training import Stage
from tests.support import meshes
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS, UNUSUAL, Case

# S layers with experts above an F layer without.
CASES = {
    "glm": Case(GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 1}, "FSS", 2),
    "deepseek": Case(DEEPSEEK_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}, "FS", 0),
    "large vocabulary": Case(GLM_FIELDS | {"num_hidden_layers": 1, "vocab_size": 4100}, "F", 0),
    "unusual": Case(
        GLM_FIELDS | UNUSUAL | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}, "FSF", 0
    ),
}
MESHES = ["data", "context", "tensor", "expert", "all"]
# A program for gradients takes long to compile: the sparse stage on every mesh, the others where something else is split.
PAIRS = [*((mesh, "sparse") for mesh in MESHES), ("context", "dense"), ("all", "dense")]
PAIRS += [(mesh, "warmup") for mesh in ("context", "tensor", "all")]
FAST = {("all", "sparse"), ("context", "warmup")}
STEPS = 3  # the first has a rate of 0, the third's losses show what the second changed


def use(mesh):
    sizes, rules = meshes.MESHES[mesh]
    return sharding.use(sharding.make_mesh(**sizes), dataclasses.replace(TRAINING, expert=rules.expert))


def stage_of(kind, **fields):
    fields = {"rows": 8, "context": 32, "lr_warmup_steps": 1, "compute_dtype": "float32", "balance_speed": 0.01} | fields
    return Stage(kind, kind, STEPS, model_learning_rate=1e-3, indexer_learning_rate=1e-2, **fields)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Some steps: their metrics, weights and optimiser state after the second on the host, and after the last on their devices.

    The state holds the gradients.
    """

    metrics: np.ndarray
    second: tuple[Params, Any]
    last: tuple[Params, Any]


def take_steps(case, stage, traced=None):
    config, schedule = case.config, case.schedule
    weights = jax.tree.map(jnp.copy, sharding.put(case.params, params.abstract(config, schedule)))
    state = training.init_optimiser_state(weights, stage, config, schedule)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (stage.accumulate, stage.rows, stage.context + 1))
    arguments = jnp.asarray(tokens, jnp.int32), config, schedule, stage, None, traced
    metrics, kept = [], []
    for _ in range(STEPS):
        weights, state, found = training.step(weights, state, *arguments)
        metrics.append(np.asarray(found))
        kept.append(jax.device_get((weights, state)))
    return Steps(np.array(metrics), kept[1], (weights, state))


@functools.cache
def alone(name, stage):
    return take_steps(CASES[name], stage)


def assert_equal(found, expected, stage):
    """Losses, gradients and weights of two steps within rounding, and about the losses of the third.

    Two begin with the same weights on every CPU. Adam then divides gradients by their size, which makes whole steps of rounding
    where they are nearly 0: a few weights differ, and some token may select another key of nearly the same score.
    """
    np.testing.assert_allclose(found.metrics[:2], expected.metrics[:2], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.metrics[2], expected.metrics[2], rtol=1e-2)
    for path, a, b in leaves(found.second[1], expected.second[1]):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.max(np.abs(b), initial=0) + 1e-9, rtol=0, err_msg=path)
    rate = max(stage.model_learning_rate, stage.indexer_learning_rate)
    for path, a, b in leaves(found.second[0], expected.second[0]):
        moved = np.abs(np.asarray(a) - np.asarray(b)) / rate
        assert np.mean(moved > 1e-2) < 1e-2, (path, np.sort(moved.reshape(-1))[-5:])


def leaves(found, expected):
    """Each leaf's path, and its two values."""
    others = jax.tree.leaves(expected)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(found), others, strict=True):
        yield jax.tree_util.keystr(path), leaf, other


@pytest.mark.parametrize("mesh, kind", [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in PAIRS])
def test_steps_are_those_of_one_device(mesh, kind):
    stage = stage_of(kind)
    expected = alone("glm", stage)
    with use(mesh):
        found = take_steps(CASES["glm"], stage)
    assert_equal(found, expected, stage)
    assert_placed(found, CASES["glm"], mesh)


def assert_placed(found, case, mesh):
    """Weights and what the optimiser keeps of them are split by the rules."""
    with use(mesh):
        tree = params.abstract(case.config, case.schedule)
        expected = sharding.shardings(tree, jax.sharding.get_mesh(), sharding.current()[1])

    def check(array, where):
        assert array.sharding.is_equivalent_to(where, array.ndim), (array.shape, array.sharding, where)

    weights, state = found.last
    jax.tree.map(check, weights, expected)
    jax.tree.map(check, state, training.optimiser_shardings(state, expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, name", [("tensor", "deepseek"), ("expert", "deepseek"), ("all", "large vocabulary"), ("all", "unusual")]
)
def test_steps_of_other_models_are_those_of_one_device(mesh, name):
    stage = stage_of("sparse")
    expected = alone(name, stage)
    with use(mesh):
        found = take_steps(CASES[name], stage)
    assert_equal(found, expected, stage)


@pytest.mark.slow
def test_accumulated_rows_are_those_of_one_device():
    stage = stage_of("sparse", accumulate=2, rows=4)
    expected = alone("glm", stage)
    with use("all"):
        found = take_steps(CASES["glm"], stage)
    assert_equal(found, expected, stage)
    assert_placed(found, CASES["glm"], "all")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["warmup", "sparse"])
@pytest.mark.parametrize("mesh", ["context", "all"])
def test_attention_by_bits_is_that_of_one_device(mesh, kind, monkeypatch):
    """What Hopper's kernels are given, here with their references."""
    stage = stage_of(kind)
    expected = alone("glm", stage)
    monkeypatch.setattr(ops, "trains_by_kernels", lambda *_: True)
    with use(mesh):
        found = take_steps(CASES["glm"], dataclasses.replace(stage, name="by bits"))
    assert_equal(found, expected, stage)


@pytest.mark.slow
@pytest.mark.parametrize("length", [40, 33], ids=["in two pieces a device not", "over devices not"])
def test_a_length_that_devices_do_not_divide(length):
    stage = stage_of("sparse", context=length, rows=2)
    expected = alone("glm", stage)
    with use("context"):
        found = take_steps(CASES["glm"], stage)
    assert_equal(found, expected, stage)


@pytest.mark.slow
def test_all_tokens_to_the_experts_of_one_device(monkeypatch):
    """More than it has room for at once."""
    monkeypatch.setattr(moe, "SMALL_BUFFER", 0)
    case = CASES["glm"]
    bias = case.params.moe.router_bias.at[:, -1].set(50.0).at[:, 0].set(-50.0)
    biased = dataclasses.replace(case.params, moe=dataclasses.replace(case.params.moe, router_bias=bias))
    case = Case(case.fields, case.pattern, case.seed)
    case.__dict__["params"] = biased
    stage = stage_of("dense", balance_speed=0.0, rows=16)
    expected = take_steps(case, stage)
    with use("expert"):
        found = take_steps(case, stage)
    assert_equal(found, expected, stage)
    assert found.metrics[0, 2] == 0.5  # every token chose the last expert, and another one


@pytest.mark.slow
def test_a_schedule_as_data():
    case = Case(CASES["glm"].fields, "FFF", 2)
    stage, traced = stage_of("sparse"), distill.traced_schedule(Schedule("FSS"))
    expected = take_steps(case, stage, traced)
    with use("all"):
        found = take_steps(case, stage, traced)
    assert_equal(found, expected, stage)
