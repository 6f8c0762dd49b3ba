"""A checkpoint in either form: matrices in 8 bits for a tree that wants them decoded, and the other way round.

What is stored as a tree wants it passes as it is, bit for bit. Otherwise blocks of 128 x 128 are quantised or decoded here,
some rows of a stored matrix at a time, on the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent import futures
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from checkpoints_convert import fp8
from checkpoints_convert.huggingface import READERS, SLAB_BYTES
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import SCALES, Part, Source, Tensor, Window, as_stored, leaves, whole
from pallas_kernels.quant import BLOCK

Bounds = tuple[int, int]  # [start, stop)


class Stored(Protocol):
    """What a checkpoint holds, in the form in which it holds it."""

    config: Config

    @property
    def schedule(self) -> Schedule: ...
    @property
    def weights(self) -> str | None:
        """The form of the tree (`params.abstract`) in which it holds its matrices."""

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config of matrices in 8 bits, where it has one."""

    def check(self, tree: Any) -> None: ...
    def dtype_of(self, tensor: Tensor) -> np.dtype: ...
    def stored_dtype(self, tensor: Tensor) -> np.dtype: ...
    def fill(self, tensor: Tensor, layer: int | None, out: np.ndarray, part: Part | None = None) -> None: ...

    def matrix(self, name: str) -> tuple[int, ...]:
        """The shape of a stored matrix."""

    def scales_of(self, name: str) -> Tensor | None:
        """The scales of a stored matrix, by block or by row, if it is held in 8 bits with blocks of 128 x 128."""

    def holds(self, source: Source, kind: str) -> bool:
        """Whether `fill` gives what a tensor of this kind is made from, without a change of form."""


