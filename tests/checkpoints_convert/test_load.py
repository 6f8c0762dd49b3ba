"""A Hugging Face directory becomes the params its names, dtypes and schedule say, or an error that names the tensor."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import load
from indexcache_jax.schedule import Schedule
from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES, GLM_FIELDS, Case, checkpoint_shapes, to_params

MIXED = CASES["glm-mixed"]  # FFSFS, dense layers 0 and 1
EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"
INDEXER = "model.layers.3.self_attn.indexer.wk.weight"


@pytest.fixture
def write(tmp_path):
    def write(tensors, case=MIXED, shards=1, **fields):
        return files.write_checkpoint(tmp_path / "checkpoint", files.config_fields(case, **fields), tensors, shards)

    return write


def assert_equal(found, expected):
    def equal(a, b):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(equal, found, expected)


# What is read.


@pytest.mark.parametrize("name", ["glm-mixed", "glm-unusual", "deepseek-mixed"])
def test_every_tensor_finds_its_place(write, name):
    case = CASES[name]
    config, schedule, params = load(write(case.state, case, shards=4))
    assert (config, schedule) == (case.config, case.schedule)
    assert_equal(params, case.params)


def test_the_directory_may_be_a_string(source):
    assert_equal(load(str(source))[2], MIXED.params)


def cast(tensors, dtype, keep=("e_score_correction_bias",)):
    return {name: tensor if name.endswith(keep) else tensor.astype(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("stored", "fields", "expected"),
    [
        (np.float32, {}, jnp.float32),
        (ml_dtypes.bfloat16, {}, jnp.bfloat16),
        (np.float16, {}, jnp.float32),
        (ml_dtypes.bfloat16, {"torch_dtype": "float32"}, jnp.float32),
        (np.float32, {"dtype": "bfloat16"}, jnp.bfloat16),
    ],
)
def test_dtype_is_the_config_s_or_the_weights_own(write, stored, fields, expected):
    tensors = cast(MIXED.state, stored)
    _, _, params = load(write(tensors, **fields))
    assert params.moe.router_bias.dtype == jnp.float32
    assert_equal(params, to_params(tensors, MIXED.config, MIXED.schedule, expected))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.float32, "float16"])
def test_dtype_may_be_asked_for(source, dtype):
    _, _, params = load(source, dtype=dtype)
    assert_equal(params, to_params(MIXED.state, MIXED.config, MIXED.schedule, jnp.dtype(dtype)))


def test_numbers_that_float16_does_not_have_are_named(write):
    """They would become infinite without a word."""
    name = "model.layers.3.self_attn.o_proj.weight"
    large = MIXED.state[name].copy()
    large[0, 0] = 1e5
    directory = write(MIXED.state | {name: large})
    with pytest.raises(ValueError, match=rf"tensor {name}: holds numbers above 65504\.0 or NaN, which float16 cannot"):
        load(directory, dtype="float16")
    assert load(directory, dtype="bfloat16")[2].embedding.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "bf16", "float64", 5])
def test_other_dtypes_are_refused(source, dtype):
    with pytest.raises(ValueError, match=f"dtype: {dtype!r} is not one of"):
        load(source, dtype=dtype)


def test_layer_norms_of_their_own_dtype_are_cast(write):
    tensors = cast(MIXED.state, ml_dtypes.bfloat16, keep=("norm.weight", "e_score_correction_bias"))
    assert load(write(tensors))[2].input_norm.dtype == jnp.bfloat16


def fused_experts():
    fused = {name: tensor for name, tensor in MIXED.state.items() if ".experts." not in name}
    for layer in (2, 3, 4):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([MIXED.state[f"{experts}.{e}.{kind}_proj.weight"] for e in range(8)]) for kind in ("gate", "up", "down")
        )
        fused |= {f"{experts}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{experts}.down_proj": down}
    return fused


def test_experts_fused_as_transformers_holds_them(write):
    assert_equal(load(write(fused_experts()))[2], MIXED.params)


@pytest.mark.parametrize("edges", [(0, 1, 0), (1, 0, 0)])
def test_fused_experts_of_another_number_or_width_are_refused(write, edges):
    fused, name = fused_experts(), "model.layers.2.mlp.experts.gate_up_proj"
    fused[name] = np.pad(fused[name], [(0, n) for n in edges])
    with pytest.raises(ValueError, match=rf"tensor {re.escape(name)} has shape .*, but config.json makes it \[8, 64, 64\]"):
        load(write(fused))


# FP8. The latent's projection has 576 rows, as in the released models: five blocks, the last 64 high.

RAGGED = Case(
    GLM_FIELDS | {"num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 96}, "FSF", 0
)


@pytest.mark.parametrize("encode", files.SCALES.values(), ids=files.SCALES)
def test_fp8_with_ragged_blocks(write, encode):
    stored, numbers = files.quantised(RAGGED, encode)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[name].shape == (576, 64) and stored[f"{name}_scale_inv"].shape == (5, 1)
    _, _, params = load(write(stored, RAGGED))
    assert params.attention.kv_down.dtype == jnp.bfloat16
    assert_equal(params, to_params(numbers, RAGGED.config, RAGGED.schedule, jnp.bfloat16))


def test_fp8_blocks_of_the_config_s_size(write):
    stored, numbers = files.quantised(RAGGED, block=(96, 16))
    quantization = {"quant_method": "fp8", "weight_block_size": [96, 16], "modules_to_not_convert": ["model.layers.0"]}
    _, _, params = load(write(stored, RAGGED, quantization_config=quantization), dtype="float32")
    assert_equal(params, to_params(numbers, RAGGED.config, RAGGED.schedule))


def test_fp8_that_does_not_fit_is_refused(write):
    stored, _ = files.quantised(RAGGED)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    scale = f"{name}_scale_inv"

    def refused(tensors, message, **fields):
        with pytest.raises(ValueError, match=message):
            load(write(tensors, RAGGED, **fields))

    # 4 scales for 576 rows: what 576 // 128 would give.
    refused(
        stored | {scale: stored[scale][:4]}, rf"{re.escape(scale)} has shape \[4, 1\], but .* \[576, 64\] .* needs \[5, 1\]"
    )
    refused(
        {key: tensor for key, tensor in stored.items() if key != scale}, f"{re.escape(name)} is FP8, but its scale .* missing"
    )
    refused(stored | {scale: stored[scale].astype(np.float16)}, f"{re.escape(scale)} has dtype F16, not one of")
    refused(stored | {name: RAGGED.state[name]}, f"{re.escape(name)} is F32, yet .* holds a scale for it")
    refused(stored, r"model\.layers.* needs", quantization_config={"weight_block_size": [64, 64]})
    norm = "model.norm.weight"
    one_dimensional = {norm: stored[norm].astype(ml_dtypes.float8_e4m3fn), f"{norm}_scale_inv": np.ones(1, np.float32)}
    refused(stored | one_dimensional, "model.norm.weight is FP8 with shape .* only matrices")


# What is left out.


def extra(layer_to):
    """The tensors of layer 3 once more, for another layer."""
    return {
        name.replace("layers.3.", f"layers.{layer_to}."): tensor for name, tensor in MIXED.state.items() if "layers.3." in name
    }


def test_prediction_layers_and_shared_indexers_are_reported(write):
    shared = {name: tensor for name, tensor in extra(2).items() if ".indexer." in name}
    mtp = extra(5) | {"model.layers.5.enorm.weight": np.ones(64, np.float32)}
    with pytest.warns(UserWarning) as warned:
        params = load(write(MIXED.state | shared | mtp))[2]
    assert_equal(params, MIXED.params)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert f"left out {len(mtp)} tensors of multi-token prediction (layers from 5 on): model.layers.5." in messages[0]
    assert "left out 5 tensors of indexers in S layers: model.layers.2.self_attn.indexer." in messages[1]


def test_unknown_tensors_are_named_once(write):
    unknown = {f"vision.{i}.weight": np.ones(3, np.float64) for i in range(7)}
    with pytest.warns(
        UserWarning, match=r"left out 7 tensors that the model does not have: vision.0.weight, .*, \.\.\."
    ) as warned:
        load(write(MIXED.state | unknown))
    assert len(warned) == 1


def test_what_means_nothing_is_passed_over(write, recwarn):
    attention = "model.layers.0.self_attn"
    load(
        write(
            MIXED.state
            | {
                f"{attention}.rotary_emb.inv_freq": np.ones(8, np.float32),
                f"{attention}.q_a_proj.input_scale": np.ones(1, np.float32),
            }
        )
    )
    assert not recwarn.list


# The schedule.


def test_a_schedule_of_fewer_indexers(source):
    with pytest.warns(UserWarning, match="left out 10 tensors of indexers in S layers"):
        config, schedule, params = load(source, schedule="FSSSS")
    assert schedule == Schedule("FSSSS")
    assert_equal(params, to_params(MIXED.state, MIXED.config, schedule))


def test_a_schedule_of_more_indexers_names_what_is_missing(source):
    message = (
        r"model.safetensors.index.json: tensor model.layers.2.self_attn.indexer.wq_b.weight is missing, .* makes that layer F"
    )
    with pytest.raises(ValueError, match=message):
        load(source, schedule=Schedule("FFFFS"))


@pytest.mark.parametrize("schedule", ["FFSF", "SFFFF", "FFXFS", Schedule("FF")])
def test_a_bad_schedule_is_refused(source, schedule):
    with pytest.raises(ValueError, match="schedule pattern: "):
        load(source, schedule=schedule)


def test_an_override_makes_up_for_a_bad_config(write):
    directory = write(MIXED.state, indexer_types=["shared"] * 5)
    with pytest.raises(ValueError, match="indexer_types"):
        load(directory)
    assert_equal(load(directory, schedule=MIXED.pattern)[2], MIXED.params)


# What is refused.


def without(name):
    return {key: tensor for key, tensor in MIXED.state.items() if key != name}


@pytest.mark.parametrize("name", [EXPERT, "lm_head.weight", "model.norm.weight", "model.layers.4.self_attn.kv_b_proj.weight"])
def test_a_missing_tensor_is_named(write, name):
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor {re.escape(name)} is missing$"):
        load(write(without(name)))


def test_several_missing_tensors_are_counted(write):
    tensors = {name: tensor for name, tensor in MIXED.state.items() if "kv_b_proj" not in name}
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.kv_b_proj.weight is missing \(and 4 other tensors\)"):
        load(write(tensors))


def test_tied_embeddings_need_no_head(write):
    _, _, params = load(write(without("lm_head.weight"), tie_word_embeddings=True))
    assert params.head is None


@pytest.mark.parametrize("name", [EXPERT, INDEXER])
def test_a_misshapen_tensor_is_named_with_its_file_and_both_shapes(write, name):
    tensor = MIXED.state[name]
    wide = np.concatenate([tensor, tensor])
    with pytest.raises(
        ValueError, match=rf"\.safetensors: tensor {re.escape(name)} has shape .*{len(wide)}.* makes it .*{len(tensor)}"
    ):
        load(write(MIXED.state | {name: wide}))


def test_a_dtype_that_is_no_weight_s_is_refused(write):
    with pytest.raises(ValueError, match=rf"tensor {re.escape(EXPERT)} has dtype F64, not one of"):
        load(write(MIXED.state | {EXPERT: MIXED.state[EXPERT].astype(np.float64)}))


def test_a_truncated_last_shard_is_refused(write):
    directory = write(MIXED.state, shards=3)
    shard = directory / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.safetensors: truncated"):
        load(directory)


def test_a_config_that_cannot_fit_its_files_is_refused_before_memory_is_taken(write):
    with pytest.raises(ValueError, match=r"config\.json: n_routed_experts: 100000 cannot fit in the"):
        load(write(MIXED.state, n_routed_experts=10**5))


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(files.config_fields(MIXED)))
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        load(tmp_path)


def test_names_and_shapes_are_the_released_models():
    """What the other tests write comes from the tree that the reader uses too; this holds it to the format."""
    shapes = checkpoint_shapes(MIXED.config, MIXED.schedule)
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (48, 64)
    assert shapes["model.layers.0.self_attn.kv_b_proj.weight"] == (4 * (24 + 20), 32)
    assert shapes["model.layers.0.self_attn.q_b_proj.weight"] == (4 * 40, 48)
    assert shapes["model.layers.3.mlp.experts.7.down_proj.weight"] == (64, 32)
    assert not any("layers.2.self_attn.indexer" in name for name in shapes)
