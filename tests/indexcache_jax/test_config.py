"""Config: what it reads from a config.json, in which precedence, and what it refuses."""

import dataclasses
import json
import math

import jax
import pytest

from indexcache_jax.config import Config, Rope
from indexcache_jax.config_json import DEEPSEEK, GLM, read_config_json
from indexcache_jax.presets import PRESETS, preset
from indexcache_jax.schedule import Schedule

TINY = {
    "model_type": GLM,
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 8,
}
YARN = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}


def tiny(**changes):
    """TINY with some fields changed; a value of ... removes the field."""
    return {name: value for name, value in (TINY | changes).items() if value is not ...}


# What is read.


@pytest.mark.parametrize(
    ("name", "family", "layers", "scale", "dense"),
    [
        ("deepseek-v3.2", DEEPSEEK, 61, 0.1352337789, 3),
        ("glm-5", GLM, 78, 0.0625, 3),
        ("glm-5.2", GLM, 78, 0.0625, 3),
        ("30b", GLM, 47, 0.0625, 1),
    ],
)
def test_presets(name, family, layers, scale, dense):
    config = Config.from_hf(preset(name))
    assert (config.family, config.num_layers) == (family, layers)
    assert config.attention_scale == pytest.approx(scale, rel=1e-9)
    assert config.moe_layers == (False,) * dense + (True,) * (layers - dense)
    assert config.latent_dim == 576
    assert config.index_topk == 2048
    assert config.latent_norm_eps == 1e-6


def test_an_unknown_preset_is_refused_and_a_known_one_is_the_callers_to_change():
    with pytest.raises(ValueError, match=r"preset: 'glm-4' is not one of"):
        preset("glm-4")
    preset("glm-5")["rope_parameters"]["rope_theta"] = 1.0
    assert PRESETS["glm-5"]["rope_parameters"]["rope_theta"] == 1e6


def test_a_dict_a_file_and_a_directory_read_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert Config.from_hf(TINY) == Config.from_hf(tmp_path) == Config.from_hf(str(tmp_path / "config.json"))


def test_defaults_are_each_familys_own():
    glm = Config.from_hf(tiny(index_n_heads=..., index_head_dim=..., index_topk=...))
    deepseek = Config.from_hf(
        tiny(model_type=DEEPSEEK, index_n_heads=..., index_head_dim=..., index_topk=..., n_routed_experts=16)
    )
    assert (glm.index_n_heads, glm.index_head_dim, glm.index_topk) == (32, 128, 2048)
    assert (deepseek.index_n_heads, deepseek.index_head_dim, deepseek.index_topk) == (64, 128, 2048)
    assert (glm.n_group, glm.topk_group, glm.rms_norm_eps) == (1, 1, 1e-5)
    assert (deepseek.n_group, deepseek.topk_group, deepseek.rms_norm_eps) == (8, 4, 1e-6)
    assert glm.index_rope_interleave and not deepseek.index_rope_interleave
    assert glm.rope == deepseek.rope or glm.rope.theta == deepseek.rope.theta == 10000.0
    assert glm.rope.type == deepseek.rope.type == "default"


def test_the_architecture_decides_the_family_before_the_model_type():
    fields = tiny(architectures=["DeepseekV32ForCausalLM"], n_routed_experts=16)
    assert Config.from_hf(fields).family == DEEPSEEK


@pytest.mark.parametrize("family", [GLM, DEEPSEEK])
@pytest.mark.parametrize("given", [True, False])
def test_indexer_rope_interleave_overrides_the_familys_layout(family, given):
    assert (
        Config.from_hf(tiny(model_type=family, n_group=1, topk_group=1, indexer_rope_interleave=given)).index_rope_interleave
        is given
    )


def test_head_dim_is_ignored():
    assert Config.from_hf(tiny(head_dim=192, qk_head_dim=7)) == Config.from_hf(TINY)


def test_null_means_absent():
    nulls = dict.fromkeys(
        ["rope_scaling", "rope_theta", "num_experts", "mlp_layer_types", "n_group", "eos_token_id", "rms_norm_eps", "head_dim"]
    )
    assert Config.from_hf(TINY | nulls) == Config.from_hf(TINY)
    rope = {"rope_type": None, "type": None, "rope_theta": None, "factor": None}
    assert Config.from_hf(tiny(rope_parameters=rope)) == Config.from_hf(TINY)


