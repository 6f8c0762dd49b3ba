"""Generation equals repeated full forwards: ragged, chunked, forked, under every kind of schedule, and in any batch."""

import dataclasses
import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import forward, serving
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import Sampling, generate, generation, prefill_document, prefill_prompts
from indexcache_jax.serving.generation import decode_program, padded_chunk, padded_kv_length
from tests.support.serving_cases import CHUNK, MODELS, NEW, greedy_by_forwards, model, prompts_of, run

DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.9)


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
    weights = serving.from_params(case.params, case.config, case.schedule)
    cache = prefill_document(weights, document, case.config, case.schedule, chunk=CHUNK)
    told = []
    again = functools.partial(run, case, document=cache, progress=lambda phase, tokens: told.append((phase, tokens)))
    assert again(questions[:1]) + again(questions[1:], cache_len=49) == expected  # less room than the document's own cache
    assert sum(tokens for phase, tokens in told if phase == "prefill") == sum(map(len, questions))
    with pytest.raises(ValueError, match="cache_format: .*float8_e4m3fn.*document's cache has .*float32"):
        again(questions, cache_format="float8_e4m3fn")


def test_a_program_reads_what_is_cached_and_what_it_appends(monkeypatch):
    """More than these positions is read only because few different numbers are compiled, 512 at least."""
    case, needed = model("glm", "FSFSF"), []

    def padded(filled, max_len):
        needed.append(filled)
        return max_len

    monkeypatch.setattr(generation, "padded_kv_length", padded)
    document = prompts_of(case)[0]
    run(case, [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3]], document=document)
    assert len(document) == 37 and NEW == 6
    assert needed == [16, 32, 37, 37 + 6, 37 + 6 + 8]  # chunks of the document, the longest prompt, eight steps


def test_logits_that_are_not_finite_are_reported_not_drawn_from():
    """At the prompt's last token, and at one that is drawn: the row that meets it is named."""
    case = model("glm", "FSFSF")
    prompts = [[1], [2, 3], [4, 5, 6]]
    drawn = run(case, prompts)

    def with_params(**broken):
        def broken_run(**options):
            params = case.params.replace(**broken)
            return generate(params, prompts, case.config, case.schedule, NEW, chunk=CHUNK, **options)

        return broken_run

    with pytest.raises(ValueError, match=r"request 0: the model's logits are not finite: the weights hold NaN"):
        with_params(final_norm=case.params.final_norm.at[3].set(jnp.nan))()
    token = next(tokens[0] for tokens in drawn if tokens[0] > 6)
    row = next(row for row, tokens in enumerate(drawn) if token in tokens[:-1])
    at_a_drawn_one = with_params(embedding=case.params.embedding.at[token].set(jnp.inf))
    with pytest.raises(ValueError, match=rf"request {4 + row}: the model's logits are not finite"):
        at_a_drawn_one(ids=[4, 5, 6])
    ended = [next((tokens[: i + 1] for i, t in enumerate(tokens) if t == token), tokens) for tokens in drawn]
    assert at_a_drawn_one(stop_tokens=[token]) == ended


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


def test_what_a_request_draws_does_not_depend_on_its_batch():
    case = model("glm", "FSFSF")
    prompts = prompts_of(case)
    together = run(case, sampling=DRAWN, seed=3)
    assert together == run(case, sampling=DRAWN, seed=3)
    for i, prompt in enumerate(prompts):
        assert run(case, [prompt], sampling=DRAWN, seed=3, ids=[i]) == [together[i]]
    programs = decode_program(None)._cache_size()
    assert run(case, sampling=DRAWN, seed=4) != together
    assert run(case, sampling=dataclasses.replace(DRAWN, temperature=3.0), seed=3) != together
    assert decode_program(None)._cache_size() == programs  # which read seed and temperature
    same = run(case, [prompts[0]] * 3, sampling=DRAWN, seed=3)
    assert len(set(map(tuple, same))) == 3  # three requests with one prompt draw by three keys


def test_a_row_with_settings_of_its_own_draws_the_same_whatever_the_others_ask_for():
    case = model("glm", "FSFSF")
    prompts = prompts_of(case)
    own = {"sampling": [DRAWN, Sampling(), Sampling(0.6)], "seed": [3, 3, -7], "ids": [0, 1, 5], "new": [6, 2, 4]}
    rows = run(case, prompts, **own)
    assert [len(row) for row in rows] == [6, 2, 4]
    turned = run(case, prompts[::-1], **{name: values[::-1] for name, values in own.items()})
    assert turned == rows[::-1]
    others = {"sampling": [DRAWN, DRAWN, Sampling(2.0)], "seed": [3, 4, 5], "ids": [0, 7, 8], "new": [6, 6, 1]}
    assert run(case, prompts, **others)[0] == rows[0]
    assert run(case, prompts, **own | {"seed": [4, 3, -7]})[0] != rows[0]
    assert run(case, prompts)[1][:2] == rows[1]  # greedy as where all are


