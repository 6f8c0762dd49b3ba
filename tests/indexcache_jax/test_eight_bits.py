"""Matrices in 8 bits: the model, inference, the search and the warm-up compute what they compute on the decoded weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints_convert
from indexcache_jax import forward, memory, moe, ops, search, serving, sharding, tensors, training
from indexcache_jax import params as params_tree
from indexcache_jax.schedule import Schedule
from indexcache_jax.sharding import SERVING
from pallas_kernels.quant import Scaled, dequantise, quantise_matrix, quantise_rows
from tests.checkpoints_convert import files
from tests.support import numpy_reference
from tests.support.eight_bits import RAGGED, RAGGED_DEEPSEEK
from tests.support.tiny_models import to_params

CONFIG, SCHEDULE = RAGGED.config, RAGGED.schedule
ATOL = 5e-5  # of logits of size 4, in float32


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(a checkpoint in FP8, its numbers decoded)"""
    in_codes, numbers = files.quantised(RAGGED)
    folder = files.write_checkpoint(tmp_path_factory.mktemp("stored") / "fp8", files.config_fields(RAGGED), in_codes)
    return folder, numbers


@pytest.fixture(scope="module")
def expected(stored):
    """What the float64 forward makes of the decoded numbers, none of whose choices is close."""
    trace = numpy_reference.forward(stored[1], RAGGED.fields, SCHEDULE.is_full, RAGGED.tokens, RAGGED.lengths)
    assert min(trace.index_gap, trace.expert_gap) > numpy_reference.MIN_GAP
    return trace


@functools.cache
def loaded(folder, form, weights):
    return checkpoints_convert.load(folder, dtype="float32", form=form, weights=weights)[2]


def test_logits_are_those_of_the_float64_forward_of_the_decoded_numbers(stored, expected):
    found = forward(loaded(stored[0], "params", "fp8"), RAGGED.tokens, CONFIG, SCHEDULE, jnp.array(RAGGED.lengths))
    valid = RAGGED.is_valid
    np.testing.assert_allclose(np.asarray(found)[valid], expected.logits[valid], atol=ATOL, rtol=0)


def test_inference_gives_the_same_logits(stored, expected):
    weights = loaded(stored[0], "serving", "fp8")
    before, last = RAGGED.tokens[:, :-1], RAGGED.tokens[:1, -1]
    cache = serving.init_cache(CONFIG, SCHEDULE, 1, 64, jnp.float32)
    logits, cache = serving.prefill(weights, before[:1], jnp.array([before.shape[1]]), cache, CONFIG, SCHEDULE)
    np.testing.assert_allclose(logits[0], expected.logits[0, -2], atol=ATOL, rtol=0)
    logits, _ = serving.decode_step(weights, last, cache, CONFIG, SCHEDULE)
    np.testing.assert_allclose(logits[0], expected.logits[0, -1], atol=ATOL, rtol=0)


@pytest.mark.slow
def test_the_other_familys_logits_are_those_of_the_float64_forward_too(tmp_path):
    case = RAGGED_DEEPSEEK
    in_codes, numbers = files.quantised(case)
    folder = files.write_checkpoint(tmp_path, files.config_fields(case), in_codes)
    expected = numpy_reference.forward(numbers, case.fields, case.schedule.is_full, case.tokens, case.lengths)
    assert min(expected.index_gap, expected.expert_gap) > numpy_reference.MIN_GAP
    trained, served = (loaded(folder, form, "fp8") for form in ("params", "serving"))
    found = forward(trained, case.tokens, case.config, case.schedule, jnp.array(case.lengths))
    np.testing.assert_allclose(np.asarray(found)[case.is_valid], expected.logits[case.is_valid], atol=ATOL, rtol=0)
    cache = serving.init_cache(case.config, case.schedule, 1, 64, jnp.float32)
    logits, cache = serving.prefill(served, case.tokens[:1, :-1], jnp.array([39]), cache, case.config, case.schedule)
    np.testing.assert_allclose(logits[0], expected.logits[0, -2], atol=ATOL, rtol=0)
    logits, _ = serving.decode_step(served, case.tokens[:1, -1], cache, case.config, case.schedule)
    np.testing.assert_allclose(logits[0], expected.logits[0, -1], atol=ATOL, rtol=0)


