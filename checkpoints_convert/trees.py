"""The leaves of one tree, in memory or in an orbax checkpoint, as the source of any other tree of the same model.

Both trees describe their leaves by the stored tensors that fill them (`indexcache_jax.tensors.Source`). A leaf that both
have alike, such as the routed experts, is read as it is; any other is put together from the leaves that hold the same
stored tensors. So params give serving weights and serving weights give params. What is needed of a leaf is read straight
into its place, and nothing else of it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from indexcache_jax.tensors import SCALES, Part, Source, Tensor, Window, leaves, whole

# The dtypes that leaves of each kind may have.
DTYPES_OF = {
    "weights": ("bfloat16", "float32", "float16"),
    "codes": ("float8_e4m3fn",),
    "scales": ("float32", "bfloat16", "float8_e8m0fnu", "uint8"),
}

Bounds = list[tuple[int, int]]  # [start, stop) of every axis


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

    def matrix(self, name: str) -> tuple[int, ...]:
        """The shape of a stored matrix."""
        return self._parts[name][0][1].shape

    def scales_of(self, name: str) -> Tensor | None:
        """The scales of a stored matrix, by block or by row as the leaves hold them; None where it is not in 8 bits."""
        if (held := self._parts.get(name + SCALES)) is None:
            return None
        source = held[0][1]
        stored = Source(source.name, source.shape, source.shape, (0, 1), repeats=source.repeats)
        return Tensor(source.shape, (None, None), "constant", 1.0, (stored,), kind="scales")

    def holds(self, source: Source, kind: str) -> bool:
        """Whether the leaves hold what a tensor of this kind is made from in the form that it wants."""
        scales = self.scales_of(source.name.removesuffix(SCALES) if kind == "scales" else source.name)
        if kind == "scales":
            return scales is not None and scales.sources[0].repeats == source.repeats
        return (scales is not None) == (kind == "codes")

    def read(self, leaf: Leaf, part: Part, out: np.ndarray) -> None:
        """Writes a part of one layer of a leaf into `out`, which has the part's shape and any strides."""
        raise NotImplementedError

    def stored_in(self, tensor: Tensor, layer: int | None) -> list[str]:
        """The paths of the leaves that one layer of a tensor is made from, or [] where a stored tensor is not there."""
        parts = [self._parts.get(source.name, []) for source in tensor.stored(layer)]
        return [leaf.path for found in parts for leaf, _ in found] if all(parts) else []

    def scales_in(self, tensor: Tensor, layer: int | None) -> list[str]:
        """The paths of the scales of the codes that one layer of a tensor is made from."""
        return [leaf.path for source in tensor.stored(layer) for leaf, _ in self._parts.get(source.name + SCALES, [])]

    def fill(self, tensor: Tensor, layer: int | None, out: np.ndarray, part: Part | None = None) -> None:
        """Writes one layer of a tensor, which may be another tree's, into `out`, or only a part of it."""
        sources, part = tensor.stored(layer), whole(tensor.layer_shape) if part is None else part
        alike = self._parts[sources[0].name][0][0]
        if alike.tensor.layer_shape == tensor.layer_shape and alike.tensor.stored(alike.layer) == sources:
            self.read(alike, part, out)
            return
        for source in sources:
            if (window := source.window(tensor.layer_shape, part)) is not None:
                self._fill_window(source, window, out)

    def _fill_window(self, wanted: Source, window: Window, out: np.ndarray) -> None:
        """Writes what a source fills in a part `out`, from every leaf that holds something of its stored tensor.

        Leaves are read into a region of the stored tensor. It lies in `out` itself unless a part cuts through the rows of
        a head, so that leaves which keep heads apart cannot be read into it.
        """
        held = self._parts[wanted.name]
        # With one view in common its axes need no conversion; else all views are taken as splits of the stored axes.
        shape = wanted.view if all(source.view == wanted.view for _, source in held) else wanted.shape
        split = _Split.of(wanted.view, shape)
        units = [math.lcm(*(_Split.of(source.view, shape).units[axis] for _, source in held)) for axis in range(len(shape))]
        exact = split.merged(list(window.bounds))
        region = [
            (start - start % unit, stop + -stop % unit)
            for (start, stop), unit in zip(exact, map(math.lcm, units, split.units), strict=True)
        ]
        sizes = [stop - start for start, stop in region]
        target = wanted.viewed(out, window)
        stored = target.reshape(sizes) if math.prod(sizes) == target.size else None
        if stored is None or not np.may_share_memory(stored, out):
            stored = np.empty(sizes, out.dtype)
        for leaf, source in held:
            self._read_region(leaf, source, shape, region, stored)
        if not np.may_share_memory(stored, out):
            within = split.bounds(region)
            values = stored.reshape([stop - start for start, stop in within])
            starts = [start for start, _ in within]
            target[...] = values[
                tuple(slice(a - first, b - first) for (a, b), first in zip(window.bounds, starts, strict=True))
            ]

    def _read_region(self, leaf: Leaf, source: Source, shape: tuple[int, ...], region: Bounds, stored: np.ndarray) -> None:
        """Reads what a leaf holds of a region of a stored tensor of `shape` into `stored`, the array of that region."""
        within = _Split.of(source.view, shape).bounds(region)
        values = stored.reshape([stop - start for start, stop in within])
        part: list[slice] = []
        for axis, ((start, stop), size) in enumerate(zip(within, source.view, strict=True)):
            first, last, _ = (source.take[axis] if axis < len(source.take) else slice(None)).indices(size)
            low, high = max(start, first), min(stop, last)
            if low >= high:
                return
            values = values[(slice(None),) * axis + (slice(low - start, high - start),)]
            part.append(slice(low - first, high - first))
        values, axes = values.transpose(source.perm), iter(part[axis] for axis in source.perm)
        cut, single = [], []
        for axis, (at, size) in enumerate(zip(source.region(leaf.tensor.layer_shape), leaf.tensor.layer_shape, strict=True)):
            if isinstance(at, int):
                cut.append(slice(at, at + 1))
                single.append(axis)
            else:
                offset, taken = at.indices(size)[0], next(axes)
                cut.append(slice(offset + taken.start, offset + taken.stop))
        self.read(leaf, cut, np.expand_dims(values, tuple(single)))


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the axes of a view are splits of the axes of a stored tensor: the view's sizes that make up each of its axes."""

    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, view: tuple[int, ...], shape: tuple[int, ...]) -> _Split:
        groups, sizes = [], iter(view)
        for size in shape:
            group = [next(sizes)]
            while math.prod(group) < size:
                group.append(next(sizes))
            groups.append(tuple(group))
        assert tuple(size for group in groups for size in group) == view, (view, shape)
        return cls(tuple(groups))

    @property
    def units(self) -> list[int]:
        """For every stored axis, how many of its entries make one of the view's axis that is outermost in it."""
        return [math.prod(group[1:]) for group in self.groups]

    def merged(self, bounds: Bounds) -> Bounds:
        """The least bounds of the stored axes that hold those of the view's axes."""
        rest = iter(bounds)
        return [self._merge(group, [next(rest) for _ in group]) for group in self.groups]

    @staticmethod
    def _merge(group: tuple[int, ...], bounds: Bounds) -> tuple[int, int]:
        strides = [math.prod(group[axis + 1 :]) for axis in range(len(group))]
        first = sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
        last = sum((stop - 1) * stride for (_, stop), stride in zip(bounds, strides, strict=True))
        return first, last + 1

    def bounds(self, region: Bounds) -> Bounds:
        """The bounds of the view's axes for a region whose bounds are multiples of `units`."""
        return list(self._bounds(region))

    def _bounds(self, region: Bounds) -> Iterator[tuple[int, int]]:
        for group, unit, (start, stop) in zip(self.groups, self.units, region, strict=True):
            yield start // unit, stop // unit
            yield from ((0, size) for size in group[1:])
