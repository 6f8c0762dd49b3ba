"""A token each of few rows on a mesh of eight devices: layers through the kernels' references against the layers in XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import ops, sharding
from indexcache_jax.config import Config
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import few_rows
from indexcache_jax.serving.layer import layer
from indexcache_jax.serving.weights import abstract
from pallas_kernels import hopper
from tests.indexcache_jax.serving.test_few_rows import FIELDS, MAX_LEN, absorbed_queries, latents_of_rows, made
from tests.support import meshes

CONFIG = Config.from_hf(preset("30b") | FIELDS | {"num_attention_heads": 4})
SCHEDULE = Schedule("FS")


def decided(weights):
    """With experts of three devices chosen by the bias, since a random router has near-ties. The last layer has experts."""
    *before, last = weights.layers
    experts = last.mlp.replace(router_bias=last.mlp.router_bias.at[jnp.array([5, 17, 30])].set(4.0))
    return weights.replace(layers=(*before, last.replace(mlp=experts)))


@pytest.mark.parametrize("mesh, rows", [("expert", 16), ("all", 6), ("all", 1)])
def test_layers_over_few_rows_are_those_in_xla(monkeypatch, mesh, rows):
    """A dense F layer, and an S layer of experts."""
    weights, x, cache, positions = made(rows, config=CONFIG)
    weights = decided(weights)
    x, indices = np.asarray(x), None
    with meshes.use(mesh), monkeypatch.context() as patch:
        on_mesh = sharding.put(weights, abstract(CONFIG, SCHEDULE, weights="fp8"))
        patch.setattr(hopper, "why_not", lambda: None)
        assert few_rows.why_not(on_mesh, jnp.asarray(x), cache, positions, CONFIG) is None
    for kernel in (latents_of_rows, absorbed_queries):
        monkeypatch.setattr(ops.decode_layer, kernel.__name__, kernel)
    for one, split, layer_cache in zip(weights.layers, on_mesh.layers, cache.layers, strict=True):
        given = (jnp.asarray(x), indices, layer_cache, positions)
        exact, selected, kept = jax.jit(layer, static_argnames="kv_length")(one, *given, MAX_LEN, CONFIG)
        with meshes.use(mesh):
            ours, chosen, own = few_rows.run_layer(split, *given, MAX_LEN, CONFIG)
        ours, exact = (np.asarray(array, np.float32) for array in (ours, exact))
        errors = np.linalg.norm(ours - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        assert errors.max() < 0.01
        for a, b in zip(jax.tree.leaves((own, chosen)), jax.tree.leaves((kept, selected)), strict=True):
            assert (np.asarray(a, np.float32) == np.asarray(b, np.float32)).all()
        x, indices = exact.astype(jnp.bfloat16), selected if one.full else indices


def test_a_cache_that_devices_split_is_not_served(monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    weights, x, cache, positions = jax.eval_shape(lambda: made(4, config=CONFIG))
    with meshes.use("split cache"):
        assert "split the tokens" in few_rows.why_not(weights, x, cache, positions, CONFIG)