def test_num_experts_overrides_n_routed_experts():
    assert Config.from_hf(tiny(num_experts=16)).n_routed_experts == 16


def test_mlp_layer_types_win_over_first_k_dense_replace():
    assert Config.from_hf(TINY).moe_layers == (False, False, True, True, True)
    types = ["sparse", "dense", "sparse", "dense", "dense"]
    assert Config.from_hf(tiny(mlp_layer_types=types)).moe_layers == (True, False, True, False, False)
    assert Config.from_hf(tiny(first_k_dense_replace=...)).moe_layers == (False, False, False, True, True)


def test_end_of_text_may_be_one_token_several_or_none():
    assert Config.from_hf(TINY).eos_token_ids == ()
    assert Config.from_hf(tiny(eos_token_id=3)).eos_token_ids == (3,)
    assert Config.from_hf(tiny(eos_token_id=[3, 0])).eos_token_ids == (3, 0)


# Rotary settings.


def test_rope_scaling_replaces_rope_parameters():
    fields = tiny(rope_parameters={"rope_theta": 5.0, "rope_type": "default"}, rope_scaling=YARN, rope_theta=7.0)
    rope = Config.from_hf(fields).rope
    assert (rope.type, rope.theta, rope.factor, rope.original_max_position) == ("yarn", 7.0, 40.0, 64)
    assert (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)


def test_a_top_level_rope_theta_only_fills_a_gap():
    assert Config.from_hf(tiny(rope_parameters={"rope_theta": 5.0}, rope_theta=7.0)).rope.theta == 5.0
    assert Config.from_hf(tiny(rope_parameters={"rope_type": "default"}, rope_theta=7.0)).rope.theta == 7.0
    assert Config.from_hf(tiny(rope_theta=7.0)).rope.theta == 7.0


def test_rope_type_wins_over_its_old_name():
    assert Config.from_hf(tiny(rope_parameters={"type": "yarn", "rope_type": "default"})).rope.type == "default"


def test_yarn_without_a_factor_stretches_to_the_longest_position():
    rope = Config.from_hf(tiny(rope_scaling=YARN | {"factor": None}, max_position_embeddings=256)).rope
    assert rope.factor == 4.0


def test_yarn_gains():
    gain = 0.1 * math.log(40) + 1
    both = Rope(type="yarn", factor=40, mscale=1.0, mscale_all_dim=1.0)
    assert both.attention_factor == 1.0
    assert both.softmax_gain == pytest.approx(gain**2)
    neither = Rope(type="yarn", factor=40)
    assert neither.attention_factor == pytest.approx(gain)
    assert neither.softmax_gain == 1.0
    half = Rope(type="yarn", factor=40, mscale=0.5, mscale_all_dim=1.0)
    assert half.attention_factor == pytest.approx((0.05 * math.log(40) + 1) / gain)
    assert Rope(mscale=1.0, mscale_all_dim=1.0, factor=40).softmax_gain == 1.0


