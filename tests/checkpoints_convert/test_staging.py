"""Host memory of a load onto devices that do not share it: one part of one leaf, whatever the leaf's size.

Four CPU devices are taken for such devices, in a process of its own: from memory that is not aligned as they want it they
copy, as others do. tracemalloc counts every byte that NumPy allocates and none of JAX's or tensorstore's, so the figures are
exact. Reading in small slabs keeps what passes through memory beside the parts small in a small model.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.checkpoints_convert import files

PROGRAM = r"""
import importlib, json, math, sys, tracemalloc
import jax, jax.numpy as jnp, numpy as np
from checkpoints_convert import huggingface, load, orbax_io, save
from indexcache_jax import sharding
from indexcache_jax.config import Config
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import leaves
from tests.support.tiny_models import GLM_FIELDS

of_load = importlib.import_module("checkpoints_convert.load")
def unaligned(shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + 8
    return memory[start : start + size].view(dtype).reshape(shape)

of_load._takes_over, of_load.aligned = lambda device: False, unaligned
of_load._MIN_PIECE = huggingface.SLAB_BYTES = 2**16
huggingface.READERS = 2
experts = {"hidden_size": 1024, "moe_intermediate_size": 256, "n_routed_experts": 32, "first_k_dense_replace": 1}
config = Config.from_hf(GLM_FIELDS | experts | {"num_hidden_layers": 3})
schedule = Schedule("FSS")
bits = np.random.default_rng(0)
def random(tensor):
    return bits.random(tensor.shape, np.float32).astype(tensor.dtype or jnp.bfloat16)

params = jax.tree.map(random, abstract(config, schedule))
mesh = sharding.make_mesh(context=4)
found = {"part": params.moe.gate_up[0].nbytes // 4}
for format in ("safetensors", "orbax"):
    save(f"{sys.argv[1]}/{format}", params, config, schedule, format=format)
    for form in ("params", "serving"):
        with sharding.use(mesh):
            if format == "safetensors":
                load(f"{sys.argv[1]}/{format}", form=form)  # compiles
            tracemalloc.start()
            loaded = load(f"{sys.argv[1]}/{format}", form=form)[2]
            found[f"{form} from {format}"] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if form == "params":
            jax.tree.map(np.testing.assert_array_equal, loaded, params)
        else:
            np.testing.assert_array_equal(loaded.layers[1].mlp.gate_up, params.moe.gate_up[0])
            np.testing.assert_array_equal(loaded.layers[2].mlp.down, params.moe.down[1])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("staging"))]
    # Without the XLA flags of this process: programs that copy large arrays run for longer than they compile.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["params", "serving"])
@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_load_stages_little_more_than_the_largest_part_of_a_device(found, form, format):
    assert found[f"{form} from {format}"] <= 1.2 * found["part"], found
