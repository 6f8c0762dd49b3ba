import jax
import pytest

from experiments.common import profiling


class Cupti:
    """What JAX's extension offers, with its calls written down."""

    def __init__(self, kernels):
        self.kernels, self.calls = kernels, []

    def _cupti_init(self):
        self.calls.append("init")

    def _cupti_get_timings(self, detach):
        self.calls.append(f"timings, detach {detach}")
        return self.kernels


def test_kernels_are_those_between_the_two_calls(monkeypatch):
    cupti = Cupti([("a", 0.5), ("b", 0.25)])
    monkeypatch.setattr(profiling, "_library", lambda: cupti)
    assert profiling.kernels_of(lambda: cupti.calls.append("run")) == [("a", 0.5), ("b", 0.25)]
    assert cupti.calls == ["init", "run", "timings, detach True"]


def test_cupti_is_let_go_where_the_function_fails(monkeypatch):
    cupti = Cupti([("a", 0.5)])
    monkeypatch.setattr(profiling, "_library", lambda: cupti)
    with pytest.raises(ZeroDivisionError):
        profiling.kernels_of(lambda: 1 // 0)
    assert cupti.calls == ["init", "timings, detach True"]


@pytest.mark.parametrize("library, reason", [(Cupti([]), "CUPTI saw none"), (object(), "no attribute")])
def test_the_reason_is_said(monkeypatch, library, reason):
    monkeypatch.setattr(profiling, "_library", lambda: library)
    with pytest.raises(ValueError, match=f"no times of kernels: .*{reason}"):
        profiling.kernels_of(lambda: None)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it works")
def test_without_a_gpu_there_are_none():
    with pytest.raises(ValueError, match="no times of kernels"):
        profiling.kernels_of(lambda: None)
