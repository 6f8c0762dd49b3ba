"""The two kernels of a decode step's layer, run on NumPy, against the layer in plain XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.model import place
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from pallas_kernels.decode_layer import mosaic_gpu, mosaic_gpu_parts
from tests.support import ptx_emulator

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

        ptx_emulator.run_grid(monkeypatch, arrays, mosaic_gpu_parts.BLOCKS, mosaic_gpu_parts.THREADS, counted.used, of_block)
        made = {n: jnp.asarray(arrays[n].view(kind).reshape(shape)) for n, (shape, kind) in shapes.items()}
        for n, reference in references.items():
            reference.value = made[n]
        return {n: made[n] for n in outs}

    return launch


@pytest.fixture
def emulated(monkeypatch):
    """With fewer multiprocessors than there are, so that they have more work each."""
    monkeypatch.setattr(mosaic_gpu_parts, "BLOCKS", 17)
    monkeypatch.setattr(mosaic_gpu, "_launch", emulated_launch(monkeypatch))
    for traced in ("_inputs", "_outputs"):
        monkeypatch.setattr(serving, traced, getattr(serving, traced).__wrapped__)
    monkeypatch.setattr(jax, "new_ref", Reference)
    monkeypatch.setattr(jax, "freeze", lambda reference: reference.value)


def random_weights(config):
    """As `serving.random_weights`, with random norms and biases too; NumPy has nothing to compile."""
    random = np.random.default_rng(0)

    def fill(path, like):
        name, shape = path[-1].name, like.shape
        x = random.standard_normal(shape, np.float32)
        if len(shape) == 1:
            x = 0.3 * x + (0 if "bias" in name else 1)
        else:  # [outputs, inputs], or the experts' [E, inputs, ...]
            x *= shape[1 if name == "gate_up" or (len(shape) == 3 and name == "down") else -1] ** -0.5
        return jnp.asarray(x.astype(like.dtype))

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: serving.random_weights(jax.random.key(0), config)))


@functools.cache
def make(experts=True, full=True, index_dtype=ml_dtypes.float8_e4m3fn, **fields):
    config = Config.from_hf(preset("30b") | SMALL | fields)
    config = dataclasses.replace(config, moe_layers=(experts,))
    weights = random_weights(config)
    layer = weights.layers[0]
    schedule = Schedule("F")
    if not full:
        layer = serving.restrict(dataclasses.replace(weights, layers=(layer, layer)), config, Schedule("FS")).layers[1]
    cache = serving.init_cache(config, schedule, 1, MAX_LEN, jnp.bfloat16, index_dtype=index_dtype).layers[0]
    if not full:
        cache = dataclasses.replace(cache, index_keys=None, index_scales=None)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, config.hidden_size)), jnp.bfloat16)
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

    @jax.jit
    def run(layer, cache, x, positions):
        _, _, cache = serving.attention(layer, x, jnp.zeros((1, 1, 4), jnp.int32), cache, positions, MAX_LEN, config)
        return seen, cache

    with monkeypatch.context() as patch:
        patch.setattr(serving, "_select", select)
        patch.setattr(serving.pallas_kernels, "sparse_mla", attend)
        return run(layer, cache, x, positions)


def close(ours, exact, what, *, scale=2.0**-7):
    """Within what a bfloat16 rounding and another order of sums make: a few units of the largest number's last place."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert ours.shape == exact.shape, what
    assert np.abs(ours - exact).max() <= scale * np.abs(exact).max(), what


def positions_at(position, config):
    return place(jnp.array([position]), jnp.array([1]), 1, config)


@pytest.mark.parametrize(
    "full,index_dtype,interleaved,position",
    [
        (False, jnp.bfloat16, True, 0),
        (True, jnp.float8_e4m3fn, True, 5),
        (True, jnp.bfloat16, False, MAX_LEN - 1),
        (True, jnp.float8_e4m3fn, False, MAX_LEN),  # one past the end
    ],
)
def test_attention_inputs(emulated, monkeypatch, full, index_dtype, interleaved, position):
    config, layer, cache, x = make(full=full, index_dtype=index_dtype, indexer_rope_interleave=interleaved)
    assert config.index_rope_interleave == interleaved
    positions = positions_at(position, config)
    exact, new_cache = inputs_in_xla(config, layer, cache, x, positions, monkeypatch)
    given, after = serving._before(layer, cache, positions, config), serving._after(layer)
    ready, _ = mosaic_gpu.attention_inputs(x, given, after, jnp.zeros((1,), jnp.int32))
    compare(ready, exact, new_cache)


