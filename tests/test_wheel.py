"""The built wheel, installed into an empty folder, works from any other: its console script and the small model are in it."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import indexcache_jax
from experiments.common.options import EXPERIMENTS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the built wheel alone is installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    isolated = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    build = [*pip, "wheel", "--no-deps", "--no-input", *isolated, f"--wheel-dir={folder}", str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, cwd=folder)
    if built.returncode and not isolated and "hatchling" in built.stderr:
        pytest.skip(f"hatchling is not installed and cannot be had: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", f"--target={target}", str(wheel)], check=True, cwd=folder)
    return target


@pytest.mark.slow
def test_the_installed_wheel_works_from_any_folder(installed, tmp_path):
    """Its console script and the small model are there; nothing comes from this checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    script = str(installed / "bin" / "indexcache")
    overview = run(script, "--help")
    assert overview.returncode == 0 and overview.stdout.startswith("usage: indexcache [VERB]"), overview.stderr
    assert all(f"  {verb} " in overview.stdout for verb in (*EXPERIMENTS, "convert"))
    assert run(script, "--version").stdout == f"indexcache-jax {indexcache_jax.__version__}\n"

    doctor = run(script, "doctor", "--preset=demo")
    assert doctor.returncode == 0, doctor.stderr
    assert f"indexcache-jax {indexcache_jax.__version__} in {installed}\n" in doctor.stdout
    assert "demo: 12 layers, 7.5 million weights" in doctor.stdout and "Traceback" not in doctor.stderr

    dry = run(script, "search", "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert f"{installed}/experiments/assets/demo: 12 layers, 12 indexers" in dry.stdout

    converted = run(script, "convert", f"{installed}/experiments/assets/demo", "demo-orbax")
    assert converted.returncode == 0, converted.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["demo-orbax"]
