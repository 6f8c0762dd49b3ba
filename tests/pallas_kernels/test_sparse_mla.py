import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, quant, sparse_mla
from pallas_kernels.hopper import ptx
from pallas_kernels.softmax import START
from pallas_kernels.sparse_mla import gradient, mosaic_gpu, reference, triton
from tests.support.attention_cases import Case, assert_unions, inputs, numpy_attention, numpy_lse, relative_error, selections
from tests.support.emulated import lockstep, warpgroups
from tests.support.interpreted_products import multiply_plainly

SCALE = 0.11
CASES = [Case(1, 5, 4, 40, 16, 64, 16), Case(2, 3, 20, 50, 33, 32, 16), Case(1, 2, 40, 64, 64, 16, 16)]
KINDS = ["ascending", "overlapping", "causal", "scattered", "nothing", "mixed"]

# What runs on a CPU: the reference, and the Triton kernel interpreted.
IMPLEMENTATIONS = {"xla": reference.sparse_mla, "triton": functools.partial(triton.forward, interpret=True)}
implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)


@functools.cache
def _compiled(name, value_dim):
    return jax.jit(functools.partial(IMPLEMENTATIONS[name], scale=SCALE, value_dim=value_dim))


@implementations
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy(name, case, kind):
    queries, latents = inputs(case)
    indices = selections(case, kind)
    out = _compiled(name, case.c)(queries, latents, jnp.asarray(indices))
    expected = numpy_attention(queries, latents, indices, SCALE, case.c)
    assert out.shape == expected.shape and out.dtype == queries.dtype
    if expected.any():
        assert relative_error(out, expected) < 5e-3
    empty = (indices < 0).all(-1)
    assert not np.asarray(out, np.float32)[empty].any()


def test_the_reference_is_exact_in_float32():
    case = CASES[0]
    queries, latents = inputs(case, jnp.float32)
    indices = selections(case, "ascending")
    out = sparse_mla(queries, latents, jnp.asarray(indices), scale=SCALE, value_dim=case.c, implementation="xla")
    assert relative_error(out, numpy_attention(queries, latents, indices, SCALE, case.c)) < 1e-6


@implementations
def test_what_is_not_selected_may_be_anything(name):
    case = CASES[0]
    queries, latents = inputs(case)
    indices = np.where((found := selections(case, "ascending")) == 0, 1, found)
    out = _compiled(name, case.c)(queries, latents, jnp.asarray(indices))
    poisoned = _compiled(name, case.c)(queries, latents.at[:, 0].set(jnp.nan), jnp.asarray(indices))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(poisoned))


@implementations
def test_order_and_place_of_the_indices_do_not_matter(name):
    case = CASES[1]
    queries, latents = inputs(case)
    indices = selections(case, "ascending")
    shuffled = np.random.default_rng(3).permuted(indices, axis=-1)
    one, other = (_compiled(name, case.c)(queries, latents, jnp.asarray(i)) for i in (indices, shuffled))
    assert relative_error(one, other) < 5e-3


@implementations
def test_a_row_of_a_batch_is_as_it_is_alone(name):
    case = CASES[1]
    queries, latents = inputs(case)
    indices = jnp.asarray(selections(case, "ascending"))
    together = _compiled(name, case.c)(queries, latents, indices)
    alone = _compiled(name, case.c)(queries[1:], latents[1:], indices[1:])
    np.testing.assert_allclose(np.float32(together[1:]), np.float32(alone), rtol=1e-2, atol=1e-3)


