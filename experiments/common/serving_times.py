"""What schedules take of inference: whole models timed in turns, or an estimate from single layers of one that has no room."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints_convert
from experiments.common import inputs
from experiments.common.report import progress
from indexcache_jax import memory, serving, sharding
from indexcache_jax.config import Config
from indexcache_jax.memory import Devices, Need
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat
from indexcache_jax.serving.generation import CHUNK, cache_length
from indexcache_jax.sharding import SERVING, Rules

TIMED_RUNS = 3
STEPS = 32  # decode steps of a program
MORE = 3  # layers by which the timed models differ


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a prefill and of a decode step under each schedule, None where they are not known; how they were got."""

    prefill: list[float | None]
    decode: list[float | None]
    how: str = ""
    estimated: bool = False

    @classmethod
    def none(cls, schedules: Sequence[Schedule], how: str = "") -> Times:
        return cls([None for _ in schedules], [None for _ in schedules], how)


@dataclasses.dataclass(frozen=True)
class Served:
    """Serving weights with what they belong to."""

    weights: serving.Weights
    config: Config
    schedule: Schedule


def timed(models: Sequence[Served], tokens: np.ndarray, steps: int = 0) -> list[tuple[float, float | None]]:
    """The median seconds of prefilling tokens [B, S] into an empty cache, and of one of `steps` decode steps after them.

    The models take turns. The second is None where steps is 0.
    """
    batch, length = tokens.shape
    prefills: list[list[float]] = [[] for _ in models]
    decodes: list[list[float]] = [[] for _ in models]
    fewest = min(range(len(models)), key=lambda i: models[i].schedule.num_full)
    warm_up = {0, fewest}  # prefill's programs are one layer's, F or S: these two run all of them
    for round in progress(iterable=range(1 + TIMED_RUNS), unit="round", desc="serving"):
        for i, model in enumerate(models):
            if round == 0 and i not in warm_up and not steps:
                continue
            weights, config = model.weights, model.config
            room = cache_length(length + steps) if steps else length
            cache = serving.init_cache(config, model.schedule, batch, room, weights.embedding.dtype)
            jax.block_until_ready(cache)
            began = time.perf_counter()
            logits, cache = serving.prefill_prompts(weights, list(tokens), cache, config)
            logits.block_until_ready()
            prefill, began = time.perf_counter() - began, time.perf_counter()
            if steps:
                token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                serving.decode(weights, token, cache, config, steps=steps)[0].block_until_ready()
            if round:
                prefills[i].append(prefill)
                decodes[i].append((time.perf_counter() - began) / max(steps, 1))
    medians = zip(map(statistics.median, prefills), map(statistics.median, decodes), strict=True)
    return [(prefill, decode if steps else None) for prefill, decode in medians]


def no_room(need: Need, what: str) -> str | None:
    """What to say where there is no room on a device; None where there is."""
    if need.total <= (there := memory.available()):
        return None
    return f"No times: {what} needs {need.total / 1e9:.1f} GB of each device, there are {there / 1e9:.1f} GB."


def _in_force() -> tuple[Devices, Rules]:
    mesh, rules = sharding.current()
    return (memory.mesh_of(), SERVING) if mesh is None else (mesh, rules)


# ---- a model that the devices hold


def of_checkpoint(checkpoint: inputs.Checkpoint, schedules: Sequence[Schedule], tokens: np.ndarray) -> Times:
    """Prefill of tokens [B, S] under each schedule.

    The weights are read from the checkpoint once more, as inference runs them, so that they are in memory once where the
    caller has let go of the search's. No times where they have no room on the devices.
    """
    config, schedule = inputs.described(checkpoint.directory)
    rows, length = tokens.shape
    mesh, rules = _in_force()
    whole = memory.serving_need(
        config,
        schedule,
        rows=rows,
        length=length,
        chunk=CHUNK,
        dtype=checkpoint.dtype,
        form=CacheFormat.of(checkpoint.dtype),
        mesh=mesh,
        rules=rules,
        weights=checkpoint.weights,
    )
    if (lacking := no_room(whole, f"inference of {rows} x {length:,} tokens")) is not None:
        return Times.none(schedules, lacking)
    with warnings.catch_warnings(action="ignore"):  # they came when the model was opened
        config, _, weights = checkpoints_convert.load(
            checkpoint.directory, dtype=checkpoint.dtype, form="serving", weights=checkpoint.weights
        )
    models = [Served(serving.restrict(weights, config, schedule), config, schedule) for schedule in schedules]
    prefill = [seconds for seconds, _ in timed(models, tokens)]
    how = (
        f"Prefill: the median of {TIMED_RUNS} runs over {len(tokens)} x {tokens.shape[1]:,} tokens, the schedules taking turns."
    )
    return Times(list(prefill), [None for _ in schedules], how)


# ---- an estimate from single layers


