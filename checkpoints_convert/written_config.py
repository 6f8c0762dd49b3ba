"""The config.json of a checkpoint that is written: that of the checkpoint it comes from, with what has changed.

So fields that only some engine knows survive, and none claims what the new checkpoint does not hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from indexcache_jax.config import Config
from indexcache_jax.schedule import DEFAULT_OFFSET, Schedule

# Other names for what a field says, which may not contradict it once it has changed.
_ALSO_SAID_BY = {
    "rope_parameters": ("rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"),
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "num_nextn_predict_layers": (),
}
_FREQUENCY = ("index_topk_freq", "index_skip_topk_offset")
# What says how the origin's weights are stored, and code, which is not copied.
_NOT_HELD = ("quantization_config", "compression_config", "auto_map")
_DTYPE_NAMES = ("dtype", "torch_dtype")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The config.json that a checkpoint comes from, and the Config that was read from it."""

    fields: Mapping[str, Any]
    config: Config


def written_fields(
    config: Config,
    schedule: Schedule,
    dtype: str,
    mtp_layers: int = 0,
    origin: Origin | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of a checkpoint of this shape and schedule, with so many layers of multi-token prediction.

    quantization: the quantization_config of weights that are written in 8 bits.
    """
    quantised = {} if quantization is None else {"quantization_config": dict(quantization)}
    config = dataclasses.replace(config, num_nextn_predict_layers=mtp_layers)
    said = config.to_hf()
    if origin is None:
        return said | schedule.to_hf() | {"dtype": dtype} | quantised
    before, fields = origin.config.to_hf(), dict(origin.fields)
    changed = {name: value for name, value in said.items() if value != before[name]}
    if changed.keys() - {"num_nextn_predict_layers"}:  # beside other values, the default of what is left out may be another
        left_out = {name for name in said if fields.get(name) is None} | {"rope_parameters"}  # some of whose own may be
        changed |= {name: said[name] for name in left_out}
    for name in changed:
        for other in _ALSO_SAID_BY.get(name, ()):
            fields.pop(other, None)
    for name in _NOT_HELD:
        fields.pop(name, None)
    fields |= changed | schedule.to_hf() | {name: dtype for name in _DTYPE_NAMES if name in fields or name == "dtype"}
    if not _agrees(fields, schedule):
        for name in _FREQUENCY:
            fields.pop(name, None)
    return fields | quantised


def _agrees(fields: Mapping[str, Any], schedule: Schedule) -> bool:
    """Whether a frequency beside the lists gives the same schedule."""
    frequency, offset = (fields.get(name) for name in _FREQUENCY)
    if frequency is None:
        return True
    try:
        return schedule == Schedule.from_freq(schedule.num_layers, frequency, DEFAULT_OFFSET if offset is None else offset)
    except ValueError:
        return False
