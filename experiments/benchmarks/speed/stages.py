"""The stages of a prefill chunk and of a decode step, by the kernels that CUPTI shows of a run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments.common.profiling import kernels_of

# A kernel's stage by what its name holds, first match.
STAGES = {
    "indexer_scores": "scores",
    "indexer_select": "top-k",
    "sparse_mla": "sparse MLA",
    "grouped_matmul": "experts",
    "nccl": "exchange",  # what devices send each other, and wait for each other
}
OTHER = "projections and the rest"


MIN_PROFILED = 0.85  # of a run's time: gaps between kernels take less than the rest, so below it kernels are missing


@dataclasses.dataclass(frozen=True)
class Profile:
    """What CUPTI showed of one run, of a device on average. stages: milliseconds by stage; launches: the number of kernels.

    profiled: the kernels' part of the time that the same run takes without tracing.
    """

    stages: dict[str, float]
    launches: int
    profiled: float

    def shares(self, what: str) -> tuple[dict[str, float], str]:
        """The stages and "", or none and why: where kernels are missing, what was run is called `what`."""
        if self.profiled >= MIN_PROFILED:
            return self.stages, ""
        part = f"{100 * self.profiled:.0f} %"
        return {}, f"stage shares omitted: CUPTI reported kernels for only {part} of the {what}'s time"


def profile(function: Callable[[], Any]) -> Profile:
    """Runs `function` three times, the last one traced. ValueError where CUPTI does not show the device's kernels."""
    jax.block_until_ready(function())  # what it compiles is not timed
    began = time.perf_counter()
    jax.block_until_ready(function())
    seconds = time.perf_counter() - began
    kernels = kernels_of(function)
    stages = dict.fromkeys([*STAGES.values(), OTHER], 0.0)
    for name, ms in kernels:
        stages[next((stage for part, stage in STAGES.items() if part in name), OTHER)] += ms / jax.device_count()
    return Profile(stages, len(kernels) // jax.device_count(), sum(stages.values()) / 1000 / seconds)
