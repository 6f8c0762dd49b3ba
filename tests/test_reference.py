"""The reference pages: made of docstrings, each of which says what a public name is, its shapes and its errors."""

import importlib
import inspect
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = re.search(r"^REFERENCE := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)[1].replace("\\\n", " ").split()
MODULES = [page for page in PAGES if not page.startswith("'!")]
# What these offer beside runs and losses is inner work of theirs.
INNER = {"indexcache_jax.distill": {"cross_entropy", "map_causal"}, "indexcache_jax.indexer_training": {"optimiser"}}
WITHIN = {"pallas_kernels.hopper", "pallas_kernels.tpu"}  # what kernels share, which is no interface of the package


def public(module):
    """The functions and classes of a module's __all__, or those that it defines and does not hide, by name."""
    names = getattr(module, "__all__", None)
    found = {name: value for name, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)}
    if names is not None:
        return {name: value for name, value in found.items() if name in names}
    return {name: value for name, value in found.items() if name[0] != "_" and value.__module__ == module.__name__}


NAMES = [
    (module, name)
    for module in MODULES
    for name in public(importlib.import_module(module))
    if name not in INNER.get(module, ())
]


def described(module, name):
    value = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(value) if inspect.isroutine(value) else value.__dict__.get("__doc__")
    return value, text or ""


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_a_docstring_says_what_it_is_with_shapes_and_errors(module, name):
    value, text = described(module, name)
    assert text and not text.startswith(f"{name}("), "a sentence, not what dataclasses write"
    if not inspect.isroutine(value):
        return
    function = inspect.unwrap(value)
    types = " ".join(str(annotation) for annotation in function.__annotations__.values())
    if re.search(r"(jax\.Array|np\.ndarray)(?! \| int)\b", types) and "key" not in function.__annotations__:
        assert re.search(r"\[[^]]*[A-Z.]|of any shape", text), "the shapes of its arrays"
    if re.search(r"raise ValueError|arguments\.\w+\(|\bcheck\w*\(", inspect.getsource(function)):
        assert re.search(r"ValueError|[Ee]rrors", text), "the errors that it raises"


def test_every_package_with_public_names_has_a_page():
    """Of what is imported; what an experiment does is said by its --help."""
    for package in ("indexcache_jax", "checkpoints_convert", "pallas_kernels"):
        for path in (ROOT / package).rglob("__init__.py"):
            if "__all__ =" in path.read_text():
                assert ".".join(path.parent.relative_to(ROOT).parts) in {*MODULES, *WITHIN}


def test_the_pages_are_made(tmp_path):
    pdoc = pytest.importorskip("pdoc", reason="the docs extra has it")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*(page.strip("'") for page in PAGES), output_directory=tmp_path)
    for module in MODULES:
        page = (tmp_path / (module.replace(".", "/") + ".html")).read_text()
        for name in public(importlib.import_module(module)):
            assert f'id="{name}"' in page, (module, name)
