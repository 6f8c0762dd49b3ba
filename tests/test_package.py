"""What the installed package says of itself."""

import importlib
import pathlib
import tomllib

import indexcache_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_projects():
    assert indexcache_jax.__version__ == PROJECT["project"]["version"]
    assert f"version: {indexcache_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_package_ships_its_types():
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").is_file()


def test_the_console_script_is_there():
    module, _, function = PROJECT["project"]["scripts"]["indexcache"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
