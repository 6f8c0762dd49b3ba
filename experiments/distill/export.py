"""The checkpoint that a distillation writes: whole, or new indexers beside links or copies; how it is used."""

from __future__ import annotations

import pathlib
import shlex

import jax
from absl import flags

import checkpoints_convert
from checkpoints_convert.orbax_io import is_orbax
from experiments.common import engines, options, runs
from experiments.common.report import Output
from indexcache_jax.config import Config
from indexcache_jax.params import Params, weights_of
from indexcache_jax.schedule import Schedule
from indexcache_jax.training import Stage

EXPORT = flags.DEFINE_enum(
    "export",
    "full",
    ["full", "linked"],
    "full: a checkpoint of its own; linked, where indexers alone train: new indexers beside links to --checkpoint's files",
)


def folder_of(output: Output) -> pathlib.Path:
    """Where the distilled checkpoint goes."""
    return output.directory / "checkpoint"


def check_free(output: Output, source: str) -> None:
    """ValueError for a folder that holds an earlier run which is not to be resumed, and where `source` would be replaced."""
    folder, resume = folder_of(output), options.RESUME.value
    read = pathlib.Path(source).resolve()
    if folder.resolve() in (read, *read.parents):
        raise ValueError(f"--output_dir={output.directory}: --checkpoint={source} would be replaced; choose another")
    if folder.exists() and not resume:
        raise ValueError(f"{folder}: exists; choose another --output_dir, or --resume")
    runs.check_free(output.directory, resume)


def link_or_copy(stages: list[Stage], source: str) -> bool | None:
    """Whether what does not change is exported by links or as copies of the files of `source`; None where all is written anew.

    That is where more than indexers trains or there are no such files; ValueError where --export=linked asks for links then.
    """
    linked = EXPORT.value == "linked"
    for stage in stages:
        if stage.steps and stage.model_learning_rate:
            if linked:
                raise ValueError(
                    f"--export=linked: the {stage.name} stage trains all weights; --sparse_steps=0 or --model_learning_rate=0 "
                    "trains indexers alone"
                )
            return None
    if is_orbax(pathlib.Path(source)):
        if linked:
            raise ValueError(f"--export=linked: {source} is an orbax checkpoint, there are no safetensors files to link to")
        return None
    return linked


def write(
    directory: pathlib.Path,
    params: Params,
    like: Params,
    config: Config,
    schedule: Schedule,
    source: str | pathlib.Path,
    link: bool | None = None,
) -> Params:
    """Writes params in the dtypes of `like`, with the tokenizer and whatever else goes along with checkpoint `source`.

    link: only the indexers are those of `params`, the rest are links to the files of `source` or copies; None writes all.
    Returns what was written: of a base in 8 bits the indexers as they are quantised.
    """
    written = jax.tree.map(lambda a, b: a.astype(b.dtype), params, like)
    if link is None:
        checkpoints_convert.save(directory, written, config, schedule, companions_of=source)
    else:
        for note in checkpoints_convert.save_indexers(directory, written, config, schedule, source, link):
            print(f"note: {note}")
    if (weights := weights_of(like)) is None:
        return written
    return checkpoints_convert.load(directory, weights=weights)[2]


def what_to_do_with(output: Output, schedule: Schedule, config: Config, to_be_searched: bool = False) -> str:
    """How the checkpoint that was written is used, in Markdown. to_be_searched: its schedule is not the one to use it with."""
    folder = str(folder_of(output))
    text = f"## To use it\n\nThe checkpoint is in {folder}/."
    if to_be_searched:
        command = f"python -m experiments.run --experiment=search --checkpoint={shlex.quote(folder)}"
        return f"{text} A search finds its schedule:\n\n    {command}"
    return f"{text}\n\n{engines.to_paste(schedule, folder, config)}"
