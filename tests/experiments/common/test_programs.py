"""Where compiled programs are kept, and what a run does where they cannot be."""

import os
import pathlib
import shutil
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from experiments import run
from experiments.common import processes, programs

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX as it is at the start of a run, with a folder of its own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(programs, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(programs, "LEAST_FREE", 0)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_in_the_users_cache_unless_jax_was_told_where(settings, tmp_path):
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(programs.folder()) and str(tmp_path) in str(programs.folder())
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    programs.keep()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("name, keeps", [("search", True), ("compile", False), ("plan", False)])
def test_programs_for_devices_that_are_not_at_hand_are_not_kept(name, keeps, monkeypatch):
    kept = []
    monkeypatch.setattr(programs, "keep", lambda: kept.append(name))
    monkeypatch.setattr(processes, "start", lambda *arguments: None)
    monkeypatch.setattr(run, "load", lambda name: types.SimpleNamespace(run=lambda output_dir, seed: None))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    run._run(name, False)
    assert bool(kept) == keeps


def kept():
    return {path.name: path.read_bytes() for path in programs.folder().iterdir()}


@jax.jit
def program(x):
    return jnp.sin(x) @ x


def run_anew():
    """The program's result, without what this process remembers of it."""
    jax.clear_caches()
    compilation_cache.reset_cache()
    return float(program(jnp.ones((4, 4)))[0, 0])


def test_a_torn_program_is_compiled_and_written_anew_with_one_note(settings, capsys):
    programs.keep()
    first, whole = run_anew(), kept()
    assert any(name.startswith("jit_program-") for name in whole) and len(whole) > 1
    for name, content in whole.items():
        (programs.folder() / name).write_bytes(content[:50])
    assert run_anew() == first
    assert capsys.readouterr().out.count("compiled programs cannot all be kept there, the run goes on") == 1
    assert kept().keys() == whole.keys() and all(len(content) > 50 for content in kept().values())
    assert run_anew() == first and not capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to_is_one_note(settings, capsys, tmp_path):
    (tmp_path / "indexcache-jax").write_text("a file where the folder should be")
    programs.keep()
    out = capsys.readouterr().out
    assert out.startswith("note: compiled programs are not kept: ") and out.count("\n") == 1 and "Not a directory" in out
    assert jax.config.jax_compilation_cache_dir is None and run_anew() == pytest.approx(4 * 0.8414, abs=1e-3)


def test_others_may_not_write_what_is_run(settings, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    assert "others may write to it" in programs.why_not(tmp_path / "shared")
    assert programs.why_not(tmp_path / "own") is None and (tmp_path / "own").stat().st_mode & 0o777 == 0o700


def test_a_disk_that_is_nearly_full_is_left_alone(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "LEAST_FREE", 2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    assert programs.why_not(tmp_path).endswith("1000 MB of the disk are free, 2000 are needed")


def test_other_warnings_pass(tmp_path):
    passed = []
    shown = programs._Warnings(tmp_path, lambda *about: passed.append(about))
    shown("something else", UserWarning, "file.py", 3)
    assert passed == [("something else", UserWarning, "file.py", 3, None, None)]


SHARING = """
import sys, jax, jax.numpy as jnp
from experiments import run
from experiments.common import processes, programs
programs.LEAST_SECONDS = 0.0
programs.LEAST_FREE = 0
programs.keep()
print([float(jax.jit(lambda x, i=i: jnp.sin(x * i) @ x)(jnp.ones((2, 2)))[0, 0]) for i in range(30)])
"""


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start():
        command = [sys.executable, "-c", SHARING]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    outputs = []
    for count in (3, 1):
        running = [start() for _ in range(count)]
        finished = [process.communicate(timeout=300) for process in running]
        assert [process.returncode for process in running] == [0] * count, finished
        outputs += [out.splitlines() for out, _ in finished]
    assert len({lines[-1] for lines in outputs}) == 1
    assert all(line.startswith("note: ") for lines in outputs for line in lines[:-1])
    assert len(outputs[-1]) == 1  # nothing torn was left
