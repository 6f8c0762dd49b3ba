"""How long a call takes, and what its kernels alone take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

from experiments.benchmarks.kernels.cases import ProgramArguments
from experiments.common.profiling import kernels_of

WINDOWS = 5
# Calls of a program must not overlap, or their times would not add up.
GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}


def compiled(function: Callable[..., Any], arguments: ProgramArguments, pool: futures.Executor) -> futures.Future[Any]:
    """One executable that calls `function` on every set of arguments, in order."""
    one = jax.jit(function)  # so that the calls share one trace
    lowered = jax.jit(lambda sets, common: [one(*own, *common) for own in sets]).lower(*arguments)
    options = GPU_OPTIONS if jax.default_backend() == "gpu" else None
    return pool.submit(lambda: lowered.compile(compiler_options=options))


def milliseconds(program: Callable[..., Any], arguments: ProgramArguments, seconds: float) -> list[float]:
    """How long one call takes, in each of WINDOWS windows of about so many seconds."""

    def window(repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            out = program(*arguments)
        jax.block_until_ready(out)
        return time.perf_counter() - began

    window(2)
    repeats = max(1, math.ceil(seconds / max(window(1), 1e-6)))
    return [1e3 * window(repeats) / repeats / len(arguments[0]) for _ in range(WINDOWS)]


def kernel_times(program: Any, arguments: ProgramArguments) -> tuple[float, float]:
    """Milliseconds and number of the kernels of one call, by CUPTI."""
    found, calls = kernels_of(lambda: program(*arguments)), len(arguments[0])
    return sum(ms for _, ms in found) / calls, len(found) / calls
