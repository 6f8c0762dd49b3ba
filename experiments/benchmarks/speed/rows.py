"""A row of the table: what was measured of one schedule at one length, beside what the paper published."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks.speed.models import Model
from experiments.common.options import ALL_F

# What the paper reports for its 30B model in SGLang on H100s; lengths are its 10K, 60K, 120K and 200K.
PUBLISHED_LENGTHS = (10240, 61440, 122880, 204800)
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "prefill_seconds": {
        ALL_F: (0.57, 3.38, 8.57, 19.5),
        "1/2": (0.47, 2.86, 6.57, 13.7),
        "1/4": (0.45, 2.59, 5.66, 10.7),
    },
    "decode_one": {ALL_F: (73.5, 67.0, 63.0, 58.0), "1/2": (84.5, 80.0, 77.0, 73.0), "1/4": (91.0, 89.5, 88.0, 86.0)},
    "decode_full": {ALL_F: (2700, 613, 341, 197), "1/2": (3070, 750, 431, 253), "1/4": (3310, 840, 498, 297)},
}


def published(preset: str, metric: str, pattern: str, length: int) -> float | None:
    """The paper's figure for a schedule at a length, None where it has none."""
    if preset != "30b" or pattern not in PUBLISHED[metric] or length not in PUBLISHED_LENGTHS:
        return None
    return PUBLISHED[metric][pattern][PUBLISHED_LENGTHS.index(length)]


@dataclasses.dataclass
class Row:
    """One schedule at one length; times in seconds of the model as measured, one entry a round."""

    pattern: str
    length: int
    prefill: list[float] = dataclasses.field(default_factory=list)
    kernel_by_kernel: list[float] = dataclasses.field(default_factory=list)  # prefill without CUDA graphs, where asked for
    step: list[float] = dataclasses.field(default_factory=list)
    full_step: float | None = None
    full_rows: int = 0
    cache_bytes: int = 0  # of one request, whole model
    prefill_stages: dict[str, float] = dataclasses.field(default_factory=dict)
    decode_stages: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def record(row: Row, model: Model, price: float) -> dict[str, Any]:
    """A row as results.json has it: seconds, tokens a second, bytes, and cost in the currency of `price`."""

    def shares(stages: Mapping[str, float]) -> dict[str, float] | None:
        total = sum(stages.values())
        return {name: value / total for name, value in stages.items()} if total else None

    prefill = statistics.median(row.prefill) * model.scale if row.prefill else None
    one = 1 / (statistics.median(row.step) * model.scale) if row.step else None
    full = row.full_rows / (row.full_step * model.scale) if row.full_step else None
    measured = {
        "pattern": row.pattern,
        "length": row.length,
        "scaled": model.scale != 1,
        "prefill_seconds": prefill,
        "prefill_rounds": [t * model.scale for t in row.prefill],
        "prefill_kernel_by_kernel_rounds": [t * model.scale for t in row.kernel_by_kernel],
        "decode_one": one,
        "decode_one_rounds": [1 / (t * model.scale) for t in row.step],
        "decode_full": full,
        "full_rows": row.full_rows,
        "cache_bytes": row.cache_bytes,
        "prefill_shares": shares(row.prefill_stages),
        "decode_shares": shares(row.decode_stages),
        "cost_of_a_million_prompt_tokens": None if prefill is None else prefill / row.length * 1e6 / 3600 * price,
        "cost_of_a_million_output_tokens": None if full is None else 1e6 / full / 3600 * price,
        "notes": row.notes,
    }
    return measured | {f"published_{m}": published(model.name, m, row.pattern, row.length) for m in PUBLISHED}