def test_8_bit_latents_are_their_products():
    case = CASES[1]
    queries, latents = inputs(case)
    small = quant.quantise_latents(latents, case.c)
    assert small.codes.dtype == jnp.float8_e4m3fn and small.shape == latents.shape
    products, exact = quant.dequantise_latents(small, jnp.float32), np.asarray(latents, np.float64)
    np.testing.assert_allclose(products, exact, rtol=1 / 16, atol=1e-2)
    np.testing.assert_allclose(products[..., case.c :], exact[..., case.c :], rtol=2**-8)
    for kind in ("ascending", "scattered"):
        for s in (1, case.s):  # fewer selected rows than latents, and more
            indices = selections(case, kind)[:, :s]
            out = sparse_mla(queries[:, :s], small, jnp.asarray(indices), scale=SCALE, value_dim=case.c)
            assert relative_error(out, numpy_attention(queries[:, :s], products, indices, SCALE, case.c)) < 6e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_sum_exp_comes_with_the_context(kind):
    case = CASES[1]
    queries, latents = inputs(case, jnp.float32)
    indices = selections(case, kind)
    options = dict(scale=SCALE, value_dim=case.c)
    out, lse = sparse_mla(queries, latents, jnp.asarray(indices), **options, return_lse=True)
    np.testing.assert_array_equal(out, sparse_mla(queries, latents, jnp.asarray(indices), **options))
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, numpy_lse(queries, latents, indices, SCALE), rtol=1e-6, atol=1e-6)


def test_the_log_sum_exp_of_8_bit_latents():
    case = CASES[1]
    queries, latents = inputs(case, jnp.float32)
    small = quant.quantise_latents(latents, case.c)
    indices = selections(case, "mixed")
    options = dict(scale=SCALE, value_dim=case.c, return_lse=True)
    lse = sparse_mla(queries, small, jnp.asarray(indices), **options)[1]
    products = quant.dequantise_latents(small, jnp.float32)
    np.testing.assert_allclose(lse, numpy_lse(queries, products, indices, SCALE), rtol=1e-5, atol=1e-5)


DIFFERENTIABLE = {
    "xla": functools.partial(sparse_mla, implementation="xla"),
    "triton": lambda q, kv, indices, scale, value_dim: gradient.differentiable(
        functools.partial(triton.forward, interpret=True)
    )(q, kv, indices, scale, value_dim),
}


def gradients(run, case, queries, latents, indices):
    def loss(q, kv):
        return jnp.sum(run(q, kv, jnp.asarray(indices), scale=SCALE, value_dim=case.c).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, (0, 1)))(queries, latents)


