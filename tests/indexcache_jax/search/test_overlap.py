"""Overlap of selections against sets in Python."""

import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import model
from indexcache_jax.schedule import Schedule
from indexcache_jax.search.overlap import intersection_sizes, layer_overlap, mean_overlap
from tests.support.tiny_models import RECORDED


def test_intersections_count_common_positions_and_no_padding():
    rows = [[[0, 3, 5, 9], [1, 2, -1, -1]], [[3, 4, 5, 6], [2, -1, -1, -1]], [[9, 10, 11, 12], [0, 1, 2, 3]]]  # [N, Q, k]
    expected = [[len(({*a[q]} & {*b[q]}) - {-1}) for a in rows for b in rows] for q in range(2)]
    np.testing.assert_array_equal(intersection_sizes(jnp.array(rows)).reshape(2, 9), expected)


def test_the_mean_is_over_the_queries_of_all_batches():
    alike, others = np.array([[[0, 1]], [[0, 1]]]), np.array([[[0, 1]] * 3, [[2, 3]] * 3])  # [N, Q, k]
    np.testing.assert_allclose(mean_overlap([alike, others], 2), [[1, 0.25], [0.25, 1]])


def test_overlap_of_a_model():
    case = RECORDED["glm-mixed"]
    tokens = np.concatenate([case.tokens, case.tokens[:, :1]], axis=1)
    found = layer_overlap(case.params, case.config, case.schedule, [tokens[:1], tokens[1:]], queries=1000)
    indices = np.asarray(model.selections(case.params, jnp.asarray(case.tokens), case.config, case.schedule))  # [F, B, S, k]
    k = case.config.index_topk
    late = indices[:, :, k:].reshape(len(indices), -1, k)
    expected = [[np.mean([len({*x} & {*y}) / k for x, y in zip(a, b, strict=True)]) for b in late] for a in late]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert case.schedule == Schedule("FFSFS") and found.shape == (3, 3)


def test_rows_without_a_choice_are_refused():
    case = RECORDED["glm-mixed"]
    with pytest.raises(ValueError, match="rows of 8 tokens: no query sees more than index_topk = 8"):
        layer_overlap(case.params, case.config, case.schedule, [np.zeros((1, 9), np.int32)])
