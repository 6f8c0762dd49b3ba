"""The two kernels of a decode step's layer, run on NumPy, against the layer in plain XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from indexcache_jax import ops, serving
from indexcache_jax.config import Config
from indexcache_jax.positions import make_positions
from indexcache_jax.presets import preset
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, fused
from indexcache_jax.serving import layer as layers
from pallas_kernels import hopper, quant
from pallas_kernels.decode_layer import api, mosaic_gpu, mosaic_gpu_stages
from pallas_kernels.hopper import persistent, ptx
from tests.support.emulated import lockstep
from tests.support.serving_cases import in_codes

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
CODES = dict(q_lora_rank=384, v_head_dim=128)  # all rows of codes are whole blocks of 128
MAX_LEN = 8


@dataclasses.dataclass
class Reference:
    """Stands for `jax.new_ref`."""

    value: jax.Array


def emulated_kernel_call(monkeypatch):
    """Stands for `call_kernel`: the same arguments, NumPy arrays in place of references."""

    def words(x):
        return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.int32).copy()

    def call_kernel(name, stages, operands, outs):
        counted = persistent.SharedMemory()
        stages({}, None, counted)
        references = {n: x for n, x in operands.items() if isinstance(x, Reference)}
        operands = operands | {n: x.value for n, x in references.items()}
        shapes = {n: (x.shape, np.dtype(x.dtype)) for n, x in (operands | outs).items()}
        arrays = {n: words(x) for n, x in operands.items()}
        for n, out in outs.items():
            size = -(-int(np.prod(out.shape)) * np.dtype(out.dtype).itemsize // 4)
            arrays[n] = np.full(size, 0x7FC07FC0, np.int32)  # NaN until written

        def of_block(addresses, block, shared):
            return stages(addresses, persistent.Thread.current(block), persistent.SharedMemory(shared))

        lockstep.run_grid(monkeypatch, arrays, persistent.BLOCKS, persistent.THREADS, counted.used, of_block)
        made = {n: jnp.asarray(arrays[n].view(kind).reshape(shape)) for n, (shape, kind) in shapes.items()}
        for n, reference in references.items():
            reference.value = made[n]
        return {n: made[n] for n in outs}

    return call_kernel


@pytest.fixture
def emulated(monkeypatch):
    """With fewer SMs than there are, so that they have more work each."""
    monkeypatch.setattr(persistent, "BLOCKS", 17)
    monkeypatch.setattr(mosaic_gpu, "call_kernel", emulated_kernel_call(monkeypatch))
    for traced in ("_first_queries", "_outputs"):
        monkeypatch.setattr(fused, traced, getattr(fused, traced).__wrapped__)
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
def make(experts=True, full=True, index_dtype=ml_dtypes.float8_e4m3fn, latent_dtype=jnp.bfloat16, **fields):
    config = Config.from_hf(preset("30b") | SMALL | fields)
    config = dataclasses.replace(config, moe_layers=(experts,))
    weights = random_weights(config)
    layer = weights.layers[0]
    schedule = Schedule("F")
    if not full:
        two = dataclasses.replace(config, num_layers=2, moe_layers=(experts,) * 2)
        layer = serving.restrict(dataclasses.replace(weights, layers=(layer, layer)), two, Schedule("FS")).layers[1]
    cache = serving.init_cache(config, schedule, 1, MAX_LEN, CacheFormat(latent_dtype, index_dtype)).layers[0]
    if not full:
        cache = dataclasses.replace(cache, index_keys=None, index_scales=None)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, config.hidden_size)), jnp.bfloat16)
    return config, layer, cache, x


@functools.partial(jax.jit, static_argnums=0)
def inputs_in_xla(config, layer, cache, x, positions):
    """What the layer in XLA hands to the selection and to the attention, and its cache."""
    seen = {}

    def select(queries, keys, head_weights, *_):
        seen["index_queries"], seen["index_weights"] = queries, head_weights
        return jnp.zeros((1, 1, 4), jnp.int32)

    def attend(queries, latents, indices, config, *_):
        seen["queries"] = queries
        return jnp.zeros((*queries.shape[:-1], config.kv_lora_rank), queries.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "select", select)
        patch.setattr(ops, "attend", attend)
        _, _, cache = layers.attention(layer, x, jnp.zeros((1, 1, 4), jnp.int32), cache, positions, MAX_LEN, config)
    return seen, cache


def close(ours, exact, what, *, scale=2.0**-7):
    """Within what a bfloat16 rounding and another order of sums make: a few units of the largest number's last place."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert ours.shape == exact.shape, what
    assert np.abs(ours - exact).max() <= scale * np.abs(exact).max(), what


