"""The choice among an operation's implementations, the same for all operations."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels import hopper


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: the function, and why it cannot serve given arguments (None where it can)."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args, **options: None


def best(backends: Mapping[str, Backend], *args: Any, **options: Any) -> str:
    """The name of the implementation that None stands for; depends on the shapes and dtypes of the arguments alone."""
    return next(name for name, backend in backends.items() if backend.why_not(*args, **options) is None)


def imported(module: str, name: str) -> Backend:
    """Function `name` and `why_not` of a module that is imported at the first call: not every JAX has what kernels import."""

    def attribute(name: str) -> Callable[..., Any]:
        return lambda *args, **options: getattr(importlib.import_module(module), name)(*args, **options)

    return Backend(attribute(name), attribute("why_not"))


def hopper_backend(module: str, name: str) -> Backend:
    """`imported` for a module that is imported only where kernels for Hopper can run."""
    backend = imported(module, name)
    return Backend(backend.run, lambda *args, **options: hopper.why_not() or backend.why_not(*args, **options))


def call(operation: str, backends: Mapping[str, Backend], implementation: str | None, *args: Any, **options: Any) -> Any:
    """Runs the named implementation, or for None the first of `backends` that can serve.

    `backends` is ordered best first and ends with "xla", which always serves. Raises ValueError for an unknown name,
    NotImplementedError with the reason where the named one cannot serve these arguments.
    """
    if implementation is None:
        return backends[best(backends, *args, **options)].run(*args, **options)
    if implementation not in backends:
        raise ValueError(f"{operation}: implementation {implementation!r} is not one of {list(backends)}")
    if reason := backends[implementation].why_not(*args, **options):
        raise NotImplementedError(f"{operation}: implementation {implementation!r} cannot serve: {reason}")
    return backends[implementation].run(*args, **options)
