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
from experiments.common import inputs, options, text
from experiments.common.report import Output, device, markdown_table, text_table
from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import overlap
from indexcache_jax.serving import FP8, Weights

for _name in ("checkpoint", "context", "held_out", "held_out_sequences", "dtype"):
    flags.declare_key_flag(_name)

CACHES: dict[str, dict[str, Any]] = {
    "fp8 index keys": {"index_dtype": FP8},
    "fp8 latents": {"latent_dtype": FP8},
    "fp8 both": {"index_dtype": FP8, "latent_dtype": FP8},
}
QUERIES = 64  # of a sequence, whose selections are compared
BLOCK = 256  # tokens whose logits exist at a time

_layer = jax.jit(serving.layer, static_argnames="keys")  # unlike inference's own it keeps its arguments


def walk(
    weights: Weights, tokens: jax.Array, config: Config, schedule: Schedule, given: list[jax.Array] | None = None, **kinds: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Hidden states [1, S, D] before every layer and after the last, and the F layers' indices [1, S, k] of tokens [1, S].

    `given`: hidden states that stand before the layers instead of the ones that the layers below made. `kinds`: of the
    cache, as `serving.init_cache` takes them.
    """
    s = tokens.shape[1]
    cache = serving.init_cache(config, schedule, 1, s, weights.embedding.dtype, **kinds)
    x, positions = serving.embed(weights.embedding, tokens, cache.lengths, jnp.full((1,), s, jnp.int32), config)
    states, selections, indices = [x], [], None
    for i, (p, one) in enumerate(zip(weights.layers, cache.layers, strict=True)):
        x, found, _ = _layer(p, x if given is None else given[i], None if p.full else indices, one, positions, s, config)
        if p.full:
            assert found is not None  # an F layer selects
            indices = found
            selections.append(found)
        states.append(x)
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
    head = Weights(weights.embedding, (), weights.final_norm, weights.head)
    sums = {name: np.zeros(4) for name in CACHES}
    alike: dict[str, list[np.ndarray]] = {name: [] for name in CACHES}
    for number, cut in enumerate(cuts):
        tokens, targets = jnp.asarray(cut[None, :-1]), jnp.asarray(cut[1:])
        states, selections = walk(weights, tokens, config, schedule)
        for name, kinds in CACHES.items():
            rounded, _ = walk(weights, tokens, config, schedule, **kinds)
            for first in range(0, targets.size, BLOCK):
                part = slice(first, first + BLOCK)
                found = _compare(head, states[-1][0, part], rounded[-1][0, part], targets[part], config)
                sums[name] += np.asarray(found, np.float64)
            _, chosen = walk(weights, tokens, config, schedule, states, **kinds)
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


def rows(measured: Mapping[str, Mapping[str, Any]], config: Config, schedule: Schedule, dtype: Any) -> list[list[str]]:
    """The table, the unrounded cache first."""
    size = serving.bytes_per_token(config, schedule, jnp.dtype(dtype), jnp.dtype(dtype))
    exact = next(iter(measured.values()))["loss_unrounded"]
    table = [[f"{dtype}", f"{size:,}", f"{exact:.4f}", "", "", "", "", ""]]
    for name, one in measured.items():
        kinds = CACHES[name]
        latent, index = (jnp.dtype(kinds.get(part, dtype)) for part in ("latent_dtype", "index_dtype"))
        alike = one["selected_alike"]
        table.append(
            [
                name,
                f"{serving.bytes_per_token(config, schedule, latent, index):,}",
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
    """A checkpoint, the form of its weights that inference runs, and cuts [N, S+1] of held-out text."""

    checkpoint: inputs.Checkpoint
    config: Config
    schedule: Schedule
    weights: Weights
    cuts: np.ndarray


def read_inputs(seed: int) -> Inputs:
    """All that is read; without --held_out a tenth of the standard library's sources."""
    options.check_positive("held_out_sequences")
    checkpoint = inputs.checkpoint()
    config, schedule, params = checkpoints_convert.load(checkpoint.directory, dtype=jnp.dtype(checkpoint.dtype))
    reader = inputs.reader(checkpoint.directory, config)
    given = options.HELD_OUT.value
    documents = text.documents(given) if given else inputs.split("", given, "held_out").held_out
    cuts = reader.draw(documents, "held_out", options.HELD_OUT_SEQUENCES.value, seed)
    about = f"{schedule.pattern}; {len(cuts)} x {reader.context} tokens; {checkpoint.dtype} on {device()['kind']}"
    print(f"{checkpoint.name}: {about}")
    return Inputs(checkpoint, config, schedule, serving.weights_of(params, config, schedule), cuts)


def report(measured: Mapping[str, Mapping[str, Any]], given: Inputs, output: Output) -> None:
    """Writes results.json and report.md, and prints the table."""
    name, pattern = given.checkpoint.name, given.schedule.pattern
    table = rows(measured, given.config, given.schedule, given.checkpoint.dtype)
    about = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    count, length = given.cuts[:, 1:].shape
    text = f"# 8 bits in the cache of {name}\n\n{about}\n\n{markdown_table(HEADER, table)}\n\n"
    text += f"{count} sequences of {length} tokens, losses in nats a token; schedule `{pattern}`.\n"
    output.finish("precision", {"checkpoint": name, "pattern": pattern, "caches": measured}, text)
    print(f"\n{text_table(HEADER, table)}\n\nwritten to {output.directory}/")


def run(output_dir: str, seed: int) -> None:
    given = read_inputs(seed)
    output = Output.create(output_dir)
    report(measure(given.weights, given.cuts, given.config, given.schedule), given, output)
