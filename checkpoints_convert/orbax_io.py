"""Orbax checkpoints of params: written and read one layer of one leaf at a time.

On disk there is config.json (the model's fields, the schedule and the dtype) and params/, an orbax checkpoint of the
params tree with its stacked leaves. Any orbax program restores it into
`indexcache_jax.params.shape_structs(config, schedule, dtype, shardings)`. Orbax itself saves whole leaves, which for a
stack of experts is the model; so the leaves handed to it are lazy, filled layer by layer by a type handler that
writes zarr chunks of at most one layer. Checkpoints that orbax wrote from arrays, packed by OCDBT, are read too.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from checkpoints_convert.companions import with_stop_tokens
from checkpoints_convert.ending import writing
from checkpoints_convert.formats import check_described, check_quantization_config
from checkpoints_convert.trees import DTYPES_OF, Leaf, Leaves
from indexcache_jax.config import Config
from indexcache_jax.config_json import read_config_json
from indexcache_jax.foreign import escaped
from indexcache_jax.params import Params, abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Part, Tensor, leaves

PARAMS = "params"
MIN_CHUNK, MAX_CHUNK = 2**20, 64 * 2**20  # bytes; between them, a sixteenth of a layer
PENDING_CHUNKS = 2  # being compressed and written; each takes about three times its size


def is_orbax(directory: pathlib.Path) -> bool:
    """Whether a directory holds an orbax checkpoint of params."""
    return (directory / PARAMS / "_METADATA").exists()


def _stored_bytes(directory: pathlib.Path) -> int:
    """The bytes of the files in a directory.

    ValueError for what is no regular file, since tensorstore would wait for a pipe, and for a link to a folder.
    """
    total = 0
    for folder, folders, names in os.walk(directory):
        for name in folders:
            if (path := pathlib.Path(folder, name)).is_symlink():
                raise ValueError(f"{escaped(str(path))}: is a link to a folder, which is not followed; put the folder there")
        for name in names:
            path = pathlib.Path(folder, name)
            if not path.is_file():
                raise ValueError(f"{escaped(str(path))}: not a regular file")
            total += path.stat().st_size
    return total


class OrbaxCheckpoint(Leaves):
    """The leaves of an orbax checkpoint. ValueError, naming the directory and the leaf, for what cannot be read."""

    def __init__(self, directory: pathlib.Path):
        fields = read_config_json(directory)
        check_quantization_config(fields, directory / "config.json")
        self.fields = fields
        self.config = with_stop_tokens(Config.from_hf(fields), directory)
        self.schedule = Schedule.from_hf(fields)
        check_described(self.config, _stored_bytes(directory / PARAMS), directory / "config.json")
        self.quantization = fields.get("quantization_config")
        self.weights = None if self.quantization is None else "fp8"
        super().__init__(abstract(self.config, self.schedule, self.weights))
        self._directory = (directory / PARAMS).absolute()
        self._stores: dict[str, ts.TensorStore] = {}

    def check(self, tree: Any) -> None:
        """ValueError where a leaf that an abstract tree is made from is missing or misshapen, or a layer was not saved."""
        for path, tensor in leaves(tree):
            for layer in () if tensor.kind == "scales" else tensor.every_layer:  # scales belong to their codes
                names = self.stored_in(tensor, layer)
                if not names:
                    raise ValueError(
                        f"{self._directory}: {path} of layer {layer} is missing, which the schedule needs because it "
                        f"makes that layer F; the checkpoint was saved with {self.schedule}"
                    )
                for name in (*names, *self.scales_in(tensor, layer)):
                    if name not in self._stores:
                        self._stores[name] = self._checked(name)

    def _checked(self, path: str) -> ts.TensorStore:
        store, saved = self._open(path), self.leaves[path]
        if store.shape != saved.shape:
            raise ValueError(
                f"{self._directory}: {path} has shape {list(store.shape)}, but config.json makes it {list(saved.shape)}"
            )
        if any(chunk > max(size, 1) for chunk, size in zip(_chunk(store), store.shape, strict=True)):
            raise ValueError(f"{self._directory}: {path} has chunks larger than itself")
        if store.dtype.name not in DTYPES_OF[saved.kind]:
            raise ValueError(f"{self._directory}: {path} has dtype {store.dtype.name}, which no {saved.kind} have")
        return store

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        """The dtype that the leaf was saved in, or the first of those that it is made from; beside codes the model's."""
        if tensor.kind == "weights" and self.weights is not None:
            return np.dtype(tensor.dtype) if tensor.dtype else self._stores["embedding"].dtype.numpy_dtype
        return self.stored_dtype(tensor)

    def stored_dtype(self, tensor: Tensor) -> np.dtype:
        """The dtype that the leaf was saved in, or the first of those that it is made from."""
        return self._stores[self.stored_in(tensor, tensor.every_layer[0])[0]].dtype.numpy_dtype

    def read(self, leaf: Leaf, part: Part, out: np.ndarray) -> None:
        """Writes a part of one layer of a leaf into `out`, chunk by chunk; chunks outside of it are not read."""
        store, step = self._stores[leaf.path], _chunk(self._stores[leaf.path])[-out.ndim]
        if leaf.tensor.layers is not None:
            store = store[leaf.tensor.layers.index(leaf.layer)]
        first, last, _ = part[0].indices(leaf.tensor.layer_shape[0])
        for start, stop in itertools.pairwise([first, *range(first - first % step + step, last, step), last]):
            try:
                out[start - first : stop - first] = store[(slice(start, stop), *part[1:])].read().result()
            except ValueError as error:
                raise ValueError(f"{self._directory}: {leaf.path} cannot be read: {_first_line(error)}") from None

    def _open(self, path: str) -> ts.TensorStore:
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{self._directory}/{path}/"}
        if (self._directory / "manifest.ocdbt").exists():
            kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self._directory}/"}, "path": f"{path}/"}
        driver = "zarr3" if read_config_json(self._directory / "_METADATA").get("use_zarr3") else "zarr"
        try:
            # A chunk that is not there is an error, not zeros.
            return ts.open(
                {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}, open=True, read=True
            ).result()
        except ValueError as error:
            raise ValueError(f"{self._directory}: {path} is missing or cannot be opened: {_first_line(error)}") from None


