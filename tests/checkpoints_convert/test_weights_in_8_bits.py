"""Matrices in 8 bits stay what they are from file to array to file; others are quantised where that is asked for."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import Layers, convert, fp8, load, save, stored_weights
from checkpoints_convert.safetensors_io import read_directory
from indexcache_jax import params, serving
from indexcache_jax.tensors import leaves
from pallas_kernels.quant import Scaled, dequantise
from tests.checkpoints_convert import files
from tests.support.eight_bits import RAGGED, decoded_params, decoded_serving
from tests.support.tiny_models import to_params

CONFIG, SCHEDULE = RAGGED.config, RAGGED.schedule
QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}


def stored_bytes(directory):
    """Name -> dtype, shape and bytes of every stored tensor."""
    return {name: (e.dtype, e.shape, e.read(0, e.nbytes).tobytes()) for name, e in read_directory(directory).items()}


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), err_msg=path)


def quantised(matrix):
    codes, scales = files.quantise(np.asarray(matrix))
    return Scaled(jnp.asarray(codes), jnp.asarray(scales))


def write(directory, tensors):
    return files.write_checkpoint(directory, files.config_fields(RAGGED, quantization_config=QUANTISATION), tensors, shards=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(a checkpoint in FP8, its matrices as float32 numbers)"""
    stored, numbers = files.quantised(RAGGED)
    return write(tmp_path_factory.mktemp("fp8") / "hf", stored), numbers


