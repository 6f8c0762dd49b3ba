"""What 8 bits change, in the cache and in the weights: selections, logits and loss of a checkpoint on held-out text.

Caches with index keys, latents or both in float8_e4m3fn, a scale a token; and matrices in it with a scale for each 128 x 128,
as --weights=fp8 loads them, with activations as they are or in 8 bits too, a scale for each 128 numbers, as kernels for Hopper
have them that multiply many tokens. Each against the model decoded into --dtype, with its cache in that; the text goes through
the layers that inference runs. Selections: |A n B| / k of queries that see more than k keys, every F layer given
the hidden states that the unrounded model has below it, so that a layer's figure is its own. Logits and loss: end to end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import devices, fit, inputs, options, text
from experiments.common.report import Output, device, markdown_table, text_table, time_left
from indexcache_jax import memory, ops, serving
from indexcache_jax.config import Config
from indexcache_jax.positions import even_order, in_own_order
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import overlap
from indexcache_jax.serving import FP8, CacheFormat, Weights
from indexcache_jax.sharding import SERVING, Rules

for _name in ("checkpoint", "context", "held_out", "held_out_sequences", "dtype", "mesh"):
    flags.declare_key_flag(_name)

# The parts of a cache that are kept in 8 bits.
CACHES = {"fp8 index keys": ("index_dtype",), "fp8 latents": ("latent_dtype",), "fp8 both": ("index_dtype", "latent_dtype")}
# Matrices in 8 bits: whether the activations that they multiply are too.
WEIGHTS = {"fp8 weights": False, "fp8 weights and activations": True}
QUERIES = 64  # of a sequence, whose selections are compared
BLOCK = 256  # tokens whose logits exist at a time


def cache_format(cache: str | None, dtype: Any) -> CacheFormat:
    """The format of one of CACHES beside `dtype`; for any other name all of it is in `dtype`."""
    return dataclasses.replace(CacheFormat.of(dtype), **dict.fromkeys(CACHES.get(cache or "", ()), FP8))


def activations(name: str) -> contextlib.AbstractContextManager[None]:
    """Within, activations are as one of WEIGHTS has them."""
    return ops.rounded_rows() if WEIGHTS.get(name) else contextlib.nullcontext()


def walk(
    weights: Weights,
    tokens: jax.Array,
    config: Config,
    schedule: Schedule,
    form: CacheFormat,
    given: list[jax.Array] | None = None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Hidden states [1, S, D] before every layer and after the last, and the F layers' indices [1, S, k] of tokens [1, S].

    Under a mesh that splits queries both are in the order of `positions.even_order`.
    `given`: hidden states that the layers take instead of those that the layers below made.
    """
    s = tokens.shape[1]
    cache = serving.init_cache(config, schedule, 1, s, form)
    x, positions = serving.embed(weights.embedding, tokens, cache.lengths, jnp.full((1,), s, jnp.int32), config)
    states, selections = [x], []

    def record(layer: int, x: jax.Array, selected: jax.Array | None) -> jax.Array:
        states.append(x)
        if selected is not None:
            selections.append(selected)
        return x if given is None else given[layer + 1]

    serving.walk(weights, x if given is None else given[0], cache, positions, s, config, visit=record)
    return states, selections


@functools.partial(jax.jit, static_argnames="config")
def _compare(weights: Weights, exact: jax.Array, rounded: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """Summed over tokens: both losses of targets [W], KL(exact || rounded) of the predictions, and whether they agree."""
    a, b = (jax.nn.log_softmax(serving.logits(weights, x, config), axis=-1) for x in (exact, rounded))
    losses = [-jnp.sum(jnp.take_along_axis(x, targets[:, None], axis=-1)) for x in (a, b)]
    same = jnp.sum(jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1))
    return jnp.stack([*losses, jnp.sum(jnp.exp(a) * (a - b)), same.astype(jnp.float32)])


def own_order(x: jax.Array) -> jax.Array:
    """x [1, S, D] of `walk` in the tokens' own order."""
    return in_own_order(x, even_order(x.shape[1]))


