"""The bytes that are planned for every device are those of the arrays that lie there."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.plan.programs import Model, compiled
from indexcache_jax import memory, serving, sharding
from indexcache_jax.serving import FP8, CacheFormat
from indexcache_jax.serving.weights import abstract, from_params
from tests.support import meshes
from tests.support.tiny_models import CASES

CASE = CASES["glm-mixed"]
CONFIG, SCHEDULE = CASE.config, CASE.schedule


def bytes_of_devices(tree):
    """The bytes of every device's shards, by device."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize("name", meshes.MESHES)
def test_sums_are_the_bytes_of_sharded_arrays(name):
    sizes, rules = meshes.MESHES[name]
    mesh = memory.mesh_of(**sizes)
    with meshes.use(name):
        weights = sharding.put(from_params(CASE.params, CONFIG, SCHEDULE), abstract(CONFIG, SCHEDULE))
        assert bytes_of_devices(weights) == {memory.tree_bytes(abstract(CONFIG, SCHEDULE), jnp.float32, mesh, rules)}
        for rows in (1, 8):
            form = CacheFormat(FP8, jnp.bfloat16)
            cache = serving.init_cache(CONFIG, SCHEDULE, rows, 64, form)
            assert bytes_of_devices(cache) == {memory.cache_bytes(CONFIG, SCHEDULE, rows, 64, form, mesh, rules)}


def test_a_plan_compiles_what_the_sums_say_and_counts_what_is_exchanged():
    rows, length, chunk, context = 2, 64, 32, 4
    mesh, rules = sharding.make_mesh(data=2, context=context), sharding.SERVING
    model = Model(CONFIG, SCHEDULE, rows, length, CacheFormat(), mesh, rules)
    assert list(model.kinds()) == ["F, dense", "F, experts", "S, experts"]
    decode = compiled("decode step", model.decode, 8)
    need = memory.serving_need(
        CONFIG, SCHEDULE, rows=rows, length=length, chunk=chunk, dtype=jnp.bfloat16, form=CacheFormat(), mesh=mesh, rules=rules
    )
    token = 4  # bytes of a row's token
    assert decode.arguments == need.parts["weights"] + need.parts["cache"] + token
    assert decode.collectives["all-reduce"].count + decode.collectives.get("reduce-scatter").count > 0

    layer = compiled("prefill", lambda: model.prefill(0, chunk), 8)
    # The chunk's latents and index keys of a row, each device's own quarter sent to three others. A CPU gathers float32.
    latents = chunk * (CONFIG.latent_dim + CONFIG.index_head_dim) // context * (context - 1)
    positions = 2 * chunk * 4
    assert 2 * latents <= layer.collectives["all-gather"].sent <= 4 * latents + positions
    assert set(layer.collectives) == {"all-gather"}
