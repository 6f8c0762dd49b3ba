"""Checkpoint files as strangers write them: safetensors byte by byte, without the library's own writer."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.tiny_models import Case

ROOT = pathlib.Path(__file__).parents[2]  # where a subprocess finds the packages
_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "uint8": "U8",
    "float64": "F64",
    "int64": "I64",
}


def config_fields(case: Case, **more: Any) -> dict[str, Any]:
    schedule = {"indexer_types": ["full" if letter == "F" else "shared" for letter in case.pattern]}
    return dict(case.fields) | schedule | more


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray], **header_edits: Any) -> None:
    """One safetensors file; header_edits replace or add entries of the header."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        span = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": span}
        data += tensor.tobytes()
    write_raw(path, json.dumps(header | header_edits).encode(), data)


def write_raw(path: pathlib.Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def write_checkpoint(
    directory: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1
) -> pathlib.Path:
    """A Hugging Face directory, its tensors dealt out over `shards` files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        write_file(directory / file, {name: tensor for name, tensor in tensors.items() if weight_map[name] == file})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def quantise(weight: np.ndarray, block: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 codes and float32 scales of a matrix, block by block with ragged last blocks."""
    height, width = block
    rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            at = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scales[i, j] = np.abs(weight[at]).max() / 448
            codes[at] = (weight[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales


def dequantise(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """float32 weights, element by element as the format defines them."""
    height, width = block
    weight = np.empty(codes.shape, np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            weight[at] = codes[at].astype(np.float32) * np.float32(scales[i, j])
    return weight


def _power(scale: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(np.log2(scale)) + 127, 0, 254).astype(np.uint8)


# The types that scales are stored in, each with what makes it of float32.
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda scale: scale,
    "BF16": lambda scale: scale.astype(ml_dtypes.bfloat16),
    "U8": _power,
    "F8_E8M0": lambda scale: _power(scale).view(ml_dtypes.float8_e8m0fnu),
}


def _as_number(scale: np.ndarray) -> np.ndarray:
    if scale.dtype.itemsize > 1:
        return scale.astype(np.float32)
    return 2.0 ** (scale.view(np.uint8).astype(np.float64) - 127)


def quantised(
    case: Case, encode: Callable[[np.ndarray], np.ndarray] = SCALES["F32"], block: tuple[int, int] = (128, 128)
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(tensors as stored, the same as float32 numbers): every matrix in FP8 but router, head weights, embeddings and head."""
    stored, numbers = {}, {}
    for name, tensor in case.state.items():
        if tensor.ndim == 1 or name.endswith(
            ("mlp.gate.weight", "embed_tokens.weight", "lm_head.weight", "weights_proj.weight")
        ):
            stored[name] = numbers[name] = tensor
        else:
            codes, scale = quantise(tensor, block)
            stored |= {name: codes, f"{name}_scale_inv": encode(scale)}
            numbers[name] = dequantise(codes, _as_number(encode(scale)), block)
    return stored, numbers
