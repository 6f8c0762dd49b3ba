"""What an experiment needs of every device, said before anything is allocated, and what would fit where that does not.

Weights and caches are exact sums over abstract trees; temporaries are the estimate of `memory.prefill_temporaries`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from experiments.common.devices import Layout, suited
from indexcache_jax import host_memory, memory, ops, params, sharding
from indexcache_jax.config import Config
from indexcache_jax.indexer_training import Run
from indexcache_jax.memory import Devices, Need
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat
from indexcache_jax.serving.generation import CACHE_MULTIPLE
from indexcache_jax.sharding import AXES, SERVING, TRAINING, Rules
from indexcache_jax.training import Stage

MOST_DEVICES = 4096  # meshes that are tried, in powers of two

# Bytes of one device at a length under a mesh and rules. ValueError where the mesh cannot divide what it has to.
NeedAt = Callable[[int, Devices, Rules], Need]


def serving(
    config: Config,
    schedule: Schedule,
    *,
    rows: int,
    length: int,
    chunk: int,
    dtype: Any,
    form: CacheFormat,
    flag: str,
    document: int = 0,
    weights: str | None = None,
    host: Mapping[str, int] | None = None,
    smaller: str = "",
) -> None:
    """Says what inference needs at a cache of [rows, length] and, before them, of a document that the rows share.

    weights: "fp8" for matrices in 8 bits, as of `memory.serving_need`. host: bytes of the host's memory beside that, by what
    they are for. smaller: the flags that make it smaller.
    ValueError, naming the flag that the length is from, where that does not fit the devices.
    """

    def need(length: int, mesh: Devices, rules: Rules) -> Need:
        found = memory.serving_need(
            config,
            schedule,
            rows=rows,
            length=length,
            chunk=chunk,
            dtype=dtype,
            form=form,
            mesh=mesh,
            rules=rules,
            weights=weights,
        )
        if not document:
            return found
        room = -(-document // CACHE_MULTIPLE) * CACHE_MULTIPLE
        return Need(found.parts | {"document": memory.cache_bytes(config, schedule, 1, room, form, mesh, rules)})

    _check(need, length, rows, SERVING, f"--{flag}: {rows} x {length:,} tokens", CACHE_MULTIPLE, _advice(smaller), host)


def search(config: Config, schedule: Schedule, *, rows: int, context: int, dtype: Any, weights: str | None = None) -> None:
    """Says what a search needs that keeps all weights on the devices; ValueError where that does not fit them."""
    need = search_need(config, schedule, rows=rows, dtype=dtype, weights=weights)
    _check(need, context, rows, SERVING, f"--context={context}", 1, "; --stream reads the weights layer by layer")


def search_need(
    config: Config, schedule: Schedule, *, rows: int, dtype: Any, weights: str | None, stream: bool = False
) -> NeedAt:
    """What a search needs for batches of so many rows: with all weights on the devices, or those of two layers (--stream)."""
    tree = params.abstract(config, schedule, weights)
    decoded = 0 if weights is None else memory.decoded_layer(config, schedule, dtype)

    def need(length: int, mesh: Devices, rules: Rules) -> Need:
        if stream:
            layer, ends = memory.layer_bytes(tree, dtype, mesh, rules)
            parts = {"two layers": 2 * layer, "embedding and head": ends}  # the next one is read while one is in use
        else:
            parts = {"weights": memory.tree_bytes(tree, dtype, mesh, rules)}
        temporaries = memory.prefill_temporaries(config, schedule, rows, length, length, dtype, mesh, rules)
        return Need(parts | {"temporaries": temporaries + decoded})

    return need


def streamed(
    config: Config,
    schedule: Schedule,
    *,
    rows: int,
    context: int,
    dtype: Any,
    host: Mapping[str, int],
    smaller: str,
    weights: str | None = None,
) -> None:
    """Says what is needed where weights are read layer by layer; ValueError, with the flags `smaller`, where that does not fit.

    A device holds a layer, the next one, embedding and head. host: bytes of the host's memory by what they are for.
    """
    need = search_need(config, schedule, rows=rows, dtype=dtype, weights=weights, stream=True)
    _check(need, context, rows, SERVING, f"--context={context}", 1, _advice(smaller), host=host)


def program(compiled: Any, what: str, smaller: str) -> None:
    """ValueError where the host has no room for what a compiled program needs beside its arguments.

    Only on CPUs: accelerators say themselves that they are full. what: is compiled; smaller: the flags that make it smaller.
    """
    found = compiled.memory_analysis() if ops.platform() == "cpu" else None
    if found is None:
        return
    taken = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    if taken > (there := host_memory.available()):
        lacking = f"needs {taken / 1e9:.2f} GB beside its arguments, there are {there / 1e9:.2f} GB"
        raise ValueError(f"{what}: {lacking}{_advice(smaller)}")


def inference(need: NeedAt, length: int, what: str, smaller: str) -> None:
    """Says what is needed at a length for a single row; ValueError, with the flags `smaller`, where that does not fit."""
    _check(need, length, 1, SERVING, what, 1, _advice(smaller))


def _advice(smaller: str) -> str:
    return f"; {smaller} makes it smaller" if smaller else ""


def training(
    config: Config,
    schedule: Schedule,
    stages: list[Stage],
    *,
    checkpoint: Schedule | None = None,
    weights: str | None = None,
    smaller: str = "",
) -> None:
    """Says what the stages keep on each device, without activations; ValueError where that does not fit.

    smaller: the flags that make it smaller. checkpoint: the schedule of a checkpoint whose weights are kept beside those in
    training, counted as bfloat16. weights: the form of both, as of `params.abstract`.
    """

    def need(_: int, mesh: Devices, rules: Rules) -> Need:
        found = memory.training_need(config, schedule, [stage.kind for stage in stages], mesh, rules, weights)
        if checkpoint is None:
            return found
        tree = params.abstract(config, checkpoint, weights)
        return Need(found.parts | {"checkpoint": memory.tree_bytes(tree, jnp.bfloat16, mesh, rules)})

    rows = max(stage.rows for stage in stages)
    _check(need, 0, rows, TRAINING, "training, without activations", 1, _advice(smaller))


def indexers(run: Run) -> None:
    """Says what training indexers needs where layers are read one by one; ValueError where that does not fit a device."""
    layers, stage = run.layers, run.stage

    def need(length: int, mesh: Devices, rules: Rules) -> Need:
        return memory.streamed_indexers_need(
            layers.config,
            layers.schedule,
            group=max(map(len, run.groups)),
            rows=stage.sequences,
            length=length,
            dtype=stage.compute_dtype,
            keeps_targets=run.keeps_targets,
            weights=layers.weights,
            mesh=mesh,
            rules=rules,
        )

    _check(need, stage.context, stage.sequences, SERVING, f"--context={stage.context}", 1)


def shown(need: Need) -> str:
    """The parts of a need in GB, such as "12.3 GB (weights 10.1, cache 2.0, temporaries 0.2)"."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in need.parts.items())
    return f"{need.total / 1e9:.2f} GB ({parts})"


