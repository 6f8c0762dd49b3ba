"""What the installed package says of itself."""

import ast
import importlib
import pathlib
import re
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


def test_what_only_tests_import_is_no_dependency():
    """A checkpoint is read and written by our own code: safetensors, the package, is what tests hold it against."""
    needed = {re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["dependencies"]}
    imported = set()
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                imported |= {name.partition(".")[0] for name in names}
    modules = {name: {"absl-py": "absl", "orbax-checkpoint": "orbax"}.get(name, name) for name in needed}
    assert {name for name, module in modules.items() if module not in imported} == set()
    assert not {"safetensors", "torch", "transformers"} & imported


def test_the_console_script_is_there():
    module, _, function = PROJECT["project"]["scripts"]["indexcache"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
