"""Which JAX and which device the Mosaic GPU kernels need."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels import device

NUM_SMS = 132  # of an H100 SXM and an H200: how many thread blocks a persistent kernel starts
REGISTER_FILE = 65536  # 32-bit registers of an SM
WARPGROUP = 128  # threads


@dataclasses.dataclass(frozen=True)
class RegisterSplit:
    """How a thread block of one helping and `workers` working warpgroups divides its registers: per thread, by setmaxnreg.

    A block starts with the largest multiple of 8 registers a thread that fits the register file. Warpgroups can only exchange
    these: one that asks for more than the others gave back waits for ever, without a message. ValueError for such a split.
    """

    workers: int
    worker: int
    helper: int

    def __post_init__(self) -> None:
        if any(not 24 <= registers <= 256 or registers % 8 for registers in (self.worker, self.helper)):
            raise ValueError(f"{self}: registers of a thread are a multiple of 8 from 24 to 256")
        warpgroups = self.workers + 1
        at_launch = REGISTER_FILE // (8 * WARPGROUP * warpgroups) * 8
        demanded = self.workers * self.worker + self.helper
        if demanded > warpgroups * at_launch:
            raise ValueError(f"{self}: {demanded} registers for {warpgroups} threads launched with {at_launch} each")


def why_not() -> str | None:
    """Why a Mosaic GPU kernel cannot run on the device compiled for, None where it can."""
    if device.platform() != "gpu":
        return f"it needs a Hopper GPU, the device compiled for is a {device.platform()!r}"
    if jax.version.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 or newer on a GPU, this is {jax.__version__}"
    if (capability := device.compute_capability()) != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), this one has {capability or 'an unknown one'}"
    return None
