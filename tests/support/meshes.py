"""The meshes of eight devices that results are compared on, the rules in force on each, and how processes get devices."""

import os
from typing import Any

from indexcache_jax import sharding
from indexcache_jax.sharding import SERVING, Rules

# Sizes of data, context and tensor; the rules.
MESHES: dict[str, tuple[dict[str, int], Rules]] = {
    "data": ({"data": 8}, SERVING.whole_experts()),
    "context": ({"context": 8}, SERVING.whole_experts()),
    "tensor": ({"tensor": 4, "data": 2}, SERVING.whole_experts()),  # the tiny models have 4 heads
    "expert": ({"data": 8}, SERVING),
    "context, expert": ({"context": 8}, SERVING),
    "all": ({"data": 2, "context": 2, "tensor": 2}, SERVING),
    "split cache": ({"data": 2, "context": 4}, SERVING.split_cache()),
}


def use(name: str, rules: Rules | None = None) -> Any:
    """The context in which a mesh by its name is in force, with its own rules or others."""
    sizes, own = MESHES[name]
    return sharding.use(sharding.make_mesh(**sizes), rules or own)


def simulated(devices: int) -> dict[str, str]:
    """The environment in which a process has so many CPU devices, beside the XLA flags of this one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
