"""The TPU kernel interpreted, held against NumPy by the properties of every implementation and against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import indexer_topk, quant, tpu
from pallas_kernels.indexer_topk import mosaic_tpu
from pallas_kernels.tpu import sets
from tests.support import indexer_topk_properties as properties
from tests.support.tpu_interpreter import interpreted

SHAPES = [((2, 5, 4, 16, 50), 8), ((1, 3, 32, 128, 1300), 64), ((3, 1, 1, 1, 7), 20)]


def some_fast(values, fast):
    """All of `values`, those not in `fast` marked slow: the interpreter takes seconds for each."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if value in fast else pytest.mark.slow)
        for value in values
    ]


@pytest.mark.parametrize("number_format", some_fast(["bfloat16", "float32", "int8"], ["bfloat16", "int8"]))
@pytest.mark.parametrize("shape, k", some_fast(SHAPES, SHAPES[:2]))
def test_integers(number_format, shape, k):
    with interpreted():
        properties.check_integers("mosaic_tpu", number_format, shape=shape, k=k)


@pytest.mark.parametrize("name", some_fast(properties.PATTERNS, ["best first and last"]))
def test_patterns(name):
    with interpreted():
        for k in (1, 64, 1000):
            properties.check_pattern("mosaic_tpu", "bfloat16", name, k)


@pytest.mark.slow
def test_patterns_in_int8():
    with interpreted():
        for name in ("rising", "two values", "best first and last"):
            properties.check_pattern("mosaic_tpu", "int8", name, 64)


@pytest.mark.parametrize("number_format", some_fast(["bfloat16", "float32"], ["bfloat16"]))
@pytest.mark.parametrize("name", some_fast(properties.PROPERTIES, ["a NaN query takes the first keys"]))
def test_properties(name, number_format):
    with interpreted():
        properties.PROPERTIES[name]("mosaic_tpu", number_format)


@pytest.mark.slow
def test_infinite_scores():
    with interpreted():
        properties.check_infinite_scores("mosaic_tpu")


@pytest.mark.parametrize("rows", some_fast([8, 24], []))
def test_blocks_of_queries_change_nothing(rows):
    """Integers, so that the reference's sums are the same; blocks that see nothing, little and everything; a ragged end."""
    rng = np.random.default_rng(1)
    b, s, heads, t = 2, 61, 9, 2100
    queries, keys = (jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16) for shape in ((b, s, heads, 64), (b, t, 64)))
    weights = jnp.asarray(rng.integers(-3, 4, (b, s, heads)), jnp.float32)
    positions = jnp.asarray(np.where(np.arange(s) < 30, -1, 40 * np.arange(s)) + np.zeros((b, 1)), jnp.int32)
    options = dict(k_select=90, q_positions=positions, kv_lengths=jnp.asarray([t, 1500]))
    with interpreted():
        out = mosaic_tpu.indexer_topk(queries, keys, weights, **options, rows=rows)
    np.testing.assert_array_equal(out, indexer_topk(queries, keys, weights, **options, implementation="xla"))


@pytest.mark.slow
def test_a_long_context():
    """More rows of bits than a register has lanes."""
    rng = np.random.default_rng(2)
    t = 140_000
    keys = jnp.asarray(rng.integers(-8, 9, (1, t, 8)), jnp.bfloat16)
    queries, weights = jnp.ones((1, 1, 1, 8), jnp.bfloat16), jnp.ones((1, 1, 1))
    options = dict(k_select=300, q_positions=jnp.full((1, 1), t - 1), kv_lengths=jnp.full((1,), t))
    with interpreted(detect_races=False):
        out = mosaic_tpu.indexer_topk(queries, keys, weights, **options)
    np.testing.assert_array_equal(out, indexer_topk(queries, keys, weights, **options, implementation="xla"))


