"""Text in, tokens out: files, a checkpoint's own tokenizer or raw bytes, and a split by file name."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import glob
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from checkpoints_convert.companions import TOKENIZER
from checkpoints_convert.tokenizer_files import boundary, read_file, read_tokenizer
from experiments.common import processes
from indexcache_jax.foreign import parse_json

LARGEST_SOURCE = 200_000  # bytes
JSONL_SUFFIXES = (".jsonl", ".ndjson")
LONGEST_LINE = 16 * 2**20  # bytes, of a file that may be JSONL under another name
TEXT_SUFFIXES = (  # what a folder gives
    *(".txt", ".md", ".rst", ".tex", ".adoc", ".org", *JSONL_SUFFIXES),
    *(
        ".py",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".java",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".jl",
        ".scala",
        ".sql",
    ),
)
_PASSED_OVER = ("site-packages", "dist-packages", "__pycache__", "node_modules")
HELD_OUT_SHARE = 10  # every tenth file by the hash of its name, so that a file keeps its side in every Python version


_resolved = functools.lru_cache(maxsize=64)(pathlib.Path.resolve)  # the lines of a file are documents of one path


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A text file, or a line of a JSONL file: the `size` bytes from `start` on.

    `name` is relative to the folder it was found under: it alone decides which side of the split it is on. named: whether the
    user named it, and can do something about its encoding.
    """

    name: str
    path: pathlib.Path
    start: int = 0
    size: int | None = None
    named: bool = True

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.name.encode()) % HELD_OUT_SHARE == 0

    @property
    def nbytes(self) -> int:
        """Bytes of the file that it takes; 0 for a file that is not there."""
        if self.size is not None:
            return self.size
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def key(self) -> tuple[pathlib.Path, int]:
        """What tells it from other documents, whatever they are called."""
        return _resolved(self.path), self.start

    def content(self) -> bytes:
        """Its text in UTF-8. ValueError that names the file, and the line, for what is no text."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            content = file.read() if self.size is None else file.read(self.size)
        if self.size is not None:
            return _of_line(content, self)
        text = _as_text(content, self.path)
        if self.named:
            _check_utf_8(text, self.path)
        return text


# How files begin that are no text, and what they are.
_OTHERS = {
    b"%PDF-": "a PDF",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive, as docx and epub are",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PAR1": "a Parquet table",
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer (git lfs pull gets the file)",
}
_MOST_INVALID = 1e-3  # of a text's characters; a few are replaced
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _as_text(content: bytes, path: pathlib.Path) -> bytes:
    """UTF-8 of a file's content. ValueError, naming what it is, for content that is no text."""
    check_format(content, path)
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            try:
                return content.decode(encoding).encode()
            except (UnicodeDecodeError, UnicodeEncodeError):
                raise ValueError(f"{path}: begins like {encoding}, but is none") from None
    if (at := content.find(b"\0")) >= 0:
        raise ValueError(f"{path}: is not text: byte {at} is 0")
    if path.suffix.lower() == ".json" and content.lstrip().startswith(b"["):
        raise ValueError(f"{path}: is a JSON array, not text; what is read has an object in every line (JSONL)")
    return content.removeprefix(codecs.BOM_UTF8)


def check_format(start: bytes, path: pathlib.Path | str) -> None:
    """ValueError, naming what it is, for a file that begins as one of another format does."""
    for mark, what in _OTHERS.items():
        if start.startswith(mark):
            raise ValueError(f"{path}: is {what}, not text")


def _check_utf_8(content: bytes, path: pathlib.Path) -> None:
    """ValueError for text in another encoding, such as Latin-1, of which nobody says what it is."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        text = content.decode(errors="replace")
        if text.count("\ufffd") > _MOST_INVALID * len(text):
            raise ValueError(
                f"{path}: is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}; convert it, as by iconv -f latin1"
            ) from None


def _of_line(line: bytes, document: Document) -> bytes:
    """The text of a line of JSONL: its "text", or the contents of its "messages", one after the other."""
    where = f"{document.path}: line {document.name.rpartition(':')[2]}"
    fields = parse_json(line, where)
    text = fields.get("text")
    if text is None and isinstance(messages := fields.get("messages"), list):
        contents = [_of_content(message.get("content")) for message in messages if isinstance(message, dict)]
        strings = [content for content in contents if content is not None]
        text = "\n\n".join(strings) if len(strings) == len(messages) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: has neither a "text" nor "messages" with contents that are text')
    return text.encode("utf-8", errors="replace")


def _of_content(content: Any) -> str | None:
    """A message's content: a string, or a list of parts that are text; None for anything else."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(parts) else None


