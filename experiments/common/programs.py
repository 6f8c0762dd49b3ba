"""Compiled programs are kept from one run to the next: compiling is most of what a short run does.

JAX writes a program's file in place, without a lock. So a kill or a full disk leaves a torn one, and a process that shares the
folder may read half of one. JAX compiles such a program anew, but would neither write it again nor stop warning of it; here
the torn file is removed and one note is printed. A program that is loaded is code that runs: the folder has to be the user's
own.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import platform
import re
import shutil
import stat
import tempfile
import warnings
import zlib
from collections.abc import Callable
from typing import Any, TextIO

import jax

from indexcache_jax.foreign import escaped

LEAST_SECONDS = 0.3  # of compiling, below which a program is not kept
LEAST_FREE = 10**9  # bytes of the disk
# How JAX warns of a program that it could not read or write.
_OF_KEEPING = re.compile(
    r"Error (?:reading|writing) persistent compilation cache entry for '(?P<program>[^']*)': (?P<why>.*)", re.DOTALL
)


def folder() -> pathlib.Path:
    """Where this machine's programs are kept: a program for one processor may not run on another that shares a home."""
    about = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "indexcache-jax" / f"programs-{zlib.crc32(about.encode()):08x}"


def why_not(path: pathlib.Path) -> str | None:
    """Why programs cannot be kept in a folder, which is made where it is not there; None where they can."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.stat()
        with tempfile.TemporaryFile(dir=path):
            free = shutil.disk_usage(path).free
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path}: belongs to another user, or others may write to it"
    return (
        None if free >= LEAST_FREE else f"{path}: {free / 1e6:.0f} MB of the disk are free, {LEAST_FREE / 1e6:.0f} are needed"
    )


class _Warnings:
    """What becomes of warnings: of those of JAX about programs that it could not read or write, one note in all."""

    def __init__(self, path: pathlib.Path, others: Callable[..., None]) -> None:
        self._path, self._others, self._noted = path, others, False

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        found = _OF_KEEPING.match(str(message))
        if found is None:
            self._others(message, category, filename, lineno, file, line)
            return
        with contextlib.suppress(OSError):
            for torn in self._path.glob(f"{glob.escape(found['program'])}-*"):
                torn.unlink()
        if not self._noted:
            self._noted = True
            why = escaped(found["why"], 300)
            print(f"note: {self._path}: compiled programs cannot all be kept there, the run goes on: {why}", flush=True)


def keep() -> None:
    """Keeps compiled programs in `folder`, unless JAX was told where, or not to (JAX_ENABLE_COMPILATION_CACHE=false).

    Prints one note where they cannot be kept.
    """
    config: Any = jax.config  # whose settings have no types
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    path = folder()
    if (why := why_not(path)) is not None:
        print(f"note: compiled programs are not kept: {why}", flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    warnings.showwarning = _Warnings(path, warnings.showwarning)
