"""Compiled programs are kept from one run to the next: compiling is most of what a short run does."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import zlib
from typing import Any

import jax

LEAST_SECONDS = 0.3  # of compiling, below which a program is not kept


def folder() -> pathlib.Path:
    """Where this machine's programs are kept: a program for one processor may not run on another that shares a home."""
    about = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "indexcache-jax" / f"programs-{zlib.crc32(about.encode()):08x}"


def keep() -> None:
    """Keeps compiled programs in `folder`, unless JAX was told where, or not to (JAX_ENABLE_COMPILATION_CACHE=false)."""
    config: Any = jax.config  # whose settings have no types
    if config.jax_compilation_cache_dir is None and config.jax_enable_compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
