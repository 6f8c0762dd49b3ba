"""What 8 bits in the cache change: selections, logits and loss of a checkpoint on held-out text.

Caches with index keys, latents or both in float8_e4m3fn, a scale a token, against one in the dtype of the weights; the text
goes through the layers that inference runs. Selections: |A n B| / k of queries that see more than k keys, every F layer given
the hidden states that the unrounded model has below it, so that a layer's figure is its own. Logits and loss: end to end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import checkpoints_convert
from experiments import search
from experiments.common import options, text
from experiments.common.report import Output, device, markdown_table, text_table
from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import overlap
from indexcache_jax.serving import FP8, CacheFormat, Weights

for _name in ("checkpoint", "context", "held_out", "held_out_sequences", "dtype"):
    flags.declare_key_flag(_name)

# The parts of a cache that are kept in 8 bits.
CACHES = {"fp8 index keys": ("index_dtype",), "fp8 latents": ("latent_dtype",), "fp8 both": ("index_dtype", "latent_dtype")}
QUERIES = 64  # of a sequence, whose selections are compared
BLOCK = 256  # tokens whose logits exist at a time


def cache_format(cache: str | None, dtype: Any) -> CacheFormat:
    """The format of one of CACHES beside `dtype`; None is all of it in `dtype`."""
    return dataclasses.replace(CacheFormat.of(dtype), **dict.fromkeys(() if cache is None else CACHES[cache], FP8))


def walk(
    weights: Weights,
    tokens: jax.Array,
    config: Config,
    schedule: Schedule,
    form: CacheFormat,
    inputs: list[jax.Array] | None = None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Hidden states [1, S, D] before every layer and after the last, and the F layers' indices [1, S, k] of tokens [1, S].

    `inputs`: hidden states that the layers are given instead of those that the layers below made.
    """
    s = tokens.shape[1]
    cache = serving.init_cache(config, schedule, 1, s, form)
    x, positions = serving.embed(weights.embedding, tokens, cache.lengths, jnp.full((1,), s, jnp.int32), config)
    states, selections = [x], []

    def record(layer: int, x: jax.Array, selected: jax.Array | None) -> jax.Array:
        states.append(x)
        if selected is not None:
            selections.append(selected)
        return x if inputs is None else inputs[layer + 1]

    serving.walk(weights, x if inputs is None else inputs[0], cache, positions, s, config, visit=record)
    return states, selections


@functools.partial(jax.jit, static_argnames="config")
def _compare(weights: Weights, exact: jax.Array, rounded: jax.Array, targets: jax.Array, config: Config) -> jax.Array:
    """Summed over tokens: both losses of targets [W], KL(exact || rounded) of the predictions, and whether they agree."""
    a, b = (jax.nn.log_softmax(serving.logits(weights, x, config), axis=-1) for x in (exact, rounded))
    losses = [-jnp.sum(jnp.take_along_axis(x, targets[:, None], axis=-1)) for x in (a, b)]
    same = jnp.sum(jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1))
    return jnp.stack([*losses, jnp.sum(jnp.exp(a) * (a - b)), same.astype(jnp.float32)])


def selected_alike(exact: list[jax.Array], rounded: list[jax.Array], k: int) -> np.ndarray:
    """|A n B| / k of every F layer, from indices [1, S, k], over queries that see more than k keys."""
    s = exact[0].shape[1]
    picked = np.unique(np.linspace(k, s - 1, QUERIES).astype(int))
    pairs = [jnp.stack([a[0, picked], b[0, picked]]) for a, b in zip(exact, rounded, strict=True)]
    return np.array([float(jnp.mean(overlap.shared(pair)[:, 0, 1])) / k for pair in pairs])


