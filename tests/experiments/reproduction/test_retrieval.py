"""Retrieval tasks: what prompts hide and ask, what is woven into a training text, and how answers are counted."""

import random

import numpy as np
import pytest

from experiments.common import text
from experiments.reproduction import retrieval


def decoded(tokens):
    return bytes(tokens.tolist()).decode()


@pytest.mark.parametrize("task", retrieval.TASKS)
def test_a_prompt_hides_what_it_asks_for(task):
    haystack = np.full(400, ord("."), np.int32)
    prompts = [retrieval.prompt([task], haystack, text.Bytes(), 300, random.Random(seed)) for seed in range(5)]
    for found in prompts:
        whole = decoded(found.tokens)
        assert found.tokens.shape == found.answers.shape == (301,) and found.tasks == (task,)
        end = whole.rindex("." * 4)
        answers = decoded(found.tokens[found.answers == 1])
        words = [answers[i : i + 6] for i in range(0, len(answers), 6)]
        assert len(words) == (3 if task == "several values" else 1) and not found.answers[:end].any()
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
        retrieval.prompt(["several keys"], np.zeros(100, np.int32), text.Bytes(), 40, random.Random(0))


def test_prompts_are_seeded():
    cuts = np.full((2, 301), ord("."), np.int32)
    first, again, other = (retrieval.prompts(cuts, text.Bytes(), 300, 2, seed) for seed in (0, 0, 1))
    assert [prompt.tasks for prompt in first] == [(task,) for task in retrieval.TASKS] * 2
    np.testing.assert_array_equal(first[5].tokens, again[5].tokens)
    assert not np.array_equal(first[5].tokens, other[5].tokens)


def test_tasks_asked_together_are_each_as_if_asked_alone():
    prompts = retrieval.prompts(np.full((3, 901), ord("."), np.int32), text.Bytes(), 900, 6, 0, together=8)
    assert [prompt.tasks for prompt in prompts] == [(*retrieval.TASKS,) * 2] * 3
    for prompt in prompts:
        assert prompt.tail == np.count_nonzero(np.cumsum(prompt.answers))
        whole = decoded(prompt.tokens)
        for number, task in enumerate(prompt.tasks, start=1):
            answer = decoded(prompt.tokens[prompt.answers == number])
            words = [answer[i : i + 6] for i in range(0, len(answer), 6)]
            assert len(words) == (3 if task == "several values" else 1)
            assert all(whole.count(word) == 2 for word in words)  # hidden once, asked once
        hits = np.ones(prompt.tail + 5, bool)
        assert prompt.solved(hits) == [True] * 8
        hits[np.flatnonzero(prompt.answers[-hits.size :] == 3)[0]] = False
        assert prompt.solved(hits) == [number != 2 for number in range(8)]


def test_outcomes_are_gathered_by_task():
    asked = [retrieval.Prompt(np.zeros(3), np.zeros(3), tasks) for tasks in (("one key", "two hops", "one key"), ("two hops",))]
    found = retrieval.by_task(asked, [[True, False, False], [True]])
    assert found == {"one key": [[1, 0], []], "several keys": [[], []], "several values": [[], []], "two hops": [[0], [1]]}


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