@pytest.mark.parametrize("name, kind", [("xla", kind) for kind in KINDS] + [("triton", "ascending")])
def test_gradients_equal_differentiating_the_reference(name, kind):
    case = CASES[1]
    queries, latents = inputs(case, jnp.float32)
    indices = selections(case, kind)
    expected = gradients(reference.sparse_mla, case, queries, latents, indices)
    found = gradients(DIFFERENTIABLE[name], case, queries, latents, indices)
    for one, other in zip(found, expected, strict=True):
        assert np.any(other) == (kind != "nothing")
        np.testing.assert_allclose(one, other, atol=(1e-5 if name == "xla" else 3e-3) * float(jnp.abs(other).max()))


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
def test_hoppers_gradient_interpreted_equals_the_references(monkeypatch):
    """Several blocks of queries, the last one short; rows and keys of several tiles, neither a multiple; a list of -1."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.sparse_mla import mosaic_gpu_gradient

    multiply_plainly(monkeypatch, mosaic_gpu_gradient)
    case = Case(1, 47, 3, 200, 20, 64, 64)
    monkeypatch.setattr(mosaic_gpu_gradient, "PAIR_BYTES", 2 * case.h * 256 * 20)
    queries, latents = inputs(case)
    cotangent = inputs(case, seed=2)[0][..., : case.c]
    indices = selections(case, "ascending")
    indices[:, 5] = -1
    indices = jnp.asarray(indices)
    assert mosaic_gpu_gradient.ascending(indices)
    out = reference.sparse_mla(queries, latents, indices, scale=SCALE, value_dim=case.c)
    arguments = SCALE, case.c
    found = mosaic_gpu_gradient.pull_ascending(
        queries, latents, indices, out, cotangent, *arguments, interpret=plgpu.InterpretGPUParams()
    )
    exact = gradient.pull(*(x.astype(jnp.float32) for x in (queries, latents)), indices, cotangent, *arguments)
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 6e-3


def test_lists_that_may_repeat_a_position_are_told_apart():
    mosaic_gpu_gradient = pytest.importorskip("pallas_kernels.sparse_mla.mosaic_gpu_gradient")
    for indices, expected in [
        ([[0, 3, 5]], True),
        ([[0, 3, -1], [-1, -1, -1]], True),
        ([[0, 3, 3]], False),
        ([[3, 0, -1]], False),
        ([[0, -1, 3]], False),
    ]:
        assert bool(mosaic_gpu_gradient.ascending(jnp.asarray(indices))) == expected


def test_gradients_of_many_blocks_are_one(monkeypatch):
    """Five queries in blocks of two."""
    case = CASES[0]
    queries, latents = inputs(case, jnp.float32)
    indices = selections(case, "ascending")
    whole = gradients(DIFFERENTIABLE["xla"], case, queries, latents, indices)
    monkeypatch.setattr(gradient, "SPREAD_BYTES", {"other": 2 * 4 * case.h * case.t, "cpu": 2 * 4 * case.h * case.t})
    for one, other in zip(gradients(DIFFERENTIABLE["xla"], case, queries, latents, indices), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * float(jnp.abs(other).max()))


def test_a_latents_gradient_is_summed_in_float32():
    """A thousand queries add about the same to one latent: a sum in bfloat16 would stop growing at a few hundred."""
    case = Case(1, 1000, 2, 3, 1, 16, 16)
    queries = jnp.ones((1, case.s, case.h, case.c + case.r), jnp.bfloat16)
    latents = jnp.zeros((1, case.t, case.c + case.r), jnp.bfloat16)
    indices = jnp.ones((1, case.s, 1), jnp.int32)
    found = jax.grad(
        lambda kv: jnp.sum(
            sparse_mla(queries, kv, indices, scale=1.0, value_dim=case.c, implementation="xla"), dtype=jnp.float32
        )
    )(latents)
    np.testing.assert_array_equal(found[0, 1, : case.c], jnp.bfloat16(2000))
    assert not np.any(found[0, [0, 2]])


def test_gradients_do_not_see_what_is_not_selected():
    case = CASES[0]
    queries, latents = inputs(case, jnp.float32)
    indices = np.where((found := selections(case, "ascending")) == 0, -1, found)
    clean = gradients(DIFFERENTIABLE["xla"], case, queries, latents, indices)
    poisoned = gradients(DIFFERENTIABLE["xla"], case, queries, latents.at[:, 0].set(jnp.nan), indices)
    for one, other in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(one, other)


def eight_bits(**parts):
    """Latents [1, 8, 16+8] in 8 bits, some of their parts as given."""
    codes, rotary = jnp.zeros((1, 8, 16), jnp.float8_e4m3fn), jnp.zeros((1, 8, 8), jnp.bfloat16)
    return dataclasses.replace(quant.Latents(codes, rotary, jnp.zeros((1, 8))), **parts)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(queries=jnp.zeros((1, 2, 3))), "expected queries"),
        (dict(latents=jnp.zeros((2, 8, 24))), "differ"),
        (dict(indices=jnp.zeros((1, 3, 4), jnp.int32)), "differ"),
        (dict(value_dim=25), "value_dim 25"),
        (dict(lengths=jnp.zeros((2, 1), jnp.int32)), r"lengths must be \(1, 2\)"),
        (dict(latents=jnp.zeros((1, 8, 24), jnp.float8_e4m3fn)), "have scales"),
        (dict(latents=eight_bits(codes=jnp.zeros((1, 8, 16)))), "not float32, bfloat16, float32"),
        (dict(latents=eight_bits(scales=jnp.zeros((1, 9)))), "of different tokens"),
        (dict(latents=eight_bits(), value_dim=8), "16 codes, not value_dim 8"),
        (dict(implementation="cuda"), "'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = dict(
        queries=jnp.zeros((1, 2, 3, 24)),
        latents=jnp.zeros((1, 8, 24)),
        indices=jnp.zeros((1, 2, 4), jnp.int32),
        scale=1.0,
        value_dim=16,
    )
    with pytest.raises(ValueError, match=message):
        sparse_mla(**(good | change))


@pytest.mark.parametrize("size", [64, 128])
def test_lengths_tell_hoppers_kernels_what_the_lists_would(size):
    lengths, k = np.array([0, 1, 63, 64, 65, 128, 150, 200], np.int32), 200
    lists = np.where(np.arange(k) < lengths[:, None], np.arange(k), -1)
    np.testing.assert_array_equal(mosaic_gpu.blocks_of(lengths, size), mosaic_gpu.blocks_to_visit(lists, size))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="they may serve there")
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_a_kernel_that_cannot_serve_says_why_and_none_falls_back(implementation):
    case = CASES[0]
    queries, latents = inputs(case)
    run = functools.partial(sparse_mla, queries, latents, jnp.asarray(selections(case, "ascending")), scale=1, value_dim=case.c)
    with pytest.raises(NotImplementedError, match="needs a"):
        run(implementation=implementation)
    assert run().shape == (case.b, case.s, case.h, case.c)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((1, 4096, 64, 122880), 1),  # a tile of its own
        ((1, 4096, 128, 122880), 1),
        ((1, 4096, 33, 122880), 1),
        ((1, 4096, 32, 122880), 2),
        ((1, 4096, 20, 122880), 3),
        ((1, 4096, 16, 122880), 4),
        ((1, 4096, 4, 122880), 7),  # the owners' bits
        ((1, 4096, 20, 2**20), 1),  # two bitmaps of a million keys do not fit
        ((1, 4096, 20, 2**25), 1),  # keys do not fit beside the owners
        ((8, 1, 20, 122880), 1),  # decode
        ((300, 1, 20, 122880), 1),
    ],
)
def test_how_many_queries_share_a_tile(shape, expected):
    pytest.importorskip("jax", minversion="0.11")
    assert mosaic_gpu.queries_per_tile(*shape) == expected


@pytest.mark.parametrize("tiles, pairs, expected", [(1, 16, 8), (8, 16, 8), (32, 16, 4), (50, 16, 2), (132, 16, 1), (1, 5, 5)])
def test_splits_fill_the_device_evenly(tiles, pairs, expected):
    pytest.importorskip("jax", minversion="0.11")
    assert mosaic_gpu.splits_of(tiles, pairs) == expected


@pytest.mark.parametrize("split", [(2, 216, 72), (2, 200, 104), (2, 240, 24), (3, 160, 32), (4, 112, 32)])
def test_registers_that_a_block_is_launched_with_can_be_divided(split):
    workers, worker, helper = split
    hopper.RegisterSplit(*split)
    with pytest.raises(ValueError, match="launched with"):
        hopper.RegisterSplit(workers, worker + 8, helper)


def test_registers_that_would_be_waited_for_are_refused():
    with pytest.raises(ValueError, match="512 registers for 3 threads launched with 168 each"):
        hopper.RegisterSplit(workers=2, worker=208, helper=96)  # 65536 in all, but 168 x 384 at launch
    for worker, helper in ((100, 72), (264, 24), (216, 16)):
        with pytest.raises(ValueError, match="a multiple of 8 from 24 to 256"):
            hopper.RegisterSplit(workers=2, worker=worker, helper=helper)


def test_blocks_to_visit_end_with_the_last_index():
    indices = np.full((4, 300), -1)
    indices[1, 0], indices[2, 128], indices[3, 299] = 5, 5, 5
    np.testing.assert_array_equal(mosaic_gpu.blocks_to_visit(jnp.asarray(indices), 128), [1, 1, 2, 3])


def test_tasks_that_cannot_be_launched():
    from pallas_kernels.sparse_mla import mosaic_gpu_attention as kernel
    from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import Tasks

    with pytest.raises(ValueError, match="more than 64 heads must be a multiple of 64, not 65"):
        Tasks(1, 1, 65, 1000, pairs=1)
    with pytest.raises(ValueError, match="4 queries of 20 heads do not fit a tile"):
        Tasks(1, 4, 20, 1000, pairs=1, packed=4)
    with pytest.raises(ValueError, match="lists of 3 queries are not split, here into 2"):
        Tasks(1, 3, 20, 1000, pairs=2, packed=3, splits=2)
    with pytest.raises(ValueError, match="packed lists have counts and others do not: 3 queries a tile, counts None"):
        kernel.attend(None, None, None, None, Tasks(1, 3, 20, 1000, pairs=2, packed=3), scale=1.0)


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys, packed", [(300, 2), (20_000, 3), (40_000, 7)])
def test_unions_hold_every_key_with_its_owners(kind, keys, packed, monkeypatch):
    from pallas_kernels.sparse_mla import mosaic_gpu_union
    from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import Tasks

    case = Case(2, 2 * packed - 1, 64 // packed, keys, 150)
    indices = selections(case, kind)
    tasks = Tasks(case.b, case.s, case.h, case.t, pairs=-(-packed * case.k // 128), packed=packed)
    rows = indices.reshape(-1, case.k)
    lists, counts = lockstep.run(monkeypatch, mosaic_gpu_union, mosaic_gpu_union.unite, rows, tasks)
    assert_unions(lists, counts, indices, packed, ascending=kind != "scattered")


def unions_pay_emulated(monkeypatch, indices, heads, keys, packed):
    from pallas_kernels.sparse_mla import mosaic_gpu_union

    unite = mosaic_gpu_union.unite

    def emulated(lists, tasks):
        with monkeypatch.context() as patch:
            return lockstep.run(patch, mosaic_gpu_union, unite, np.asarray(lists), tasks)

    with monkeypatch.context() as patch:
        patch.setattr(mosaic_gpu_union, "unite", emulated)
        patch.setattr(mosaic_gpu, "SAMPLED_TILES", 4)
        return bool(mosaic_gpu.unions_pay(jnp.asarray(indices), heads, keys, packed))


def selections_with_changes(rng, changes, shape, keys, k):
    """[B, S, k], ascending: `changes` of a query's keys are none that the four queries before it selected."""
    b, s = shape
    out = np.empty((b, s, k), np.int32)
    for row, query in np.ndindex(b, s):
        fresh = rng.permutation(np.setdiff1d(np.arange(keys), out[row, max(0, query - 4) : query]))
        kept = rng.permutation(out[row, query - 1])[: k - changes] if query else fresh[changes:k]
        out[row, query] = np.sort(np.concatenate([kept, fresh[:changes]]))
    return out


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize("heads, packed", [(16, 4), (20, 3), (32, 2)])
def test_unions_pay_where_neighbours_share_enough(heads, packed, monkeypatch):
    """On either side of where a union is UNION_PAYS of the lists, also where only a part of the lists is set."""
    k, keys = 1024, 8000
    at_threshold = (1 - mosaic_gpu.UNION_PAYS) * packed / (packed - 1)  # a union is 1 + (packed - 1) (1 - shared) lists
    for shared, expected in ((0.0, False), (at_threshold - 0.1, False), (min(at_threshold + 0.1, 1.0), True), (1.0, True)):
        changes = round((1 - shared) * k)
        indices = selections_with_changes(np.random.default_rng(0), changes, (2, 3 * packed + 1), keys, k)
        tails = np.concatenate([indices, np.full_like(indices, -1)], axis=-1)
        for given in (indices, tails):
            assert unions_pay_emulated(monkeypatch, given, heads, keys, packed) == expected, shared


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
def test_the_sample_for_the_unions_is_whole_tiles_all_over(monkeypatch):
    """Selections of their own for every tile: those pay, but not tiles across two of them, nor if every second batch row."""
    packed, k, keys = 3, 256, 3000
    rng = np.random.default_rng(0)
    alike = np.repeat(selections_with_changes(rng, k, (2, 8), keys, k), packed, axis=1)  # whole tiles of one selection
    assert unions_pay_emulated(monkeypatch, alike, 20, keys, packed)
    shifted = np.roll(alike, 1, axis=1)  # tiles across two selections: 2/3 of their lists
    assert not unions_pay_emulated(monkeypatch, shifted, 20, keys, packed)
    different = selections_with_changes(rng, k, (2, 24), keys, k)
    for row in range(2):  # in one row everything is alike, in the other nothing: 2/3 again
        mixed = alike.copy()
        mixed[row] = different[row]
        assert not unions_pay_emulated(monkeypatch, mixed, 20, keys, packed)


