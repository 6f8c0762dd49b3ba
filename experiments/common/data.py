"""Training data: documents packed into one stream of tokens, and rows of it in a seeded order that any run can rejoin."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from experiments.common.text import Bytes, Document, FromFile

T = TypeVar("T")
PORTION_BYTES = 8 * 2**20  # of text encoded together


def pack(
    documents: Sequence[Document],
    encoder: Bytes | FromFile,
    separator: int | None,
    path: pathlib.Path,
    seed: int,
    limit: int | None = None,
) -> np.ndarray:
    """The documents' tokens in an order drawn by `seed`, each followed by `separator`, int32, mapped from `path`.

    limit: stop once there are so many tokens. The file is written some documents at a time, so a corpus larger than memory
    will do, and kept: a later call with the same encoder and documents (names and contents) maps it again. ValueError
    for documents without a token.
    """
    about = {
        "encoder": encoder.identity,
        "separator": separator,
        "seed": seed,
        "documents": _checksum(documents),
        "limit": limit,
    }
    described = path.with_suffix(".json")
    if not (path.exists() and described.exists() and json.loads(described.read_text(encoding="utf-8")) == about):
        described.unlink(missing_ok=True)
        beside = path.with_name(path.name + ".partial")
        end = np.zeros(0, "<i4") if separator is None else np.array([separator], "<i4")
        order = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
        most = float("inf") if limit is None else 4 * limit
        with open(beside, "wb") as file:
            for some in _portions(order):
                for tokens in encoder.encode_many(some):
                    if file.tell() < most:
                        file.write(tokens.astype("<i4").tobytes() + end.tobytes())
                if file.tell() >= most:
                    break
        if not beside.stat().st_size:
            raise ValueError(f"{len(documents)} document(s): hold no token")
        os.replace(beside, path)
        beside.write_text(json.dumps(about), encoding="utf-8")
        os.replace(beside, described)
    return np.memmap(path, "<i4", mode="r")


def _portions(documents: Sequence[Document]) -> Iterator[list[bytes]]:
    """The documents' contents, PORTION_BYTES or a little more at a time."""
    some, size = [], 0
    for document in documents:
        some.append(document.path.read_bytes())
        size += len(some[-1])
        if size >= PORTION_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _checksum(documents: Sequence[Document]) -> str:
    """Of names and contents, which are read in pieces: a document edited at equal length is another one."""
    found = hashlib.blake2b(digest_size=16)
    for document in documents:
        with open(document.path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        found.update(f"{document.name} {content}\n".encode())
    return found.hexdigest()


@functools.lru_cache(maxsize=4)  # drawing an order takes longer than making a batch
def _epoch(seed: tuple[int, ...], rows: int, length: int) -> tuple[int, np.ndarray]:
    """The offset and the order of an epoch's rows."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(length)), rng.permutation(rows)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Cuts of `length` + 1 tokens (inputs and their successors), numbered without end.

    Every epoch goes once through the stream in a new order, from a new offset. Row i is a function of the seed and i
    alone: a run that is resumed at row i sees what it would have seen. ValueError where the stream is shorter than a row.
    """

    tokens: np.ndarray
    length: int
    seed: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.per_epoch < 1:
            raise ValueError(
                f"{self.tokens.size} tokens of data: at least {2 * self.length + 1} are needed for rows of {self.length}"
            )

    @property
    def per_epoch(self) -> int:
        return (self.tokens.size - 1) // self.length - 1  # one less, to have room for the offset

    def __getitem__(self, i: int) -> np.ndarray:
        epoch, at = divmod(i, self.per_epoch)
        offset, order = _epoch((*self.seed, epoch), self.per_epoch, self.length)
        start = offset + int(order[at]) * self.length
        return np.asarray(self.tokens[start : start + self.length + 1], np.int32)

    def batch(self, start: int, count: int) -> np.ndarray:
        """Rows start .. start + count - 1: [count, length + 1]."""
        return np.stack([self[i] for i in range(start, start + count)])


def prefetch(make: Callable[[int], T], numbers: range, ahead: int = 2) -> Iterator[T]:
    """make(i) for each number in turn, made in a thread up to `ahead` items before they are asked for.

    An error of `make` is raised where its item would have come. Closing the iterator ends the thread.
    """
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
    closed = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        for i in numbers:
            try:
                item: tuple[T | None, BaseException | None] = (make(i), None)
            except BaseException as error:
                item = (None, error)
            if not put(item) or item[1] is not None:
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in numbers:
            value, error = made.get()
            if error is not None:
                raise error
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
