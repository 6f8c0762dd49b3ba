"""What is saved loads as it was, in either format; a directory appears whole or not at all."""

import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_convert import convert, load, save
from checkpoints_convert.safetensors_io import read_directory
from checkpoints_convert.save import parse_size
from indexcache_jax.schedule import Schedule
from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES, to_params

MIXED = CASES["glm-mixed"]
FORMATS = ("safetensors", "orbax")


def assert_equal(found, expected):
    def equal(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(equal, found, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["glm-mixed", "glm-unusual", "deepseek-mixed"])
def test_params_come_back(tmp_path, name, format):
    case = CASES[name]
    save(tmp_path / "saved", case.params, case.config, case.schedule, format=format)
    config, schedule, params = load(tmp_path / "saved")
    assert (config, schedule) == (case.config, case.schedule)
    assert_equal(params, case.params)


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_comes_back_beside_the_float32_bias(tmp_path, format):
    params = to_params(MIXED.state, MIXED.config, MIXED.schedule, jnp.bfloat16)
    save(tmp_path / "saved", params, MIXED.config, MIXED.schedule, format=format)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(load(tmp_path / "saved")[2], params)
    assert load(tmp_path / "saved", dtype=np.float32)[2].embedding.dtype == jnp.float32


def test_safetensors_hold_what_the_format_names(tmp_path):
    save(tmp_path / "saved", MIXED.params, MIXED.config, MIXED.schedule)
    found = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == MIXED.state.keys()
    for name, tensor in MIXED.state.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_the_config_states_shape_schedule_and_dtype(tmp_path):
    save(tmp_path / "saved", MIXED.params, MIXED.config, MIXED.schedule)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields == MIXED.config.to_hf() | MIXED.schedule.to_hf() | {"dtype": "float32"}


def test_shards_are_bounded_and_indexed(tmp_path):
    save(tmp_path / "saved", MIXED.params, MIXED.config, MIXED.schedule, max_shard_size="100KB")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(shards) > 10 and {shard.name for shard in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in MIXED.state.values())
    for shard in shards:
        assert sum(tensor.nbytes for tensor in safetensors.numpy.load_file(shard).values()) <= 100_000
    assert_equal(load(tmp_path / "saved")[2], MIXED.params)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("200kb", 200_000), ("1 GiB", 2**30), (17, 17), ("17", 17)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", 0, "5TB", "1.5GB"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ValueError, match="max_shard_size: "):
        parse_size(text)


# What is refused leaves nothing behind.


def test_params_of_another_schedule_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"params: indexer\.queries has shape \[3, .*FFFFS make it \[4, "):
        save(tmp_path / "saved", MIXED.params, MIXED.config, Schedule("FFFFS"))
    with pytest.raises(ValueError, match=r"params: head is missing"):
        save(tmp_path / "saved", MIXED.params.replace(head=None), MIXED.config, MIXED.schedule)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        save(tmp_path, MIXED.params, MIXED.config, MIXED.schedule)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", MIXED.params, MIXED.config, MIXED.schedule)
    load(tmp_path / "empty")


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path, exists):
    if exists:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "saved").symlink_to("elsewhere")
    save(tmp_path / "saved", MIXED.params, MIXED.config, MIXED.schedule)
    load(tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "saved"]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format: 'gguf' is not one of safetensors, orbax"):
        save(tmp_path / "saved", MIXED.params, MIXED.config, MIXED.schedule, format="gguf")


