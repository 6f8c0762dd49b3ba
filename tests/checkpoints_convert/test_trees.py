"""Leaves of one form give any part of the leaves of the other, and no more of them is read than the part holds."""

import jax
import numpy as np
import pytest

from checkpoints_convert.checkpoint import FORMS
from checkpoints_convert.save import ArraysCheckpoint
from indexcache_jax import serving
from indexcache_jax.tensors import leaves, whole
from tests.support.tiny_models import CASES

CASE = CASES["glm-unusual"]  # with biases


class Counting(ArraysCheckpoint):
    """Counts the numbers that are read."""

    count = 0

    def read(self, leaf, part, out):
        self.count += out.size
        super().read(leaf, part, out)


@pytest.fixture(scope="module")
def arrays():
    params = jax.device_get(CASE.params)
    return {"params": params, "serving": jax.device_get(serving.weights.from_params(params, CASE.config, CASE.schedule))}


@pytest.fixture(params=["params", "serving"])
def wanted(request, arrays):
    """(source of the other form, [(path, tensor, layer, the layer's array)])."""
    other = "serving" if request.param == "params" else "params"
    found = []
    tree = FORMS[request.param](CASE.config, CASE.schedule)
    for (path, tensor), (_, array) in zip(leaves(tree), leaves(arrays[request.param]), strict=True):
        for slot, layer in enumerate(tensor.every_layer):
            found.append((path, tensor, layer, array[slot] if tensor.stacked else array))
    return Counting(arrays[other], CASE.config, CASE.schedule), found


def filled(source, tensor, layer, part):
    shape = [len(range(*axis.indices(size))) for axis, size in zip(part, tensor.layer_shape, strict=True)]
    out = np.full(shape, np.nan, np.float32)
    source.fill(tensor, layer, out, part)
    return out


def test_any_part_is_that_of_the_other_form(wanted):
    source, tensors = wanted
    random = np.random.default_rng(0)
    for path, tensor, layer, array in tensors:
        for _ in range(3):  # most of them cut through heads
            ends = [np.sort(random.choice(size + 1, 2, replace=False)) for size in tensor.layer_shape]
            part = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(filled(source, tensor, layer, part), array[part], err_msg=path)


def test_a_part_of_whole_heads_costs_what_it_holds(wanted):
    source, tensors = wanted
    for path, tensor, layer, array in tensors:
        parts = [whole(tensor.layer_shape)]
        for axis, (name, size) in enumerate(zip(tensor.axes[tensor.stacked :], tensor.layer_shape, strict=True)):
            if name in ("heads", "index_heads", "expert", "mlp", "embed"):
                parts.append((*whole(tensor.layer_shape[:axis]), slice(size // 2), *whole(tensor.layer_shape[axis + 1 :])))
        for part in parts:
            source.count = 0
            np.testing.assert_array_equal(filled(source, tensor, layer, part), array[part], err_msg=path)
            assert source.count == array[part].size, (path, part)
