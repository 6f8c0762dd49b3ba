"""Compiles what inference runs, a layer's prefill chunk and a decode step, for one TPU that need not be at hand.

libtpu holds the whole compiler, Mosaic included, and describes topologies by name. What is printed comes from it: that the
programs are accepted, how much HBM they hold, what its cost model counts, and how much VMEM each kernel has. Nothing here is
measured; times are what the counts take at the chip's full rates, so less than any run would.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.common import options, topologies
from experiments.common.report import Output, markdown_table, text_table
from indexcache_jax import params, serving, tensors
from indexcache_jax.config import Config
from indexcache_jax.positions import make_positions
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving.cache import abstract, formats, shape_structs
from indexcache_jax.serving.layer import layer_program
from indexcache_jax.serving.model import step_program
from pallas_kernels import device, tpu

TOPOLOGIES = ("v5p:2x2x1", "v5e:2x2", "v6e:2x2")

for _name in ("num_layers", "chunk", "tokens", "topology"):  # num_layers 0: all, or as many as fit
    flags.declare_key_flag(_name)

CHUNK = 2048  # tokens of a prefill chunk, by default


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program; bytes and operations of one run."""

    name: str
    seconds_to_compile: float
    refused: str | None = None
    arguments: int = 0  # of a decode step: all weights and the cache
    temporaries: int = 0
    code: int = 0
    flops: float = 0.0
    bytes_accessed: float = 0.0
    kernels: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # calls and bytes of VMEM by name

    def hbm(self, resident: int) -> int:
        """Bytes that a chip holds while it runs, beside `resident` bytes of weights and cache."""
        return resident + self.temporaries + self.code


def topology_device(name: str) -> jax.Device:
    """The first chip of a topology such as "v5e:2x2", as libtpu describes it. NotImplementedError where that is missing."""
    found = topologies.described(name)
    if isinstance(found, str):
        raise NotImplementedError(
            f"--topology={name}: libtpu does not describe it, `pip install 'indexcache-jax[tpu-aot]'` installs it ({found})"
        )
    return found[0]


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes of a model for inference on one device: one row, `tokens` cached, bfloat16."""

    config: Config
    schedule: Schedule
    device: jax.Device
    tokens: int

    @functools.cached_property
    def sharding(self) -> jax.sharding.Sharding:
        return jax.sharding.SingleDeviceSharding(self.device)

    def on_device(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding), tree)

    @functools.cached_property
    def weights(self) -> serving.Weights:
        return self.on_device(tensors.shape_structs(serving.weights.abstract(self.config, self.schedule), jnp.bfloat16))

    @functools.cached_property
    def cache(self) -> serving.Cache:
        return shape_structs(abstract(self.config, self.schedule, 1, self.tokens), self.sharding)

    def decode(self) -> jax.stages.Lowered:
        """A decode step through all layers."""
        token = self.on_device(jax.ShapeDtypeStruct((1,), jnp.int32))
        with device.target(self.device):
            program = step_program(formats(self.cache), donate=True)
            return program.lower(self.weights, token, self.cache, self.config)

    def prefill(self, layer: int, chunk: int) -> jax.stages.Lowered:
        """One layer over `chunk` tokens that fill the cache up."""
        config, cache = self.config, self.cache.layers[layer]
        x = self.on_device(jax.ShapeDtypeStruct((1, chunk, config.hidden_size), jnp.bfloat16))
        row = jax.ShapeDtypeStruct((1,), jnp.int32)
        positions = self.on_device(jax.eval_shape(lambda n: make_positions(n, n, chunk, config), row))
        with device.target(self.device):
            program = layer_program(formats(cache), donate=True)
            return program.lower(self.weights.layers[layer], x, None, cache, positions, self.tokens, config)


def kernels_of(hlo: str) -> dict[str, dict[str, int]]:
    """Calls and the most VMEM, in bytes, of every Mosaic kernel in a compiled program's text."""
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"calls": 0, "vmem": 0})
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.match(r"\s*(?:ROOT )?%([A-Za-z_]\w*)", line)
        used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
        entry = found[name[1] if name else "?"]
        entry["calls"] += 1
        entry["vmem"] = max(entry["vmem"], int(used[1]) if used else 0)
    return dict(sorted(found.items()))


def compiled(name: str, lower: Callable[[], jax.stages.Lowered]) -> Program:
    """The program compiled, and what the compiler says of it."""
    start = time.monotonic()
    try:
        executable = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Program(name, time.monotonic() - start, refused=str(error).splitlines()[0])
    memory, cost, hlo = executable.memory_analysis(), executable.cost_analysis(), executable.as_text()
    assert memory is not None and cost is not None and hlo is not None  # libtpu has all three
    return Program(
        name=name,
        seconds_to_compile=time.monotonic() - start,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        kernels=kernels_of(hlo),
    )


def shape(layers: int) -> tuple[Config, Schedule]:
    """The 30B shape's first `layers` layers."""
    fields = preset("30b") | {"num_hidden_layers": layers}
    return Config.from_hf(fields), Schedule.from_hf(fields)


