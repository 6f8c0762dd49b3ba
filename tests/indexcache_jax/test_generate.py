"""Generation equals repeated full forwards: ragged, chunked, forked, under every kind of schedule, and in any batch."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import forward, serving
from indexcache_jax.config import Config, preset
from indexcache_jax.generate import (
    Sampling,
    chunk_width,
    decode,
    generate,
    prefill,
    prefill_chunk,
    prefill_document,
    sample,
    visible_keys,
)
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import CASES, DEEPSEEK_FIELDS, GLM_FIELDS, UNUSUAL, Case

LENGTHS = (37, 5, 60)
NEW = 6
CHUNK = 16  # so that prompts take several, and all tests share their programs
MODELS = {"glm": GLM_FIELDS, "deepseek": DEEPSEEK_FIELDS, "unusual": GLM_FIELDS | UNUSUAL}


@functools.cache
def model(fields, pattern, seed=7):
    return Case(MODELS[fields], pattern, seed, LENGTHS)


def prompts_of(case):
    return [row[:length].tolist() for row, length in zip(case.tokens, case.lengths, strict=True)]


def run(case, prompts=None, new=NEW, **options):
    prompts = prompts_of(case) if prompts is None else prompts
    return generate(case.params, prompts, case.config, case.schedule, new, **{"chunk": CHUNK} | options)


def greedy_by_forwards(case, prompts, new=NEW, width=72):
    """Every token from a forward over everything before it. [rows][new], and by how much each one was the best."""
    rows, gaps = [list(p) for p in prompts], []
    for _ in range(new):
        tokens = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        lengths = jnp.array([len(row) for row in rows])
        logits = np.asarray(forward(case.params, tokens, case.config, case.schedule, lengths))
        for i, row in enumerate(rows):
            ordered = np.sort(logits[i, len(row) - 1])
            gaps.append(ordered[-1] - ordered[-2])
            row.append(int(logits[i, len(row) - 1].argmax()))
    return [row[-new:] for row in rows], min(gaps)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ("glm", "FSFSF"),
        ("deepseek", "FSSSS"),
        *(
            pytest.param(fields, pattern, marks=pytest.mark.slow)
            for fields in MODELS
            for pattern in ("FFFFF", "FFSSF", "FSFSS")
        ),
    ],
)
def test_tokens_equal_those_of_repeated_forwards(fields, pattern):
    case = model(fields, pattern)
    expected, gap = greedy_by_forwards(case, prompts_of(case))
    assert gap > 1e-4, "a near-tie says nothing: take another seed"
    assert len(set(map(tuple, expected))) == len(expected)  # the rows differ, so that rows mixed up would be seen
    assert run(case) == expected


@pytest.mark.slow
def test_chunks_change_nothing():
    case = model("glm", "FSFSF")
    assert run(case) == run(case, chunk=64) == run(case, chunk=7)


def test_a_document_shared_by_all_prompts_is_as_if_it_stood_in_each(case_name="glm"):
    case = model(case_name, "FSFSF")
    document, *questions = prompts_of(case)[0], [3, 1, 4], [1, 5, 9, 2, 6, 5], [3]
    whole = [document + q for q in questions]
    expected, gap = greedy_by_forwards(case, whole)
    assert gap > 1e-4
    assert run(case, questions, document=document) == expected == run(case, whole)
    weights = serving.weights_of(case.params, case.config, case.schedule)
    cache = prefill_document(weights, document, case.config, case.schedule, chunk=CHUNK)
    told = []
    again = functools.partial(run, case, document=cache, progress=lambda phase, tokens: told.append((phase, tokens)))
    assert again(questions[:1]) + again(questions[1:], cache_len=49) == expected  # less room than the document's own cache
    assert sum(tokens for phase, tokens in told if phase == "prefill") == sum(map(len, questions))


def test_a_fork_leaves_the_cache_it_was_made_of():
    case = model("glm", "FSFSF")
    weights = serving.weights_of(case.params, case.config, case.schedule)
    cache = serving.init_cache(case.config, case.schedule, 1, 64, jnp.float32)
    _, cache = prefill(weights, [np.array(prompts_of(case)[0])], cache, case.config, chunk=CHUNK)
    forked = serving.fork(cache, 3)
    assert forked.lengths.tolist() == [37] * 3
    first, forked = decode(weights, jnp.array([5, 6, 5]), forked, case.config, steps=3)
    assert first[0].tolist() == first[2].tolist() != first[1].tolist()
    again, cache = decode(weights, jnp.array([6]), cache, case.config, steps=3)
    assert again[0].tolist() == first[1].tolist() and cache.lengths.tolist() == [40]
    with pytest.raises(ValueError, match="copies 0"):
        serving.fork(cache, 0)


def test_stop_tokens_end_their_own_row_only():
    case = model("glm", "FSFSF")
    free = run(case, new=NEW)
    stop = free[0][2]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert run(case, stop_tokens=[stop]) == cut
    assert run(case, stop_tokens=[row[0] for row in free]) == [row[:1] for row in free]


def test_more_new_tokens_than_one_program_makes():
    case = model("glm", "FSSSS")
    long = run(case, new=70, cache_len=130)
    assert [len(row) for row in long] == [70] * 3
    assert [row[:NEW] for row in long] == run(case)


def test_one_new_token_needs_no_step():
    case = model("glm", "FSSSS")
    assert run(case, new=1) == [row[:1] for row in run(case)]


# Sampling.

DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.9)


def test_what_a_request_draws_does_not_depend_on_its_batch():
    case = model("glm", "FSFSF")
    prompts = prompts_of(case)
    together = run(case, sampling=DRAWN, seed=3)
    assert together == run(case, sampling=DRAWN, seed=3)
    for i, prompt in enumerate(prompts):
        assert run(case, [prompt], sampling=DRAWN, seed=3, ids=[i]) == [together[i]]
    assert run(case, sampling=DRAWN, seed=4) != together
    same = run(case, [prompts[0]] * 3, sampling=DRAWN, seed=3)
    assert len(set(map(tuple, same))) == 3  # three requests with one prompt draw by three keys


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2), {0, 1}),
        (Sampling(1.0, top_k=9), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.7), {0, 1}),
        (Sampling(1.0, top_p=0.4), {0}),
        (Sampling(1.0, top_k=3, top_p=0.85), {0, 1}),  # of the three kept, two have 0.84 + 0.01
        (Sampling(1.0, top_p=1e-46), {0}),
        (Sampling(1e-3), {0}),
        (Sampling(0.0), {0}),
    ],
)
def test_sampling_draws_from_what_it_keeps_and_by_probability(sampling, kept):
    probabilities = np.array([0.5, 0.3, 0.14, 0.06])
    if sampling == Sampling(1.0, top_k=3, top_p=0.85):
        assert (0.5 + 0.3) / 0.94 > 0.85  # after top_k, top_p counts among what that kept
    n = 4000
    logits = jnp.broadcast_to(jnp.log(probabilities), (n, 4))
    drawn = np.asarray(sample(logits, sampling, jax.random.split(jax.random.key(0), n)))
    assert set(drawn.tolist()) == kept
    expected = np.where(np.isin(np.arange(4), list(kept)), probabilities, 0)
    expected = expected / expected.sum() if sampling.temperature == 1 else np.eye(4)[0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / n, expected, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-46, 1e-39, 2e-38, 1e-30])
@pytest.mark.parametrize("rest", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_a_temperature_near_0_is_greedy(temperature, rest):
    logits = jnp.tile(jnp.array([200.0, -300.0, 201.0, 7.0]), (50, 1))
    drawn = sample(logits, Sampling(temperature, **rest), jax.random.split(jax.random.key(0), 50))
    assert set(drawn.tolist()) == {2}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_sampling_refuses_values_out_of_range(fields, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**fields)


# Arguments.


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1: is empty"),
        ([[1], [2, 97]], {}, "prompt 1: token 97 is not one of the model's 97"),
        ([[-1]], {}, "prompt 0: token -1"),
        ([[1], [1] * 30], {"cache_len": 32}, "prompt 1: 30 tokens are more than the 26"),
        ([[1] * 255], {}, "exceed the model's 256 positions"),
        ([[1]], {"document": [1] * 250}, "exceed the model's 256 positions"),
        ([[1] * 255], {"cache_len": 512}, "exceed the model's 256 positions"),
        ([[1]], {"seed": 2**31}, "seed 2147483648 is not an integer of 32 bits"),
        ([[1]], {"document": [98]}, "document: token 98"),
        ([[1]], {"new": 0}, "max_new_tokens 0"),
        ([[1]], {"chunk": 0}, "chunk 0"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run(model("glm", "FSSSS"), prompts, **options)


def test_nothing_to_do():
    assert run(model("glm", "FSSSS"), []) == []


def test_every_prompt_has_an_id():
    with pytest.raises(ValueError, match="1 ids for 2 prompts"):
        run(model("glm", "FSSSS"), [[1], [2]], ids=[7])


def test_prefill_names_the_row_that_does_not_fit():
    case = model("glm", "FSSSS")
    weights = serving.weights_of(case.params, case.config, case.schedule)
    cache = serving.init_cache(case.config, case.schedule, 2, 16, jnp.float32)
    with pytest.raises(ValueError, match="prompt 1: 17 tokens after 0 exceed the cache of 16"):
        prefill(weights, [np.ones(3, int), np.ones(17, int)], cache, case.config)
    with pytest.raises(ValueError, match="init_cache: batch 0"):
        serving.init_cache(case.config, case.schedule, 0, 16)


def test_few_widths_and_key_counts_so_that_few_programs_are_compiled():
    assert [chunk_width(left, 100) for left in (1, 16, 17, 63, 64, 65, 1000)] == [16, 16, 32, 64, 64, 100, 100]
    assert [visible_keys(n, 3000) for n in (1, 512, 513, 2048, 2049, 3000)] == [512, 512, 1024, 2048, 3000, 3000]


# What the programs hold.


def structs(config, schedule, batch, max_len, **options):
    weights = jax.eval_shape(lambda key: serving.random_weights(key, config), jax.random.key(0))
    weights = jax.eval_shape(lambda w: serving.restrict(w, config, schedule), weights)
    return weights, jax.eval_shape(lambda: serving.init_cache(config, schedule, batch, max_len, **options))


def test_a_quarter_schedule_holds_no_indexer_and_no_key_cache_for_s_layers():
    """The compiled step reads exactly the indexers and key caches of its F layers, in shapes that only they have."""
    config = Config.from_hf(GLM_FIELDS | {"num_hidden_layers": 8, "index_n_heads": 2, "index_head_dim": 40})
    schedule = Schedule("FSSSFSSS")
    weights, cache = structs(config, schedule, 2, 640)
    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = decode.lower(weights, token, cache, config, steps=2).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    parameters = re.findall(r"= (\S+?)\{[^}]*\} parameter\(", entry)
    rows, heads = config.q_lora_rank + config.latent_dim, config.num_heads * config.qk_head_dim
    index = config.index_n_heads * config.index_head_dim
    count = lambda *shape: sum(p.endswith(f"[{','.join(map(str, shape))}]") for p in parameters)  # noqa: E731
    assert count(2, 640, config.latent_dim) == 8
    assert count(2, 640, config.index_head_dim) == 2
    assert count(rows + config.index_head_dim + config.index_n_heads, config.hidden_size) == 2
    assert count(rows, config.hidden_size) == 6
    assert count(heads + index, config.q_lora_rank) == 2
    assert count(heads, config.q_lora_rank) == 6


def test_restricted_weights_are_the_model_under_the_other_schedule():
    case = model("glm", "FFFFF")
    less = Schedule("FSSFS")
    whole = serving.weights_of(case.params, case.config, case.schedule)
    prompts = prompts_of(case)
    restricted = serving.restrict(whole, case.config, less)
    shared = Case(MODELS["glm"], less.pattern, 7, LENGTHS)
    assert generate(restricted, prompts, case.config, less, NEW, chunk=CHUNK) == run(shared) != run(case)
    assert serving.restrict(restricted, case.config, less).layers[1] is restricted.layers[1]
    with pytest.raises(ValueError, match="layer 1 is F, but these weights have no indexer"):
        serving.restrict(restricted, case.config, Schedule("FFFFF"))
    with pytest.raises(ValueError, match="4 entries for 5 layers"):
        serving.restrict(whole, case.config, Schedule("FFFF"))


@pytest.mark.parametrize(("of", "asked"), [("FFFFF", "FSFSF"), ("FSFSF", "FFFFF"), ("FSFSF", "FFSSF")])
def test_weights_of_another_schedule_are_refused(of, asked):
    case, schedule = model("glm", of), Schedule(asked)
    held, needed = (re.escape(str(list(s.full_layers))) for s in (case.schedule, schedule))
    message = f"{asked}: F are the layers {needed}, but these params hold the indexers of {held}"
    with pytest.raises(ValueError, match=message):
        generate(case.params, prompts_of(case), case.config, schedule, 1)
    with pytest.raises(ValueError, match=message):
        forward(case.params, case.tokens, case.config, schedule)
    weights = serving.weights_of(case.params, case.config, case.schedule)
    with pytest.raises(ValueError, match=f"{asked}: these weights are those of {of}"):
        generate(weights, prompts_of(case), case.config, schedule, 1)


def test_random_weights_have_the_shapes_of_the_model():
    case = CASES["glm-mixed"]
    made = serving.random_weights(jax.random.key(0), case.config, jnp.float32)
    full = dataclasses.replace(case, pattern="FFFFF")
    expected = serving.weights_of(full.params, full.config, full.schedule)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(made) == shapes(expected)
    first, second = made.layers[-2:]
    assert not np.array_equal(first.out, second.out)


# The cache in 8 bits.


def test_cache_sizes_of_the_30b_shape():
    fields = preset("30b")
    config, fp8 = Config.from_hf(fields), jnp.float8_e4m3fn
    full = Schedule("F" * 47)
    quarter = Schedule("FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS")
    for schedule, kinds in [(full, ()), (quarter, ()), (quarter, (fp8, fp8)), (full, (jnp.bfloat16, fp8))]:
        latent, index = kinds or (jnp.bfloat16, jnp.bfloat16)
        _, cache = structs(config, schedule, 2, 1000, latent_dtype=latent, index_dtype=index)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
        assert held == 2000 * serving.bytes_per_token(config, schedule, latent, index)
    assert serving.bytes_per_token(config, full, jnp.bfloat16, jnp.bfloat16) == 47 * (1152 + 256)
    assert serving.bytes_per_token(config, quarter, fp8, fp8) == 47 * 580 + 12 * 132


@pytest.mark.parametrize(
    ("options", "most", "least_shared"),
    [
        ({"index_dtype": jnp.float8_e4m3fn}, None, 0.85),
        ({"latent_dtype": jnp.float8_e4m3fn}, 0.2, None),
    ],
    ids=["index", "latent"],
)
def test_what_8_bits_change(options, most, least_shared):
    """On a tiny random model: keys in 8 bits keep most of every selection of 8, latents in 8 bits most of the logits.

    One layer selects, before anything rounded could reach it, so that the logits tell of the latents alone.
    """
    case = model("glm", "FSSSS")
    weights = serving.weights_of(case.params, case.config, case.schedule)

    def through(**options):
        """The first layer's selection and the logits after the prompt."""
        cache = serving.init_cache(case.config, case.schedule, 3, 64, jnp.float32, **options)
        x, positions = serving.embed(weights.embedding, case.tokens, cache.lengths, jnp.array(LENGTHS), case.config)
        _, indices, _ = serving.layer(weights.layers[0], x, None, cache.layers[0], positions, 64, case.config)
        x, cache = prefill_chunk(weights, case.tokens, jnp.array(LENGTHS), cache, case.config)
        return np.asarray(indices), np.asarray(serving.logits(weights, x, case.config))[case.is_valid], cache

    exact_indices, exact, _ = through()
    indices, logits, cache = through(**options)
    long = np.asarray(case.is_valid) & (np.arange(60) >= case.config.index_topk)
    shared = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(indices[long], exact_indices[long], strict=True)])
    if least_shared is not None:
        assert cache.layers[0].index_keys.dtype == jnp.float8_e4m3fn and cache.layers[0].latents.dtype == jnp.float32
        assert least_shared < shared < 1
    if most is not None:
        assert cache.layers[0].latents.dtype == jnp.float8_e4m3fn and cache.layers[0].index_keys.dtype == jnp.float32
        assert shared == 1
        assert 0 < np.std(logits - exact) / np.std(exact) < most
