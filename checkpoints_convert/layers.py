"""A checkpoint whose weights are read when they are needed: for models that no device holds whole."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from checkpoints_convert.checkpoint import leaf_dtype
from checkpoints_convert.load import aligned, opened
from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Part, Tensor


class Layers:
    """A Hugging Face or orbax directory as the source of `indexcache_jax.search.streamed`; arguments and errors as for `load`.

    Params are the arrays that were asked for and None elsewhere. They are on the host or, with a tree of shardings for all
    Params of the model, on devices: of each array this process reads only the parts that its own devices hold, each part
    once. All headers are checked at once.
    """

    config: Config
    schedule: Schedule

    def __init__(self, directory: str | pathlib.Path, schedule: Schedule | str | None = None, dtype: Any = None) -> None:
        self._checkpoint, self.schedule, self._tree = opened(directory, schedule, dtype)
        self._dtype, self.config = dtype, self._checkpoint.config

    @property
    def num_bytes(self) -> int:
        """Of all weights as they are read."""
        return sum(math.prod(tensor.shape) * self._dtype_of(tensor).itemsize for tensor in jax.tree.leaves(self._tree))

    def device_bytes(self, shardings: Params) -> int:
        """Of all weights that one device holds where they lie so."""
        placements = zip(jax.tree.leaves(self._tree), jax.tree.leaves(shardings), strict=True)
        return sum(math.prod(at.shard_shape(tensor.shape)) * self._dtype_of(tensor).itemsize for tensor, at in placements)

    def _dtype_of(self, tensor: Tensor) -> np.dtype:
        return leaf_dtype(self._checkpoint, tensor, self._dtype)

    def ends(self, shardings: Params | None = None) -> Params:
        """Embedding, final norm and head."""
        return self._some(lambda tensor: tensor.layers is None, None, shardings)

    def layer(self, layer: int, shardings: Params | None = None) -> Params:
        """Stacks of one layer."""
        return self._some(lambda tensor: layer in (tensor.layers or ()), layer, shardings)

    def _some(self, wanted: Callable[[Tensor], bool], layer: int | None, shardings: Params | None) -> Params:
        tensors = jax.tree.leaves(self._tree)
        placements = [None for _ in tensors] if shardings is None else jax.tree.leaves(shardings)

        def read(tensor: Tensor, at: Sharding | None) -> np.ndarray | jax.Array:
            shape = tensor.layer_shape if layer is None else (1, *tensor.layer_shape)
            everything = (slice(None),) * len(shape)
            return self._part(tensor, layer, shape, everything) if at is None else self._place(tensor, layer, shape, at)

        arrays = [read(t, at) if wanted(t) else None for t, at in zip(tensors, placements, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self._tree), arrays)

    def _place(self, tensor: Tensor, layer: int | None, shape: tuple[int, ...], at: Sharding) -> jax.Array:
        """A tensor on this process's devices, part by part."""
        devices: dict[tuple[tuple[int, int, int], ...], list[jax.Device]] = {}
        for device, index in at.addressable_devices_indices_map(shape).items():
            bounds = tuple(axis.indices(size) for axis, size in zip(index or (), shape, strict=True))
            devices.setdefault(bounds, []).append(device)
        shards = []
        for bounds, holders in devices.items():
            part = self._part(tensor, layer, shape, tuple(slice(*axis) for axis in bounds))
            # Waiting frees the host memory of a part before the next one is read.
            shards += jax.block_until_ready([jax.device_put(part, device) for device in holders])
        return jax.make_array_from_single_device_arrays(shape, at, shards)

    def _part(self, tensor: Tensor, layer: int | None, shape: tuple[int, ...], part: Part) -> np.ndarray:
        """A part of a tensor, of `shape`, on the host."""
        sizes = tuple(len(range(*axis.indices(size))) for axis, size in zip(part, shape, strict=True))
        out = aligned(sizes, self._dtype_of(tensor))
        if layer is None:
            self._checkpoint.fill(tensor, None, out, part)
        else:
            self._checkpoint.fill(tensor, layer, out[0], part[1:])
        return out
