"""A training checkpoint goes to whatever mesh the run that resumes it has. Eight CPU devices, in a process of their own."""

import os
import pathlib
import subprocess
import sys

from tests.support import meshes

PROGRAM = r"""
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from experiments.common import runs
from indexcache_jax import params, sharding, training
from tests.support.tiny_models import CASES

case = CASES["glm-mixed"]
stage = training.Stage("sparse", "sparse", 3, 1, 24, 1e-3, 1e-2)
fresh = training.init_optimiser_state(case.params, stage, case.config, case.schedule)
random = np.random.default_rng(0)
trained = jax.tree.map(lambda a: (100 * random.random(a.shape)).astype(a.dtype), fresh)

def placed(mesh):
    # Params and optimiser state where training on a mesh of some devices has them.
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[5])
        return jax.tree.map(lambda _: one, case.params), jax.tree.map(lambda _: one, fresh)
    of_params = sharding.shardings(params.abstract(case.config, case.schedule), mesh, sharding.TRAINING)
    return of_params, training.optimiser_shardings(fresh, of_params)

meshes = {
    "data=4": sharding.make_mesh(data=4, devices=jax.devices()[:4]),
    "data=2,context=2": sharding.make_mesh(data=2, context=2, devices=jax.devices()[4:]),
    "one device": None,
}
for saved in ("data=4", "one device"):
    folder = pathlib.Path(sys.argv[1]) / saved
    with runs._Checkpoints(folder, 1, {}) as checkpoints:
        checkpoints.save(7, *jax.device_put((case.params, trained), placed(meshes[saved])), {})
    for mesh in meshes.values():
        with runs._Checkpoints(folder, 1, {}) as checkpoints:
            assert checkpoints.steps == [7] and checkpoints.times(7) == {}
            like = jax.device_put((jax.tree.map(jnp.zeros_like, case.params), fresh), placed(mesh))
            restored = checkpoints.restore(7, *like)
        def check(found, expected, where):
            assert found.sharding.is_equivalent_to(where, found.ndim), (found.sharding, where)
            np.testing.assert_array_equal(found, expected)
        jax.tree.map(check, restored, (case.params, trained), placed(mesh))
"""


def test_saved_on_one_mesh_and_resumed_on_another(tmp_path):
    environment = os.environ | meshes.simulated(8)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[3], env=environment)
    assert done.returncode == 0, done.stderr