def positions_at(position, config):
    return make_positions(jnp.array([position]), jnp.array([1]), 1, config)


@pytest.mark.parametrize(
    "full,index_dtype,interleaved,position",
    [
        (False, jnp.bfloat16, True, 0),
        (True, jnp.float8_e4m3fn, True, 5),
        (True, jnp.bfloat16, False, MAX_LEN - 1),
        (True, jnp.float8_e4m3fn, False, MAX_LEN),  # one past the end
    ],
)
def test_attention_inputs(emulated, full, index_dtype, interleaved, position):
    config, layer, cache, x = make(full=full, index_dtype=index_dtype, indexer_rope_interleave=interleaved)
    assert config.index_rope_interleave == interleaved
    positions = positions_at(position, config)
    exact, new_cache = inputs_in_xla(config, layer, cache, x, positions)
    given, after = fused.attention_weights(layer, cache, positions, config), fused.output_weights(layer)
    ready, _ = mosaic_gpu.attention_inputs(x, given, after, jnp.zeros((1,), jnp.int32))
    compare(ready, exact, new_cache)


def latents_in_both_formats(position=5, full=False, norm=None):
    """The operands with latents in bfloat16 and in 8 bits; `norm` replaces the weights of the latents' norm."""
    made = []
    for latent_dtype in (jnp.bfloat16, ml_dtypes.float8_e4m3fn):
        config, layer, cache, x = make(full=full, latent_dtype=latent_dtype)
        layer = layer if norm is None else layer.replace(kv_norm=jnp.full_like(layer.kv_norm, norm))
        weights = fused.attention_weights(layer, cache, positions_at(position, config), config)
        made.append(mosaic_gpu.attention_inputs(x, weights, fused.output_weights(layer), jnp.zeros((1,), jnp.int32))[0])
    return made


def assert_quantised(in_codes, in_bfloat16, position):
    exact = jax.jit(quant.quantise_latents, static_argnums=1)(in_bfloat16.latents[0, position], 512)
    for name, array in vars(exact).items():
        ours = np.asarray(getattr(in_codes.latents, name)[0, position], np.float32)
        assert np.array_equal(ours, np.asarray(array, np.float32), equal_nan=True), name


@pytest.mark.parametrize("full,position", [(False, 0), (True, 5), (True, MAX_LEN)])
def test_latents_in_8_bits_are_the_quantised_ones_in_bfloat16_bit_for_bit(emulated, full, position):
    in_bfloat16, in_codes = latents_in_both_formats(position, full)
    last = min(position, MAX_LEN - 1)
    assert_quantised(in_codes, in_bfloat16, last)
    others = [np.delete(np.asarray(x[0], np.float32), last, 0) for x in jax.tree.leaves(in_codes.latents)]
    assert not any(x.any() for x in others)  # as the cache was
    assert (np.asarray(in_codes.queries) == np.asarray(in_bfloat16.queries)).all()


@pytest.mark.parametrize("norm", [0.0, 1e-6, 1e37, np.nan])
def test_latents_of_extreme_numbers_are_quantised_alike(emulated, norm):
    in_bfloat16, in_codes = latents_in_both_formats(norm=norm)
    assert_quantised(in_codes, in_bfloat16, 5)


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
    middle = x + layers.linear(heads.reshape(1, 1, -1), layer.out)
    return middle, layers.mlp(layer, middle, config)


