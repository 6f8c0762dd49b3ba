"""A layer over few rows against the same layer in plain XLA: routes and experts by their references on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import indexer, ops, serving
from indexcache_jax.attention import finish_latent, finish_queries, finish_query_latent
from indexcache_jax.config import Config
from indexcache_jax.positions import make_positions
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import few_rows
from indexcache_jax.serving.cache import LayerCache, append
from indexcache_jax.serving.layer import by_head, layer
from pallas_kernels import hopper

FIELDS = dict(
    hidden_size=256,
    num_attention_heads=3,
    q_lora_rank=128,
    qk_nope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=32,
    num_experts_per_tok=3,
    moe_intermediate_size=128,
    intermediate_size=384,
    index_n_heads=4,
    index_topk=8,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    vocab_size=64,
    eos_token_id=None,
    pad_token_id=None,
)
CONFIG, SCHEDULE, MAX_LEN = Config.from_hf(preset("30b") | FIELDS), Schedule("FS"), 32


def latents_of_rows(product, given):
    """Stands for the kernel."""
    c, ends = CONFIG, [CONFIG.q_lora_rank, CONFIG.q_lora_rank + CONFIG.latent_dim]
    q, kv, index = jnp.split(product, ends, axis=-1)
    latents, keys = finish_latent(kv, None, given.weights["kv_norm"], given.cos_sin, c, jnp.bfloat16), None
    if given.index_keys is not None:
        norm, bias = given.weights["key_norm"], given.weights["key_norm_bias"]
        keys = indexer.finish_keys(index[..., : c.index_head_dim], norm, bias, given.cos_sin, c, jnp.bfloat16)
    cache = append(LayerCache(given.latents, given.index_keys, given.index_scales), latents, keys, given.position)
    q_latents = finish_query_latent(q, None, given.weights["q_norm"], c, jnp.bfloat16)
    return q_latents, cache.latents, cache.index_keys, cache.index_scales


def absorbed_queries(product, k_up, cos_sin):
    """Stands for the kernel."""
    nope, rope = finish_queries(product.reshape(*product.shape[:2], k_up.shape[0], -1), cos_sin, CONFIG)
    return jnp.concatenate([by_head(nope, k_up), rope], axis=-1)


def made(rows, weights="fp8", config=CONFIG):
    given = serving.random_weights(jax.random.key(0), config, weights=weights)
    cache = serving.init_cache(config, SCHEDULE, rows, MAX_LEN, serving.FP8)
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, 1, config.hidden_size)), jnp.bfloat16)
    positions = make_positions(jnp.arange(rows) % 7, jnp.ones(rows, jnp.int32), 1, config)
    return serving.restrict(given, config, SCHEDULE), x, cache, positions


def test_layers_over_few_rows_are_those_in_xla(monkeypatch):
    """A dense F layer, and an S layer of experts."""
    for kernel in (latents_of_rows, absorbed_queries):
        monkeypatch.setattr(ops.decode_layer, kernel.__name__, kernel)
    weights, x, cache, positions = made(5)
    x, indices = np.asarray(x), None
    for p, layer_cache in zip(weights.layers, cache.layers, strict=True):
        given = (p, jnp.asarray(x), indices, layer_cache, positions)
        exact, selected, kept = jax.jit(layer, static_argnames="kv_length")(*given, MAX_LEN, CONFIG)
        ours, chosen, own = few_rows.run_layer(*given, MAX_LEN, CONFIG)
        errors = np.linalg.norm(np.asarray(ours - exact, np.float32), axis=-1) / np.linalg.norm(
            np.asarray(exact, np.float32), axis=-1
        )
        assert errors.max() < 0.01
        for a, b in zip(jax.tree.leaves((own, chosen)), jax.tree.leaves((kept, selected)), strict=True):
            assert (np.asarray(a, np.float32) == np.asarray(b, np.float32)).all()
        x, indices = exact, selected if p.full else indices


def test_it_says_what_it_cannot_serve(monkeypatch):
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    weights, x, cache, positions = jax.eval_shape(lambda: made(4))

    def reason(weights=weights, x=x, cache=cache, config=CONFIG):
        return few_rows.why_not(weights, x, cache, positions, config)

    assert reason() is None
    for rows in (1, 17):
        x_of_rows = jax.ShapeDtypeStruct((rows, 1, CONFIG.hidden_size), jnp.bfloat16)
        assert reason(x=x_of_rows) == f"they take 2 to 16 rows, not {rows}"
    groups = dataclasses.replace(CONFIG, n_group=4, topk_group=2)
    assert reason(config=groups) == "it takes up to 32 groups of experts in multiples of 32, not 4 of 8"
    in_bfloat16 = jax.eval_shape(lambda: made(4, None)[0])
    assert reason(weights=in_bfloat16) == "they read experts in 8 bits, and these are not"
    float32 = jax.eval_shape(lambda: serving.init_cache(CONFIG, SCHEDULE, 4, MAX_LEN, "float32"))
    assert "keeps latents in bfloat16 or float8_e4m3fn" in reason(cache=float32)
