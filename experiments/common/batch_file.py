"""The lines of a batch, however many: read through once to check them, then a window of them at a time.

What is kept of a file is a byte a line, where every window begins and, while it is read through, 16 bytes a custom_id.
"""

from __future__ import annotations

import array
import codecs
import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from checkpoints_convert.ending import writing
from experiments.common import text
from experiments.common.batch_requests import Reader, Request
from experiments.common.report import progress
from indexcache_jax.foreign import shown

MARK = b"\xef\xbb\xbf"  # of UTF-8, at the start of a file
SHOWN = 100  # errors that are kept to be shown
_STEP = 2**20  # bytes
_BAR_AFTER = 3.0  # seconds


@dataclasses.dataclass(frozen=True)
class Line:
    """A line that is not blank. content: without its line feed; None for one that is longer than what was asked for."""

    number: int  # from 1, blank lines included
    start: int  # its first byte in the file
    content: bytes | None


def read_lines(file: BinaryIO, longest: int, start: int = 0, number: int = 1) -> Iterator[Line]:
    """The lines from byte `start` on, where line `number` begins, each held alone and of at most `longest` bytes.

    Only a line feed ends a line: strings may hold what else Unicode breaks at.
    """
    file.seek(start)
    while content := file.readline(longest + 1):
        size, whole = len(content), len(content) <= longest or content.endswith(b"\n")
        if not whole:
            while rest := file.readline(_STEP):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
        if start == 0:
            content = content.removeprefix(MARK)
        if not whole or content.strip():
            yield Line(number, start, content.removesuffix(b"\n") if whole else None)
        start, number = start + size, number + 1


@dataclasses.dataclass
class Scan:
    """What is known of all requests of a file. bad: for each of them, in order, whether it cannot be done."""

    bad: bytearray
    errors: dict[int, str]  # what is wrong with the first SHOWN of them, by line
    longest: int = 0  # tokens of a prompt
    most_new: int = 0  # tokens of a completion, at most
    checksum: int = 0  # of the lines, and of the tokens that a tokenizer or a template made of them

    @property
    def requests(self) -> int:
        return len(self.bad)

    @property
    def failed(self) -> int:
        return sum(self.bad)


def check_jsonl(file: BinaryIO, name: str) -> None:
    """ValueError, with `name`, for a file that begins as one of another format does: every line of it would be an error."""
    file.seek(0)
    start = file.read(64)
    text.check_format(start, name)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{name}: is UTF-16; convert it, as by iconv -f utf-16 -t utf-8")
    if re.match(rb"\s*\[\s*(\{|$)", start.removeprefix(MARK)):  # any other array may be one bad line
        raise ValueError(f"{name}: begins a JSON array; what is read has an object in every line (JSONL)")


class RequestFile:
    """The requests of an open file, in its order, `window` at a time.

    `scan` tells what is in it. ValueError, with `name`, for a file of another format or without lines, for one that changes
    while it is read, and for one in which two requests of OpenAI's format have the same custom_id, by which their answers are
    told apart.
    """

    def __init__(self, file: BinaryIO, name: str, reader: Reader, window: int) -> None:
        self.name = name
        self._file, self._reader, self._window = file, reader, window
        check_jsonl(file, name)
        self._state = self._now()
        self._starts, self._numbers = array.array("q"), array.array("q")  # of the first line of every window
        self.scan = self._read_through()
        if not self.scan.requests:
            raise ValueError(f"{name}: holds no lines")

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _read_through(self) -> Scan:
        scan, names, lines = Scan(bytearray(), {}), array.array("Q"), array.array("q")
        options = {"total": self._state[0], "unit": "B", "unit_scale": True, "desc": "reading", "delay": _BAR_AFTER}
        with progress(**options) as bar:
            for line in self._lines():
                if scan.requests % self._window == 0:
                    self._starts.append(line.start)
                    self._numbers.append(line.number)
                request = self._reader.request(line.number, line.content)
                if request.call is not None and request.call.custom_id is not None:
                    names.append(_digest(request.call.custom_id))
                    lines.append(line.number)
                scan.bad.append(bool(request.error))
                scan.checksum = zlib.crc32(request.tokens.tobytes(), zlib.crc32(line.content or b"", scan.checksum))
                if request.error:
                    if len(scan.errors) < SHOWN:
                        scan.errors[line.number] = request.error
                else:
                    scan.longest = max(scan.longest, len(request.tokens))
                    scan.most_new = max(scan.most_new, request.drawing.max_new_tokens)
                bar.update(line.start - bar.n)
        self._check_unique(np.array(names, np.uint64), np.array(lines, np.int64))
        return scan

    def _check_unique(self, names: np.ndarray, lines: np.ndarray) -> None:
        """ValueError for the first custom_id that an earlier line has, by the digests of all and their lines."""
        order = np.argsort(names, kind="stable")
        again = order[1:][names[order[1:]] == names[order[:-1]]]
        if again.size:
            second = int(np.min(again))
            first = int(np.flatnonzero(names == names[second])[0])
            contents = (line.content for line in self._lines() if line.number == lines[second])
            request = self._reader.request(0, next(contents))
            assert request.call is not None
            what = f"custom_id: {shown(request.call.custom_id)} is that of line {lines[first]} too"
            raise ValueError(f"{self.name}: line {lines[second]}: {what}")

    def _lines(self, start: int = 0, number: int = 1) -> Iterator[Line]:
        return read_lines(self._file, self._reader.longest_line, start, number)

    def numbers(self) -> Iterator[tuple[int, bool]]:
        """The line of every request, and whether it cannot be done."""
        self._check_unchanged()
        return ((line.number, bool(bad)) for line, bad in zip(self._lines(), self.scan.bad, strict=True))

    def windows(self, first: int) -> Iterator[list[Request]]:
        """The requests from window `first` on, a window at a time."""
        for start, number in zip(self._starts[first:], self._numbers[first:], strict=True):
            found = [
                self._reader.request(line.number, line.content)
                for line in itertools.islice(self._lines(start, number), self._window)
            ]
            self._check_unchanged()
            yield found

    def _check_unchanged(self) -> None:
        if self._now() != self._state:
            raise ValueError(f"{self.name}: was changed while it was read")


def _digest(name: str) -> int:
    """64 bits that tell names apart."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", errors="surrogatepass"), digest_size=8).digest(), "little")


@contextlib.contextmanager
def standard_input(directory: pathlib.Path) -> Iterator[BinaryIO]:
    """What standard input holds up to its end, in a file of the folder, without a name, for as long as the block lasts."""
    with tempfile.TemporaryFile(dir=directory) as kept:
        with writing(directory / "standard-input"):
            shutil.copyfileobj(sys.stdin.buffer, kept, _STEP)
            kept.flush()
        yield kept
