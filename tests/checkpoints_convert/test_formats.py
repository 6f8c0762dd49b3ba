"""What is not read is called by its name, not by the damage it would be; what only has other names is read."""

import json
import time
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import convert, load
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES, GLM_FIELDS, state

MIXED = CASES["glm-mixed"]
QUANTISED = "model.layers.3.self_attn.o_proj.weight"


@pytest.fixture
def write(tmp_path):
    def write(tensors, **fields):
        return files.write_checkpoint(tmp_path / "checkpoint", files.config_fields(MIXED, **fields), tensors)

    return write


def without(*names):
    return {name: tensor for name, tensor in MIXED.state.items() if name not in names}


def compressed(bits, kind, strategy, format="float-quantized", **more):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, **more}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights}}}


def packed(suffix="qweight"):
    return without(QUANTISED) | {QUANTISED.replace(".weight", f".{suffix}"): np.zeros((4, 4), np.uint8)}


def per_channel():
    codes = np.zeros(MIXED.state[QUANTISED].shape, ml_dtypes.float8_e4m3fn)
    return MIXED.state | {QUANTISED: codes, f"{QUANTISED}_scale": np.ones((len(codes), 1), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        (
            packed,
            {"quant_method": "awq", "bits": 4},
            r"quant_method: 'awq' \(AWQ, integers of 4 bits\): only bfloat16, .*missing",
        ),
        (packed, {"quant_method": "gptq"}, r"quant_method: 'gptq' \(GPTQ, packed integers\)"),
        (packed, {"quant_method": "hqq"}, r"quant_method: 'hqq': only bfloat16"),
        (packed, {"quant_method": "\x1b[31m"}, r"quant_method: '\\x1b\[31m': only"),
        (packed, {"quant_method": ["awq"]}, r"quant_method: \['awq'\]: only"),
        (packed, {"quant_method": "mxfp4"}, r"quant_method: 'mxfp4' \(MXFP4\)"),
        (packed, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"'modelopt' \('NVFP4' of NVIDIA's ModelOpt\)"),
        (packed, compressed(4, "int", "group", "pack-quantized"), r"'compressed-tensors' \(packed int4\)"),
        (packed, compressed(4, "float", "tensor_group", "nvfp4-pack-quantized"), r"'compressed-tensors' \(NVFP4\)"),
        (packed, compressed(4, "float", "group", "mxfp4-pack-quantized"), r"'compressed-tensors' \(MXFP4\)"),
        (per_channel, compressed(8, "float", "channel"), r"'compressed-tensors' \(per-channel FP8\)"),
        (per_channel, {"quant_method": "fbgemm_fp8"}, r"'fbgemm_fp8' \(per-channel FP8\)"),
        (per_channel, {"quant_method": "fp8"}, r"'fp8' without weight_block_size"),
        (packed, None, rf"tensor {QUANTISED.replace('.weight', '.qweight')} \(AWQ or GPTQ, packed integers\)"),
        (lambda: packed("weight_packed"), None, r"\(packed integers or NVFP4 of compressed-tensors\)"),
        (lambda: packed("weight_scale_2"), None, r"\(NVFP4\)"),
    ],
)
def test_quantised_weights_that_are_not_read_are_called_by_their_method(write, tensors, quantization, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(write(tensors(), quantization_config=quantization))
    assert str(caught.value).isprintable()


def of_experts(kind):
    """A model that is mostly experts, all matrices but the indexers' in 4 bits, so that it is smaller than its numbers."""
    fields = GLM_FIELDS | {"n_routed_experts": 64, "moe_intermediate_size": 64, "indexer_types": ["full"] * 5}
    tensors = {}
    for name, tensor in state(Config.from_hf(fields), Schedule("FFFFF"), 0).items():
        rows, columns = tensor.shape if tensor.ndim == 2 else (0, 0)
        base = name.removesuffix(".weight")
        if not rows or "_proj" not in name or ".indexer." in name:
            tensors[name] = tensor.astype(np.float16)
        elif kind == "awq":
            tensors |= {f"{base}.qweight": np.zeros((columns, rows // 2), np.uint8), f"{base}.scales": np.zeros((1, rows))}
        elif kind == "nvfp4":
            scales = {f"{name}_scale": np.zeros((rows, columns // 16), np.uint8), f"{name}_scale_2": np.zeros(1, np.float32)}
            tensors |= {name: np.zeros((rows, columns // 2), np.uint8)} | scales
        else:
            absmax = {f"{name}.absmax": np.zeros(rows * columns // 64, np.float32)}
            tensors |= {name: np.zeros((rows * columns // 2, 1), np.uint8)} | absmax
    return fields, tensors


@pytest.mark.parametrize(
    ("kind", "quantization", "message"),
    [
        ("awq", {"quant_method": "awq", "bits": 4}, r"quant_method: 'awq' \(AWQ, integers of 4 bits\): only"),
        ("awq", None, r"\.qweight \(AWQ or GPTQ, packed integers\): only"),
        ("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"'modelopt' \('NVFP4' of NVIDIA's ModelOpt\): only"),
        ("nvfp4", None, r"weight_scale_2 \(NVFP4\): only"),
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method: 'bitsandbytes' .*: only"),
        ("bitsandbytes", None, r"\.absmax \(bitsandbytes, 4 bits\): only"),
    ],
)
def test_a_whole_model_in_4_bits_is_no_model_that_does_not_fit_its_files(tmp_path, kind, quantization, message):
    fields, tensors = of_experts(kind)
    directory = files.write_checkpoint(tmp_path / "model", fields | {"quantization_config": quantization}, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load(directory)
    assert str(caught.value).startswith(str(directory)) and "config.json:" not in str(caught.value).split(": only")[0]


@pytest.mark.parametrize("value", ["fp8", 5, ["fp8"], True])
@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_what_says_how_weights_are_quantised_is_an_object(write, field, value):
    with pytest.raises(ValueError, match=rf"config\.json: {field}: .* is not an object"):
        load(write(MIXED.state, **{field: value}))


def test_plain_weights_are_read_whatever_the_config_says_of_a_method(write):
    load(write(MIXED.state, quantization_config={"quant_method": "awq"}))


def test_blocks_with_scales_of_another_name_are_read(write):
    """As compressed-tensors writes FP8 in blocks."""
    side = 32
    codes, scale = files.quantise(MIXED.state[QUANTISED], (side, side))
    quantization = compressed(8, "float", "block", block_structure=[side, side])
    stored = MIXED.state | {QUANTISED: codes, f"{QUANTISED}_scale": scale.astype(ml_dtypes.bfloat16)}
    other = MIXED.state | {QUANTISED: codes, f"{QUANTISED}_scale_inv": scale.astype(ml_dtypes.bfloat16)}
    found = load(write(stored, quantization_config=quantization), dtype="float32")[2]
    same = {"quant_method": "fp8", "weight_block_size": [side, side]}
    expected = load(write(other, quantization_config=same), dtype="float32")[2]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Names.


@pytest.mark.parametrize(
    ("rename", "fit"),
    [
        (lambda name: f"language_model.{name}", "would fit without 'language_model.'"),
        (lambda name: name.removeprefix("model."), "would fit with 'model.' before them"),
        (lambda name: name.replace("model.", "transformer.", 1), "would fit with 'model.' in place of 'transformer.'"),
        (lambda name: f"x{hash(name)}", "names look like x"),
    ],
)
def test_names_under_another_prefix_are_shown_with_what_would_fit(write, rename, fit):
    tensors = {rename(name): tensor for name, tensor in MIXED.state.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=rf"none of the \d+ tensors that config\.json needs is there.*{fit}"):
        load(write(tensors, tie_word_embeddings=True))


# What is there instead, and beside.


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_model.bin", "'pytorch_model.bin' is there, a pickle, which is not read"),
        ("pytorch_model.bin.index.json", "a pickle, which is not read"),
        ("consolidated.00.pth", "a pickle"),
        ("glm-5-q4.gguf", "'glm-5-q4.gguf' is there, GGUF, which is not read"),
        ("weights.safetensors", "'weights.safetensors' is there, not a name that is read without an index"),
    ],
)
def test_what_is_there_instead_of_a_checkpoint_is_named(tmp_path, name, what):
    (tmp_path / "config.json").write_text(json.dumps(files.config_fields(MIXED)))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"holds neither .*{what}.* save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_overlay_is_refused_with_what_to_do(write, name):
    directory = write(MIXED.state)
    (directory / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}: an adapter \(LoRA\) .* is not applied; merge it .* or remove the file"):
        load(directory)


def test_what_the_index_does_not_name_is_named_and_not_read(tmp_path):
    directory = files.write_checkpoint(tmp_path / "in", files.config_fields(MIXED), MIXED.state, shards=2)
    files.write_file(directory / "patch.safetensors", {"model.norm.weight": np.zeros(64, np.float32)})
    with pytest.warns(UserWarning, match=r"not read: 1 files that .*index\.json does not name: patch\.safetensors"):
        params = load(directory)[2]
    jax.tree.map(np.testing.assert_array_equal, params, MIXED.params)


def test_a_git_lfs_pointer_is_called_one(write):
    directory = write(MIXED.state)
    for name in ("model.safetensors", "config.json"):
        (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        with pytest.raises(ValueError, match=rf"{name}: is a Git LFS pointer"):
            load(directory)


# Memory.


def many_experts(**more):
    """Of one number each, so that 100,000 of them take 1.2 MB."""
    shape = {"hidden_size": 1, "moe_intermediate_size": 1, "n_routed_experts": 100_000, "num_hidden_layers": 1}
    return files.config_fields(MIXED) | shape | {"first_k_dense_replace": 0, "indexer_types": ["full"]} | more


@pytest.mark.parametrize("layers", [1, 10_000])
def test_a_description_larger_than_what_is_stored_is_refused_before_it_is_made(tmp_path, layers):
    experts = "model.layers.0.mlp.experts"
    tensors = {f"{experts}.gate_up_proj": np.ones((100_000, 2, 1), np.float32)}
    tensors[f"{experts}.down_proj"] = np.ones((100_000, 1, 1), np.float32)
    more = {"num_hidden_layers": layers, "indexer_types": None}
    if layers > 1:
        more |= {"first_k_dense_replace": layers, "n_routed_experts": 8}
    source = files.write_checkpoint(tmp_path / "in", many_experts(**more), tensors)
    refused_early(source)


def test_the_same_holds_for_orbax(tmp_path):
    source = files.write_checkpoint(tmp_path / "hf", files.config_fields(MIXED), MIXED.state)
    convert(source, tmp_path / "orbax")
    Config.from_hf(many_experts())
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(many_experts()))
    refused_early(tmp_path / "orbax")


def refused_early(directory):
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"config\.json: n_routed_experts: .* cannot fit in the \d+ bytes stored"):
        load(directory)
    assert tracemalloc.get_traced_memory()[1] < 20e6 and time.perf_counter() - began < 5
    tracemalloc.stop()
