"""Where arrays lie on a mesh of devices, and the rules by which logical axes of tensors become axes of the mesh.

Every `Tensor` names its axes once ("heads", "expert", ...), and so does every activation that is constrained. `Rules` say
which axes of the mesh split each of them. Mesh and rules are put in force together by `use`, and are no argument of the
model's functions: `ops` and `moe`, where devices have to exchange something, ask for them here. docs/devices.md says what
each axis of the mesh means for weights, caches and results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from indexcache_jax.tensors import Axes, Tensor, leaves, matrices
from pallas_kernels.quant import BLOCK, Scaled

MeshAxes = str | tuple[str, ...] | None  # one axis of the mesh, several together, or none: replicated

# Rows of a batch (and, in training, weights); queries of a prompt; attention heads.
DATA, CONTEXT, TENSOR = AXES = ("data", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes that split each logical axis. A mesh without an axis leaves what it would split whole.

    Query and key latents, index heads and index keys are replicated by rule, so that all devices select the same.
    """

    # weights
    layer: MeshAxes = None
    embed: MeshAxes = None
    q_latent: MeshAxes = None
    heads: MeshAxes = None
    index_heads: MeshAxes = None
    vocab: MeshAxes = None
    mlp: MeshAxes = None
    expert: MeshAxes = None
    expert_embed: MeshAxes = None
    expert_mlp: MeshAxes = None
    # activations and caches
    batch: MeshAxes = None
    tokens: MeshAxes = None
    queries: MeshAxes = None
    latent: MeshAxes = None
    index: MeshAxes = None

    def whole_experts(self) -> Rules:
        """These rules with every expert on every device: nothing is exchanged, where the memory suffices."""
        return dataclasses.replace(self, expert=None)

    def split_cache(self) -> Rules:
        """These rules with the cached tokens of a row split over the context axis: for rows that fit no single device."""
        return dataclasses.replace(self, tokens=CONTEXT)


# Inference: rows over data, queries of a chunk over context, heads over tensor, experts over all devices.
SERVING = Rules(batch=DATA, queries=CONTEXT, heads=TENSOR, expert=AXES)
# Training: all of that, and what is replicated over data is split there with its optimiser state (fsdp).
TRAINING = dataclasses.replace(SERVING, embed=DATA)

# Part of the key of every compiled program, as the mesh is.
_RULES = jax.make_user_context(default_value=SERVING)


def make_mesh(data: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `devices`, by default all of all processes, with the axes data, context and tensor.

    Raises ValueError unless the product of the sizes is the number of devices.
    """
    devices, sizes = jax.devices() if devices is None else list(devices), (data, context, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"mesh {shown}: {math.prod(sizes)} devices, but there are {len(devices)}")
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh | AbstractMesh, rules: Rules = SERVING) -> Iterator[None]:
    """Puts a mesh and its rules in force for what is traced and run within."""
    in_force = jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)
    with in_force, _RULES(rules):
        yield


def current() -> tuple[AbstractMesh | None, Rules]:
    """The mesh and the rules in force. No mesh where there is one device, or the code is already that of each device.

    Raises ValueError for a mesh whose axes JAX expects every operation to name (AxisType.Explicit).
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), _RULES.value
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None, rules
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(f"mesh with axis_types {mesh.axis_types}: the axes must be Auto, as sharding.make_mesh makes them")
    return mesh, rules


def devices_along(axis: str) -> int:
    """The number of devices that a logical axis is split over by the mesh and the rules in force."""
    mesh, rules = current()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in names_of(spec((axis,), rules, mesh)[0]))


def computes_alone() -> bool:
    """Whether every device computes its rows' single tokens alone: it holds all heads, experts and tokens of its rows."""
    return current()[0] is not None and all(devices_along(axis) == 1 for axis in ("heads", "expert", "tokens"))


