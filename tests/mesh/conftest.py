"""Tests on eight simulated devices: `make test-mesh`, or XLA_FLAGS=--xla_force_host_platform_device_count=8."""

import jax
import pytest

DEVICES = 8


def pytest_collection_modifyitems(items):
    if jax.device_count() != DEVICES:
        skip = pytest.mark.skip(
            reason=f"needs {DEVICES} devices (make test-mesh simulates them), there are {jax.device_count()}"
        )
        for item in items:
            if "tests/mesh" in str(item.path):
                item.add_marker(skip)
