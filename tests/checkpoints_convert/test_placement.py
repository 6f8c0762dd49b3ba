"""Params and serving weights by rules on a mesh of eight CPU devices, in a process of its own."""

import os
import subprocess
import sys

from tests.checkpoints_convert import files

PROGRAM = r"""
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from checkpoints_convert import load
from checkpoints_convert.safetensors_io import Entry
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

# For an expert on one device no other expert's bytes are read.
read = []
entry_read = Entry.read
Entry.read = lambda self, start, stop: read.append((self.name, stop - start)) or entry_read(self, start, stop)
from checkpoints_convert.load import opened
checkpoint, _, tree = opened(sys.argv[1], None, None, "serving")
experts = tree.layers[4].mlp.gate_up
out = np.empty((1, *experts.shape[1:]), np.float32)
read.clear()
checkpoint.fill(experts, 4, out, (slice(3, 4), *(slice(None),) * 3))
assert {name for name, _ in read} == {f"model.layers.4.mlp.experts.3.{kind}_proj.weight" for kind in ("gate", "up")}, read
np.testing.assert_array_equal(out[0], load(sys.argv[1], form="serving")[2].layers[4].mlp.gate_up[3])

# Under a mesh rows of a batch are split, and the results stay.
expected = forward(case.params, case.tokens, case.config, case.schedule)
with jax.set_mesh(mesh):
    hidden = jax.jit(lambda x: sharding.constrain(x, "batch", "queries", None))(jnp.zeros((2, 4, 8)))
    assert tuple(hidden.sharding.spec)[:2] == ("data", "context"), hidden.sharding
    np.testing.assert_allclose(forward(case.params, case.tokens, case.config, case.schedule), expected, atol=1e-5)
"""


def test_eight_devices(source):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.ROOT, env=environment)
    assert done.returncode == 0, done.stderr
