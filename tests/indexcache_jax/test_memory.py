"""What a model needs of a device follows from abstract trees; tests/mesh holds the sums against arrays on devices."""

import jax
import jax.numpy as jnp
import pytest

from indexcache_jax import memory, params, serving, tensors, training
from indexcache_jax.config import Config
from indexcache_jax.memory import (
    Need,
    cache_bytes,
    longest,
    mesh_of,
    prefill_temporaries,
    serving_need,
    training_need,
    tree_bytes,
)
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import FP8, CacheFormat
from indexcache_jax.sharding import SERVING, TRAINING
from indexcache_jax.training import Stage
from tests.support.tiny_models import CASES

CASE = CASES["glm-mixed"]
CONFIG, SCHEDULE = CASE.config, CASE.schedule
ONE = mesh_of()


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_of_one_device_are_all_of_them(dtype):
    for abstract in (params.abstract, serving.weights.abstract):
        tree = abstract(CONFIG, SCHEDULE)
        assert tree_bytes(tree, dtype, ONE, SERVING) == nbytes(tensors.shape_structs(tree, dtype))


@pytest.mark.parametrize("form", [CacheFormat(), CacheFormat(FP8, jnp.float32)])
def test_a_cache_of_one_device_is_all_of_it(form):
    cache = jax.eval_shape(lambda: serving.init_cache(CONFIG, SCHEDULE, 3, 64, form))
    assert cache_bytes(CONFIG, SCHEDULE, 3, 64, form, ONE, SERVING) == nbytes(cache)


def test_rows_are_divided_where_they_can_be_and_tokens_by_rule():
    form, lengths = CacheFormat(), 4  # lengths: bytes of a row's int32

    def tokens(rows, mesh, rules):
        return cache_bytes(CONFIG, SCHEDULE, rows, 64, form, mesh, rules)

    whole = tokens(4, ONE, SERVING)
    assert tokens(4, mesh_of(data=4, context=2), SERVING) == whole // 4
    assert tokens(3, mesh_of(data=4, context=2), SERVING) == tokens(3, ONE, SERVING)
    assert tokens(4, mesh_of(context=8), SERVING.split_cache()) == (whole - 4 * lengths) // 8 + 4 * lengths
    with pytest.raises(ValueError, match="cache of 65 tokens: cannot be divided over the 8 devices"):
        cache_bytes(CONFIG, SCHEDULE, 1, 65, form, mesh_of(context=8), SERVING.split_cache())


def test_experts_that_cannot_be_divided_are_named():
    with pytest.raises(ValueError, match="axis expert of size 8 cannot be divided over 16 devices"):
        tree_bytes(serving.weights.abstract(CONFIG, SCHEDULE), jnp.bfloat16, mesh_of(context=16), SERVING)


@pytest.mark.parametrize("kind", ["dense", "warmup", "sparse"])
def test_training_keeps_gradients_and_two_moments_of_what_trains(kind):
    structs = params.shape_structs(CONFIG, SCHEDULE, jnp.float32)
    stage = Stage(kind, kind, 1, 1, 16, 1e-3, 1e-3)
    state = jax.eval_shape(lambda p: training.init_optimiser_state(p, stage, CONFIG, SCHEDULE), structs)
    moments = nbytes([x for x in jax.tree.leaves(state) if x.ndim])
    need = training_need(CONFIG, SCHEDULE, [kind], ONE, TRAINING)
    assert need.parts == {"weights": nbytes(structs), "gradients": moments // 2, "moments": moments}
    assert training_need(CONFIG, SCHEDULE, ["warmup", kind], ONE, TRAINING).parts["moments"] >= moments


@pytest.mark.parametrize("weights", [None, params.FP8_BASE])
def test_indexers_of_streamed_layers_need_two_layers_and_a_group_s_attention(weights):
    asked = {"rows": 1, "length": 64, "dtype": jnp.float32, "weights": weights}
    structs = params.shape_structs(CONFIG, SCHEDULE, jnp.float32, weights=weights)
    need = memory.streamed_indexers_need(CONFIG, SCHEDULE, group=3, keeps_targets=True, **asked)
    attention = (nbytes(structs.attention) + nbytes(structs.input_norm)) // CONFIG.num_layers
    experts = nbytes(structs.moe) // len(CONFIG.expert_layers)
    indexer = nbytes(params.shape_structs(CONFIG, SCHEDULE, jnp.float32).indexer) // SCHEDULE.num_full
    norm = nbytes(structs.mlp_norm) // CONFIG.num_layers
    assert need.parts["layers"] == 2 * (attention + norm + indexer + experts)  # an F layer with experts is the largest
    assert need.parts["group"] == 3 * attention + 4 * indexer


def test_a_step_of_many_rows_or_layers_needs_more():
    def temporaries(**changes):
        asked = {"group": 4, "rows": 1, "length": 32768, "dtype": jnp.bfloat16, "keeps_targets": False}
        config = Config.from_hf(preset("glm-5"))
        need = memory.streamed_indexers_need(config, Schedule.all_full(config.num_layers), **asked | changes)
        return need.parts["temporaries"]

    assert temporaries(rows=16) > temporaries(rows=8) > temporaries() and temporaries(rows=8) > temporaries(rows=8, group=2)
    assert temporaries(rows=16, keeps_targets=True) > temporaries(rows=16)  # each with its targets
    assert temporaries(length=65536) > temporaries()


def test_temporaries_grow_with_a_devices_own_tokens():
    config, schedule = Config.from_hf(preset("glm-5.2")), Schedule.from_hf(preset("glm-5.2"))

    def temporaries(mesh, rules=SERVING, rows=4, chunk=8192):
        return prefill_temporaries(config, schedule, rows, chunk, 65536, jnp.bfloat16, mesh, rules)

    whole = SERVING.whole_experts()
    assert temporaries(ONE) == temporaries(ONE, whole)
    assert temporaries(ONE) > temporaries(ONE, chunk=4096) > temporaries(mesh_of(context=4), whole, chunk=4096)
    # Devices that share the experts gather each other's tokens.
    assert temporaries(mesh_of(context=4)) > temporaries(mesh_of(context=4), whole)


def test_a_need_is_the_sum_of_its_parts():
    need = serving_need(
        CONFIG, SCHEDULE, rows=2, length=64, chunk=128, dtype=jnp.float32, form=CacheFormat(), mesh=ONE, rules=SERVING
    )
    assert list(need.parts) == ["weights", "cache", "temporaries"] and need.total == sum(need.parts.values())
    assert Need({}).total == 0


@pytest.mark.parametrize("most", [0, 63, 64, 1000, 1024, 4096])
def test_the_longest_length_that_fits(most):
    assert longest(lambda length: length <= 1000, 64, most) == min(most // 64 * 64, 960)
    assert longest(lambda length: False, 64, most) == 0


def test_cpus_share_the_hosts_memory():
    assert memory.available() * jax.local_device_count() > 2**28
