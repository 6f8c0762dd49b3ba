"""From params, or another checkpoint, to a new checkpoint directory that is either whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints_convert import fp8, orbax_io
from checkpoints_convert.checkpoint import (
    FORMS,
    Checkpoint,
    check_dtype,
    leaf_dtype,
    open_checkpoint,
    resolve_schedule,
    resolve_weights,
)
from checkpoints_convert.companions import find_companions, with_stop_tokens
from checkpoints_convert.ending import unfinished, writing
from checkpoints_convert.huggingface import SLAB_BYTES, HuggingFaceCheckpoint, Unused
from checkpoints_convert.recode import Recoded
from checkpoints_convert.safetensors_io import INDEX, NAMES, Spec, plan_shards, write_index, write_shard
from checkpoints_convert.trees import DTYPES_OF, Leaf, Leaves
from checkpoints_convert.written_config import Origin, written_fields
from indexcache_jax import arguments
from indexcache_jax.config import Config
from indexcache_jax.config_json import GLM, read_config_json
from indexcache_jax.foreign import is_there
from indexcache_jax.params import FP8_BASE, Params, abstract, check_model, weights_of
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import Weights
from indexcache_jax.tensors import Part, Source, Tensor, leaves

FORMATS = ("safetensors", "orbax")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ArraysCheckpoint(Leaves):
    """Params or serving weights in memory as a source of weights, on any devices.

    Where some are devices of other processes, process 0 alone may read, while all others are in `help`.

    is_spread: whether devices of several processes hold the arrays, in parts or each of them whole.
    """

    quantization: dict[str, Any] | None = None  # of the checkpoint that matrices in 8 bits are from

    def __init__(self, arrays: Params | Weights, config: Config, schedule: Schedule):
        self.config, self.schedule = config, schedule
        self._form = "params" if isinstance(arrays, Params) else "serving"
        form = weights_of(arrays) if isinstance(arrays, Params) else arrays.format
        self.weights = form and "fp8"  # what is trained on a base in 8 bits is written like the base
        self._take(leaves(arrays))
        super().__init__(FORMS[self._form](config, schedule, form))

    def _take(self, arrays: Iterable[tuple[str, Any]]) -> None:
        """Keeps the arrays, given by path."""
        given = dict(arrays)
        self.is_spread = any(_is_spread(array) for array in given.values())
        self._arrays = {path: host_view(array) for path, array in given.items()}

    def check(self, tree: Any) -> None:
        """ValueError unless the arrays have the shapes that config and schedule give them, whatever tree is asked for."""
        if differ := sorted(self.leaves.keys() ^ self._arrays.keys()):
            kind = "missing" if differ[0] in self.leaves else "not part of this config"
            raise ValueError(f"{self._form}: {differ[0]} is {kind}")
        for path, tensor in self.leaves.items():
            array = self._arrays[path]
            if array.shape != tensor.shape:
                raise ValueError(
                    f"{self._form}: {path} has shape {list(array.shape)}, but config and schedule {self.schedule} make it "
                    f"{list(tensor.shape)}"
                )
            if np.dtype(array.dtype).name not in DTYPES_OF[tensor.kind]:
                raise ValueError(f"{self._form}: {path} has dtype {array.dtype}, which no {tensor.kind} of a checkpoint have")

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        """The dtype of the array, or of the first that a tensor is made from; of what is in 8 bits but decoded the model's."""
        path = self.stored_in(tensor, tensor.every_layer[0])[0]
        decoded = tensor.kind == "weights" and self.leaves[path].kind == "codes"
        return np.dtype(self._arrays["embedding" if decoded else path].dtype)

    stored_dtype = dtype_of

    def read(self, leaf: Leaf, part: Part, out: np.ndarray) -> None:
        array = self._arrays[leaf.path]
        slot = leaf.tensor.every_layer.index(leaf.layer) if leaf.tensor.stacked else None
        if _is_spread(array):
            _from_first_process([_READ, list(self._arrays).index(leaf.path), -1 if slot is None else slot])
            out[...] = _gathered(array, slot)[tuple(part)]
        else:
            out[...] = np.asarray(array[(*([] if slot is None else [slot]), *part)])

    @contextlib.contextmanager
    def helped(self) -> Iterator[None]:
        """Lets process 0 read, and the others return from `help` afterwards."""
        last = _FAILED
        try:
            yield
            last = _DONE
        finally:
            if self.is_spread:
                _from_first_process([last, 0, 0])

    def help(self) -> None:
        """Gives process 0 what it reads of this process's devices. RuntimeError where process 0 does not succeed."""
        arrays = list(self._arrays.values())
        while True:
            request, number, slot = _from_first_process([0, 0, 0])
            if request == _DONE:
                return
            if request == _FAILED:
                raise RuntimeError("save: process 0 could not write the checkpoint; its error says why")
            _gathered(arrays[number], None if slot < 0 else slot)