class Bytes:
    """One token a byte: what a checkpoint without a tokenizer reads."""

    name = identity = "bytes"

    def encode(self, text: bytes, begins: bool = True, ends: bool = True) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


class FromFile:
    """A checkpoint's tokenizer.

    Like transformers it puts before and after a text what the tokenizer's post-processor says, such as one token where a
    text begins.
    """

    def __init__(self, path: pathlib.Path, tokenizer: tokenizers.Tokenizer, identity: str) -> None:
        self.name, self.identity = path.name, identity
        self._path, self._tokenizer = path, tokenizer

    def encode(self, text: bytes, begins: bool = True, ends: bool = True) -> np.ndarray:
        """The tokens of a text, or of a part of one, which does not begin or does not end where the text does."""
        with boundary(self._path):
            encoding = self._tokenizer.encode(text.decode("utf-8", errors="replace"))
        ids, is_added = np.array(encoding.ids, np.int32), np.array(encoding.special_tokens_mask, bool)
        own = np.flatnonzero(~is_added)  # what the post-processor does not add
        first, last = (own[0], own[-1] + 1) if own.size else (is_added.size, is_added.size)
        return ids[0 if begins else first : None if ends else last]

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """As encode, on all cores."""
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        with boundary(self._path):
            return [np.array(encoding.ids, np.int32) for encoding in self._tokenizer.encode_batch_fast(decoded)]

    def decode(self, tokens: Iterable[int]) -> str:
        with boundary(self._path):
            return self._tokenizer.decode(list(tokens))


# Words, digits one by one, runs of other signs with a space on either side, other space. A word never takes a space or a
# sign in, so its tokens are the same wherever it stands.
WORD_PATTERN = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+ ?|\s+"
END_OF_TEXT = "<|endoftext|>"  # token 0
SAMPLE_BYTES = 20 * 2**20


def train_tokenizer(found: Sequence[Document], vocabulary: int, path: pathlib.Path, seed: int) -> FromFile:
    """A byte-level BPE of `vocabulary` tokens made from a sample of the documents, kept at `path` and read from there.

    Of several processes, process 0 makes it.
    """

    def make() -> None:
        if path.exists():
            return
        sample, total = [], 0
        for i in np.random.default_rng(seed).permutation(len(found)):
            sample.append(found[i].content().decode("utf-8", errors="replace"))
            total += len(sample[-1])
            if total >= SAMPLE_BYTES:
                break
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
        )
        made.train_from_iterator(sample, trainer)
        beside = path.with_name(path.name + ".partial")
        made.save(str(beside))
        os.replace(beside, path)

    processes.from_main(make)
    return FromFile(path, *read_file(path))


MOST_FOR_BYTES = 512  # a vocabulary: 256 bytes and some tokens for other things


def tokenizer(directory: str | pathlib.Path, vocab_size: int) -> Bytes | FromFile:
    """The tokenizer of a checkpoint directory, as transformers reads it, or bytes where there is none.

    vocab_size: the model's. ValueError for a tokenizer that is not read, and where bytes cannot be what the model reads.
    """
    directory = pathlib.Path(directory)
    found = read_tokenizer(directory)
    if found is not None:
        return FromFile(directory / TOKENIZER, *found)
    if vocab_size > MOST_FOR_BYTES:
        raise ValueError(f"{directory / TOKENIZER}: no such file, and bytes are not the {vocab_size} tokens of this model")
    return Bytes()


def standard_library() -> list[Document]:
    """The Python sources of the running interpreter's standard library."""
    return under(pathlib.Path(sysconfig.get_path("stdlib")), (".py",))


