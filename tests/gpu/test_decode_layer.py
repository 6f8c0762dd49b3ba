"""A single token's step through the decode kernels on a Hopper GPU: against the layers in XLA, repeated, and its kernel calls.

All 132 thread blocks of a kernel must be on the device at once: docs/kernels.md, "Testing on a GPU".
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, decode, fused
from indexcache_jax.serving.cache import append
from pallas_kernels import hopper, quant
from tests.support.serving_cases import experts_by_bias, in_codes

BFLOAT16, EIGHT_BITS = CacheFormat(), CacheFormat.of(jnp.float8_e4m3fn)

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

# As wide as the real model, whose first layer is dense; the context is short enough for every key to be selected.
FIELDS = preset("30b") | {"num_hidden_layers": 3, "vocab_size": 512, "eos_token_id": None, "pad_token_id": None}
CONFIG, SCHEDULE = Config.from_hf(FIELDS), Schedule("FSF")
CONTEXT, MAX_LEN = 700, 2048
TOKENS = tuple(range(5, 21))
EDGES = 20  # launches of a step outside the layers, at most: embedding, angles, head, choice of the token


@pytest.fixture(scope="module")
def weights():
    return experts_by_bias(serving.restrict(serving.random_weights(jax.random.key(0), CONFIG), CONFIG, SCHEDULE))


def filled_cache(form=BFLOAT16, config=CONFIG):
    """A cache of `CONTEXT` random tokens."""
    cache = serving.init_cache(config, SCHEDULE, 1, MAX_LEN, form)
    random = np.random.default_rng(0)

    def rows(buffer):
        return jnp.asarray(random.normal(size=(1, CONTEXT, buffer.shape[-1])), jnp.bfloat16)

    def fill(layer):
        keys = None if layer.index_keys is None else rows(layer.index_keys)
        return append(layer, rows(layer.latents), keys, jnp.arange(CONTEXT)[None])

    return serving.Cache(tuple(map(fill, cache.layers)), jnp.full((1,), CONTEXT, jnp.int32))


def embedded(weights, token, cache):
    return serving.embed(weights.embedding, jnp.full((1, 1), token), cache.lengths, jnp.ones((1,), jnp.int32), CONFIG)


def through(step, weights, tokens, form=BFLOAT16, config=CONFIG):
    """Logits of further tokens after the context, and the latents and index keys of these tokens in every layer."""
    cache, found = filled_cache(form, config), []
    for token in tokens:
        logits, cache = step(weights, jnp.full((1,), token), cache)
        found.append(np.asarray(logits))
    assert cache.lengths == CONTEXT + len(tokens)
    kept = []
    for layer in cache.layers:
        scaled = isinstance(layer.latents, quant.Latents)
        kept.append(quant.dequantise_latents(layer.latents, jnp.float32) if scaled else layer.latents)
        if layer.index_keys is not None:
            keys = layer.index_keys.astype(jnp.float32)
            kept.append(keys if layer.index_scales is None else keys * layer.index_scales[..., None])
    return np.concatenate(found), [np.asarray(x[0, CONTEXT : CONTEXT + len(tokens)], np.float32) for x in kept]


def new_step(config=CONFIG):
    return jax.jit(lambda weights, token, cache: serving.step(weights, token, cache, config), donate_argnums=2)


def errors(ours, exact):
    """Of every row [N, W] its distance from the exact one, relative to that one's length, in rising order."""
    return np.sort(np.linalg.norm(ours - exact, axis=-1) / np.linalg.norm(exact, axis=-1))


FORMS = {"bf16": BFLOAT16, "fp8 keys": CacheFormat(index_dtype=jnp.float8_e4m3fn), "fp8": EIGHT_BITS}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_steps_equal_those_of_the_layers_in_xla_and_each_other_bit_for_bit(weights, form, monkeypatch):
    """Close to XLA within the roundings of bfloat16, and of a cache in 8 bits, which may take the neighbouring code."""
    step = new_step()
    ours, own_kept = through(step, weights, TOKENS, form)
    for _ in range(3):
        again, others = through(step, weights, TOKENS, form)
        assert (again == ours).all()
        assert all((a == b).all() for a, b in zip(own_kept, others, strict=True))
    monkeypatch.setattr(fused, "why_not", lambda *_: "left out for comparison")
    exact, kept = through(new_step(), weights, TOKENS, form)
    assert np.std(exact) > 0.1
    for name, a, b in zip(["logits", *range(len(kept))], [ours, *own_kept], [exact, *kept], strict=True):
        largest = errors(a, b)[-1]
        assert largest < (0.03 if form.index_dtype == jnp.bfloat16 else 0.06), (name, largest)


