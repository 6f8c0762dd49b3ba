"""FP8 weights: e4m3 codes with one scale for every block of a matrix.

W[r, c] = float32(code[r, c]) * scale[r // height, c // width]. The scale is a multiplier, although checkpoints call
it `weight_scale_inv`. Blocks are cut from the top left, so the last ones may be ragged: 576 rows make five blocks of
128, the last one 64 high. Nothing is derived by dividing rows by scales; that reading takes 576 / 5 for the height.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from indexcache_jax.config import Config
from indexcache_jax.tensors import SCALES
from pallas_kernels.quant import BLOCK, E4M3_MAX

SUFFIX = SCALES
DEFAULT_BLOCK = (BLOCK, BLOCK)
_LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "ignore")  # fields that list what is not in FP8
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # a table is five times faster


def block_size(fields: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a block from config.json's quantization_config. ValueError names the field."""
    quantization = fields.get("quantization_config")
    value = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    if value is None:
        return DEFAULT_BLOCK
    if not isinstance(value, list) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise ValueError(f"quantization_config.weight_block_size: {value!r} is not two positive integers")
    return value[0], value[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of codes of this shape, one a block."""
    return tuple(math.ceil(size / side) for size, side in zip(shape, block, strict=True))


def decode_scale(stored: np.ndarray) -> np.ndarray:
    """float32 scales from float32, bfloat16, e8m0, or e8m0's exponents kept as uint8 (2^(b - 127))."""
    return (stored.view(ml_dtypes.float8_e8m0fnu) if stored.dtype == np.uint8 else stored).astype(np.float32)


def dequantise(codes: np.ndarray, scale: np.ndarray, first_row: int, block: tuple[int, int]) -> np.ndarray:
    """float32 rows [n, in] from codes [n, in], which are rows first_row on of a matrix with scales [out/h, in/w]."""
    rows = (first_row + np.arange(codes.shape[0])) // block[0]
    columns = np.arange(codes.shape[1]) // block[1]
    values = _E4M3[codes.view(np.uint8)]
    values *= scale[rows][:, columns]
    return values


def scales_are_powers_of_two(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a quantization_config says so (scale_fmt ue8m0): engines may then keep a scale's exponent alone."""
    return quantization is not None and quantization.get("scale_fmt") == "ue8m0"


def quantise(values: np.ndarray, name: str, powers_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 codes and float32 scales of float32 rows [n, in] that begin with a block: as `quant.quantise_matrix` does.

    powers_of_two: scales are rounded up to powers of two. ValueError, with the name of the tensor that the rows are of, where
    some numbers are NaN or infinite: they would spoil their block.
    """
    rows, columns = (np.arange(0, size, BLOCK) for size in values.shape)
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(values), rows, axis=0), columns, axis=1)
    if not np.isfinite(largest).all():
        raise ValueError(f"tensor {name}: holds NaN or infinity, which cannot be written in FP8")
    scales = np.where(largest == 0, np.float32(1), largest / np.float32(E4M3_MAX))
    if powers_of_two:
        mantissas, exponents = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponents - (mantissas == 0.5))
    codes = np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    for scale, row in zip(scales, rows, strict=True):
        block = values[row : row + BLOCK] / np.repeat(scale, BLOCK)[: values.shape[1]]
        codes[row : row + BLOCK] = np.clip(block, -E4M3_MAX, E4M3_MAX)
    return codes, scales


def config_of(config: Config, copied: Iterable[str] = (), origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose matrices are all in FP8, of which some were quantised here.

    It names what stays as it is beside embedding and norms, for engines that would look for scales of every matrix. copied:
    the names of stored matrices that are no part of the model, such as those of multi-token prediction, and not in FP8.
    origin: the quantization_config of the checkpoint that it comes from, whose other fields are kept.
    """
    layers = range(config.num_layers)
    kept = [f"model.layers.{i}.mlp.gate" for i in config.expert_layers]
    kept += [f"model.layers.{i}.self_attn.indexer.weights_proj" for i in layers]
    kept += [name.removesuffix(".weight") for name in copied]
    if origin is None:
        origin = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(DEFAULT_BLOCK),
        }
    return {name: value for name, value in origin.items() if name not in _LEFT_OUT} | {_LEFT_OUT[0]: ["lm_head", *kept]}


def leaves_out(quantization: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a quantization_config says of any of these stored matrices, or of what they are parts of, that it is not in FP8.

    An entry that is a pattern ("re:...") counts as one that does.
    """
    lists = [value for name in _LEFT_OUT if isinstance(value := quantization.get(name), list)]
    entries = [entry for entries in lists for entry in entries if isinstance(entry, str)]
    modules = [f".{name.removesuffix('.weight')}." for name in names]
    return bool(modules) and any(entry.startswith("re:") or any(f".{entry}." in m for m in modules) for entry in entries)