def run_outputs(config, layer, x, context, following=None, after=None):
    y, ready, _ = mosaic_gpu.layer_outputs(
        x,
        context,
        fused.output_weights(layer),
        jnp.zeros((1,), jnp.int32),
        eps=config.rms_norm_eps,
        choice=fused.choice(layer, config),
        next_layer=following,
        next_outputs=after,
    )
    return y, ready


def context_of(config):
    return jax.random.normal(jax.random.key(2), (1, 1, config.num_heads, 512), jnp.bfloat16)


@pytest.mark.parametrize(
    "experts,fields",
    [
        (True, {"n_routed_experts": 64, "n_group": 2, "topk_group": 1}),
        (True, {"n_shared_experts": 0, "norm_topk_prob": False}),
        (False, {}),
        (True, {"hidden_size": 384}),
    ],
    ids=["groups", "unshared", "dense", "wide"],
)
def test_layer_outputs(emulated, experts, fields):
    """`groups`: of experts; `wide`: more units of 16 columns than SMs."""
    config, layer, cache, x = make(experts=experts, **fields)
    context = context_of(config)
    middle, exact = outputs_in_xla(config, layer, x, context)
    ours, _ = run_outputs(config, layer, x, context)
    assert float(jnp.abs(exact - middle).max()) > 0.05  # the second half counts
    close(ours, exact, "y")
    close(ours - middle, exact - middle, "of the experts", scale=0.05)


@pytest.mark.parametrize("full", [False, True])
def test_attention_inputs_from_codes_are_those_from_the_same_numbers(emulated, full):
    config, layer, cache, x = make(full=full, **CODES)
    layer, decoded = in_codes(layer)
    positions = positions_at(5, config)
    exact, new_cache = inputs_in_xla(config, decoded, cache, x, positions)
    given, after = fused.attention_weights(layer, cache, positions, config), fused.output_weights(layer)
    ready, _ = mosaic_gpu.attention_inputs(x, given, after, jnp.zeros((1,), jnp.int32))
    compare(ready, exact, new_cache)


@pytest.mark.parametrize(
    "experts,fields",
    [(True, {}), (True, {"n_shared_experts": 0}), (False, {"intermediate_size": 384}), (True, {"hidden_size": 640})],
    ids=["experts", "unshared", "dense", "wide"],
)
def test_layer_outputs_from_codes_are_those_from_the_same_numbers(emulated, experts, fields):
    """`wide`: several tiles of 16 rows for every SM. The kernels round the same numbers, so only orders of sums differ."""
    config, layer, cache, x = make(experts=experts, **CODES, **fields)
    layer, decoded = in_codes(layer)
    middle, _ = outputs_in_xla(config, decoded, x, context_of(config))
    exact, _ = run_outputs(config, decoded, x, context_of(config))
    ours, _ = run_outputs(config, layer, x, context_of(config))
    assert float(jnp.abs(exact - middle).max()) > 0.05  # the second half counts
    close(ours, exact, "y", scale=2.0**-8)
    assert (ours != exact).mean() < 0.05


def test_a_layer_of_codes_before_one_of_bfloat16(emulated):
    config, layer, cache, x = make(**CODES)
    scaled, decoded = in_codes(layer)
    positions, context = positions_at(3, config), context_of(config)
    for first, second in ((scaled, decoded), (decoded, scaled)):
        given, after = fused.attention_weights(second, cache, positions, config), fused.output_weights(second)
        y, ready = run_outputs(config, first, x, context, given, after)
        close(y, outputs_in_xla(config, decoded, x, context)[1], "y")
        compare(ready, *inputs_in_xla(config, decoded, cache, y, positions))


