"""A search by two processes of four devices each finds what it finds on one device, in memory and streamed."""

import pickle

import pytest

from checkpoints_convert import save
from indexcache_jax import search
from tests.checkpoints_convert import processes
from tests.mesh import test_search as cases

PROGRAM = r"""
import pickle, sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
jax.config.update("jax_default_matmul_precision", "highest")
import checkpoints_convert
from indexcache_jax import search, sharding
from tests.mesh.test_search import SCHEDULES, assert_same, batches, resident

directory, (expected, weights, overlap) = sys.argv[3], pickle.load(open(sys.argv[4], "rb"))
rows = int(sys.argv[5])
MESHES = ({"data": 2, "context": 2, "tensor": 2}, sharding.SERVING), ({"data": 8}, sharding.SERVING.whole_experts())
for mesh, rules in MESHES:
    with sharding.use(sharding.make_mesh(**mesh), rules):
        config, schedule, params = checkpoints_convert.load(directory)
        assert search.fingerprint(params, []) == weights
        np.testing.assert_array_equal(search.layer_overlap(params, config, schedule, batches(rows)), overlap)
        queries = search.overlap.spread(batches(rows)[0].shape[1] - 1, config.index_topk)
        layers = checkpoints_convert.Layers(directory)
        streamed = search.StreamedEvaluator(layers, batches(rows))
        selections = streamed.selections(schedule, [0], queries)
        np.testing.assert_array_equal(search.overlap.mean_overlap(selections, config.index_topk), overlap)
        for evaluator in (resident(layers, params, batches(rows)), streamed):
            assert_same((search.greedy_search(evaluator, schedule, num_full=3), evaluator.losses(SCHEDULES)), expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 3])
def test_two_processes(rows, tmp_path):
    case = cases.CASES["glm"]
    save(tmp_path / "saved", case.params, case.config, case.schedule)
    steps, losses = cases.expected("glm", rows)
    overlap = search.layer_overlap(case.params, case.config, case.schedule, cases.batches(rows))
    expected = (steps[:3], losses), search.fingerprint(case.params, []), overlap
    (tmp_path / "expected").write_bytes(pickle.dumps(expected))
    processes.run_two(PROGRAM, str(tmp_path / "saved"), str(tmp_path / "expected"), str(rows))
