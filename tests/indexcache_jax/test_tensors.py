"""Windows: any part of a tensor is filled from the rows of its stored tensors that it needs, and from no others."""

import itertools

import numpy as np
import pytest

from indexcache_jax import params, serving
from indexcache_jax.tensors import Source, leaves, whole
from tests.support.tiny_models import CASES

CASE = CASES["glm-unusual"]
STATE = CASE.state  # made anew at every access
TREES = {"params": params.abstract, "serving": serving.weights.abstract}


def filled(tensor, layer, part):
    """A part of one layer of a tensor from the case's stored tensors, in slabs of one entry, and the rows that were read."""
    shape = [len(range(*axis.indices(size))) for axis, size in zip(part, tensor.layer_shape, strict=True)]
    out, read = np.full(shape, np.nan, np.float32), 0
    for source in tensor.stored(layer):
        window = source.window(tensor.layer_shape, part)
        if window is None:
            continue
        unit = source.shape[0] // source.view[0]
        for start in range(*window.rows):
            source.fill(out, window, start, STATE[source.name][start * unit : (start + 1) * unit])
            read += 1
    return out, read


@pytest.mark.parametrize("form", TREES)
def test_every_part_is_that_part_of_the_whole(form):
    random = np.random.default_rng(0)
    for path, tensor in leaves(TREES[form](CASE.config, CASE.schedule)):
        layer = tensor.every_layer[-1]
        expected, _ = filled(tensor, layer, whole(tensor.layer_shape))
        assert not np.isnan(expected).any(), path
        for _ in range(3):
            ends = [np.sort(random.choice(size + 1, 2, replace=False)) for size in tensor.layer_shape]
            part = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(filled(tensor, layer, part)[0], expected[part], err_msg=path)


def test_only_the_rows_of_a_part_are_read():
    tensor = serving.weights.abstract(CASE.config, CASE.schedule).layers[0].down
    every = filled(tensor, 0, whole(tensor.layer_shape))[1]
    halves = [slice(0, 7), slice(7, tensor.shape[0])]
    assert [filled(tensor, 0, (half, slice(None)))[1] for half in halves] == [7, every - 7]


@pytest.mark.parametrize(
    ("part", "rows"), [((slice(0, 1), slice(None)), None), ((slice(2, 3), slice(1, 3)), (1, 3)), (whole((4, 5)), (0, 5))]
)
def test_a_window_is_what_source_and_part_have_in_common(part, rows):
    source = Source("x", (5,), (5,), (0,), at=(2,))  # row 2 of [4, 5]
    window = source.window((4, 5), part)
    assert (window and window.rows) == rows


def test_stored_tensors_of_several_leaves_are_covered_once():
    """k_up and v_up together read every number of kv_b_proj, whichever tree they are in."""
    for abstract in TREES.values():
        tree = dict(leaves(abstract(CASE.config, CASE.schedule)))
        parts = [t for path, t in tree.items() if path.split(".")[-1] in ("k_up", "v_up") and 1 in t.every_layer]
        sizes = [np.prod(t.layer_shape) for t in parts]
        name = parts[0].stored(1)[0].name
        assert sum(sizes) == STATE[name].size
        found = itertools.chain(*(filled(t, 1, whole(t.layer_shape))[0].ravel() for t in parts))
        assert sorted(found) == sorted(STATE[name].ravel())
