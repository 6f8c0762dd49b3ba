"""Host memory: a load needs little beside its result, a conversion about one layer. Measured in a process of its own.

The model's layers are 50 MB, large beside what programs allocate in passing and small beside the model.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.checkpoints_convert import files
from tests.support import meshes

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="measures peak memory through Linux's /proc"
)

PROGRAM = r"""
import gc, json, math, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from checkpoints_convert import convert, load, save
from indexcache_jax.config import Config
from indexcache_jax.params import abstract
from indexcache_jax.tensors import leaves
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import GLM_FIELDS

def status(field):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines[field].split()[0])

def beyond(function, *arguments, **options):
    # Peak resident bytes above those before the call and those that its result holds.
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = function(*arguments, **options)
    arrays = jax.tree.leaves(result[2]) if isinstance(result, tuple) else []
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    return status("VmHWM") - before - held

def model(**fields):
    config = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 6} | fields)
    schedule = Schedule("FFSFSS")
    filled = lambda tensor: jnp.full(tensor.shape, 0.5, tensor.dtype or jnp.bfloat16)
    return jax.tree.map(filled, abstract(config, schedule)), config, schedule

out = pathlib.Path(sys.argv[1])
mesh = jax.make_mesh((2,), ("x",))
shared = NamedSharding(mesh, PartitionSpec())
for format in ("safetensors", "orbax"):  # so that what is imported and allocated once is
    save(out / f"tiny-{format}", *model(), format=format)
    load(out / f"tiny-{format}", shardings=shared)
params, config, schedule = model(hidden_size=1024, moe_intermediate_size=512, n_routed_experts=16, first_k_dense_replace=1)
layer = 2 * sum(math.prod(t.layer_shape) for _, t in leaves(abstract(config, schedule)) if t.layers and 3 in t.layers)
found = {"layer": layer}
found["save safetensors"] = beyond(save, out / "hf", params, config, schedule, max_shard_size="100MB")
found["save orbax"] = beyond(save, out / "saved", params, config, schedule, format="orbax")
del params
found["safetensors to orbax"] = beyond(convert, out / "hf", out / "orbax")
found["orbax to safetensors"] = beyond(convert, out / "orbax", out / "again")
found["load safetensors"] = beyond(load, out / "hf")
found["load safetensors as float32"] = beyond(load, out / "hf", dtype="float32")
found["load orbax"] = beyond(load, out / "orbax")
load(out / "hf", shardings=shared)  # compiles
found["load onto two devices"] = beyond(load, out / "hf", shardings=shared)
assert "torch" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("streaming"))]
    flags = meshes.simulated(2)
    done = subprocess.run(command, capture_output=True, text=True, cwd=files.ROOT, env=os.environ | flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["load safetensors", "load safetensors as float32", "load orbax", "load onto two devices"])
def test_a_load_needs_at_most_a_layer_beyond_its_result(found, what):
    assert found[what] <= 1.2 * found["layer"], found


@pytest.mark.parametrize("what", ["save safetensors", "save orbax", "safetensors to orbax", "orbax to safetensors"])
def test_writing_needs_at_most_a_layer(found, what):
    assert found[what] <= 1.2 * found["layer"], found
