"""The two kernels of a decode step's layer, run on NumPy, against the layer in plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from indexcache_jax import serving
from indexcache_jax.config import Config, preset
from indexcache_jax.model import place
from indexcache_jax.schedule import Schedule
from pallas_kernels.decode_layer import mosaic_gpu, mosaic_gpu_parts
from tests.pallas_kernels import ptx_emulator

SMALL = dict(
    hidden_size=256,
    num_attention_heads=3,
    q_lora_rank=96,
    qk_nope_head_dim=64,
    v_head_dim=160,
    n_routed_experts=32,
    num_experts_per_tok=3,
    moe_intermediate_size=256,
    intermediate_size=320,
    index_n_heads=20,
    index_topk=64,
    num_hidden_layers=1,
    vocab_size=64,
    eos_token_id=None,
    pad_token_id=None,
)
MAX_LEN = 8


@dataclasses.dataclass
class Reference:
    """Stands for `jax.new_ref`."""

    value: jax.Array


def emulated_launch(monkeypatch):
    """Stands for `_launch`: the same arguments, NumPy arrays in place of references."""

    def words(x):
        return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.int32).copy()

    def launch(name, stages, operands, outs):
        counted = mosaic_gpu_parts.Shared()
        stages({}, None, counted)
        references = {n: x for n, x in operands.items() if isinstance(x, Reference)}
        operands = operands | {n: x.value for n, x in references.items()}
        shapes = {n: (x.shape, np.dtype(x.dtype)) for n, x in (operands | outs).items()}
        arrays = {n: words(x) for n, x in operands.items()}
        for n, out in outs.items():
            size = -(-int(np.prod(out.shape)) * np.dtype(out.dtype).itemsize // 4)
            arrays[n] = np.full(size, 0x7FC07FC0, np.int32)  # NaN until written

        def of_block(addresses, block, shared):
            return stages(addresses, mosaic_gpu_parts.Place.here(block), mosaic_gpu_parts.Shared(shared))

        ptx_emulator.run_grid(
            monkeypatch, arrays, mosaic_gpu_parts.BLOCKS, mosaic_gpu_parts.THREADS, counted.used, of_block
        )
        made = {n: jnp.asarray(arrays[n].view(kind).reshape(shape)) for n, (shape, kind) in shapes.items()}
        for n, reference in references.items():
            reference.value = made[n]
        return {n: made[n] for n in outs}

    return launch


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_launch", emulated_launch(monkeypatch))
    monkeypatch.setattr(jax, "new_ref", Reference)
    monkeypatch.setattr(jax, "freeze", lambda reference: reference.value)


def make(experts=True, full=True, index_dtype=ml_dtypes.float8_e4m3fn, **fields):
    config = Config.from_hf(preset("30b") | SMALL | fields)
    config = dataclasses.replace(config, moe_layers=(experts,))
    weights = serving.random_weights(jax.random.key(0), config)
    noisy = jax.tree.map(lambda w: w + (0.3 * jax.random.normal(jax.random.key(w.size), w.shape)).astype(w.dtype), weights)
    layer = dataclasses.replace(
        weights.layers[0],
        **{n: getattr(noisy.layers[0], n) for n in ("norm", "q_norm", "kv_norm", "key_norm", "key_norm_bias", "mlp_norm")},
    )
    schedule = Schedule("F")
    if not full:
        layer = serving.restrict(dataclasses.replace(weights, layers=(layer, layer)), config, Schedule("FS")).layers[1]
    cache = serving.init_cache(config, schedule, 1, MAX_LEN, jnp.bfloat16, index_dtype=index_dtype).layers[0]
    if not full:
        cache = dataclasses.replace(cache, index_keys=None, index_scales=None)
    x = jax.random.normal(jax.random.key(1), (1, 1, config.hidden_size), jnp.bfloat16)
    return config, layer, cache, x


def inputs_in_xla(config, layer, cache, x, positions, monkeypatch):
    """What the layer in XLA hands to the selection and to the attention, and its cache."""
    seen = {}

    def select(queries, weights, cache, *_):
        seen["index_queries"], seen["index_weights"] = queries, weights
        if cache.index_scales is not None:
            queries, scales = serving.index_fp8.quantise(queries)
            seen["index_queries"], seen["index_weights"] = queries, weights * scales
        return jnp.zeros((1, 1, 4), jnp.int32)

    def attend(queries, latents, indices, *, value_dim, **_):
        seen["queries"] = queries
        return jnp.zeros((*queries.shape[:-1], value_dim), queries.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(serving, "_select", select)
        patch.setattr(serving.pallas_kernels, "sparse_mla", attend)
        _, _, cache = serving.attention(layer, x, jnp.zeros((1, 1, 4), jnp.int32), cache, positions, MAX_LEN, config)
    return seen, cache


def close(ours, exact, what, *, scale=2.0**-7):
    """Within what a bfloat16 rounding and another order of sums make: a few units of the largest number's last place."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert ours.shape == exact.shape, what
    assert np.abs(ours - exact).max() <= scale * np.abs(exact).max(), what


