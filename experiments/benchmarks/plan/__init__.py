"""Plans inference of a released model on devices that need not be at hand: what it takes of each, and what they exchange.

Everything comes from abstract trees: no weight is made, nothing is run. Weights and caches are sums over the trees' leaves
as mesh and rules place them. Temporaries and what devices exchange are the compiler's, of prefill (a program for each kind
of layer, over the last chunk of a prompt) and of a decode step. Where nothing here can compile for the devices, the report
says so, and gives the sums and an estimate of temporaries alone.

Programs for v5e, v5p and v6e are compiled by libtpu; those for h200 by JAX's CUDA 13 plugin, where it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmarks.plan.collectives import KINDS, Traffic
from experiments.benchmarks.plan.programs import Model, Program, compiled
from experiments.common import devices, fit, inputs, options, topologies
from experiments.common.devices import Layout
from experiments.common.report import Output, markdown_table, text_table
from experiments.common.topologies import Topology
from indexcache_jax import memory, serving, sharding
from indexcache_jax.config import Config
from indexcache_jax.memory import Devices, Need
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat
from indexcache_jax.serving.generation import CACHE_MULTIPLE
from indexcache_jax.sharding import SERVING, Rules
from pallas_kernels import device

_READ = "preset", "schedule", "topology", "mesh", "tokens", "chunk", "batch_size", "latent_cache", "index_cache", "weights"
for _name in _READ:
    flags.declare_key_flag(_name)

CHUNK = 4096  # tokens of a prefill chunk for every device that shares it, by default
LONGEST = 2**22  # tokens, up to which the longest length that fits is looked for


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is planned. rows: requests at a time; length: cached tokens of each; chunk: prompt tokens of a row at a time."""

    name: str
    config: Config
    schedule: Schedule
    topology: Topology
    layout: Layout
    rows: int
    length: int
    chunk: int
    form: CacheFormat
    weights: str | None  # "fp8" for matrices in 8 bits

    @property
    def rules(self) -> Rules:
        return self.layout.rules(SERVING)

    @property
    def abstract_mesh(self) -> Devices:
        return self.layout.abstract_mesh

    def model(self, schedule: Schedule) -> Model:
        """The model under a schedule on the topology's devices, which must be there to compile for."""
        assert self.topology.devices is not None
        mesh = sharding.make_mesh(self.layout.data, self.layout.context, self.layout.tensor, self.topology.devices)
        return Model(self.config, schedule, self.rows, self.length, self.form, mesh, self.rules, self.weights)

    def need(self, length: int, mesh: Devices, rules: Rules, temporaries: int | None = None) -> Need:
        """What one device needs at another length, on another mesh. temporaries: instead of their estimate."""
        found = memory.serving_need(
            self.config,
            self.schedule,
            rows=self.rows,
            length=length,
            chunk=self.chunk,
            dtype=jnp.bfloat16,
            form=self.form,
            mesh=mesh,
            rules=rules,
            weights=self.weights,
        )
        return found if temporaries is None else Need(found.parts | {"temporaries": temporaries})

    @property
    def title(self) -> str:
        mesh = fit.mesh_flag(self.layout)
        return f"{self.name} on {self.topology.name} ({self.topology.num_devices} x {self.topology.device_kind}), --mesh={mesh}"


def read_inputs() -> Inputs:
    """What the flags ask for, checked."""
    options.check_positive("batch_size", "tokens", "chunk")
    name, rows, length = options.PRESET.value, options.BATCH_SIZE.value, options.TOKENS.value
    config, base = inputs.preset_model(name)
    schedule = inputs.schedule_to_plan(base)
    topology = topologies.topology(options.TOPOLOGY.value or topologies.LOCAL)
    count, text = topology.num_devices, options.MESH.value
    layout = devices.parse(text, count) if text else devices.suited(rows, count)
    if options.TOKENS.present and length > config.max_position_embeddings:
        raise ValueError(f"--tokens={length}: {name} has {config.max_position_embeddings} positions")
    length = min(length, config.max_position_embeddings)
    chunk = options.CHUNK.value or min(length, CHUNK * layout.context)
    if chunk > length:
        raise ValueError(f"--chunk={chunk}: is more than --tokens={length}")
    form = inputs.cache_format(jnp.bfloat16, jnp.bfloat16)
    return Inputs(name, config, schedule, topology, layout, rows, length, chunk, form, inputs.made_weights())


# ---- sums over abstract trees


def weights_by_part(given: Inputs) -> dict[str, int]:
    """Bytes of one device's weights by what they belong to."""
    tree = serving.weights.abstract(given.config, given.schedule, given.weights)
    routed: list[Any] = []
    attention: list[Any] = []
    others: list[Any] = []
    for layer in tree.layers:
        if isinstance(layer.mlp, serving.Experts):
            routed.append((layer.mlp.gate_up, layer.mlp.down))
            others.append(dataclasses.replace(layer.mlp, gate_up=None, down=None))
        else:
            others.append(layer.mlp)
        attention.append([value for name, value in vars(layer).items() if name != "mlp"])
    parts = {
        "routed experts": routed,
        "attention and indexers": attention,
        "dense and shared MLPs, routers": others,
        "embedding and head": tree.ends,
    }
    return {
        name: memory.tree_bytes(part, jnp.bfloat16, given.abstract_mesh, given.rules) if jax.tree.leaves(part) else 0
        for name, part in parts.items()
    }