def _chunk(store: ts.TensorStore) -> tuple[int, ...]:
    return tuple(size or 1 for size in store.chunk_layout.read_chunk.shape or ())


def _first_line(error: Exception) -> str:
    return escaped(str(error).splitlines()[0], 300)


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """A leaf to be saved: fill(layer, out) gives it layer by layer."""

    tensor: Tensor
    dtype: np.dtype
    fill: Callable[[int | None, np.ndarray], None]


def write(directory: pathlib.Path, tree: Params) -> None:
    """Saves a params tree of LazyLeaves as directory/params. Host memory: one layer of one leaf, and a few chunks."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # orbax warns that there are no arrays and nothing to merge, as it should be
    try:
        _save(directory / PARAMS, tree)
    finally:
        logger.setLevel(level)
    _check_written(directory / PARAMS, tree)


def _check_written(directory: pathlib.Path, tree: Params) -> None:
    """OSError where something that was to be written is not there: libraries may pass over a full disk."""

    def is_whole(path: pathlib.Path) -> bool:
        return path.is_file() and path.stat().st_size > 0

    whole = {"_METADATA": is_whole(directory / "_METADATA")}
    for name, leaf in leaves(tree):
        chunk = _chunk_shape(leaf.tensor, leaf.dtype)
        chunks = math.prod(math.ceil(size / step) for size, step in zip(leaf.tensor.shape, chunk, strict=True))
        there = [path for path in (directory / name).glob("*") if not path.name.startswith(".") and is_whole(path)]
        whole[name] = is_whole(directory / name / ".zarray") and len(there) == chunks
    if missing := [name for name, is_there in whole.items() if not is_there]:
        raise OSError(f"{directory / missing[0]}: was not written whole; is the disk full?")


def _save(path: pathlib.Path, tree: Params) -> None:
    registry = ocp.type_handlers.create_type_handler_registry((LazyLeaf, _LazyLeafHandler()))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, type_handler_registry=registry)
    # One process writes: orbax waits for no other.
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path.absolute(), tree)


class _LazyLeafHandler(ocp.type_handlers.NumpyHandler):
    """Saves LazyLeaves so that they read as NumPy arrays."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        for leaf, info in zip(values, infos, strict=True):
            _write_leaf(leaf, pathlib.Path(info.parent_dir) / info.name)
        return []


def _write_leaf(leaf: LazyLeaf, path: pathlib.Path) -> None:
    tensor = leaf.tensor
    chunk = _chunk_shape(tensor, leaf.dtype)
    with writing(path):
        store = ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{path}/"},
                "metadata": {"chunks": chunk, "compressor": {"id": "zstd", "level": 1}},
                "store_data_equal_to_fill_value": True,
            },
            create=True,
            dtype=leaf.dtype,
            shape=tensor.shape,
        ).result()
    nbytes = math.prod(tensor.shape) * leaf.dtype.itemsize
    stage = np.empty(tensor.layer_shape, leaf.dtype)
    step = chunk[-stage.ndim]
    for slot, layer in enumerate(tensor.every_layer):
        leaf.fill(layer, stage)
        target = store if layer is None else store[slot]
        pending: collections.deque[ts.Future] = collections.deque()
        for start in range(0, len(stage), step):
            part = slice(start, min(start + step, len(stage)))
            pending.append(target[part].write(stage[part], can_reference_source_data_indefinitely=True).commit)
            if len(pending) == PENDING_CHUNKS:
                with writing(path, nbytes):
                    pending.popleft().result()
        for future in pending:
            with writing(path, nbytes):
                future.result()


def _chunk_shape(tensor: Tensor, dtype: np.dtype) -> list[int]:
    """One layer, cut along its leading axes: files stay few, and what is written at once small beside the layer."""
    chunk = list(tensor.shape)
    limit = min(max(math.prod(tensor.layer_shape) * dtype.itemsize // 16, MIN_CHUNK), MAX_CHUNK)
    if tensor.stacked:
        chunk[0] = 1
    for axis in range(len(chunk)):
        size = math.prod(chunk) * dtype.itemsize
        if size > limit:
            chunk[axis] = max(1, chunk[axis] * limit // size)
    return chunk