def test_latents_in_8_bits_are_the_quantised_ones_in_bfloat16_bit_for_bit(weights):
    """The first layer's: its kernel is given the same numbers."""
    step = new_step()
    for token in TOKENS:
        made = []
        for form in (BFLOAT16, EIGHT_BITS):
            cache = filled_cache(form)
            x, positions = embedded(weights, token, cache)
            assert fused.why_not(weights, x, cache, positions, CONFIG) is None
            _, cache = step(weights, jnp.full((1,), token), cache)
            made.append(jax.tree.map(lambda x: x[:, CONTEXT : CONTEXT + 1], cache.layers[0]))
        layer = serving.init_cache(CONFIG, SCHEDULE, 1, 1, EIGHT_BITS).layers[0].replace(index_keys=None, index_scales=None)
        exact = jax.jit(append)(layer, made[0].latents, None, jnp.zeros((1, 1), jnp.int32))
        for ours, theirs in zip(jax.tree.leaves(made[1].latents), jax.tree.leaves(exact.latents), strict=True):
            assert (np.asarray(ours, np.float32) == np.asarray(theirs, np.float32)).all()


# As wide as GLM-5, with few of its experts.
GLM_5 = preset("glm-5") | {"n_routed_experts": 32, "first_k_dense_replace": 1, "num_hidden_layers": 3, "vocab_size": 512}
# As wide as DeepSeek-V3.2, with two of its groups of experts.
DEEPSEEK = preset("deepseek-v3.2") | {
    **{"n_routed_experts": 64, "n_group": 2, "topk_group": 1},
    **{"first_k_dense_replace": 1, "num_hidden_layers": 3, "vocab_size": 512, "bos_token_id": None},
}


@pytest.mark.parametrize(
    "fields",
    [FIELDS, *(shape | {"eos_token_id": None, "pad_token_id": None} for shape in (GLM_5, DEEPSEEK))],
    ids=["30B", "GLM-5", "DeepSeek-V3.2"],
)
def test_layers_in_8_bits_compute_what_the_same_numbers_in_bfloat16_do(fields):
    config = Config.from_hf(fields)
    weights = experts_by_bias(serving.restrict(serving.random_weights(jax.random.key(0), config), config, SCHEDULE))
    scaled, decoded = zip(*map(in_codes, weights.layers), strict=True)
    step = new_step(config)
    exact, kept = through(step, weights.replace(layers=decoded), TOKENS, config=config)
    ours, own_kept = through(step, weights.replace(layers=scaled), TOKENS, config=config)
    again, _ = through(step, weights.replace(layers=scaled), TOKENS, config=config)
    assert (again == ours).all()
    assert np.std(exact) > 0.1
    for name, a, b in zip(["logits", *range(len(kept))], [ours, *own_kept], [exact, *kept], strict=True):
        assert errors(a, b)[-1] < 0.02, name


def test_a_program_of_many_steps_draws_the_same_tokens_in_two_launches_an_s_and_four_an_f_layer(weights):
    from jax._src.lib import mosaic_gpu as library

    count, token = 8, jnp.full((1,), TOKENS[0])
    drawn, _ = jax.block_until_ready(decode(weights, token, filled_cache(), CONFIG, steps=count))
    cache = filled_cache()
    cupti = library._mosaic_gpu_ext
    cupti._cupti_init()
    again, _ = jax.block_until_ready(decode(weights, token, cache, CONFIG, steps=count))
    launches = len(cupti._cupti_get_timings(True)) / count
    layers = 4 * SCHEDULE.num_full + 2 * (SCHEDULE.num_layers - SCHEDULE.num_full)
    assert layers < launches <= layers + EDGES
    assert (drawn == again).all()

    drawn = drawn[0].tolist()
    logits, _ = through(new_step(), weights, [TOKENS[0], *drawn[:-1]])
    assert logits.argmax(-1).tolist() == drawn
