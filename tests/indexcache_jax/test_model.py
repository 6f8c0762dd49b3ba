"""The model computes what transformers computes, and padding and batches change nothing."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import forward, model, selections
from indexcache_jax.params import shape_structs
from indexcache_jax.positions import whole_rows
from tests.support import numpy_reference, recordings
from tests.support.tiny_models import CASES, DEEPSEEK_FIELDS, DEEPSEEK_SHARED, GLM_FIELDS, RECORDED, Case

ATOL = 5e-5  # of logits of size 4, in float32


def run(case, function=forward, params=None, tokens=None):
    """forward or selections over a case, its padding included."""
    tokens = case.tokens if tokens is None else tokens
    params = case.params if params is None else params
    return np.asarray(function(params, tokens, case.config, case.schedule, jnp.array(case.lengths)))


@jax.jit
def forward_and_selections(params, tokens, config, schedule, lengths):
    """Both results of one walk, which halves what there is to compile."""
    positions = whole_rows(tokens, config, lengths)
    x, chosen = model.walk(params, model.embed(params, tokens), positions, config, schedule)
    return model.unembed(params, x, config), jnp.stack(chosen)


def assert_equals(case, logits, indices):
    got, chosen = forward_and_selections(case.params, case.tokens, case.config, case.schedule, jnp.array(case.lengths))
    valid = case.is_valid
    np.testing.assert_allclose(got[valid], logits[valid], atol=ATOL, rtol=0)
    np.testing.assert_array_equal(chosen[:, valid], indices[:, valid])


def expected_logits(name, reference):
    return recordings.read(name)[0] if name in RECORDED else reference(name).logits


# Against the oracle.


@pytest.mark.parametrize("name", RECORDED)
def test_logits_and_selections_equal_transformers(name):
    assert_equals(RECORDED[name], *recordings.read(name))


@pytest.mark.parametrize("name", DEEPSEEK_SHARED)
def test_deepseek_with_shared_layers_equals_the_float64_forward(name, reference):
    assert_equals(CASES[name], reference(name).logits, np.stack(reference(name).indices))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["F" + "".join(rest) for rest in itertools.product("FS", repeat=4)])
@pytest.mark.parametrize("fields", [GLM_FIELDS, DEEPSEEK_FIELDS], ids=["glm", "deepseek"])
def test_every_schedule_equals_the_float64_forward(fields, pattern):
    for seed in range(100, 120):
        case = Case(fields, pattern, seed, (48, 29))
        trace = numpy_reference.forward(case.state, fields, case.schedule.is_full, case.tokens, case.lengths)
        if min(trace.index_gap, trace.expert_gap) > numpy_reference.MIN_GAP:
            break
    assert_equals(case, trace.logits, np.stack(trace.indices))


def test_forward_and_selections_are_what_the_walk_computes():
    case, (logits, indices) = RECORDED["glm-ragged"], recordings.read("glm-ragged")
    valid = case.is_valid
    np.testing.assert_allclose(run(case)[valid], logits[valid], atol=ATOL, rtol=0)
    np.testing.assert_array_equal(run(case, selections)[:, valid], indices[:, valid])


def test_the_schedule_matters():
    """So that agreement above says something about sharing: the same weights under two schedules differ by far."""
    mixed = CASES["glm-mixed"]
    full = dataclasses.replace(mixed, pattern="FFFFF")
    assert np.max(np.abs(run(mixed) - run(full))) > 0.5


# Padding.


@pytest.mark.parametrize("name", ["glm-ragged", "deepseek-mixed-ragged"])
def test_padding_changes_no_valid_output_by_one_bit(name):
    case = CASES[name]
    other = np.where(case.is_valid, case.tokens, (case.tokens + 1) % 97)
    np.testing.assert_array_equal(run(case)[case.is_valid], run(case, tokens=other)[case.is_valid])


def test_a_padded_query_selects_nothing():
    case = CASES["glm-ragged"]
    assert np.all(run(case, selections)[:, ~case.is_valid] == -1)


def test_a_row_selects_alone_what_it_selects_in_a_batch():
    case, row, length = CASES["glm-ragged"], 1, 37
    alone = dataclasses.replace(case, lengths=(length,))
    tokens = case.tokens[row : row + 1, :length]
    np.testing.assert_array_equal(run(alone, selections, tokens=tokens)[:, 0], run(case, selections)[:, row, :length])
    np.testing.assert_allclose(run(alone, tokens=tokens)[0], run(case)[row, :length], atol=ATOL, rtol=0)


# Selection of everything is dense attention.


def test_topk_of_at_least_the_length_is_dense_attention_to_the_bit():
    """Whoever selects, and from whichever k on, the same positions are attended: nothing may depend on the indexer."""
    case = dataclasses.replace(CASES["glm-all-full"], fields=GLM_FIELDS | {"index_topk": 60})
    dense = run(case)
    np.testing.assert_array_equal(dense, run(dataclasses.replace(case, pattern="FSSSS")))
    np.testing.assert_array_equal(dense, run(dataclasses.replace(case, fields=GLM_FIELDS | {"index_topk": 1000})))
    trace = numpy_reference.forward(case.state, case.fields, [True] * 5, case.tokens, case.lengths)
    np.testing.assert_allclose(dense, trace.logits, atol=ATOL, rtol=0)


def test_short_rows_attend_to_everything_before_k_is_reached():
    """The first k positions see no difference between sparse and dense; later ones do."""
    sparse = CASES["glm-all-full"]
    dense = dataclasses.replace(sparse, fields=GLM_FIELDS | {"index_topk": 60})
    difference = np.max(np.abs(run(sparse) - run(dense)), axis=(0, 2))
    assert np.max(difference[:8]) < ATOL
    assert np.max(difference[8:]) > 0.5


# bfloat16.


def test_bfloat16_runs_and_stays_near_float32():
    """Selecting all, since a rounded near-tie would change what is attended; the expert choice still may flip."""
    fields = GLM_FIELDS | {"index_topk": 60}
    case = dataclasses.replace(CASES["glm-mixed"], fields=fields)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), case.params)
    logits = run(case, params=half)
    assert logits.dtype == np.float32
    assert np.mean(np.abs(logits - run(case))) < 0.1


# What is refused.


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2, 9999]], "tokens: 9999 is not one of the model's 97 tokens"),
        ([[1, -1]], "tokens: -1 is not one of"),
        ([[1, 2], [3]], "tokens: rows differ in length"),
        ([1, 2], r"tokens: an array of shape \[2\] and dtype int64, not \[B, S\] of integers"),
        ([[1.0, 2.0]], "dtype float64, not"),
        ([["a", "b"]], "dtype <U1, not"),
        ("text", "dtype <U4, not"),
    ],
)
@pytest.mark.parametrize("function", [forward, selections])
def test_what_are_no_tokens_of_the_model_is_refused(function, tokens, message):
    case = CASES["glm-mixed"]
    with pytest.raises(ValueError, match=message):
        function(case.params, tokens, case.config, case.schedule)


# What is compiled.


def lowered(case, length):
    structs = shape_structs(case.config, case.schedule, jnp.float32)
    return jax.jit(forward).lower(structs, jax.ShapeDtypeStruct((1, length), jnp.int32), case.config, case.schedule)


@pytest.mark.parametrize(("pattern", "indexers"), [("F" * 12, 12), ("FSSSFSSSFSSS", 3)])
def test_shared_layers_are_compiled_without_an_indexer(pattern, indexers):
    """Counted by the product with an indexer's query weights [R, Hi, Di], a shape nothing else has."""
    case = Case(GLM_FIELDS | {"num_hidden_layers": 12}, pattern, 0)
    products = re.findall(r"dot_general.*tensor<48x16x32xf32>", lowered(case, 16).as_text())
    assert len(products) == indexers


def test_memory_grows_no_faster_than_the_length():
    """Scores exist for a block of queries at a time; one [S, T] buffer would take 16 times as much at 4 times the length."""
    case = Case(GLM_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}, "FS", 0)
    short, long = (lowered(case, s).compile().memory_analysis().temp_size_in_bytes for s in (4096, 16384))
    assert long <= 4 * short