# What is refused: each error names the field and shows the value.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "glm5_next"}, r"model_type: 'glm5_next' is not supported"),
        ({"model_type": "glm5_next"}, r"GLM-5\.3-Flash \(glm5_next\) is another architecture"),
        ({"architectures": ["Glm5NextForConditionalGeneration"]}, r"architectures: .* is not supported: GLM-5\.3-Flash"),
        ({"model_type": "deepseek_v3"}, r"DeepSeek-V3 \(deepseek_v3\) has no indexers"),
        ({"model_type": [1]}, r"model_type: \[1\] is not a string"),
        ({"model_type": {"a": 1}}, r"model_type: \{'a': 1\} is not a string"),
        ({"architectures": [["a"], {}]}, r"architectures: \[\['a'\], \{\}\] is not supported"),
        ({"model_type": ...}, r"model_type: None is not supported"),
        ({"architectures": ["Glm4MoeLiteForCausalLM"]}, r"architectures: \['Glm4MoeLiteForCausalLM'\] is not supported"),
        ({"num_hidden_layers": ...}, r"num_hidden_layers: missing"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers: 0 is not an integer of at least 1"),
        ({"num_hidden_layers": True}, r"num_hidden_layers: True is not"),
        ({"num_attention_heads": "4"}, r"num_attention_heads: '4' is not an integer"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads: 2 differs from num_attention_heads 4"),
        ({"q_lora_rank": None}, r"q_lora_rank: missing"),
        ({"kv_lora_rank": -1}, r"kv_lora_rank: -1 is not an integer of at least 1"),
        ({"vocab_size": 97.0}, r"vocab_size: 97.0 is not an integer"),
        ({"qk_rope_head_dim": 15}, r"qk_rope_head_dim: 15 is odd"),
        ({"index_head_dim": 8}, r"index_head_dim: 8 is below qk_rope_head_dim 16"),
        ({"index_topk": 0}, r"index_topk: 0 is not an integer of at least 1"),
        ({"n_shared_experts": -1}, r"n_shared_experts: -1 is not an integer of at least 0"),
        ({"n_routed_experts": ...}, r"n_routed_experts: missing"),
        ({"n_group": 8}, r"n_group: 8 experts cannot be divided into 8 equal groups of at least 2"),
        ({"n_group": 3}, r"n_group: 8 experts cannot be divided into 3 equal groups"),
        ({"topk_group": 2}, r"topk_group: 2 is above n_group 1"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok: 9 is above the 8 experts"),
        ({"first_k_dense_replace": "2"}, r"first_k_dense_replace: '2' is not"),
        ({"mlp_layer_types": ["dense"]}, r"mlp_layer_types: \['dense'\] is not a list of 5"),
        ({"mlp_layer_types": ["moe"] * 5}, r"mlp_layer_types: 'moe' is neither"),
        ({"hidden_act": "gelu"}, r"hidden_act: 'gelu' is not supported"),
        ({"scoring_func": "softmax"}, r"scoring_func: 'softmax' is not supported"),
        ({"topk_method": "greedy"}, r"topk_method: 'greedy' is not supported"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps: 'small' is not a number"),
        ({"rms_norm_eps": -1e-5}, r"rms_norm_eps: -1e-05 is negative"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps: 1e\+300 is above 1"),
        (
            {"rope_scaling": YARN | {"mscale_all_dim": -10 / math.log(4)}},
            r"rope_parameters.mscale_all_dim: -7\.2\d* is negative",
        ),
        ({"rms_norm_eps": math.nan}, r"rms_norm_eps: nan is not finite"),
        ({"routed_scaling_factor": math.inf}, r"routed_scaling_factor: inf is not finite"),
        ({"routed_scaling_factor": 10**400}, r"routed_scaling_factor: 10+\.\.\. is not finite"),
        ({"norm_topk_prob": "false"}, r"norm_topk_prob: 'false' is neither true nor false"),
        ({"indexer_rope_interleave": "false"}, r"indexer_rope_interleave: 'false' is neither"),
        ({"attention_bias": 0}, r"attention_bias: 0 is neither"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings: 'false' is neither"),
        ({"num_hidden_layers": 10**12, "mlp_layer_types": None}, r"num_hidden_layers: 1000000000000 is above 10000"),
        ({"n_routed_experts": 10**12}, r"n_routed_experts: 1000000000000 is above 100000"),
        ({"architectures": 7}, r"architectures: 7 is not a list"),
        ({"architectures": "GlmMoeDsaForCausalLM"}, r"architectures: 'GlmMoeDsaForCausalLM' is not a list"),
        ({"routed_scaling_factor": [2.5]}, r"routed_scaling_factor: \[2.5\] is not a number"),
        ({"bos_token_id": "a"}, r"bos_token_id: 'a' is not an integer"),
        ({"eos_token_id": ["a"]}, r"eos_token_id: \['a'\] is not"),
        ({"rope_parameters": "yarn"}, r"rope_parameters: 'yarn' is not an object"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_parameters.rope_type: 'llama3' is not supported"),
        ({"rope_parameters": {"rope_theta": -1}}, r"rope_parameters.rope_theta: -1.0 is not positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters.partial_rotary_factor: 0.5 is not supported"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, r"rope_scaling.attention_factor: 1.2 is not supported"),
        ({"rope_scaling": YARN | {"truncate": False}}, r"rope_scaling.truncate: False is not supported"),
        ({"rope_theta": "big"}, r"rope_theta: 'big' is not a number"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, r"rope_parameters.factor: 0.5 is below 1"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, r"rope_parameters.beta_fast: -1.0 is not above 0"),
        ({"rope_scaling": YARN | {"beta_slow": math.nan}}, r"rope_scaling.beta_slow: nan is not finite"),
        ({"rope_scaling": YARN | {"rope_theta": 1}}, r"rope_parameters.rope_theta: 1.0 is not above 1"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            r"rope_scaling.original_max_position_embeddings: 0.0 is below 1",
        ),
        ({"rope_scaling": YARN | {"mscale": "x"}}, r"rope_scaling.mscale: 'x' is not a number"),
    ],
)
def test_contradictions_name_the_field_and_show_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf(tiny(**changes))


def test_a_config_file_that_is_not_one_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 97')
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: holds list, not an object"):
        read_config_json(tmp_path)


# What jit and a checkpoint see.


def test_a_config_is_static():
    config = Config.from_hf(TINY)
    assert jax.tree.leaves(config) == []
    assert hash(config) == hash(Config.from_hf(TINY))
    assert dataclasses.replace(config, index_topk=4) != config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_to_hf_round_trips(name):
    config = Config.from_hf(preset(name))
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_layer_types": ["sparse", "dense", "sparse", "dense", "dense"]},
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 500.0},
        {"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 5, "num_nextn_predict_layers": 1},
        {"attention_bias": True, "tie_word_embeddings": True, "n_shared_experts": 0, "indexer_rope_interleave": False},
    ],
)
def test_to_hf_round_trips_what_presets_lack(changes):
    config = Config.from_hf(TINY | changes)
    assert config != Config.from_hf(TINY)
    assert Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_transformers_reads_what_we_write_and_writes_what_we_read(name):
    transformers = pytest.importorskip("transformers", reason="the test extra has it below Python 3.12")
    config, schedule = Config.from_hf(preset(name)), Schedule.from_hf(preset(name))
    cls = {GLM: transformers.GlmMoeDsaConfig, DEEPSEEK: transformers.DeepseekV32Config}[config.family]
    theirs = cls(**config.to_hf(), **schedule.to_hf())
    assert (theirs.num_hidden_layers, theirs.head_dim, theirs.index_topk) == (config.num_layers, 64, 2048)
    assert theirs.mlp_layer_types.count("dense") == config.moe_layers.count(False)
    if config.family == GLM:
        assert theirs.indexer_types.count("full") == schedule.num_full
    assert Config.from_hf(theirs.to_dict()) == config
    assert Schedule.from_hf(theirs.to_dict()) == schedule


@pytest.mark.parametrize(("family", "cls"), [(GLM, "GlmMoeDsaConfig"), (DEEPSEEK, "DeepseekV32Config")])
def test_defaults_are_those_of_transformers(family, cls):
    """Fields that a config.json may leave out mean the same to both."""
    transformers = pytest.importorskip("transformers", reason="the test extra has it below Python 3.12")
    theirs = getattr(transformers, cls)()
    optional = {
        "n_group",
        "topk_group",
        "n_shared_experts",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "norm_topk_prob",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "rms_norm_eps",
        "max_position_embeddings",
        "attention_bias",
        "tie_word_embeddings",
        "initializer_range",
    }
    ours = Config.from_hf(
        {
            name: value
            for name, value in theirs.to_dict().items()
            if name not in optional and name not in ("rope_parameters", "mlp_layer_types", "first_k_dense_replace")
        }
        | {"model_type": family}
    )
    assert {name: getattr(ours, name) for name in optional} == {name: getattr(theirs, name) for name in optional}
    assert ours.moe_layers.count(False) == theirs.mlp_layer_types.count("dense")
    assert (ours.rope.theta, ours.rope.type) == (10000.0, "default")
