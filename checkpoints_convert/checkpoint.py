"""What load, save and convert read from: a directory of either format, or params in memory."""

from __future__ import annotations

import pathlib
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from checkpoints_convert import orbax_io
from checkpoints_convert.formats import check_no_overlay, instead
from checkpoints_convert.huggingface import HuggingFaceCheckpoint
from checkpoints_convert.safetensors_io import INDEX, SINGLE
from indexcache_jax import arguments, params, serving
from indexcache_jax.config import Config
from indexcache_jax.foreign import is_there
from indexcache_jax.params import FP8_BASE
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Part, Tensor

DTYPES = ("bfloat16", "float32", "float16")
# What weights can be loaded as, and the abstract tree of each.
FORMS = {"params": params.abstract, "serving": serving.weights.abstract}


class Checkpoint(Protocol):
    """A source of weights for the tensors of any abstract tree of the model, one layer of one tensor at a time."""

    config: Config

    @property
    def schedule(self) -> Schedule:
        """The schedule stored with the weights."""

    def check(self, tree: Any) -> None:
        """ValueError where it cannot fill every tensor of the abstract tree."""

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        """The dtype it would give a tensor without loss."""

    def fill(self, tensor: Tensor, layer: int | None, out: np.ndarray, part: Part | None = None) -> None:
        """Writes one layer of a tensor (layer None: of one that belongs to no layer) into `out`, of any float dtype.

        part: a slice for every axis of tensor.layer_shape; `out` then has that part's shape, and what lies outside of it is
        not read as far as the format allows. Default all of it.
        """


def open_checkpoint(directory: str | pathlib.Path) -> HuggingFaceCheckpoint | orbax_io.OrbaxCheckpoint:
    """The checkpoint in a directory, its format detected. ValueError where there is none."""
    directory = arguments.path("directory", directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    if orbax_io.is_orbax(directory):
        return orbax_io.OrbaxCheckpoint(directory)
    check_no_overlay(directory)
    if is_there(directory / SINGLE) or is_there(directory / INDEX):
        return HuggingFaceCheckpoint(directory)
    raise ValueError(f"{directory}: holds neither {SINGLE} nor {INDEX} nor an orbax checkpoint{instead(directory)}")


def resolve_schedule(checkpoint: Checkpoint, schedule: Schedule | str | None) -> Schedule:
    """The schedule that a caller asks for, by a pattern or itself; the checkpoint's own for None."""
    if schedule is None:
        return checkpoint.schedule
    return schedule if isinstance(schedule, Schedule) else Schedule.parse(schedule, checkpoint.config.num_layers)


def resolve_weights(stored: HuggingFaceCheckpoint | orbax_io.OrbaxCheckpoint, weights: str | None) -> str | None:
    """The form of the tree that `weights` asks for: "stored" is the checkpoint's own. ValueError for what is no form."""
    if weights is not None:
        arguments.choice("weights", weights, ("stored", "fp8", FP8_BASE))
    return stored.weights if weights == "stored" else weights


def leaf_dtype(checkpoint: Checkpoint, tensor: Tensor, dtype: Any) -> np.dtype:
    """What a tensor is loaded or written as: its own fixed dtype, else the one asked for, else as stored, as scales are."""
    if dtype is None or tensor.kind == "scales":
        return checkpoint.dtype_of(tensor)
    return np.dtype(jnp.dtype(tensor.dtype or dtype))


def check_dtype(dtype: Any) -> None:
    """ValueError unless weights can have this dtype, or None, which leaves it to the checkpoint."""
    if dtype is not None:
        arguments.dtype("dtype", dtype, DTYPES)
