"""Strings that end a completion where its text first holds one of them; the text ends before it."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """A tokenizer, of which the text of tokens leaves out those that are no text."""

    def encode(self, text: bytes, begins: bool = True, ends: bool = True) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where in a text the first of the strings begins; None where it holds none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def tokens_to_stop(tokens: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> int | None:
    """After how many of the tokens their text holds one of the strings; None where it holds none.

    The text of more tokens is taken to begin with that of fewer, so that half of them can be left out at a time.
    """

    def stopped(count: int) -> bool:
        return first_stop(decode(tokens[:count]), stops) is not None

    if not stops or not stopped(len(tokens)):
        return None
    return bisect.bisect_left(range(1, len(tokens)), True, key=stopped) + 1


def stop_tokens(stops: Sequence[str], encoder: Encoder) -> frozenset[int]:
    """The tokens that are one of the strings and no text, such as the one that begins a user's turn."""
    encoded = [encoder.encode(stop.encode("utf-8", errors="replace"), begins=False, ends=False).tolist() for stop in stops]
    return frozenset(tokens[0] for tokens in encoded if len(tokens) == 1 and not encoder.decode(tokens))
