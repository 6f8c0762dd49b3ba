"""A token each of a few rows through its kernels on a Hopper GPU, against references and the layers in XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import few_rows
from indexcache_jax.serving.cache import append
from pallas_kernels import hopper, quant
from pallas_kernels.routed_mlp.api import routed_mlp
from pallas_kernels.routing import reference as routing
from pallas_kernels.routing.api import route
from tests.support.serving_cases import experts_by_bias

pytestmark = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

EXPERTS, CHOICES, HIDDEN, WIDTH = 64, 4, 2048, 1536  # of the 30B shape


@pytest.mark.parametrize(
    "rows, experts, groups, own", [(7, EXPERTS, (1, 1), None), (32, 256, (1, 1), None), (16, 256, (8, 4), (96, 32))]
)
@pytest.mark.parametrize("kind", ["random", "tied", "same"])
def test_routes_are_those_of_the_reference(rows, experts, groups, own, kind):
    """groups: of experts, and how many of them are kept; own: the device's first expert, and how many it has."""
    random = np.random.default_rng(rows)
    logits = random.standard_normal((rows, experts))
    logits = {"random": logits, "tied": np.round(logits), "same": np.broadcast_to(logits[:1], logits.shape)}[kind]
    bias = jnp.asarray(random.standard_normal(experts) * (kind == "random"), jnp.float32)
    options = dict(choices=CHOICES, normalised=True, scale=1.8, n_group=groups[0], topk_group=groups[1], shared=True, own=own)
    ours = jax.jit(functools.partial(route, implementation="mosaic_gpu", **options))(jnp.asarray(logits, jnp.float32), bias)
    exact = jax.jit(functools.partial(route, implementation="xla", **options))(jnp.asarray(logits, jnp.float32), bias)
    for name, array in vars(exact).items():
        np.testing.assert_allclose(vars(ours)[name], array, rtol=1e-5 if name == "weights" else 0, err_msg=name)


@functools.cache
def matrices(experts=EXPERTS, hidden=HIDDEN, width=WIDTH):
    def codes(key, *shape):
        made = jax.jit(lambda key: quant.quantise_matrix(jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5))
        return made(jax.random.key(key))

    routed = codes(0, experts, 2, width, hidden), codes(1, experts, hidden, width)
    return *routed, codes(2, 2 * width, hidden), codes(3, hidden, width)


SHAPE, GLM_5, DEEPSEEK = (EXPERTS, HIDDEN, WIDTH), (16, 6144, 2048), (16, 7168, 2048)  # the wide ones with few experts


@pytest.mark.parametrize(
    "rows,alike,shape", [(2, False, SHAPE), (9, True, SHAPE), (16, False, SHAPE), (16, False, GLM_5), (11, False, DEEPSEEK)]
)
def test_few_rows_are_multiplied_by_their_experts(rows, alike, shape):
    """alike: all rows choose the same experts. Wide rows are in shared memory in parts."""
    random, count = np.random.default_rng(rows), shape[0]
    x = jnp.asarray(random.standard_normal((rows, shape[1])), jnp.bfloat16)
    experts = np.stack([np.random.default_rng(0 if alike else n).permutation(count)[:CHOICES] for n in range(rows)])
    # A quarter of the pairs is another device's.
    experts = np.where(random.uniform(size=experts.shape) < 0.25, -1, experts)
    weights = jnp.asarray(random.uniform(0.1, 1, experts.shape), jnp.float32)
    routes = routing.tables(jnp.asarray(experts, jnp.int32), weights, count, shared=True)
    given = matrices(*shape)
    kernel = jax.jit(functools.partial(routed_mlp, implementation="mosaic_gpu"))
    ours = np.asarray(sum(kernel(x, routes, *given)))
    for _ in range(3):
        assert (np.asarray(sum(kernel(x, routes, *given))) == ours).all()
    exact = np.asarray(sum(jax.jit(functools.partial(routed_mlp, implementation="xla"))(x, routes, *given)))
    errors = np.linalg.norm(ours - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert errors.max() < 0.006, errors


FIELDS = preset("30b") | {"num_hidden_layers": 2, "vocab_size": 512, "eos_token_id": None, "pad_token_id": None}
CONFIG, SCHEDULE = Config.from_hf(FIELDS), Schedule("FS")
CONTEXT, MAX_LEN, STEPS = 700, 1024, 4


@pytest.fixture(scope="module")
def weights():
    made = serving.random_weights(jax.random.key(0), CONFIG, weights="fp8")
    return experts_by_bias(serving.restrict(made, CONFIG, SCHEDULE))


def filled_cache(rows, form):
    """`rows` contexts of random tokens, one shorter than the others."""
    random = np.random.default_rng(0)

    def numbers(buffer):
        return jnp.asarray(random.normal(size=(rows, CONTEXT, buffer.shape[-1])), jnp.bfloat16)

    def fill(layer):
        keys = None if layer.index_keys is None else numbers(layer.index_keys)
        return append(layer, numbers(layer.latents), keys, jnp.broadcast_to(jnp.arange(CONTEXT), (rows, CONTEXT)))

    cache = serving.init_cache(CONFIG, SCHEDULE, rows, MAX_LEN, form)
    return serving.Cache(tuple(map(fill, cache.layers)), jnp.full((rows,), CONTEXT, jnp.int32).at[0].set(CONTEXT - 9))


def new_step():
    return jax.jit(lambda weights, token, cache: serving.step(weights, token, cache, CONFIG), donate_argnums=2)


def through(step, weights, rows, form):
    """Logits of the steps, and the last cache."""
    cache, found = filled_cache(rows, form), []
    for i in range(STEPS):
        logits, cache = step(weights, jnp.arange(rows) + 7 * i, cache)
        found.append(np.asarray(logits))
    return np.stack(found), cache


@pytest.mark.parametrize("rows,form", [(5, jnp.bfloat16), (16, serving.FP8)])
def test_steps_equal_those_of_the_layers_in_xla_and_each_other_bit_for_bit(weights, rows, form, monkeypatch):
    asked = []
    why_not = few_rows.why_not
    monkeypatch.setattr(few_rows, "why_not", lambda *given: asked.append(why_not(*given)) or asked[-1])
    step = new_step()
    ours, cache = through(step, weights, rows, form)
    again, _ = through(step, weights, rows, form)
    assert asked == [None]
    assert (again == ours).all()
    monkeypatch.setattr(few_rows, "why_not", lambda *_: "left out for comparison")
    exact, old = through(new_step(), weights, rows, form)
    assert np.std(exact) > 0.1
    errors = np.linalg.norm(ours - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert errors.max() < (0.06 if form == serving.FP8 else 0.03), errors
    new = slice(CONTEXT - 9, CONTEXT + STEPS)
    for a, b in zip(cache.layers, old.layers, strict=True):
        for name in ("latents", "index_keys"):
            kept = [getattr(layer, name) for layer in (a, b)]
            if kept[0] is None:
                continue
            if isinstance(kept[0], quant.Latents):
                kept = [quant.dequantise_latents(x, jnp.float32) for x in kept]
            elif a.index_scales is not None:
                kept = [x.astype(jnp.float32) * layer.index_scales[..., None] for x, layer in zip(kept, (a, b), strict=True)]
            one, other = (np.asarray(x[:, new], np.float32) for x in kept)
            assert (np.linalg.norm(one - other, axis=-1) <= 0.08 * np.linalg.norm(other, axis=-1)).all(), name
