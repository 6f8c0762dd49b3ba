"""Training the indexers of a frozen model, group by group, with what a killed run needs to go on.

A group is a file, which the process that trained it writes as soon as it is. A killed run goes on with the groups that have
none: the hidden states before them are computed again from the text, which takes a small part of the time that training takes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
import zipfile
from typing import Any

import jax
import numpy as np

from checkpoints_convert.ending import writing
from experiments.common import journal, processes
from experiments.common.journal import Journal, check_resumed, replacing
from experiments.common.report import Output, progress
from indexcache_jax import indexer_training, search, tensors
from indexcache_jax.indexer_training import Run, Trained
from indexcache_jax.layers import Layers, shardings_in_force
from indexcache_jax.params import Indexer, abstract
from indexcache_jax.schedule import Schedule

FOLDER = "indexers"  # of the output folder
ABOUT = "about.json"  # in it, what the groups there depend on
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
    at, last = shardings_in_force(layers), layers.config.num_layers - 1
    return search.fingerprint((layers.ends(at), layers.layer(0, at), layers.layer(last, at)), [tokens])


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

    Targets are kept where there is room for them, and where an earlier run in the output folder `folder` kept them: how much
    memory is free may have changed since, and a run that goes on does as it began. What has no room lies in files there.
    Process 0's memory, and what it finds in the folder, decide for all.
    """
    need, memory = indexer_training.need(run), processes.from_main(lambda: memory)
    keeps = began_with_targets(folder)
    if keeps is None:
        keeps = indexer_training.can_keep_targets(run) and need.states + need.targets <= memory
    on_disk = need.states + (need.targets if keeps else 0) > memory
    run = dataclasses.replace(run, keeps_targets=keeps, allocate=_on_disk(folder) if on_disk else np.empty)
    targets = f"{need.targets / 1e9:.2f} GB of targets" if keeps else f"targets {COMPUTED}"
    return run, f"{need.states / 1e9:.2f} GB of hidden states {f'in {folder}' if on_disk else 'in memory'}, {targets}"


def began_with_targets(folder: pathlib.Path) -> bool | None:
    """Whether the run in an output folder keeps its targets; None where there is none. ValueError for no JSON."""
    heading = journal.heading(folder / FOLDER / ABOUT)
    return None if heading is None else heading.get("targets") == KEPT


def _on_disk(folder: pathlib.Path) -> indexer_training.Allocate:
    """Makes arrays in files of a folder. A file has no name once it is mapped, so that nothing is left when a run ends or is
    killed, and its room is freed with the array."""

    def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with writing(folder / "temporary file", size), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))  # DiskFull now, not a crash later
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))

    return allocate


def check_free(directory: pathlib.Path, resume: bool) -> None:
    """ValueError where an output folder holds an earlier run that is not to be resumed, or this process cannot write to it."""
    if not os.access(directory, os.W_OK):  # as on a host of its own, where process 0 has made it on another
        raise ValueError(
            f"--output_dir={directory}: process {jax.process_index()} does not see it or may not write to it, "
            "but every process writes the groups that it trains"
        )
    path = directory / FOLDER / ABOUT
    check_resumed(path, path.exists(), resume)


def train(run: Run, output: Output, resume: bool) -> list[Group]:
    """The groups of a run, trained, or read where a run that is resumed has trained them before.

    ValueError for an output folder that holds another run, or one and not `resume`.
    """
    folder = output.directory / FOLDER
    processes.from_main(lambda: folder.mkdir(exist_ok=True))
    with Journal(folder / ABOUT, about(run), resume=resume):  # says what the files are about, and has no entries
        pass
    done = processes.from_main(lambda: trained_in(folder, run))
    total = indexer_training.work(run, done)
    with progress(total=total / 1e9, desc="indexers", smoothing=0.05, bar_format=BAR) as bar:

        def move_on(work: float, what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(min(work / 1e9, max(total / 1e9 - bar.n, 0)))  # the whole is an estimate

        for trained in indexer_training.train(run, done, move_on):
            _write(folder, trained)
            first, last = Group(trained.layer, trained.indexer, trained.divergence.tolist(), trained.seconds).ends
            bar.write(f"layer {trained.layer}: divergence {first:.3f} -> {last:.3f}, {trained.seconds:.0f} s")
    return [_read(folder, group[0], run) for group in run.groups]


def trained_in(folder: pathlib.Path, run: Run) -> list[int]:
    """The F layers of the groups that a folder holds. ValueError for a file that holds something else."""
    found = [layer for layer in run.schedule.full_layers if _file(folder, layer).exists()]
    return [_read(folder, layer, run).layer for layer in found]


def _file(folder: pathlib.Path, layer: int) -> pathlib.Path:
    return folder / f"layer-{layer}.npz"


def _write(folder: pathlib.Path, trained: Trained) -> None:
    """Keeps a group, whole or not at all."""
    arrays = dict(tensors.leaves(trained.indexer))
    with replacing(_file(folder, trained.layer)) as file:
        np.savez(file, **arrays, divergence=trained.divergence, seconds=np.float64(trained.seconds))


def _read(folder: pathlib.Path, layer: int, run: Run) -> Group:
    """A group that `_write` kept. ValueError for a file that holds something else."""
    path, tree = _file(folder, layer), abstract(run.config, Schedule.all_full(run.config.num_layers)).indexer
    shapes = {name: tensor.layer_shape for name, tensor in tensors.leaves(tree)} | {"divergence": (run.stage.steps,)}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found, seconds = {name: arrays[name] for name in shapes}, float(arrays["seconds"])
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: holds no trained indexer ({error}); remove it") from None
    for name, shape in shapes.items():
        if found[name].shape != shape or found[name].dtype != np.float32:
            raise ValueError(f"{path}: {name} is {found[name].dtype} {list(found[name].shape)}, not {list(shape)}; remove it")
    indexer = jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name, _ in tensors.leaves(tree)])
    return Group(layer, indexer, found["divergence"].tolist(), seconds)