@dataclasses.dataclass(frozen=True)
class LayerSeconds:
    """What a layer with an indexer and one without take."""

    full: float
    shared: float

    @classmethod
    def between(cls, one: float, all_full: float, all_shared: float) -> LayerSeconds:
        """From models of an F layer alone, of it and MORE like it, and of it and MORE S layers.

        What comes before and after the layers is in all three, so their differences are free of it.
        """
        return cls((all_full - one) / MORE, (all_shared - one) / MORE)


ByKind = dict[bool, LayerSeconds]  # by whether a layer has experts


def of_all_layers(schedule: Schedule, config: Config, by_kind: ByKind) -> float:
    """The sum over a model's layers of what one of its kind takes."""
    kinds = zip(schedule.is_full, config.moe_layers, strict=True)
    return sum(by_kind[experts].full if full else by_kind[experts].shared for full, experts in kinds)


def cut_models(config: Config, experts: bool, dtype: str, weights: str | None) -> list[Served]:
    """The three models of `LayerSeconds.between`, which share one layer with random weights."""
    one = serving.random_weights(jax.random.key(0), inputs.cut(config, (experts,)), jnp.dtype(dtype), weights)
    two = dataclasses.replace(one, layers=one.layers * 2)
    full, shared = serving.restrict(two, inputs.cut(config, (experts,) * 2), Schedule("FS")).layers
    return [
        Served(
            dataclasses.replace(one, layers=tuple(full if letter == "F" else shared for letter in pattern)),
            inputs.cut(config, (experts,) * len(pattern)),
            Schedule(pattern),
        )
        for pattern in ("F", "F" * (1 + MORE), "F" + "S" * MORE)
    ]


def need(config: Config, rows: int, length: int, dtype: str, weights: str | None) -> Need:
    """What the estimate takes of each device."""
    mesh, rules = _in_force()
    experts = any(config.moe_layers)
    one, all_full = inputs.cut(config, (experts,)), inputs.cut(config, (experts,) * (1 + MORE))
    schedule, room = Schedule.all_full(1 + MORE), cache_length(length + STEPS)
    layer = serving.weights.abstract(one, Schedule("F"), weights)
    return Need(
        {
            "a layer": memory.tree_bytes(layer, dtype, mesh, rules),
            "cache": memory.cache_bytes(all_full, schedule, rows, room, CacheFormat.of(dtype), mesh, rules),
            "temporaries": memory.prefill_temporaries(all_full, schedule, rows, min(CHUNK, length), length, dtype, mesh, rules),
        }
    )


def estimate(config: Config, schedules: Sequence[Schedule], tokens: np.ndarray, dtype: str, weights: str | None) -> Times:
    """An estimate of prefilling tokens [1, S], and of a decode step after them, under each schedule, from single layers.

    dtype, weights: of the layers, which have random weights. No times where a layer has no room on the devices.
    """
    length = tokens.shape[1]
    if (lacking := no_room(need(config, len(tokens), length, dtype, weights), f"a layer at {length:,} tokens")) is not None:
        return Times.none(schedules, lacking)
    prefills: ByKind = {}
    decodes: ByKind = {}
    for experts in sorted(set(config.moe_layers)):
        models = cut_models(config, experts, dtype, weights)
        found = timed(models, tokens % models[0].config.vocab_size, STEPS)
        prefills[experts] = LayerSeconds.between(*(prefill for prefill, _ in found))
        decodes[experts] = LayerSeconds.between(*(decode for _, decode in found if decode is not None))
    return Times(
        [of_all_layers(schedule, config, prefills) for schedule in schedules],
        [of_all_layers(schedule, config, decodes) for schedule in schedules],
        said(config, prefills, decodes, length, weights or dtype),
        estimated=True,
    )


def said(config: Config, prefills: ByKind, decodes: ByKind, length: int, form: str) -> str:
    """How an estimate was made, for a reader who wants to do the sum again."""
    lines = [
        f"Times are estimates for one request of {length:,} tokens: the sum over all layers of what one F and one S layer with "
        f"random {form} weights take, without embedding and head."
    ]
    for experts, prefill in prefills.items():
        kind, count = "with experts" if experts else "dense", sum(each == experts for each in config.moe_layers)
        decode = decodes[experts]
        lines.append(
            f"Of the layers {kind}, {count} in all, an F layer takes {1e3 * prefill.full:.3g} ms of prefill and "
            f"{1e6 * decode.full:.3g} us of a decode step, an S layer {1e3 * prefill.shared:.3g} ms and "
            f"{1e6 * decode.shared:.3g} us."
        )
    return " ".join(lines)


def as_json(times: Times, number: int) -> dict[str, Any]:
    """What results.json holds of one schedule's times."""
    return {
        "prefill_seconds": times.prefill[number],
        "decode_step_seconds": times.decode[number],
        "estimated": times.estimated,
    }
