"""From a checkpoint directory to params on devices, one layer at a time."""

from __future__ import annotations

import functools
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.checkpoint import FORMS, check_dtype, leaf_dtype, open_checkpoint, resolve_schedule
from checkpoints_convert.huggingface import HuggingFaceCheckpoint
from checkpoints_convert.orbax_io import OrbaxCheckpoint
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor, leaves

Bounds = tuple[tuple[int, int], ...]  # [start, stop) of every axis of a tensor
Parts = dict[Bounds, list[Any]]  # the devices that hold a part; None is the default device
_ALIGNMENT = 64  # bytes; JAX takes over host memory aligned so without a copy


def load(
    directory: str | pathlib.Path,
    schedule: Schedule | str | None = None,
    dtype: Any = None,
    shardings: Any = None,
    form: str = "params",
) -> tuple[Config, Schedule, Any]:
    """(config, schedule, weights) of a Hugging Face safetensors directory or an orbax one.

    Args:
      schedule: instead of the one in config.json; every layer it makes F must have indexer weights.
      dtype: bfloat16, float32 or float16 for the weights; None keeps bfloat16 (also for FP8) and float32, and widens
        float16. The router bias is float32 in any case.
      shardings: one sharding for all leaves or a tree of them, like the weights; None leaves everything on the default
        device. A device is given the slices it needs and no others are read for it from safetensors.
      form: "params" for training and the search, "serving" for `serving.Weights`, which inference runs. Either tree is
        filled straight from the files: no other copy of the weights exists.

    Host memory beyond the result on a CPU is a few MiB; on other devices one layer of one leaf. From orbax, whose leaves
    are params, serving weights take up to three times one layer of one leaf.

    ValueError names the file and the tensor or field for whatever is missing, misshapen, truncated or unsupported, and
    all headers are checked before a weight is read. Stored tensors without a use are left out, with a warning.
    """
    checkpoint, schedule, tree = opened(directory, schedule, dtype, form)
    placements = _per_leaf(tree, shardings, form, schedule)

    def place(tensor: Tensor, sharding: jax.sharding.Sharding | None) -> jax.Array:
        return _place(tensor, leaf_dtype(checkpoint, tensor, dtype), sharding, functools.partial(checkpoint.fill, tensor))

    arrays = [place(tensor, sharding) for (_, tensor), sharding in zip(leaves(tree), placements, strict=True)]
    return checkpoint.config, schedule, jax.tree.unflatten(jax.tree.structure(tree), arrays)


def opened(
    directory: str | pathlib.Path, schedule: Schedule | str | None, dtype: Any, form: str = "params"
) -> tuple[HuggingFaceCheckpoint | OrbaxCheckpoint, Schedule, Any]:
    """(checkpoint, schedule, abstract tree) that `load` reads, all headers checked; warns of what is left out."""
    if form not in FORMS:
        raise ValueError(f"form: {form!r} is not one of {', '.join(FORMS)}")
    check_dtype(dtype)
    checkpoint = open_checkpoint(directory)
    schedule = resolve_schedule(checkpoint, schedule)
    tree = FORMS[form](checkpoint.config, schedule)
    checkpoint.check(tree)
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        for line in checkpoint.left_out(schedule):
            warnings.warn(f"{directory}: {line}", stacklevel=3)
    return checkpoint, schedule, tree


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


def _place(tensor: Tensor, dtype: np.dtype, sharding: jax.sharding.Sharding | None, fill: Callable[..., None]) -> jax.Array:
    """A leaf as a JAX array. fill(layer, out, part) writes a part of one of its layers; each device's part is read once."""
    parts: Parts = {}
    if sharding is None:
        parts[tuple((0, size) for size in tensor.shape)] = [None]
        on_cpu = jax.default_backend() == "cpu"
    else:
        for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
            bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), tensor.shape, strict=True))
            parts.setdefault(bounds, []).append(device)
        on_cpu = all(device.platform == "cpu" for devices in parts.values() for device in devices)
    direct = on_cpu or not tensor.stacked
    shards = _filled(tensor, dtype, parts, fill) if direct else _staged(tensor, dtype, parts, fill)
    if sharding is None:
        return shards[None]
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, list(shards.values()))


def _layers_of(tensor: Tensor, bounds: Bounds) -> tuple[tuple[int | None, ...], tuple[slice, ...]]:
    """The layers in a part of a stacked tensor, and the part of each of them."""
    return tensor.every_layer[slice(*bounds[0])], tuple(slice(*axis) for axis in bounds[1:])


def _filled(tensor: Tensor, dtype: np.dtype, parts: Parts, fill: Callable[..., None]) -> dict[Any, jax.Array]:
    """Every device's part, put together on the host; an array on a CPU takes that memory over."""
    shards: dict[Any, jax.Array] = {}
    for bounds, devices in parts.items():
        out = aligned(tuple(stop - start for start, stop in bounds), dtype)
        if tensor.stacked:
            layers, part = _layers_of(tensor, bounds)
            for i, layer in enumerate(layers):
                fill(layer, out[i], part)
        else:
            fill(tensor.every_layer[0], out, tuple(slice(*axis) for axis in bounds))
        for device in devices:
            shards[device] = jax.device_put(out, device)
    return shards


def _staged(tensor: Tensor, dtype: np.dtype, parts: Parts, fill: Callable[..., None]) -> dict[Any, jax.Array]:
    """Every device's part of a stacked tensor, sent layer by layer."""
    shards: dict[Any, jax.Array] = {}
    for bounds, devices in parts.items():
        shape = tuple(stop - start for start, stop in bounds)
        buffers = {device: jnp.zeros(shape, dtype, device=device) for device in devices}
        stage = aligned(shape[1:], dtype)
        layers, part = _layers_of(tensor, bounds)
        for i, layer in enumerate(layers):
            fill(layer, stage, part)
            for device in devices:
                sent = jax.device_put(stage, device)
                # Waiting frees the copy, and `stage`, which JAX may have lent to it, before the next layer.
                buffers[device] = _set_layer(buffers[device], sent, np.int32(i)).block_until_ready()
        shards |= buffers
    return shards


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, slot, axis=0)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty that jax.device_put turns into a CPU array without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
