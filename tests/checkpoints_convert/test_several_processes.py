"""Arrays that are spread over the devices of two processes are saved as those of one are."""

import jax
import numpy as np
import pytest

from checkpoints_convert import load
from tests.checkpoints_convert import processes
from tests.support.tiny_models import CASES

MIXED = CASES["glm-mixed"]

PROGRAM = r"""
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
from checkpoints_convert import load, save
from indexcache_jax import sharding

source, out = sys.argv[3:]
for form, rules in (("params", sharding.TRAINING), ("serving", sharding.SERVING)):
    with sharding.use(sharding.make_mesh(data=4, tensor=2), rules):
        config, schedule, weights = load(source, form=form)
        for format in ("safetensors", "orbax"):
            save(f"{out}/{form} {format}", weights, config, schedule, format=format)
whole = jax.sharding.NamedSharding(sharding.make_mesh(data=8), jax.sharding.PartitionSpec())
save(f"{out}/whole", load(source, shardings=whole)[2], config, schedule)
try:
    save(source, weights, config, schedule)
except ValueError as error:
    print(f"0: {error}")
except RuntimeError as error:
    print(f"1: {error}")
"""


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, processes.run_two(PROGRAM, str(source), str(folder))


@pytest.mark.parametrize("name", ["params safetensors", "params orbax", "serving safetensors", "serving orbax", "whole"])
def test_one_process_writes_what_all_hold(saved, name):
    config, schedule, params = load(saved[0] / name)
    assert (config, schedule) == (MIXED.config, MIXED.schedule)
    jax.tree.map(np.testing.assert_array_equal, params, MIXED.params)


def test_where_the_first_process_fails_the_others_do_not_wait(saved, source):
    first, second = saved[1]
    assert first.splitlines()[-1] == f"0: {source}: exists and is not an empty directory"
    assert second.splitlines()[-1] == "1: save: process 0 could not write the checkpoint; its error says why"