# What process 0 asks of the others: to gather one layer of a leaf, or to end.
_READ, _DONE, _FAILED = range(3)


def _from_first_process(numbers: list[int]) -> list[int]:
    """The numbers that process 0 calls this with, in every process."""
    with jax.set_mesh(None):
        return multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32)).tolist()


def _gathered(array: jax.Array, slot: int | None) -> np.ndarray:
    """One layer of a leaf, None: all of it, from the devices of all processes, each of which calls this."""
    if not isinstance(array.sharding, NamedSharding):
        raise NotImplementedError(f"save: gathers arrays of several processes from a mesh only, not from {array.sharding}")
    with jax.set_mesh(None):
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        gather = jax.jit(_layer, out_shardings=everywhere, static_argnames="stacked")
        return np.asarray(gather(array, np.int32(slot or 0), stacked=slot is not None).addressable_data(0))


def _layer(array: jax.Array, slot: jax.Array, stacked: bool) -> jax.Array:
    return array[slot] if stacked else array


def host_view(leaf: Any) -> Any:
    """A NumPy view of an array in host memory; an array on other or several devices as it is."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)  # which no other process is asked for
    on_host = not isinstance(leaf, jax.Array) or [device.platform for device in leaf.devices()] == ["cpu"]
    return np.asarray(leaf) if on_host else leaf


def _is_spread(array: Any) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def save(
    directory: str | pathlib.Path,
    params: Params | Weights,
    config: Config,
    schedule: Schedule,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
    companions_of: str | pathlib.Path | None = None,
) -> None:
    """Writes params or serving weights to a new directory.

    format: "safetensors" for transformers, vLLM and SGLang, or "orbax" for a checkpoint of params.

    Leaves keep their dtypes, and matrices in 8 bits their codes and scales; what inference decodes of them, and what was
    trained on a base in 8 bits, is quantised. safetensors: Hugging Face names and shapes, shards of at most max_shard_size
    ("5GB", "200KB", bytes; one tensor alone may be larger) and their index, config.json with the schedule. orbax: config.json
    and params/. Host memory beyond the params: one layer of one leaf and a few MiB. companions_of: the checkpoint directory
    that params come from: its tokenizer, chat template and generation config go along, and its config.json is the new one's,
    but for what has changed.

    The directory appears whole, by a rename, or not at all. ValueError where it exists and is not empty, and, before
    anything is written, where params do not fit config and schedule.

    Arrays may lie on devices of several processes, spread over them or whole on each. Then each of these calls `save` with the
    same arguments, and process 0 writes: of what is spread one layer of one leaf at a time is gathered, which every device
    needs memory for. The others return when it is done, or raise RuntimeError where it fails. Arrays that each process has
    made for itself, on its own devices, are written by whichever calls `save`: let one do so.
    """
    check_model(config, schedule)
    if not isinstance(params, (Params, Weights)):
        raise ValueError(f"params: {arguments.described(params)} is neither Params nor serving Weights")
    checkpoint = ArraysCheckpoint(params, config, schedule)
    checkpoint.check(None)
    if companions_of is not None and not arguments.path("companions_of", companions_of).is_dir():
        raise ValueError(f"companions_of: {companions_of}: no such directory")
    if checkpoint.weights is not None and companions_of is not None:
        checkpoint.quantization = open_checkpoint(companions_of).quantization
    if checkpoint.is_spread and jax.process_index() > 0:
        checkpoint.help()
        return
    companions, origin = [], None
    if companions_of is not None:
        companions = find_companions(pathlib.Path(companions_of))
        if is_there(pathlib.Path(companions_of) / "config.json"):  # not yet beside a tokenizer that was made for a new model
            fields = read_config_json(companions_of)
            origin = Origin(fields, with_stop_tokens(Config.from_hf(fields), pathlib.Path(companions_of)))
    new = _New(
        arguments.path("directory", directory),
        format,
        parse_size(max_shard_size),
        weights=checkpoint.weights,
        companions=companions,
        origin=origin,
    )
    with checkpoint.helped():
        _write(new, Recoded(checkpoint), config, schedule)


def convert(
    source: str | pathlib.Path,
    directory: str | pathlib.Path,
    format: str | None = None,
    schedule: Schedule | str | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    keep_mtp: bool = False,
    keep_shared_indexers: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    weights: str | None = "stored",
) -> list[str]:
    """Converts one checkpoint directory into another, without ever holding the model. Returns what was left out, and warnings.

    format: None takes the one that `source` is not. schedule, dtype and weights are as in `load`, the rest as in `save`.
    An FP8 checkpoint stays one unless weights is None; codes, scales and its quantization_config are written back as they are,
    but what compressed-tensors wrote, which names scales otherwise, becomes quant_method "fp8".
    keep_mtp, keep_shared_indexers: copy these tensors as they are stored (FP8 ones as dtype unless the result is FP8) into a
    safetensors directory; they have no place in params. Those of multi-token prediction may lie in a file beside the ones that
    the index names. Tokenizer, chat template and generation config go along, and config.json, but for what has changed.
    `progress` is
    told the bytes written and their total. Host memory: one layer of one leaf.

    ValueError as for `load` and `save`, and where there is nothing to keep, before anything is written.
    """
    check_dtype(dtype)
    source, directory = arguments.path("source", source), arguments.path("directory", directory)
    if format is not None:
        arguments.choice("format", format, FORMATS)
    checkpoint = open_checkpoint(source)
    schedule = resolve_schedule(checkpoint, schedule)
    form = resolve_weights(checkpoint, weights)
    if form == FP8_BASE:
        raise ValueError(f"weights: {form!r} is for training on; a checkpoint is written with fp8, stored or None")
    format = format or ("orbax" if isinstance(checkpoint, HuggingFaceCheckpoint) else "safetensors")
    copies, report, mtp_layers, unused = [], [], 0, Unused((), (), ())
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        if keep_mtp:
            checkpoint.take_mtp_from_beside()
        unused = checkpoint.unused(schedule)
        kept = (unused.mtp if keep_mtp else ()) + (unused.shared_indexers if keep_shared_indexers else ())
        copies = checkpoint.copies(kept, dtype, keep_codes=form is not None and checkpoint.weights is not None)
        report = checkpoint.left_out(schedule, frozenset(kept))
        mtp_layers = len(checkpoint.mtp_layers(kept))
    if (keep_mtp or keep_shared_indexers) and (format == "orbax" or not isinstance(checkpoint, HuggingFaceCheckpoint)):
        raise ValueError("keep_mtp and keep_shared_indexers: only from safetensors to safetensors")
    if keep_mtp and not mtp_layers:
        raise ValueError(f"keep_mtp: {source} holds no layer of multi-token prediction, from {schedule.num_layers} on")
    if keep_shared_indexers and not unused.shared_indexers:
        raise ValueError(f"keep_shared_indexers: {source} holds no indexer of a layer that is S in {schedule}")
    if format == "safetensors" and checkpoint.config.family != GLM and schedule.num_full < schedule.num_layers:
        report.append("transformers gives the indexers that S layers lack random weights: its logits are wrong; use an engine")
    new = _New(
        directory,
        format,
        parse_size(max_shard_size),
        dtype,
        form,
        copies,
        find_companions(source),
        Origin(checkpoint.fields, checkpoint.config),
        mtp_layers,
    )
    recoded = Recoded(checkpoint)
    if form is not None:
        report += recoded.notes(abstract(checkpoint.config, schedule, form))
    _write(new, recoded, checkpoint.config, schedule, progress)
    return report


@dataclasses.dataclass(frozen=True)
class _New:
    """A checkpoint to be written: where, how, and what it holds besides the model's tensors.

    weights: "fp8" where matrices are written in 8 bits. copies: stored tensors, of which those of multi-token prediction are of
    mtp_layers layers. origin: what it comes from.
    """

    directory: pathlib.Path
    format: str
    max_shard_bytes: int
    dtype: Any = None
    weights: str | None = None
    copies: Sequence[tuple[Spec, Iterator[np.ndarray]]] = ()
    companions: Sequence[pathlib.Path] = ()
    origin: Origin | None = None
    mtp_layers: int = 0

    def __post_init__(self) -> None:
        arguments.choice("format", self.format, FORMATS)


def _write(
    new: _New,
    checkpoint: Recoded,
    config: Config,
    schedule: Schedule,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    tree = abstract(config, schedule, new.weights)
    checkpoint.check(tree)
    dtypes = {path: _written_dtype(checkpoint, tensor, new.dtype, new.weights) for path, tensor in leaves(tree)}
    quantization = None if new.weights is None else _quantization(checkpoint, tree, config, new.copies)
    fields = written_fields(config, schedule, dtypes["embedding"].name, new.mtp_layers, new.origin, quantization)
    with new_directory(new.directory) as partial:
        if new.format == "orbax":
            _write_orbax(partial, checkpoint, tree, dtypes, progress)
        else:
            _write_safetensors(partial, checkpoint, tree, dtypes, new.max_shard_bytes, new.copies, progress)
        finish(partial, new.companions, fields)


def _quantization(
    checkpoint: Recoded, tree: Params, config: Config, copies: Sequence[tuple[Spec, Iterator[np.ndarray]]]
) -> dict[str, Any]:
    """The quantization_config of a tree in 8 bits: the checkpoint's own, unless that leaves out what is quantised here.

    Another method than "fp8", such as compressed-tensors, has another name for the scales than they are written under.
    """
    origin = checkpoint.stored.quantization
    if origin is not None and origin.get("quant_method") not in (None, "fp8"):
        origin = None
    if origin is not None and not fp8.leaves_out(origin, checkpoint.quantised(tree)):
        return origin
    copied = [spec.name for spec, _ in copies if len(spec.shape) == 2 and spec.dtype != "F8_E4M3"]
    return fp8.config_of(config, copied, origin)


def finish(directory: pathlib.Path, companions: Iterable[pathlib.Path], fields: Mapping[str, Any]) -> None:
    """Copies companions into a new checkpoint directory and writes its config.json."""
    for companion in companions:
        copy(companion, directory / companion.name)
    # Last, so that not even the unfinished directory loads before it is whole.
    text = json.dumps(fields, indent=2) + "\n"
    with writing(directory / "config.json", len(text)):
        (directory / "config.json").write_text(text, encoding="utf-8")


def copy(file: pathlib.Path, to: pathlib.Path) -> None:
    """Copies a file's content. OSError, naming the new file and its size, for a full disk."""
    with writing(to, file.stat().st_size):
        shutil.copyfile(file, to)


