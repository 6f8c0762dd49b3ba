"""Training the indexers of a frozen model, group by group, with what a killed run needs to go on.

A group's indexer is written when it is trained. A killed run goes on with the next group: the hidden states before it are
computed again from the text, which takes a small part of the time that training takes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.common import journal
from experiments.common.journal import Journal, check_resumed, replacing
from experiments.common.report import Output, progress
from indexcache_jax import indexer_training, search, tensors
from indexcache_jax.indexer_training import Run, Trained
from indexcache_jax.layers import Layers
from indexcache_jax.params import Indexer, abstract
from indexcache_jax.schedule import Schedule

LOG = "groups.jsonl"
FOLDER = "indexers"
KEPT, COMPUTED = "kept", "computed at every step"
BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"  # work has no unit that a reader would want


@dataclasses.dataclass(frozen=True)
class Group:
    """A trained group: its F layer, its indexer, the divergence at every step in nats, and the seconds it took."""

    layer: int
    indexer: Indexer
    divergence: list[float]
    seconds: float

    @property
    def ends(self) -> tuple[float, float]:
        """The mean divergence of the first and of the last ten steps."""
        return float(np.mean(self.divergence[:10])), float(np.mean(self.divergence[-10:]))


def fingerprint(layers: Layers, tokens: np.ndarray) -> dict[str, Any]:
    """What tells weights and text apart: the first and the last layer speak for all, of which a large model has too many."""
    ends, last = layers.ends(), layers.config.num_layers - 1
    return search.fingerprint((ends, layers.layer(0), layers.layer(last)), [tokens])


def about(run: Run) -> dict[str, Any]:
    """What trained indexers depend on, as JSON."""
    return {
        "seed": run.seed,
        "pattern": run.layers.schedule.pattern,
        "schedule": run.schedule.pattern,
        "stage": dataclasses.asdict(run.stage),
        "spans": run.spans,
        "targets": KEPT if run.keeps_targets else COMPUTED,
        "model": run.config.to_hf(),
        **fingerprint(run.layers, run.tokens),
    }


def within(run: Run, memory: float, folder: pathlib.Path) -> tuple[Run, str]:
    """The run with at most `memory` bytes of what it keeps in host memory, and what that means, for a reader.

    Targets are kept where there is room for them, and where an earlier run, whose log `folder` holds, kept them: how much
    memory is free may have changed since, and a run that goes on does as it began. What has no room lies in files of `folder`.
    """
    need = indexer_training.need(run)
    keeps = began_with_targets(folder)
    if keeps is None:
        keeps = indexer_training.can_keep_targets(run) and need.states + need.targets <= memory
    on_disk = need.states + (need.targets if keeps else 0) > memory
    run = dataclasses.replace(run, keeps_targets=keeps, allocate=_on_disk(folder) if on_disk else np.empty)
    targets = f"{need.targets / 1e9:.2f} GB of targets" if keeps else f"targets {COMPUTED}"
    return run, f"{need.states / 1e9:.2f} GB of hidden states {f'in {folder}' if on_disk else 'in memory'}, {targets}"


def began_with_targets(folder: pathlib.Path) -> bool | None:
    """Whether the run whose log is in a folder keeps its targets; None where there is none. ValueError for another log."""
    heading = journal.heading(folder / LOG)
    return None if heading is None else heading.get("targets") == KEPT


def _on_disk(folder: pathlib.Path) -> indexer_training.Allocate:
    """Makes arrays in files of a folder. A file has no name once it is mapped, so that nothing is left when a run ends or is
    killed, and its room is freed with the array."""

    def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        with tempfile.TemporaryFile(dir=folder) as file:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            os.posix_fallocate(file.fileno(), 0, max(size, 1))  # OSError now where the disk is full, not a crash later
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))

    return allocate


def check_free(directory: pathlib.Path, resume: bool) -> None:
    """ValueError where an output folder holds an earlier run that is not to be resumed."""
    check_resumed(directory / LOG, (directory / LOG).exists(), resume)


def train(run: Run, output: Output, resume: bool) -> list[Group]:
    """The groups of a run, trained, or read where a run that is resumed has trained them before.

    ValueError for an output folder that holds another run, or one and not `resume`.
    """
    folder = output.directory / FOLDER
    with Journal(output.directory / LOG, about(run), fields={"layer": int, "divergence": list}, resume=resume) as log:
        folder.mkdir(exist_ok=True)
        done = {entry["layer"]: _read(folder, entry, run) for entry in log.entries}
        total = indexer_training.work(run, done)
        with progress(total=total / 1e9, desc="indexers", smoothing=0.05, bar_format=BAR) as bar:

            def see(work: float, what: str) -> None:
                bar.set_postfix_str(what, refresh=False)
                bar.update(min(work / 1e9, max(total / 1e9 - bar.n, 0)))  # the whole is an estimate

            for trained in indexer_training.train(run, done, see):
                done[trained.layer] = _write(folder, log, trained)
                first, last = done[trained.layer].ends
                bar.write(f"layer {trained.layer}: divergence {first:.3f} -> {last:.3f}, {trained.seconds:.0f} s")
    return [done[group[0]] for group in run.groups]


def _file(folder: pathlib.Path, layer: int) -> pathlib.Path:
    return folder / f"layer-{layer}.npz"


def _write(folder: pathlib.Path, log: Journal, trained: Trained) -> Group:
    """Keeps a group: its indexer first, so that the log names none that is not there."""
    with replacing(_file(folder, trained.layer)) as file:
        np.savez(file, **dict(tensors.leaves(trained.indexer)))
    entry = {"layer": trained.layer, "divergence": trained.divergence.tolist(), "seconds": trained.seconds}
    log.append(entry)
    return Group(trained.layer, trained.indexer, entry["divergence"], trained.seconds)


def _read(folder: pathlib.Path, entry: dict[str, Any], run: Run) -> Group:
    """A group that `_write` kept. ValueError for a file that is not there or holds something else."""
    layer = entry["layer"]
    path, tree = _file(folder, layer), abstract(run.config, Schedule.all_full(run.config.num_layers)).indexer
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name, _ in tensors.leaves(tree)}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read, though {LOG} names layer {layer} ({error}); remove that line") from None
    for name, tensor in tensors.leaves(tree):
        if found[name].shape != tensor.layer_shape or found[name].dtype != np.float32:
            raise ValueError(f"{path}: {name} is {found[name].dtype} {list(found[name].shape)}, not {list(tensor.layer_shape)}")
    indexer = jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name, _ in tensors.leaves(tree)])
    return Group(layer, indexer, entry["divergence"], entry.get("seconds", 0.0))
