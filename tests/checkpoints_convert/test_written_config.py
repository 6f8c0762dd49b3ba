"""The config.json of an export is its source's, but for what has changed, and claims nothing that is not there."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_convert import convert, load, save
from checkpoints_convert.written_config import Origin, written_fields
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES, DEEPSEEK_FIELDS, GLM_FIELDS, Case

GLM = Case({k: v for k, v in GLM_FIELDS.items() if k != "first_k_dense_replace"} | {"first_k_dense_replace": 2}, "FFSSS", 0)
# As GLM-5.2 ships it, and what only other programs read.
SHIPPED = dict(GLM.fields) | {
    "index_topk_freq": 4,
    "index_skip_topk_offset": 2,
    "index_share_for_mtp_iteration": True,
    "rope_parameters": None,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32},
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 64,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "float32",
    "head_dim": 192,
    "ep_size": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "auto_map": {"AutoModelForCausalLM": "modeling_glm.Glm"},
    "transformers_version": "5.15.0",
    "vendor": {"nested": [1, {"a": None}]},
}
FORMATS = ("safetensors", "orbax")
pytestmark = pytest.mark.filterwarnings("ignore:.*left out .* tensors of multi-token prediction")


def mtp_layer(of=3, to=5):
    return {n.replace(f"layers.{of}.", f"layers.{to}."): t for n, t in GLM.state.items() if f"layers.{of}." in n}


@pytest.fixture
def shipped(tmp_path):
    return files.write_checkpoint(tmp_path / "shipped", SHIPPED, GLM.state | mtp_layer(), shards=2)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def changes(before, after):
    """Field -> new value, ... for a field that is gone."""
    return {k: after.get(k, ...) for k in before.keys() | after.keys() if before.get(k, ...) != after.get(k, ...)}


WRITTEN = {
    "indexer_types": ["full", "full", "shared", "shared", "shared"],
    "index_topk_pattern": "FFSSS",
    "num_nextn_predict_layers": 0,
    "dtype": "float32",
    "quantization_config": ...,
    "auto_map": ...,
}


@pytest.mark.parametrize("format", FORMATS)
def test_only_what_changed_is_changed(shipped, tmp_path, format):
    convert(shipped, tmp_path / "out", format=format)
    assert changes(SHIPPED, config_of(tmp_path / "out")) == WRITTEN


def test_fields_survive_there_and_back(shipped, tmp_path):
    convert(shipped, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf")
    assert changes(SHIPPED, config_of(tmp_path / "hf")) == WRITTEN


def test_a_new_schedule_and_dtype_are_said_by_every_field(shipped, tmp_path):
    convert(shipped, tmp_path / "out", format="safetensors", schedule="FSSSS", dtype="bfloat16")
    found = changes(SHIPPED, config_of(tmp_path / "out"))
    assert (found["dtype"], found["torch_dtype"], found["index_topk_pattern"]) == ("bfloat16", "bfloat16", "FSSSS")
    assert (found["index_topk_freq"], found["index_skip_topk_offset"]) == (..., ...)
    assert load(tmp_path / "out")[1] == Schedule("FSSSS")


def test_params_that_come_from_a_checkpoint_keep_its_fields(shipped, tmp_path):
    config, schedule, params = load(shipped)
    save(tmp_path / "out", params, config, schedule, companions_of=shipped)
    assert changes(SHIPPED, config_of(tmp_path / "out")) == WRITTEN


def test_a_changed_shape_leaves_no_other_name_for_it():
    config = Config.from_hf(SHIPPED)
    longer = dataclasses.replace(config, rope=dataclasses.replace(config.rope, factor=8.0), max_position_embeddings=512)
    fields = written_fields(longer, Schedule("FFFFF"), "float32", origin=Origin(SHIPPED, config))
    assert "rope_scaling" not in fields and "rope_theta" not in fields and fields["vendor"] == SHIPPED["vendor"]
    assert Config.from_hf(fields) == dataclasses.replace(longer, num_nextn_predict_layers=0)


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_a_changed_shape_leaves_no_default_that_it_changes(where):
    """Yarn's factor is max_position_embeddings over the original ones, where config.json has none."""
    shipped = SHIPPED | {"rope_scaling": None, where: {"type": "yarn"}, "num_nextn_predict_layers": 0}
    config = Config.from_hf(shipped)
    longer = dataclasses.replace(config, max_position_embeddings=512)
    fields = written_fields(longer, Schedule("FFFFF"), "float32", origin=Origin(shipped, config))
    assert Config.from_hf(fields) == longer


