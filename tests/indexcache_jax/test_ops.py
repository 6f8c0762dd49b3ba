"""ops.py is the only door from the model to the kernels: no other module of the package reaches into pallas_kernels."""

import ast
import pathlib

import indexcache_jax

ROOT = pathlib.Path(indexcache_jax.__file__).parent
# Blocks of queries, the layout of a selection and numbers in 8 bits are no kernels.
ALLOWED = {"pallas_kernels.blocks", "pallas_kernels.bits", "pallas_kernels.quant"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{alias.name}" if node.module == "pallas_kernels" else node.module for alias in node.names
            )


def test_no_other_module_imports_a_kernel():
    found = {
        path.relative_to(ROOT).as_posix(): sorted(
            {name for name in imports(path) if name.startswith("pallas_kernels")} - ALLOWED
        )
        for path in ROOT.rglob("*.py")
    }
    assert found.pop("ops.py"), "ops.py is the door"
    assert {path: names for path, names in found.items() if names} == {}
