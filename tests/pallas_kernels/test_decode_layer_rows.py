"""What stands between the projections down and up of few rows: the kernel for Hopper, run on NumPy, against plain XLA."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from indexcache_jax import indexer
from indexcache_jax.attention import finish_latent, finish_query_latent
from indexcache_jax.config import Config
from indexcache_jax.positions import make_positions
from indexcache_jax.presets import preset
from indexcache_jax.rope import rotate
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, fused, init_cache
from indexcache_jax.serving.cache import append
from indexcache_jax.serving.weights import abstract
from pallas_kernels.decode_layer import arrays, mosaic_gpu_rows
from pallas_kernels.hopper import persistent
from tests.support.emulated import lockstep

CONFIG = Config.from_hf(preset("30b") | {"num_hidden_layers": 1, "q_lora_rank": 96, "index_n_heads": 4, "hidden_size": 64})
MAX_LEN = 6


def emulated(monkeypatch, product, layer):
    """What `latents_of_rows` returns."""
    monkeypatch.setattr(jax, "new_ref", lambda x: x)
    p, given = mosaic_gpu_rows.sizes(product, layer), mosaic_gpu_rows.operands(product, layer)
    rows = product.shape[0]
    given = given | {"q_latents": np.full((rows, 1, p.q_rank), np.nan, ml_dtypes.bfloat16)}
    words = {n: np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.int32).copy() for n, x in given.items()}
    counted = persistent.SharedMemory()
    mosaic_gpu_rows.Row(p, counted)

    def stages(a, block, shared):
        thread = persistent.Thread.current(block)
        row = mosaic_gpu_rows.Row(p, persistent.SharedMemory(shared))
        run = functools.partial(row.run, mosaic_gpu_rows.RowArrays.of(p, a, block), thread)
        return [types.SimpleNamespace(begin=lambda: None, prefetches=(), run=run)]

    lockstep.run_grid(monkeypatch, words, rows, persistent.THREADS, counted.used, stages)
    made = {n: jnp.asarray(words[n].view(x.dtype).reshape(x.shape)) for n, x in given.items()}
    caches = {n: made[n] for n in layer.caches()}
    return made["q_latents"], arrays.latents_of(caches), caches.get("index_keys"), caches.get("index_scales")


def made(full, form, positions):
    """A layer, an empty cache and projections down of rows at these positions."""
    schedule, random, rows = Schedule("F"), np.random.default_rng(0), len(positions)
    layer = abstract(CONFIG, schedule).layers[0]
    fields = {name: getattr(layer, name) for name in ("norm", "q_norm", "kv_norm", "key_norm", "key_norm_bias")}
    fields = {n: jnp.asarray(1 + 0.3 * random.standard_normal(t.shape), jnp.bfloat16) for n, t in fields.items()}
    cache = init_cache(CONFIG, schedule, rows, MAX_LEN, form).layers[0]
    if not full:
        cache = cache.replace(index_keys=None, index_scales=None)
    width = CONFIG.q_lora_rank + CONFIG.latent_dim + full * (CONFIG.index_head_dim + CONFIG.index_n_heads)
    product = jnp.asarray(random.standard_normal((rows, 1, width)) * 3.0 ** random.integers(-3, 3, (rows, 1, 1)), jnp.float32)
    at = make_positions(jnp.asarray(positions), jnp.ones(rows, jnp.int32), 1, CONFIG)
    return layer.replace(**fields, index_up=layer.index_up if full else None), cache, product, at


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_rows_are_cached_as_layer_by_layer(monkeypatch, full, kind):
    """Rows at different positions, one of them past the end, whose token is dropped."""
    layer, cache, product, positions = made(full, CacheFormat.of(kind), [0, 3, MAX_LEN - 1, MAX_LEN, 2])
    ours = emulated(monkeypatch, product, fused.attention_weights(layer, cache, positions, CONFIG))

    @jax.jit
    def in_xla(product, cache):
        c = CONFIG
        q, kv, index = jnp.split(product, [c.q_lora_rank, c.q_lora_rank + c.latent_dim], axis=-1)
        latents = finish_latent(kv, None, layer.kv_norm, positions.cos_sin, c, jnp.bfloat16)
        keys = index[..., : c.index_head_dim]
        if full:
            keys = indexer.finish_keys(keys, layer.key_norm, layer.key_norm_bias, positions.cos_sin, c, jnp.bfloat16)
        cache = append(cache, latents, keys if full else None, positions.queries)
        return finish_query_latent(q, None, layer.q_norm, c, jnp.bfloat16), cache

    q_latents, cache = in_xla(product, cache)
    exact = (q_latents, cache.latents, cache.index_keys, cache.index_scales)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        places = 2.0**-3 if kind == jnp.float8_e4m3fn else 2.0**-6
        assert np.isfinite(a).all() and (np.abs(a - b) <= places * np.abs(b) + 2.0**-9 * np.abs(b).max()).all()
        assert ((a != 0) == (b != 0)).mean() > 0.99


@pytest.mark.parametrize("rows", [1, 5, 16, 19])
def test_queries_are_absorbed_and_rotated_as_in_xla(monkeypatch, rows):
    random, heads, nope = np.random.default_rng(rows), 3, 64
    product = jnp.asarray(random.standard_normal((rows, 1, heads * (nope + 64))), jnp.bfloat16)
    k_up = jnp.asarray(random.standard_normal((heads, 512, nope)) * nope**-0.5, jnp.bfloat16)
    cos, sin = make_positions(jnp.arange(rows), jnp.ones(rows, jnp.int32), 1, CONFIG).cos_sin
    out = np.full((rows, 1, heads, 576), np.nan, ml_dtypes.bfloat16)
    given = {"product": product, "k_up": k_up, "cos": cos, "sin": sin, "queries": out}
    words = {n: np.asarray(x).reshape(-1).view(np.int32).copy() for n, x in given.items()}
    p = mosaic_gpu_rows.Absorption(rows, heads, nope)

    def stages(a, block, shared):
        run = mosaic_gpu_rows.Absorb(p, mosaic_gpu_rows.AbsorptionArrays(**a), persistent.Thread.current(block)).run
        return [types.SimpleNamespace(begin=lambda: None, prefetches=(), run=run)]

    blocks = heads * mosaic_gpu_rows.ABSORB_BLOCKS
    lockstep.run_grid(monkeypatch, words, blocks, mosaic_gpu_rows.ABSORB_THREADS, 4, stages)
    ours = words["queries"].view(ml_dtypes.bfloat16).reshape(out.shape)
    parts = product.reshape(rows, 1, heads, -1)
    exact = jnp.einsum("bshn,hcn->bshc", parts[..., :nope], k_up, preferred_element_type=jnp.float32)
    exact = jnp.concatenate([exact, rotate(parts[..., nope:].astype(jnp.float32), cos, sin, interleaved=True)], axis=-1)
    np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=2.0**-8, atol=1e-5)
