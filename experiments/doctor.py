"""Says what this machine has, which kernels run on it and why no others, and what a model needs of each device.

With --preset=NAME or --checkpoint=DIR for that model, otherwise for the kernels of the 30B shape. With --topology for devices
that need not be at hand. Nothing is loaded, compiled or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

import indexcache_jax
from experiments.common import devices, fit, implementations, inputs, options, programs, topologies
from experiments.common.devices import Layout
from experiments.common.fit import NeedAt
from experiments.common.report import text_table, versions
from experiments.common.topologies import Topology
from indexcache_jax import memory, sharding, tensors
from indexcache_jax.config import Config
from indexcache_jax.memory import Devices, Need
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat
from indexcache_jax.sharding import SERVING, Rules
from pallas_kernels import device

for _name in (
    *("preset", "checkpoint", "schedule", "topology", "mesh", "weights", "dtype"),
    *("tokens", "context", "batch_size", "chunk", "latent_cache", "index_cache"),
):
    flags.declare_key_flag(_name)

# Tokens of a prefill chunk for every device that shares it, by default: where XLA does not fuse the experts' sums, fewer.
CHUNK, CHUNK_OF_A_TPU = 4096, 256
WIDTH = 118  # of the terminal

# ---- the machine

# What some work needs besides, by the name of the distribution, and how it is installed.
OPTIONAL = {
    "jinja2": "chat templates, for lines with messages in generate: pip install 'indexcache-jax[chat]'",
    "tokenizers": "a checkpoint's tokenizer.json: pip install tokenizers",
    "jax-cuda13-plugin": "NVIDIA GPUs: pip install 'indexcache-jax[cuda]'",
    "libtpu": "TPUs, and to compile for those that are not at hand: pip install 'indexcache-jax[tpu]'",
}
# Devices that a driver shows, and the platform by which JAX would know them.
DRIVERS = {"gpu": ("nvidia[0-9]*", "an NVIDIA GPU", "jax-cuda13-plugin"), "tpu": ("accel[0-9]*", "a TPU", "libtpu")}
DEVICES = pathlib.Path("/dev")
NOT_INSTALLED = "not installed"


def installed(distribution: str) -> str:
    """The version of an installed distribution, or that there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def about_installation() -> str:
    """Versions, where the library lies, what optional packages are there, and where compiled programs are kept."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "indexcache-jax")
    home = pathlib.Path(indexcache_jax.__file__).parents[1]
    packages = [[name, installed(name), use] for name, use in OPTIONAL.items()]
    header = ["optional package", "version", "for"]
    lines = [f"indexcache-jax {indexcache_jax.__version__} in {home}", found, "", text_table(header, packages)]
    return "\n".join([*lines, "torch and transformers are not needed but for this library's own tests", "", kept_programs()])


def kept_programs() -> str:
    """Where compiled programs are kept from one run to the next, and how many there are."""
    config: Any = jax.config  # whose settings have no types
    folder = config.jax_compilation_cache_dir
    if not config.jax_enable_compilation_cache:
        return "compiled programs are not kept: JAX_ENABLE_COMPILATION_CACHE is false"
    if folder is None:
        return f"compiled programs are not kept: {programs.why_not(programs.folder()) or 'JAX was not told where'}"
    sizes = []
    for path in pathlib.Path(folder).rglob("*"):
        with contextlib.suppress(OSError):  # another process may be tidying up
            sizes += [path.stat().st_size] if path.is_file() else []
    return f"compiled programs are kept in {folder} ({len(sizes):,} file(s), {sum(sizes) / 1e6:,.1f} MB)"


def about_devices() -> str:
    """The devices that JAX has, their memory, and those that a driver shows but JAX has not."""
    found = topologies.topology(topologies.LOCAL)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [
        f"devices: {found.num_devices} x {found.device_kind} ({found.platform}), {found.memory / 1e9:.2f} GB for each; "
        f"{os.cpu_count()} CPU cores, {host / 1e9:.2f} GB of host memory"
    ]
    for platform, (pattern, what, package) in DRIVERS.items():
        if found.platform != platform and any(DEVICES.glob(pattern)):
            lines.append(f"warning: there is {what} here that JAX does not use; {package} is {installed(package)}")
    return "\n".join(lines)


# ---- a model


@dataclasses.dataclass(frozen=True)
class Question:
    """A model and what is asked of it. base: its own schedule, which a search starts from; schedule: that of inference.

    rows: sequences at a time; length: cached tokens of each; context: tokens of a search's sequence; weights: "fp8" for
    matrices in 8 bits.
    """

    name: str
    config: Config
    base: Schedule
    schedule: Schedule
    topology: Topology
    layout: Layout
    rows: int
    length: int
    context: int
    chunk: int
    dtype: str
    form: CacheFormat
    weights: str | None

    @property
    def rules(self) -> Rules:
        return self.layout.rules(SERVING)

    def inference(self, length: int, mesh: Devices, rules: Rules) -> Need:
        """What inference needs of one device, at any length and mesh."""
        return memory.serving_need(
            self.config,
            self.schedule,
            rows=self.rows,
            length=length,
            chunk=self.chunk,
            dtype=self.dtype,
            form=self.form,
            mesh=mesh,
            rules=rules,
            weights=self.weights,
        )

    def searches(self) -> dict[str, NeedAt]:
        """What a search needs of one device, with all weights in memory and read layer by layer."""
        search = functools.partial(
            fit.search_need, self.config, self.base, rows=self.rows, dtype=self.dtype, weights=self.weights
        )
        return {"search": search(), "search --stream": search(stream=True)}


def read_question(topology: Topology) -> Question:
    """What the flags ask of a model on the devices of a topology. ValueError for what cannot be."""
    options.check_positive("batch_size", "tokens", "context", "chunk")
    directory = options.CHECKPOINT.value
    if directory and options.PRESET.present:
        raise ValueError(f"--preset={options.PRESET.value}: counts for nothing beside --checkpoint={directory}; leave one out")
    dtype = options.DTYPE.value or ("float32" if topology.platform == "cpu" else "bfloat16")
    if directory:
        name, weights = directory, dataclasses.replace(inputs.checkpoint(), dtype=dtype).weights
        config, base = inputs.described(directory)
    else:
        name, weights = options.PRESET.value, inputs.made_weights()
        config, base = inputs.preset_model(name)
    rows, text = options.BATCH_SIZE.value, options.MESH.value
    layout = devices.parse(text, topology.num_devices) if text else devices.suited(rows, topology.num_devices)
    length = min(options.TOKENS.value, config.max_position_embeddings)
    for flag in (options.TOKENS, options.CONTEXT):
        if flag.present and flag.value > config.max_position_embeddings:
            raise ValueError(f"--{flag.name}={flag.value}: {name} has {config.max_position_embeddings} positions")
    return Question(
        name=name,
        config=config,
        base=base,
        schedule=inputs.schedule_to_plan(base),
        topology=topology,
        layout=layout,
        rows=rows,
        length=length,
        context=options.CONTEXT.value if options.CONTEXT.present else length,
        chunk=min(length, options.CHUNK.value or layout.context * (CHUNK_OF_A_TPU if topology.platform == "tpu" else CHUNK)),
        dtype=dtype,
        form=inputs.cache_format(dtype, dtype),
        weights=weights,
    )


NEED_HEADER = ["GB of each device", "weights", "cache", "temporaries", "in all", "there is", "fits", "fewest such devices"]


def need_row(what: str, need: NeedAt, length: int, asked: Question) -> list[str]:
    """What some work needs of each device, whether it is there, and the fewest devices that have it."""
    there = asked.topology.memory
    try:
        found = need(length, asked.layout.abstract_mesh, asked.rules)
    except ValueError as error:  # the mesh does not divide it
        return [what, *["-"] * 4, f"{there / 1e9:.2f}", f"no: {error}", "-"]
    fewest = fit.smallest(need, length, asked.rows, SERVING, there)
    cache, temporaries = found.parts.get("cache"), found.parts["temporaries"]
    weights = found.total - (cache or 0) - temporaries
    sizes = ["-" if size is None else f"{size / 1e9:.2f}" for size in (weights, cache, temporaries)]
    fits = "yes" if found.total <= there else "no"
    mesh = "none" if fewest is None else str(fewest.num_devices)
    if fewest is not None and fewest.num_devices > 1:
        mesh += f": --mesh={fit.mesh_flag(fewest)}"
    return [what, *sizes, f"{found.total / 1e9:.2f}", f"{there / 1e9:.2f}", fits, mesh]


def about_model(asked: Question) -> str:
    """What the model needs of each device for inference and for a search."""
    config, schedule = asked.config, asked.schedule
    millions = tensors.count(abstract(config, asked.base)) / 1e6
    numbers = f"{millions / 1e3:,.1f} billion" if millions >= 1e3 else f"{millions:,.1f} million"
    form = "fp8 codes" if asked.weights else asked.dtype
    lines = [
        f"{asked.name}: {config.num_layers} layers, {numbers} weights in {form}, {asked.base.num_full} indexers; "
        f"inference under {schedule.num_full} F ({schedule.pattern})",
        f"on {asked.topology.num_devices} x {asked.topology.device_kind}, --mesh={fit.mesh_flag(asked.layout)}; {asked.rows} "
        f"sequence(s) at a time, chunks of {asked.chunk:,} tokens, cache in {_cache_names(asked.form)}",
    ]
    rows = [need_row(f"inference, {asked.length:,} tokens", asked.inference, asked.length, asked)]
    if asked.context > config.index_topk:
        for what, need in asked.searches().items():
            rows.append(need_row(f"{what}, {asked.context:,} tokens", need, asked.context, asked))
    else:
        lines.append(f"no search: --context={asked.context} is not above index_topk = {config.index_topk}, so all is selected")
    return "\n".join([*lines, text_table(NEED_HEADER, rows)])


def _cache_names(form: CacheFormat) -> str:
    names = dict.fromkeys([form.latent_dtype.name, form.index_dtype.name])
    return " and ".join(names)


def about_kernels(asked: Question) -> str:
    """Which implementation of every operation would run, and why no better one."""
    given = implementations.shapes(
        asked.config,
        asked.schedule,
        rows=asked.rows,
        length=asked.length,
        dtype=asked.dtype,
        form=asked.form,
        weights=asked.weights,
    )
    on = f"{asked.topology.device_kind} ({asked.topology.platform})"
    with sharding.use(asked.layout.abstract_mesh, asked.rules) if asked.layout.num_devices > 1 else contextlib.nullcontext():
        found = implementations.of_model(given, asked.chunk)
    lines = [f"kernels for {asked.name} in {asked.dtype} on {on}"]
    for line in implementations.sentences(found):
        lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


# ---- the command


def sections() -> Iterator[str]:
    """The parts of what is said, each as it is known: the machine's first, since asking for its devices may fail."""
    yield about_installation()
    yield about_devices()
    topology = topologies.topology(options.TOPOLOGY.value or topologies.LOCAL, compiling=False)
    asked = read_question(topology)
    elsewhere = device.target(topology) if topology.name != topologies.LOCAL else contextlib.nullcontext()
    with elsewhere:
        yield about_kernels(asked)
        if options.PRESET.present or options.CHECKPOINT.value:
            yield about_model(asked)
        else:
            yield "--preset=NAME or --checkpoint=DIR says what a model needs, with --topology=h200:8 of devices not at hand"


def run(output_dir: str, seed: int) -> None:
    options.refuse("nothing is written", "output_dir")
    for section in sections():
        print(f"{section}\n", flush=True)
