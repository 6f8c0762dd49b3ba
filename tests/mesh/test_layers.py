"""Layers that are read one by one onto a mesh: every device gets its part, and every part is read once."""

import functools
import math

import jax
import numpy as np
import pytest

from checkpoints_convert import Layers, save
from indexcache_jax.layers import shardings_in_force
from indexcache_jax.params import abstract
from indexcache_jax.tensors import leaves
from tests.support import meshes
from tests.support.tiny_models import CASES

CASE = CASES["deepseek-mixed"]  # FFSFS, dense layers 0 and 1
TREE = abstract(CASE.config, CASE.schedule)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_every_part_is_read_once(format, tmp_path, monkeypatch):
    save(tmp_path / "saved", CASE.params, CASE.config, CASE.schedule, format=format)
    layers = Layers(tmp_path / "saved")
    read: list[int] = []

    def fill(fill, tensor, layer, out, part=None):
        read.append(out.size)
        fill(tensor, layer, out, part)

    monkeypatch.setattr(layers._checkpoint, "fill", functools.partial(fill, layers._checkpoint.fill))
    with meshes.use("all"):
        shardings = shardings_in_force(layers)
        found = layers.layer(3, shardings)
    structure = jax.tree.structure(TREE)
    parts: list[int] = []
    for (path, tensor), array, whole, at in zip(
        leaves(TREE),
        structure.flatten_up_to(found),
        structure.flatten_up_to(CASE.params),
        structure.flatten_up_to(shardings),
        strict=True,
    ):
        if 3 not in (tensor.layers or ()):
            assert array is None, path
            continue
        assert array.sharding == at, path
        np.testing.assert_array_equal(array, whole[tensor.layers.index(3)][None], err_msg=path)
        part = math.prod(at.shard_shape(array.shape))
        parts += [part] * (array.size // part)
    assert read == parts
    experts = found.moe.gate_up
    assert experts.size // 8 in read and experts.size not in read
