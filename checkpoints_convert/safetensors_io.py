"""Safetensors files: headers checked against the file before anything is allocated, reads by bytes, streaming writes.

A file is a little-endian uint64, a JSON header of that many bytes, and the tensors' bytes without gaps. Data is read
into buffers of our own instead of mapped, so that memory is what we ask for and a file cut short while it is read is
an error, not a signal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from indexcache_jax.foreign import MAX_LARGE, check_no_pointer, escaped, is_name, is_there, parse_json, read_json, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNLISTED = "unlisted_tensors"  # in the metadata of an index
MAX_PATH = 1000  # characters of a message that begins with a path
MAX_DIMENSIONS = 16  # beyond any tensor's, so that a shape's product stays cheap

_BITS = (
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8}
    | dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
)
NUMPY = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
}
NAMES = {dtype: name for name, dtype in NUMPY.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: `shape` elements of `dtype` (a safetensors name) from byte `offset` of `file`."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8

    def read(self, start: int, stop: int) -> np.ndarray:
        """Its bytes [start, stop) as uint8. ValueError where the file has become shorter than its header said."""
        out = np.empty(stop - start, np.uint8)
        self.read_into([(start, out)])
        return out

    def read_into(self, runs: Iterable[tuple[int, np.ndarray]]) -> None:
        """Fills uint8 arrays, each with its bytes from a position on. ValueError as for `read`."""
        with open(self.file, "rb", buffering=0) as file:
            for start, out in runs:
                file.seek(self.offset + start)
                done = 0
                while done < len(out):
                    count = file.readinto(out.data[done:])
                    if not count:
                        raise ValueError(f"{self.file}: ends inside tensor {self.name}")
                    done += count

    def slabs(self, size: int) -> Iterator[np.ndarray]:
        """All its bytes, `size` at a time."""
        for start in range(0, self.nbytes, size):
            yield self.read(start, min(start + size, self.nbytes))

    def rows(self, start: int, stop: int, unit: int = 1, run: tuple[int, int] | None = None) -> np.ndarray:
        """Entries [start, stop) of its first axis, in its own dtype; both are multiples of `unit`.

        run: of every `unit` entries, the elements [first, last) that are needed. The others are not read and are zeros.
        Default all.
        """
        dtype, width = NUMPY[self.dtype], unit * self.nbytes // self.shape[0]
        first, last = (0, width) if run is None else (run[0] * dtype.itemsize, run[1] * dtype.itemsize)
        if (first, last) == (0, width):
            data = self.read(start // unit * width, stop // unit * width)
        else:
            data = np.zeros((stop - start) // unit * width, np.uint8)
            units = enumerate(data.reshape(-1, width), start // unit)
            self.read_into((i * width + first, bytes_of_unit[first:last]) for i, bytes_of_unit in units)
        return data.view(dtype).reshape(-1, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors of a directory by name, as its index lists them, and what lies beside them and is not read.

    unlisted: tensors of the index's files that it does not list, or lists in another file; files: other safetensors files.
    listed_by: the file that says which tensors there are. known: how many unlisted tensors it says that there are: of these
    whoever wrote it has told the user.
    """

    entries: dict[str, Entry]
    unlisted: tuple[Entry, ...]
    files: tuple[pathlib.Path, ...]
    listed_by: pathlib.Path
    known: int = 0

    def notes(self, kept: Iterable[Entry] = ()) -> list[str]:
        """A line for the files and one for the tensors that are not read, those of `kept` apart."""
        copied = {(entry.file, entry.name) for entry in kept}
        files = [path for path in self.files if path not in {file for file, _ in copied}]
        tensors = [entry for entry in self.unlisted if (entry.file, entry.name) not in copied]
        lines = []
        if files:
            names = _some([escaped(path.name) for path in files])
            lines.append(f"not read: {len(files)} files that {self.listed_by.name} does not name: {names}")
        if tensors and len(self.unlisted) != self.known:
            names = _some([f"{entry.name} in {entry.file.name}" for entry in tensors])
            lines.append(f"not read: {len(tensors)} tensors that {self.listed_by.name} does not list there: {names}")
        return lines

    def beside(self) -> Iterator[Entry]:
        """The tensors that are not read, for a caller who wants some of them. ValueError for a file that is none."""
        yield from self.unlisted
        for path in self.files:
            try:
                yield from read_header(path).values()
            except ValueError as error:  # the name of a file that nothing lists may be anything
                raise ValueError(escaped(str(error), MAX_PATH)) from None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_directory(directory: pathlib.Path) -> dict[str, Entry]:
    """Every tensor of the shards that model.safetensors.index.json lists, else of model.safetensors, by name.

    Reads headers only. ValueError names the file, and the tensor where there is one, for whatever does not add up.
    """
    return read_stored(directory).entries


