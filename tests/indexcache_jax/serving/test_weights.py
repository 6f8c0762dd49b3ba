"""The serving tree: described, converted from params, restricted, and what a compiled step holds of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import generate, params, serving, tensors
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving.generation import decode_program
from tests.support.serving_cases import CHUNK, LENGTHS, MODELS, NEW, model, prompts_of, run
from tests.support.tiny_models import CASES, GLM_FIELDS, Case


@pytest.mark.parametrize("name", ["glm-mixed", "glm-unusual", "deepseek-all-full"])
def test_the_abstract_tree_describes_what_params_are_converted_to(name):
    case = CASES[name]
    tree = serving.weights.abstract(case.config, case.schedule)
    weights = serving.from_params(case.params, case.config, case.schedule)
    assert jax.tree.structure(tree) == jax.tree.structure(weights)
    for (path, tensor), (_, array) in zip(tensors.leaves(tree), tensors.leaves(weights), strict=True):
        assert tensor.shape == array.shape, path
        assert len(tensor.axes) == len(tensor.shape), path
    assert tensors.count(tree) == tensors.count(params.abstract(case.config, case.schedule))


@pytest.mark.parametrize("name", ["glm-mixed", "glm-unusual", "deepseek-all-full"])
def test_the_sources_fill_the_weights_that_params_are_converted_to(name):
    """Every number of the checkpoint is read into the serving tree once, to the place where the conversion has it."""
    case = CASES[name]
    state, weights = case.state, dict(tensors.leaves(serving.from_params(case.params, case.config, case.schedule)))
    for path, tensor in tensors.leaves(serving.weights.abstract(case.config, case.schedule)):
        array = np.full(tensor.shape, np.nan, np.float32)
        part = tensors.whole(tensor.shape)
        for source in tensor.stored(tensor.every_layer[0]):
            source.fill(array, source.window(tensor.shape, part), 0, state[source.name])
        np.testing.assert_array_equal(array, weights[path], err_msg=path)


def test_what_is_sharded_shares_no_leaf_with_what_is_replicated():
    case = CASES["glm-mixed"]
    layer = serving.weights.abstract(case.config, Schedule("FFFFF")).layers[-1]
    assert layer.up.axes[0] == "heads" and layer.index_up.axes[0] == "index_heads"
    assert layer.mlp.router.axes[0] is None and layer.mlp.shared_gate_up.axes[0] == "mlp"


def test_a_quarter_schedule_holds_no_indexer_and_no_key_cache_for_s_layers():
    """The compiled step reads exactly the indexers and key caches of its F layers, in shapes that only they have."""
    config = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 8, "index_n_heads": 2, "index_head_dim": 40})
    schedule = Schedule("FSSSFSSS")
    weights = tensors.shape_structs(serving.weights.abstract(config, schedule), jnp.bfloat16)
    cache = jax.eval_shape(lambda: serving.init_cache(config, schedule, 2, 640))
    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = decode_program(None).lower(weights, token, cache, config, steps=2).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    parameters = re.findall(r"= (\S+?)\{[^}]*\} parameter\(", entry)
    rows, heads = config.q_lora_rank + config.latent_dim, config.num_heads * config.qk_head_dim
    index = config.index_n_heads * config.index_head_dim
    count = lambda *shape: sum(p.endswith(f"[{','.join(map(str, shape))}]") for p in parameters)  # noqa: E731
    assert count(2, 640, config.latent_dim) == 8
    assert count(2, 640, config.index_head_dim) == 2
    assert count(rows + config.index_head_dim + config.index_n_heads, config.hidden_size) == 2
    assert count(rows, config.hidden_size) == 6
    assert count(index, config.q_lora_rank) == 2
    assert count(heads, config.q_lora_rank) == 8


def test_restricted_weights_are_the_model_under_the_other_schedule():
    case = model("glm", "FFFFF")
    less = Schedule("FSSFS")
    whole = serving.from_params(case.params, case.config, case.schedule)
    prompts = prompts_of(case)
    restricted = serving.restrict(whole, case.config, less)
    shared = Case(MODELS["glm"], less.pattern, 7, LENGTHS)
    assert generate(restricted, prompts, case.config, less, NEW, chunk=CHUNK) == run(shared) != run(case)
    assert serving.restrict(restricted, case.config, less).layers[1] is restricted.layers[1]
    with pytest.raises(ValueError, match="layer 1 is F, but these weights have no indexer"):
        serving.restrict(restricted, case.config, Schedule("FFFFF"))
    with pytest.raises(ValueError, match="4 entries for 5 layers"):
        serving.restrict(whole, case.config, Schedule("FFFF"))


def test_random_weights_have_the_shapes_of_the_model():
    case = CASES["glm-mixed"]
    made = serving.random_weights(jax.random.key(0), case.config, jnp.float32)
    full = dataclasses.replace(case, pattern="FFFFF")
    expected = serving.from_params(full.params, full.config, full.schedule)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(made) == shapes(expected)
    first, second = made.layers[-2:]
    assert not np.array_equal(first.out, second.out)
