"""What is left of the host's memory: of the machine's, and of what control groups leave to a container or a batch job."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

# Of control groups, by their version: the files of the limit and of what is used, and the file caches in memory.stat, which
# are given up when memory is short.
_LIMITS = {2: "memory.max", 1: "memory.limit_in_bytes"}
_USED = {2: "memory.current", 1: "memory.usage_in_bytes"}
_CACHES = {2: ("active_file", "inactive_file"), 1: ("total_active_file", "total_inactive_file")}


def available(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes that this process can still fill: the least of what the machine and each of its control groups have left.

    root: the folder that proc and sys are in.
    """
    return min([_of_machine(root), *_of_groups(root)])


def _of_machine(root: pathlib.Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):  # not a Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_groups(root: pathlib.Path) -> Iterator[int]:
    """What each control group of this process has left that sets a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        version, top = (1, root / "sys/fs/cgroup/memory") if controllers else (2, root / "sys/fs/cgroup")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # a container sees its own group as the topmost one
            if (left := _left(folder, version)) is not None:
                yield left
            if folder == top:
                break


def _left(folder: pathlib.Path, version: int) -> int | None:
    """What a control group has left; None where it is not there or sets no limit."""
    try:
        limit = int((folder / _LIMITS[version]).read_text(encoding="ascii"))  # "max" is none
        used = int((folder / _USED[version]).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    caches = sum(int(value) for name, _, value in (line.partition(" ") for line in stat) if name in _CACHES[version])
    return max(0, limit - used + caches)
