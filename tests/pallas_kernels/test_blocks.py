"""Functions over blocks of queries against the same over all queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import block_rows, map_queries, merge, split


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8])
def test_trees_with_an_axis_for_each_array(rows):
    """7 queries, at axis 1 of one array and axis 2 of the others."""
    x, y, z = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 7, 3), (2, 4, 7), (5, 1, 7, 2)]))
    blocks = []

    def function(x, rest):
        blocks.append(x.shape[1])
        return {"sums": jnp.sum(x, axis=-1) + jnp.sum(rest["y"], axis=1), "z": 2 * rest["z"], "nothing": None}

    out = map_queries(function, (x, {"y": y, "z": z}), rows, axes=(1, 2), out_axes={"sums": 1, "z": 2, "nothing": 1})
    assert blocks == [min(rows, 7)]
    np.testing.assert_array_equal(out["z"], 2 * z)
    np.testing.assert_allclose(out["sums"], x.sum(-1) + y.sum(1), rtol=1e-6)


def test_one_axis_for_all():
    x, y = jnp.arange(10.0).reshape(1, 10), jnp.ones((1, 10, 2))
    out = map_queries(lambda x, y: (x[..., None] * y, x), (x, y), 4)
    np.testing.assert_array_equal(out[0][0, :, 1], np.arange(10))
    np.testing.assert_array_equal(out[1], x)


def test_merge_undoes_split():
    x = jnp.arange(24).reshape(2, 3, 4)
    for axis in range(3):
        blocks = split(x, 2, axis, fill=-1)
        assert blocks.shape[0] == -(-x.shape[axis] // 2)
        assert int((blocks == -1).sum()) == (x.shape[axis] % 2) * x.size // x.shape[axis]
        np.testing.assert_array_equal(merge(blocks, x.shape[axis], axis), x)


@pytest.mark.parametrize("queries,budget,rows", [(25, 40, 4), (25, 1000, 25), (25, 1, 1), (25, 130, 13)])
def test_blocks_fit_the_budget_and_are_even(queries, budget, rows):
    assert block_rows(queries, 10, budget) == rows