@pytest.mark.parametrize("format", FORMATS)
def test_an_error_half_way_leaves_nothing(tmp_path, source, format):
    def fail(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", format=format, progress=fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_killed_process_leaves_nothing_that_loads(tmp_path, source, format):
    program = f"""
import os, signal
from checkpoints_convert import convert
def kill(done, total):
    if done == total:
        os.kill(os.getpid(), signal.SIGKILL)
convert({str(source)!r}, {str(tmp_path / "out")!r}, format={format!r}, progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=files.ROOT).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.iterdir()
    assert any(partial.rglob("*"))
    with pytest.raises(ValueError):
        load(partial)
    # Nor does it stand in the way of the next attempt.
    convert(source, tmp_path / "out", format=format)
    assert_equal(load(tmp_path / "out")[2], MIXED.params)


# Conversion.


def test_there_and_back(tmp_path, source):
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", max_shard_size="100KB")
    assert_equal(load(tmp_path / "orbax")[2], MIXED.params)
    assert_equal(load(tmp_path / "hf")[2], MIXED.params)
    assert not (tmp_path / "orbax" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_new_schedule_and_dtype_are_written(tmp_path, source, format):
    report = convert(source, tmp_path / "out", format=format, schedule="FSSFS", dtype="bfloat16")
    assert report == [
        "left out 5 tensors of indexers in S layers: model.layers.1.self_attn.indexer.wq_b.weight, "
        "model.layers.1.self_attn.indexer.wk.weight, model.layers.1.self_attn.indexer.k_norm.weight, ..."
    ]
    config, schedule, params = load(tmp_path / "out")
    assert schedule == Schedule("FSSFS")
    assert_equal(params, to_params(MIXED.state, config, schedule, jnp.bfloat16))


def test_an_export_that_transformers_runs_wrongly_is_reported(tmp_path):
    case = CASES["deepseek-mixed"]
    source = files.write_checkpoint(tmp_path / "hf", files.config_fields(case), case.state)
    (line,) = convert(source, tmp_path / "out", format="safetensors")
    assert line.startswith("transformers gives the indexers that S layers lack random weights")
    assert convert(source, tmp_path / "orbax") == []


def test_what_goes_along(tmp_path):
    directory = files.write_checkpoint(tmp_path / "hf", files.config_fields(MIXED), MIXED.state)
    (directory / "tokenizer.json").write_text("a tokenizer")
    (directory / "generation_config.json").write_text("{}")
    (directory / "modeling.py").write_text("raise SystemExit")
    for format in FORMATS:
        convert(directory, tmp_path / format, format=format)
        assert (tmp_path / format / "tokenizer.json").read_text() == "a tokenizer"
        assert (tmp_path / format / "generation_config.json").exists()
        assert not (tmp_path / format / "modeling.py").exists()


@pytest.fixture
def with_extras(tmp_path):
    """glm-mixed with a prediction layer, partly FP8, and the indexer of S layer 2."""
    layer = {name: tensor for name, tensor in MIXED.state.items() if "layers.3." in name}
    mtp = {name.replace("layers.3.", "layers.5."): tensor for name, tensor in layer.items()}
    codes, scale = files.quantise(mtp["model.layers.5.self_attn.o_proj.weight"])
    mtp |= {"model.layers.5.self_attn.o_proj.weight": codes, "model.layers.5.self_attn.o_proj.weight_scale_inv": scale}
    shared = {name.replace("layers.3.", "layers.2."): tensor for name, tensor in layer.items() if "indexer" in name}
    fields = files.config_fields(MIXED, num_nextn_predict_layers=1)
    return files.write_checkpoint(tmp_path / "extras", fields, MIXED.state | mtp | shared), mtp, shared


def test_extras_are_left_out_with_a_report(tmp_path, with_extras):
    directory, mtp, shared = with_extras
    report = convert(directory, tmp_path / "out", format="safetensors")
    assert [line.split(":")[0] for line in report] == [
        f"left out {len(mtp)} tensors of multi-token prediction (layers from 5 on)",
        "left out 5 tensors of indexers in S layers",
    ]
    assert read_directory(tmp_path / "out").keys() == MIXED.state.keys()
    assert load(tmp_path / "out")[0].num_nextn_predict_layers == 0


def test_extras_are_kept_on_request(tmp_path, with_extras):
    directory, mtp, shared = with_extras
    assert convert(directory, tmp_path / "out", format="safetensors", keep_mtp=True, keep_shared_indexers=True) == []
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    codes, scale = (mtp.pop(f"model.layers.5.self_attn.o_proj.weight{suffix}") for suffix in ("", "_scale_inv"))
    decoded = {"model.layers.5.self_attn.o_proj.weight": files.dequantise(codes, scale)}
    expected = MIXED.state | mtp | shared | decoded  # FP8 without a quantisation config would be read as numbers
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["num_nextn_predict_layers"] == 1


def test_extras_have_no_place_in_orbax(tmp_path, with_extras):
    for wanted in ({"keep_mtp": True}, {"keep_shared_indexers": True}):
        with pytest.raises(ValueError, match="only from safetensors to safetensors"):
            convert(with_extras[0], tmp_path / "out", format="orbax", **wanted)
    assert not (tmp_path / "out").exists()
