"""Layers that are read one by one are those that `load` gives, of either format."""

import jax
import numpy as np
import pytest

from checkpoints_convert import Layers, load, save
from indexcache_jax.params import abstract
from indexcache_jax.tensors import leaves
from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]  # FFSFS, dense layers 0 and 1


def assert_are_those_of(layers: Layers, params, case) -> None:
    tree = abstract(case.config, case.schedule)
    structure = jax.tree.structure(tree)
    ends = structure.flatten_up_to(layers.ends())  # with None for what was not asked for
    by_layer = [structure.flatten_up_to(layers.layer(i)) for i in range(case.config.num_layers)]
    for number, ((path, tensor), whole) in enumerate(zip(leaves(tree), jax.tree.leaves(params), strict=True)):
        if tensor.layers is None:
            np.testing.assert_array_equal(ends[number], whole, err_msg=path)
        else:
            assert ends[number] is None
        for i, found in enumerate(by_layer):
            if i not in (tensor.layers or ()):
                assert found[number] is None, (path, i)
                continue
            assert found[number].dtype == whole.dtype
            np.testing.assert_array_equal(found[number][0], whole[tensor.layers.index(i)], err_msg=path)
            assert len(found[number]) == 1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["glm-mixed", "glm-unusual", "deepseek-mixed"])
def test_of_safetensors(name, dtype, tmp_path):
    case = CASES[name]
    directory = files.write_checkpoint(tmp_path / "hf", files.config_fields(case), case.state, shards=3)
    layers = Layers(directory, dtype=dtype)
    assert (layers.config, layers.schedule) == (case.config, case.schedule)
    params = load(directory, dtype=dtype)[2]
    assert_are_those_of(layers, params, case)


def test_of_orbax(tmp_path):
    save(tmp_path / "orbax", MIXED.params, MIXED.config, MIXED.schedule, format="orbax")
    assert_are_those_of(Layers(tmp_path / "orbax"), MIXED.params, MIXED)


def test_what_is_missing_is_named_before_a_layer_is_read(tmp_path):
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    tensors = {n: t for n, t in MIXED.state.items() if n != name}
    directory = files.write_checkpoint(tmp_path / "hf", files.config_fields(MIXED), tensors, 1)
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        Layers(directory)
    with pytest.raises(ValueError, match="dtype: 'int8'"):
        Layers(directory, dtype="int8")
