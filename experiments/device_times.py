"""What a GPU's kernels take, one by one, seen through CUPTI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def kernels_of(function: Callable[[], Any]) -> list[tuple[str, float]]:
    """Names and milliseconds of the kernels that run while `function` does. ValueError where CUPTI does not show them."""
    try:
        from jax._src.lib import mosaic_gpu as library

        cupti = library._mosaic_gpu_ext
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
    return [(name, float(ms)) for name, ms in found]