@pytest.mark.parametrize("encode", files.SCALES.values(), ids=files.SCALES)
def test_a_checkpoint_comes_back_byte_for_byte(tmp_path, encode):
    source = write(tmp_path / "hf", files.quantised(RAGGED, encode)[0])
    assert read_directory(source)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert stored_bytes(tmp_path / "back") == stored_bytes(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"] == QUANTISATION


def test_arrays_are_written_as_they_were_read(tmp_path, checkpoint):
    source, _ = checkpoint
    config, schedule, loaded = load(source, dtype="float32", weights="stored")
    save(tmp_path / "back", loaded, config, schedule, companions_of=source)
    assert stored_bytes(tmp_path / "back") == stored_bytes(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"] == QUANTISATION


def test_what_codes_and_scales_mean_is_what_is_decoded(checkpoint):
    source, numbers = checkpoint
    expected = to_params(numbers, CONFIG, SCHEDULE)
    in_codes = load(source, dtype="float32", weights="fp8")[2]
    assert_equal(decoded_params(in_codes, CONFIG), expected)
    assert_equal(load(source, dtype="float32")[2], expected)
    weights = load(source, dtype="float32", form="serving", weights="fp8")[2]
    decoded = load(source, dtype="float32", form="serving")[2]
    assert_equal(decoded_serving(weights), decoded)
    assert_equal(serving.from_params(in_codes, CONFIG, SCHEDULE), weights)


def test_the_trees_are_the_ones_described(checkpoint):
    trees = {"params": params.abstract, "serving": serving.weights.abstract}
    for form, abstract in trees.items():
        loaded, described = load(checkpoint[0], dtype="float32", form=form, weights="fp8")[2], abstract(CONFIG, SCHEDULE, "fp8")
        for (path, array), (_, tensor) in zip(leaves(loaded), leaves(described), strict=True):
            assert array.shape == tensor.shape, path
            assert array.dtype == (tensor.dtype or jnp.float32), path


def test_orbax_gives_either_form_of_either_tree(tmp_path, checkpoint):
    source, _ = checkpoint
    convert(source, tmp_path / "orbax")
    for form in ("params", "serving"):
        for weights in (None, "fp8", "stored"):
            asked = {"dtype": "float32", "form": form, "weights": weights}
            assert_equal(load(tmp_path / "orbax", **asked)[2], load(source, **asked)[2])


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_other_checkpoints_are_quantised_by_blocks(tmp_path, format):
    numbers = to_params(RAGGED.state, CONFIG, SCHEDULE)
    save(tmp_path / "float", numbers, CONFIG, SCHEDULE, format=format)
    assert stored_weights(tmp_path / "float") is None
    weights = load(tmp_path / "float", form="serving", weights="fp8")[2]
    plain = load(tmp_path / "float", form="serving", dtype="float32")[2]
    for p, q in zip(weights.layers, plain.layers, strict=True):
        assert_equal([p.up, p.out], [quantised(q.up), quantised(q.out)])
        assert p.down.dtype == p.k_up.dtype == jnp.float32
    experts, plain_experts = weights.layers[1].mlp, plain.layers[1].mlp
    for e in range(CONFIG.n_routed_experts):
        gate_up = [quantised(plain_experts.gate_up[e, :, half].T) for half in range(2)]
        assert_equal(jax.tree.map(lambda x, e=e: x[e], [experts.gate_up]), [jax.tree.map(lambda *x: np.stack(x), *gate_up)])
        assert_equal(jax.tree.map(lambda x, e=e: x[e], [experts.down]), [quantised(plain_experts.down[e].T)])
    dense, width = weights.layers[0].mlp.gate_up, CONFIG.intermediate_size
    assert dense.by_row and width % 128
    halves = [dequantise(quantised(half), jnp.float32) for half in jnp.split(plain.layers[0].mlp.gate_up, 2)]
    assert_equal([dequantise(dense, jnp.float32)], [jnp.concatenate(halves)])


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_numbers_that_are_not_finite_are_not_quantised(tmp_path, number):
    """A block has one scale: a number without one would take the others along."""
    name = "model.layers.1.self_attn.o_proj.weight"
    broken = RAGGED.state[name].copy()
    broken[-1, -1] = number
    source = files.write_checkpoint(tmp_path / "float", files.config_fields(RAGGED), RAGGED.state | {name: broken})
    with pytest.raises(ValueError, match=rf"tensor {name}: holds NaN or infinity, which cannot be written in FP8"):
        convert(source, tmp_path / "out", format="safetensors", weights="fp8")
    assert not (tmp_path / "out").exists()


def test_a_conversion_quantises_and_decodes(tmp_path, checkpoint):
    source, numbers = checkpoint
    files.write_checkpoint(tmp_path / "float", files.config_fields(RAGGED), numbers)
    convert(source, tmp_path / "decoded", format="safetensors", weights=None, dtype="float32")
    assert stored_bytes(tmp_path / "decoded") == stored_bytes(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "decoded" / "config.json").read_text())
    convert(tmp_path / "float", tmp_path / "fp8", format="safetensors", weights="fp8")
    # These numbers are products of codes, of which each block has one of the largest magnitude.
    assert stored_bytes(tmp_path / "fp8") == stored_bytes(source)
    written = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert written["weight_block_size"] == [128, 128]
    assert "model.layers.1.mlp.gate" in written["modules_to_not_convert"]


def test_indexers_trained_on_a_base_in_8_bits_are_quantised_when_written(tmp_path, checkpoint):
    source, _ = checkpoint
    config, schedule, base = load(source, dtype="float32", weights="fp8 base")
    assert isinstance(base.attention.out, Scaled) and base.indexer.queries.dtype == jnp.float32
    save(tmp_path / "out", base, config, schedule)
    assert stored_bytes(tmp_path / "out") == stored_bytes(source)  # nothing was trained
    save(tmp_path / "beside", base, config, schedule, companions_of=source)  # whose config.json says ue8m0
    scales = [e.rows(0, e.shape[0]) for name, e in read_directory(tmp_path / "beside").items() if "wk.weight_scale" in name]
    assert scales and all(np.all(np.frexp(x)[0] == 0.5) for x in scales)


def test_layers_one_at_a_time(checkpoint):
    source, _ = checkpoint
    whole, some = load(source, weights="fp8")[2], Layers(source, weights="fp8")
    assert some.weights == "fp8"
    layer = some.layer(2)
    np.testing.assert_array_equal(layer.attention.out.codes[0], whole.attention.out.codes[2])
    np.testing.assert_array_equal(layer.moe.gate_up.scales[0], whole.moe.gate_up.scales[1])


def test_copies_keep_their_codes(tmp_path):
    stored, _ = files.quantised(RAGGED)
    mtp = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in stored.items() if "layers.2." in name}
    source = write(tmp_path / "hf", stored | mtp)
    convert(source, tmp_path / "out", format="safetensors", keep_mtp=True)
    assert stored_bytes(tmp_path / "out") == stored_bytes(source)


