"""The choice among an operation's implementations, the same for all operations."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels import hopper


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: the function, and why it cannot serve given arguments (None where it can)."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args, **options: None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The name of the implementation that None stands for, and by name why those that are better cannot serve."""

    name: str
    passed_over: Mapping[str, str]


def choose(backends: Mapping[str, Backend], *args: Any, **options: Any) -> Choice:
    """The choice for these arguments; it depends on their shapes and dtypes alone."""
    passed_over: dict[str, str] = {}
    for name, backend in backends.items():
        if (reason := backend.why_not(*args, **options)) is None:
            return Choice(name, passed_over)
        passed_over[name] = reason
    raise AssertionError(f"none of {list(backends)} serves, though the last one always does")


def best(backends: Mapping[str, Backend], *args: Any, **options: Any) -> str:
    """The name of the implementation that None stands for."""
    return choose(backends, *args, **options).name


@dataclasses.dataclass(eq=False)
class _Log:
    """What operations would have been given to, by their names."""

    choices: dict[str, Choice] = dataclasses.field(default_factory=dict)


# Part of jit's cache key, so that what was traced before is traced again to be recorded.
_LOG = jax.make_user_context(default_value=None)
KERNELS = ("mosaic", "triton")  # how the names of those begin that take long to trace


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Choice]]:
    """Within, the dictionary is given the choice of every operation that is traced, by its name.

    "xla" is traced in place of kernels, which takes a small part of the time; so nothing that is traced within is to be run.
    """
    log = _Log()
    with _LOG(log):
        yield log.choices


def imported(module: str, name: str, why_not: str = "why_not") -> Backend:
    """Functions `name` and `why_not` of a module that is imported at the first call: not every JAX has what kernels import."""

    def attribute(name: str) -> Callable[..., Any]:
        return lambda *args, **options: getattr(importlib.import_module(module), name)(*args, **options)

    return Backend(attribute(name), attribute(why_not))


def hopper_backend(module: str, name: str, why_not: str = "why_not") -> Backend:
    """`imported` for a module that is imported only where kernels for Hopper can run."""
    backend = imported(module, name, why_not)
    return Backend(backend.run, lambda *args, **options: hopper.why_not() or backend.why_not(*args, **options))


def call(operation: str, backends: Mapping[str, Backend], implementation: str | None, *args: Any, **options: Any) -> Any:
    """Runs the named implementation, or for None the first of `backends` that can serve.

    `backends` is ordered best first and ends with "xla", which always serves. Raises ValueError for an unknown name,
    NotImplementedError with the reason where the named one cannot serve these arguments.
    """
    if implementation is None:
        chosen = choose(backends, *args, **options)
        name = chosen.name
        if _LOG.value is not None:
            _LOG.value.choices[operation] = chosen
            name = "xla" if name.startswith(KERNELS) else name
        return backends[name].run(*args, **options)
    if implementation not in backends:
        raise ValueError(f"{operation}: implementation {implementation!r} is not one of {list(backends)}")
    if reason := backends[implementation].why_not(*args, **options):
        raise NotImplementedError(f"{operation}: implementation {implementation!r} cannot serve: {reason}")
    return backends[implementation].run(*args, **options)