def measure(weights: Weights, cuts: np.ndarray, config: Config, schedule: Schedule) -> dict[str, dict[str, Any]]:
    """By cache: losses in nats a token, KL, agreement of the likeliest token, and what the F layers select alike."""
    dtype = weights.embedding.dtype
    sums = {name: np.zeros(4) for name in CACHES}
    alike: dict[str, list[np.ndarray]] = {name: [] for name in CACHES}
    for number, cut in enumerate(cuts):
        tokens, targets = jnp.asarray(cut[None, :-1]), jnp.asarray(cut[1:])
        states, selections = walk(weights, tokens, config, schedule, cache_format(None, dtype))
        for name in CACHES:
            form = cache_format(name, dtype)
            rounded, _ = walk(weights, tokens, config, schedule, form)
            for first in range(0, targets.size, BLOCK):
                part = slice(first, first + BLOCK)
                found = _compare(weights.ends, states[-1][0, part], rounded[-1][0, part], targets[part], config)
                sums[name] += np.asarray(found, np.float64)
            _, chosen = walk(weights, tokens, config, schedule, form, states)
            alike[name].append(selected_alike(selections, chosen, config.index_topk))
        print(f"sequence {number + 1}/{len(cuts)}", flush=True)
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
    "cache",
    "bytes a token",
    "loss",
    "change",
    "KL of predictions",
    "same likeliest token",
    "selected alike",
    "worst layer",
]


def rows(found: Mapping[str, Mapping[str, Any]], config: Config, schedule: Schedule, dtype: Any) -> list[list[str]]:
    """The table, the unrounded cache first."""
    size = serving.bytes_per_token(config, schedule, dtype)
    exact = next(iter(found.values()))["loss_unrounded"]
    table = [[f"{dtype}", f"{size:,}", f"{exact:.4f}", "", "", "", "", ""]]
    for name, one in found.items():
        alike = one["selected_alike"]
        table.append(
            [
                name,
                f"{serving.bytes_per_token(config, schedule, cache_format(name, dtype)):,}",
                f"{one['loss']:.4f}",
                f"{100 * (one['loss'] / exact - 1):+.2f} %",
                f"{one['divergence']:.5f}",
                f"{100 * one['same_likeliest_token']:.2f} %",
                f"{100 * np.mean(alike):.2f} %",
                f"{100 * np.min(alike):.2f} %",
            ]
        )
    return table


def run(output_dir: str, seed: int) -> None:
    values = flags.FLAGS
    search.positive(held_out_sequences=values.held_out_sequences)
    checkpoint = options.CHECKPOINT.value or str(options.DEMO)
    dtype = options.DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config, schedule, weights = checkpoints_convert.load(checkpoint, dtype=jnp.dtype(dtype), form="serving")
    if not config.index_topk < values.context <= config.max_position_embeddings:
        raise ValueError(
            f"--context={values.context}: must be above index_topk = {config.index_topk}, up to which everything is "
            f"selected, and at most {config.max_position_embeddings}, the model's longest"
        )
    output, encoder = Output.create(output_dir), text.tokenizer(checkpoint)
    documents = text.documents(values.held_out) if values.held_out else search.split("", "", "held_out")[1]
    cuts = search.draw(
        documents,
        "--held_out",
        encoder,
        search.separator(config),
        values.held_out_sequences,
        values.context,
        config,
        seed,
    )
    name = options.CHECKPOINT.value or "the shipped checkpoint"
    print(f"{name}: {schedule.pattern}; {len(cuts)} x {values.context} tokens; {dtype} on {device()['kind']}")
    found = measure(weights, cuts, config, schedule)
    table = rows(found, config, schedule, dtype)
    about = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    report = f"# 8 bits in the cache of {name}\n\n{about}\n\n{markdown_table(HEADER, table)}\n\n"
    report += f"{len(cuts)} sequences of {values.context} tokens, losses in nats a token; schedule `{schedule.pattern}`.\n"
    output.finish("precision", {"checkpoint": name, "pattern": schedule.pattern, "caches": found}, report)
    print(f"\n{text_table(HEADER, table)}\n\nwritten to {output.directory}/")
