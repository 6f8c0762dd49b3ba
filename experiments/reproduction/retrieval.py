"""Synthetic retrieval: something hidden in a long text and asked for at its end, to train on and to measure with.

What is hidden and asked is put together of parts, words and the glue between them, and encoded part by part. The bytes of
a word, and the tokens of one in a vocabulary made here (text.train_tokenizer), are the same wherever it stands, so that
a question's tokens occur in the haystack exactly as they are asked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import string
from collections.abc import Callable, Sequence

import numpy as np

from experiments.common.text import Bytes, FromFile

Parts = tuple[str, ...]
Word = Callable[[], str]  # makes or draws a random word

WORDS = 30_000  # that training draws from; prompts make their own
SHORTEST_SPAN, LONGEST_SPAN = 128, 8192
TOKENS_PER_TASK = 32  # of a span, at the densest


@dataclasses.dataclass(frozen=True)
class Task:
    """What to hide, in pieces, and what to ask: (question, answer) in turn."""

    hidden: tuple[Parts, ...]
    asked: tuple[tuple[Parts, str], ...]


def _assignment(name: Parts, value: str) -> Parts:
    return ("\n", *name, " = '", value, "'\n")


def one_key(rng: random.Random, word: Word) -> Task:
    key, value = word(), word()
    return Task((_assignment((key,), value),), ((("\n", key, " = '"), value),))


def several_keys(rng: random.Random, word: Word) -> Task:
    pairs = [(word(), word()) for _ in range(4)]
    key, value = rng.choice(pairs)
    return Task(tuple(_assignment((k,), v) for k, v in pairs), ((("\n", key, " = '"), value),))


def several_values(rng: random.Random, word: Word) -> Task:
    key, values = word(), [word() for _ in range(3)]
    names = [(key, "_", str(i)) for i in range(len(values))]
    return Task(
        tuple(_assignment(name, value) for name, value in zip(names, values, strict=True)),
        tuple((("\n", *name, " = '"), value) for name, value in zip(names, values, strict=True)),
    )


def two_hops(rng: random.Random, word: Word) -> Task:
    first, second, value = word(), word(), word()
    hidden = (_assignment((first,), value), ("\n", second, " = ", first, "\n"))
    return Task(hidden, ((("\n", "assert", " ", second, " == '"), value),))


TASKS: dict[str, Callable[[random.Random, Word], Task]] = {
    "one key": one_key,
    "several keys": several_keys,
    "several values": several_values,
    "two hops": two_hops,
}


def new_word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=6))


def _encoded(encode: Callable[[str], np.ndarray], parts: Sequence[str]) -> np.ndarray:
    return np.concatenate([encode(part) for part in parts])


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A haystack with something to find for each of some tasks, which are asked at its end.

    tokens [S+1]. answers [S+1] int32: n where a token must be predicted to solve the nth task, counted from 1; else 0.
    """

    tokens: np.ndarray
    answers: np.ndarray
    tasks: tuple[str, ...]

    @property
    def tail(self) -> int:
        """How many of the S targets there are from the first that must be predicted on."""
        return self.answers.size - int(np.argmax(self.answers > 0))

    def solved(self, hits: np.ndarray) -> list[bool]:
        """Whether each task's whole answer is the likeliest continuation, token by token; hits [W]: of the last W targets."""
        answers = self.answers[self.answers.size - hits.size :]
        return [bool(hits[answers == number].all()) for number in range(1, len(self.tasks) + 1)]


