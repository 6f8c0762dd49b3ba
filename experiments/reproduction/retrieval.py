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
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.text import Bytes, FromFile
from indexcache_jax import model
from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import layerwise

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
    """A haystack with something to find: tokens [S+1], of which those marked in answer [S+1] must be predicted."""

    tokens: np.ndarray
    answer: np.ndarray


def prompt(task: str, haystack: np.ndarray, encoder: Bytes | FromFile, context: int, rng: random.Random) -> Prompt:
    """A prompt of context + 1 tokens: what is hidden stands at random places of the first nine tenths of the haystack.

    ValueError where the context has no room for what is asked.
    """
    found = TASKS[task](rng, functools.partial(new_word, rng))
    encode = functools.partial(_encode_one, encoder)
    asked, marks = [], []
    for question, answer in found.asked:
        q, a = _encoded(encode, question), encode(answer)
        asked += [q, a]
        marks += [np.zeros(q.size, bool), np.ones(a.size, bool)]
    end, needles = np.concatenate(asked), [_encoded(encode, parts) for parts in found.hidden]
    room = context + 1 - end.size - sum(needle.size for needle in needles)
    if room < len(needles):
        raise ValueError(f"--context={context}: no room for the retrieval task {task!r}")
    tokens = np.concatenate([*_scattered(haystack[:room], needles, max(1, room * 9 // 10), rng), end])
    return Prompt(tokens.astype(np.int32), np.concatenate([np.zeros(context + 1 - end.size, bool), *marks]))


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


def prompts(haystacks: np.ndarray, encoder: Bytes | FromFile, context: int, count: int, seed: int) -> dict[str, list[Prompt]]:
    """`count` prompts of every task in haystacks [N, S+1], taken in turn."""
    rng = random.Random(f"prompts {seed}")
    return {task: [prompt(task, haystacks[i % len(haystacks)], encoder, context, rng) for i in range(count)] for task in TASKS}


@jax.jit
def hits(params: Params, x: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """Where the likeliest token after x [1, W, D] is the target [1, W]."""
    return jnp.argmax(model.unembed(params, x, config), axis=-1) == targets


def accuracy(
    params: Params, config: Config, base: Schedule, schedule: Schedule, asked: Mapping[str, Sequence[Prompt]]
) -> dict[str, float]:
    """By task the share of prompts whose whole answer is the likeliest continuation, token by token."""
    full = jnp.array(schedule.is_full)
    found = {}
    for task, prompts_of in asked.items():
        right = []
        for one in prompts_of:
            tokens, answer = jnp.asarray(one.tokens[None]), one.answer[1:]
            tail = answer.size - int(np.argmax(answer))
            tail = min(answer.size, -(-tail // 64) * 64)  # few different widths to compile
            x = layerwise.hidden_states(params, tokens[:, :-1], full, config, base)[:, -tail:]
            right.append((hits(params, x, tokens[:, -tail:], config), answer[-tail:]))
        found[task] = float(np.mean([np.asarray(hit)[0][marks].all() for hit, marks in right]))
    return found
