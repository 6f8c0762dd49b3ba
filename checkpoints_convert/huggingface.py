"""A Hugging Face directory as a source of one layer's tensors at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent import futures
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from checkpoints_convert import fp8
from checkpoints_convert.companions import with_stop_tokens
from checkpoints_convert.formats import (
    READ,
    block_fields,
    check_described,
    check_quantization_config,
    names_that_fit,
    quantisation,
)
from checkpoints_convert.safetensors_io import NAMES, NUMPY, Entry, Spec, read_stored
from indexcache_jax.config import Config
from indexcache_jax.config_json import read_config_json
from indexcache_jax.params import abstract
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import Part, Source, Tensor, as_stored, leaves, whole

SLAB_BYTES = 2**20  # read, decoded and transposed at once by a reader: what passes through host memory beyond the result
READERS = min(16, os.cpu_count() or 1)
_WEIGHTS = ("BF16", "F32", "F16", "F8_E4M3")
_SCALES = ("F32", "BF16", "F8_E8M0", "U8")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_IGNORED = re.compile(r".*(\.rotary_emb\.inv_freq|\.input_scale|\.input_scale_inv|\.activation_scale|\.k_scale|\.v_scale)")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(self_attn\.indexer\.)?")
INDEXER = ".self_attn.indexer."


@dataclasses.dataclass(frozen=True)
class Unused:
    """The stored tensors that a schedule has no place for."""

    mtp: tuple[str, ...]  # of layers from num_hidden_layers on
    shared_indexers: tuple[str, ...]  # indexer weights of S layers
    unknown: tuple[str, ...]


def _with_scales_of_one_name(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries under their names, but scales of FP8 that are stored as NAME_scale under NAME_scale_inv: both are multipliers."""
    renamed = {}
    for name, entry in entries.items():
        weight = entries.get(name.removesuffix("_scale")) if name.endswith(".weight_scale") else None
        blocks = weight is not None and weight.dtype == "F8_E4M3" and f"{weight.name}{fp8.SUFFIX}" not in entries
        renamed[f"{name}_inv" if blocks else name] = entry
    return renamed


