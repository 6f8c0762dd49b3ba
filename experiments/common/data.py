"""Training data: documents packed into one stream of tokens, and rows of it in a seeded order that any run can rejoin."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

import numpy as np

from experiments.common import processes
from experiments.common.journal import replacing
from experiments.common.text import Bytes, Document, FromFile, ended

T = TypeVar("T")
PORTION_BYTES = 8 * 2**20  # of text that is encoded together


def pack(
    documents: Sequence[Document],
    encoder: Bytes | FromFile,
    separator: int | None,
    path: pathlib.Path,
    seed: int,
    limit: int | None = None,
) -> np.ndarray:
    """The tokens [N] int32 of the documents in an order drawn by `seed`, each document followed by `separator`.

    They are written to `path` some documents at a time and mapped from there, so a corpus may be larger than memory. The
    file is kept: a later call with the same encoder, documents (names and contents), seed and limit maps it again. Of
    several processes, process 0 writes it, and all map it.

    limit: stop once there are so many tokens. ValueError for documents without a token.
    """
    processes.from_main(lambda: _pack(documents, encoder, separator, path, seed, limit))
    return np.memmap(path, "<i4", mode="r")


def _pack(
    documents: Sequence[Document],
    encoder: Bytes | FromFile,
    separator: int | None,
    path: pathlib.Path,
    seed: int,
    limit: int | None,
) -> None:
    """Writes the file of `pack`, unless it is there."""
    about = {
        "encoder": encoder.identity,
        "separator": separator,
        "seed": seed,
        "documents": _checksum(documents),
        "limit": limit,
    }
    about_path, about_text = path.with_suffix(".json"), json.dumps(about).encode()
    if not (path.exists() and about_path.exists() and about_path.read_bytes() == about_text):
        about_path.unlink(missing_ok=True)
        order = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
        with replacing(path) as file:
            _write_tokens(file, order, encoder, separator, math.inf if limit is None else limit)
            if not file.tell():
                raise ValueError(f"{len(documents)} document(s): hold no token")
        with replacing(about_path) as file:
            file.write(about_text)


def _write_tokens(
    file: BinaryIO, documents: Sequence[Document], encoder: Bytes | FromFile, separator: int | None, limit: float
) -> None:
    for contents in _portions(documents):
        for tokens in encoder.encode_many(contents):
            if file.tell() < 4 * limit:
                file.write(ended(tokens, separator).astype("<i4").tobytes())
        if file.tell() >= 4 * limit:
            return


def _portions(documents: Sequence[Document]) -> Iterator[list[bytes]]:
    """The documents' contents in lists that hold PORTION_BYTES together, or one document more."""
    contents, size = [], 0
    for document in documents:
        contents.append(document.content())
        size += len(contents[-1])
        if size >= PORTION_BYTES:
            yield contents
            contents, size = [], 0
    if contents:
        yield contents


def _checksum(documents: Sequence[Document]) -> str:
    """A checksum of the documents' names and contents."""
    checksum = hashlib.blake2b(digest_size=16)
    for document in documents:
        content = _digest(document)
        checksum.update(f"{document.name} {content}\n".encode())
    return checksum.hexdigest()


def _digest(document: Document) -> str:
    if document.size is not None:
        return hashlib.blake2b(document.content()).hexdigest()
    with open(document.path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


@functools.lru_cache(maxsize=4)  # drawing an order takes longer than making a batch
def _epoch(seed: tuple[int, ...], rows: int, length: int) -> tuple[int, np.ndarray]:
    """An epoch's offset, from 0 to length - 1, and the order [rows] in which it goes through the rows."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(length)), rng.permutation(rows)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows [length + 1] of a stream of tokens [N]: inputs and their successors, numbered without end.

    Every epoch goes once through the stream in a new order, from a new offset. Row i is a function of the seed and i
    alone: a run that is resumed at row i sees what it would have seen. ValueError where the stream is too short for a row.
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
        """Rows of one epoch; one less than the stream holds, to have room for the offset."""
        return (self.tokens.size - 1) // self.length - 1

    def __getitem__(self, i: int) -> np.ndarray:
        epoch, position = divmod(i, self.per_epoch)
        offset, order = _epoch((*self.seed, epoch), self.per_epoch, self.length)
        start = offset + int(order[position]) * self.length
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
