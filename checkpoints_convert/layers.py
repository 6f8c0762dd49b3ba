"""A checkpoint whose weights are read when they are needed: for models that no device holds whole."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from checkpoints_convert.checkpoint import leaf_dtype
from checkpoints_convert.load import aligned, opened, parts_held
from indexcache_jax import arguments
from indexcache_jax.config import Config
from indexcache_jax.params import Params, weights_of
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor


class Layers:
    """A Hugging Face or orbax directory as the source of `indexcache_jax.search.streamed`; arguments and errors as for `load`.

    Params are the arrays that were asked for and None elsewhere. A tree of shardings for all Params of the model says where
    they lie: of each array this process reads the parts that its own devices hold, each once. Without one everything is on
    the default device. All headers are checked at once.
    """

    config: Config
    schedule: Schedule
    weights: str | None  # the form of the params, as `params.abstract` names it

    def __init__(
        self,
        directory: str | pathlib.Path,
        schedule: Schedule | str | None = None,
        dtype: Any = None,
        weights: str | None = None,
    ) -> None:
        self._checkpoint, self.schedule, self._tree = opened(directory, schedule, dtype, weights=weights)
        self._dtype, self.config, self.weights = dtype, self._checkpoint.config, weights_of(self._tree)

    def _dtype_of(self, tensor: Tensor) -> np.dtype:
        return leaf_dtype(self._checkpoint, tensor, self._dtype)

    def ends(self, shardings: Params | None = None) -> Params:
        """Embedding, final norm and head."""
        return self._some(lambda tensor: tensor.layers is None, None, shardings)

    def layer(self, layer: int, shardings: Params | None = None) -> Params:
        """Stacks of one layer. ValueError for what is no layer."""
        layer = arguments.integer("layer", layer, 0, self.config.num_layers - 1)
        return self._some(lambda tensor: layer in (tensor.layers or ()), layer, shardings)

    def _some(self, wanted: Callable[[Tensor], bool], layer: int | None, shardings: Params | None) -> Params:
        tensors = jax.tree.leaves(self._tree)
        placements = [None for _ in tensors] if shardings is None else jax.tree.leaves(shardings)
        arrays = [
            self._place(tensor, layer, sharding) if wanted(tensor) else None
            for tensor, sharding in zip(tensors, placements, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(self._tree), arrays)

    def _place(self, tensor: Tensor, layer: int | None, sharding: Sharding | None) -> jax.Array:
        """A tensor on this process's devices, part by part.

        Parts are sent whole: to put one together on a device, as `load` does, takes programs that would wait for those of
        the layer before, which run meanwhile.
        """
        shape = tensor.layer_shape if layer is None else (1, *tensor.layer_shape)
        shards: list[jax.Array] = []
        for bounds, devices in parts_held(shape, sharding).items():
            out = aligned(tuple(stop - start for start, stop in bounds), self._dtype_of(tensor))
            part = tuple(slice(*axis) for axis in bounds)
            if layer is None:
                self._checkpoint.fill(tensor, None, out, part)
            else:
                self._checkpoint.fill(tensor, layer, out[0], part[1:])
            # Waiting frees the host memory of a part before the next one is read.
            shards += jax.block_until_ready([jax.device_put(out, device) for device in devices])
        return shards[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, shards)
