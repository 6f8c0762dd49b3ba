"""From a checkpoint directory to weights on devices, each of which is sent what it holds, one layer of one leaf at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.checkpoint import (
    FORMS,
    check_dtype,
    leaf_dtype,
    open_checkpoint,
    resolve_schedule,
    resolve_weights,
)
from checkpoints_convert.huggingface import HuggingFaceCheckpoint
from checkpoints_convert.recode import Recoded
from indexcache_jax import arguments, sharding
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor, leaves

Bounds = tuple[tuple[int, int], ...]  # [start, stop) of every axis of a tensor
Parts = dict[Bounds, list[Any]]  # the devices that hold a part; None is the default device
_ALIGNMENT = 64  # bytes; JAX takes over host memory aligned so without a copy
_MIN_PIECE = 2**20  # bytes sent to a device at once


def load(
    directory: str | pathlib.Path,
    schedule: Schedule | str | None = None,
    dtype: Any = None,
    shardings: Any = None,
    form: str = "params",
    weights: str | None = None,
) -> tuple[Config, Schedule, Any]:
    """(config, schedule, weights) of a Hugging Face safetensors directory or an orbax one.

    Args:
      schedule: instead of the one in config.json; every layer it makes F must have indexer weights.
      dtype: bfloat16, float32 or float16 for the weights; None keeps bfloat16 (also for FP8) and float32, and widens
        float16. The router bias is float32 in any case.
      shardings: one sharding for all leaves or a tree of them, like the weights. None places every leaf by the mesh and
        rules in force (`indexcache_jax.sharding.use`); without a mesh everything goes to the default device.
      form: "params" for training and the search, "serving" for `serving.Weights`, which inference runs. Either tree is
        filled straight from the files: no other copy of the weights exists.
      weights: "fp8" keeps matrices in 8 bits, as `quant.Scaled`: those of an FP8 checkpoint bit for bit, others are quantised,
        with a warning where they are a part of one.
        "stored" does so for an FP8 checkpoint alone, None for none. "fp8 base", with form "params", leaves out the indexers,
        which then can be trained.

    A mesh may have devices of other processes, each of which calls `load` with the same arguments. A process reads what
    its own devices hold: a part that several of them hold alike once, from safetensors nothing else but the scales of
    FP8, from orbax whole chunks. No leaf is whole in host memory unless a device holds it whole. Host memory beyond the
    result is a few MiB on CPUs; on other devices at most 1.2 times the largest part that one device holds, of one layer
    where layers are stacked, and a few MiB.

    ValueError names the file and the tensor or field for whatever is missing, misshapen, truncated or unsupported, and
    the leaf and axis that the devices do not divide. All headers are checked before a weight is read. Stored tensors
    without a use are left out, with a warning.
    """
    checkpoint, schedule, tree = opened(directory, schedule, dtype, form, weights)
    placements = _per_leaf(tree, _in_force(tree) if shardings is None else shardings, form, schedule)
    planned = [
        _Leaf(
            tensor,
            # Inference multiplies by float32 scales; params keep those that are written back.
            np.dtype(np.float32) if form == "serving" and tensor.kind == "scales" else leaf_dtype(checkpoint, tensor, dtype),
            sharding,
            parts_held(tensor.shape, sharding),
            functools.partial(checkpoint.fill, tensor),
        )
        for (_, tensor), sharding in zip(leaves(tree), placements, strict=True)
    ]
    with jax.set_mesh(None):  # what is sent goes to one device at a time, whatever mesh the caller has in force
        stage = _Stage(max(leaf.staged_bytes for leaf in planned))
        arrays = [_place(leaf, stage) for leaf in planned]
    return checkpoint.config, schedule, jax.tree.unflatten(jax.tree.structure(tree), arrays)


def _in_force(tree: Any) -> Any:
    """The shardings of an abstract tree by the mesh and rules in force (`sharding.use`); None without a mesh."""
    mesh, rules = sharding.current()
    if mesh is None:
        return None
    devices = jax.sharding.get_mesh()
    if devices.empty:
        raise ValueError(f"shardings: the mesh in force, {dict(mesh.shape)}, is abstract: it has no devices to load onto")
    return sharding.shardings(tree, devices, rules)


def opened(
    directory: str | pathlib.Path,
    schedule: Schedule | str | None,
    dtype: Any,
    form: str = "params",
    weights: str | None = None,
) -> tuple[Recoded, Schedule, Any]:
    """(checkpoint, schedule, abstract tree) that `load` reads, all headers checked; warns of what is left out or quantised."""
    arguments.choice("form", form, FORMS)
    check_dtype(dtype)
    stored = open_checkpoint(directory)
    schedule = resolve_schedule(stored, schedule)
    tree = FORMS[form](stored.config, schedule, resolve_weights(stored, weights))
    stored.check(tree)
    checkpoint = Recoded(stored)
    if isinstance(stored, HuggingFaceCheckpoint):
        for line in [*stored.left_out(schedule), *checkpoint.notes(tree)]:
            warnings.warn(f"{directory}: {line}", stacklevel=3)
    return checkpoint, schedule, tree


def stored_weights(directory: str | pathlib.Path) -> str | None:
    """What `load` understands by weights="stored": "fp8" for a checkpoint whose matrices are in 8 bits, else None.

    ValueError as for `load` where the directory holds no checkpoint, or its config.json or headers cannot be read.
    """
    return open_checkpoint(directory).weights


def _per_leaf(tree: Any, shardings: Any, form: str, schedule: Schedule) -> list[jax.sharding.Sharding | None]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return [shardings for _ in leaves(tree)]
    found = jax.tree.leaves(shardings)
    alike = jax.tree.structure(shardings) == jax.tree.structure(tree)  # type: ignore[operator]
    if not alike or not all(isinstance(sharding, jax.sharding.Sharding) for sharding in found):
        raise ValueError(
            f"shardings: expected one jax.sharding.Sharding, or a tree of them like the {form} of schedule "
            f"{schedule.pattern}; got {type(shardings).__name__} of {len(found)} leaves, expected {len(jax.tree.leaves(tree))}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf to be loaded, and the parts of it that devices of this process hold.

    fill(layer, out, part) writes a part of one of its layers. sharding None: all of it on the default device.
    """

    tensor: Tensor
    dtype: np.dtype
    sharding: jax.sharding.Sharding | None
    parts: Parts
    fill: Callable[..., None]

    def nbytes(self, bounds: Bounds) -> int:
        return math.prod(stop - start for start, stop in bounds) * self.dtype.itemsize

    @property
    def staged_bytes(self) -> int:
        """Bytes of the largest part, of one layer where layers are stacked, that does not stay in host memory."""
        sent = [bounds for bounds, devices in self.parts.items() if not all(map(_takes_over, devices))]
        return max((self.nbytes(bounds[self.tensor.stacked :]) for bounds in sent), default=0)

    def read(self, bounds: Bounds) -> np.ndarray:
        """A whole part."""
        out = aligned(tuple(stop - start for start, stop in bounds), self.dtype)
        for slot, layer, part in self.layers_of(bounds):
            self.fill(layer, out if slot is None else out[slot], part)
        return out

    def layers_of(self, bounds: Bounds) -> Iterator[tuple[int | None, int | None, tuple[slice, ...]]]:
        """(place in the part's stack, layer, part of that layer) of every layer that a part has something of."""
        if not self.tensor.stacked:
            yield None, self.tensor.every_layer[0], tuple(slice(*axis) for axis in bounds)
            return
        for slot, layer in enumerate(self.tensor.every_layer[slice(*bounds[0])]):
            yield slot, layer, tuple(slice(*axis) for axis in bounds[1:])