@pytest.mark.slow
def test_transformers_gives_the_same_logits_from_the_decoded_checkpoint(stored, tmp_path):
    pytest.importorskip("torch", reason="the oracle needs torch")
    pytest.importorskip("transformers", reason="the oracle needs transformers")
    from tests.support import oracle

    checkpoints_convert.convert(stored[0], tmp_path / "decoded", format="safetensors", dtype="float32", weights=None)
    logits, _ = oracle.record(oracle.load(tmp_path / "decoded"), RAGGED)
    found = forward(loaded(stored[0], "params", "fp8"), RAGGED.tokens, CONFIG, SCHEDULE, jnp.array(RAGGED.lengths))
    np.testing.assert_allclose(np.asarray(found)[RAGGED.is_valid], logits[RAGGED.is_valid], atol=ATOL, rtol=0)


def test_experts_are_multiplied_alike_whatever_the_way():
    width, inner, experts = 192, 160, 4
    keys = jax.random.split(jax.random.key(0), 3)
    gate_up = quantise_matrix(width**-0.5 * jax.random.normal(keys[0], (experts, 2, inner, width)))
    down = quantise_matrix(inner**-0.5 * jax.random.normal(keys[1], (experts, width, inner)))
    tokens = jax.random.normal(keys[2], (5, width))
    chosen, weights = jnp.array([[0, 3], [3, 1], [2, 0], [0, 1], [3, 2]]), jnp.full((5, 2), 0.5)
    every, by_group = (
        way(moe.Matrices(gate_up, down), tokens, chosen, weights) for way in (moe._every_expert, moe._sorted_by_expert)
    )
    np.testing.assert_allclose(by_group, every, atol=1e-5)
    plain = moe.Matrices(jnp.moveaxis(dequantise(gate_up, jnp.float32), -1, 1), dequantise(down, jnp.float32).swapaxes(1, 2))
    np.testing.assert_allclose(moe._every_expert(plain, tokens, chosen, weights), every, atol=1e-5)


# The search.


def batches():
    return [np.random.RandomState(i).randint(0, CONFIG.vocab_size, (1, 33)).astype(np.int32) for i in range(2)]


def test_a_search_finds_the_losses_of_the_decoded_weights(stored):
    folder, numbers = stored
    decoded = to_params(numbers, CONFIG, SCHEDULE)
    in_codes = loaded(folder, "params", "fp8")
    schedules = [SCHEDULE, SCHEDULE.with_shared(2)]
    whole = search.Evaluator(decoded, CONFIG, SCHEDULE, batches()).losses(schedules)
    np.testing.assert_allclose(search.Evaluator(in_codes, CONFIG, SCHEDULE, batches()).losses(schedules), whole, atol=1e-5)
    layers = checkpoints_convert.Layers(folder, dtype="float32", weights="stored")
    np.testing.assert_allclose(search.StreamedEvaluator(layers, batches()).losses(schedules), whole, atol=1e-5)


# Distillation.

TOKENS = np.random.RandomState(0).randint(0, CONFIG.vocab_size, (1, 1, 33)).astype(np.int32)


def stage(kind):
    return training.Stage(kind, kind, 4, 1, 32, 1e-3, 1e-3, compute_dtype="float32")


def after_two_steps(params):
    params = jax.tree.map(jnp.copy, params)  # a step takes its arguments' memory
    state = training.init_optimiser_state(params, stage("warmup"), CONFIG, SCHEDULE)
    for _ in range(2):  # the first one's learning rate is 0
        params, state, metrics = training.step(params, state, TOKENS, CONFIG, SCHEDULE, stage("warmup"))
    return params, metrics


def test_the_warm_up_trains_indexers_on_a_base_in_8_bits_as_on_the_decoded_one(stored):
    base = loaded(stored[0], "params", "fp8 base")
    assert params_tree.weights_of(base) == "fp8 base"
    trained, metrics = after_two_steps(base)
    other, expected = after_two_steps(to_params(stored[1], CONFIG, SCHEDULE))
    np.testing.assert_allclose(metrics, expected, rtol=1e-5)
    update, expected = (tree.indexer.queries - base.indexer.queries for tree in (trained, other))
    assert jnp.linalg.norm(update) > 0 and jnp.linalg.norm(update - expected) < 0.01 * jnp.linalg.norm(update)
    np.testing.assert_array_equal(trained.attention.out.codes, base.attention.out.codes)


