"""Devices that need not be at hand, as compilers describe them: TPU slices by libtpu, NVIDIA H200s by JAX's CUDA plugin.

A topology is named KIND:SHAPE, such as v5e:4x4, v5p:4x4x4 or h200:16 (two hosts of eight); "local" is the devices at hand.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Sequence

import jax

from indexcache_jax import memory
from pallas_kernels import tpu

LOCAL, H200 = "local", "h200"
GPUS_OF_A_HOST = 8
NOT_ASKED = "nothing was to be compiled"
# The share of a GPU's memory that a process can have arrays in, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
GPU_SHARE = 0.95

# What XLA's compiler asks of a device, as an H200 with CUDA 13 answers.
_H200_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  ecc_enabled: true
  name: "NVIDIA H200 141GB HBM3e"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
H200_MEMORY = 151_397_597_184


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind. memory: bytes that each may hold; devices: None where nothing here can compile for them.

    compute_capability: of GPUs, where that is known.
    """

    name: str
    platform: str
    device_kind: str
    num_devices: int
    memory: int
    devices: Sequence[jax.Device] | None
    why_not: str = ""
    compute_capability: str | None = None


def topology(name: str, compiling: bool = True) -> Topology:
    """The topology of a name, with its devices where programs can be compiled for them. ValueError for another name.

    compiling: nothing is to be compiled where it is False, and no compiler is loaded, which takes seconds.
    """
    if name == LOCAL:
        devices = jax.devices()
        capability = getattr(devices[0], "compute_capability", None)
        return Topology(
            name,
            devices[0].platform,
            devices[0].device_kind,
            len(devices),
            memory.available(),
            devices,
            compute_capability=capability,
        )
    if gpus := re.fullmatch(rf"{H200}:(\d+)", name):
        return _h200s(name, int(gpus[1]), compiling)
    kinds = {chip.name: kind for kind, chip in tpu.CHIPS.items()}
    if (slice_ := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)) and slice_[1] in kinds:
        chip = tpu.CHIPS[kinds[slice_[1]]]
        found = described(name) if compiling else NOT_ASKED
        count = 1
        for size in slice_[2].split("x"):
            count *= int(size)
        if isinstance(found, str):
            return Topology(name, "tpu", kinds[chip.name], count, chip.hbm, None, found)
        return Topology(name, "tpu", found[0].device_kind, len(found), chip.hbm, found)
    raise ValueError(f"--topology={name}: not local, {H200}:N, or one of {', '.join(kinds)} with a shape, such as v5e:4x4")


def _h200s(name: str, count: int, compiling: bool) -> Topology:
    """So many H200s, eight to a host. ValueError for what is not whole hosts."""
    if count < 1 or (count > GPUS_OF_A_HOST and count % GPUS_OF_A_HOST):
        raise ValueError(f"--topology={name}: up to {GPUS_OF_A_HOST} devices, or a multiple of as many")
    hosts = -(-count // GPUS_OF_A_HOST)
    found = _described_gpus(hosts, count // hosts) if compiling else NOT_ASKED
    usable, why_not = int(GPU_SHARE * H200_MEMORY), found if isinstance(found, str) else ""
    devices = None if isinstance(found, str) else found
    return Topology(name, "gpu", "NVIDIA H200", count, usable, devices, why_not, compute_capability="9.0")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@functools.cache
def _described_gpus(hosts: int, of_a_host: int) -> list[jax.Device] | str:
    from jax.experimental import topologies

    try:
        if not any(device.platform == "gpu" for device in jax.devices()):
            importlib.import_module("jax_plugins.xla_cuda13")  # its import makes the compiler known
        shape = f"1x{hosts}x{of_a_host}"
        described = topologies.get_topology_desc("h200", platform="cuda", target_config=_H200_TARGET, topology=shape)
        return list(described.devices)
    except Exception as error:  # whatever a plugin or a driver that is missing raises
        return _first_line(error)


@functools.cache
def described(name: str) -> list[jax.Device] | str:
    """The chips of a TPU topology such as "v5e:2x2", or why libtpu does not describe it here."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks a cloud's metadata server otherwise
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so there is nothing to exclude others from
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # whatever a library that is missing or does not run here raises
        return _first_line(error)


def why_not(name: str) -> str | None:
    """Why nothing can be compiled for a TPU topology here, None where it can."""
    found = described(name)
    return found if isinstance(found, str) else None
