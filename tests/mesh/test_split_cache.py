"""Selection and attention over a cache whose positions are split over devices are those of one device."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import ops, serving, sharding
from indexcache_jax.positions import Positions
from indexcache_jax.serving.cache import CacheFormat, fork
from indexcache_jax.serving.cache import abstract as abstract_cache
from indexcache_jax.serving.generation import cache_length, decode_program, generate
from indexcache_jax.serving.weights import abstract, from_params
from indexcache_jax.sharding import SERVING
from tests.support.indexer_topk_properties import numpy_select
from tests.support.serving_cases import CHUNK, NEW, model, prompts_of

MESHES = {"data, context": {"data": 2, "context": 4}, "context, tensor": {"context": 4, "tensor": 2}, "context": {"context": 8}}
B, T, HEADS, WIDTH = 2, 192, 4, 16
Q = 3  # queries of a row, which neither 4 nor 8 devices divide
PART = T // 4
K = 38  # latents that a query selects


def use(name):
    return sharding.use(sharding.make_mesh(**MESHES[name]), SERVING.split_cache())


def config(k):
    return dataclasses.replace(model("glm", "FSFSS").config, index_topk=k)


def positions_of(queries, lengths):
    return Positions(jnp.asarray(queries, jnp.int32), jnp.asarray(lengths, jnp.int32), (jnp.zeros(()), jnp.zeros(())))


def placed(x, *axes):
    return x if x is None else jax.device_put(x, sharding.fitting(x.shape, (*axes, *(None,) * (x.ndim - len(axes)))))


# ---- selection

SEEN = {  # positions of the queries [B, Q], and lengths of the rows
    "everything": ([[T - 1] * Q] * B, [T, T]),
    "ragged": ([[T - 1, 10, 60], [-1, PART - 1, PART]], [T, PART + 1]),
    "less than a part": ([[5, 30, T - 1], [-1, 0, 2 * PART]], [PART - 7, 1]),
    "nothing": ([[-1] * Q, [T - 1] * Q], [T, 0]),
}
SCORES = ["random", "tied", "equal", "zeros of both signs", "NaN", "best on the last device", "rising", "8 bits"]


@functools.cache
def arrays(kind):
    """queries, keys, head weights and scales of an indexer whose scores are of a kind."""
    rng = np.random.default_rng(SCORES.index(kind))
    normal = functools.partial(rng.normal)
    queries, keys, weights = (normal(size=s) for s in ((B, Q, HEADS, WIDTH), (B, T, WIDTH), (B, Q, HEADS)))
    if kind in ("tied", "8 bits"):
        queries, keys, weights = (rng.integers(-1, 2, x.shape) for x in (queries, keys, weights))
    elif kind != "random":
        queries, weights = np.ones_like(queries) / WIDTH, np.ones_like(weights) / HEADS
        rank = {
            "equal": np.ones(T),
            "zeros of both signs": np.where(np.arange(T) % 7 == 3, 1.0, -1.0),  # relu makes 0 of -1
            "NaN": np.where(np.arange(T) % 3 == 1, np.nan, np.arange(T) % 5),
            "best on the last device": np.where(np.arange(T) >= T - PART, 5.0, np.arange(T) % 4),
            "rising": np.arange(T, dtype=float),
        }[kind]
        keys = np.broadcast_to(rank[:, None], keys.shape)
        weights = -weights if kind == "zeros of both signs" else weights
    dtype = jnp.float8_e4m3fn if kind == "8 bits" else jnp.float32
    scales = jnp.asarray(2.0 ** rng.integers(-2, 3, (B, T)), jnp.float32) if kind == "8 bits" else None
    return jnp.asarray(queries, dtype), jnp.asarray(keys, dtype), jnp.asarray(weights, jnp.float32), scales


@functools.partial(jax.jit, static_argnames="config")
def select(queries, keys, weights, scales, positions, config):
    return ops.select(queries, keys, weights, positions, config, scales)


def selections(kinds, k, seen, rows=B):
    for kind in kinds:
        queries, keys, weights, scales = (x if x is None else x[:rows] for x in arrays(kind))
        keys, scales = (placed(x, "batch", "tokens") for x in (keys, scales))
        positions, lengths = (x[:rows] for x in SEEN[seen])
        yield kind, np.asarray(select(queries, keys, weights, scales, positions_of(positions, lengths), config=config(k)))


@pytest.mark.parametrize(
    "mesh, k", [("data, context", 1), ("data, context", 20), ("data, context", 130), ("context", 60), ("context", T)]
)
def test_selections_are_those_of_one_device(mesh, k):
    for seen in SEEN:
        expected = dict(selections(SCORES, k, seen))
        with use(mesh):
            for kind, found in selections(SCORES, k, seen):
                np.testing.assert_array_equal(found, expected[kind], err_msg=f"{kind}, {seen}")


def test_selections_are_those_of_the_definition():
    """Not only equal to each other: by NumPy, from scores that are exact."""
    with use("data, context"):
        ((_, found),) = selections(["NaN"], 20, "ragged")
    positions, lengths = (np.asarray(x) for x in SEEN["ragged"])
    visible = np.minimum(positions + 1, lengths[:, None])
    scores = np.broadcast_to(np.asarray(arrays("NaN")[1])[:, None, :, 0], (B, Q, T))
    np.testing.assert_array_equal(found, numpy_select(scores, visible, 20))


def test_one_row_is_selected_from_by_every_device():
    expected = dict(selections(["random", "tied"], 20, "everything", rows=1))
    with use("data, context"):
        for kind, found in selections(["random", "tied"], 20, "everything", rows=1):
            np.testing.assert_array_equal(found, expected[kind])


# ---- attention

CHOSEN = {
    "scattered": np.arange(3, T, 5),
    "on one device": PART + np.arange(38),
    "across a boundary": 2 * PART - 20 + np.arange(38),
    "one": np.array([T - 1]),
    "none": np.array([], int),
}


def attention_arrays(dtype):
    c, rng = config(K), np.random.default_rng(5)
    queries = jnp.asarray(rng.normal(size=(B, Q, c.num_heads, c.latent_dim)), dtype)
    return queries, jnp.asarray(rng.normal(size=(B, T, c.latent_dim)), dtype)


def indices_of(name):
    """One query selects as `name` says, one nothing, and one from every part."""
    chosen = np.full((B, Q, K), -1, np.int32)
    chosen[:, 0, : len(CHOSEN[name])] = CHOSEN[name]
    chosen[:, 2] = CHOSEN["scattered"]
    return jnp.asarray(chosen)


@functools.partial(jax.jit, static_argnames="config")
def attend(queries, latents, indices, config):
    return ops.attend(queries, latents, indices, config)


def contexts(eight_bits, size=1.0):
    queries, latents = attention_arrays(jnp.float32)
    latents = ops.quantise_latents(latents, config(K).kv_lora_rank) if eight_bits else latents
    queries = placed(queries * size, "batch", "queries", "heads")
    latents = jax.tree.map(lambda x: placed(x, "batch", "tokens"), latents)
    for name in CHOSEN:
        yield name, np.asarray(attend(queries, latents, indices_of(name), config=config(K)))


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("mesh", ["data, context", "context, tensor"])
def test_attention_is_that_of_one_device(mesh, eight_bits):
    expected = dict(contexts(eight_bits))
    with use(mesh):
        for name, found in contexts(eight_bits):
            np.testing.assert_allclose(found, expected[name], atol=1e-6, rtol=0, err_msg=name)
            assert not found[:, 1].any()  # what selects nothing


def test_logits_of_any_size_are_merged():
    """Exponentials of these logits overflow, unless the largest is taken away first."""
    expected = dict(contexts(False, size=1e4))
    with use("data, context"):
        for name, found in contexts(False, size=1e4):
            np.testing.assert_allclose(found, expected[name], atol=1e-6, rtol=0, err_msg=name)


# ---- serving


FORMATS = {"float32": CacheFormat.of(jnp.float32), "8 bits": CacheFormat.of(jnp.float8_e4m3fn)}


def filled(case, form, rows, length):
    """A cache in which every position holds something."""
    rng, cache = np.random.default_rng(3), serving.init_cache(case.config, case.schedule, rows, length, form)

    def layer(empty):
        latents, keys = (
            None if x is None else jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (empty.latents, empty.index_keys)
        )
        key_scales = None
        if form.latent_dtype == jnp.float8_e4m3fn:
            latents = ops.quantise_latents(latents, case.config.kv_lora_rank)
            keys, key_scales = (None, None) if keys is None else ops.quantise_index(keys)
        return empty.replace(latents=latents, index_keys=keys, index_scales=key_scales)

    return cache.replace(layers=tuple(map(layer, cache.layers)), lengths=jnp.array([length - 1, 11], jnp.int32))


@pytest.mark.parametrize("form", [pytest.param("float32", marks=pytest.mark.slow), "8 bits"])
def test_a_decode_step_is_that_of_one_device(form):
    """A long row and one that is shorter than a part, with heads split besides."""
    case, token = model("glm", "FSFSS"), jnp.array([3, 7])
    weights, cache = from_params(case.params, case.config, case.schedule), filled(case, FORMATS[form], 2, 96)
    expected, _ = serving.decode_step(weights, token, cache, case.config, case.schedule)
    with use("context, tensor"):
        weights = sharding.put(weights, abstract(case.config, case.schedule))
        cache = sharding.put(cache, abstract_cache(case.config, case.schedule, 2, 96, FORMATS[form]))
        found, cache = serving.decode_step(weights, token, cache, case.config, case.schedule)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert {x.sharding.spec[1] for x in jax.tree.leaves(cache.layers)} == {"context"}


@pytest.mark.slow
def test_tokens_after_a_shared_document_in_8_bits_are_those_of_one_device():
    """tests/mesh/test_serving.py has the rest."""
    case = model("glm", "FSFSS")
    prompts, document = prompts_of(case), prompts_of(case)[2][:30]

    def run(weights):
        options = {"document": document, "cache_format": FORMATS["8 bits"], "chunk": CHUNK}
        return generate(weights, prompts, case.config, case.schedule, NEW, **options)

    expected = run(from_params(case.params, case.config, case.schedule))
    with use("context, tensor"):
        tree = abstract(case.config, case.schedule)
        assert run(sharding.put(from_params(case.params, case.config, case.schedule), tree)) == expected


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def exchanged(program):
    """Of every collective of a compiled program its kind and the numbers in its largest array."""
    for line in program.as_text().splitlines():
        if found := COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            yield found[2], max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def test_a_decode_step_exchanges_nothing_that_grows_with_the_cache():
    case, length, rows = model("glm", "FSFSS"), 4096, 2
    k = case.config.index_topk

    def compiled(rules):
        with sharding.use(sharding.make_mesh(data=2, context=4), rules):
            weights = sharding.put(from_params(case.params, case.config, case.schedule), abstract(case.config, case.schedule))
            cache = serving.init_cache(case.config, case.schedule, rows, length, jnp.float32)
            return decode_program(None).lower(weights, jnp.zeros(rows, jnp.int32), cache, case.config, steps=2).compile()

    found = list(exchanged(compiled(SERVING.split_cache())))
    assert {kind for kind, _ in found} >= {"all-gather", "all-reduce"}
    most = max(numbers for _, numbers in found)
    one_part = length // 4 * min(case.config.index_head_dim, case.config.latent_dim)
    assert 4 * k <= most < one_part // 8


def test_lengths_that_the_devices_do_not_divide():
    case = model("glm", "FSFSS")
    document = serving.init_cache(case.config, case.schedule, 1, 64)
    assert fork(document, 2, 66).max_len == 66
    with use("data, context"):
        for name, run in [
            ("init_cache", lambda: serving.init_cache(case.config, case.schedule, 2, 66)),
            ("fork", lambda: fork(document, 2, 66)),
        ]:
            with pytest.raises(ValueError, match=f"{name}: max_len 66 cannot be divided over the 4 devices"):
                run()
    assert cache_length(65) == 128
    auto = (jax.sharding.AxisType.Auto,) * 3
    with sharding.use(jax.sharding.AbstractMesh((1, 96, 1), sharding.AXES, axis_types=auto), SERVING.split_cache()):
        assert [cache_length(n) for n in (1, 192, 193)] == [192, 192, 384]
