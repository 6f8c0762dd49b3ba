"""Retrieval tasks: what prompts hide and ask, what is woven into a training text, and how answers are counted."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import text
from experiments.reproduction import retrieval
from indexcache_jax import forward
from indexcache_jax.params import with_schedule
from indexcache_jax.schedule import Schedule
from tests.support.tiny_models import GLM_FIELDS, Case

pytestmark = pytest.mark.usefixtures("quick_to_compile")

FIELDS = GLM_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 2, "vocab_size": 258, "eos_token_id": 256}
BASE = Case(FIELDS, "FFF", 0)


def decoded(tokens):
    return bytes(tokens.tolist()).decode()


@pytest.mark.parametrize("task", retrieval.TASKS)
def test_a_prompt_hides_what_it_asks_for(task):
    haystack = np.full(400, ord("."), np.int32)
    prompts = [retrieval.prompt(task, haystack, text.Bytes(), 300, random.Random(seed)) for seed in range(5)]
    for found in prompts:
        whole = decoded(found.tokens)
        assert found.tokens.shape == found.answer.shape == (301,)
        end = whole.rindex("." * 4)
        answers = decoded(found.tokens[found.answer])
        words = [answers[i : i + 6] for i in range(0, len(answers), 6)]
        assert len(words) == (3 if task == "several values" else 1) and not found.answer[:end].any()
        for word in words:
            assert f" = '{word}'" in whole[:end] and word in whole[end:]
        if task == "two hops":
            second = whole[end:].split("assert ")[1].split()[0]
            lines = whole[:end].replace(".", "\n").splitlines()
            first = next(line for line in lines if line.startswith(second)).split(" = ")[1]
            assert f"{first} = '{words[0]}'" in whole[:end]
    assert len({p.tokens.tobytes() for p in prompts}) == 5


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match="--context=40"):
        retrieval.prompt("several keys", np.zeros(100, np.int32), text.Bytes(), 40, random.Random(0))


def test_prompts_are_seeded():
    cuts = np.full((2, 301), ord("."), np.int32)
    first, again, other = (retrieval.prompts(cuts, text.Bytes(), 300, 2, seed) for seed in (0, 0, 1))
    assert list(first) == list(retrieval.TASKS)
    np.testing.assert_array_equal(first["two hops"][1].tokens, again["two hops"][1].tokens)
    assert not np.array_equal(first["two hops"][1].tokens, other["two hops"][1].tokens)


def test_weaving_keeps_the_text_and_asks_for_what_it_hid():
    plain = np.full(120_000, ord("."), np.int32)
    woven = retrieval.weave(plain, text.Bytes(), 0.6, 3)
    assert woven.dtype == np.int32 and np.count_nonzero(woven == ord(".")) == plain.size
    np.testing.assert_array_equal(woven, retrieval.weave(plain, text.Bytes(), 0.6, 3))
    assert not np.array_equal(woven[:20_000], retrieval.weave(plain, text.Bytes(), 0.6, 4)[:20_000])
    lines = decoded(woven).replace(".", "\n").splitlines()
    asked = [line.split("assert ")[1].split(" == ") for line in lines if line.startswith("assert")]
    assert len(asked) > 20
    values = {}
    for line in lines:
        if " = " in line:
            name, value = line.split(" = ")
            values.setdefault(name, []).append(value)
    # Two hops: the second name stands for the first, which stands for what is asked. The rest: hidden once, asked once.
    for second, value in asked:
        chains = [v for first in values[second] for v in values.get(first, [])]
        assert value.strip("'") in {v.strip("'") for v in chains}
    named = [name for name, found in values.items() if "_" in name and len(found) % 2 == 0]
    assert len(named) > 20


def test_nothing_is_woven_into_nothing():
    plain = np.arange(500, dtype=np.int32) % 100
    np.testing.assert_array_equal(retrieval.weave(plain, text.Bytes(), 0.0, 0), plain)


@pytest.mark.parametrize("pattern", ["FFF", "FSF"])
def test_an_answer_counts_where_all_of_it_is_likeliest(pattern):
    schedule = Schedule(pattern)
    tokens = np.random.default_rng(0).integers(97, 123, 41).astype(np.int32)
    own = forward(with_schedule(BASE.params, BASE.schedule, schedule), tokens[None, :-1], BASE.config, schedule)
    likeliest = np.asarray(jnp.argmax(own, axis=-1))[0]
    # One prompt whose answer is what the model would say, and one that differs from it in one place.
    answer = np.zeros(41, bool)
    answer[-3] = True
    right = np.concatenate([tokens[:-3], [likeliest[-3]], tokens[-2:]]).astype(np.int32)
    wrong = right.copy()
    wrong[-3] = (right[-3] + 1) % 256
    asked = {
        "said": [retrieval.Prompt(right, answer)],
        "half": [retrieval.Prompt(right, answer), retrieval.Prompt(wrong, answer)],
    }
    assert retrieval.accuracy(BASE.params, BASE.config, BASE.schedule, schedule, asked) == {"said": 1.0, "half": 0.5}
