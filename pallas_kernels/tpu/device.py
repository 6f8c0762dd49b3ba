"""The TPUs that the Mosaic TPU kernels are laid out for, and their limits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device

LANES = 128  # of a vector register; the last axis of what kernels hold is a multiple of it
SUBLANES = 8  # 32-bit rows of a vector register


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's limits: vmem (of a core) and hbm in bytes, bandwidth in bytes a second, bf16 and int8 in operations a second."""

    name: str
    vmem: int
    hbm: int
    bandwidth: float
    bf16: float
    int8: float
    cores: int = 1


CHIPS = {
    "TPU v5 lite": Chip("v5e", 128 * 2**20, 16 * 2**30, 0.82e12, 197e12, 394e12),
    "TPU v5": Chip("v5p", 64 * 2**20, 95 * 2**30, 2.46e12, 459e12, 918e12, cores=2),
    "TPU v6 lite": Chip("v6e", 128 * 2**20, 32 * 2**30, 1.64e12, 918e12, 1836e12),
}


def why_not() -> str | None:
    """Why a Mosaic TPU kernel cannot run on the device that is compiled for, None where it can."""
    if device.platform() != "tpu":
        return f"it needs a TPU, the device compiled for is a {device.platform()!r}"
    if device.device_kind() not in CHIPS:
        return f"it knows the memories of {list(CHIPS)}, not of {device.device_kind()!r}"
    return None


def chip() -> Chip:
    """The chip compiled for; where it is none of CHIPS (interpreted kernels on a CPU) a v5e."""
    return CHIPS.get(device.device_kind(), CHIPS["TPU v5 lite"])


def precision(dtype: Any) -> jax.lax.Precision:
    """The precision of a kernel's products; explicit, because Mosaic refuses what jax_default_matmul_precision may ask for."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