def positions_at(position, config):
    return place(jnp.array([position]), jnp.array([1]), 1, config)


@pytest.mark.parametrize("position", [0, 5, MAX_LEN - 1])
@pytest.mark.parametrize(
    "full,index_dtype,interleaved",
    [(False, jnp.bfloat16, True), (True, jnp.float8_e4m3fn, True), (True, jnp.bfloat16, False), (True, jnp.float8_e4m3fn, False)],
)
def test_attention_inputs(emulated, monkeypatch, full, index_dtype, interleaved, position):
    config, layer, cache, x = make(full=full, index_dtype=index_dtype, indexer_rope_interleave=interleaved)
    assert config.index_rope_interleave == interleaved
    positions = positions_at(position, config)
    exact, new_cache = inputs_in_xla(config, layer, cache, x, positions, monkeypatch)
    made = mosaic_gpu.attention_inputs(
        x,
        serving._dense_parts(layer)[0],
        cache.latents,
        cache.index_keys,
        cache.index_scales,
        positions.queries,
        positions.angles,
        jnp.zeros((1,), jnp.int32),
        eps=config.rms_norm_eps,
        latent_eps=config.latent_norm_eps,
        index_scale=config.index_n_heads**-0.5 * config.index_head_dim**-0.5,
        index_interleaved=interleaved,
    )
    for name in exact:
        if name == "index_queries" and index_dtype == jnp.float8_e4m3fn:
            close(made[name], exact[name], name, scale=2.0**-4)  # an 8-bit number's last place
        else:
            close(made[name], exact[name], name)
    for name in ("latents", "index_keys", "index_scales"):
        if getattr(new_cache, name) is not None:
            wide = 2.0**-4 if name == "index_keys" else 2.0**-7
            close(made[name], getattr(new_cache, name), name, scale=wide)


@pytest.mark.parametrize("experts,shared", [(True, 1), (True, 0), (False, 1)])
def test_layer_outputs(emulated, monkeypatch, experts, shared):
    config, layer, cache, x = make(experts=experts, n_shared_experts=shared)
    context = jax.random.normal(jax.random.key(2), (1, 1, config.num_heads, 512), jnp.bfloat16)
    heads = jnp.einsum("bshc,hvc->bshv", context, layer.v_up)
    middle = x + serving.linear(heads.reshape(1, 1, -1), layer.out)
    exact = serving.mlp(layer, middle, config)
    options = dict(chosen=config.num_experts_per_tok, normalised=config.norm_topk_prob, scale=config.routed_scaling_factor)
    ours, _ = mosaic_gpu.layer_outputs(
        x,
        context,
        serving._dense_parts(layer)[1],
        jnp.zeros((1,), jnp.int32),
        eps=config.rms_norm_eps,
        **(options if experts else {}),
    )
    assert float(jnp.abs(exact - middle).max()) > 0.05  # the second half counts
    close(ours, exact, "y")
    close(ours - middle, exact - middle, "of the experts", scale=0.05)