def test_copies_in_16_bits_beside_quantised_matrices_are_named(tmp_path):
    """Engines look for the scales of every matrix that quantization_config does not name."""
    numbers = files.quantised(RAGGED)[1]
    mtp = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in numbers.items() if "layers.2." in name}
    source = files.write_checkpoint(tmp_path / "hf", files.config_fields(RAGGED), numbers | mtp)
    convert(source, tmp_path / "out", format="safetensors", weights="fp8", keep_mtp=True)
    named = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    matrices = {name.removesuffix(".weight") for name, tensor in mtp.items() if tensor.ndim == 2}
    assert matrices <= set(named) and "model.layers.2.self_attn.o_proj" not in named


def test_what_was_left_in_16_bits_and_is_quantised_is_no_longer_named(tmp_path):
    stored, numbers = files.quantised(RAGGED)
    name = "model.layers.0.self_attn.indexer.wk.weight"
    del stored[f"{name}_scale_inv"]
    left_out = {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexer"]}
    fields = files.config_fields(RAGGED, quantization_config=QUANTISATION | left_out)
    source = files.write_checkpoint(tmp_path / "hf", fields, stored | {name: numbers[name].astype(ml_dtypes.bfloat16)})
    assert convert(source, tmp_path / "out", format="safetensors") == [
        f"quantised 1 matrices that are not in FP8 there: {name}"
    ]
    with pytest.warns(UserWarning, match=f"quantised 1 matrices that are not in FP8 there: {name}"):
        load(source, weights="stored")
    assert read_directory(tmp_path / "out")[name].dtype == "F8_E4M3"
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    named = written.pop("modules_to_not_convert")
    assert written == QUANTISATION and "model.layers.0.self_attn.indexer.weights_proj" in named
    assert not any("wk" in module or module.endswith("indexer") for module in named)


def test_blocks_of_compressed_tensors_are_written_with_a_config_that_names_scales_as_they_are(tmp_path):
    stored, _ = files.quantised(RAGGED, files.SCALES["BF16"])
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    quantisation = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}, "ignore": []}
    renamed = {name.removesuffix("_inv"): tensor for name, tensor in stored.items()}
    fields = files.config_fields(RAGGED, quantization_config=quantisation)
    source = files.write_checkpoint(tmp_path / "compressed", fields, renamed)
    convert(source, tmp_path / "out", format="safetensors")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written == fp8.config_of(CONFIG)
    assert stored_bytes(tmp_path / "out") == stored_bytes(write(tmp_path / "named fp8", stored))


def test_scales_of_several_types_become_float32(tmp_path):
    stored, numbers = files.quantised(RAGGED)
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    exact = stored[name].astype(ml_dtypes.bfloat16)
    source = write(tmp_path / "hf", stored | {name: exact})
    out = load(source, weights="fp8")[2].attention.out
    assert out.scales.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(out.scales[1]), exact.astype(np.float32))


def test_blocks_of_another_size_are_decoded_and_quantised_anew(tmp_path):
    stored, numbers = files.quantised(RAGGED, block=(64, 64))
    fields = files.config_fields(RAGGED, quantization_config=QUANTISATION | {"weight_block_size": [64, 64]})
    source = files.write_checkpoint(tmp_path / "hf", fields, stored)
    assert stored_weights(source) is None
    name = "model.layers.0.self_attn.o_proj.weight"
    out = load(source, weights="fp8")[2].attention.out
    assert_equal([jax.tree.map(lambda x: x[0], out)], [quantised(numbers[name])])


def test_a_form_that_is_none_is_named(checkpoint):
    with pytest.raises(ValueError, match="weights: 'int4' is not one of stored, fp8"):
        load(checkpoint[0], weights="int4")
