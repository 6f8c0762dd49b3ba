"""Which implementation of every operation of `pallas_kernels` a model runs on the device compiled for, and why no better one.

Nothing is computed: a layer is traced on shapes, and `pallas_kernels.dispatch` records what it chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from indexcache_jax import ops, serving, sharding, tensors
from indexcache_jax.config import Config
from indexcache_jax.positions import Positions, make_positions
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, few_rows, fused
from indexcache_jax.serving.layer import LayerFunction, layer
from pallas_kernels import device, dispatch
from pallas_kernels.dispatch import Choice

PREFILL, DECODE, TRAINING = "prefill", "decode", "training"
# What a kernel for a whole layer of a single token leaves to others.
BESIDE_DECODE_LAYER = ("indexer_topk", "sparse_mla")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What one device computes with, as shapes: a model's weights, and a cache of [rows, length]."""

    config: Config
    weights: serving.Weights
    cache: serving.Cache
    rows: int
    length: int
    dtype: Any

    def hidden(self, width: int) -> tuple[jax.ShapeDtypeStruct, Positions]:
        """Hidden states [rows, width, D] of the last tokens, and their positions."""
        row = jax.ShapeDtypeStruct((self.rows,), jnp.int32)
        positions = jax.eval_shape(lambda n: make_positions(n - width, n, width, self.config), row)
        return jax.ShapeDtypeStruct((self.rows, width, self.config.hidden_size), jnp.dtype(self.dtype)), positions

    def layers(self) -> set[int]:
        """The first F layer, and the first layer with experts: between them they ask for every operation."""
        full = next(i for i, p in enumerate(self.weights.layers) if p.full)
        return {full, next((i for i, p in enumerate(self.weights.layers) if isinstance(p.mlp, serving.Experts)), full)}


def shapes(
    config: Config, schedule: Schedule, *, rows: int, length: int, dtype: Any, form: CacheFormat, weights: str | None
) -> Shapes:
    """The shapes of a model for inference. weights: "fp8" for matrices in 8 bits."""
    tree = tensors.shape_structs(serving.weights.abstract(config, schedule, weights), dtype)
    cache = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct(t.shape, jnp.dtype(t.dtype)),
        serving.cache.abstract(config, schedule, rows, length, form),
    )
    return Shapes(config, tree, cache, rows, length, dtype)


def of_layers(given: Shapes, width: int, layer: LayerFunction = layer) -> dict[str, Choice]:
    """The choice of every operation of a layer over `width` new tokens a row, by its name. layer: runs one."""
    x, positions = given.hidden(width)
    selected = (given.rows, width, min(given.config.index_topk, given.length))
    indices = jax.ShapeDtypeStruct(selected, jnp.int32)
    with dispatch.recorded() as choices:
        for i in sorted(given.layers()):
            jax.eval_shape(
                lambda p, x, indices, cache, positions: layer(p, x, indices, cache, positions, given.length, given.config),
                given.weights.layers[i],
                x,
                indices,
                given.cache.layers[i],
                positions,
            )
    return choices


def reason_against(given: Shapes, why_not: Callable[..., str | None]) -> str | None:
    """What the `why_not` of `fused` or `few_rows` says of a decode step."""
    found: list[str | None] = []

    def ask(weights: serving.Weights, x: jax.Array, cache: serving.Cache, positions: Positions) -> jax.Array:
        found.append(why_not(weights, x, cache, positions, given.config))
        return x

    if sharding.computes_alone():
        ask = sharding.on_each_device(ask, ((), ("batch",), ("batch",), ("batch",)), ("batch",))
    x, positions = given.hidden(1)
    jax.eval_shape(ask, given.weights, x, given.cache, positions)
    return found[0]


def of_model(given: Shapes, chunk: int) -> dict[str, dict[str, Choice]]:
    """The choices by kind of work and operation: a prompt's chunk of `chunk` tokens a row, a decode step, and training."""
    reason = reason_against(given, fused.why_not)
    # Whether one kernel computes what stands between two attentions of a decode step.
    single = Choice("xla", {"mosaic_gpu": reason}) if reason else Choice("mosaic_gpu", {})
    decode = of_layers(given, 1, layer if reason_against(given, few_rows.why_not) else few_rows.layer)
    if single.name != "xla":
        decode = {name: choice for name, choice in decode.items() if name in BESIDE_DECODE_LAYER}
    training = ops.training_choices(1, chunk, given.dtype, given.config)
    return {PREFILL: of_layers(given, chunk), DECODE: decode | {"decode_layer": single}, TRAINING: training}


def sentences(choices: dict[str, dict[str, Choice]]) -> list[str]:
    """A line for every operation, or for each kind of its work where these differ: what runs, and why nothing better."""
    by_operation: dict[str, dict[str, list[str]]] = {}
    for work, chosen in choices.items():
        for operation, choice in chosen.items():
            by_operation.setdefault(operation, {}).setdefault(_said(choice), []).append(work)
    return [
        f"{operation}, {' and '.join(works)}: {said}"
        for operation, found in by_operation.items()
        for said, works in found.items()
    ]


def _said(choice: Choice) -> str:
    """Such as "xla; mosaic_gpu: it needs a Hopper GPU"."""
    known = f", the device compiled for is a {device.platform()!r}"  # to who reads of one device
    return "; ".join([choice.name, *(f"{name}: {reason.removesuffix(known)}" for name, reason in choice.passed_over.items())])
