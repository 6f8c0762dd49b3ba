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

from checkpoints_convert.checkpoint import check_dtype, leaf_dtype, open_checkpoint, resolve_schedule
from checkpoints_convert.huggingface import HuggingFaceCheckpoint
from checkpoints_convert.orbax_io import OrbaxCheckpoint
from indexcache_jax.config import Config
from indexcache_jax.params import Params, Tensor, abstract, leaves
from indexcache_jax.schedule import Schedule

_ALIGNMENT = 64  # bytes; JAX takes over host memory aligned so without a copy


def load(
    directory: str | pathlib.Path,
    schedule: Schedule | str | None = None,
    dtype: Any = None,
    shardings: Params | jax.sharding.Sharding | None = None,
) -> tuple[Config, Schedule, Params]:
    """(config, schedule, params) of a Hugging Face safetensors directory or an orbax one.

    schedule: instead of the one in config.json; every layer it makes F must have indexer weights. dtype: bfloat16,
    float32 or float16 for the weights; None keeps bfloat16 (also for FP8) and float32, and widens float16. The router
    bias is float32 in any case. shardings: one sharding for all leaves or a tree of them, like params; None leaves
    everything on the default device. Host memory beyond the result on a CPU is a few MiB; on other devices one layer
    of one leaf.

    ValueError names the file and the tensor or field for whatever is missing, misshapen, truncated or unsupported, and
    all headers are checked before a weight is read. Stored tensors without a use are left out, with a warning.
    """
    checkpoint, schedule, tree = opened(directory, schedule, dtype)
    placements = _per_leaf(tree, shardings)

    def one(path: str, tensor: Tensor, sharding: jax.sharding.Sharding | None) -> jax.Array:
        return _place(
            tensor, leaf_dtype(checkpoint, path, tensor, dtype), sharding, functools.partial(checkpoint.fill, path, tensor)
        )

    arrays = [one(path, tensor, sharding) for (path, tensor), sharding in zip(leaves(tree), placements, strict=True)]
    return checkpoint.config, schedule, jax.tree.unflatten(jax.tree.structure(tree), arrays)


def opened(
    directory: str | pathlib.Path, schedule: Schedule | str | None, dtype: Any
) -> tuple[HuggingFaceCheckpoint | OrbaxCheckpoint, Schedule, Params]:
    """(checkpoint, schedule, abstract tree) that `load` reads, all headers checked; warns of what is left out."""
    check_dtype(dtype)
    checkpoint = open_checkpoint(directory)
    schedule = resolve_schedule(checkpoint, schedule)
    tree = abstract(checkpoint.config, schedule)
    checkpoint.check(tree)
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        for line in checkpoint.left_out(schedule):
            warnings.warn(f"{directory}: {line}", stacklevel=3)
    return checkpoint, schedule, tree


def _per_leaf(tree: Params, shardings: Any) -> list[jax.sharding.Sharding | None]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return [shardings for _ in leaves(tree)]
    found = jax.tree.leaves(shardings)
    alike = jax.tree.structure(shardings) == jax.tree.structure(tree)  # type: ignore[operator]
    if not alike or not all(isinstance(sharding, jax.sharding.Sharding) for sharding in found):
        raise ValueError("shardings: not a tree like the params of this config and schedule, and not one sharding")
    return found


def _place(
    tensor: Tensor, dtype: np.dtype, sharding: jax.sharding.Sharding | None, fill: Callable[[int | None, np.ndarray], None]
) -> jax.Array:
    """A leaf as a JAX array, filled layer by layer by fill(layer, out)."""
    if sharding is None:
        parts: dict[Any, Any] = {None: (slice(None),) * len(tensor.shape)}
        on_cpu = jax.default_backend() == "cpu"
    else:
        parts = dict(sharding.addressable_devices_indices_map(tensor.shape))
        on_cpu = all(device.platform == "cpu" for device in parts)
    if tensor.layers is None:
        out = aligned(tensor.shape, dtype)
        fill(None, out)
        return jax.device_put(out) if sharding is None else jax.make_array_from_callback(out.shape, sharding, out.__getitem__)
    if on_cpu and len(parts) == 1:
        out = aligned(tensor.shape, dtype)
        for slot, layer in enumerate(tensor.layers):
            fill(layer, out[slot])
        return jax.device_put(out, sharding)
    shape = tensor.shape if sharding is None else sharding.shard_shape(tensor.shape)
    buffers = {device: jnp.zeros(shape, dtype, device=device) for device in parts}
    stage = aligned(tensor.layer_shape, dtype)
    for slot, layer in enumerate(tensor.layers):
        here = {d: index for d, index in parts.items() if slot in range(*index[0].indices(len(tensor.layers)))}
        if here:
            fill(layer, stage)
        for device, index in here.items():
            first = index[0].indices(len(tensor.layers))[0]
            part = jax.device_put(stage[index[1:]], device)
            # Waiting frees the copy, and `stage`, which JAX may have lent to it, before the next layer.
            buffers[device] = _set_layer(buffers[device], part, np.int32(slot - first)).block_until_ready()
    if sharding is None:
        return buffers[None]
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, list(buffers.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, slot, axis=0)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty that jax.device_put turns into a CPU array without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
