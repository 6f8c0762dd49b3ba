"""What devices exchange in a compiled program, read from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "ragged-all-to-all", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_OPERATION = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}|/\*.*?\*/")
# How a TPU's compiler writes a reduce-scatter: a computation of this name, which adds up and keeps a part.
_SCATTERING = re.compile(r"%?all-reduce-scatter[\w.]*(?:clone)? \(")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Operations of one kind, and the bytes that one device sends in them."""

    count: int = 0
    sent: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.sent + other.sent)


def collectives(hlo: str, num_devices: int) -> dict[str, Traffic]:
    """The traffic of a program for so many devices, by kind of operation.

    Every operation of the text counts once, in a loop or a branch too. Bytes are those of rings: of n devices each sends
    (n - 1) / n of what all-gather or all-to-all give it, as much of what reduce-scatter is given, twice that for all-reduce,
    and all of what collective-permute is given. ValueError for replica groups that cannot be read.
    """
    found: dict[str, Traffic] = {}
    scatters = False  # whether the computation that the line belongs to is a reduce-scatter's
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            scatters = _SCATTERING.match(line) is not None
        _, _, text = line.partition(" = ")
        operation = _OPERATION.search(f" {text}")
        if not operation:
            continue
        kind, started = operation[1], operation[2] is not None
        devices = _group_size(line, num_devices)
        sent = _sent(kind, _result_bytes(text[: operation.start()], started and kind != "all-reduce"), devices)
        if kind == "all-reduce" and scatters:
            kind, sent = "reduce-scatter", sent // 2
        if devices > 1:
            found[kind] = found.get(kind, Traffic()) + Traffic(1, sent)
    return {kind: found[kind] for kind in KINDS if kind in found}


def _result_bytes(shape: str, pairs: bool) -> int:
    """Bytes of an operation's result of this shape. pairs: where it is a tuple, it holds the operands, then the results."""
    shape = _LAYOUT.sub("", shape).strip()
    if pairs and shape.startswith("("):
        shape = _elements(shape)[1]
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * (8 if name == "pred" else int(bits)) // 8
        for name, bits, sizes in _ARRAY.findall(shape)
    )


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples themselves."""
    found, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or depth == 0:
            found.append(shape[start:i])
            start = i + 1
    return found


def _sent(kind: str, result: int, devices: int) -> int:
    if kind == "reduce-scatter":
        return result * (devices - 1)
    if kind in ("collective-permute", "collective-broadcast"):
        return result
    return (2 if kind == "all-reduce" else 1) * result * (devices - 1) // devices


def _group_size(line: str, num_devices: int) -> int:
    """Devices that exchange with each other in the operation of an HLO line."""
    if "source_target_pairs=" in line:
        return num_devices
    groups = re.search(r"replica_groups=(\{\{[\d,]+\}|\{\}|\[\d+,\d+\]|mesh\[[^\]]*\] ?\{[^}]*\})", line)
    if groups is None:
        raise ValueError(f"HLO: no replica groups that can be read in {line.strip()[:200]!r}")
    text = groups[1]
    if text == "{}":
        return num_devices
    if text.startswith("{{"):
        return text.count(",") + 1
    if text.startswith("["):
        return int(text[1:-1].split(",")[1])
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
    names = re.findall(r"'(\w+)'", text.partition("]")[2])
    return math.prod(sizes[name] for name in names)