def parts_held(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> Parts:
    """The different parts of an array that devices of this process hold; sharding None: all of it, on the default device."""
    if sharding is None:
        return {tuple((0, size) for size in shape): [None]}
    parts: Parts = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    return parts


def _takes_over(device: jax.Device | None) -> bool:
    """Whether arrays on a device (None: the default one) are host memory, which a part is read into for good."""
    return (jax.default_backend() if device is None else device.platform) == "cpu"


class _Stage:
    """Host memory through which parts go to devices one at a time, of `largest` bytes.

    What is small beside it goes at once, the rest in pieces: JAX makes a copy of whatever it sends.
    """

    def __init__(self, largest: int) -> None:
        self._memory = aligned((largest,), np.dtype(np.uint8))
        self._piece = max(largest // 16, _MIN_PIECE)

    def place(self, leaf: _Leaf, bounds: Bounds, devices: Sequence[Any]) -> dict[Any, jax.Array]:
        """A part of a leaf, read once, on each of its devices."""
        if leaf.nbytes(bounds) <= self._piece:
            out = leaf.read(bounds)
            return {device: jax.device_put(out, device).block_until_ready() for device in devices}
        shape = tuple(stop - start for start, stop in bounds)
        buffers = {device: jnp.zeros(shape, leaf.dtype, device=device) for device in devices}
        for slot, layer, part in leaf.layers_of(bounds):
            out = self._array(shape[leaf.tensor.stacked :], leaf.dtype)
            leaf.fill(layer, out, part)
            for at, rows in _pieces(out, self._piece, () if slot is None else (slot,)):
                for device in devices:
                    sent = jax.device_put(rows, device)
                    # Waiting frees the copy, and the stage, which JAX may have lent to it, before what comes next.
                    buffers[device] = _put(buffers[device], sent, *map(np.int32, at)).block_until_ready()
        return buffers

    def _array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return self._memory[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _pieces(array: np.ndarray, nbytes: int, at: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """An array in pieces of at most `nbytes`, or a row of its last axis, each with the index `at` + (...) of its first row."""
    if array.ndim > 1 and array[0].nbytes > nbytes:
        for i, entry in enumerate(array):
            yield from _pieces(entry, nbytes, (*at, i))
        return
    step = max(1, nbytes * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield (*at, start), array[start : start + step]


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, rows: jax.Array, *at: jax.Array) -> jax.Array:
    """`buffer` with `rows` at an index of its first axes."""
    rows = rows.reshape((1,) * (buffer.ndim - rows.ndim) + rows.shape)
    return jax.lax.dynamic_update_slice(buffer, rows, (*at, *(0,) * (buffer.ndim - len(at))))


def _place(leaf: _Leaf, stage: _Stage) -> jax.Array:
    """A leaf as a JAX array, of which this process reads what its devices hold."""
    shards: dict[Any, jax.Array] = {}
    for bounds, devices in leaf.parts.items():
        if all(map(_takes_over, devices)):
            out = leaf.read(bounds)
            shards |= {device: jax.device_put(out, device) for device in devices}
        else:
            shards |= stage.place(leaf, bounds, devices)
    if leaf.sharding is None:
        return shards[None]
    arrays = list(shards.values())
    return jax.make_array_from_single_device_arrays(leaf.tensor.shape, leaf.sharding, arrays, dtype=leaf.dtype)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty that jax.device_put turns into a CPU array without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