def few_heads_emulated(monkeypatch, queries, latents, indices, seed, num_sms=2):
    """What the kernel for few heads makes of a case, each multiprocessor doing every `num_sms`-th query."""
    from pallas_kernels.hopper.columns import KEYS
    from pallas_kernels.sparse_mla import mosaic_gpu_few_heads as few
    from pallas_kernels.sparse_mla.mosaic_gpu_few_heads_tasks import Tasks

    b, s, h, width = queries.shape
    lists = np.pad(indices.reshape(b * s, -1), ((0, 0), (0, -indices.shape[2] % KEYS)), constant_values=-1)
    counts = np.asarray(mosaic_gpu.blocks_to_visit(jnp.asarray(lists), KEYS))
    tasks = Tasks(b, s, h, latents.shape[1], lists.shape[1] // KEYS)
    flat = np.asarray(queries).reshape(-1, width), np.asarray(latents).reshape(-1, width), lists, counts
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "NUM_SMS", num_sms)
        out = warpgroups.run(patch, few, few.attend, *flat, tasks, scale=SCALE, seed=seed)
    return out.reshape(b, s, h, -1)


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize(
    "case, kind",
    [(Case(1, 5, 20, 300, 400), kind) for kind in KINDS]
    + [(Case(2, 3, 32, 200, 70), "ascending"), (Case(1, 4, 3, 400, 250), "scattered"), (Case(1, 3, 16, 90, 1), "ascending")],
    ids=str,
)
def test_the_kernel_for_few_heads_emulated(case, kind, monkeypatch):
    queries, latents = inputs(case)
    indices = selections(case, kind)
    expected = numpy_attention(queries, latents, indices, SCALE, case.c)
    for seed in range(2):
        out = few_heads_emulated(monkeypatch, queries, latents, indices, seed)
        if expected.any():
            assert relative_error(out, expected) < 5e-3
        assert not np.asarray(out, np.float32)[(indices < 0).all(-1)].any()


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
def test_the_kernel_for_few_heads_follows_growing_logits_emulated(monkeypatch):
    """Every later key beats all before it by far, then none does; and what is not selected may be anything."""
    case = Case(1, 2, 20, 384, 384)
    rng = np.random.default_rng(0)
    growing = np.linspace(-40, 40, case.t)[None, :, None] + rng.normal(size=(1, case.t, case.c + case.r))
    queries = jnp.ones((1, case.s, case.h, case.c + case.r), jnp.bfloat16)
    indices = np.broadcast_to(np.arange(case.k, dtype=np.int32), (1, case.s, case.k)).copy()
    indices[:, 1] = indices[:, 1, ::-1]
    indices[indices == 200] = -1
    latents = jnp.asarray(growing, jnp.bfloat16)
    out = few_heads_emulated(monkeypatch, queries, latents.at[:, 200].set(jnp.nan), indices, seed=0)
    assert relative_error(out, numpy_attention(queries, latents, indices, SCALE, case.c)) < 5e-3


