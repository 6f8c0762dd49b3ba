"""A checkpoint whose indexers were replaced: a directory that costs what changed, beside the one that it comes from.

Distilling indexers changes some thousandths of a model. The new directory therefore holds one file of new indexers, an index,
a config.json with the schedule, and of every file of the old one a link (or a copy) under a name of this module's own. The
index decides: it lists replaced tensors in the new file, and those of layers that became S nowhere.

Links are symbolic, since models lie on shared disks that other users own, where hard links are refused; so the old directory
must stay where it is. A linked file may also hold tensors that the new one replaces. A loader that goes by the index does not
see them, and neither does one that reads whole files in the order of their names, as transformers does: the new file is the
last. One that reads whole files in any order may take the old ones; copies hold no tensor twice and suit every loader.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints_convert import fp8
from checkpoints_convert.checkpoint import open_checkpoint
from checkpoints_convert.companions import find_companions
from checkpoints_convert.ending import writing
from checkpoints_convert.huggingface import SLAB_BYTES, HuggingFaceCheckpoint
from checkpoints_convert.safetensors_io import INDEX, NAMES, NUMPY, Entry, Spec, read_header, write_index, write_shard
from checkpoints_convert.save import ArraysCheckpoint, copy, finish, new_directory
from checkpoints_convert.trees import Leaves
from checkpoints_convert.written_config import Origin, written_fields
from indexcache_jax import arguments
from indexcache_jax.config import Config
from indexcache_jax.params import Params, abstract, check_model
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Tensor, leaves


def save_indexers(
    directory: str | pathlib.Path,
    params: Params,
    config: Config,
    schedule: Schedule,
    source: str | pathlib.Path,
    link: bool = True,
) -> list[str]:
    """Writes the safetensors checkpoint `source` with the indexers of `params` to a new directory, and returns notes on it.

    Of `params` only the indexers are read, those of the schedule's F layers, which are not in 8 bits; the other leaves may be
    None. They are stored as the old ones are, in FP8 blocks where these are. All other tensors are those of `source`, bit for
    bit: link gives them by links to its files, otherwise they are copied. Tokenizer, chat template and generation config go
    along. Host memory: one layer's indexer and a few MiB.

    The directory appears whole or not at all, and arrays of several processes are gathered, as by `save`. ValueError where it
    exists and is not empty, where `source` is no safetensors directory of this model or lacks an indexer, and where the
    indexers do not fit config and schedule. NotImplementedError where FP8 indexers have other scales than float32 or bfloat16
    for each 128 x 128.
    """
    check_model(config, schedule)
    directory = arguments.path("directory", directory)
    if not isinstance(params, Params):
        raise ValueError(f"params: {arguments.described(params)} is not Params")
    source = arguments.path("source", source).resolve()
    base = open_checkpoint(source)
    if not isinstance(base, HuggingFaceCheckpoint):
        raise ValueError(f"{source}: is an orbax checkpoint, but indexers are written beside the safetensors of one")
    if base.config != config:
        raise ValueError(f"{source}: its config.json describes another model than the indexers are of")
    tree = _indexers(abstract(config, schedule))
    base.check(tree)
    arrays = _Arrays(params, config, schedule, tree)
    arrays.check(None)
    replaced = list(_replaced(base, tree))
    if arrays.is_spread and jax.process_index() > 0:
        arrays.help()
        return []
    with arrays.helped():
        return _write(directory, base, source, replaced, arrays, link)


def _indexers(tree: Params) -> Params:
    """A tree of params with its indexers alone."""
    nothing: Params = jax.tree.map(lambda _: None, tree)
    return dataclasses.replace(nothing, indexer=tree.indexer)


class _Arrays(ArraysCheckpoint):
    """The indexers of params as a source of weights."""

    def __init__(self, params: Params, config: Config, schedule: Schedule, tree: Params) -> None:
        self.config, self.schedule, self.weights = config, schedule, None
        self._form = "params"
        self._take(leaves(_indexers(params)))
        Leaves.__init__(self, tree)


@dataclasses.dataclass(frozen=True)
class _Replaced:
    """A stored tensor that is replaced: a layer of a leaf, the old tensor and, where that is FP8, its scales.

    powers_of_two: whether the checkpoint says that scales are.
    """

    tensor: Tensor
    layer: int
    old: Entry
    scale: Entry | None
    powers_of_two: bool = False

    @property
    def specs(self) -> list[Spec]:
        """What is written."""
        own = Spec(self.old.name, self.old.dtype, self.old.shape)
        if self.scale is None:
            return [own]
        return [own, Spec(self.scale.name, NAMES[np.dtype(np.float32)], self.scale.shape)]

    def data(self, arrays: _Arrays) -> list[np.ndarray]:
        """The data of `specs`."""
        decoded = np.dtype(np.float32) if self.scale is not None else NUMPY[self.old.dtype]
        filled = np.empty(self.tensor.layer_shape, decoded)
        arrays.fill(self.tensor, self.layer, filled)
        stored = np.empty(self.old.shape, decoded)
        (source,) = self.tensor.stored(self.layer)
        source.write(stored, filled[source.at])
        return [stored] if self.scale is None else list(fp8.quantise(stored, self.old.name, self.powers_of_two))


def _replaced(base: HuggingFaceCheckpoint, tree: Params) -> Iterator[_Replaced]:
    """The stored tensors of all indexers in `tree`, layer by layer."""
    slots = [(layer, tensor) for _, tensor in leaves(tree) for layer in tensor.every_layer]
    for layer, tensor in sorted(slots, key=lambda slot: slot[0]):
        (source,) = tensor.stored(layer)
        old = base.entries[source.name]
        if old.dtype != NAMES[np.dtype(ml_dtypes.float8_e4m3fn)]:
            yield _Replaced(tensor, layer, old, None)
            continue
        scale = base.entries[source.name + fp8.SUFFIX]
        if base.scales_of(source.name) is None or scale.dtype not in ("F32", "BF16"):
            raise NotImplementedError(
                f"{old.file}: {old.name} has scales {scale.dtype} {list(scale.shape)}; new ones are written in float32, one "
                f"for each {fp8.BLOCK} x {fp8.BLOCK}"
            )
        yield _Replaced(tensor, layer, old, scale, fp8.scales_are_powers_of_two(base.quantization))


def _write(
    directory: pathlib.Path,
    base: HuggingFaceCheckpoint,
    source: pathlib.Path,
    replaced: list[_Replaced],
    arrays: _Arrays,
    link: bool,
) -> list[str]:
    specs = [spec for tensor in replaced for spec in tensor.specs]
    unused = base.unused(arrays.schedule)
    gone = {spec.name for spec in specs} | {base.entries[name].name for name in unused.shared_indexers}
    kept: dict[pathlib.Path, list[Entry]] = {}
    for entry in base.entries.values():
        if entry.name not in gone:
            kept.setdefault(entry.file, []).append(entry)
    count = len(kept) + 1
    names = {file: f"model-{i:05d}-of-{count:05d}.safetensors" for i, file in enumerate(sorted(kept), 1)}
    last = f"model-{count:05d}-of-{count:05d}.safetensors"  # in the order of names, so that whoever reads it last has it
    shards = {names[file]: [_spec(entry) for entry in entries] for file, entries in kept.items()} | {last: specs}
    also_there = {file: sorted(read_header(file).keys() - {entry.name for entry in kept[file]}) for file in kept}
    companions, fields = find_companions(source), _fields(base, arrays.schedule, len(base.mtp_layers(unused.mtp)))
    with new_directory(directory) as partial:
        for file, name in names.items():
            if link:
                (partial / name).symlink_to(file)
            elif not also_there[file]:
                copy(file, partial / name)
            else:
                _write_shard(partial / name, shards[name], (slab for entry in kept[file] for slab in entry.slabs(SLAB_BYTES)))
        _write_shard(partial / last, specs, (array for tensor in replaced for array in tensor.data(arrays)))
        with writing(partial / INDEX):
            write_index(partial, shards, sum(map(len, also_there.values())) if link else 0)
        finish(partial, companions, fields)
    written = {spec.name for spec in specs}
    mixed = sum(not written.isdisjoint(also) for also in also_there.values())
    if not link or not mixed:
        return []
    return [
        f"{mixed} of {len(kept)} linked files still hold old indexers: loaders must go by the index, or read whole files in "
        f"the order of their names, of which {last} is the last"
    ]


def _write_shard(path: pathlib.Path, specs: list[Spec], slabs: Iterator[np.ndarray]) -> None:
    with writing(path, sum(spec.nbytes for spec in specs)):
        write_shard(path, specs, slabs)


def _spec(entry: Entry) -> Spec:
    return Spec(entry.name, entry.dtype, entry.shape)


def _fields(base: HuggingFaceCheckpoint, schedule: Schedule, mtp_layers: int) -> dict[str, Any]:
    """config.json of a directory whose weights are stored as those of `base`."""
    fields, embedding = base.fields, abstract(base.config, schedule).embedding
    dtype = fields.get("dtype") or fields.get("torch_dtype") or base.dtype_of(embedding).name
    written = written_fields(base.config, schedule, dtype, mtp_layers, Origin(fields, base.config))
    return written | {name: fields[name] for name in ("quantization_config", "compression_config") if name in fields}