def _written_dtype(checkpoint: Recoded, tensor: Tensor, dtype: Any, weights: str | None) -> np.dtype:
    """What a tensor is written as: where matrices stay in 8 bits whatever is not asked for otherwise stays as stored."""
    if weights is None or dtype is not None or tensor.kind != "weights":
        return leaf_dtype(checkpoint, tensor, dtype)
    return checkpoint.stored.stored_dtype(tensor)


def _write_orbax(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    tree: Params,
    dtypes: dict[str, np.dtype],
    progress: Callable[[int, int], None],
) -> None:
    total = sum(int(np.prod(tensor.shape)) * dtypes[path].itemsize for path, tensor in leaves(tree))
    done = 0

    def lazy(path: str, tensor: Tensor) -> orbax_io.LazyLeaf:
        def fill(layer: int | None, out: np.ndarray) -> None:
            nonlocal done
            checkpoint.fill(tensor, layer, out)
            done += out.nbytes
            progress(done, total)

        return orbax_io.LazyLeaf(tensor, dtypes[path], fill)

    lazies = [lazy(path, tensor) for path, tensor in leaves(tree)]
    orbax_io.write(directory, jax.tree.unflatten(jax.tree.structure(tree), lazies))


@dataclasses.dataclass(frozen=True)
class _Unit:
    """The stored tensors that are made of the same leaves in one layer (None: leaves without layers)."""

    layer: int | None
    leaves: dict[str, Tensor]

    def parts(self) -> dict[str, list[tuple[str, Source]]]:
        """Stored name -> the leaves, by path, that it is put together from, and how."""
        parts: dict[str, list[tuple[str, Source]]] = {}
        for path, tensor in self.leaves.items():
            for source in tensor.stored(self.layer):
                parts.setdefault(source.name, []).append((path, source))
        return parts

    def specs(self, dtypes: dict[str, np.dtype]) -> Iterator[Spec]:
        for name, parts in self.parts().items():
            path, source = parts[0]
            yield Spec(name, NAMES[dtypes[path]], source.stored_shape)

    def streams(self, checkpoint: Checkpoint, dtypes: dict[str, np.dtype]) -> Iterator[Iterator[np.ndarray]]:
        """For every one of `specs`, its data in slabs."""
        arrays = {}
        for path, tensor in self.leaves.items():
            arrays[path] = np.empty(tensor.layer_shape, dtypes[path])
            checkpoint.fill(tensor, self.layer, arrays[path])
        for parts in self.parts().values():
            yield self._slabs(arrays, parts)

    def _slabs(self, arrays: dict[str, np.ndarray], parts: list[tuple[str, Source]]) -> Iterator[np.ndarray]:
        path, source = parts[0]
        count, dtype = source.view[0], arrays[path].dtype
        unit = source.shape[0] // count  # rows to an entry of the view
        step = max(1, SLAB_BYTES * count // (math.prod(source.shape) * dtype.itemsize))
        for start in range(0, count, step):
            stop = min(start + step, count)
            slab = np.empty(((stop - start) * unit, *source.shape[1:]), dtype)
            for path, source in parts:
                rows = (slice(None),) * source.row_axis + (slice(start, stop),)
                source.write(slab, arrays[path][source.at][rows])
            yield slab[-(start * unit) % source.repeats :: source.repeats]


def _units(tree: Params) -> list[_Unit]:
    """All of a model's stored tensors, in the order of its layers."""
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in leaves(tree):  # leaves that share a stored tensor share their first source's name
        groups.setdefault(tensor.sources[0].name, {})[path] = tensor
    units = [_Unit(layer, group) for group in groups.values() for layer in next(iter(group.values())).every_layer]

    def order(unit: _Unit) -> float:
        if unit.layer is not None:
            return unit.layer
        return -1 if "embedding" in unit.leaves else math.inf

    return sorted(units, key=order)


def _write_safetensors(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    tree: Params,
    dtypes: dict[str, np.dtype],
    max_bytes: int,
    copies: Sequence[tuple[Spec, Iterator[np.ndarray]]],
    progress: Callable[[int, int], None],
) -> None:
    units = _units(tree)
    specs = [spec for unit in units for spec in unit.specs(dtypes)] + [spec for spec, _ in copies]
    streams = itertools.chain(
        (stream for unit in units for stream in unit.streams(checkpoint, dtypes)), (stream for _, stream in copies)
    )
    total, done = sum(spec.nbytes for spec in specs), 0
    if (free := shutil.disk_usage(directory).free) < total:
        raise OSError(f"{directory.parent}: the weights take {total:,} bytes, {free:,} are free on that disk")

    def counted(count: int) -> Iterator[np.ndarray]:
        nonlocal done
        for stream in itertools.islice(streams, count):
            for slab in stream:
                yield slab
                done += slab.nbytes
                progress(done, total)

    shards = plan_shards(specs, max_bytes)
    for file, shard in shards.items():
        with writing(directory / file, sum(spec.nbytes for spec in shard)):
            write_shard(directory / file, shard, counted(len(shard)))
    with writing(directory / INDEX):
        write_index(directory, shards)


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside `path` to write into, which takes its name once all is written and on disk.

    ValueError where `path` is there and is not an empty directory, OSError that names the file for a full disk. Where it
    is a link, that is what it leads to. What is left of it after an error is removed; a killed process leaves
    `.NAME.*.partial`.
    """
    path = path.resolve()  # a directory cannot take the name of a link
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not an empty directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    with unfinished(partial), writing(path):
        yield partial
        for directory, _, files in os.walk(partial):
            for name in (*files, "."):
                _sync(pathlib.Path(directory) / name)
        try:
            partial.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ValueError(f"{path}: was made by someone else meanwhile, and is not an empty directory") from None
            raise
        _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200KB", "1GiB" or a number. ValueError unless positive."""
    is_size = isinstance(size, (int, str)) and not isinstance(size, bool)
    match = re.fullmatch(r"([0-9]{1,18})\s*([KMG]I?B)?", str(size).strip().upper()) if is_size else None
    if not match or not int(match[1]):
        raise ValueError(f"max_shard_size: {size!r} is not a size such as 5GB, 200KB or 1GiB")
    return int(match[1]) * _UNITS[match[2] or ""]