def tiled(rows):
    """[64, N] bfloat16 as they lie in shared memory: tiles of 8 x 64, the 16-byte chunks of a line swizzled by its number."""
    tiles = rows.reshape(8, 8, rows.shape[1] // 64, 8, 8).swapaxes(1, 2)
    line, chunk = np.ogrid[:8, :8]
    return tiles[:, :, line, chunk ^ line].reshape(-1)


def query_tile_emulated(monkeypatch, queries, row, rows, through_registers, seed):
    """What the query tile of a block holds once it was waited for, both halves and the rotary columns."""
    from pallas_kernels.sparse_mla import mosaic_gpu_attention_rows as attention

    def body(queries, out, columns, rotary, barriers):
        attention.init_barriers(barriers)
        warpgroup = jax.lax.axis_index("warpgroup")
        attention.load_queries(queries, columns, rotary, row, rows, warpgroup, through_registers=through_registers)
        attention.await_queries(barriers, 0)
        everywhere = ptx.thread().signed >= 0
        for i in range(18):
            at = 16 * ptx.thread() + 4096 * i
            words = ptx.load_shared_words(ptx.shared_address(columns) + at)
            ptx.store_global_words(ptx.global_address(out) + at, words, everywhere)

    def load(queries):
        plgpu = attention.plgpu
        tile = plgpu.SMEM((2, 64, 256), jnp.bfloat16), plgpu.SMEM((1, 64, 64), jnp.bfloat16)
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((64 * 576,), jnp.bfloat16),
            scratch_types=(*tile, plgpu.SMEM((attention.Barriers.WORDS,), jnp.uint32)),
            grid=(1,),
            num_threads=2,
        )(queries)

    return warpgroups.run(monkeypatch, attention, load, queries, seed=seed)


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize("through_registers", [False, True])
@pytest.mark.parametrize("row, rows", [(0, 64), (3, 20), (35, 5), (20, 20), (39, 1)])
def test_a_query_tile_holds_its_rows_and_zeros_emulated(row, rows, through_registers, monkeypatch):
    """Also where less than a tile is left of the array."""
    queries = np.random.default_rng(0).normal(size=(max(40, rows), 576)).astype(jnp.bfloat16)
    expected = np.zeros((64, 576), jnp.bfloat16)
    expected[:rows] = queries[row : row + rows]
    for seed in range(20):
        tile = query_tile_emulated(monkeypatch, queries, row, rows, through_registers, seed)
        np.testing.assert_array_equal(tile, np.concatenate([*map(tiled, np.split(expected, [256, 512], axis=1))]))