def test_a_row_ends_where_its_tokens_say_so():
    case = model("glm", "FSFSF")
    free = run(case)

    def ending(row, tokens):
        assert tokens == free[row][: len(tokens)]
        return 3 if row == 1 and len(tokens) >= 3 else None

    assert run(case, ending=ending) == [free[0], free[1][:3], free[2]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1: is empty"),
        ([[1], [2, 97]], {}, "prompt 1: token 97 is not one of the model's 97 tokens"),
        ([[-1]], {}, "prompt 0: token -1 is not one of"),
        ([[1], [1] * 30], {"cache_len": 32}, "prompt 1: 30 tokens are more than the 26"),
        ([[1] * 255], {}, "exceed the model's 256 positions"),
        ([[1]], {"document": [1] * 250}, "exceed the model's 256 positions"),
        ([[1] * 255], {"cache_len": 512}, "exceed the model's 256 positions"),
        ([[1]], {"seed": 2**31}, "seed: 2147483648 is above 2147483647"),
        ([[1], [2]], {"seed": [1, 2**31]}, "seed: 2147483648 is above 2147483647"),
        ([[1]], {"document": [98]}, "document: token 98 is not"),
        ([[1]], {"new": 0}, "max_new_tokens: 0 is not"),
        ([[1], [2]], {"new": [3, 0]}, "max_new_tokens: 0 is not"),
        ([[1], [2]], {"new": [3]}, "max_new_tokens: 1 of them for 2 prompts"),
        ([[1]], {"sampling": [DRAWN, DRAWN]}, "sampling: 2 of them for 1 prompts"),
        ([[1], [2]], {"sampling": [DRAWN, 0.7]}, "sampling: 0.7 is not a Sampling"),
        ([[1] * 200, [1]], {"new": [1, 100]}, "a prompt of 200 and 100 new ones exceed the model's 256 positions"),
        ([[1]], {"chunk": 0}, "chunk: 0 is not"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run(model("glm", "FSSSS"), prompts, **options)


def test_nothing_to_do():
    assert run(model("glm", "FSSSS"), []) == []


def test_every_prompt_has_an_id():
    with pytest.raises(ValueError, match="ids: 1 ids for 2 prompts"):
        run(model("glm", "FSSSS"), [[1], [2]], ids=[7])


def test_prefill_names_the_row_that_does_not_fit():
    case = model("glm", "FSSSS")
    weights = serving.from_params(case.params, case.config, case.schedule)
    cache = serving.init_cache(case.config, case.schedule, 2, 16, jnp.float32)
    with pytest.raises(ValueError, match="prompt 1: 17 tokens after 0 exceed the cache of 16"):
        prefill_prompts(weights, [np.ones(3, int), np.ones(17, int)], cache, case.config)
    with pytest.raises(ValueError, match="batch: 0 is not"):
        serving.init_cache(case.config, case.schedule, 0, 16)


def test_few_widths_and_key_counts_so_that_few_programs_are_compiled():
    assert [padded_chunk(left, 100) for left in (1, 16, 17, 63, 64, 65, 1000)] == [16, 16, 32, 64, 64, 100, 100]
    assert [padded_kv_length(n, 3000) for n in (1, 512, 513, 2048, 2049, 3000)] == [512, 512, 1024, 2048, 3000, 3000]


@pytest.mark.parametrize(("of", "asked"), [("FFFFF", "FSFSF"), ("FSFSF", "FFFFF"), ("FSFSF", "FFSSF")])
def test_weights_of_another_schedule_are_refused(of, asked):
    case, schedule = model("glm", of), Schedule(asked)
    held, needed = (re.escape(str(list(s.full_layers))) for s in (case.schedule, schedule))
    message = f"{asked}: F are the layers {needed}, but these params hold the indexers of {held}"
    with pytest.raises(ValueError, match=message):
        generate(case.params, prompts_of(case), case.config, schedule, 1)
    with pytest.raises(ValueError, match=message):
        forward(case.params, case.tokens, case.config, schedule)
    weights = serving.from_params(case.params, case.config, case.schedule)
    with pytest.raises(ValueError, match=f"{asked}: these weights are those of {of}"):
        generate(weights, prompts_of(case), case.config, schedule, 1)
