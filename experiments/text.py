"""Text in, tokens out: files, a checkpoint's own tokenizer or raw bytes, and a split by file name."""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import sysconfig
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

HELD_OUT_SHARE = 10  # every tenth file by the hash of its name, so that a file keeps its side in every Python version


@dataclasses.dataclass(frozen=True)
class Document:
    """`name` is relative to the folder it was found under: it alone decides which side of the split it is on."""

    name: str
    path: pathlib.Path

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.name.encode()) % HELD_OUT_SHARE == 0


class Bytes:
    """One token a byte: what a checkpoint without a tokenizer reads."""

    name = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


class FromFile:
    """A checkpoint's tokenizer.json."""

    def __init__(self, path: pathlib.Path) -> None:
        self.name = path.name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever it finds wrong
            raise ValueError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from None

    def encode(self, text: bytes) -> np.ndarray:
        encoding = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(list(tokens))


def tokenizer(directory: str | pathlib.Path) -> Bytes | FromFile:
    """The tokenizer of a checkpoint directory: its tokenizer.json, or bytes."""
    path = pathlib.Path(directory) / "tokenizer.json"
    return FromFile(path) if path.is_file() else Bytes()


def standard_library() -> list[Document]:
    """The Python sources of the running interpreter's standard library."""
    return under(pathlib.Path(sysconfig.get_path("stdlib")), "**/*.py")


def under(root: pathlib.Path, pattern: str) -> list[Document]:
    files = (p for p in root.glob(pattern) if p.is_file() and not {"site-packages", "dist-packages"} & set(p.parts))
    return [Document(p.relative_to(root).as_posix(), p) for p in sorted(files)]


def documents(pattern: str) -> list[Document]:
    """The files of a glob such as 'docs/*.txt', or all .py files of a folder; none found is a ValueError."""
    if not pattern:
        return standard_library()
    path = pathlib.Path(pattern)
    if path.is_dir():
        found = under(path, "**/*.py")
    else:
        found = [Document(p, pathlib.Path(p)) for p in sorted(glob.glob(pattern, recursive=True)) if pathlib.Path(p).is_file()]
    if not found:
        raise ValueError(f"{pattern!r}: no such file, and nothing matches it")
    return found


def stream(found: Sequence[Document], encoder: Bytes | FromFile, separator: int | None, limit: int | None = None) -> np.ndarray:
    """The documents' tokens one after the other, each followed by `separator`, int32; stops past `limit` tokens."""
    parts, total = [], 0
    for document in found:
        tokens = encoder.encode(document.path.read_bytes())
        parts.append(tokens)
        if separator is not None:
            parts.append(np.array([separator], np.int32))
        total += tokens.size + (separator is not None)
        if limit is not None and total >= limit:
            break
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def sequences(tokens: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """`count` distinct cuts [count, length + 1] at multiples of `length`, drawn by `seed`; ValueError if there are fewer."""
    available = (tokens.size - 1) // length
    if available < count:
        raise ValueError(f"{tokens.size} tokens hold {available} sequences of {length}, but {count} are asked for")
    starts = np.random.default_rng(seed).permutation(available)[:count] * length
    return np.stack([tokens[start : start + length + 1] for start in starts])