def selected_alike(exact: list[jax.Array], rounded: list[jax.Array], k: int) -> np.ndarray:
    """|A n B| / k of every F layer, from indices [1, S, k] as `walk` gives them, over queries that see more than k keys."""
    s = exact[0].shape[1]
    exact, rounded = ([own_order(indices) for indices in side] for side in (exact, rounded))
    picked = np.unique(np.linspace(k, s - 1, QUERIES).astype(int))
    pairs = [jnp.stack([a[0, picked], b[0, picked]]) for a, b in zip(exact, rounded, strict=True)]
    return np.array([float(jnp.mean(overlap.intersection_sizes(pair)[:, 0, 1])) / k for pair in pairs])


def measure(
    weights: Weights, in_8_bits: Weights, cuts: np.ndarray, config: Config, schedule: Schedule
) -> dict[str, dict[str, Any]]:
    """By what is in 8 bits: losses in nats a token, KL, agreement of the likeliest token, and what the F layers select alike.

    in_8_bits: the same weights as --weights=fp8 loads them.
    """
    dtype = weights.embedding.dtype
    models = dict.fromkeys(CACHES, weights) | dict.fromkeys(WEIGHTS, in_8_bits)
    sums = {name: np.zeros(4) for name in models}
    alike: dict[str, list[np.ndarray]] = {name: [] for name in models}
    began = time.perf_counter()
    for number, cut in enumerate(cuts):
        tokens, targets = jnp.asarray(cut[None, :-1]), jnp.asarray(cut[1:])
        states, selections = walk(weights, tokens, config, schedule, cache_format(None, dtype))
        for name, model in models.items():
            form = cache_format(name, dtype)
            with activations(name):
                rounded, _ = walk(model, tokens, config, schedule, form)
                _, chosen = walk(model, tokens, config, schedule, form, states)
            last = [own_order(side[-1])[0] for side in (states, rounded)]
            for first in range(0, targets.size, BLOCK):
                part = slice(first, first + BLOCK)
                found = _compare(weights.ends, *(x[part] for x in last), targets[part], config)
                sums[name] += np.asarray(found, np.float64)
            alike[name].append(selected_alike(selections, chosen, config.index_topk))
        print(f"sequences: {time_left(number + 1, len(cuts), began)}", flush=True)
    result = {}
    for name, total in sums.items():
        exact, loss, divergence, same = total / cuts[:, 1:].size
        layers = np.mean(alike[name], axis=0)
        result[name] = {
            "loss": loss,
            "loss_unrounded": exact,
            "divergence": divergence,
            "same_likeliest_token": same,
            "selected_alike": layers.tolist(),
        }
    return result


HEADER = [
    "in 8 bits",
    "cache, bytes a token",
    "weights, MB",
    "loss",
    "change",
    "KL of predictions",
    "same likeliest token",
    "selected alike",
    "worst layer",
]


def megabytes(config: Config, schedule: Schedule, dtype: Any, weights: str | None) -> str:
    """Of all weights, with matrices in 8 bits ("fp8") or in `dtype`."""
    tree = serving.weights.abstract(config, schedule, weights)
    return f"{memory.tree_bytes(tree, dtype, memory.mesh_of(), SERVING) / 1e6:,.1f}"


