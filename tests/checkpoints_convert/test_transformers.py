"""transformers and this package read each other's directories and then compute the same."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle needs torch; it is tested where the test extra installs it")
pytest.importorskip("transformers", reason="the oracle needs transformers; it is tested where the test extra installs it")

import torch
import transformers

from checkpoints_convert import load, save
from indexcache_jax import forward
from tests.checkpoints_convert import files
from tests.support import oracle
from tests.support.tiny_models import CASES, GLM_FIELDS, Case, to_params

ATOL = 5e-5  # of logits of size 4, in float32
NAMES = ["glm-all-full", "glm-mixed", "glm-one-indexer", "glm-unusual", "deepseek-all-full", "deepseek-unusual"]
UNUSUAL = ["glm-unusual", "deepseek-unusual"]  # whose constants are not the defaults


def test_the_oracle_is_the_pinned_one():
    """Older versions compute something else."""
    assert importlib.metadata.version("transformers") == "5.23.0"


@pytest.fixture(scope="module", params=NAMES)
def round_trip(request, tmp_path_factory):
    """(case, transformers' model, params loaded from its directory, the model that loads from ours)."""
    case, directory = CASES[request.param], tmp_path_factory.mktemp("transformers")
    model = oracle.build(case)
    model.save_pretrained(directory / "theirs", max_shard_size="200KB")
    assert len(list((directory / "theirs").glob("*.safetensors"))) > 5
    config, schedule, params = load(directory / "theirs")
    save(directory / "ours", params, config, schedule, max_shard_size="200KB")
    return case, model, (config, schedule, params), oracle.load(directory / "ours")


def test_their_directory_loads_here(round_trip):
    case, _, (config, schedule, params), _ = round_trip
    assert schedule == case.schedule
    assert config.moe_layers == case.config.moe_layers and config.rope == case.config.rope
    jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_our_directory_loads_there_with_the_same_weights(round_trip):
    """oracle.load has seen to it that no tensor is missing, unexpected or misshapen."""
    _, model, _, again = round_trip
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_our_directory_gives_the_same_logits_there(round_trip):
    """Weights may agree while a constant of the config is lost."""
    case, model, _, again = round_trip
    np.testing.assert_array_equal(oracle.record(again, case)[0], oracle.record(model, case)[0])


@pytest.mark.parametrize("round_trip", UNUSUAL, indirect=True)
def test_their_directory_gives_the_same_logits_here(round_trip):
    case, model, (config, schedule, params), _ = round_trip
    expected = oracle.record(model, case)[0]
    ours = np.asarray(forward(params, case.tokens, config, schedule, lengths=jnp.array(case.lengths)))
    np.testing.assert_allclose(ours[case.is_valid], expected[case.is_valid], atol=ATOL, rtol=0)


def from_pretrained(directory):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_bfloat16_loads_there(tmp_path):
    case = CASES["glm-mixed"]
    save(tmp_path / "ours", to_params(case.state, case.config, case.schedule, jnp.bfloat16), case.config, case.schedule)
    weights = from_pretrained(tmp_path / "ours").state_dict()
    assert weights["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.indexer.weights_proj.weight"):
        expected = torch.from_numpy(case.state[name]).to(torch.bfloat16)
        assert weights[name].dtype == torch.bfloat16 and torch.equal(weights[name], expected)


def test_fp8_is_what_its_definition_says_once_it_is_there(tmp_path):
    """transformers takes 576 // 5 rows for a block, so it cannot read such a checkpoint before we have."""
    case = Case(
        GLM_FIELDS | {"num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 96}, "FSF", 0
    )
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    codes, scale = files.quantise(case.state[name])
    assert codes.shape[0] == 576 and scale.shape[0] == 5
    fields = files.config_fields(
        case, dtype="float32", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    files.write_checkpoint(tmp_path / "fp8", fields, case.state | {name: codes, f"{name}_scale_inv": scale})
    config, schedule, params = load(tmp_path / "fp8")
    save(tmp_path / "ours", params, config, schedule)
    weights = from_pretrained(tmp_path / "ours").state_dict()
    np.testing.assert_array_equal(weights[name].numpy(), files.dequantise(codes, scale))
