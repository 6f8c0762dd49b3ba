"""A single token's step through the decode kernels on a Hopper GPU: against the layers in XLA, repeated, and its launches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving
from indexcache_jax.config import Config, preset
from indexcache_jax.generate import decode, generate, prefill
from indexcache_jax.schedule import Schedule
from pallas_kernels import hopper

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

# As wide as the real model, whose first layer is dense; the prompt is short enough for every key to be selected.
FIELDS = preset("30b") | {"num_hidden_layers": 5, "vocab_size": 512, "eos_token_id": None, "pad_token_id": None}
CONFIG, SCHEDULE = Config.from_hf(FIELDS), Schedule("FSFSS")
PROMPT = np.random.default_rng(0).integers(0, 512, 700)
EDGES = 20  # launches of a step outside the layers, at most: embedding, angles, head, choice of the token


@pytest.fixture(scope="module")
def weights():
    return serving.restrict(serving.random_weights(jax.random.key(0), CONFIG), CONFIG, SCHEDULE)


def steps(weights, tokens=(5, 6, 7), **options):
    """Logits of further tokens after the prompt, and the caches."""
    cache = serving.init_cache(CONFIG, SCHEDULE, 1, 2048, **options)
    _, cache = prefill(weights, [PROMPT], cache, CONFIG, chunk=1024)
    step, found = jax.jit(serving.step, donate_argnames="cache"), []
    for token in tokens:
        logits, cache = step(weights, jnp.full((1,), token), cache, CONFIG)
        found.append(np.asarray(logits))
    return np.stack(found), [np.asarray(x, np.float32) for x in jax.tree.leaves(cache)]


def difference(ours, exact):
    return np.sqrt(np.mean((ours - exact) ** 2)) / np.std(exact)


@pytest.mark.parametrize("options", [{}, {"index_dtype": jnp.float8_e4m3fn}], ids=["bf16", "fp8 keys"])
def test_steps_equal_those_of_the_layers_in_xla(weights, options, monkeypatch):
    ours, own_caches = steps(weights, **options)
    jax.clear_caches()
    monkeypatch.setattr(serving.decode_layer, "why_not", lambda *_: "left out for comparison")
    exact, caches = steps(weights, **options)
    jax.clear_caches()
    assert np.std(exact) > 0.1
    assert difference(ours, exact) < 0.05
    for a, b in zip(own_caches, caches, strict=True):
        assert difference(a, b) < 0.05


def test_steps_are_the_same_bit_for_bit_however_often(weights):
    first, caches = steps(weights)
    for _ in range(5):
        again, others = steps(weights)
        assert (again == first).all()
        assert all((a == b).all() for a, b in zip(caches, others, strict=True))


def test_generates_what_the_layers_in_xla_generate(weights, monkeypatch):
    """Greedy tokens agree until a near-tie of a random model falls the other way."""
    ours = generate(weights, [PROMPT], CONFIG, SCHEDULE, 40)[0]
    assert ours == generate(weights, [PROMPT], CONFIG, SCHEDULE, 40)[0]
    monkeypatch.setattr(serving.decode_layer, "why_not", lambda *_: "left out for comparison")
    jax.clear_caches()
    exact = generate(weights, [PROMPT], CONFIG, SCHEDULE, 40)[0]
    jax.clear_caches()
    assert ours[:3] == exact[:3]


def test_launches_of_a_step(weights):
    """Two an S layer, four an F layer."""
    from jax._src.lib import mosaic_gpu as library

    count = 8
    cache, token = serving.init_cache(CONFIG, SCHEDULE, 1, 8192), jnp.zeros((1,), jnp.int32)
    out, cache = jax.block_until_ready(decode(weights, token, cache, CONFIG, steps=count))
    cupti = library._mosaic_gpu_ext
    cupti._cupti_init()
    jax.block_until_ready(decode(weights, token, cache, CONFIG, steps=count))
    launches = len(cupti._cupti_get_timings(True)) / count
    layers = 4 * SCHEDULE.num_full + 2 * (SCHEDULE.num_layers - SCHEDULE.num_full)
    assert layers < launches <= layers + EDGES