def _check(
    need: NeedAt,
    length: int,
    rows: int,
    base: Rules,
    what: str,
    multiple: int,
    otherwise: str = "",
    host: Mapping[str, int] | None = None,
) -> None:
    """Prints the need under the mesh in force. ValueError, with what would fit, where that is more than there is.

    length: 0 where nothing depends on it. host: bytes of the host's memory beside it.
    """
    mesh, rules = sharding.current()
    there, mesh = memory.available(), mesh or memory.mesh_of()
    found, of_host = need(length, mesh, rules), Need(dict(host or {}))
    on_cpu, beside = ops.platform() == "cpu", 0
    if on_cpu:  # whose devices are the host
        found, beside, of_host = Need(found.parts | of_host.parts), of_host.total, Need({})
    print(f"memory of each device: {shown(found)}, of {there / 1e9:.2f} GB", flush=True)
    if of_host.total > (left := host_memory.available()):
        needed = f"needs {shown(of_host)} of the host's memory, {left / 1e9:.2f} GB are left"
        raise ValueError(f"{what}: {needed}{otherwise}")
    if found.total <= there:
        return
    advice = []
    if length and (fitting := longest(need, length, mesh, rules, there - beside, multiple)):
        advice.append(f"the longest that fits is {fitting:,} tokens")
    if not on_cpu:
        layout = smallest(need, length, rows, base, there)
        advice.append(
            f"no mesh of up to {MOST_DEVICES} such devices fits it"
            if layout is None
            else f"the smallest mesh that fits it has {layout.num_devices} such devices: --mesh={mesh_flag(layout)}"
        )
    lacking = f"needs {shown(found)} of each device, there are {there / 1e9:.2f} GB"
    raise ValueError(f"{what}: {'; '.join([lacking, *([', '.join(advice)] if advice else [])])}{otherwise}")


def mesh_flag(layout: Layout) -> str:
    """What --mesh has to say for a layout."""
    sizes = {name: getattr(layout, name) for name in (*AXES, "cache") if getattr(layout, name) > 1}
    if layout.expert != layout.num_devices:
        sizes["expert"] = layout.expert
    return ",".join(f"{name}={size}" for name, size in sizes.items()) or "data=1"


def longest(need: NeedAt, most: int, mesh: Devices, rules: Rules, there: int, multiple: int = CACHE_MULTIPLE) -> int:
    """The longest length up to `most` that needs at most `there` bytes, 0 where none does."""
    if rules.tokens is not None:
        multiple *= mesh.size
    return memory.longest(lambda length: need(length, mesh, rules).total <= there, multiple, most)


def layouts(rows: int) -> Iterator[Layout]:
    """Layouts of 1, 2, 4, ... devices for so many rows, with cached tokens whole and, where rows are shared, split."""
    count = 1
    while count <= MOST_DEVICES:
        layout = suited(rows, count)
        yield layout
        if layout.context > 1:
            yield Layout(layout.data, layout.context, layout.tensor, layout.expert, layout.context)
        count *= 2


def smallest(need: NeedAt, length: int, rows: int, base: Rules, there: int) -> Layout | None:
    """The layout of the fewest devices with `there` bytes each, None where none fits."""
    for layout in layouts(rows):
        try:
            if need(length, layout.abstract_mesh, layout.rules(base)).total <= there:
                return layout
        except ValueError:  # experts, for one, cannot be divided over more devices than there are of them
            continue
    return None
