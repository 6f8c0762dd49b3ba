"""One description of every tensor: its shape, its place in a checkpoint, and how it is initialised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax.config import Config
from indexcache_jax.params import abstract, at_layer, init, shape_structs, slots, with_schedule
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import count, leaves
from tests.support.tiny_models import CASES, GLM_FIELDS, UNUSUAL, checkpoint_shapes, state, to_params

CONFIG = Config.from_hf(GLM_FIELDS)
MIXED = Schedule("FFSFS")


def parameters(name, schedule=None):
    fields = preset(name)
    return count(abstract(Config.from_hf(fields), schedule or Schedule.from_hf(fields)))


# Sizes of the known models.


@pytest.mark.parametrize(("name", "billions"), [("deepseek-v3.2", 671.878), ("glm-5.2", 743.377), ("30b", 30.107)])
def test_parameter_totals(name, billions):
    assert round(parameters(name) / 1e9, 3) == billions


def test_the_30b_models_indexers_have_163_million():
    every, one = parameters("30b"), parameters("30b", Schedule("F" + "S" * 46))
    assert round((every - one) * 47 / 46 / 1e6, 1) == 163.3


# The tree.


def test_indexers_exist_for_full_layers_only():
    tree = abstract(CONFIG, MIXED)
    assert tree.indexer.queries.layers == MIXED.full_layers
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(tree.indexer))
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(tree.attention))
    assert tree.dense.down.layers == (0, 1) and tree.moe.down.layers == (2, 3, 4)
    names = checkpoint_shapes(CONFIG, MIXED)
    assert {int(name.split(".")[2]) for name in names if "indexer" in name} == set(MIXED.full_layers)


def test_axes_name_every_dimension():
    for path, leaf in leaves(abstract(CONFIG, MIXED)):
        assert len(leaf.axes) == len(leaf.shape), path
        assert (leaf.axes[0] == "layer") == (leaf.layers is not None), path
        assert leaf.layer_shape == leaf.shape[len(leaf.shape) - len(leaf.layer_shape) :], path


def test_optional_parts_are_there_when_the_config_says_so():
    plain, unusual = abstract(CONFIG, MIXED), abstract(Config.from_hf(GLM_FIELDS | UNUSUAL), MIXED)
    assert plain.attention.out_bias is None and unusual.attention.out_bias.shape == (5, 64)
    assert plain.head.shape == (64, 97) and unusual.head is None
    assert plain.moe.shared.down.shape == (3, 32, 64) and unusual.moe.shared.down.shape == (3, 64, 64)
    assert abstract(Config.from_hf(GLM_FIELDS | {"n_shared_experts": 0}), MIXED).moe.shared is None
    assert abstract(Config.from_hf(GLM_FIELDS | {"first_k_dense_replace": 5}), MIXED).moe is None
    assert abstract(Config.from_hf(GLM_FIELDS | {"first_k_dense_replace": 0}), MIXED).dense is None


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match="schedule pattern: 'FFS' has 3 entries for 5 layers"):
        abstract(CONFIG, Schedule("FFS"))


# Checkpoint tensors.


@pytest.mark.parametrize("name", ["glm-mixed", "glm-unusual", "deepseek-all-full"])
def test_reading_and_writing_are_inverse_and_cover_every_number(name):
    """Writing every leaf back gives every checkpoint tensor in full: none is read twice, partly or not at all."""
    case = CASES[name]
    state, params = case.state, case.params
    written = {name: np.full_like(array, np.nan) for name, array in state.items()}
    arrays = dict(zip((path for path, _ in leaves(abstract(case.config, case.schedule))), jax.tree.leaves(params), strict=True))
    for path, leaf in leaves(abstract(case.config, case.schedule)):
        array = np.asarray(arrays[path])
        for slot, layer in enumerate(leaf.layers or (None,)):
            for source in leaf.sources:
                part = (array if layer is None else array[slot])[source.at]
                source.write(written[source.name.format(layer=layer)], part)
    for name, array in state.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    assert sum(array.size for array in state.values()) == sum(array.size for array in arrays.values())


def test_names_are_those_of_transformers():
    """transformers' own module tree, its fused experts aside, has exactly the tensors that we name."""
    pytest.importorskip("torch", reason="transformers needs torch to build a model")
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in GLM_FIELDS.items() if name != "architectures"} | MIXED.to_hf()
    theirs = transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**fields)).state_dict()
    ours = checkpoint_shapes(CONFIG, MIXED)
    assert {n: tuple(t.shape) for n, t in theirs.items() if ".experts." not in n} == {
        n: shape for n, shape in ours.items() if ".experts." not in n
    }