def read_stored(directory: pathlib.Path) -> Stored:
    """As `read_directory`, and what lies beside. The index decides what is read: exactly what its weight_map lists."""
    index = directory / INDEX
    if not is_there(index):
        return Stored(read_header(directory / SINGLE), (), _other_files(directory, {SINGLE}), directory / SINGLE)
    fields = read_json(index, MAX_LARGE)
    weight_map, metadata = fields.get("weight_map"), fields.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is not an object with entries")
    for name, shard in weight_map.items():
        if not is_name(name):
            raise ValueError(f"{index}: weight_map lists {shown(name)}, which is not a tensor's name")
        # A name, never a path: nothing outside the directory is opened.
        if not is_name(shard) or not re.fullmatch(r"[^/\\\x00]+\.safetensors", shard):
            shard = shown(shard)
            raise ValueError(f"{index}: weight_map gives {shard} for {name}, which is not the name of a .safetensors file")
    entries: dict[str, Entry] = {}
    unlisted: list[Entry] = []
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (directory / shard).exists():
            raise ValueError(f"{index}: names {shard}, but {directory} has no such file")
        for name, entry in read_header(directory / shard).items():
            if weight_map.get(name) == shard:
                entries[name] = entry
            else:
                unlisted.append(entry)
    for name, shard in weight_map.items():
        if name not in entries:
            raise ValueError(f"{index}: places tensor {name} in {shard}, which does not hold it")
    known = metadata.get(UNLISTED) if isinstance(metadata, dict) else None
    return Stored(entries, tuple(unlisted), _other_files(directory, set(shards)), index, known if isinstance(known, int) else 0)


def _other_files(directory: pathlib.Path, read: set[str]) -> tuple[pathlib.Path, ...]:
    return tuple(sorted(path for path in directory.glob("*.safetensors") if path.name not in read))


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of one file by name. ValueError names the file and, where there is one, the tensor at fault."""
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        check_no_pointer(path, start)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, MAX_LARGE):
            raise ValueError(f"{path}: a header of {length} bytes does not fit in a file of {size} (limit {MAX_LARGE})")
        file.seek(8)
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    entries, end, last = {}, 0, "the header"
    parsed = [(name, *_fields(path, name, info)) for name, info in header.items()]
    for name, dtype, shape, begin, stop in sorted(parsed, key=lambda tensor: tensor[3:]):
        if begin != end:
            raise ValueError(f"{path}: tensor {name} begins at byte {begin}, but {last} ends at byte {end}")
        entries[name] = Entry(name, path, dtype, shape, 8 + length + begin)
        end, last = stop, name
    if 8 + length + end != size:
        raise ValueError(
            f"{path}: truncated or padded: its header describes {8 + length + end} bytes, it has {size} (last tensor {last})"
        )
    return entries


def _fields(path: pathlib.Path, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and first and last offset of a header's entry, once they are seen to agree."""
    if not is_name(name):
        raise ValueError(f"{path}: holds {shown(name)}, which is not a tensor's name")

    def sizes(field: str, what: str) -> list[int]:
        values = info.get(field)
        is_sizes = isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
        if not is_sizes or len(values) > MAX_DIMENSIONS:
            raise ValueError(f"{path}: tensor {name} has {field} {shown(values)}, not {what}")
        return values

    if not isinstance(info, dict) or str(info.get("dtype")) not in _BITS:
        raise ValueError(f"{path}: tensor {name} has no dtype that safetensors knows: {shown(info)}")
    dtype, shape, offsets = info["dtype"], sizes("shape", "a short list of sizes"), sizes("data_offsets", "two positions")
    bits = math.prod(shape) * _BITS[dtype]
    if len(offsets) != 2 or bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{path}: tensor {name} of shape {shape} and dtype {dtype} takes {bits // 8} bytes, but has data_offsets "
            f"{shown(offsets)}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor to be written. `dtype` is a safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def plan_shards(specs: Iterable[Spec], max_bytes: int) -> dict[str, list[Spec]]:
    """File name -> tensors in order, no file's tensors above max_bytes unless one alone is."""
    shards: list[list[Spec]] = [[]]
    room = max_bytes
    for spec in specs:
        if spec.nbytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shard(path: pathlib.Path, specs: Sequence[Spec], slabs: Iterable[np.ndarray]) -> None:
    """One file of `specs`, whose bytes in order are those of `slabs`; on disk when it returns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for slab in slabs:
            file.write(np.ascontiguousarray(slab).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_index(directory: pathlib.Path, shards: Mapping[str, Sequence[Spec]], unlisted: int = 0) -> None:
    """The index of a directory of several shards; a single file needs none. unlisted: how many tensors they hold besides."""
    if len(shards) > 1:
        weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
        total = sum(spec.nbytes for specs in shards.values() for spec in specs)
        metadata = {"total_size": total} | ({UNLISTED: unlisted} if unlisted else {})
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
        (directory / INDEX).write_text(text + "\n", encoding="utf-8")