def combined_emulated(monkeypatch, queries, parts, logs, tasks, seed):
    """What clusters make of their blocks' results [clusters, splits, 2, 64, 256], stored where queries were loaded before."""
    from pallas_kernels.sparse_mla import mosaic_gpu_attention_rows as attention

    def body(queries, parts, logs, out, columns, rotary, sums, barriers):
        cluster, split, warpgroup = map(jax.lax.axis_index, ("block", "split", "warpgroup"))
        attention.init_barriers(barriers)
        row = cluster * tasks.heads
        attention.load_queries(queries, columns, rotary, row, tasks.heads, warpgroup, through_registers=True)
        attention.await_queries(barriers, 0)
        ptx.block_barrier()
        thread, task = ptx.thread(), ptx.constant(cluster * tasks.splits + split)
        for i in range(16):
            at = 16 * thread + 4096 * i
            words = ptx.load_global_words(ptx.offset(ptx.global_address(parts), task, 65536) + at)
            ptx.store_shared_words(ptx.shared_address(columns) + at, words)
        with ptx.when(thread.signed < 64):
            log = ptx.load_global(ptx.offset(ptx.global_address(logs), task, 256) + 4 * thread)
            ptx.store_shared(ptx.shared_address(sums) + 4 * thread, log)
        attention.combine(columns, sums, out, tasks, row, tasks.heads, split, warpgroup)

    def combine(*arrays):
        plgpu = attention.plgpu
        tile = plgpu.SMEM((2, 64, 256), jnp.bfloat16), plgpu.SMEM((1, 64, 64), jnp.bfloat16)
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((tasks.rows, 512), jnp.bfloat16),
            scratch_types=(*tile, plgpu.SMEM((64,), jnp.float32), plgpu.SMEM((attention.Barriers.WORDS,), jnp.uint32)),
            grid=(tasks.batch,),
            cluster=(tasks.splits,),
            cluster_names=("split",),
            num_threads=2,
        )(*arrays)

    images = np.stack([tiled(half) for half in parts.reshape(-1, 64, 256)])
    return warpgroups.run(monkeypatch, attention, combine, queries, images, logs, seed=seed)


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize("heads, splits", [(64, 2), (64, 8), (20, 8), (20, 3), (5, 4)])
def test_a_cluster_combines_what_it_stored_in_the_query_tiles_place_emulated(heads, splits, monkeypatch):
    """Every row that counts, of blocks with and without keys, and none of the others."""
    from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import Tasks

    rng = np.random.default_rng(0)
    tasks = Tasks(2, 1, heads, 1000, pairs=splits, splits=splits)
    queries = rng.normal(size=(tasks.rows, 576)).astype(jnp.bfloat16)
    parts = rng.normal(size=(tasks.batch, splits, 2, 64, 256)).astype(jnp.bfloat16)
    logs = 3 * rng.normal(size=(tasks.batch, splits, 64)).astype(np.float32)
    parts[:, -1, :, 1::2], logs[:, -1, 1::2] = 0, START
    weights = np.exp2(logs - logs.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("bsr,bshrc->brhc", weights, parts.astype(np.float32))[:, :heads].reshape(tasks.rows, 512)
    for seed in range(2):
        out = combined_emulated(monkeypatch, queries, parts, logs, tasks, seed)
        np.testing.assert_allclose(out.astype(np.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize(
    "case",
    [Case(1, 3, 64, 300, 130), Case(1, 1, 128, 4096, 2048), Case(1, 301, 20, 2000, 256), Case(1, 1, 32, 300, 1)],
    ids=["one query a tile", "decode", "few heads", "few heads, one key"],
)
def test_the_hopper_kernels_lower(case):
    """All of Pallas' checks and layout inference run without a GPU; what they make is compiled on one."""
    width = case.c + case.r
    arguments = {
        "queries": jax.ShapeDtypeStruct((case.b, case.s, case.h, width), jnp.bfloat16),
        "latents": jax.ShapeDtypeStruct((case.b, case.t, width), jnp.bfloat16),
        "indices": jax.ShapeDtypeStruct((case.b, case.s, case.k), jnp.int32),
    }
    run = jax.jit(functools.partial(mosaic_gpu.forward, scale=SCALE, value_dim=case.c))
    assert "mosaic_gpu" in run.trace(**arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.version.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize(
    "case, looks",
    [
        (Case(1, 264, 20, 300, 256), True),
        (Case(2, 132, 32, 300, 256), True),
        (Case(1, 263, 20, 300, 256), False),
        (Case(400, 1, 20, 300, 256), False),
        (Case(1, 300, 64, 300, 256), False),
    ],
    ids=str,
)
def test_only_a_prefill_with_few_heads_looks_at_the_lists_first(case, looks):
    """The host waits for a predicate: no decode program may have one."""
    width = case.c + case.r
    queries = jax.ShapeDtypeStruct((case.b, case.s, case.h, width), jnp.bfloat16)
    latents = jax.ShapeDtypeStruct((case.b, case.t, width), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((case.b, case.s, case.k), jnp.int32)
    run = jax.jit(functools.partial(mosaic_gpu.forward, scale=SCALE, value_dim=case.c))
    text = run.trace(queries, latents, indices).lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.case" in text) == looks
