"""Orbax checkpoints are ordinary ones: orbax restores ours, and we read orbax's."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from checkpoints_convert import load, orbax_io, save
from indexcache_jax.params import shape_structs
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor
from tests.support.tiny_models import CASES, to_params

MIXED = CASES["glm-mixed"]


def assert_equal(found, expected):
    def equal(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(equal, found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("orbax") / "saved"
    save(directory, MIXED.params, MIXED.config, MIXED.schedule, format="orbax")
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in saved.rglob("*"):
        target = directory / path.relative_to(saved)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    return directory


def test_orbax_restores_what_we_write(saved):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = shape_structs(MIXED.config, MIXED.schedule, jnp.float32)
    structs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), structs)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(saved / "params", structs), MIXED.params)


def test_we_read_what_orbax_writes(tmp_path, saved):
    params = to_params(MIXED.state, MIXED.config, MIXED.schedule, jnp.bfloat16)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    assert_equal(load(tmp_path)[2], params)


def test_a_schedule_of_fewer_indexers(saved):
    config, schedule, params = load(saved, schedule="FSSFS", dtype="bfloat16")
    assert_equal(params, to_params(MIXED.state, config, Schedule("FSSFS"), jnp.bfloat16))


def test_a_schedule_of_more_indexers_is_refused(saved):
    with pytest.raises(ValueError, match=r"params: indexer\.queries of layer 2 is missing, .* saved with FFSFS"):
        load(saved, schedule="FFFFS")


def test_chunks_are_a_layer_or_less():
    gate_up = Tensor((75, 256, 6144, 2, 2048), (None,) * 5, "normal", 1.0, (), tuple(range(75)), stacked=True)
    bfloat16 = np.dtype(jnp.bfloat16)
    assert orbax_io._chunk_shape(gate_up, bfloat16) == [1, 1, 6144, 2, 2048]  # an expert: 48 MiB
    embedding = Tensor((154880, 6144), (None, None), "embedding", 1.0, ())
    rows, width = orbax_io._chunk_shape(embedding, bfloat16)
    assert width == 6144 and 32 * 2**20 < rows * width * 2 <= 64 * 2**20
    norm = Tensor((78, 6144), (None, None), "ones", 1.0, (), tuple(range(78)), stacked=True)
    assert orbax_io._chunk_shape(norm, bfloat16) == [1, 6144]


def test_a_missing_leaf_is_named(copy):
    (copy / "params" / "moe.router" / ".zarray").unlink()
    with pytest.raises(ValueError, match=r"params: moe\.router is missing"):
        load(copy)


def test_a_missing_chunk_is_not_read_as_zeros(copy):
    next((copy / "params" / "moe.router").glob("1.*")).unlink()
    with pytest.raises(ValueError, match=r"params: moe\.router cannot be read"):
        load(copy)


def test_a_truncated_chunk_is_refused(copy):
    chunk = next((copy / "params" / "moe.router").glob("1.*"))
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"params: moe\.router cannot be read"):
        load(copy)


@pytest.mark.parametrize("name", ["moe.router/.zarray", "moe.router/1.0.0", "_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("none")])
def test_what_is_no_regular_file_is_refused_before_tensorstore_waits_for_it(copy, name, make):
    path = copy / "params" / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(ValueError, match=rf"{name}: (not a regular file|no such file)|holds neither"):
        load(copy)


def test_a_link_to_a_folder_is_not_followed(copy, saved):
    path = copy / "params" / "moe.router"
    shutil.rmtree(path)
    path.symlink_to(saved / "params" / "moe.router")
    with pytest.raises(ValueError, match=r"moe\.router: is a link to a folder, which is not followed"):
        load(copy)
    shutil.rmtree(copy / "params")
    (copy / "params").symlink_to(saved / "params")  # the one that the user chose
    assert_equal(load(copy)[2], MIXED.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 64, 9]}, r"moe\.router has shape \[3, 64, 9\], but config.json makes it \[3, 64, 8\]"),
        ({"shape": [2**40, 64, 8]}, r"moe\.router has shape"),
        ({"chunks": [2**20, 2**10, 2**10]}, r"moe\.router has chunks larger than itself"),
        ({"dtype": "<i4"}, r"moe\.router has dtype int32"),
    ],
)
def test_a_misshapen_leaf_is_refused_before_memory_is_taken(copy, change, message):
    path = copy / "params" / "moe.router" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load(copy)
