"""TPU kernels on a CPU: Pallas' TPU interpret mode, with memory that holds NaN until written and a race detector."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # says whether races were found; nothing public does
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.device import target

V5E = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


@contextlib.contextmanager
def interpreted(device=V5E, *, detect_races: bool = True) -> Iterator[None]:
    """Implementations are chosen for `device`, and their kernels interpreted; fails where two accesses could race."""
    pltpu.reset_tpu_interpret_mode_state()
    with target(device), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races)):
        yield
    found = interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    assert not found, "a race, printed above"