def prompt(tasks: Sequence[str], haystack: np.ndarray, encoder: Bytes | FromFile, context: int, rng: random.Random) -> Prompt:
    """A prompt of context + 1 tokens: what is hidden stands at random places of the first nine tenths of the haystack.

    The tasks are asked in their order. ValueError where the context has no room for what is asked.
    """
    encode = functools.partial(_encode_one, encoder)
    asked, marks, needles = [], [], []
    for number, task in enumerate(tasks, start=1):
        found = TASKS[task](rng, functools.partial(new_word, rng))
        needles += [_encoded(encode, parts) for parts in found.hidden]
        for question, answer in found.asked:
            q, a = _encoded(encode, question), encode(answer)
            asked += [q, a]
            marks += [np.zeros(q.size, np.int32), np.full(a.size, number, np.int32)]
    end = np.concatenate(asked)
    room = context + 1 - end.size - sum(needle.size for needle in needles)
    if room < len(needles):
        raise ValueError(f"--context={context}: no room for the retrieval tasks {', '.join(tasks)}")
    tokens = np.concatenate([*_scattered(haystack[:room], needles, max(1, room * 9 // 10), rng), end])
    answers = np.concatenate([np.zeros(context + 1 - end.size, np.int32), *marks])
    return Prompt(tokens.astype(np.int32), answers, tuple(tasks))


def _encode_one(encoder: Bytes | FromFile, part: str) -> np.ndarray:
    return encoder.encode(part.encode(), begins=False, ends=False)


def _scattered(haystack: np.ndarray, needles: Sequence[np.ndarray], before: int, rng: random.Random) -> list[np.ndarray]:
    """Pieces of the haystack with the needles, in random order, at random places before `before`."""
    parts, at = [], 0
    places = sorted(rng.randrange(before) for _ in needles)
    for place, i in zip(places, rng.sample(range(len(needles)), len(needles)), strict=True):
        parts += [haystack[at:place], needles[i]]
        at = place
    return [*parts, haystack[at:]]


def weave(tokens: np.ndarray, encoder: Bytes | FromFile, share: float, seed: int) -> np.ndarray:
    """The stream with tasks hidden and asked in about `share` of its text, int32.

    The text is cut into spans of 128 to 8192 tokens, as much of it into spans around 200 as into ones around 5000, so that
    short rows hold whole ones too. In the chosen ones, between one and very many tasks are hidden at random places and all
    asked at the end, in random order.
    """
    rng = random.Random(seed)
    pool = [new_word(rng) for _ in range(WORDS)]
    known = dict(zip(pool, encoder.encode_many([word.encode() for word in pool]), strict=True))

    def encode(part: str) -> np.ndarray:
        if part not in known:
            known[part] = _encode_one(encoder, part)
        return known[part]

    makers, word = list(TASKS.values()), functools.partial(rng.choice, pool)
    parts: list[np.ndarray] = []
    at = 0
    while at < tokens.size:
        length = round(1 / rng.uniform(1 / LONGEST_SPAN, 1 / SHORTEST_SPAN))
        span = tokens[at : at + length]
        at += length
        if rng.random() >= share or span.size < length:
            parts.append(span)
            continue
        count = round(math.exp(rng.uniform(0, math.log(length / TOKENS_PER_TASK))))
        tasks = [rng.choice(makers)(rng, word) for _ in range(count)]
        needles = [_encoded(encode, hidden) for task in tasks for hidden in task.hidden]
        asked = [(*question, answer) for task in tasks for question, answer in task.asked]
        rng.shuffle(asked)
        parts += [*_scattered(span, needles, length, rng), *(_encoded(encode, question) for question in asked)]
        parts.append(encode("'\n"))
    return np.concatenate(parts).astype(np.int32)


def prompts(
    haystacks: np.ndarray, encoder: Bytes | FromFile, context: int, count: int, seed: int, together: int = 1
) -> list[Prompt]:
    """Prompts in haystacks [N, S+1], taken in turn, that ask every task `count` times, `together` tasks in each."""
    rng = random.Random(f"prompts {seed}")
    tasks = [*TASKS] * count
    groups = [tasks[start : start + together] for start in range(0, len(tasks), together)]
    return [prompt(group, haystacks[i % len(haystacks)], encoder, context, rng) for i, group in enumerate(groups)]


def by_task(asked: Sequence[Prompt], solved: Sequence[Sequence[bool]]) -> dict[str, list[list[int]]]:
    """For every task and prompt, 1 for each time that it was solved there and 0 for each that it was not."""
    found: dict[str, list[list[int]]] = {task: [[] for _ in asked] for task in TASKS}
    for number, (one, outcomes) in enumerate(zip(asked, solved, strict=True)):
        for task, outcome in zip(one.tasks, outcomes, strict=True):
            found[task][number].append(int(outcome))
    return found