@pytest.mark.parametrize("fields", [SHIPPED, dict(DEEPSEEK_FIELDS) | {"rope_interleave": True}], ids=["glm", "deepseek"])
def test_transformers_reads_the_same_model(tmp_path, fields):
    transformers = pytest.importorskip("transformers", reason="the test extra has it below Python 3.12")
    schedule = Schedule.from_hf(fields)
    case = Case(fields, schedule.pattern, 0)
    source = files.write_checkpoint(tmp_path / "source", fields, case.state)
    convert(source, tmp_path / "out", format="safetensors")
    before, after = (transformers.AutoConfig.from_pretrained(d).to_dict() for d in (source, tmp_path / "out"))
    found = changes(before, after).keys()
    assert found <= {"quantization_config", "auto_map", "dtype", "num_nextn_predict_layers", "_name_or_path"} | {
        *("indexer_types", "index_topk_pattern")
    }, found
    if before["model_type"] == "glm_moe_dsa":
        assert before["indexer_types"] == after["indexer_types"]


# Layers of multi-token prediction.


def assert_kept(directory, tensors):
    assert config_of(directory)["num_nextn_predict_layers"] == 1
    found = safetensors.numpy.load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_what_is_claimed_of_multi_token_prediction_is_there(shipped, tmp_path):
    convert(shipped, tmp_path / "with", format="safetensors", keep_mtp=True)
    assert_kept(tmp_path / "with", mtp_layer())
    config, schedule, params = load(shipped)
    assert config.num_nextn_predict_layers == 1
    save(tmp_path / "saved", params, config, schedule)
    assert config_of(tmp_path / "saved")["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("where", ["a file that the index does not name", "a shard of its own", "beside a single file"])
def test_a_layer_of_multi_token_prediction_in_a_file_of_its_own_is_kept(tmp_path, where):
    shards = 1 if where == "beside a single file" else 2
    source = files.write_checkpoint(tmp_path / "in", SHIPPED, GLM.state, shards=shards)
    codes, scale = files.quantise(mtp_layer()["model.layers.5.self_attn.o_proj.weight"])
    name = "model.layers.5.self_attn.o_proj.weight"
    files.write_file(source / "mtp.safetensors", mtp_layer() | {name: codes, f"{name}_scale_inv": scale, "other": scale})
    if where == "a shard of its own":
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        listed = {tensor: "mtp.safetensors" for tensor in (*mtp_layer(), f"{name}_scale_inv", "other")}
        path.write_text(json.dumps({"weight_map": index["weight_map"] | listed}))
    report = convert(source, tmp_path / "out", format="safetensors", keep_mtp=True, dtype="float32")
    assert_kept(tmp_path / "out", mtp_layer() | {name: files.dequantise(codes, scale)})
    assert [line for line in report if "not read" in line] == []
    if where != "a shard of its own":
        convert(source, tmp_path / "without", format="safetensors")
        (line,) = (line for line in convert(source, tmp_path / "again", format="safetensors") if "not read" in line)
        assert "mtp.safetensors" in line
        assert config_of(tmp_path / "without")["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(("flag", "what"), [("keep_mtp", "no layer of multi-token"), ("keep_shared_indexers", "no indexer")])
def test_nothing_to_keep_is_an_error(tmp_path, flag, what):
    source = files.write_checkpoint(tmp_path / "in", SHIPPED, GLM.state)
    with pytest.raises(ValueError, match=f"{flag}: .* holds {what}"):
        convert(source, tmp_path / "out", format="safetensors", **{flag: True})
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_dtype_gets_one(tmp_path):
    source = files.write_checkpoint(tmp_path / "in", files.config_fields(CASES["glm-mixed"]), CASES["glm-mixed"].state)
    convert(source, tmp_path / "out", format="safetensors", dtype=jnp.bfloat16)
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16" and "torch_dtype" not in config_of(tmp_path / "out")
