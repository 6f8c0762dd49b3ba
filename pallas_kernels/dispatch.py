"""The choice among an operation's implementations, the same for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: the function, and why it cannot serve given arguments (None where it can)."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args, **options: None


def call(operation: str, backends: Mapping[str, Backend], implementation: str | None, *args: Any, **options: Any) -> Any:
    """Runs the named implementation, or for None the first of `backends` that can serve.

    `backends` is ordered best first and ends with "xla", which always serves. Raises ValueError for an unknown name,
    NotImplementedError with the reason where the named one cannot serve these arguments.
    """
    if implementation is None:
        chosen = next(backend for backend in backends.values() if backend.why_not(*args, **options) is None)
        return chosen.run(*args, **options)
    if implementation not in backends:
        raise ValueError(f"{operation}: implementation {implementation!r} is not one of {list(backends)}")
    if reason := backends[implementation].why_not(*args, **options):
        raise NotImplementedError(f"{operation}: implementation {implementation!r} cannot serve: {reason}")
    return backends[implementation].run(*args, **options)
