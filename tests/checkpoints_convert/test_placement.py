"""Params and serving weights by rules on a mesh of eight CPU devices, in a process of its own."""

import os
import subprocess
import sys

from tests.checkpoints_convert import files
from tests.support import meshes

PROGRAM = r"""
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from checkpoints_convert import load
from indexcache_jax import forward, params, serving, sharding
from tests.support.tiny_models import CASES

case = CASES["glm-mixed"]
mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)

# An axis that does not divide is named.
try:
    sharding.shardings(serving.weights.abstract(case.config, case.schedule), mesh, sharding.Rules(vocab="tensor"))
except ValueError as error:
    assert str(error) == "embedding: axis vocab of size 97 cannot be divided over 2 devices of ('tensor',)", error
else:
    raise AssertionError("97 rows were divided by 2")

# Both forms land where the rules say, with the numbers of one device.
for form, tree in (("params", params.abstract), ("serving", serving.weights.abstract)):
    placed = sharding.shardings(tree(case.config, case.schedule), mesh, sharding.SERVING)
    loaded = load(sys.argv[1], shardings=placed, form=form)[2]
    jax.tree.map(lambda array, where: array.sharding.is_equivalent_to(where, array.ndim) or 1 / 0, loaded, placed)
    jax.tree.map(np.testing.assert_array_equal, loaded, load(sys.argv[1], form=form)[2])

    # Nothing has to be said where the mesh is in force.
    with sharding.use(mesh, sharding.SERVING.whole_experts()):
        here = load(sys.argv[1], form=form)[2]
        placed = sharding.shardings(tree(case.config, case.schedule), mesh, sharding.SERVING.whole_experts())
    jax.tree.map(lambda array, where: array.sharding.is_equivalent_to(where, array.ndim) or 1 / 0, here, placed)
    jax.tree.map(np.testing.assert_array_equal, here, loaded)
with sharding.use(mesh, sharding.Rules(vocab="tensor")):
    try:
        load(sys.argv[1])
    except ValueError as error:
        assert str(error).startswith("embedding: axis vocab of size 97 cannot be divided over 2 devices"), error
    else:
        raise AssertionError("97 rows were divided by 2")
with sharding.use(mesh.abstract_mesh):
    try:
        load(sys.argv[1])
    except ValueError as error:
        assert "'tensor': 2}, is abstract: it has no devices to load onto" in str(error), error
    else:
        raise AssertionError("weights lie on no device")
with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
    assert not any(leaf.committed for leaf in jax.tree.leaves(load(sys.argv[1])[2]))

# Under a mesh rows of a batch are split, and the results stay.
expected = forward(case.params, case.tokens, case.config, case.schedule)
with jax.set_mesh(mesh):
    hidden = jax.jit(lambda x: sharding.constrain(x, "batch", "queries", None))(jnp.zeros((2, 4, 8)))
    assert tuple(hidden.sharding.spec)[:2] == ("data", "context"), hidden.sharding
    np.testing.assert_allclose(forward(case.params, case.tokens, case.config, case.schedule), expected, atol=1e-5)
"""


def test_eight_devices(source):
    environment = os.environ | meshes.simulated(8)
    command = [sys.executable, "-c", PROGRAM, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.ROOT, env=environment)
    assert done.returncode == 0, done.stderr
