"""Where the weights and the cache of released models lie on meshes, as text: `python -m tests.support.golden_shardings`.

The command writes tests/indexcache_jax/golden_shardings/MODEL.txt anew; a change of placement is the difference.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from indexcache_jax import params, serving, sharding
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.tensors import leaves

FOLDER = pathlib.Path(__file__).parents[1] / "indexcache_jax" / "golden_shardings"
MODELS = ("glm-5", "glm-5.2", "deepseek-v3.2", "30b")
# (data, context, tensor): a node of 8 devices, two of them, and the slices 4x4x4 and 4x4x8 of v5p.
MESHES = ((1, 8, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (4, 4, 1), (4, 4, 4), (4, 4, 8), (8, 8, 2))
RULES = {"SERVING": sharding.SERVING, "TRAINING": sharding.TRAINING}
ROWS, TOKENS = 8, 131072  # of the cache
HEADER = """\
# Where the leaves of {model} lie on meshes (data, context, tensor). Written by python -m tests.support.golden_shardings.
# After a mesh: the millions of numbers that each of its devices holds, of those of the tree.
# A leaf: how many there are, path (* is any layer), shape with the mesh axes that split each axis.
"""


def text(model: str) -> str:
    """The shardings of a model by rules, tree and mesh; meshes on which they are the same are listed together."""
    fields = preset(model)
    config, schedule = Config.from_hf(fields), Schedule.from_hf(fields)
    trees = {
        "params": params.abstract(config, schedule),
        "serving weights": serving.weights.abstract(config, schedule),
        f"cache of {ROWS} rows, {TOKENS} tokens, float8_e4m3fn": serving.cache.abstract(
            config, schedule, ROWS, TOKENS, jnp.float8_e4m3fn
        ),
    }
    lines = [HEADER.format(model=model)]
    for rules_name, rules in RULES.items():
        for tree_name, tree in trees.items():
            meshes = collections.defaultdict(list)
            for sizes in MESHES:
                placed, note = _placed(tree, AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3), rules)
                meshes[placed].append(f"on {sizes} {note}".rstrip())
            for placed, alike in meshes.items():
                lines += [f"{rules_name}, {tree_name}", *alike, placed, ""]
    return "\n".join(lines)


def _placed(tree: Any, mesh: AbstractMesh, rules: sharding.Rules) -> tuple[str, str]:
    """(lines of the leaves, numbers of a device) of a tree on a mesh; (the error, nothing) where it cannot lie there."""
    try:
        shardings = sharding.shardings(tree, mesh, rules)
    except ValueError as error:
        return str(error), ""
    counts: dict[str, int] = {}
    on_device = total = 0
    for (path, tensor), (_, where) in zip(leaves(tree), leaves(shardings), strict=True):
        on_device += math.prod(where.shard_shape(tensor.shape))
        total += math.prod(tensor.shape)
        axes = (
            str(size) + "".join(f"/{name}" for name in sharding.names_of(entry))
            for size, entry in zip(tensor.shape, where.spec, strict=True)
        )
        line = f"{re.sub(r'layers[.][0-9]+', 'layers.*', path)} [{', '.join(axes)}]"
        counts[line] = counts.get(line, 0) + 1
    return "\n".join(f"{count} {line}" for line, count in counts.items()), f"{on_device / 1e6:.0f} of {total / 1e6:.0f}"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for model in MODELS:
        (FOLDER / f"{model}.txt").write_text(text(model), encoding="utf-8")


if __name__ == "__main__":
    main()
