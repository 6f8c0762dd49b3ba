"""Inference on a mesh of eight devices computes what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving, sharding
from indexcache_jax.serving.generation import generate
from indexcache_jax.serving.model import last_hidden, last_logits, prefill_chunk
from indexcache_jax.serving.weights import abstract, from_params
from tests.support import meshes
from tests.support.serving_cases import CHUNK, NEW, greedy_by_forwards, model, prompts_of

CASES = [("glm", "FSFSS"), ("deepseek", "FSSFS"), ("unusual", "FSSSF")]


@functools.cache
def reference(fields, pattern):
    case = model(fields, pattern)
    tokens, gap = greedy_by_forwards(case, prompts_of(case))
    assert gap > 1e-4  # so that no rounding decides a token
    return tokens


def on_mesh(case):
    return sharding.put(from_params(case.params, case.config, case.schedule), abstract(case.config, case.schedule))


@pytest.mark.parametrize("fields, pattern", CASES)
@pytest.mark.parametrize("mesh", meshes.MESHES)
def test_tokens_are_those_of_one_device(mesh, fields, pattern):
    case = model(fields, pattern)
    with meshes.use(mesh):
        found = generate(on_mesh(case), prompts_of(case), case.config, case.schedule, NEW, chunk=CHUNK)
    assert found == reference(fields, pattern)


def prefilled(case, weights, rows):
    """Logits [B, V] after a prompt of equal rows in two chunks, and the F layers' selections of the second chunk."""
    cache = serving.init_cache(case.config, case.schedule, rows, 64, jnp.float32)
    tokens = np.random.RandomState(1).randint(0, case.config.vocab_size, (rows, 48))
    lengths, hidden = np.array([16] * rows, np.int32), jnp.zeros((rows, case.config.hidden_size))
    x, cache = prefill_chunk(weights, tokens[:, :16], lengths, cache, case.config)
    x, cache = prefill_chunk(weights, tokens[:, 16:], 2 * lengths, cache, case.config)
    return last_logits(weights, last_hidden(x, 2 * lengths, hidden), case.config), cache


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("mesh", meshes.MESHES)
def test_logits_and_caches_are_those_of_one_device(mesh, rows):
    case = model("glm", "FSFSS")
    expected, one = prefilled(case, from_params(case.params, case.config, case.schedule), rows)
    with meshes.use(mesh):
        found, cache = prefilled(case, on_mesh(case), rows)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0), cache, one)
