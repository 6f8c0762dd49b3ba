"""What every test runs under: full float32 products, programs that compile quickly and once, no look-ups on a model hub."""

import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import jax
import pytest

from tests.support import numpy_reference
from tests.support.tiny_models import CASES

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is installed to compile with, no TPU is expected

# Most of the time of compiling for a CPU goes into XLA's newer way to emit fused loops, so tests have the older one.
OLDER_EMITTER = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
if OLDER_EMITTER not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLDER_EMITTER}"

# The oracle multiplies in float32; accelerators and some CPU builds would otherwise multiply in less.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def reference() -> Callable[[str], numpy_reference.Trace]:
    """The float64 forward of a case by name, computed once."""

    @functools.cache
    def trace(name: str) -> numpy_reference.Trace:
        case = CASES[name]
        return numpy_reference.forward(case.state, case.fields, case.schedule.is_full, case.tokens, case.lengths)

    return trace


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in one folder for all workers, and for the commands that tests start, as long as they run.

    Where JAX_COMPILATION_CACHE_DIR names one, that is it: `.ci/run` has one for all its parts.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="indexcache-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    seconds = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.fixture(scope="session", autouse=True)
def quick_to_compile() -> None:
    """Compiles without most optimisations on a CPU, where tests compile for longer than they run.

    Commands that tests start compile as users do, unless a test says otherwise: some run whole models.
    """
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)


MEMORY_MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 20_000  # of the 65,530 that Linux gives a process by default; every compiled program takes a few


def drop_many_programs() -> None:
    """Drops compiled programs where a process has so many that XLA may map no further one, and crashes."""
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    yield
    drop_many_programs()
