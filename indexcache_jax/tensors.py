"""The language in which every tree of a model's tensors is described: shape, axes, initialiser and checkpoint tensors.

A tree of `Tensor`s is a tree of arrays before it exists. `params.abstract` describes the stacked tree of training and
conversion, `serving.weights.abstract` the tree that inference runs. Whatever depends on a tensor alone reads its
`Tensor`: initialisation, shardings, the converter's shape checks, loading and export, for either tree.

A matrix in 8 bits is a `Scaled` of two `Tensor`s, its codes and their scales (`in_codes`), which are stored, placed and sent
like any others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant import BLOCK, Scaled

SCALES = "_scale_inv"  # what follows a stored matrix's name in that of its scales, which are multipliers nevertheless
CODE = "float8_e4m3fn"
RANDOM_CODE = 64.0  # the standard deviation of random codes: the largest draw is below the largest code

Axes = tuple[str | None, ...]  # the logical axes of an array's dimensions, None for a dimension that is never split
Part = Sequence[slice]  # a slice for every axis of a layer's tensor, step 1


@dataclasses.dataclass(frozen=True)
class Window:
    """The region that a source fills in a part of its tensor.

    bounds: the needed entries [start, stop) of every axis of the source's view. cut: a slice of every axis of what
    `Source.read` returns for all rows. into: where that region lies in the part.
    """

    bounds: tuple[tuple[int, int], ...]
    cut: tuple[slice, ...]
    into: tuple[int | slice, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """The needed entries of the view's first axis."""
        return self.bounds[0]

    def run(self, view: tuple[int, ...]) -> tuple[int, int]:
        """The elements [first, last) of each of `rows` that all needed ones lie between; `view` is the source's."""
        strides = [math.prod(view[axis + 1 :]) for axis in range(1, len(view))]
        inner = list(zip(self.bounds[1:], strides, strict=True))
        return sum(start * stride for (start, _), stride in inner), sum((stop - 1) * stride for (_, stop), stride in inner) + 1