def rows(measured: Mapping[str, Mapping[str, Any]], config: Config, schedule: Schedule, dtype: Any) -> list[list[str]]:
    """The table, the model without 8 bits first."""
    size = serving.bytes_per_token(config, schedule, dtype)
    exact = next(iter(measured.values()))["loss_unrounded"]
    whole = megabytes(config, schedule, dtype, None)
    table = [[f"nothing, {dtype}", f"{size:,}", whole, f"{exact:.4f}", "", "", "", "", ""]]
    for name, one in measured.items():
        alike = one["selected_alike"]
        table.append(
            [
                name,
                f"{serving.bytes_per_token(config, schedule, cache_format(name, dtype)):,}",
                megabytes(config, schedule, dtype, "fp8") if name in WEIGHTS else whole,
                f"{one['loss']:.4f}",
                f"{100 * (one['loss'] / exact - 1):+.2f} %",
                f"{one['divergence']:.5f}",
                f"{100 * one['same_likeliest_token']:.2f} %",
                f"{100 * np.mean(alike):.2f} %",
                f"{100 * np.min(alike):.2f} %",
            ]
        )
    return table


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A checkpoint, its weights as inference runs them, decoded and in 8 bits, and cuts [N, S+1] of held-out text."""

    checkpoint: inputs.Checkpoint
    config: Config
    schedule: Schedule
    weights: Weights
    in_8_bits: Weights
    cuts: np.ndarray


def check_memory(config: Config, schedule: Schedule, dtype: str) -> None:
    """Says what is needed of memory; ValueError where that does not fit."""
    # Of a token of the exact model and of a rounded one: hidden states around every layer, and every F layer's selection.
    states = (config.num_layers + 1) * config.hidden_size * jnp.dtype(dtype).itemsize
    kept = 2 * (states + schedule.num_full * 4 * config.index_topk)

    def need(length: int, mesh: memory.Devices, rules: Rules) -> memory.Need:
        decoded, in_8_bits = (
            memory.tree_bytes(serving.weights.abstract(config, schedule, form), dtype, mesh, rules) for form in (None, "fp8")
        )
        shares = mesh.shape["context"] if length % mesh.shape["context"] == 0 else 1
        parts = {"weights": decoded, "weights in 8 bits": in_8_bits, "hidden states and selections": length // shares * kept}
        parts["cache"] = memory.cache_bytes(config, schedule, 1, length, CacheFormat.of(dtype), mesh, rules)
        parts["temporaries"] = memory.prefill_temporaries(config, schedule, 1, length, length, dtype, mesh, rules)
        return memory.Need(parts)

    context = options.CONTEXT.value
    fit.inference(need, context, f"--context={context}", "a smaller one or --dtype=bfloat16")


def read_inputs(seed: int) -> Inputs:
    """All that is read; without --held_out a tenth of the standard library's sources."""
    options.check_positive("held_out_sequences")
    checkpoint = inputs.checkpoint()
    config, schedule = inputs.described(checkpoint.directory)
    reader = inputs.reader(checkpoint.directory, config)
    check_memory(config, schedule, checkpoint.dtype)
    asked: dict[str, Any] = {"dtype": checkpoint.dtype, "form": "serving"}
    config, schedule, weights = checkpoints_convert.load(checkpoint.directory, **asked)
    with warnings.catch_warnings(action="ignore"):  # they came with the same files
        in_8_bits = checkpoints_convert.load(checkpoint.directory, **asked, weights="fp8")[2]
    given = options.HELD_OUT.value
    documents = text.documents(given, "held_out") if given else inputs.split("", given, "held_out").held_out
    cuts = reader.draw(documents, "held_out", options.HELD_OUT_SEQUENCES.value, seed)
    about = f"{schedule.pattern}; {len(cuts)} x {reader.context} tokens; {checkpoint.dtype} on {device()['kind']}"
    print(f"{checkpoint.name}: {about}")
    return Inputs(checkpoint, config, schedule, weights, in_8_bits, cuts)


def report(measured: Mapping[str, Mapping[str, Any]], given: Inputs, output: Output, layout: devices.Layout) -> None:
    """Writes results.json and report.md, and prints the table."""
    name, pattern = given.checkpoint.name, given.schedule.pattern
    table = rows(measured, given.config, given.schedule, given.checkpoint.dtype)
    about = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    count, length = given.cuts[:, 1:].shape
    text = f"# 8 bits in {name}\n\n{about}\n\n{markdown_table(HEADER, table)}\n\n"
    text += f"{count} sequences of {length} tokens, losses in nats a token; schedule `{pattern}`.\n"
    output.finish("precision", {"checkpoint": name, "pattern": pattern, "in_8_bits": measured}, text, layout)
    print(f"\n{text_table(HEADER, table)}\n\nwritten to {output.directory}/")


def run(output_dir: str, seed: int) -> None:
    layout = devices.layout(rows=1)
    with devices.in_force(layout, SERVING):
        given = read_inputs(seed)
        output = Output.create(output_dir)
        measured = measure(given.weights, given.in_8_bits, given.cuts, given.config, given.schedule)
    report(measured, given, output, layout)