def test_kv_b_is_cut_into_keys_and_values_of_each_head():
    case = CASES["glm-mixed"]
    kv_b = case.state["model.layers.3.self_attn.kv_b_proj.weight"].reshape(4, 24 + 20, 32)
    np.testing.assert_array_equal(case.params.attention.k_up[3], kv_b[:, :24])
    np.testing.assert_array_equal(case.params.attention.v_up[3], kv_b[:, 24:].transpose(0, 2, 1))


# Arrays.


def test_init_has_the_described_shapes_and_scales():
    params = init(jax.random.key(0), CONFIG, MIXED)
    for (path, leaf), array in zip(leaves(abstract(CONFIG, MIXED)), jax.tree.leaves(params), strict=True):
        assert array.shape == leaf.shape, path
        if leaf.init == "ones":
            assert bool(jnp.all(array == 1)), path
        elif leaf.init == "zeros":
            assert bool(jnp.all(array == 0)), path
        else:
            assert float(jnp.std(array)) == pytest.approx(leaf.scale, rel=0.15), path
    tree = abstract(CONFIG, MIXED)
    assert tree.embedding.scale == CONFIG.initializer_range
    assert tree.attention.q_up.scale == CONFIG.q_lora_rank**-0.5
    assert tree.moe.down.scale == CONFIG.moe_intermediate_size**-0.5


def test_the_router_bias_stays_float32():
    structs = shape_structs(CONFIG, MIXED, jnp.bfloat16)
    params = init(jax.random.key(0), CONFIG, MIXED, jnp.bfloat16)
    for tree in (structs, params, to_params(CASES["glm-mixed"].state, CONFIG, MIXED, jnp.bfloat16)):
        assert tree.moe.router_bias.dtype == jnp.float32
        assert tree.attention.q_down.dtype == tree.moe.router.dtype == jnp.bfloat16
    assert jax.tree.map(lambda a: (a.shape, a.dtype), structs) == jax.tree.map(lambda a: (a.shape, a.dtype), params)


def test_layers_are_sliced_by_number_or_by_tracer():
    stack = {"a": jnp.arange(6).reshape(3, 2)}
    assert at_layer(stack, 1)["a"].tolist() == [2, 3]
    assert jax.jit(at_layer)(stack, jnp.int32(2))["a"].tolist() == [4, 5]
    assert slots((0, 3, 4)) == {0: 0, 3: 1, 4: 2}


def test_a_schedules_params_are_the_indexers_of_its_own_layers():
    base, schedule = Schedule("FFSF"), Schedule("FSSF")
    config = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 4})
    params = to_params(state(config, base, 0), config, base)
    kept = with_schedule(params, base, schedule)
    np.testing.assert_array_equal(kept.indexer.keys, params.indexer.keys[np.array([0, 2])])
    assert kept.full_layers == (0, 3)
    for of, new, message in (
        (base, "FFFS", "layer 2 of FFFS is F"),
        (base, "FF", "2 entries for 4 layers"),
        (Schedule("FSFF"), "FSSF", r"FSFF: F are the layers \[0, 2, 3\], but these params hold the indexers of \[0, 1, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            with_schedule(params, of, Schedule(new))