def test_what_it_cannot_serve():
    def why_not(t=1000, kind=jnp.bfloat16, k=10, s=2, **options):
        arrays = (jax.ShapeDtypeStruct(shape, kind) for shape in ((1, s, 4, 128), (1, t, 128), (1, s, 4)))
        options |= {"q_positions": jnp.zeros((1, s)), "kv_lengths": jnp.zeros((1,))}
        return mosaic_tpu.why_not(*arrays, k_select=k, **options)

    assert "needs a TPU" in why_not() or jax.default_backend() == "tpu"
    with interpreted():
        assert why_not() is None
        assert "float8_e4m3fn" in why_not(kind=jnp.float8_e4m3fn)
        assert "VMEM of a v5e" in why_not(t=4_000_000)
        assert "32768" in why_not(k=40_000)
        assert "nothing" in why_not(t=0)
        assert why_not(t=200_000, s=8, return_scores=True) is None and why_not(t=200_000, s=4096) is None
        assert "all scores" in why_not(t=200_000, s=4096, return_scores=True)


@pytest.mark.parametrize("chip", tpu.CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("heads, keys, at_least", [(32, 131_072, 32), (32, 204_800, 32), (64, 204_800, 24), (64, 500_000, 8)])
def test_rows_fit_the_chips(chip, heads, keys, at_least):
    rows = mosaic_tpu.rows_for(4096, heads, keys, 2048, chip.vmem)
    assert rows >= at_least and rows % 8 == 0
    assert mosaic_tpu.vmem_bytes(rows, heads, keys, 2048) <= chip.vmem
    assert mosaic_tpu.rows_for(1, heads, keys, 2048, chip.vmem) == 8


# ---- 8 bits


@pytest.mark.slow
def test_int8_scores_are_near_those_of_float32():
    rng = np.random.default_rng(5)
    queries, keys = rng.normal(size=(1, 4, 8, 128)), rng.normal(size=(1, 1500, 128))
    weights = rng.random((1, 4, 8))
    options = dict(k_select=200, q_positions=np.full((1, 4), 1499), kv_lengths=np.full((1,), 1500))
    exact = indexer_topk(*(jnp.asarray(x, jnp.float32) for x in (queries, keys, weights)), **options)
    (small, fold), (small_keys, scales) = quant.quantise_int8(jnp.asarray(queries)), quant.quantise_int8(jnp.asarray(keys))
    with interpreted():
        out = mosaic_tpu.indexer_topk(small, small_keys, weights * fold, **options, key_scales=scales)
    shared = [np.intersect1d(a, b).size for a, b in zip(np.asarray(exact)[0], np.asarray(out)[0], strict=True)]
    assert min(shared) >= 190


# ---- sets


@pytest.mark.parametrize(
    "span, number, places", [(131_072, 2048, 2048), (4096, 3000, 3072), (1024, 1024, 1024), (2048, 0, 128)]
)
def test_bits_and_lists_are_the_same_sets(span, number, places):
    rng = np.random.default_rng(number)
    rows = -(-span // sets.SPAN // 128) * 128
    chosen = np.sort(rng.permutation(span)[:number]).astype(np.int32)
    mask = np.zeros((rows, sets.SPAN), bool)
    mask.reshape(-1)[chosen] = True
    bits = sets.pack(jnp.asarray(mask))
    listed, found = jax.jit(sets.positions, static_argnums=1)(bits, places)
    assert found.item() == number
    np.testing.assert_array_equal(listed[0, :number], chosen)
    shuffled = np.full((1, places), -1, np.int32)
    shuffled[0, rng.permutation(places)[:number]] = chosen
    np.testing.assert_array_equal(sets.bits_of(jnp.asarray(shuffled), rows), bits)


def test_a_list_may_be_shorter_than_its_set():
    bits = jnp.full((128, 128), 255, jnp.int32)
    listed, found = sets.positions(bits, 256)
    assert found.item() == 131_072
    np.testing.assert_array_equal(listed[0], np.arange(256))


# ---- the harness


def test_the_interpreter_sees_a_race():
    def kernel(x_hbm, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_hbm, buffer, semaphore)
        copy.start()
        out_ref[...] = buffer[...]  # before the copy is there
        copy.wait()

    x = jnp.ones((8, 128))
    with pytest.raises(AssertionError, match="race"), interpreted():
        call = pl.pallas_call(
            kernel,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=x,
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        )
        jax.block_until_ready(call(x))
