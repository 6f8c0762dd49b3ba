"""`prefill` and `decode_step`, from params or serving weights, equal the forward pass: in chunks, padded or decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import decode_step, init_cache, prefill, serving
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from tests.support import recordings
from tests.support.tiny_models import CASES, GLM_FIELDS, RECORDED

ATOL = 5e-5  # of logits of size 4, in float32
FORMS = {
    "params": lambda case: case.params,
    "serving": lambda case: serving.from_params(case.params, case.config, case.schedule),
}


def expected_logits(name, reference):
    return recordings.read(name)[0] if name in RECORDED else reference(name).logits


@pytest.mark.parametrize(("name", "form"), [("glm-ragged", "params"), ("deepseek-mixed-ragged", "serving")])
def test_chunked_prefill_equals_one_pass(name, form, reference):
    """Chunks of 20: rows of 60, 37 and 5 tokens fill three, two and one of them, and then stay as they are."""
    case, expected, width = CASES[name], expected_logits(name, reference), 20
    lengths = np.array(case.lengths)
    params, rows = FORMS[form](case), np.arange(len(lengths))
    cache = init_cache(case.config, case.schedule, len(lengths), 64, jnp.float32)
    for start in range(0, 60, width):
        chunk = np.clip(lengths - start, 0, width)
        logits, cache = prefill(params, case.tokens[:, start : start + width], chunk, cache, case.config, case.schedule)
        alive = chunk > 0
        np.testing.assert_allclose(logits[alive], expected[rows, start + chunk - 1][alive], atol=ATOL, rtol=0)
        np.testing.assert_array_equal(cache.lengths, np.minimum(lengths, start + width))
    for layer in cache.layers:  # what stands in the padding never reaches the cache
        for row, length in enumerate(lengths):
            assert not np.any(layer.latents[row, length:])
            assert layer.index_keys is None or not np.any(layer.index_keys[row, length:])
            assert np.all(np.any(layer.latents[row, :length], axis=-1))


def test_a_row_without_new_tokens_leaves_a_full_cache_as_it_is():
    config, schedule = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}), Schedule("F")
    weights = serving.random_weights(jax.random.key(0), config, jnp.float32)
    cache = jax.tree.map(lambda x: x + 3, init_cache(config, schedule, 1, 3, jnp.float32))
    _, after = prefill(weights, np.array([[5]]), np.array([0]), cache, config, schedule)
    jax.tree.map(np.testing.assert_array_equal, after, cache)


@pytest.mark.parametrize(("name", "form"), [("glm-ragged", "serving"), ("deepseek-mixed-ragged", "params")])
def test_decoding_equals_one_pass(name, form, reference):
    """Rows of different lengths, each fed its own next token; k is crossed on the way by the shortest."""
    case, expected = CASES[name], expected_logits(name, reference)
    prompt, steps, params = np.array([20, 20, 3]), 17, FORMS[form](case)
    lengths = np.array(case.lengths)
    rows = np.arange(len(lengths))
    cache = init_cache(case.config, case.schedule, len(prompt), 64, jnp.float32)
    logits, cache = prefill(params, case.tokens[:, :20], prompt, cache, case.config, case.schedule)
    np.testing.assert_allclose(logits, expected[rows, prompt - 1], atol=ATOL, rtol=0)
    for step in range(steps):
        place = prompt + step
        alive = place < lengths
        logits, cache = decode_step(params, case.tokens[rows, place], cache, case.config, case.schedule)
        np.testing.assert_allclose(logits[alive], expected[rows, place][alive], atol=ATOL, rtol=0)
    np.testing.assert_array_equal(cache.lengths, prompt + steps)


def test_the_cache_holds_index_keys_of_full_layers_only():
    fields = preset("glm-5.2")
    config, schedule = Config.from_hf(fields), Schedule.from_hf(fields)
    cache = jax.eval_shape(lambda: init_cache(config, schedule, 2, 100))
    assert [layer.latents.shape for layer in cache.layers] == [(2, 100, 576)] * 78
    assert [layer.index_keys.shape for layer in cache.layers if layer.index_keys is not None] == [(2, 100, 128)] * 21
    arrays = jax.tree.leaves(cache.layers)
    assert sum(a.size * a.dtype.itemsize for a in arrays) == 2 * 100 * 95_232  # bytes a token


@pytest.mark.parametrize(("batch", "length", "named"), [(0, 8, "batch"), (2, 0, "max_len")])
def test_an_empty_cache_is_refused(batch, length, named):
    with pytest.raises(ValueError, match=f"{named}: 0 is not an integer of at least 1"):
        init_cache(CASES["glm-mixed"].config, Schedule("FFSFS"), batch, length)


def test_bfloat16_decodes_with_a_bfloat16_cache():
    case = CASES["deepseek-mixed"]
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), case.params)
    cache = init_cache(case.config, case.schedule, 2, 32)
    logits, cache = prefill(half, case.tokens[:, :20], np.full(2, 20), cache, case.config, case.schedule)
    assert logits.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(logits)))
    logits, cache = decode_step(half, case.tokens[:, 20], cache, case.config, case.schedule)
    assert logits.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(logits)))
    assert {array.dtype for array in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("donate", [False, True])
def test_a_cache_is_updated_in_place_only_when_that_is_asked_for(donate):
    case = CASES["glm-mixed"]
    weights = FORMS["serving"](case)
    args = case.config, case.schedule
    first = init_cache(*args, 2, 32, jnp.float32)
    _, second = prefill(weights, case.tokens[:, :20], np.full(2, 20), first, *args, donate=donate)
    logits, _ = decode_step(weights, case.tokens[:, 20], second, *args, donate=donate)
    assert all(array.is_deleted() == donate for cache in (first, second) for array in jax.tree.leaves(cache.layers))
    fresh = prefill(weights, case.tokens[:, :21], np.full(2, 21), init_cache(*args, 2, 32, jnp.float32), *args)[0]
    np.testing.assert_allclose(logits, fresh, atol=ATOL, rtol=0)


def test_they_can_be_compiled_by_the_caller():
    case = CASES["glm-mixed"]
    args = case.config, case.schedule
    cache = init_cache(*args, 2, 32, jnp.float32)
    logits, _ = jax.jit(prefill)(case.params, case.tokens[:, :20], np.full(2, 20), cache, *args)
    np.testing.assert_allclose(
        logits, prefill(case.params, case.tokens[:, :20], np.full(2, 20), cache, *args)[0], atol=ATOL, rtol=0
    )