def names_of(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def spec(axes: Axes, rules: Rules, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical axes (None: replicated).

    Raises ValueError for an unknown axis, and where two dimensions would be split by the same axis of the mesh.
    """
    entries: list[tuple[str, ...]] = []
    for axis in axes:
        if axis is not None and not hasattr(rules, axis):
            raise ValueError(f"axis {axis!r} is not one of {[field.name for field in dataclasses.fields(rules)]}")
        names = names_of(None if axis is None else getattr(rules, axis))
        entries.append(tuple(name for name in names if name in mesh.axis_names))
    used = [name for entry in entries for name in entry]
    if twice := {name for name in used if used.count(name) > 1}:
        raise ValueError(f"axes {axes}: mesh axis {min(twice)!r} would split two of them")
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def fitting_spec(shape: tuple[int, ...], axes: Axes, rules: Rules, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` for an activation: a dimension that its devices do not divide is whole on each of them.

    So a single row, or the single query of a decode step, is computed alike by all devices that would share more.
    """

    def whole_unless_divided(size: int, entry: MeshAxes) -> MeshAxes:
        return entry if size % math.prod(mesh.shape[name] for name in names_of(entry)) == 0 else None

    return PartitionSpec(*map(whole_unless_divided, shape, spec(axes, rules, mesh)))


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """A tree of NamedShardings for an abstract tree: of params, serving weights or a cache.

    Raises ValueError that names tensor, axis, size and mesh size where an axis cannot be divided evenly, or a device would
    begin within a block of a matrix in 8 bits.
    """
    for path, matrix in matrices(tree):
        _check_blocks(path, matrix, matrix.codes.axes, tuple(spec(matrix.codes.axes, rules, mesh)), mesh)

    def of(path: str, tensor: Tensor) -> NamedSharding:
        entries = spec(tensor.axes, rules, mesh)
        for axis, size, entry in zip(tensor.axes, tensor.shape, entries, strict=True):
            names = names_of(entry)
            devices = math.prod(mesh.shape[name] for name in names)
            if size % devices:
                raise ValueError(f"{path}: axis {axis} of size {size} cannot be divided over {devices} devices of {names}")
        return NamedSharding(mesh, entries)

    return jax.tree.unflatten(jax.tree.structure(tree), [of(path, tensor) for path, tensor in leaves(tree)])


def _check_blocks(path: str, matrix: Scaled, axes: Axes, entries: Sequence[MeshAxes], mesh: Mesh | AbstractMesh) -> None:
    """ValueError where a device's part of a matrix in 8 bits, abstract or not, would begin within a block."""
    of_blocks = {matrix.ndim - 1} if matrix.by_row else {matrix.ndim - 2, matrix.ndim - 1}
    for dimension, (axis, entry) in enumerate(zip(axes, entries, strict=False)):
        names, size = names_of(entry), matrix.shape[dimension]
        devices = math.prod(mesh.shape[name] for name in names)
        if dimension in of_blocks and devices > 1 and size % (devices * BLOCK):
            raise ValueError(
                f"{path}: axis {axis} of size {size}, in blocks of {BLOCK}, cannot be divided over {devices} devices of {names}"
            )


def split_over(axis: str | None, size: int) -> tuple[str, ...]:
    """The axes of the mesh in force that split a dimension of an activation with this logical axis and size."""
    mesh, rules = current()
    return () if mesh is None else names_of(fitting_spec((size,), (axis,), rules, mesh)[0])


def fitting(shape: tuple[int, ...], axes: Axes) -> NamedSharding | None:
    """The sharding of an array that is made under the mesh in force; None without a mesh, or while a program is traced."""
    mesh, rules = current()
    if mesh is None:
        return None
    return NamedSharding(jax.sharding.get_mesh(), fitting_spec(shape, axes, rules, mesh))


def put(arrays: Any, tree: Any) -> Any:
    """`arrays`, whose abstract tree is `tree`, on the devices of the mesh in force; as they are without a mesh.

    Raises ValueError where an axis cannot be divided evenly, as `shardings` does.
    """
    mesh, rules = current()
    return arrays if mesh is None else jax.device_put(arrays, shardings(tree, jax.sharding.get_mesh(), rules))


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, of any shape, in this process's memory; with several processes all of them must ask for it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, of any shape, with its dimensions split by the logical `axes` under the mesh in force; `x` itself without a mesh."""
    mesh, rules = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, axes, rules, mesh))


