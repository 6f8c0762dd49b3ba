"""The cache: sizes, forks, 8 bits, and what it holds under a schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving, tensors
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, decode, prefill_chunk, prefill_prompts
from indexcache_jax.serving.layer import layer
from tests.support.serving_cases import CHUNK, LENGTHS, model, prompts_of
from tests.support.tiny_models import CASES

FP8 = jnp.float8_e4m3fn


def test_axes_name_every_dimension():
    case = CASES["glm-mixed"]
    for path, tensor in tensors.leaves(serving.cache.abstract(case.config, case.schedule, 2, 16, FP8)):
        assert tensor.axes == ("batch", "tokens", "latent" if "latents" in path else "index")[: len(tensor.shape)], path


def test_a_format_keeps_each_part_in_its_own_dtype():
    form = CacheFormat(jnp.bfloat16, FP8)
    assert CacheFormat.of(form) is form
    assert CacheFormat.of("float32") == CacheFormat(jnp.float32, "float32") != form
    assert hash(CacheFormat(jnp.bfloat16, FP8)) == hash(form)


def test_a_cache_of_no_rows_is_refused():
    case = model("glm", "FSSSS")
    with pytest.raises(ValueError, match="batch: 0 is not an integer of at least 1"):
        serving.init_cache(case.config, case.schedule, 0, 16)


def test_index_keys_that_one_scale_cannot_serve_are_refused():
    case = model("glm", "FSSSS")
    wide = dataclasses.replace(case.config, index_head_dim=130)
    with pytest.raises(ValueError, match="index_dtype: .* at most 128 numbers share a scale, config.index_head_dim is 130"):
        serving.init_cache(wide, case.schedule, 1, 16, FP8)
    assert serving.init_cache(wide, case.schedule, 1, 16, CacheFormat(FP8, jnp.bfloat16)).format.latent_dtype == FP8


def test_a_fork_leaves_the_cache_it_was_made_of():
    case = model("glm", "FSFSF")
    weights = serving.from_params(case.params, case.config, case.schedule)
    cache = serving.init_cache(case.config, case.schedule, 1, 64, jnp.float32)
    _, cache = prefill_prompts(weights, [np.array(prompts_of(case)[0])], cache, case.config, chunk=CHUNK)
    forked = serving.fork(cache, 3)
    assert forked.lengths.tolist() == [37] * 3
    first, forked = decode(weights, jnp.array([5, 6, 5]), forked, case.config, steps=3)
    assert first[0].tolist() == first[2].tolist() != first[1].tolist()
    again, cache = decode(weights, jnp.array([6]), cache, case.config, steps=3)
    assert again[0].tolist() == first[1].tolist() and cache.lengths.tolist() == [40]
    with pytest.raises(ValueError, match="copies: 0 is not"):
        serving.fork(cache, 0)
    with pytest.raises(ValueError, match="max_len: 39 is below the 40 tokens of row 0"):
        serving.fork(cache, 2, max_len=39)


def test_a_fork_has_the_copies_of_a_row_beside_each_other_and_room_for_what_it_holds():
    case = model("glm", "FSFSF")
    cache = serving.init_cache(case.config, case.schedule, 2, 4, jnp.float32)
    rows = jax.tree.map(lambda x: x + jnp.arange(2.0).reshape(2, *[1] * (x.ndim - 1)), cache.layers)
    forked = serving.fork(serving.Cache(rows, jnp.array([1, 2])), 2, max_len=2)
    assert forked.lengths.tolist() == [1, 1, 2, 2]
    for x in jax.tree.leaves(forked.layers):
        np.testing.assert_array_equal(x, np.broadcast_to([[[0.0]], [[0.0]], [[1.0]], [[1.0]]], (4, 2, x.shape[-1])))


def test_what_stands_at_no_position_of_the_row_is_not_written():
    written = serving.cache.write(jnp.zeros((1, 4, 1)), jnp.ones((1, 3, 1)), jnp.array([[1, -1, 4]]))
    assert written.reshape(-1).tolist() == [0, 1, 0, 0]


def test_cache_sizes_of_the_30b_shape():
    fields = preset("30b")
    config = Config.from_hf(fields)
    full = Schedule("F" * 47)
    quarter = Schedule("FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS")
    for schedule, kinds in [(full, ()), (quarter, ()), (quarter, (FP8, FP8)), (full, (jnp.bfloat16, FP8))]:
        form = CacheFormat(*kinds)
        cache = jax.eval_shape(lambda form=form, schedule=schedule: serving.init_cache(config, schedule, 2, 1000, form))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
        assert held == 2000 * serving.bytes_per_token(config, schedule, form)
    assert serving.bytes_per_token(config, full, jnp.bfloat16) == 47 * (1152 + 256)
    assert serving.bytes_per_token(config, quarter, FP8) == 47 * 644 + 12 * 132


@pytest.mark.parametrize(
    ("form", "most", "least_shared"),
    [
        (CacheFormat(jnp.float32, FP8), None, 0.85),
        (CacheFormat(FP8, jnp.float32), 0.2, None),
    ],
    ids=["index", "latent"],
)
def test_what_8_bits_change(form, most, least_shared):
    """On a tiny random model: keys in 8 bits keep most of every selection of 8, latents in 8 bits most of the logits.

    One layer selects, before anything rounded could reach it, so that the logits tell of the latents alone.
    """
    case = model("glm", "FSSSS")
    weights = serving.from_params(case.params, case.config, case.schedule)
    first = jax.jit(layer, static_argnames="kv_length")

    def through(form):
        """The first layer's selection and the logits after the prompt."""
        cache = serving.init_cache(case.config, case.schedule, 3, 64, form)
        x, positions = serving.embed(weights.embedding, case.tokens, cache.lengths, jnp.array(LENGTHS), case.config)
        _, indices, _ = first(weights.layers[0], x, None, cache.layers[0], positions, 64, case.config)
        x, cache = prefill_chunk(weights, case.tokens, jnp.array(LENGTHS), cache, case.config)
        return np.asarray(indices), np.asarray(serving.logits(weights, x, case.config))[case.is_valid], cache

    exact_indices, exact, _ = through(jnp.float32)
    indices, logits, cache = through(form)
    long = np.asarray(case.is_valid) & (np.arange(60) >= case.config.index_topk)
    shared = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(indices[long], exact_indices[long], strict=True)])
    if least_shared is not None:
        assert cache.layers[0].index_keys.dtype == FP8 and cache.layers[0].latents.dtype == jnp.float32
        assert least_shared < shared < 1
    if most is not None:
        assert cache.layers[0].latents.dtype == FP8 and cache.layers[0].index_keys.dtype == jnp.float32
        assert shared == 1
        assert 0 < np.std(logits - exact) / np.std(exact) < most
