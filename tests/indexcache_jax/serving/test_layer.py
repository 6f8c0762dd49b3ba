"""A layer whose activations are rounded to 8 bits once, by whoever makes them, computes what it does where products do so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import ops, serving
from indexcache_jax.positions import whole_rows
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import layer
from pallas_kernels.quant import Scaled, dequantise, quantise_rows
from tests.support.eight_bits import RAGGED

CONFIG = dataclasses.replace(RAGGED.config, num_layers=2, moe_layers=(False, True))


@pytest.fixture(scope="module")
def weights() -> serving.Weights:
    return serving.random_weights(jax.random.key(0), CONFIG, jnp.float32, weights="fp8")


@pytest.fixture
def in_8_bits(monkeypatch):
    """Products with matrices in 8 bits ask for rows in 8 bits; the names of the operations that made some."""
    made = set()

    def recorded(name):
        operation = getattr(ops, name)

        def run(*arguments, **options):
            result = operation(*arguments, **options)
            if any(isinstance(x, Scaled) for x in (result if isinstance(result, tuple) else (result,))):
                made.add(name)
            return result

        return run

    for name in ("normalise", "swiglu"):
        monkeypatch.setattr(ops, name, recorded(name))
    monkeypatch.setattr(ops, "quantises", lambda x, matrix, copies=1: isinstance(matrix, Scaled))
    return made


@pytest.mark.parametrize("number", [0, 1], ids=["dense", "experts"])
def test_mlp_quantises_what_products_would(weights, request, number):
    p, x = weights.layers[number], jax.random.normal(jax.random.key(1), (2, 5, CONFIG.hidden_size))
    with ops.rounded_rows():
        expected = layer.mlp(p, x, CONFIG) - x
    made = request.getfixturevalue("in_8_bits")
    found = layer.mlp(p, x, CONFIG) - x  # products of rows in 8 bits are bfloat16
    assert made == {"normalise", "swiglu"}
    size = float(jnp.max(jnp.abs(expected)))
    assert size > 0.01
    np.testing.assert_allclose(found, expected, atol=0.03 * size)


def test_attention_quantises_queries_and_latents_where_they_are_made(weights, monkeypatch, request):
    schedule = Schedule("FS")
    p = serving.restrict(weights, CONFIG, schedule).layers[1]
    x = jax.random.normal(jax.random.key(3), (2, 5, CONFIG.hidden_size))
    cache = serving.init_cache(CONFIG, schedule, 2, 8, serving.CacheFormat(jnp.float8_e4m3fn)).layers[1]
    indices = jnp.where(jnp.arange(8) <= jnp.arange(5)[:, None], jnp.arange(8), -1)[None].repeat(2, axis=0)
    arguments = p, x, indices, cache, whole_rows(x, CONFIG), 8, CONFIG
    with ops.rounded_rows():
        expected, _, filled = layer.attention(*arguments)
    made = request.getfixturevalue("in_8_bits")
    monkeypatch.setattr(ops, "appends", lambda *_: True)
    found, _, appended = layer.attention(*arguments)
    assert made == {"normalise"}
    size = float(jnp.max(jnp.abs(expected - x)))
    assert size > 0.01
    np.testing.assert_allclose(found, expected, atol=0.05 * size)
    for one, other in zip(jax.tree.leaves(appended), jax.tree.leaves(filled), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=0.13, atol=1e-5)


def test_absorbed_queries_of_a_matrix_in_8_bits_are_those_of_the_decoded_one(weights):
    p, x = weights.layers[1], jnp.zeros((2, 5, CONFIG.hidden_size))
    positions = whole_rows(x, CONFIG)
    q_latent = jax.random.normal(jax.random.key(2), (2, 5, CONFIG.q_lora_rank))
    expected = layer._absorb(dequantise(p.up, jnp.float32), p.k_up, q_latent, positions.cos_sin, CONFIG)
    found = layer._absorb(p.up, p.k_up, q_latent, positions.cos_sin, CONFIG)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(expected))))
    codes = jax.tree.map(lambda leaf: leaf.reshape(2, 5, -1), quantise_rows(q_latent.reshape(10, -1)))
    found = layer._absorb(p.up, p.k_up, codes, positions.cos_sin, CONFIG)
    np.testing.assert_allclose(found, expected, atol=0.1 * float(jnp.max(jnp.abs(expected))))