def _fits(x: Any, axes: Axes, rules: Rules, mesh: AbstractMesh) -> Any:
    """The PartitionSpec of an array, or those of codes and scales, which are split alike."""
    entries = fitting_spec(x.shape[: len(axes)], axes[: x.ndim], rules, mesh)
    if not isinstance(x, Scaled):
        return entries
    _check_blocks(f"matrix {x.shape} in 8 bits", x, axes, tuple(entries), mesh)
    return Scaled(entries, entries)


def on_each_device(function: Callable[..., Any], inputs: Sequence[Axes], outputs: Any) -> Callable[..., Any]:
    """`function` called by every device on its part of the arrays; `function` itself without a mesh.

    inputs: the logical axes of each argument's leading dimensions, of all its leaves where an argument is a tree. outputs:
    those of the result, or a tuple of them. An axis that is whole because its devices do not divide it is whole in the
    results too.
    """
    mesh, rules = current()
    if mesh is None:
        return function

    def call(*arguments: Any) -> Any:
        trees = [
            jax.tree.map(
                functools.partial(_fits, axes=axes, rules=rules, mesh=mesh), x, is_leaf=lambda leaf: isinstance(leaf, Scaled)
            )
            for x, axes in zip(arguments, inputs, strict=True)
        ]
        split: dict[str, MeshAxes] = {}
        for tree, axes in zip(trees, inputs, strict=True):
            for entries in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)):
                split |= {axis: entry for axis, entry in zip(axes, entries, strict=False) if axis is not None}

        def out(axes: Axes) -> PartitionSpec:
            return PartitionSpec(*(None if axis is None else split.get(axis) for axis in axes))

        several = bool(outputs) and isinstance(outputs[0], tuple)
        specs = tuple(map(out, outputs)) if several else out(outputs)
        return jax.shard_map(function, mesh=mesh, in_specs=tuple(trees), out_specs=specs, check_vma=False)(*arguments)

    return call


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What devices exchange that split both some tokens and the weights that these are multiplied by.

    tokens: the mesh axes that split the tokens, a part of `weights`, those that split the weights. devices: how many
    devices split the weights. The methods are called within `on_each_device`.
    """

    tokens: tuple[str, ...]
    weights: tuple[str, ...]
    devices: int

    def index(self) -> jax.Array:
        """Which of the weights' parts is this device's."""
        return jax.lax.axis_index(self.weights)

    def gather(self, x: jax.Array) -> jax.Array:
        """All devices' rows of x [N, ...], which the tokens' axes split."""
        return jax.lax.all_gather(x, self.tokens, tiled=True) if self.tokens else x

    def own_rows(self, x: jax.Array) -> jax.Array:
        """This device's rows of what `gather` returns, or was made of it."""
        if not self.tokens:
            return x
        rows = x.shape[0] // jax.lax.axis_size(self.tokens)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.tokens) * rows, rows)

    def add_up(self, sums: jax.Array) -> jax.Array:
        """This device's own rows of the sums [N, D] of all devices that split the weights."""
        if self.tokens:
            sums = jax.lax.psum_scatter(sums, self.tokens, tiled=True)
        others = tuple(name for name in self.weights if name not in self.tokens)
        return jax.lax.psum(sums, others) if others else sums


def exchange(shape: tuple[int, ...], axes: Axes, weights: str, size: int) -> Exchange | None:
    """The exchange for tokens of this shape, whose leading dimensions have these logical axes, and weights split by another.

    size: of the weights' axis. None without a mesh, and where the weights are whole on every device. Raises ValueError
    where the devices do not divide them.
    """
    mesh, rules = current()
    if mesh is None:
        return None
    split = tuple(name for name in names_of(spec((weights,), rules, mesh)[0]) if mesh.shape[name] > 1)
    if not split:
        return None
    devices = math.prod(mesh.shape[name] for name in split)
    if size % devices:
        raise ValueError(f"axis {weights} of size {size} cannot be divided over {devices} devices of {split}")
    entries = fitting_spec(shape[: len(axes)], axes, rules, mesh)
    tokens = tuple(name for entry in entries for name in names_of(entry) if name in split)
    return Exchange(tokens, split, devices)
