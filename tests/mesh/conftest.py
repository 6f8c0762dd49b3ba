"""Tests on eight simulated devices: `make test-mesh`, or XLA_FLAGS=--xla_force_host_platform_device_count=8."""

from collections.abc import Iterator

import jax
import pytest

from tests.conftest import drop_many_programs

DEVICES = 8


def pytest_collection_modifyitems(items):
    if jax.device_count() != DEVICES:
        skip = pytest.mark.skip(
            reason=f"needs {DEVICES} devices (make test-mesh simulates them), there are {jax.device_count()}"
        )
        for item in items:
            if "tests/mesh" in str(item.path):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def few_programs_of_many_devices() -> Iterator[None]:
    """After every test: a program for eight devices takes so many memory maps that a single module may use them up."""
    yield
    drop_many_programs()
