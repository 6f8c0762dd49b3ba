"""A checkpoint whose weights are read when they are needed: for models that no device holds whole."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from checkpoints_convert.checkpoint import leaf_dtype
from checkpoints_convert.load import aligned, opened
from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor, leaves


class Layers:
    """A Hugging Face or orbax directory as the source of `indexcache_jax.search.streamed`; arguments and errors as for `load`.

    Params are arrays on the host, as many as were asked for and None elsewhere. All headers are checked at once.
    """

    config: Config
    schedule: Schedule

    def __init__(self, directory: str | pathlib.Path, schedule: Schedule | str | None = None, dtype: Any = None) -> None:
        self._checkpoint, self.schedule, self._tree = opened(directory, schedule, dtype)
        self._dtype, self.config = dtype, self._checkpoint.config

    @property
    def num_bytes(self) -> int:
        """Of all weights as they are read."""
        sizes = [(t, leaf_dtype(self._checkpoint, t, self._dtype).itemsize) for _, t in leaves(self._tree)]
        return sum(math.prod(tensor.shape) * itemsize for tensor, itemsize in sizes)

    def ends(self) -> Params:
        """Embedding, final norm and head."""
        return self._some(lambda tensor: tensor.layers is None, None)

    def layer(self, layer: int) -> Params:
        """Stacks of one layer."""
        return self._some(lambda tensor: layer in (tensor.layers or ()), layer)

    def _some(self, wanted: Callable[[Tensor], bool], layer: int | None) -> Params:
        arrays = [self._read(tensor, layer) if wanted(tensor) else None for _, tensor in leaves(self._tree)]
        return jax.tree.unflatten(jax.tree.structure(self._tree), arrays)

    def _read(self, tensor: Tensor, layer: int | None) -> np.ndarray:
        shape = tensor.layer_shape if layer is None else (1, *tensor.layer_shape)
        out = aligned(shape, leaf_dtype(self._checkpoint, tensor, self._dtype))
        self._checkpoint.fill(tensor, layer, out if layer is None else out[0])
        return out
