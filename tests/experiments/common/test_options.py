"""The flags of all experiments together: each is defined once, and read only where it is declared."""

import ast
import collections
import importlib
import pathlib

import pytest
from absl import flags

from experiments.common.options import EXPERIMENTS

ROOT = pathlib.Path(__file__).parents[3]
SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "experiments").rglob("*.py"))}
OPTIONS = ROOT / "experiments" / "common" / "options.py"


def defined(tree):
    """The names of the flags that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_"):
            yield ast.literal_eval(node.args[0])


@pytest.fixture(scope="module")
def declared():
    """The flags of every experiment. All are imported into one process, where absl refuses a flag that is defined twice."""
    importlib.import_module("experiments.run")
    modules = {name: importlib.import_module(module) for name, module in EXPERIMENTS.items()}
    assert all(callable(module.run) for module in modules.values())
    return {name: {f.name for f in flags.FLAGS.get_key_flags_for_module(module)} for name, module in EXPERIMENTS.items()}


def test_no_two_modules_define_the_same_flag():
    where = collections.defaultdict(list)
    for path, tree in SOURCES.items():
        for name in defined(tree):
            where[name].append(path.relative_to(ROOT).as_posix())
    assert len(where) > 50
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_every_experiment_declares_flags_that_exist(declared):
    for names in declared.values():
        assert names and all(name in flags.FLAGS for name in names)


def test_a_flag_is_shared_if_and_only_if_several_experiments_read_it(declared):
    shared = set(defined(SOURCES[OPTIONS]))
    readers = collections.Counter(name for names in declared.values() for name in names)
    assert {name for name in shared if readers[name] < 2} == set()
    assert {name for name, count in readers.items() if count > 1} <= shared


def test_no_module_reads_flags_that_another_one_happens_to_define():
    """A flag is read through what defines it; by its name only where options.py checks those it is given."""
    for path, tree in SOURCES.items():
        reads = [
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "flags.FLAGS"
        ]
        assert set(reads) <= {"get_key_flags_for_module", "flags_by_module_dict"}, path


def test_no_experiment_is_a_library_for_another():
    """The parts of an experiment that is a package may import each other."""
    for path, tree in SOURCES.items():
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("experiments"):
                imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                for module in EXPERIMENTS.values():
                    if not here.startswith(module):
                        assert not any(name == module or name.startswith(f"{module}.") for name in imported), path


def test_the_declared_flags_are_those_that_are_read(declared):
    """Every shared flag that a module reads as options.NAME, its experiment declares."""
    for path, tree in SOURCES.items():
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name, module in EXPERIMENTS.items():
            if here != module:
                continue
            read = {
                node.value.attr.lower()
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and node.attr in ("value", "name")
                and isinstance(node.value, ast.Attribute)
                and ast.unparse(node.value.value) == "options"
            }
            assert read <= declared[name], name
