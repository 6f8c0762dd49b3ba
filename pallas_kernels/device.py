"""The device that programs are compiled for: the one place that says which it is, whether it is at hand or not.

Without `target` it is JAX's default device. Inside `target(device)` it is that one, which need not be at hand: a device of
a `jax.experimental.topologies` description serves for ahead-of-time compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class _Target:
    platform: str
    device_kind: str
    compute_capability: str | None
    num_sms: int | None


# Part of jit's cache key, so that what was traced for one device is not taken for another.
_TARGET = jax.make_user_context(default_value=None)


def _description(device: Any) -> _Target:
    capability, sms = getattr(device, "compute_capability", None), getattr(device, "core_count", None)
    return _Target(device.platform, device.device_kind, capability, sms)


@contextlib.contextmanager
def target(device: Any) -> Iterator[None]:
    """What is traced inside is compiled for `device`.

    Only its attributes are read: platform ("cpu", "gpu" or "tpu"), device_kind and, where a GPU has them, compute_capability
    and core_count.
    """
    with _TARGET(_description(device)):
        yield


def platform() -> str:
    """The platform compiled for: "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if _TARGET.value is None else _TARGET.value.platform


def _current() -> _Target:
    return _description(jax.devices()[0]) if _TARGET.value is None else _TARGET.value


def device_kind() -> str:
    """What the platform calls the device compiled for, such as "TPU v5 lite"."""
    return _current().device_kind


def compute_capability() -> str | None:
    """Of the GPU compiled for, such as "9.0" of Hopper; None where the device does not say."""
    return _current().compute_capability


def num_sms() -> int | None:
    """Streaming multiprocessors of the GPU compiled for, None where the device does not say."""
    return _current().num_sms
