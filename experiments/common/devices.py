"""How the devices of all processes share the work of an experiment: --mesh, or what suits the work.

A `Layout` is the mesh's shape together with the two choices that are rules: where experts lie, and cached tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh

from experiments.common import options
from indexcache_jax import memory, sharding
from indexcache_jax.sharding import AXES, Rules


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's axes; over how many devices experts are split, 1 or all; and cached tokens, 1 or `context`."""

    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    cache: int = 1

    @property
    def num_devices(self) -> int:
        return self.data * self.context * self.tensor

    @property
    def text(self) -> str:
        """What a report shows, such as "context=4, data=2, experts over 8, of 8 NVIDIA H200"."""
        kind = jax.devices()[0].device_kind
        if self.num_devices == 1:
            return f"1 {kind}"
        parts = [f"{axis}={getattr(self, axis)}" for axis in ("context", "data", "tensor") if getattr(self, axis) > 1]
        parts.append(f"experts over {self.expert}" if self.expert > 1 else "experts whole")
        if self.cache > 1:
            parts.append(f"cached tokens over {self.cache}")
        return f"{', '.join(parts)}, of {self.num_devices} {kind}"

    def rules(self, base: Rules) -> Rules:
        """The rules `base` with experts and cached tokens where the layout has them."""
        rules = base if self.expert > 1 else base.whole_experts()
        return rules.split_cache() if self.cache > 1 else rules

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh of devices that need not be there."""
        return memory.mesh_of(self.data, self.context, self.tensor)

    def mesh(self) -> Mesh:
        """The mesh of all devices. ValueError where there are not so many."""
        return sharding.make_mesh(self.data, self.context, self.tensor)


def parse(text: str, num_devices: int) -> Layout:
    """The layout of `num_devices` devices that --mesh asks for, such as "context=4,data=2,expert=1".

    An axis that is not named is 1; experts are over all devices, cached tokens whole. ValueError, with the text, for what
    cannot be.
    """
    names = [field.name for field in dataclasses.fields(Layout)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in names:
            raise ValueError(f"--mesh={text}: {part.strip()!r} is not one of {', '.join(names)} with its size, such as data=2")
        if name in sizes:
            raise ValueError(f"--mesh={text}: {name} is given twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh={text}: {name}={size} is not a number of devices")
        sizes[name] = int(size)
    layout = Layout(**{"expert": num_devices, **sizes})
    product = " x ".join(str(getattr(layout, axis)) for axis in AXES)
    if layout.num_devices != num_devices:
        raise ValueError(f"--mesh={text}: data x context x tensor = {product} is not the number of devices, {num_devices}")
    if layout.expert not in (1, num_devices):
        raise ValueError(f"--mesh={text}: expert={layout.expert} is neither 1, experts whole, nor {num_devices}, all devices")
    if layout.cache not in (1, layout.context):
        raise ValueError(
            f"--mesh={text}: cache={layout.cache} is neither 1, cached tokens whole, nor {layout.context}, the size of context"
        )
    return layout


def suited(rows: int, num_devices: int) -> Layout:
    """The layout of `num_devices` for work on so many rows at a time.

    As many devices as divide the rows have rows of their own, which exchange least; the rest shares the queries of each.
    """
    data = math.gcd(rows, num_devices)
    return Layout(data=data, context=num_devices // data, expert=num_devices)


def layout(rows: int) -> Layout:
    """The layout of all devices: --mesh, or what suits work on so many rows at a time. ValueError for a bad --mesh."""
    num_devices = jax.device_count()
    return parse(options.MESH.value, num_devices) if options.MESH.value else suited(rows, num_devices)


@contextlib.contextmanager
def in_force(layout: Layout, base: Rules) -> Iterator[None]:
    """The layout's mesh and its rules, made of `base`, in force for what is traced and run within; nothing for one device."""
    with sharding.use(layout.mesh(), layout.rules(base)) if layout.num_devices > 1 else contextlib.nullcontext():
        yield