def compare(ready, exact, new_cache):
    made = vars(ready)
    eight_bit = new_cache.index_scales is not None
    for name in exact:
        if name == "index_queries" and eight_bit:
            close(made[name], exact[name], name, scale=2.0**-4)  # an 8-bit number's last place
        else:
            close(made[name], exact[name], name)
    for name in ("latents", "index_keys", "index_scales"):
        if getattr(new_cache, name) is not None:
            wide = 2.0**-4 if name == "index_keys" and eight_bit else 2.0**-7
            close(made[name], getattr(new_cache, name), name, scale=wide)


@functools.partial(jax.jit, static_argnums=0)
def outputs_in_xla(config, layer, x, context):
    heads = jnp.einsum("bshc,hvc->bshv", context, layer.v_up)
    middle = x + serving.linear(heads.reshape(1, 1, -1), layer.out)
    return middle, serving.mlp(layer, middle, config)


def run_outputs(config, layer, x, context, following=None, after=None):
    y, ready, _ = mosaic_gpu.layer_outputs(
        x,
        context,
        serving._after(layer),
        jnp.zeros((1,), jnp.int32),
        eps=config.rms_norm_eps,
        chosen=config.num_experts_per_tok,
        normalised=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        following=following,
        after=after,
    )
    return y, ready


def context_of(config):
    return jax.random.normal(jax.random.key(2), (1, 1, config.num_heads, 512), jnp.bfloat16)


@pytest.mark.parametrize(
    "experts,fields",
    [(True, {}), (True, {"n_shared_experts": 0, "norm_topk_prob": False}), (False, {}), (True, {"hidden_size": 384})],
    ids=["experts", "unshared", "dense", "wide"],
)
def test_layer_outputs(emulated, monkeypatch, experts, fields):
    """`wide`: more units of 16 columns than multiprocessors."""
    config, layer, cache, x = make(experts=experts, **fields)
    context = context_of(config)
    middle, exact = outputs_in_xla(config, layer, x, context)
    ours, _ = run_outputs(config, layer, x, context)
    assert float(jnp.abs(exact - middle).max()) > 0.05  # the second half counts
    close(ours, exact, "y")
    close(ours - middle, exact - middle, "of the experts", scale=0.05)


@pytest.mark.parametrize("full", [False, True])
def test_two_layers_in_one_launch(emulated, monkeypatch, full):
    config, layer, _, x = make()
    _, following, cache, _ = make(full=full)
    context, positions = context_of(config), positions_at(3, config)
    given, after = serving._before(following, cache, positions, config), serving._after(following)
    y, ready = run_outputs(config, layer, x, context, given, after)
    close(y, outputs_in_xla(config, layer, x, context)[1], "y")
    compare(ready, *inputs_in_xla(config, following, cache, y, positions, monkeypatch))


def test_experts_of_equal_scores_are_those_that_top_k_takes(emulated, monkeypatch):
    config, layer, cache, x = make()
    router = layer.mlp.router.at[: config.n_routed_experts].set(layer.mlp.router[3])  # all logits equal
    bias = jnp.zeros_like(layer.mlp.router_bias).at[jnp.array([7, 30])].set(0.5)
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, router=router, router_bias=bias))
    middle, exact = outputs_in_xla(config, layer, x, context_of(config))
    ours, _ = run_outputs(config, layer, x, context_of(config))
    close(ours - middle, exact - middle, "of the experts", scale=0.05)


def test_a_decode_step_of_whole_layers(emulated, monkeypatch):
    """All layers through the kernels, dense and experts, F and S: logits and caches of two tokens as in plain XLA."""
    config = Config.from_hf(preset("30b") | SMALL | {"num_hidden_layers": 3})
    config = dataclasses.replace(config, moe_layers=(False, True, True))
    schedule = Schedule("FSF")
    weights = serving.restrict(random_weights(config), config, schedule)
    found = []
    for served in (False, True):
        monkeypatch.setattr(serving.decode_layer, "why_not", lambda *_, served=served: None if served else "not now")
        step = serving.step if served else jax.jit(serving.step)
        cache, logits = serving.init_cache(config, schedule, 1, MAX_LEN, jnp.bfloat16, index_dtype=jnp.float8_e4m3fn), []
        for token in (5, 6):
            out, cache = step(weights, jnp.array([token]), cache, config)
            logits.append(np.asarray(out))
        found.append((np.stack(logits), cache))
    (exact, old), (ours, new) = found
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 0.03 * np.std(exact)
    for a, b in zip(new.layers, old.layers, strict=True):
        close(a.latents, b.latents, "latents", scale=0.05)
    assert (new.lengths == old.lengths).all()
