"""Where arrays lie on a mesh of devices: logical axes of tensors to axes of the mesh, for any abstract tree.

Every `Tensor` names its axes once ("heads", "expert", ...). `Rules` say which mesh axis splits each of them. The mesh
enters by `jax.set_mesh` and is no argument of the model's functions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from indexcache_jax.tensors import Tensor, leaves

MeshAxes = str | tuple[str, ...] | None  # one axis of the mesh, several together, or none: replicated


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
    expert_mlp: MeshAxes = None
    # activations and caches
    batch: MeshAxes = None
    tokens: MeshAxes = None
    queries: MeshAxes = None
    latent: MeshAxes = None
    index: MeshAxes = None


# Inference: rows over data, queries of a chunk over context, heads over tensor, experts over all devices.
SERVING = Rules(batch="data", queries="context", heads="tensor", expert=("data", "context", "tensor"))
# Training: weights and optimiser state split over data (fsdp), experts over the rest.
TRAINING = Rules(batch="data", queries="context", embed="data", heads="tensor", expert=("context", "tensor"))


def spec(axes: tuple[str | None, ...], rules: Rules, mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical axes (None: replicated).

    Raises ValueError for an unknown axis, and where two dimensions would be split by the same axis of the mesh.
    """
    entries: list[tuple[str, ...]] = []
    for axis in axes:
        if axis is not None and not hasattr(rules, axis):
            raise ValueError(f"axis {axis!r} is not one of {[field.name for field in dataclasses.fields(rules)]}")
        names = None if axis is None else getattr(rules, axis)
        names = (names,) if isinstance(names, str) else names or ()
        entries.append(tuple(name for name in names if name in mesh.axis_names))
    used = [name for entry in entries for name in entry]
    if twice := {name for name in used if used.count(name) > 1}:
        raise ValueError(f"axes {axes}: mesh axis {min(twice)!r} would split two of them")
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """A tree of NamedShardings for an abstract tree: of params, serving weights or a cache.

    Raises ValueError that names tensor, axis, size and mesh size where an axis cannot be divided evenly.
    """

    def place(path: str, tensor: Tensor) -> NamedSharding:
        placed = spec(tensor.axes, rules, mesh)
        for axis, size, entry in zip(tensor.axes, tensor.shape, placed, strict=True):
            names = (entry,) if isinstance(entry, str) else entry or ()
            devices = math.prod(mesh.shape[name] for name in names)
            if size % devices:
                raise ValueError(f"{path}: axis {axis} of size {size} cannot be divided over {devices} devices of {names}")
        return NamedSharding(mesh, placed)

    return jax.tree.unflatten(jax.tree.structure(tree), [place(path, tensor) for path, tensor in leaves(tree)])


def constrain(x: jax.Array, *axes: str | None, rules: Rules = SERVING) -> jax.Array:
    """`x` with its dimensions split by the logical `axes` under the mesh of `jax.set_mesh`; `x` itself without a mesh.

    The axes of the mesh are those that the compiler propagates (jax.sharding.AxisType.Auto).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, rules, mesh))