def test_codes_are_not_trained(stored):
    in_codes = loaded(stored[0], "params", "fp8")
    with pytest.raises(ValueError, match=r"attention.q_down.codes: is in 8 bits, which stage sparse cannot train"):
        training.step(in_codes, None, TOKENS, CONFIG, SCHEDULE, stage("sparse"))


# Trees.


def test_weights_are_counted_once_and_scales_in_bytes():
    for abstract in (params_tree.abstract, serving.weights.abstract):
        decoded, in_codes = abstract(CONFIG, SCHEDULE), abstract(CONFIG, SCHEDULE, "fp8")
        assert tensors.count(in_codes) == tensors.count(decoded)
        arrays = jax.tree.leaves(tensors.shape_structs(in_codes, jnp.bfloat16))
        found = memory.tree_bytes(in_codes, jnp.bfloat16, memory.mesh_of(), SERVING)
        assert found == sum(array.size * array.dtype.itemsize for array in arrays)
        assert found < 0.75 * memory.tree_bytes(decoded, jnp.bfloat16, memory.mesh_of(), SERVING)


def test_random_codes_have_the_deviation_of_the_matrix_they_stand_for():
    tree = serving.weights.abstract(CONFIG, SCHEDULE, "fp8")
    up = tensors.init(jax.random.key(0), tree.layers[0].up, jnp.bfloat16)
    assert bool(jnp.isfinite(up.codes.astype(jnp.float32)).all())
    assert float(dequantise(up, jnp.float32).std()) == pytest.approx(CONFIG.q_lora_rank**-0.5, rel=0.05)


def test_random_weights_are_those_that_the_tree_describes():
    found = jax.eval_shape(lambda: serving.random_weights(jax.random.key(0), CONFIG, weights="fp8"))
    tree = serving.weights.abstract(CONFIG, Schedule("FFF"), "fp8")
    assert found.format == "fp8" and jax.tree.structure(found) == jax.tree.structure(tree)
    for struct, tensor in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert (struct.shape, struct.dtype) == (tensor.shape, jnp.dtype(tensor.dtype or jnp.bfloat16))


def test_a_device_begins_with_a_block():
    mesh = memory.mesh_of(tensor=4)
    tree = serving.weights.abstract(CONFIG, SCHEDULE, "fp8")
    with pytest.raises(ValueError, match=r"layers\.0\.up: axis heads of size 352, in blocks of 128, cannot be divided over 4"):
        sharding.shardings(tree, mesh, SERVING)
    # Scales by row lie with their rows, whatever is split.
    k_up = params_tree.abstract(CONFIG, SCHEDULE, "fp8").attention.k_up
    assert k_up.by_row and sharding.shardings([k_up], mesh, SERVING)[0].codes.spec[1] == "tensor"


def test_a_form_that_is_none_is_named():
    with pytest.raises(ValueError, match="weights: 'int8' is neither fp8 nor None"):
        serving.weights.abstract(CONFIG, SCHEDULE, "int8")


def test_activations_can_be_rounded_as_kernels_round_them():
    x = jax.random.normal(jax.random.key(0), (1, 5, 160))
    matrix = quantise_matrix(jax.random.normal(jax.random.key(1), (130, 160)))
    with ops.rounded_rows():
        rounded = ops.scaled_matmul(x, matrix)
    np.testing.assert_allclose(rounded, ops.scaled_matmul(dequantise(quantise_rows(x), jnp.float32), matrix), atol=1e-6)
    assert float(jnp.abs(rounded - ops.scaled_matmul(x, matrix)).max()) > 1e-3


def test_the_leaves_that_are_in_8_bits():
    tree = params_tree.abstract(CONFIG, SCHEDULE, "fp8 base")
    assert not any(isinstance(leaf, Scaled) for leaf in dataclasses.astuple(tree.indexer))
    assert {path for path, _ in tensors.matrices(tree)} == {
        *(f"attention.{name}" for name in ("q_down", "q_up", "kv_down", "k_up", "v_up", "out")),
        *("dense.gate_up", "dense.down", "moe.gate_up", "moe.down", "moe.shared.gate_up", "moe.shared.down"),
    }
