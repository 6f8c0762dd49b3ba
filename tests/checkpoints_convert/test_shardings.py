"""Leaves land on the devices they are meant for, whatever axis is split. Four CPU devices, in a process of their own."""

import importlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from checkpoints_convert import load
from tests.checkpoints_convert import files
from tests.support import meshes
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]

PROGRAM = r"""
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from checkpoints_convert import load, save
from indexcache_jax.params import abstract
from tests.support.tiny_models import CASES

case, tree = CASES["glm-mixed"], abstract(CASES["glm-mixed"].config, CASES["glm-mixed"].schedule)
mesh = jax.make_mesh((2, 2), ("x", "y"))

def check(shardings):
    config, schedule, params = load(sys.argv[1], shardings=shardings)
    wanted = shardings if not isinstance(shardings, NamedSharding) else jax.tree.map(lambda _: shardings, tree)
    def equal(found, expected, sharding):
        assert found.sharding.is_equivalent_to(sharding, found.ndim), (found.sharding, sharding)
        np.testing.assert_array_equal(found, expected)
    jax.tree.map(equal, params, case.params, wanted)
    return params

def split(axes):
    # Every leaf by its logical axes where they divide.
    def one(tensor):
        names = [axes.get(axis) for axis in tensor.axes]
        return NamedSharding(mesh, P(*(n if n and size % 2 == 0 else None for n, size in zip(names, tensor.shape))))
    return jax.tree.map(one, tree)

check(NamedSharding(mesh, P()))
check(split({"expert": "x", "heads": "y", "vocab": "y"}))
params = check(split({"embed": "y", "expert_mlp": "x"}))
by_layer = split({}).replace(dense=split({"layer": "x"}).dense)
assert by_layer.dense.down.spec == P("x", None, None)  # two dense layers on two devices
check(by_layer)
save(sys.argv[2], params, case.config, case.schedule)  # from several devices
jax.tree.map(np.testing.assert_array_equal, load(sys.argv[2])[2], case.params)
"""


def test_four_devices(source, tmp_path):
    environment = os.environ | meshes.simulated(4)
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def test_without_shardings_arrays_may_still_be_moved(source):
    assert not any(leaf.committed for leaf in jax.tree.leaves(load(source)[2]))


@pytest.mark.parametrize("nbytes", [1, 2000, 2**20], ids=["rows", "several rows", "all at once"])
def test_pieces_are_put_together_where_memory_is_not_the_host_s(source, monkeypatch, nbytes):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(importlib.import_module("checkpoints_convert.load"), "_MIN_PIECE", nbytes)
    params = load(source)[2]
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, MIXED.params)


def test_shardings_of_another_tree_are_refused(source):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    everywhere = jax.tree.map(lambda _: device, MIXED.params)
    assert load(source, shardings=everywhere)[2].embedding.committed
    with pytest.raises(
        ValueError,
        match="shardings: expected one .* a tree of them like the params of schedule FFSFS; got Params",
    ):
        load(source, shardings=everywhere.replace(head=None))