def weights_bytes(given: Inputs, schedule: Schedule, weights: str | None) -> int:
    """Bytes of one device's weights under a schedule, with matrices in 8 bits ("fp8") or all in bfloat16.

    ValueError where the mesh cannot divide them.
    """
    tree = serving.weights.abstract(given.config, schedule, weights)
    return memory.tree_bytes(tree, jnp.bfloat16, given.abstract_mesh, given.rules)


def weights_by_form(given: Inputs) -> dict[str, int | None]:
    """Bytes of one device's weights for either value of --weights; None for a form that the mesh cannot divide."""
    sizes: dict[str, int | None] = {}
    for form, weights in (("bf16", None), ("fp8", "fp8")):
        try:
            sizes[form] = weights_bytes(given, given.schedule, weights)
        except ValueError:
            sizes[form] = None
    return sizes


def bytes_per_token(given: Inputs, schedule: Schedule) -> int:
    return serving.bytes_per_token(given.config, schedule, given.form)


# ---- compiled programs


@dataclasses.dataclass(frozen=True)
class Result:
    """Programs of the schedule asked for, and its decode step's twin with all layers F. None where nothing was compiled."""

    prefill: list[Program]
    decode: Program
    decode_all_full: Program

    @property
    def temporaries(self) -> int:
        """The most that a program holds beside weights and cache."""
        return max(program.temporaries for program in (*self.prefill, self.decode))


def compile_all(given: Inputs) -> Result | None:
    """Prefill of each kind of layer, and a decode step under the schedule and with all layers F."""
    if given.topology.devices is None:
        return None
    count, all_full = given.topology.num_devices, Schedule.all_full(given.config.num_layers)
    model, other = given.model(given.schedule), given.model(all_full)

    def one(name: str, lower: Any) -> Program:
        print(f"compiling: {name}", flush=True)
        return compiled(name, lower, count)

    prefill = [
        one(f"prefill: {kind}", functools.partial(model.prefill, layer, given.chunk)) for kind, layer in model.kinds().items()
    ]
    decode = one("decode step", model.decode)
    return Result(prefill, decode, decode if given.schedule == all_full else one("decode step, all F", other.decode))


# ---- the report


def gb(size: float) -> str:
    """GB with three digits, more of what is large."""
    return f"{size / 1e9:,.2f}" if abs(size) >= 1e9 else f"{size / 1e9:.3g}"


def memory_rows(given: Inputs, result: Result | None) -> list[list[str]]:
    """What one device holds, line by line."""
    estimated = given.need(given.length, given.abstract_mesh, given.rules)
    rows = [[f"weights: {name}", gb(size)] for name, size in weights_by_part(given).items()]
    asked = given.weights or "bf16"
    rows.append([f"weights in all, {asked}", gb(estimated.parts["weights"])])
    for form, size in weights_by_form(given).items():
        if form != asked and size is not None:
            rows.append([f"weights in all, with --weights={form}", gb(size)])
    rows.append([f"cache of {given.rows} x {given.length:,} tokens", gb(estimated.parts["cache"])])
    rows.append(["temporaries, estimated", gb(estimated.parts["temporaries"])])
    if result is not None:
        rows.append(["weights and cache, as compiled for a decode step", gb(result.decode.arguments)])
        rows.append(["temporaries, compiled: the most of any program", gb(result.temporaries)])
    rows.append(["there is", gb(given.topology.memory)])
    return rows


def verdict(given: Inputs, result: Result | None) -> dict[str, Any]:
    """Whether it fits, the longest length that does, and the fewest devices. Compiled figures count where there are any."""
    there = given.topology.memory
    need = given.need(given.length, given.abstract_mesh, given.rules)
    total = need.total
    if result is not None:
        total = max(result.decode.arguments, need.parts["weights"] + need.parts["cache"]) + result.temporaries
    temporaries = None if result is None else result.temporaries

    def at(length: int, mesh: Devices, rules: Rules) -> Need:
        return given.need(length, mesh, rules, temporaries)

    fewest = fit.smallest(given.need, given.length, given.rows, SERVING, there)
    return {
        "bytes_needed": total,
        "bytes_there": there,
        "fits": total <= there,
        "longest_tokens": fit.longest(at, LONGEST, given.abstract_mesh, given.rules, there, CACHE_MULTIPLE),
        "smallest_mesh": None if fewest is None else fit.mesh_flag(fewest),
    }


