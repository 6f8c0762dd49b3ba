"""What a GPU ran, seen through CUPTI: the one place that knows how JAX gives access to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Kernel = tuple[str, float]  # its name, and how many milliseconds it ran

# Compiler options by which a program launches its kernels one by one. By default XLA makes CUDA graphs of them, a `lax.cond`
# with its branches included, and CUPTI has been seen to lose the kernels of such a branch after some looks of a process.
KERNEL_BY_KERNEL = {"xla_gpu_enable_command_buffer": ""}


def _library() -> Any:
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext


def kernels_of(function: Callable[[], Any]) -> list[Kernel]:
    """The device's kernels while `function` runs and its results are waited for, in the order in which they were started.

    ValueError, with the reason, where CUPTI does not show them. Tracing slows what is launched: times of anything else
    than these kernels are to be taken without it.
    """
    try:
        cupti = _library()
        cupti._cupti_init()
    except Exception as error:  # not a GPU, or a library without it
        raise ValueError(f"no times of kernels: {error}") from None
    try:
        jax.block_until_ready(function())
    finally:
        try:
            found = cupti._cupti_get_timings(True)
        except Exception as error:
            raise ValueError(f"no times of kernels: {error}") from None
    if not found:
        raise ValueError("no times of kernels: CUPTI saw none")
    return found
