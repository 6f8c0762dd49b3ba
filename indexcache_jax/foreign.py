"""What strangers wrote: small files are read, and text from them is shown, here and nowhere else.

A file is read only if it is a regular one of at most a given size, so that a pipe does not hang, and a link to a device does
not fill the memory. What it says stands in messages escaped and cut: a name in a checkpoint cannot drive a terminal.
"""

from __future__ import annotations

import json
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any

MAX_SMALL = 16 * 2**20  # bytes of a config.json; those of released models have some thousand
MAX_LARGE = 100_000_000  # bytes of a tokenizer.json, an index or a header; the largest released have some 30 million
MAX_SHOWN = 200  # characters of a stranger's text in a message
_STEP = 2**16
_LFS = b"version https://git-lfs.github.com/spec/"


def shown(value: Any, most: int = MAX_SHOWN) -> str:
    """repr(value), which escapes whatever does not print, of at most `most` characters and "..."."""
    if isinstance(value, (str, bytes)):
        value = value[: most + 1]  # not a repr of megabytes
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= most + 2 else f"{text[:most]}..."


def escaped(text: str, most: int = MAX_SHOWN) -> str:
    """A text in one line, without quotes: what does not print as escape sequences, at most `most` characters and "..."."""
    cut = text[:most]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in cut)
    return line if len(text) <= most else f"{line}..."


def is_name(name: Any) -> bool:
    """Whether it is a string that can stand in a message as it is: printable, and of at most MAX_SHOWN characters."""
    return isinstance(name, str) and 0 < len(name) <= MAX_SHOWN and name.isprintable()


def is_there(path: pathlib.Path) -> bool:
    """Whether there is something of this name, be it a link to nothing: whoever reads it then says so."""
    return path.exists() or path.is_symlink()


def read_bytes(path: str | os.PathLike[str], most: int = MAX_SMALL) -> bytes:
    """The content of a regular file of at most `most` bytes. ValueError, naming the file, for anything else."""
    path = pathlib.Path(path)
    try:
        # Without waiting: to open a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file{', but a link to one' if path.is_symlink() else ''}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {escaped(getattr(error, 'strerror', None) or str(error))}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a regular file")
    with open(descriptor, "rb") as file:
        if status.st_size > most:
            raise ValueError(f"{path}: has {status.st_size} bytes, more than the {most} that such a file may have")
        try:
            # A file that grows, and one whose file system does not tell its size, is read in steps, not into `most` bytes.
            content = file.read(status.st_size)
            while len(content) <= most and (more := file.read(_STEP)):
                content += more
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {escaped(error.strerror or str(error))}") from None
    if len(content) > most:
        raise ValueError(f"{path}: has more than the {most} bytes that such a file may have")
    return content


def read_text(path: str | os.PathLike[str], most: int = MAX_SMALL) -> str:
    """The text of a regular UTF-8 file of at most `most` bytes. ValueError, naming the file, for anything else."""
    content = read_bytes(path, most)
    check_no_pointer(path, content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 at byte {error.start}") from None


def read_json(path: str | os.PathLike[str], most: int = MAX_SMALL) -> dict[str, Any]:
    """The JSON object in a small file. ValueError, naming the file, where it is missing, too large, or no such object."""
    return parse_json(read_text(path, most), path)


def parse_json(text: str | bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that a text is, with every key once. ValueError, naming the file `path` that it is from."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shown(key)} is there twice")
            found[key] = value
        return found

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {escaped(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def check_no_pointer(path: str | os.PathLike[str], start: bytes) -> None:
    """ValueError where a file's first bytes are those of a Git LFS pointer, the file itself not having been fetched."""
    if start.startswith(_LFS):
        raise ValueError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned")
