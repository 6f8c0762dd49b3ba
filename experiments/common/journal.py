"""Files that survive a kill: logs that are continued where they stopped, and files that appear whole or not at all.

A `Journal` holds JSON objects, one a line, appended as they are made. It says what its entries depend on (weights, text,
settings), so that a run continues its own entries and is refused another run's. A line that a kill cut short is dropped.
Of several processes, process 0 alone reads and writes; what it read, all of them know.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO

from checkpoints_convert.ending import unfinished, writing
from experiments.common import processes

MISSING = "(missing)"
# The flags behind what a checksum tells apart, which says nothing to a reader.
_DECIDED_BY = {
    "calibration tokens": "--text, --held_out, --sequences, --context, --seed and what the files hold decide them",
    "tokens": "--text and the other flags of text decide them",
    "weights": "--checkpoint and, where it is given, --weights decide them",
    "prompts": "--prompts names them",
    "document": "--document names it",
}


class Journal:
    """A log of JSON objects in the file `path`. `entries`: those that it held when it was opened.

    about: what the entries depend on, JSON; the file's first line. None: the file has no such line, for a log whose owner
        is checked elsewhere.
    about_path: a file that holds `about` instead, for a log whose lines are a user's output.
    fields: the names, and the types of the values, that every entry must have.
    keep: entries to keep; later ones are dropped. None: all.
    resume: False refuses a file that holds a line.

    ValueError, with nothing written, where the file is about something else (names the first difference) or holds a line
    that is no entry (names file and line), and where it exists but `about_path` does not.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        about: Mapping[str, Any] | None,
        *,
        about_path: pathlib.Path | None = None,
        fields: Mapping[str, type] | None = None,
        keep: int | None = None,
        resume: bool = True,
    ) -> None:
        self.path = pathlib.Path(path)
        self._file: BinaryIO | None = None  # None but in process 0

        def opened() -> list[dict[str, Any]]:
            return self._open(about, about_path, fields or {}, keep, resume)

        self.entries: list[dict[str, Any]] = processes.from_main(opened)

    def _open(
        self,
        about: Mapping[str, Any] | None,
        about_path: pathlib.Path | None,
        fields: Mapping[str, type],
        keep: int | None,
        resume: bool,
    ) -> list[dict[str, Any]]:
        """Opens the file to append to it and returns the entries that it keeps."""
        heading = about if about_path is None else None
        entries: list[dict[str, Any]] = []
        exists = self.path.exists()
        lines = _whole_lines(self.path) if exists else []
        check_resumed(self.path, bool(lines), resume)
        if exists and about_path is not None:
            check_same(_read_about(about_path, self.path), about or {}, self.path)
        size = 0
        for number, line in enumerate(lines):
            if number == 0 and heading is not None:
                check_same(_parse(line, self.path, 1, {}), heading, self.path)
            elif keep is None or len(entries) < keep:
                entries.append(_parse(line, self.path, number + 1, fields))
            else:
                break
            size += len(line)
        if about_path is not None and not exists:
            with replacing(about_path) as file:
                file.write(_line(about or {}))
        self._file = open(self.path, "r+b" if exists else "wb")  # noqa: SIM115 (open for the journal's life)
        self._file.truncate(size)
        self._file.seek(size)
        if heading is not None and not size:
            self.append(heading)
        return entries

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds an entry; it is in the operating system's hands on return, so that a kill leaves it there."""
        if self._file is not None:
            line = _line(entry)
            with writing(self.path, len(line)):
                self._file.write(line)
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a log without a line about it; ValueError for one that is no JSON object."""
    return processes.from_main(
        lambda: [_parse(line, path, number, {}) for number, line in enumerate(_whole_lines(path), start=1)]
    )


def heading(path: pathlib.Path) -> dict[str, Any] | None:
    """What the entries of a log depend on, its first line; None where there is no such line. ValueError for no JSON object."""

    def first() -> dict[str, Any] | None:
        lines = _whole_lines(path) if path.exists() else []
        return _parse(lines[0], path, 1, {}) if lines else None

    return processes.from_main(first)


def remove(path: pathlib.Path) -> None:
    """Removes a file of an earlier run, or a folder with all that is in it, if it is there."""
    if processes.is_main():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def set_aside(path: pathlib.Path) -> None:
    """Renames the log of an earlier run that is not to be resumed, if there is one, to previous-NAME."""
    if processes.is_main() and path.exists():
        path.replace(path.with_name(f"previous-{path.name}"))


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _whole_lines(path: pathlib.Path) -> list[bytes]:
    """The lines that end in a line feed, which they keep."""
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


def _parse(line: bytes, path: pathlib.Path, number: int, fields: Mapping[str, type]) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not all(name in entry and isinstance(entry[name], kind) for name, kind in fields.items()):
        wanted = "a JSON object" + (f" with {', '.join(fields)}" if fields else "")
        raise ValueError(f"{path}: line {number} is not {wanted}: {line[:80]!r}")
    return entry


def _read_about(path: pathlib.Path, of: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path}: is missing, so what {of} was made with is not known")
    return _parse(path.read_bytes(), path, 1, {})


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], path: pathlib.Path) -> None:
    """ValueError that names the first difference between what `path` was made with and what this run is made with."""
    if difference := first_difference(there, json.loads(json.dumps(here))):
        name, before, now = difference
        decided = _DECIDED_BY.get(name.partition("[")[0])
        raise ValueError(
            f"{path}: was made with another {name}: {before!r} there, {now!r} here"
            f"{f' ({decided})' if decided else ''}; give what it was made with, or choose another --output_dir"
        )


def first_difference(there: Any, here: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The innermost name, such as stages[1].steps, under which two JSON values differ, and its two values; None if none."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        names = [*here, *(key for key in there if key not in here)]
        pairs = [(f"{name}.{key}" if name else key, there.get(key, MISSING), here.get(key, MISSING)) for key in names]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    elif there != here:
        return name, there, here
    return next((found for inner, a, b in pairs if (found := first_difference(a, b, inner))), None)


def check_resumed(path: pathlib.Path, begun: bool, resume: bool) -> None:
    """ValueError where an earlier run has `begun` in `path` and is not to be resumed: nothing of it is written over."""
    if begun and not resume:
        raise ValueError(f"{path}: holds an earlier run; --resume goes on with it, or choose another --output_dir")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once the block ends; a kill or an error before leaves `path` as it was."""
    beside = path.with_name(path.name + ".partial")
    with unfinished(beside), writing(path):
        with open(beside, "wb") as file:
            yield file
        os.replace(beside, path)
