"""What a directory holds that is not read, said in the words of whoever made it: other formats are no damage."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from indexcache_jax.config import Config
from indexcache_jax.foreign import is_there, read_json, shown

READ = "only bfloat16, float32 and float16, and FP8 (e4m3) with a scale for each block of 128 x 128, are read"
# quant_method of config.json's quantization_config, in words.
_METHODS = {
    "awq": "AWQ, integers of 4 bits",
    "gptq": "GPTQ, packed integers",
    "auto-round": "AutoRound, packed integers",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "fbgemm_fp8": "per-channel FP8",
    "modelopt": "of NVIDIA's ModelOpt",
    "torchao": "torchao",
    "quark": "AMD's Quark",
}
# Endings of names that only one format has.
_ENDINGS = {
    ".qweight": "AWQ or GPTQ, packed integers",
    ".weight_packed": "packed integers or NVFP4 of compressed-tensors",
    ".weight_scale_2": "NVFP4",
    ".weight.absmax": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".W_q": "HQQ, packed integers",
    "_blocks": "MXFP4",
}
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What is there instead, and what to do about it.
_OTHERS = {
    "pytorch_model*.bin*": "a pickle, which is not read",
    "*.pth": "a pickle, which is not read",
    "*.pt": "a pickle, which is not read",
    "*.gguf": "GGUF, which is not read",
    "*.safetensors": "not a name that is read without an index",
}
MOST_DESCRIBED = 64 * 2**20  # bytes that the description of a model's tensors may take, whatever is stored
_DESCRIPTION = 1024  # bytes that a stored tensor's takes, about


def check_no_overlay(directory: pathlib.Path) -> None:
    """ValueError where a directory holds weights that change others and would be left out."""
    for name in _ADAPTER:
        if is_there(directory / name):
            raise ValueError(
                f"{directory / name}: an adapter (LoRA) to another model's weights is not applied; merge it (peft's "
                f"merge_and_unload, then save_pretrained) and give that directory, or remove the file to leave it out"
            )


def instead(directory: pathlib.Path) -> str:
    """What a directory without a checkpoint holds, for the end of an error; "" where there is nothing to say."""
    for pattern, what in _OTHERS.items():
        if found := sorted(directory.glob(pattern)):
            return f"; {shown(found[0].name)} is there, {what}: load it with transformers and save_pretrained() it"
    return ""


def check_quantization_config(fields: Mapping[str, Any], path: pathlib.Path) -> None:
    """ValueError, naming config.json's path, where it says how weights are quantised in something that is no object."""
    for name in ("quantization_config", "compression_config"):
        if not isinstance(fields.get(name), (Mapping, type(None))):
            raise ValueError(f"{path}: {name}: {shown(fields[name])} is not an object")


def quantisation(fields: Mapping[str, Any], names: Collection[str], directory: pathlib.Path) -> str | None:
    """The format of quantised weights that are not read, for an error; None for plain weights and FP8 in blocks."""
    found = fields.get("quantization_config") or fields.get("compression_config")
    if isinstance(found, Mapping):
        if (method := found.get("quant_method")) not in (None, "fp8"):
            what = _of_method(method, found)
            return what if what is None else f"quantization_config.quant_method: {shown(method)}{what}"
        if method == "fp8" and found.get("weight_block_size") is None:
            return "quantization_config.quant_method: 'fp8' without weight_block_size (FP8 with one scale a matrix or a row)"
    if found is None and is_there(beside := directory / "hf_quant_config.json"):
        return f"hf_quant_config.json: {shown(read_json(beside).get('quantization'))}"
    for ending, what in _ENDINGS.items():
        if name := next((name for name in names if name.endswith(ending)), None):
            return f"tensor {name} ({what})"
    return None


def _of_method(method: Any, found: Mapping[str, Any]) -> str | None:
    """A method's name in words, in brackets; None for the blocks of FP8 that are read."""
    if method == "modelopt" or method == "modelopt_fp4":
        return f" ({shown(found.get('quant_algo'))} {_METHODS['modelopt']})"
    if method != "compressed-tensors":
        return f" ({_METHODS[method]})" if isinstance(method, str) and method in _METHODS else ""
    weights = _compressed(found)
    bits, kind, strategy = (weights.get(name) for name in ("num_bits", "type", "strategy"))
    if (bits, kind, strategy) == (8, "float", "block"):
        return None
    packed = str(found.get("format"))
    words = {
        (4, "int"): "packed int4",
        (8, "int"): "int8",
        (4, "float"): "NVFP4" if "nvfp4" in packed else "MXFP4" if "mxfp4" in packed else "FP4",
        (8, "float"): f"per-{strategy} FP8",
    }
    what = words.get((bits, kind)) if isinstance(bits, int) and isinstance(kind, str) else None
    return f" ({what or f'format {shown(packed)}'})"


def _compressed(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """How compressed-tensors' first group of weights is stored."""
    groups = found.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def block_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's fields with the size of FP8 blocks where quant_method "fp8" has it, whoever wrote them."""
    found = fields.get("quantization_config")
    block = _compressed(found).get("block_structure") if isinstance(found, Mapping) else None
    return fields if block is None else {"quantization_config": {"weight_block_size": block}}


def names_that_fit(needed: Collection[str], stored: Collection[str]) -> str:
    """What names look like where none of those that are needed is stored, and which prefix would make them fit."""
    examples = ", ".join(sorted(stored)[:2])
    prefixes: collections.Counter[tuple[str, str]] = collections.Counter()
    wanted = list(needed)[:: max(1, len(needed) // 50)]  # a sample: the prefix is everybody's
    for name in stored:
        for end in wanted:
            if name.endswith(f".{end}"):
                prefixes[name[: -len(end)], ""] += 1
            elif end.startswith("model.") and (name == end[6:] or name.endswith(f".{end[6:]}")):
                prefixes[name[: len(name) - len(end) + 6], "model."] += 1
    look = f"none of the {len(needed)} tensors that config.json needs is there; names look like {examples}"
    if not prefixes:
        return look
    (before, after), _ = prefixes.most_common(1)[0]
    if not before:
        return f"{look}; they would fit with {after!r} before them"
    return (
        f"{look}; they would fit with {after!r} in place of {before!r}"
        if after
        else f"{look}; they would fit without {before!r}"
    )


def description_bytes(config: Config) -> int:
    """About what the description of a model's tensors, as checkpoints store them, takes in memory."""
    return _DESCRIPTION * (3 * config.n_routed_experts * sum(config.moe_layers) + 32 * config.num_layers)


def check_described(config: Config, stored: int, path: pathlib.Path) -> None:
    """ValueError where the description of a model's tensors would take far more memory than the `stored` bytes of weights.

    path: the config.json to blame. It comes before any list as long as the experts is made.
    """
    if description_bytes(config) > MOST_DESCRIBED + stored:
        raise ValueError(
            f"{path}: n_routed_experts: {config.n_routed_experts} in {sum(config.moe_layers)} of num_hidden_layers: "
            f"{config.num_layers} cannot fit in the {stored} bytes stored"
        )
