"""Which device programs are compiled for, and that implementations are chosen for that one."""

import types

import jax
import pytest

from pallas_kernels import device, hopper, tpu

V5P = types.SimpleNamespace(platform="tpu", device_kind="TPU v5")
H200 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0", core_count=132)
A100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0", core_count=108)

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default device must be a CPU")


@on_cpu
def test_the_default_device_is_compiled_for_unless_another_is_named():
    assert (device.platform(), device.compute_capability(), device.num_sms()) == ("cpu", None, None)
    with device.target(V5P):
        assert (device.platform(), device.device_kind(), device.num_sms()) == ("tpu", "TPU v5", None)
        with device.target(A100):
            assert (device.platform(), device.compute_capability(), device.num_sms()) == ("gpu", "8.0", 108)
        assert device.platform() == "tpu"
    assert device.platform() == "cpu"


@on_cpu
def test_kernels_for_hopper_serve_where_one_is_compiled_for():
    assert "'cpu'" in hopper.why_not()
    with device.target(H200):
        if jax.version.__version_info__ >= (0, 11):
            assert hopper.why_not() is None
        else:
            assert "JAX 0.11" in hopper.why_not()
    with device.target(A100):
        assert ("8.0" if jax.version.__version_info__ >= (0, 11) else "JAX 0.11") in hopper.why_not()
    with device.target(V5P):
        assert "'tpu'" in hopper.why_not()
    assert hopper.why_not() is not None


def test_kernels_for_tpus_know_the_chip_compiled_for():
    with device.target(V5P):
        assert tpu.chip().name == "v5p" and tpu.why_not() is None
    with device.target(types.SimpleNamespace(platform="tpu", device_kind="TPU v99")):
        assert "v99" in tpu.why_not()


def test_programs_of_one_device_are_not_taken_for_another():
    traced = []

    @jax.jit
    def f(x):
        traced.append((device.platform(), device.compute_capability()))
        return x + 1

    for target in (H200, A100, V5P, H200):
        with device.target(target):
            f(1)
    f(1)
    assert traced == [("gpu", "9.0"), ("gpu", "8.0"), ("tpu", None), (device.platform(), device.compute_capability())]
