"""Inference on a mesh of eight devices computes what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import serving, sharding
from indexcache_jax.positions import even_order
from indexcache_jax.serving.generation import generate
from indexcache_jax.serving.model import embed, last_hidden, last_logits, prefill_chunk, walk
from indexcache_jax.serving.weights import abstract, from_params
from tests.support import meshes
from tests.support.serving_cases import CHUNK, NEW, greedy_by_forwards, model, prompts_of
from tests.support.tiny_models import GLM_FIELDS, Case

# All meshes for one family; for the others those that split most.
GLM = ("glm", "FSFSS")
CASES = [(mesh, GLM) for mesh in meshes.MESHES]
CASES += [(mesh, case) for mesh in ("all", "split cache") for case in (("deepseek", "FSSFS"), ("unusual", "FSSSF"))]
# A row for every device, or one that all of them share.
ROWS = [("data", 8), ("expert", 8), ("all", 8), ("all", 1), ("context, expert", 1), ("split cache", 1)]


@functools.cache
def reference(fields, pattern):
    case = model(fields, pattern)
    tokens, gap = greedy_by_forwards(case, prompts_of(case))
    assert gap > 1e-4  # so that no rounding decides a token
    return tokens


def on_mesh(case):
    return sharding.put(from_params(case.params, case.config, case.schedule), abstract(case.config, case.schedule))


@pytest.mark.parametrize("mesh, fields", CASES, ids=str)
def test_tokens_are_those_of_one_device(mesh, fields):
    case = model(*fields)
    with meshes.use(mesh):
        found = generate(on_mesh(case), prompts_of(case), case.config, case.schedule, NEW, chunk=CHUNK)
    assert found == reference(*fields)


def prefilled(case, weights, rows):
    """After a prompt of equal rows in two chunks: logits [B, V], the cache, and the second chunk's selections.

    The selections [num_full, B, S, k] are in the order of the tokens.
    """
    cache = serving.init_cache(case.config, case.schedule, rows, 64, jnp.float32)
    tokens = np.random.RandomState(1).randint(0, case.config.vocab_size, (rows, 48))
    lengths, hidden = np.array([16] * rows, np.int32), jnp.zeros((rows, case.config.hidden_size))
    x, cache = prefill_chunk(weights, tokens[:, :16], lengths, cache, case.config)
    selections = []

    def keep(number, x, indices):
        selections.extend([] if indices is None else [np.asarray(indices)])
        return x

    x, positions = embed(weights.embedding, tokens[:, 16:], cache.lengths, 2 * lengths, case.config)
    x, cache = walk(weights, x, cache, positions, 64, case.config, visit=keep)
    order = np.argsort(np.asarray(positions.queries)[0])
    logits = last_logits(weights, last_hidden(x, 2 * lengths, hidden), case.config)
    return logits, cache, np.stack(selections)[:, :, order]


@pytest.mark.parametrize("mesh, rows", ROWS)
def test_selections_logits_and_caches_are_those_of_one_device(mesh, rows):
    case = model(*GLM)
    expected, one, selected = prefilled(case, from_params(case.params, case.config, case.schedule), rows)
    with meshes.use(mesh):
        found, cache, selected_on_mesh = prefilled(case, on_mesh(case), rows)
    np.testing.assert_array_equal(selected_on_mesh, selected)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0), cache, one)


def test_a_full_row_is_not_written_over_where_devices_have_a_token_each():
    case = Case(GLM_FIELDS | {"num_hidden_layers": 1}, "F", 0)
    prompts = [np.array([6, 5]), *[np.array([5])] * 7]
    with meshes.use("data"):
        cache = serving.init_cache(case.config, case.schedule, 8, 2, jnp.float32)
        cache = cache.replace(lengths=jnp.array([0] + [1] * 7, jnp.int32))
        _, cache = serving.prefill_prompts(on_mesh(case), prompts, cache, case.config, chunk=1)
    last = np.asarray(cache.layers[0].latents[:, 1])
    np.testing.assert_array_equal(last, np.broadcast_to(last[0], last.shape))


def test_queries_are_dealt_so_that_devices_see_equally_many_keys():
    with meshes.use("context"):
        order = even_order(64)
    assert sorted(order) == list(range(64)) and len({sum(part) for part in order.reshape(8, -1)}) == 1
    assert even_order(64) is None
