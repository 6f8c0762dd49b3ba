"""What inference runs under a mesh, compiled from abstract trees for devices that need not be at hand."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from experiments.benchmarks.plan.collectives import Traffic, collectives
from indexcache_jax import serving, sharding, tensors
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving.cache import CacheFormat, abstract, formats
from indexcache_jax.serving.layer import layer_program
from indexcache_jax.serving.model import embed, step_program
from indexcache_jax.sharding import Rules
from pallas_kernels import device


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program: bytes of one device, and bytes that it moves in memory in one run.

    temporaries: beside weights and caches; a layer's hidden states and indices, which are arguments, are among them.
    """

    name: str
    seconds_to_compile: float
    refused: str | None = None
    arguments: int = 0
    temporaries: int = 0
    bytes_accessed: float | None = None  # where the compiler counts them
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program to be compiled, and the bytes of one device for its arguments that are neither weights nor caches."""

    program: jax.stages.Lowered
    others: int


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes of a model for inference on a mesh: `rows` rows of `length` cached tokens, bfloat16.

    weights_format: "fp8" for matrices in 8 bits.
    mesh: of devices of a topology, or of those at hand.
    """

    config: Config
    schedule: Schedule
    rows: int
    length: int
    form: CacheFormat
    mesh: Mesh
    rules: Rules
    weights_format: str | None = None

    @functools.cached_property
    def weights(self) -> serving.Weights:
        tree = serving.weights.abstract(self.config, self.schedule, self.weights_format)
        return tensors.shape_structs(tree, jnp.bfloat16, sharding.shardings(tree, self.mesh, self.rules))

    @functools.cached_property
    def cache(self) -> serving.Cache:
        def struct(tensor: tensors.Tensor) -> jax.ShapeDtypeStruct:
            place: Any = self._split(tensor.shape, *tensor.axes)
            if self._device.platform == "tpu":  # where a cache says that it is row-major
                place = Format(Layout(tuple(range(len(tensor.shape)))), place)
            return jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(tensor.dtype), sharding=place)

        return jax.tree.map(struct, abstract(self.config, self.schedule, self.rows, self.length, self.form))

    @property
    def _device(self) -> jax.Device:
        return self.mesh.devices.flat[0]

    def _split(self, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, sharding.fitting_spec(shape, axes, self.rules, self.mesh))

    def _array(self, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._split(shape, *axes))

    def kinds(self) -> dict[str, int]:
        """The first layer of each kind, by its name: "F, dense" and so on; F layers first."""
        found: dict[str, int] = {}
        for layer, (full, experts) in enumerate(zip(self.schedule.is_full, self.config.moe_layers, strict=True)):
            found.setdefault(f"{'F' if full else 'S'}, {'experts' if experts else 'dense'}", layer)
        return dict(sorted(found.items()))

    def decode(self) -> Lowered:
        """A decode step through all layers, for every row."""
        token = self._array((self.rows,), jnp.int32, "batch")
        with device.target(self._device), sharding.use(self.mesh, self.rules):
            program = step_program(formats(self.cache), donate=True)
            return Lowered(program.lower(self.weights, token, self.cache, self.config), bytes_of(token))

    def prefill(self, layer: int, chunk: int) -> Lowered:
        """One layer over the last `chunk` tokens of every row."""
        config, cache = self.config, self.cache.layers[layer]
        tokens = self._array((self.rows, chunk), jnp.int32)
        row = self._array((self.rows,), jnp.int32, "batch")
        indices = None
        if not self.schedule.is_full[layer]:
            shape = (self.rows, chunk, min(config.index_topk, self.length))
            indices = self._array(shape, jnp.int32, "batch", "queries", None)
        with device.target(self._device), sharding.use(self.mesh, self.rules):
            before = embed.lower(self.weights.embedding, tokens, row, row, config)
            x, positions = jax.tree.map(
                lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
                before.out_info,
                before.compile().output_shardings,
            )
            program = layer_program(formats(cache), donate=True)
            lowered = program.lower(self.weights.layers[layer], x, indices, cache, positions, self.length, config)
            return Lowered(lowered, bytes_of((x, indices, positions)))


def bytes_of(structs: Any) -> int:
    """Bytes of one device for a tree of ShapeDtypeStructs."""
    shapes = [(struct.sharding.shard_shape(struct.shape), struct.dtype) for struct in jax.tree.leaves(structs)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def compiled(name: str, lower: Callable[[], Lowered], num_devices: int) -> Program:
    """The program compiled, and what the compiler says of it."""
    start = time.monotonic()
    try:
        lowered = lower()
        executable = lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        return Program(name, time.monotonic() - start, refused=str(error).splitlines()[0])
    memory, cost, hlo = executable.memory_analysis(), executable.cost_analysis(), executable.as_text()
    assert memory is not None and hlo is not None  # the compilers of all platforms have both
    return Program(
        name=name,
        seconds_to_compile=time.monotonic() - start,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + lowered.others,
        bytes_accessed=None if cost is None else cost.get("bytes accessed"),
        collectives=collectives(hlo, num_devices),
    )