class Recoded:
    """A stored checkpoint as a source of trees of either form. Errors are those of the checkpoint."""

    def __init__(self, stored: Stored) -> None:
        self.stored, self.config, self.check = stored, stored.config, stored.check
        # Scales of matrices that are quantised here, NaN where not known yet: codes and scales are read one after the other.
        self._quantised: dict[str, np.ndarray] = {}

    @property
    def schedule(self) -> Schedule:
        return self.stored.schedule

    def quantised(self, tree: Any) -> list[str]:
        """The stored matrices that an abstract tree wants in 8 bits and that are quantised here, in the order of the tree."""
        in_codes = (tensor for _, tensor in leaves(tree) if tensor.kind == "codes")
        names = {source.name: None for tensor in in_codes for layer in tensor.every_layer for source in tensor.stored(layer)}
        return [name for name in names if self.stored.scales_of(name) is None]

    def notes(self, tree: Any) -> list[str]:
        """A line on what is quantised although the checkpoint is one in FP8: [] where nothing is."""
        if self.stored.weights is None or not (names := self.quantised(tree)):
            return []
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return [f"quantised {len(names)} matrices that are not in FP8 there: {some}"]

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        """The dtype of a tensor without loss; scales that are stored in several types have float32."""
        if tensor.kind != "scales":
            return np.dtype(tensor.dtype) if tensor.kind == "codes" else self.stored.dtype_of(tensor)
        names = {source.name for layer in tensor.every_layer for source in tensor.stored(layer)}
        held = [self.stored.scales_of(name.removesuffix(SCALES)) for name in names]
        found = {np.dtype(np.float32) if scales is None else self.stored.dtype_of(scales) for scales in held}
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    def fill(self, tensor: Tensor, layer: int | None, out: np.ndarray, part: Part | None = None) -> None:
        """Writes one layer of a tensor, or a part of it, into `out`; see `checkpoint.Checkpoint`.

        ValueError, naming the stored tensor, for numbers that do not fit in float16, or in FP8 where they are quantised here.
        """
        with np.errstate(over="ignore"):
            self._fill(tensor, layer, out, part)
        if out.dtype == np.float16 and not np.isfinite(out).all():
            names = ", ".join(source.name for source in tensor.stored(layer)[:2])
            raise ValueError(f"tensor {names}: holds numbers above {np.finfo(np.float16).max} or NaN, which float16 cannot")

    def _fill(self, tensor: Tensor, layer: int | None, out: np.ndarray, part: Part | None) -> None:
        sources, part = tensor.stored(layer), whole(tensor.layer_shape) if part is None else part
        if all(self.stored.holds(source, tensor.kind) for source in sources):
            self.stored.fill(tensor, layer, out, part)
            return

        def read(source: Source) -> None:
            if (window := source.window(tensor.layer_shape, part)) is not None:
                for start, slab in self._slabs(source, tensor.kind, window, out.dtype):
                    source.fill(out, window, start, slab)

        with futures.ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(read, sources):  # raises what a reader raised
                pass

    def _slabs(self, source: Source, kind: str, window: Window, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
        """(start, slab): entries [start, ...) of the first axis of the source's view, of which the window's are filled in."""
        name = source.name.removesuffix(SCALES) if kind == "scales" else source.name
        height, width = self.stored.matrix(name)
        blocks_of_rows = kind == "scales" and source.repeats == 1
        unit = BLOCK if blocks_of_rows else source.shape[0] // source.view[0]  # rows of the matrix to an entry
        columns = window.bounds[1] if source.view == source.shape else (0, source.shape[1])
        if kind == "scales":
            columns = columns[0] * BLOCK, columns[1] * BLOCK
        columns = _in_blocks(columns, width)
        aligned = BLOCK // math.gcd(BLOCK, unit)  # so many entries end with a block
        step = aligned * max(1, SLAB_BYTES // (4 * aligned * unit * width))
        first, last = window.rows
        for start, stop in itertools.pairwise([first, *range(first - first % step + step, last, step), last]):
            rows = start * unit, min(stop * unit, height)
            blocks = _in_blocks(rows, height)
            cut = slice(rows[0] - blocks[0], rows[1] - blocks[0])
            across = slice(*columns)
            if kind == "scales":
                values, across = self._scales(name, blocks, columns, dtype), slice(columns[0] // BLOCK, -(-columns[1] // BLOCK))
                if not blocks_of_rows:
                    values = np.repeat(values, BLOCK, axis=0)[cut]
            elif kind == "codes":
                values = self._codes(name, blocks, columns)[cut]
            else:
                values = self._decode(name, blocks, columns)[cut].astype(dtype, copy=False)
            slab = np.zeros((len(values), source.shape[1]), dtype)
            slab[:, across] = values
            yield start, slab

    def _read(self, source: Source, kind: str, rows: Bounds, columns: Bounds, dtype: Any) -> np.ndarray:
        """A region of a stored tensor as the checkpoint holds it."""
        out = np.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype)
        tensor = Tensor(source.shape, (None, None), "normal", 1.0, (source,), kind=kind)
        self.stored.fill(tensor, None, out, (slice(*rows), slice(*columns)))
        return out

    def _quantise(self, name: str, rows: Bounds, columns: Bounds) -> tuple[np.ndarray, np.ndarray]:
        """Codes and float32 scales of a region of whole blocks of a matrix that is held decoded."""
        shape = self.stored.matrix(name)
        decoded = self._read(as_stored(name, shape), "weights", rows, columns, np.float32)
        codes, scales = fp8.quantise(decoded, name, fp8.scales_are_powers_of_two(self.stored.quantization))
        known = self._quantised.setdefault(name, np.full(fp8.scale_shape(shape, fp8.DEFAULT_BLOCK), np.nan, np.float32))
        known[_blocks(rows, columns)] = scales
        return codes, scales

    def _scales(self, name: str, rows: Bounds, columns: Bounds, dtype: Any) -> np.ndarray:
        """The scales of a region of whole blocks, a row of them for each 128 rows."""
        held = self.stored.scales_of(name)
        if held is None:
            known = self._quantised.get(name)
            found = None if known is None else known[_blocks(rows, columns)]
            return self._quantise(name, rows, columns)[1] if found is None or np.isnan(found).any() else found
        source, (of_rows, of_columns) = held.sources[0], _blocks(rows, columns)
        at = rows if source.repeats == BLOCK else (of_rows.start, of_rows.stop)
        scales = self._read(source, "scales", at, (of_columns.start, of_columns.stop), self.stored.dtype_of(held))
        scales = scales[::BLOCK] if source.repeats == BLOCK else scales
        return scales if scales.dtype == dtype else fp8.decode_scale(scales)

    def _codes(self, name: str, rows: Bounds, columns: Bounds) -> np.ndarray:
        """The codes of a region of whole blocks of a matrix."""
        if self.stored.scales_of(name) is None:
            return self._quantise(name, rows, columns)[0]
        return self._read(as_stored(name, self.stored.matrix(name)), "codes", rows, columns, ml_dtypes.float8_e4m3fn)

    def _decode(self, name: str, rows: Bounds, columns: Bounds) -> np.ndarray:
        """float32 numbers of a region of whole blocks of a matrix."""
        if self.stored.scales_of(name) is None:
            return self._read(as_stored(name, self.stored.matrix(name)), "weights", rows, columns, np.float32)
        codes = self._codes(name, rows, columns)
        return fp8.dequantise(codes, self._scales(name, rows, columns, np.float32), 0, fp8.DEFAULT_BLOCK)


def _in_blocks(bounds: Bounds, size: int) -> Bounds:
    """The bounds of the whole blocks of an axis of this size that hold `bounds`."""
    return bounds[0] // BLOCK * BLOCK, min(math.ceil(bounds[1] / BLOCK) * BLOCK, size)


def _blocks(rows: Bounds, columns: Bounds) -> tuple[slice, slice]:
    """Which blocks a region of whole blocks is made of."""
    of_rows, of_columns = (slice(start // BLOCK, -(-stop // BLOCK)) for start, stop in (rows, columns))
    return of_rows, of_columns
