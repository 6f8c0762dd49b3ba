"""A file is believed only where its header, its size and its index agree; what does not add up is named."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_convert.safetensors_io import (
    INDEX,
    Spec,
    plan_shards,
    read_directory,
    read_header,
    read_stored,
    write_index,
    write_shard,
)
from tests.checkpoints_convert import files

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def rejected(path, message):
    return pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message)


def test_reads_what_the_safetensors_package_writes(path):
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.dtype == np.float32}
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    entries = read_header(path)
    assert entries.keys() == tensors.keys()
    np.testing.assert_array_equal(entries["a"].rows(0, 2), TENSORS["a"])
    np.testing.assert_array_equal(entries["a"].rows(1, 2), TENSORS["a"][1:])


def test_writes_what_the_safetensors_package_reads(path):
    specs = [Spec("a", "F32", (2, 3)), Spec("empty", "F32", (0, 4))]
    write_shard(path, specs, [TENSORS["a"][:1], TENSORS["a"][1:]])
    found = safetensors.numpy.load_file(path)
    assert found.keys() == {"a", "empty"} and found["empty"].shape == (0, 4)
    np.testing.assert_array_equal(found["a"], TENSORS["a"])


def test_data_is_read_only_where_it_is_asked_for(path):
    files.write_file(path, TENSORS)
    entry = read_header(path)["b"]
    assert [slab.nbytes for slab in entry.slabs(4)] == [4, 4, 2]
    path.write_bytes(path.read_bytes()[:-6])
    np.testing.assert_array_equal(entry.rows(0, 2), TENSORS["b"][:2])
    with rejected(path, "ends inside tensor b"):
        entry.rows(0, 5)


def a_header(**changes):
    return json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (a_header(shape=[-2, -3]), "tensor a has shape"),
        (a_header(shape=[2, 3.0]), "tensor a has shape"),
        (a_header(shape=[True, 6]), "tensor a has shape"),
        (a_header(shape="23"), "tensor a has shape"),
        (a_header(shape=[1] * 1000), "tensor a has shape"),
        (a_header(shape=[2**62, 2**62]), "takes .* bytes"),
        (a_header(shape=[2, 4]), "takes 32 bytes"),
        (a_header(dtype="F31"), "no dtype"),
        (a_header(dtype=["F32"]), "no dtype"),
        (a_header(data_offsets=[24, 0]), "data_offsets"),
        (a_header(data_offsets=[0]), "data_offsets"),
        (a_header(data_offsets=[0, 10**30]), "data_offsets"),
        (a_header(data_offsets=[1, 25]), "tensor a begins at byte 1"),
        (b'{"a": 5}', "tensor a"),
        (b"[]", "not an object"),
        (b'{"a"', "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (a_header()[:-1] + b"," + a_header()[1:], "there twice"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 24]}}', "cannot be read"),
    ],
)
def test_a_bad_header_is_refused(path, header, message):
    files.write_raw(path, header, bytes(24))
    with rejected(path, message):
        read_header(path)


@pytest.mark.parametrize("length", [25, 2**40, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(path, length):
    files.write_raw(path, b"{}", bytes(20), length=length)
    with rejected(path, f"a header of {length} bytes does not fit"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_room_for_a_header_is_refused(path, size):
    path.write_bytes(bytes(size))
    with rejected(path, "does not fit"):
        read_header(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_truncated_or_padded_file_is_refused(path, change):
    files.write_file(path, TENSORS)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with rejected(path, "truncated or padded"):
        read_header(path)


def test_overlapping_tensors_are_refused(path):
    files.write_file(path, {"a": TENSORS["a"]}, b={"dtype": "F32", "shape": [2], "data_offsets": [16, 24]})
    with rejected(path, "tensor b begins at byte 16, but a ends at byte 24"):
        read_header(path)


@pytest.fixture
def sharded(tmp_path):
    return files.write_checkpoint(tmp_path, {}, TENSORS, shards=2)


def edit_index(directory, **changes):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))
    return path


def test_shards_are_read_through_their_index(sharded):
    entries = read_directory(sharded)
    assert entries.keys() == TENSORS.keys()
    np.testing.assert_array_equal(entries["b"].rows(0, 5), TENSORS["b"])


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x\\y.safetensors", "x.bin", 5, None]
)
def test_a_weight_map_holds_names_never_paths(sharded, name):
    (sharded.parent / "x.safetensors").write_bytes(b"never opened")
    index = edit_index(sharded, a=name)
    with rejected(index, "not the name of a .safetensors file"):
        read_directory(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_refused(sharded):
    index = edit_index(sharded, c="model-00001-of-00002.safetensors")
    with rejected(index, "places tensor c in model-00001-of-00002.safetensors"):
        read_directory(sharded)


def test_a_missing_shard_is_refused(sharded):
    index = edit_index(sharded, c="model-00003-of-00002.safetensors")
    with rejected(index, "names model-00003-of-00002.safetensors"):
        read_directory(sharded)


def test_exactly_what_the_index_lists_is_read(sharded):
    """A tensor that another shard holds too, one that is not listed, and files that are not named: all named, none read."""
    second = sharded / "model-00002-of-00002.safetensors"
    files.write_file(second, {"a": TENSORS["a"] + 1, "b": TENSORS["b"], "extra": TENSORS["a"]})
    files.write_file(sharded / "patch.safetensors", {"a": TENSORS["a"] + 2})
    (sharded / "broken.safetensors").write_bytes(b"no header")
    stored = read_stored(sharded)
    assert stored.entries.keys() == TENSORS.keys()
    assert stored.entries["a"].file.name == "model-00001-of-00002.safetensors"
    np.testing.assert_array_equal(stored.entries["a"].rows(0, 2), TENSORS["a"])
    assert stored.notes() == [
        "not read: 2 files that model.safetensors.index.json does not name: broken.safetensors, patch.safetensors",
        "not read: 2 tensors that model.safetensors.index.json does not list there: "
        "a in model-00002-of-00002.safetensors, extra in model-00002-of-00002.safetensors",
    ]


def test_an_index_decides_where_there_is_a_single_file_too(sharded):
    files.write_file(sharded / "model.safetensors", {"a": TENSORS["a"] + 1})
    stored = read_stored(sharded)
    np.testing.assert_array_equal(stored.entries["a"].rows(0, 2), TENSORS["a"])
    assert stored.notes() == ["not read: 1 files that model.safetensors.index.json does not name: model.safetensors"]


def test_a_link_to_an_index_that_is_not_there_is_not_no_index(sharded):
    files.write_file(sharded / "model.safetensors", {"a": TENSORS["a"] + 1})
    (sharded / INDEX).unlink()
    (sharded / INDEX).symlink_to("../blobs/0")
    with pytest.raises(ValueError, match=r"index\.json: no such file, but a link to one"):
        read_stored(sharded)


def test_the_order_of_a_header_means_nothing(path):
    """As JSON may have it: names in another order than data, and a tensor without a byte between two others."""
    names = {
        "c": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "none": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    files.write_raw(path, json.dumps(names).encode(), np.arange(4, dtype=np.float32).tobytes())
    entries = read_header(path)
    assert entries["a"].rows(0, 2).tolist() == [0, 1] and entries["c"].rows(0, 2).tolist() == [2, 3]


HOSTILE = "\x1b]0;owned\x07\nmodel.norm.weight"


def test_a_name_that_drives_a_terminal_is_shown_escaped(path, sharded):
    files.write_file(path, {HOSTILE: TENSORS["a"]})
    with rejected(path, r"holds '\\x1b\]0;owned\\x07\\nmodel.norm.weight', which is not a tensor's name") as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    path.unlink()
    for changes in (
        {HOSTILE: "model-00001-of-00002.safetensors"},
        {"a": "\x1b[31m.safetensors"},
        {"a": "x" * 300 + ".safetensors"},
    ):
        index = edit_index(sharded, **{"a": "model-00001-of-00002.safetensors"} | changes)
        with pytest.raises(ValueError) as caught:
            read_directory(sharded)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
        text = json.loads(index.read_text())
        text["weight_map"].pop(HOSTILE, None)
        index.write_text(json.dumps(text))


def test_a_git_lfs_pointer_is_called_one(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4999\n")
    with rejected(path, "is a Git LFS pointer, not the file itself"):
        read_header(path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_weight_map_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="weight_map is not an object"):
        read_directory(tmp_path)


def test_shards_stay_below_the_bound_unless_one_tensor_is_above():
    specs = [Spec(name, "U8", (size,)) for name, size in (("a", 6), ("b", 4), ("c", 1), ("d", 30), ("e", 10))]
    shards = plan_shards(specs, 10)
    assert [[spec.name for spec in shard] for shard in shards.values()] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert next(iter(shards)) == "model-00001-of-00004.safetensors"
    assert list(plan_shards(specs, 100)) == ["model.safetensors"]


def test_the_index_sums_up_the_shards(tmp_path):
    specs = [Spec("a", "F32", (2,)), Spec("b", "F32", (3,))]
    write_index(tmp_path, plan_shards(specs, 12))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 20}
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
