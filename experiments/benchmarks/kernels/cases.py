"""What a row of the table is, what it runs, and at which scale."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels import hopper

L2_BYTES = 50 * 2**20  # of an H100 and an H200
MAX_CALLS, PROGRAM_SECONDS = 64, 5e-4
BYTES_PER_SECOND = 4e12  # about what such a GPU copies
SELECTED = 2048

Arguments = tuple[Any, ...]
ProgramArguments = tuple[list[Arguments], Arguments]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row runs: `kernel` on each of `sets` followed by `common`, which moves `bytes` or computes `flops` a call.

    reference: the same in XLA, and the factor from its arguments' work to the row's (measured on fewer queries).
    variants: the kernel with a stage left out, by what that is called.
    """

    kernel: Callable[..., Any]
    sets: list[Arguments]
    flops: float = 0.0
    bytes: float = 0.0
    common: Arguments = ()
    reference: tuple[Callable[..., Any], Arguments, int] | None = None
    variants: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    @property
    def program_arguments(self) -> ProgramArguments:
        return self.sets, self.common


@dataclasses.dataclass(frozen=True)
class Row:
    """published: milliseconds of the best public kernel on an H200, and whose; target: what this library aims at;
    note: what decides its time, where that is not plain."""

    name: str
    make: Callable[[], Case]
    published: tuple[float, str] | None = None
    target: float | None = None
    note: str = ""

    @property
    def priority(self) -> int:
        return 0 if self.target is not None else 1 if self.published is not None else 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes' scale: as they are on a Hopper GPU, small elsewhere, where only that everything runs can be shown."""

    small: bool

    def queries(self, n: int) -> int:
        return max(4, n // 1024) if self.small else n

    def keys(self, n: int) -> int:
        return max(256, n // 480) if self.small else n

    def selected(self, n: int = SELECTED) -> int:
        return n // 128 if self.small else n

    def batch(self, n: int) -> int:
        return min(2, n) if self.small else n

    def width(self, n: int) -> int:
        return n // 16 if self.small else n

    def seeds(self, bytes_of_call: float) -> list[int]:
        """Of the arguments of a program's calls: as many different ones as exceed twice the L2 cache, and so many calls
        that launching the program takes the host less time than running it takes the device."""
        if self.small:
            return [0]
        different = max(1, min(MAX_CALLS, math.ceil(2 * L2_BYTES / bytes_of_call)))
        calls = max(different, min(MAX_CALLS // 2, math.ceil(PROGRAM_SECONDS * BYTES_PER_SECOND / bytes_of_call)))
        return [call % different for call in range(calls)]


def on_hopper() -> bool:
    return hopper.why_not() is None


def without(kernel: Callable[..., Any], stages: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The variants of a Case: the kernel with each of these stages left out, by what that is called."""
    return {name: functools.partial(kernel, leave_out=stage) for name, stage in stages.items()}


def passes(
    sizes: Sizes,
    operation: Callable[..., Any],
    arguments: Callable[[Sizes, int], Arguments],
    moved: Callable[[Arguments], float],
) -> Case:
    """An operation that is bound by the `moved` bytes of arguments, as one that goes through them once is."""
    count = moved(arguments(sizes, 0))
    sets = [arguments(sizes, seed) for seed in sizes.seeds(count)]
    reference = (functools.partial(operation, implementation="xla"), sets[0], 1) if on_hopper() else None
    return Case(operation, sets, bytes=count, reference=reference)


def bytes_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def row(
    sizes: Sizes,
    name: str,
    function: Callable[..., Case],
    *shape: Any,
    public: tuple[float, str] | None = None,
    target: float | None = None,
    note: str = "",
    **how: Any,
) -> Row:
    """The row of `function` at a shape. Small shapes have no figures to be compared with."""
    make = functools.partial(function, sizes, *shape, **how)
    return Row(f"{name}, small", make) if sizes.small else Row(name, make, public, target, note)