def verdict_text(given: Inputs, found: dict[str, Any]) -> str:
    needed, there = gb(found["bytes_needed"]), gb(found["bytes_there"])
    fits = "It fits" if found["fits"] else "It does not fit"
    longest, fewest = found["longest_tokens"], found["smallest_mesh"]
    text = f"{fits}: a device needs {needed} GB of {there}. "
    text += f"The longest cache of {given.rows} row(s) that fits has {longest:,} tokens. " if longest else "No length fits. "
    if fewest is None:
        return text + "By the estimates, no number of such devices holds it."
    return text + f"By the estimates, the fewest such devices that hold {given.length:,} tokens are `--mesh={fewest}`."


def program_rows(result: Result) -> list[list[str]]:
    rows = []
    for program in (*result.prefill, result.decode, result.decode_all_full):
        if program.refused:
            rows.append([program.name, f"refused: {program.refused}", "-", "-", "-"])
            continue
        moved = "-" if program.bytes_accessed is None else gb(program.bytes_accessed)
        cells = [program.name, gb(program.arguments), gb(program.temporaries), moved, f"{program.seconds_to_compile:.0f}"]
        rows.append(cells)
    return rows


def collective_rows(result: Result) -> list[list[str]]:
    rows = []
    for program in (*result.prefill, result.decode, result.decode_all_full):
        for kind in KINDS:
            if (traffic := program.collectives.get(kind, Traffic())).count:
                rows.append([program.name, kind, str(traffic.count), f"{traffic.sent / 1e6:,.2f}"])
    return rows


def saving_rows(given: Inputs, result: Result | None) -> list[list[str]]:
    """All F against the schedule: what one device stores and moves."""
    all_full = Schedule.all_full(given.config.num_layers)
    weights = [weights_bytes(given, schedule, given.weights) for schedule in (all_full, given.schedule)]
    caches = [
        memory.cache_bytes(given.config, schedule, given.rows, given.length, given.form, given.abstract_mesh, given.rules)
        for schedule in (all_full, given.schedule)
    ]
    tokens = [bytes_per_token(given, schedule) for schedule in (all_full, given.schedule)]
    rows = [
        ["cache, KB a token", *(f"{n / 1e3:,.2f}" for n in tokens), f"{(tokens[0] - tokens[1]) / 1e3:,.2f}"],
        ["cache, GB of one device", *map(gb, caches), gb(caches[0] - caches[1])],
        ["weights, GB of one device", *map(gb, weights), gb(weights[0] - weights[1])],
    ]
    if result is not None:
        decode = result.decode_all_full, result.decode
        held = [program.arguments + program.temporaries for program in decode]
        rows.append(["decode step, GB held", *map(gb, held), gb(held[0] - held[1])])
    return rows


MEMORY_HEADER = ["of one device", "GB"]
PROGRAM_HEADER = ["program", "arguments, GB", "temporaries, GB", "GB moved, by XLA's cost model", "seconds to compile"]
COLLECTIVE_HEADER = ["program", "collective", "operations", "MB sent by a device"]
SAVING_HEADER = ["", "all F", "schedule", "saved"]


def report(given: Inputs, result: Result | None, output: Output) -> None:
    """Writes results.json and report.md, and prints the tables."""
    found = verdict(given, result)
    sections = [
        ("Memory", MEMORY_HEADER, memory_rows(given, result)),
        ("What the schedule saves", SAVING_HEADER, saving_rows(given, result)),
    ]
    if result is not None:
        sections.append(("Compiled programs", PROGRAM_HEADER, program_rows(result)))
        sections.append(("What devices exchange", COLLECTIVE_HEADER, collective_rows(result)))
    about = (
        f"{given.config.num_layers} layers, {given.schedule.num_full} F (`{given.schedule.pattern}`), bfloat16"
        f"{', matrices in fp8' if given.weights else ''}, "
        f"{given.rows} row(s), chunks of {given.chunk:,} tokens a row. GB are 10^9 bytes."
    )
    if result is None:
        about += f" Programs were not compiled: {given.topology.why_not}."
    text = [f"# {given.title}", about, verdict_text(given, found)]
    text += [f"## {name}\n\n{markdown_table(header, rows)}" for name, header, rows in sections]
    metrics = found | {
        "pattern": given.schedule.pattern,
        "mesh": fit.mesh_flag(given.layout),
        "need": given.need(given.length, given.abstract_mesh, given.rules).parts,
        "weights": weights_by_part(given),
        "weights_by_form": weights_by_form(given),
        "not_compiled": given.topology.why_not if result is None else None,
        "programs": []
        if result is None
        else [dataclasses.asdict(p) for p in (*result.prefill, result.decode, result.decode_all_full)],
    }
    output.finish("plan", metrics, "\n\n".join(text))
    print(given.title, about, verdict_text(given, found), sep="\n")
    for name, header, rows in sections:
        print(f"\n{name}\n{text_table(header, rows)}")
    print(f"\nwritten to {output.directory}/")


def run(output_dir: str, seed: int) -> None:
    given = read_inputs()
    output = Output.create(output_dir)
    print(given.title, flush=True)
    with device.target(given.topology):
        report(given, compile_all(given), output)