def layers_that_fit(layers: int, hbm: int) -> int:
    """The most layers whose bfloat16 weights take up to three quarters of `hbm` bytes; all `layers` if those do."""

    def weights(count: int) -> int:
        config, schedule = shape(count)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params.shape_structs(config, schedule, jnp.bfloat16)))

    return next((count for count in range(layers, 1, -1) if weights(count) <= hbm * 3 // 4), 1)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is compiled, and for which chip. layers: of the whole model; topology: as libtpu names it."""

    model: Model
    chunk: int
    layers: int
    topology: str

    @property
    def chip(self) -> tpu.Chip:
        return tpu.CHIPS[self.model.device.device_kind]

    @property
    def title(self) -> str:
        model = self.model
        size = f"{model.config.num_layers} of {self.layers} layers, bfloat16, {model.tokens} cached tokens"
        return f"30B, {size}, for one {self.chip.name} ({self.topology})"


def read_inputs() -> Inputs:
    """The 30B model, cut to what fits the chip where --num_layers does not say how far."""
    layers, asked = preset("30b")["num_hidden_layers"], options.NUM_LAYERS.value
    chunk = CHUNK if options.CHUNK.value is None else options.CHUNK.value
    if asked > layers:
        raise ValueError(f"--num_layers={asked}: the model has {layers}")
    options.check_positive("tokens")
    if not 1 <= chunk <= options.TOKENS.value:
        raise ValueError(f"--chunk={chunk} is not between 1 and --tokens={options.TOKENS.value}")
    topology = options.TOPOLOGY.value or TOPOLOGIES[0]
    if topology not in TOPOLOGIES:
        raise ValueError(f"--topology={topology}: not one of {', '.join(TOPOLOGIES)}")
    device = topology_device(topology)
    model_layers = asked or layers_that_fit(layers, tpu.CHIPS[device.device_kind].hbm)
    return Inputs(Model(*shape(model_layers), device, options.TOKENS.value), chunk, layers, topology)


def compile_all(given: Inputs) -> list[Program]:
    """The decode step, whose arguments are what stays in HBM under every program, and prefill of each kind of layer."""
    model = given.model
    lowered: dict[str, Callable[[], jax.stages.Lowered]] = {"decode step": model.decode}
    for kind, experts in (("dense", False), ("expert", True)):
        if experts in model.config.moe_layers:
            layer = model.config.moe_layers.index(experts)
            lowered[f"prefill, a layer with {kind} MLP"] = functools.partial(model.prefill, layer, given.chunk)
    programs = []
    for name, lower in lowered.items():
        print(f"compiling: {name}", flush=True)
        programs.append(compiled(name, lower))
    return programs


def program_cells(program: Program, resident: int, chip: tpu.Chip) -> list[str]:
    """A row of the report. resident: bytes of weights and cache."""
    if program.refused:
        return [program.name, f"no: {program.refused}", *["-"] * 6]

    def gib(size: float) -> str:
        return f"{size / 2**30:.2f}"

    sizes = gib(resident), gib(program.temporaries), f"{gib(program.hbm(resident))} of {gib(chip.hbm)}"
    milliseconds = f"{1e3 * program.flops / chip.bf16:.2f} / {1e3 * program.bytes_accessed / chip.bandwidth:.2f}"
    return [
        program.name,
        "yes",
        *sizes,
        f"{program.flops / 1e12:.3f}",
        f"{program.bytes_accessed / 1e9:.2f}",
        milliseconds,
    ]


HEADER = ["program", "accepted", "weights and cache, GiB", "temporary, GiB", "HBM, GiB"]
HEADER += ["Tflop, estimate", "GB moved, estimate", "ms at full rate: arithmetic / memory, estimate"]


def report(programs: list[Program], given: Inputs, output: Output) -> None:
    """Writes results.json and report.md, and prints the tables."""
    chip, resident = given.chip, programs[0].arguments
    rows = [program_cells(p, resident, chip) for p in programs]
    kernel_rows = [
        [p.name, name, entry["calls"], f"{entry['vmem'] / 2**20:.1f}", f"{entry['vmem'] / chip.vmem:.0%}"]
        for p in programs
        for name, entry in p.kernels.items()
    ]
    kernel_header = ["program", "kernel", "calls", "VMEM, MiB", f"of the {chip.vmem // 2**20} MiB of a core"]
    print(text_table(HEADER, rows), text_table(kernel_header, kernel_rows), sep="\n\n")
    text = f"""# Compiled ahead of time: {given.title}

Prefill goes layer by layer, {given.chunk} tokens at a time, the last of them at the cache's end; a decode step is one
program. HBM is what XLA's memory analysis says, with all weights and the whole cache in it. Operations and bytes are
estimates: XLA's cost model, in which each of our kernels counts as if every key were visible and every page selected. Times
are those counts at the chip's full rates. Nothing was run.

{markdown_table(HEADER, rows)}

{markdown_table(kernel_header, kernel_rows)}
"""
    metrics = {
        "chip": dataclasses.asdict(chip),
        "layers": given.model.config.num_layers,
        "programs": [
            dataclasses.asdict(p) | {"hbm": p.hbm(resident), "fits": not p.refused and p.hbm(resident) <= chip.hbm}
            for p in programs
        ],
    }
    output.finish("compile", metrics, text)


def run(output_dir: str, seed: int) -> None:
    given = read_inputs()
    output = Output.create(output_dir)
    print(given.title)
    report(compile_all(given), given, output)
