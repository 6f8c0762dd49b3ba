"""The leaves of one tree, in memory or in an orbax checkpoint, as the source of any other tree of the same model.

Both trees describe their leaves by the stored tensors that fill them (`indexcache_jax.tensors.Source`). A leaf that both
have alike, such as the routed experts, is read as it is; any other is put together from the stored tensors it is made of,
which are rebuilt one at a time. So params give serving weights and serving weights give params.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from indexcache_jax.tensors import Part, Source, Tensor, leaves, whole


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf that is there: its path, its description, and which of its layers is meant."""

    path: str
    tensor: Tensor
    layer: int | None


class Leaves:
    """A source of weights over the leaves of an abstract `tree`. A subclass reads them (`read`)."""

    def __init__(self, tree: Any) -> None:
        self.leaves: dict[str, Tensor] = dict(leaves(tree))
        self._parts: dict[str, list[tuple[Leaf, Source]]] = {}  # by the stored tensor's name
        for path, tensor in self.leaves.items():
            for layer in tensor.every_layer:
                for source in tensor.stored(layer):
                    self._parts.setdefault(source.name, []).append((Leaf(path, tensor, layer), source))

    def read(self, leaf: Leaf, part: Part, out: np.ndarray) -> None:
        """Writes a part of one layer of a leaf into `out`, which has the part's shape."""
        raise NotImplementedError

    def stored_in(self, tensor: Tensor, layer: int | None) -> list[str]:
        """The paths of the leaves that one layer of a tensor is made from, or [] where a stored tensor is not there."""
        parts = [self._parts.get(source.name, []) for source in tensor.stored(layer)]
        return [leaf.path for found in parts for leaf, _ in found] if all(parts) else []

    def fill(self, tensor: Tensor, layer: int | None, out: np.ndarray, part: Part | None = None) -> None:
        """Writes one layer of a tensor, which may be another tree's, into `out`, or only a part of it."""
        sources, part = tensor.stored(layer), whole(tensor.layer_shape) if part is None else part
        alike = self._parts[sources[0].name][0][0]
        if alike.tensor.layer_shape == tensor.layer_shape and alike.tensor.stored(alike.layer) == sources:
            self.read(alike, part, out)
            return
        for source in sources:
            if (window := source.window(tensor.layer_shape, part)) is not None:
                start, stop = window.rows
                rows = source.shape[0] // source.view[0]  # of the stored tensor, to an entry of the view
                source.fill(out, window, start, self._rebuilt(source, out.dtype)[start * rows : stop * rows])

    def _rebuilt(self, wanted: Source, dtype: np.dtype) -> np.ndarray:
        """A stored tensor, from every leaf that holds a part of it."""
        stored = np.empty(wanted.shape, dtype)
        for leaf, source in self._parts[wanted.name]:
            region = source.region(leaf.tensor.layer_shape)
            part = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in region)
            shape = [len(range(*i.indices(size))) for i, size in zip(part, leaf.tensor.layer_shape, strict=True)]
            values = np.empty(shape, dtype)
            self.read(leaf, part, values)
            source.write(stored, values[tuple(0 if isinstance(i, int) else slice(None) for i in region)])
        return stored
