"""Two processes of four devices each: either reads what its own devices hold, once, and the arrays are those of one process.

The mesh is data=2, context=2, tensor=2 under the rules of inference. So every process holds half of the experts and all
else, of which heads are split within the process and so are read as two parts.
"""

import os
import socket
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import convert, orbax_io
from tests.checkpoints_convert import files
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]

PROGRAM = r"""
import math, pathlib, sys
import jax, numpy as np
process = int(sys.argv[1])
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, process)
import tensorstore
from checkpoints_convert import load
from checkpoints_convert.checkpoint import FORMS
from checkpoints_convert.safetensors_io import Entry
from indexcache_jax import sharding
from indexcache_jax.tensors import leaves

read, read_into = {"weights": 0, "scales": 0}, Entry.read_into
def counted(entry, runs):
    def each():
        for start, out in runs:
            read["scales" if entry.name.endswith("_scale_inv") else "weights"] += out.nbytes
            yield start, out
    read_into(entry, each())
Entry.read_into = counted
# Of the files of leaves; what tensorstore has read by now is its metric, and it reads metadata too, which is small.
def read_by_tensorstore():
    return tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]

def parts_of(tensor, where):
    # The different parts that this process has to read.
    of_devices = where.addressable_devices_indices_map(tensor.shape).values()
    return {tuple(axis.indices(size)[:2] for axis, size in zip(index, tensor.shape)) for index in of_devices}

def size(part):
    return math.prod(stop - start for start, stop in part)

def in_chunks(files, path, parts):
    # The bytes of the chunks that the parts have something of, for each part.
    chunk = next(files.glob(f"{path}/.zarray"))
    chunk = __import__("json").loads(chunk.read_text())["chunks"]
    total = 0
    for part in parts:
        for file in (files / path).iterdir():
            if file.name != ".zarray":
                at = [int(i) for i in file.name.split(".")]
                if all(a < (i + 1) * c and i * c < b for i, c, (a, b) in zip(at, chunk, part, strict=True)):
                    total += file.stat().st_size
    return total

mesh = sharding.make_mesh(data=2, context=2, tensor=2)
assert mesh.devices[process].ravel().tolist() == jax.local_devices()
whole = {form: load(sys.argv[3], form=form)[2] for form in FORMS}
for directory in map(pathlib.Path, sys.argv[3:]):
    is_orbax = (directory / "params").exists()
    for form, abstract in FORMS.items():
        read.update(weights=0, scales=0)
        before = read_by_tensorstore()
        with sharding.use(mesh):
            config, schedule, found = load(directory, form=form)
        assert all(not leaf.is_fully_addressable for leaf in jax.tree.leaves(found))
        jax.tree.map(lambda a, b: [np.testing.assert_array_equal(s.data, b[s.index]) for s in a.addressable_shards],
                     found, load(directory, form=form)[2])
        where = sharding.shardings(abstract(config, schedule), mesh, sharding.SERVING)
        parts = {path: (tensor, parts_of(tensor, s))
                 for (path, tensor), s in zip(leaves(abstract(config, schedule)), jax.tree.leaves(where), strict=True)}
        print(form, directory.name, read, read_by_tensorstore() - before)
jax.distributed.shutdown()
"""