class HuggingFaceCheckpoint:
    """The tensors of a safetensors directory, under the names and shapes that indexcache_jax.params gives.

    ValueError, naming file and field or tensor, for a config.json or headers that cannot be read.
    """

    def __init__(self, directory: pathlib.Path):
        fields = read_config_json(directory)
        self.config = with_stop_tokens(Config.from_hf(fields), directory)
        self.fields = fields
        check_quantization_config(fields, directory / "config.json")
        self._stored = read_stored(directory)
        self.entries = _with_scales_of_one_name(self._stored.entries)
        self._block = fp8.block_size(block_fields(fields))
        self._directory = directory
        self._dtype = self._model_dtype(fields.get("dtype") or fields.get("torch_dtype"))
        with self._naming_the_format():
            self._check_fits(directory / "config.json")

    def _check_fits(self, path: pathlib.Path) -> None:
        """ValueError where config.json's experts cannot be in the files, before a list as long as the experts is made."""
        c = self.config
        stored, experts = sum(e.nbytes for e in self.entries.values()), c.n_routed_experts * sum(c.moe_layers)
        if 3 * experts * c.hidden_size * c.moe_intermediate_size > stored:
            raise ValueError(f"{path}: n_routed_experts: {c.n_routed_experts} cannot fit in the {stored} bytes stored")
        check_described(c, stored, path)

    @contextlib.contextmanager
    def _naming_the_format(self) -> Iterator[None]:
        """Where weights are quantised in a way that is not read, makes an error begin with that."""
        try:
            yield
        except ValueError as error:
            if (format := quantisation(self.fields, self.entries, self._directory)) is None:
                raise
            raise ValueError(f"{self._directory}: {format}: {READ}; {error}") from None

    @functools.cached_property
    def schedule(self) -> Schedule:
        """What config.json asks for; read only where nobody overrides it."""
        return Schedule.from_hf(self.fields)

    def _model_dtype(self, declared: str | None) -> np.dtype:
        """What the config says, else bfloat16 where the embedding is or a layer is FP8; float16 widens to float32."""
        if declared in ("bfloat16", "float32", "float16"):
            is_bfloat16 = declared == "bfloat16"
        else:
            is_bfloat16 = any(
                entry.dtype == ("BF16" if name == "model.embed_tokens.weight" else "F8_E4M3")
                for name, entry in self.entries.items()
                if not self._is_mtp(name)
            )
        return np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else np.float32)

    @property
    def weights(self) -> str | None:
        """ "fp8" where it holds matrices in 8 bits, in blocks of 128 x 128; others are decoded."""
        in_codes = (entry.dtype == "F8_E4M3" and not self._is_mtp(name) for name, entry in self.entries.items())
        return "fp8" if self._block == fp8.DEFAULT_BLOCK and any(in_codes) else None

    @property
    def quantization(self) -> dict[str, Any] | None:
        return self.fields.get("quantization_config") if self.weights else None

    def matrix(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def scales_of(self, name: str) -> Tensor | None:
        entry = self._find(name)
        if entry is None or entry.dtype != "F8_E4M3" or self._block != fp8.DEFAULT_BLOCK:
            return None
        stored = as_stored(name + fp8.SUFFIX, fp8.scale_shape(entry.shape, self._block))
        return Tensor(stored.shape, (None, None), "constant", 1.0, (stored,), kind="scales")

    def holds(self, source: Source, kind: str) -> bool:
        """Of what is decoded all, of codes and scales those that are stored in blocks of 128 x 128."""
        return kind == "weights" or self.scales_of(source.name.removesuffix(fp8.SUFFIX)) is not None

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        """The dtype a leaf has where the caller asks for none; of scales the stored one."""
        if tensor.kind == "scales":
            return NUMPY[self.entries[tensor.sources[0].name].dtype]
        return np.dtype(tensor.dtype) if tensor.dtype else self._dtype

    def stored_dtype(self, tensor: Tensor) -> np.dtype:
        """The dtype that a leaf is stored in, which of a norm may not be the model's; `dtype_of` where it has several."""
        stored = {self._entry(source.name).dtype for layer in tensor.every_layer for source in tensor.stored(layer)}
        alike = tensor.kind == "weights" and tensor.dtype is None and len(stored) == 1
        return NUMPY[stored.pop()] if alike and stored <= {"BF16", "F32"} else self.dtype_of(tensor)

    def _entry(self, name: str) -> Entry:
        entry = self._find(name)
        assert entry is not None, "check() comes first"
        return entry

    def check(self, tree: Any) -> None:
        """ValueError where a tensor that an abstract tree needs is missing, misshapen or of a dtype that cannot be read.

        Where the weights are quantised in a way that is not read, the error begins with that.
        """
        with self._naming_the_format():
            self._check_tree(tree)

    def _check_tree(self, tree: Any) -> None:
        missing: dict[str, None] = {}  # kv_b_proj is missing once, though two leaves are made from it
        found = 0
        for _, tensor in leaves(tree):
            if tensor.kind == "scales":
                continue  # those that there are belong to their codes, and are checked with them
            for source in (source for layer in tensor.every_layer for source in tensor.stored(layer)):
                entry = self._find(source.name)
                if entry is None:
                    missing[source.name] = None
                else:
                    found += 1
                    self._check(entry, source.shape)
        if missing and not found:
            raise ValueError(f"{self._stored.listed_by}: {names_that_fit(missing, self.entries)}")
        if missing:
            name = next(iter(missing))
            why = ", which the schedule needs because it makes that layer F" if INDEXER in name else ""
            more = f" (and {len(missing) - 1} other tensors)" if len(missing) > 1 else ""
            raise ValueError(f"{self._stored.listed_by}: tensor {name} is missing{why}{more}")

    def fill(self, tensor: Tensor, layer: int | None, out: np.ndarray, part: Part | None = None) -> None:
        """Writes one layer of a leaf into `out`, or only a part of it, of which only what is needed is read.

        Its sources, such as experts, are read side by side: decoding and transposing are a core's work, not the disk's.
        """
        part = whole(tensor.layer_shape) if part is None else part

        def read(source: Source) -> None:
            window = source.window(tensor.layer_shape, part)
            if window is None:
                return
            if tensor.kind == "scales":
                source.fill(out, window, window.rows[0], self._scales(source, out.dtype, window.rows))
                return
            entry = self._entry(source.name)
            for start, slab in self._slabs(entry, source, out.dtype, window.rows, window.run(source.view)):
                source.fill(out, window, start, slab)

        sources = tensor.stored(layer)
        if len(sources) == 1:
            read(sources[0])
            return
        with futures.ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(read, sources):  # raises what a reader raised
                pass

    def copies(self, names: Iterable[str], dtype: Any, keep_codes: bool = False) -> list[tuple[Spec, Iterator[np.ndarray]]]:
        """What to write for a copy of stored tensors: as they are, but FP8 with its scale in `dtype` (None: the model's).

        keep_codes: FP8 as it is too. Without it a copy in FP8 would stand in a checkpoint whose config no longer says that it
        is quantised.
        """
        wanted = self._dtype if dtype is None else np.dtype(jnp.dtype(dtype))
        found: list[tuple[Spec, Iterator[np.ndarray]]] = []
        for name in names:
            entry = self.entries[name]
            if entry.dtype == "F8_E4M3" and entry.nbytes and not keep_codes:
                self._check(entry, entry.shape)
                slabs = self._slabs(entry, as_stored(name, entry.shape), wanted, (0, entry.shape[0]))
                found.append((Spec(name, NAMES[wanted], entry.shape), (slab for _, slab in slabs)))
            elif keep_codes or not name.endswith(fp8.SUFFIX):
                found.append((Spec(name, entry.dtype, entry.shape), entry.slabs(SLAB_BYTES)))
        return found

    def unused(self, schedule: Schedule) -> Unused:
        """What is stored beyond the model under `schedule`, by what it is. Each list is in the order stored."""
        needed = self._names(schedule)
        found: dict[str, list[str]] = {"mtp": [], "shared_indexers": [], "unknown": []}
        for name in self.entries:
            if name in needed or name.removesuffix(fp8.SUFFIX) in needed or _IGNORED.fullmatch(name):
                continue
            match = _LAYER.match(name)
            if self._is_mtp(name):
                found["mtp"].append(name)
            elif match and match[2] and not schedule.is_full[int(match[1])]:
                found["shared_indexers"].append(name)
            elif name != "lm_head.weight":  # tied embeddings: a copy
                found["unknown"].append(name)
        return Unused(**{kind: tuple(names) for kind, names in found.items()})

    def take_mtp_from_beside(self) -> None:
        """Adds the tensors of multi-token prediction that lie in files, or places of files, that the index does not list."""
        for entry in self._stored.beside():
            if self._is_mtp(entry.name):
                self.entries.setdefault(entry.name, entry)

    def mtp_layers(self, names: Iterable[str]) -> set[int]:
        """The numbers of the layers of multi-token prediction that some of the stored tensors belong to."""
        return {layer for name in names if (layer := self._mtp_layer(name)) is not None}

    def left_out(self, schedule: Schedule, kept: Collection[str] = ()) -> list[str]:
        """One line for each kind of stored tensor without a use under `schedule`, those of `kept` apart."""
        unused, lines = self.unused(schedule), []
        for names, what in (
            (unused.mtp, f"of multi-token prediction (layers from {self.config.num_layers} on)"),
            (unused.shared_indexers, "of indexers in S layers"),
            (unused.unknown, "that the model does not have"),
        ):
            if left := [name for name in names if name not in kept]:
                lines.append(f"left out {len(left)} tensors {what}: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}")
        return lines + self._stored.notes([self.entries[name] for name in kept])

    def _names(self, schedule: Schedule) -> set[str]:
        names = set()
        for _, tensor in leaves(abstract(self.config, schedule)):
            for source in (source for layer in tensor.every_layer for source in tensor.stored(layer)):
                entry = self._find(source.name)
                names |= {entry.name} if entry else set()
        return names

    def _is_mtp(self, name: str) -> bool:
        return self._mtp_layer(name) is not None

    def _mtp_layer(self, name: str) -> int | None:
        """The number of the layer of multi-token prediction that a stored tensor belongs to, if to any."""
        match = _LAYER.match(name)
        return int(match[1]) if match and int(match[1]) >= self.config.num_layers else None

    def _find(self, name: str) -> Entry | None:
        """The tensor's place; a routed expert's may be its rows of a tensor that holds all experts of a layer."""
        if name in self.entries or not (match := _EXPERT.fullmatch(name)):
            return self.entries.get(name)
        experts, number, kind = match[1], int(match[2]), match[3]
        entry = self.entries.get(f"{experts}.{'down' if kind == 'down' else 'gate_up'}_proj")
        if entry is None:
            return None
        c = self.config
        if kind == "down":
            shape, at, parts = (c.hidden_size, c.moe_intermediate_size), number, 1
        else:  # an expert's gate rows, then its up rows
            shape, at, parts = (c.moe_intermediate_size, c.hidden_size), 2 * number + (kind == "up"), 2
        expected = (c.n_routed_experts, parts * shape[0], shape[1])
        if entry.shape != expected:
            raise ValueError(self._misshapen(entry, expected))
        return dataclasses.replace(entry, shape=shape, offset=entry.offset + at * (entry.nbytes // (parts * expected[0])))

    def _misshapen(self, entry: Entry, shape: tuple[int, ...]) -> str:
        return f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, but config.json makes it {list(shape)}"

    def _check(self, entry: Entry, shape: tuple[int, ...]) -> None:
        where = f"{entry.file}: tensor {entry.name}"
        if entry.shape != shape:
            raise ValueError(self._misshapen(entry, shape))
        if entry.dtype not in _WEIGHTS:
            raise ValueError(f"{where} has dtype {entry.dtype}, not one of {', '.join(_WEIGHTS)}")
        scale = self.entries.get(entry.name + fp8.SUFFIX)
        if entry.dtype != "F8_E4M3":
            if scale is not None:
                raise ValueError(f"{where} is {entry.dtype}, yet {scale.file} holds a scale for it, {scale.name}")
            return
        if scale is None:
            raise ValueError(f"{where} is FP8, but its scale {entry.name}{fp8.SUFFIX} is missing")
        if len(shape) != 2:
            raise ValueError(f"{where} is FP8 with shape {list(shape)}; only matrices are scaled by blocks")
        expected = fp8.scale_shape(shape, self._block)
        if scale.shape != expected:
            raise ValueError(
                f"{scale.file}: tensor {scale.name} has shape {list(scale.shape)}, but {entry.name} of shape {list(shape)} "
                f"in blocks of {list(self._block)} needs {list(expected)}"
            )
        if scale.dtype not in _SCALES:
            raise ValueError(f"{scale.file}: tensor {scale.name} has dtype {scale.dtype}, not one of {', '.join(_SCALES)}")

    def _scales(self, source: Source, dtype: np.dtype, rows: tuple[int, int]) -> np.ndarray:
        """Scales as they are stored or in float32: entries `rows` of the first axis of source.view."""
        unit = source.shape[0] // source.view[0]
        first, last = (row * unit for row in rows)
        start = first // source.repeats
        stored = self.entries[source.name].rows(start, -(-last // source.repeats))
        scales = stored if stored.dtype == dtype else fp8.decode_scale(stored)
        start *= source.repeats
        return np.repeat(scales, source.repeats, axis=0)[first - start : last - start]

    def _slabs(
        self, entry: Entry, source: Source, dtype: np.dtype, rows: tuple[int, int], run: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(start, slab in dtype): entries [start, ...) of the first axis of source.view, over the entries `rows`.

        FP8 is decoded unless it is asked for in its own dtype.
        run: the elements [first, last) of each of these entries that are needed, default all; the others are not read.
        """
        scale = None
        if entry.dtype == "F8_E4M3" and dtype != NUMPY[entry.dtype]:
            stored = self.entries[entry.name + fp8.SUFFIX]
            scale = fp8.decode_scale(stored.rows(0, stored.shape[0]))
        count = source.view[0]
        unit = source.shape[0] // count  # rows to an entry of the view
        step = max(1, SLAB_BYTES * count // entry.nbytes)
        for start in range(*rows, step):
            stop = min(start + step, rows[1])
            slab = entry.rows(start * unit, stop * unit, unit, run)
            if scale is not None:
                slab = fp8.dequantise(slab, scale, start * unit, self._block)
            yield start, slab.astype(dtype, copy=False)
