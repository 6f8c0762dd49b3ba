"""Rules, axes and a mesh give every leaf its place."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from indexcache_jax import params, serving, sharding, tensors
from indexcache_jax.sharding import SERVING, TRAINING, Rules, spec
from tests.support.tiny_models import CASES

MESH = AbstractMesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
CASE = CASES["glm-mixed"]


def test_a_spec_has_the_mesh_axes_of_each_logical_axis():
    assert spec(("layer", "heads", None), SERVING, MESH) == PartitionSpec(None, "tensor", None)
    assert spec(("expert", "expert_embed"), SERVING, MESH) == PartitionSpec(("data", "context", "tensor"), None)
    assert spec(("heads", "embed"), TRAINING, MESH) == PartitionSpec("tensor", "data")


def test_a_mesh_without_an_axis_leaves_whole_what_it_would_split():
    assert spec(("heads", "expert"), SERVING, AbstractMesh((4,), ("data",))) == PartitionSpec(None, "data")


def test_one_mesh_axis_cannot_split_two_dimensions():
    with pytest.raises(ValueError, match="mesh axis 'tensor' would split two of them"):
        spec(("heads", "mlp"), Rules(heads="tensor", mlp="tensor"), MESH)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="axis 'head' is not one of"):
        spec(("head",), SERVING, MESH)


@pytest.mark.parametrize("rules", [SERVING, TRAINING], ids=["serving", "training"])
def test_every_axis_of_every_tree_is_a_rule(rules):
    trees = (
        params.abstract(CASE.config, CASE.schedule),
        serving.weights.abstract(CASE.config, CASE.schedule),
        serving.cache.abstract(CASE.config, CASE.schedule, 2, 8, jnp.float8_e4m3fn),
    )
    for tree in trees:
        for path, tensor in tensors.leaves(tree):
            assert len(spec(tensor.axes, rules, MESH)) == len(tensor.shape), path


def test_what_selects_is_replicated_over_tensor_by_rule():
    for rules in (SERVING, TRAINING):
        assert all(getattr(rules, axis) is None for axis in ("q_latent", "index_heads", "latent", "index"))


def test_constrain_changes_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x


def test_an_activation_that_its_devices_do_not_divide_is_whole():
    assert sharding.fitting_spec((4, 6, 8), ("batch", "queries", None), SERVING, MESH) == PartitionSpec("data", "context", None)
    assert sharding.fitting_spec((1, 3, 8), ("batch", "queries", None), SERVING, MESH) == PartitionSpec(None, None, None)


def test_a_mesh_has_every_device():
    with pytest.raises(ValueError, match="mesh data=2, context=1, tensor=1: 2 devices, but there are 3"):
        sharding.make_mesh(data=2, devices=[None] * 3)


def test_rules_in_force_are_those_of_use_and_one_device_is_no_mesh():
    whole = SERVING.whole_experts()
    assert sharding.current() == (None, SERVING)
    with sharding.use(MESH, whole):
        assert sharding.current() == (MESH, whole)
        with sharding.use(sharding.make_mesh(devices=jax.devices()[:1]), TRAINING):
            assert sharding.current() == (None, TRAINING)


def test_axes_that_the_compiler_does_not_propagate_are_refused():
    refused = pytest.raises(ValueError, match="axis_types .*: the axes must be Auto, as sharding.make_mesh makes them")
    with sharding.use(AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))), refused:
        sharding.current()