@dataclasses.dataclass(frozen=True)
class Source:
    """One checkpoint tensor, and the region of one layer's tensor that it fills.

        tensor[at] = stored.reshape(view)[take].transpose(perm)

    Example: `kv_b_proj` [H (dn + dv), C] holds the key and the value rows of every head, so k_up [H, dn, C] has view
    [H, dn + dv, C], take [:, :dn] and the identity as perm. `take` must keep the first axis of `view` whole, so that the
    stored tensor can be streamed in slabs along it. With `repeats` a stored row stands for so many rows of the tensor
    described, its last one for what is left: the scales of blocks of rows, as those of single rows.
    """

    name: str  # with {layer}
    shape: tuple[int, ...]
    view: tuple[int, ...]
    perm: tuple[int, ...]
    take: tuple[slice, ...] = ()
    at: tuple[int | slice, ...] = ()
    repeats: int = 1

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return (-(-self.shape[0] // self.repeats), *self.shape[1:])

    @property
    def row_axis(self) -> int:
        """The axis of `tensor[at]` along which the first axis of `view` runs."""
        return self.perm.index(0)

    def read(self, slab: np.ndarray) -> np.ndarray:
        """The view of `slab`, whole entries of the first axis of the stored tensor's view, as `tensor[at]` has it."""
        return slab.reshape(-1, *self.view[1:])[self.take].transpose(self.perm)

    def write(self, slab: np.ndarray, part: np.ndarray) -> None:
        """Writes `part`, whole entries of `tensor[at]` along `row_axis`, into `slab`: the inverse of `read`."""
        slab.reshape(-1, *self.view[1:])[self.take] = part.transpose(np.argsort(self.perm))

    def region(self, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
        """`at` with an entry for every axis of a tensor of `shape`."""
        return (*self.at, *(slice(None),) * (len(shape) - len(self.at)))

    def window(self, shape: tuple[int, ...], part: Part) -> Window | None:
        """What this source fills in `part` of a layer's tensor of `shape`; None where that is nothing."""
        cut: list[slice] = []
        into: list[int | slice] = []
        for size, region, wanted in zip(shape, self.region(shape), part, strict=True):
            first, last, _ = wanted.indices(size)
            if isinstance(region, int):
                if not first <= region < last:
                    return None
                into.append(region - first)
                continue
            start, stop, _ = region.indices(size)
            low, high = max(first, start), min(last, stop)
            if low >= high:
                return None
            cut.append(slice(low - start, high - start))
            into.append(slice(low - first, high - first))
        taken = (*self.take, *(slice(None),) * (len(self.view) - len(self.take)))
        offsets = [axis.indices(size)[0] for axis, size in zip(taken, self.view, strict=True)]
        of_view = [cut[axis] for axis in np.argsort(self.perm)]
        bounds = [(offset + axis.start, offset + axis.stop) for offset, axis in zip(offsets, of_view, strict=True)]
        return Window(tuple(bounds), tuple(cut), tuple(into))

    def viewed(self, out: np.ndarray, window: Window) -> np.ndarray:
        """What the window fills in a part `out`, with the axes of the view: window.bounds of it, without a copy."""
        return out[window.into].transpose(np.argsort(self.perm))

    def fill(self, out: np.ndarray, window: Window, start: int, slab: np.ndarray) -> None:
        """Writes `slab`, the entries of the view from `start` on and within window.rows, into a part `out`."""
        first, axis = window.rows[0], self.row_axis
        values = self.read(slab)
        count = values.shape[axis]
        columns = tuple(slice(None) if i == axis else cut for i, cut in enumerate(window.cut))
        rows = (slice(None),) * axis + (slice(start - first, start - first + count),)
        out[window.into][rows] = values[columns]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A leaf of an abstract tree.

    layers: the layers whose weights it holds, None where it belongs to no layer. stacked: whether its first axis runs
    over them; `shape` and `axes` include that axis. scale: the standard deviation of its initial values, for the
    initialisers "normal" and "embedding"; the value itself for "constant".
    kind: "weights", or "codes" or "scales" of a matrix in 8 bits.
    """

    shape: tuple[int, ...]
    axes: Axes
    init: str  # "normal", "embedding", "constant", "ones" or "zeros"
    scale: float
    sources: tuple[Source, ...]
    layers: tuple[int, ...] | None = None
    stacked: bool = False
    dtype: str | None = None  # where it differs from the model's
    kind: str = "weights"

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's tensor: without the axis over layers."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def every_layer(self) -> tuple[int | None, ...]:
        """`layers`, or (None,) where it belongs to no layer."""
        return (None,) if self.layers is None else self.layers

    def stored(self, layer: int | None) -> tuple[Source, ...]:
        """The sources of one layer, with their names in the checkpoint."""
        return tuple(dataclasses.replace(source, name=source.name.format(layer=layer)) for source in self.sources)


def as_stored(name: str, shape: tuple[int, ...], at: tuple[int | slice, ...] = ()) -> Source:
    """The source of a tensor, or of its region `at`, that is kept as the checkpoint stores it."""
    return Source(name, shape, shape, tuple(range(len(shape))), at=at)


def in_codes(matrix: Tensor) -> Scaled:
    """A matrix [..., out, in], made of stored matrices [out, in] that are not transposed, as codes and scales of them.

    There is a scale for every block of 128 x 128 codes where the rows of each stored matrix begin with a block. Otherwise,
    and where only some rows of a stored matrix are in it, there is one for 128 codes of a row: that of the row's block.
    """
    *stacked, rows, columns = matrix.shape
    across = -(-columns // BLOCK)
    first_rows = [source.region(matrix.layer_shape)[-2] for source in matrix.sources]
    starts = [axis.indices(rows)[0] for axis in first_rows if isinstance(axis, slice)]
    by_block = all(source.view == source.shape for source in matrix.sources) and not any(start % BLOCK for start in starts)

    def scales_of(source: Source) -> Source:
        name, shape = source.name + SCALES, (*source.shape[:-1], across)
        if not by_block:
            return Source(name, shape, (*source.view[:-1], across), source.perm, source.take, source.at, repeats=BLOCK)
        shape = (-(-source.shape[0] // BLOCK), across)
        *at, of_rows, _ = source.region(matrix.layer_shape)
        assert isinstance(of_rows, slice)  # a stored matrix has both axes
        start, stop, _ = of_rows.indices(rows)
        return as_stored(name, shape, (*at, slice(start // BLOCK, -(-stop // BLOCK))))

    codes = dataclasses.replace(matrix, dtype=CODE, init="normal", scale=RANDOM_CODE, kind="codes")
    return Scaled(
        codes,
        dataclasses.replace(
            matrix,
            shape=(*stacked, -(-rows // BLOCK) if by_block else rows, across),
            init="constant",
            scale=matrix.scale / RANDOM_CODE,
            sources=tuple(map(scales_of, matrix.sources)),
            dtype="float32",
            kind="scales",
        ),
    )


def storing(weights: str | None) -> Callable[[Tensor], Any]:
    """What becomes of a tree's matrices: `in_codes` for "fp8", nothing for None. ValueError for any other text."""
    if weights not in (None, "fp8"):
        raise ValueError(f"weights: {weights!r} is neither fp8 nor None")
    return in_codes if weights == "fp8" else lambda matrix: matrix


def matrices(tree: Any) -> Iterator[tuple[str, Scaled]]:
    """The (path, `Scaled`) pairs of a tree; those are none whose arrays were taken out of it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Scaled)):
        if isinstance(leaf, Scaled) and leaf.codes is not None:
            yield _joined(path), leaf


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a tensor that is all of it."""
    return (slice(None),) * len(shape)


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The (path, leaf) pairs of a tree, such as ("attention.q_up", ...) or ("layers.3.down", ...)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _joined(path), leaf


def _joined(path: Sequence[Any]) -> str:
    return ".".join(str(key.name if isinstance(key, jax.tree_util.GetAttrKey) else key.idx) for key in path)


def count(tree: Any) -> int:
    """Number of weights of an abstract tree; scales are none."""
    return sum(math.prod(tensor.shape) for _, tensor in leaves(tree) if tensor.kind != "scales")


def shape_structs(tree: Any, dtype: Any, shardings: Any = None) -> Any:
    """An abstract tree as ShapeDtypeStructs: to lower a program, or to restore into, without allocating a weight.

    dtype: of every tensor that has none of its own. shardings: a tree of them like `tree`.
    """
    structs = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, jnp.dtype(t.dtype or dtype)), tree)
    if shardings is None:
        return structs
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), structs, shardings)


def init(key: jax.Array, tree: Any, dtype: Any = jnp.float32) -> Any:
    """Random arrays for an abstract tree: normal with each tensor's scale, norms 1, biases 0.

    Matrices in 8 bits get random codes, and scales that give their products the deviation of the matrix.
    """
    tensors, treedef = jax.tree.flatten(tree)

    def make(key: jax.Array, t: Tensor) -> jax.Array:
        kind = jnp.dtype(t.dtype or dtype)
        if t.init in ("ones", "zeros"):
            return jnp.full(t.shape, t.init == "ones", kind)
        if t.init == "constant":
            return jnp.full(t.shape, t.scale, kind)
        return (t.scale * jax.random.normal(key, t.shape, jnp.float32)).astype(kind)

    keys = jax.random.split(key, len(tensors))
    return jax.tree.unflatten(treedef, [make(k, t) for k, t in zip(keys, tensors, strict=True)])