def under(root: pathlib.Path, suffixes: Sequence[str] = TEXT_SUFFIXES) -> list[Document]:
    """The files of a folder, and of those in it, with such names; installed packages and hidden files apart."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    files = (p for p in found if not any(part in _PASSED_OVER or part[0] == "." for part in p.relative_to(root).parts))
    return [Document(p.relative_to(root).as_posix(), p) for p in sorted(files)]


def installed_code() -> list[Document]:
    """The Python sources of the installed packages; what is larger than LARGEST_SOURCE is mostly tables."""
    found = _matching(f"{sysconfig.get_path('purelib')}/**/*.py")
    return [d for d in found if d.path.stat().st_size <= LARGEST_SOURCE]


def installed_prose() -> list[Document]:
    """Prose that comes with the installed packages: documentation and descriptions."""
    root = sysconfig.get_path("purelib")
    patterns = ("**/*.rst", "**/*.md", "**/*.txt", "*.dist-info/METADATA")
    found = {d.name: d for p in patterns for d in _matching(f"{root}/{p}") if d.path.stat().st_size > 2000}
    return [found[name] for name in sorted(found)]


def _matching(pattern: str) -> list[Document]:
    """The files of a glob, named from the folder before its first wildcard, so that a name is the same on every machine."""
    literal = pathlib.Path(re.split(r"[*?[]", pattern)[0] + "x").parent
    paths = (pathlib.Path(p) for p in sorted(glob.glob(pattern, recursive=True)))
    return [Document(p.relative_to(literal).as_posix(), p) for p in paths if p.is_file()]


SOURCES = {"standard-library": standard_library, "installed-code": installed_code, "installed-prose": installed_prose}


def documents(patterns: str, flag: str = "text") -> list[Document]:
    """The files of globs such as 'docs/*.txt,*.md', of a source of SOURCES, or the text files of a folder.

    "" is the standard library. Every line of a JSONL file is a document. A pattern that finds nothing is a ValueError, which
    names `flag`. A file that several patterns find counts once, under the first one's name: with two names it could be trained
    on and held out as well.
    """
    found: dict[tuple[pathlib.Path, int], Document] = {}
    for pattern in (patterns or "standard-library").split(","):
        path = pathlib.Path(pattern)
        is_folder = bool(pattern) and path.is_dir()
        named = SOURCES.get(pattern)
        some = named() if named else under(path) if is_folder else _matching(pattern)
        if not some:
            if is_folder:
                suffixes = ", ".join(TEXT_SUFFIXES[:4])
                raise ValueError(
                    f"--{flag}={pattern}: a folder without files called as text is ({suffixes}, ...); name others, as "
                    f"{pattern.rstrip('/')}/**/*.log"
                )
            if not pattern:
                raise ValueError(f"--{flag}={patterns}: holds an empty name")
            raise ValueError(f"--{flag}={pattern}: no such file, and nothing matches it")
        for file in some:
            if named:
                found.setdefault(file.key, dataclasses.replace(file, named=False))
                continue
            for document in lines(file) if _is_jsonl(file.path) else [file]:
                found.setdefault(document.key, document)
    return list(found.values())


def _is_jsonl(path: pathlib.Path) -> bool:
    """Whether a file is called JSONL or, whatever it is called, has an object with a text or messages in its first line."""
    if path.suffix.lower() in JSONL_SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            if file.read(1) != b"{":
                return False
            fields = parse_json(b"{" + file.readline(LONGEST_LINE), str(path))
    except (OSError, ValueError):  # a file that cannot be read is named where it is needed
        return False
    return isinstance(fields.get("text"), str) or isinstance(fields.get("messages"), list)


def lines(file: Document) -> Iterator[Document]:
    """The lines of a JSONL file that are not blank, numbered from 1."""
    start = 0
    with open(file.path, "rb") as opened:
        for number, line in enumerate(opened, start=1):
            if number == 1:
                _as_text(line[:64], file.path)  # of another format
            if line.strip():
                yield Document(f"{file.name}:{number}", file.path, start, len(line))
            start += len(line)


def ended(tokens: np.ndarray, separator: int | None) -> np.ndarray:
    """A document's tokens with `separator` after them, unless there is none or the tokenizer has put it there."""
    if separator is None or (tokens.size and tokens[-1] == separator):
        return tokens
    return np.append(tokens, np.int32(separator))


def stream(found: Sequence[Document], encoder: Bytes | FromFile, separator: int | None, limit: int | None = None) -> np.ndarray:
    """The documents' tokens one after the other, each ended by `separator`, int32; stops past `limit` tokens."""
    parts, total = [], 0
    for document in found:
        tokens = ended(encoder.encode(document.content()), separator)
        parts.append(tokens)
        total += tokens.size
        if limit is not None and total >= limit:
            break
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def sequences(tokens: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """`count` distinct cuts [count, length + 1] at multiples of `length`, drawn by `seed`; ValueError if there are fewer."""
    available = max(0, tokens.size - 1) // length
    if available < count:
        raise ValueError(f"{tokens.size} tokens hold {available} sequences of {length}, but {count} are asked for")
    starts = np.random.default_rng(seed).permutation(available)[:count] * length
    return np.stack([tokens[start : start + length + 1] for start in starts])
