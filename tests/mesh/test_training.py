"""A training step on a mesh of eight devices is one device's: losses, gradients, weights, and where arrays lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import params, sharding, training
from indexcache_jax.sharding import TRAINING
from indexcache_jax.training import Stage
from tests.support import meshes
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS, Case

# An S layer with experts above an F layer without, and above its own.
CASES = {
    "glm": Case(GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 1}, "FSS", 2),
    "deepseek": Case(DEEPSEEK_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}, "FS", 0),
}
LENGTH = 32
MESHES = ["data", "context", "tensor", "expert", "all"]
KINDS = ["dense", "warmup", "sparse"]


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def stage_of(kind, **fields):
    fields = {"rows": 8, "lr_warmup_steps": 1, "compute_dtype": "float32", "balance_speed": 0.01} | fields
    return Stage(kind, kind, 3, context=LENGTH, model_learning_rate=1e-3, indexer_learning_rate=1e-2, **fields)


def tokens_of(case, stage):
    shape = (stage.accumulate, stage.rows, stage.context + 1)
    return np.random.default_rng(0).integers(0, case.config.vocab_size, shape).astype(np.int32)


def use(mesh):
    sizes, rules = meshes.MESHES[mesh]
    return sharding.use(sharding.make_mesh(**sizes), dataclasses.replace(TRAINING, expert=rules.expert))


def placed(case):
    return jax.tree.map(jnp.copy, sharding.put(case.params, params.abstract(case.config, case.schedule)))


def stepped(case, stage, steps=1):
    """The params, the optimiser's state and the metrics after some steps on the mesh in force."""
    weights, tokens = placed(case), tokens_of(case, stage)
    state = training.init_optimiser_state(weights, stage, case.config, case.schedule)
    metrics = []
    for _ in range(steps):
        weights, state, found = training.step(weights, state, jnp.asarray(tokens), case.config, case.schedule, stage)
        metrics.append(np.asarray(found))
    return weights, state, np.array(metrics)


@functools.cache
def alone(name, stage, steps=1):
    return jax.device_get(stepped(CASES[name], stage, steps))


def assert_close(found, expected, tolerance=1e-5):
    """Relative to the largest number of each tensor."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        atol = tolerance * float(np.max(np.abs(b), initial=0)) + 1e-9
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


def assert_a_step_is_that_of_one_device(name, stage, mesh):
    """Adam's means after a first step are the gradients, but for a factor: they say what its weights, of one size, do not."""
    weights, state, metrics = alone(name, stage)
    with use(mesh):
        found, found_state, found_metrics = stepped(CASES[name], stage)
    np.testing.assert_allclose(found_metrics, metrics, atol=1e-5, rtol=1e-5)
    assert_close(found_state, state, 2e-5)
    rate = max(stage.model_learning_rate, stage.indexer_learning_rate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * rate, rtol=1e-6), found, weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_is_that_of_one_device(mesh, kind):
    assert_a_step_is_that_of_one_device("glm", stage_of(kind), mesh)