class ProductOfCodes(mosaic_gpu_stages.Stage):
    """Rows of a matrix of codes times a bfloat16 vector -> out."""

    def __init__(self, shared, rows, width):
        self.rows, self.width = rows, width
        self.product = mosaic_gpu_stages.MatrixProduct(shared, width, persistent.largest_block_share(rows), codes=True)

    def prepare(self):
        a, thread = self.a, self.thread
        self.product.take_rows(thread, a["codes"], a["scales"], *persistent.block_share(thread, self.rows))
        self.prefetches = [lambda: self.product.prefetch(thread)]

    def begin(self):
        self.product.begin()

    def run(self):
        sink = self.product.sink(self.thread)
        for i, exists in persistent.indices_of_thread(self.thread, self.width // 2):
            sink(i, ptx.load_global(ptx.offset(self.a["vector"], i, 4)), exists)
        self.product.finish(mosaic_gpu_stages.float32_sink(self.a["out"]))


def codes_times_vector(monkeypatch, matrix, vector):
    """The product of a `Scaled` [N, K] and a bfloat16 vector [K] by three thread blocks: [N] float32."""
    rows, width = matrix.shape
    monkeypatch.setattr(persistent, "BLOCKS", 3)
    sizes, out = persistent.SharedMemory(), np.zeros(rows, np.int32)
    ProductOfCodes(sizes, rows, width)
    arrays = {name: np.asarray(x).view(np.int32).reshape(-1).copy() for name, x in vars(matrix).items()}
    arrays |= {"vector": np.asarray(vector).view(np.int32), "out": out}

    def of_block(a, block, shared):
        thread, memory = persistent.Thread.current(block), persistent.SharedMemory(shared)
        return [ProductOfCodes(memory, rows, width).bound(a, thread)]

    lockstep.run_grid(monkeypatch, arrays, 3, persistent.THREADS, sizes.used, of_block)
    return out.view(np.float32)


@pytest.mark.parametrize("rows,width", [(3, 128), (129, 384), (310, 128), (67, 2176), (900, 256)])
@pytest.mark.parametrize("values", ["ordinary", "wide"])
def test_codes_times_a_vector_are_the_product_of_the_decoded_numbers(monkeypatch, rows, width, values):
    """Rows of a last block that is not whole, too. `wide`: codes of all values, scales and numbers of very different sizes."""
    random = np.random.default_rng(rows + width)
    if values == "ordinary":
        matrix = quant.quantise_matrix(jnp.asarray(random.standard_normal((rows, width)), jnp.float32))
        vector = jnp.asarray(random.standard_normal(width), jnp.bfloat16)
    else:
        codes = (
            random.integers(0, 127, (rows, width)).astype(np.uint8) | random.integers(0, 2, (rows, width)).astype(np.uint8) << 7
        )
        scales = 10.0 ** random.uniform(-30, 3, (-(-rows // 128), width // 128))
        matrix = quant.Scaled(codes.view(ml_dtypes.float8_e4m3fn), jnp.asarray(scales, jnp.float32))
        vector = jnp.asarray(random.standard_normal(width) * 10.0 ** random.uniform(-4, 6, width), jnp.bfloat16)
    ours = codes_times_vector(monkeypatch, matrix, vector)
    decoded, numbers = np.asarray(quant.dequantise(matrix, jnp.float32), np.float64), np.asarray(vector, np.float64)
    assert (np.abs(ours - decoded @ numbers) <= 1e-5 * (np.abs(decoded) @ np.abs(numbers))).all()


@pytest.mark.parametrize("scale", [1e-30, 1e3])
@pytest.mark.parametrize("value", [1e4, 1e-6])
def test_extreme_codes_and_scales_keep_the_products_of_small_numbers(monkeypatch, scale, value):
    matrix = quant.Scaled(jnp.full((8, 256), 448, jnp.float8_e4m3fn), jnp.full((1, 2), scale, jnp.float32))
    ours = codes_times_vector(monkeypatch, matrix, jnp.full(256, value, jnp.bfloat16))
    np.testing.assert_allclose(ours, 256 * 448 * np.float32(scale) * float(jnp.bfloat16(value)), rtol=1e-5)


def test_numbers_that_are_not_finite_make_a_product_of_codes_not_finite(monkeypatch):
    matrix = quant.quantise_matrix(jnp.ones((8, 256)))
    for value in (np.nan, np.inf):
        assert not np.isfinite(codes_times_vector(monkeypatch, matrix, jnp.ones(256, jnp.bfloat16).at[3].set(value))).any()
    codes = matrix.codes.at[5, 200].set(np.nan)
    ours = codes_times_vector(monkeypatch, dataclasses.replace(matrix, codes=codes), jnp.ones(256, jnp.bfloat16))
    assert np.isnan(ours[5]) and np.isfinite(np.delete(ours, 5)).all()


@pytest.mark.parametrize("full", [False, True])
def test_two_layers_in_one_kernel(emulated, full):
    config, layer, _, x = make()
    _, following, cache, _ = make(full=full)
    context, positions = context_of(config), positions_at(3, config)
    given, after = fused.attention_weights(following, cache, positions, config), fused.output_weights(following)
    y, ready = run_outputs(config, layer, x, context, given, after)
    close(y, outputs_in_xla(config, layer, x, context)[1], "y")
    compare(ready, *inputs_in_xla(config, following, cache, y, positions))


def test_experts_of_equal_scores_are_those_that_top_k_takes(emulated):
    config, layer, cache, x = make()
    router = jnp.broadcast_to(layer.mlp.router[3], layer.mlp.router.shape)  # all logits equal
    bias = jnp.zeros_like(layer.mlp.router_bias).at[jnp.array([7, 30])].set(0.5)
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, router=router, router_bias=bias))
    middle, exact = outputs_in_xla(config, layer, x, context_of(config))
    ours, _ = run_outputs(config, layer, x, context_of(config))
    close(ours - middle, exact - middle, "of the experts", scale=0.05)


def test_a_decode_step_of_whole_layers(emulated, monkeypatch):
    """All layers through the kernels, dense and experts, F and S: logits and caches of two tokens as in plain XLA.

    The caches are in 8 bits, which may take the neighbouring code.
    """
    config = Config.from_hf(preset("30b") | SMALL | {"num_hidden_layers": 3})
    config = dataclasses.replace(config, moe_layers=(False, True, True))
    schedule = Schedule("FSF")
    weights = serving.restrict(random_weights(config), config, schedule)
    found = []
    for served in (False, True):
        monkeypatch.setattr(fused, "why_not", lambda *_, served=served: None if served else "not now")
        step = serving.step if served else jax.jit(serving.step)
        cache, logits = serving.init_cache(config, schedule, 1, MAX_LEN, serving.FP8), []
        for token in (5, 6):
            out, cache = step(weights, jnp.array([token]), cache, config)
            logits.append(np.asarray(out))
        found.append((np.stack(logits), cache))
    (exact, old), (ours, new) = found
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 0.03 * np.std(exact)
    for a, b in zip(new.layers, old.layers, strict=True):
        close(*(quant.dequantise_latents(x.latents, jnp.float32) for x in (a, b)), "latents", scale=0.07)
    assert (new.lengths == old.lengths).all()


def why_not(layer, cache, x, config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "why_not", lambda: None)
        given = fused.attention_weights(layer, cache, positions_at(0, config), config)
        return api.why_not(x, given, fused.output_weights(layer), fused.choice(layer, config))


def test_matrices_in_8_bits_are_served_where_their_scales_are_of_whole_blocks(monkeypatch):
    config, in_bfloat16, cache, x = make(**CODES)
    layer, _ = jax.eval_shape(in_codes, in_bfloat16)
    replaced = functools.partial(dataclasses.replace, layer)

    def codes(rows, columns, scale_rows):
        shape = jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn)
        return quant.Scaled(shape, jax.ShapeDtypeStruct((scale_rows, -(-columns // 128)), jnp.float32))

    by_row, ragged, down = codes(256, 384, 256), codes(256, 480, 2), codes(*layer.down.shape, -(-layer.down.shape[0] // 128))
    cases = {
        None: layer,
        "it takes a scale for every 128 x 128 codes, out has one for every row": replaced(out=by_row),
        "it takes whole blocks of 128 x 128 codes, out is (256, 480)": replaced(out=ragged),
        "it takes down in bfloat16, not in 8 bits": replaced(down=down),
        "it takes up, index_up all in 8 bits or none, in 8 bits are up": replaced(index_up=in_bfloat16.index_up),
    }
    for reason, tree in cases.items():
        assert why_not(tree, cache, x, config, monkeypatch) == reason
