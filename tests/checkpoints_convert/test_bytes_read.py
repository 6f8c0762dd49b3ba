"""Two processes of four devices each: both read what their own devices hold and nothing twice, and get the right numbers.

The mesh is data=2, context=2, tensor=2 under the rules of inference. So a process holds half of the experts, split over its
devices, and all of everything else; its devices keep either half of the heads.
"""

import json

import ml_dtypes
import pytest

from checkpoints_convert import convert, orbax_io
from tests.checkpoints_convert import files, processes
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]

PROGRAM = r"""
import json, pathlib, sys
import jax, numpy as np, tensorstore
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
from checkpoints_convert import load
from checkpoints_convert.safetensors_io import Entry
from indexcache_jax import sharding

from_safetensors, read_into = 0, Entry.read_into
def counted(entry, runs):
    global from_safetensors
    runs = list(runs)
    from_safetensors += 0 if entry.name.endswith("_scale_inv") else sum(out.nbytes for _, out in runs)
    read_into(entry, runs)
Entry.read_into = counted

def read():
    of_files = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return from_safetensors + (of_files[0]["values"][0]["value"] if of_files else 0)

def check(found, whole):
    assert not found.is_fully_addressable and len(found.addressable_shards) == 4
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])

mesh, found = sharding.make_mesh(data=2, context=2, tensor=2), {}
assert [device.process_index for device in mesh.devices.ravel()] == [0] * 4 + [1] * 4
for directory in sys.argv[3:]:
    for form in ("params", "serving"):
        before = read()
        with sharding.use(mesh):
            weights = load(directory, form=form)[2]
        found[f"{form} of {pathlib.Path(directory).name}"] = read() - before
        jax.tree.map(check, weights, jax.device_get(load(directory, form=form)[2]))
print(json.dumps(found))
"""


def is_expert(name: str) -> bool:
    return ".experts." in name


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The model in bfloat16 and in FP8, as stored, and its orbax checkpoint in chunks of at most an expert."""
    folder, fields = tmp_path_factory.mktemp("stored"), files.config_fields(MIXED)
    bfloat16, fp8 = {}, {}
    for name, tensor in MIXED.state.items():
        bfloat16[name] = tensor if name.endswith("e_score_correction_bias") else tensor.astype(ml_dtypes.bfloat16)
        if name.endswith("_proj.weight") and ".indexer." not in name:
            fp8[name], fp8[f"{name}_scale_inv"] = files.quantise(tensor)
        else:
            fp8[name] = bfloat16[name]
    files.write_checkpoint(folder / "bfloat16", fields, bfloat16, shards=3)
    files.write_checkpoint(folder / "fp8", fields, fp8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_io, "MIN_CHUNK", 1024)
        convert(folder / "bfloat16", folder / "orbax")
    return {"bfloat16": bfloat16, "fp8": fp8, "orbax": folder / "orbax" / "params"}, folder


@pytest.fixture(scope="module")
def found(directories):
    stored, folder = directories
    printed = processes.run_two(PROGRAM, *(str(folder / name) for name in stored))
    return [json.loads(lines.splitlines()[-1]) for lines in printed]


@pytest.mark.parametrize("form", ["params", "serving"])
@pytest.mark.parametrize("name", ["bfloat16", "fp8"])
def test_a_process_reads_from_safetensors_exactly_what_its_devices_hold(directories, found, name, form):
    tensors = {key: tensor for key, tensor in directories[0][name].items() if not key.endswith("_scale_inv")}
    expected = sum(tensor.nbytes // (2 if is_expert(key) else 1) for key, tensor in tensors.items())
    assert [process[f"{form} of {name}"] for process in found] == [expected, expected]


@pytest.mark.parametrize("form", ["params", "serving"])
def test_a_process_reads_from_orbax_the_chunks_that_its_devices_hold_something_of(directories, found, form):
    of_process = [0, 0]
    for leaf in directories[0]["orbax"].iterdir():
        for file in leaf.iterdir() if leaf.is_dir() else ():
            size = file.stat().st_size
            if leaf.name in ("moe.gate_up", "moe.down") and file.name != ".zarray":
                of_process[int(file.name.split(".")[1]) // 4] += size
            else:  # a chunk may hold all heads; then it is read for either half of them
                has_heads = leaf.name.startswith("attention.") and leaf.name.split(".")[1] in ("q_up", "k_up", "v_up", "out")
                of_process = [total + size * (2 if has_heads else 1) for total in of_process]
    for process, expected in zip(found, of_process, strict=True):
        assert 0.8 * expected < process[f"{form} of orbax"] <= expected
