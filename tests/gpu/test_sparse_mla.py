"""The Hopper and Triton kernels of sparse_mla against the reference, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, quant, sparse_mla
from pallas_kernels.sparse_mla import mosaic_gpu, reference
from tests.support.attention_cases import Case, assert_unions, inputs, numpy_attention, relative_error, selections

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
needs_hopper = pytest.mark.skipif(hopper.why_not() is not None, reason=str(hopper.why_not()))

SCALE = 0.04
KINDS = ["ascending", "overlapping", "causal", "scattered", "nothing", "mixed"]
CASES = [
    Case(1, 7, 64, 300, 130),  # one query a tile, a tail in the list
    Case(2, 5, 128, 200, 128),  # two tiles a query
    Case(1, 3, 48, 500, 96),  # rows of a tile left over
    Case(1, 3, 70, 500, 96),  # heads padded to two tiles
    Case(1, 301, 20, 2000, 256),  # few heads: several queries a block of the grid
    Case(2, 133, 32, 900, 100),
    Case(3, 101, 16, 700, 64),  # one key block
    Case(1, 270, 4, 300, 257),
    Case(1, 150, 1, 300, 1),
    Case(1, 1, 64, 4096, 2048),  # decode, lists split over a cluster
    Case(5, 1, 64, 1000, 600),
    Case(3, 1, 20, 4096, 2048),
    Case(1, 2, 128, 4096, 1024),
    Case(140, 1, 64, 300, 200),  # decode without splits, several tasks a block
]
kernels = pytest.mark.parametrize("implementation", [pytest.param("mosaic_gpu", marks=needs_hopper), "triton"])


@functools.cache
def _compiled(implementation, value_dim):
    return jax.jit(functools.partial(sparse_mla, scale=SCALE, value_dim=value_dim, implementation=implementation))


@functools.cache
def _reference(value_dim):
    """In float32, so that what is measured is the kernel's rounding alone."""
    run = functools.partial(reference.sparse_mla, scale=SCALE, value_dim=value_dim)
    return jax.jit(lambda q, kv, indices: run(q.astype(jnp.float32), kv.astype(jnp.float32), indices))


@kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_and_repeats_itself(implementation, case):
    queries, latents = inputs(case)
    for kind in KINDS:
        indices = jnp.asarray(selections(case, kind))
        out = _compiled(implementation, case.c)(queries, latents, indices)
        again = _compiled(implementation, case.c)(queries, latents, indices)
        expected = np.asarray(_reference(case.c)(queries, latents, indices))
        np.testing.assert_array_equal(np.asarray(out), np.asarray(again), err_msg=kind)
        if expected.any():
            assert relative_error(out, expected) < 5e-3, kind
        empty = (np.asarray(indices) < 0).all(-1)
        assert not np.asarray(out, np.float32)[empty].any(), kind


@kernels
def test_equals_numpy(implementation):
    case = CASES[0]
    queries, latents = inputs(case)
    indices = selections(case, "ascending")
    out = _compiled(implementation, case.c)(queries, latents, jnp.asarray(indices))
    assert relative_error(out, numpy_attention(queries, latents, indices, SCALE, case.c)) < 5e-3


@kernels
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8]], ids=str)
def test_what_is_not_selected_may_be_anything(implementation, case):
    queries, latents = inputs(case)
    indices = selections(case, "ascending")
    indices = jnp.asarray(np.where(indices == 0, 1, indices))
    out = _compiled(implementation, case.c)(queries, latents, indices)
    poisoned = _compiled(implementation, case.c)(queries, latents.at[:, 0].set(jnp.nan), indices)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(poisoned))


@kernels
def test_logits_may_grow_along_the_list(implementation):
    """Every later key beats all before it by far: the running maximum has to follow."""
    case = Case(1, 4, 64, 512, 512)
    queries = jnp.ones((case.b, case.s, case.h, case.c + case.r), jnp.bfloat16)
    growing = jnp.linspace(-40, 40, case.t)[None, :, None] + jnp.zeros((1, 1, case.c + case.r))
    indices = jnp.broadcast_to(jnp.arange(case.k, dtype=jnp.int32), (1, case.s, case.k))
    for latents in (growing, growing[:, ::-1]):
        latents = latents.astype(jnp.bfloat16)
        out = _compiled(implementation, case.c)(queries, latents, indices)
        assert relative_error(out, _reference(case.c)(queries, latents, indices)) < 5e-3


@needs_hopper
@pytest.mark.parametrize("packed", [1, 2, 3])
def test_the_number_of_queries_a_tile_does_not_change_the_result(packed):
    case = Case(2, 50, 20, 600, 150)
    queries, latents = inputs(case)
    indices = jnp.asarray(selections(case, "overlapping"))
    out = mosaic_gpu._in_tiles(queries, latents, indices, scale=SCALE, packed=packed)
    assert relative_error(out, _reference(case.c)(queries, latents, indices)) < 5e-3


@needs_hopper
@pytest.mark.parametrize("heads", [16, 20, 32])
def test_few_heads_whether_or_not_neighbours_share(heads):
    """Both branches of the rule, which the lists choose."""
    case = Case(2, 150, heads, 9000, 256)
    queries, latents = inputs(case)
    packed = mosaic_gpu.queries_per_tile(case.b, case.s, heads, case.t)
    assert packed == 64 // heads
    rng = np.random.default_rng(0)
    lists = np.sort(np.stack([rng.permutation(case.t)[: case.k] for _ in range(case.b * case.s)]), axis=-1)
    lists = lists.reshape(case.b, case.s, case.k).astype(np.int32)
    for indices, pay in ((lists, False), (lists[:, np.arange(case.s) // packed], True)):
        indices = jnp.asarray(indices)
        assert bool(jax.jit(functools.partial(mosaic_gpu.unions_pay, heads=heads, keys=case.t, packed=packed))(indices)) == pay
        run = jax.jit(functools.partial(mosaic_gpu.forward, scale=SCALE, value_dim=case.c))
        out, again = run(queries, latents, indices), run(queries, latents, indices)
        np.testing.assert_array_equal(np.asarray(out), np.asarray(again))
        assert relative_error(out, _reference(case.c)(queries, latents, indices)) < 5e-3


@needs_hopper
@pytest.mark.parametrize("kind", KINDS)
def test_unions_hold_every_key_once_with_its_owners(kind):
    from pallas_kernels.sparse_mla import mosaic_gpu_union
    from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import Tasks

    case = Case(2, 50, 20, 70_000, 150)
    indices = selections(case, kind)
    tasks = Tasks(case.b, case.s, case.h, case.t, pairs=4, packed=3)
    lists, counts = map(np.asarray, mosaic_gpu_union.unite(jnp.asarray(indices.reshape(-1, case.k)), tasks))
    assert_unions(lists, counts, indices, 3, ascending=kind != "scattered")


@kernels
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8]], ids=str)
def test_8_bit_latents(implementation, case):
    queries, latents = inputs(case)
    small = quant.quantise_latents(latents, case.c)
    indices = jnp.asarray(selections(case, "ascending"))
    out = _compiled(implementation, case.c)(queries, small, indices)
    products = quant.dequantise_latents(small, jnp.float32)
    assert relative_error(out, _reference(case.c)(queries, products, indices)) < 6e-3


@needs_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
def test_8_bit_latents_of_every_kind_of_list_equal_the_reference_and_repeat_themselves(case):
    queries, latents = inputs(case)
    latents = latents * jnp.asarray(2.0 ** (np.arange(case.t) % 12 - 8), latents.dtype)[:, None]  # scales of many sizes
    small = quant.quantise_latents(latents, case.c)
    products = quant.dequantise_latents(small, jnp.float32)
    for kind in KINDS:
        indices = jnp.asarray(selections(case, kind))
        out, again = (_compiled("mosaic_gpu", case.c)(queries, small, indices) for _ in range(2))
        expected = np.asarray(_reference(case.c)(queries, products, indices))
        np.testing.assert_array_equal(np.asarray(out), np.asarray(again), err_msg=kind)
        if expected.any():
            assert relative_error(out, expected) < 6e-3, kind
        assert not np.asarray(out, np.float32)[(np.asarray(indices) < 0).all(-1)].any(), kind


@kernels
def test_has_the_gradient_of_the_reference(implementation):
    case = CASES[0]
    queries, latents = inputs(case)
    indices = jnp.asarray(selections(case, "ascending"))

    def loss(q, kv, implementation):
        out = sparse_mla(q, kv, indices, scale=SCALE, value_dim=case.c, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32))

    found = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(queries, latents, implementation)
    exact = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(
        queries.astype(jnp.float32), latents.astype(jnp.float32), "xla"
    )  # a sum over queries, in whichever order the device adds them
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-2


@needs_hopper
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[6], CASES[7]], ids=str)
def test_gradients_of_every_kind_of_list_equal_the_references_and_repeat_themselves(case):
    queries, latents = inputs(case)
    cotangent = inputs(case, seed=2)[0][..., : case.c]

    @functools.partial(jax.jit, static_argnums=3)
    def gradients(queries, latents, indices, implementation):
        run = functools.partial(sparse_mla, scale=SCALE, value_dim=case.c, implementation=implementation)
        out, pull = jax.vjp(lambda q, kv: run(q, kv, indices), queries, latents)
        return pull(cotangent.astype(out.dtype))

    for kind in KINDS:
        indices = jnp.asarray(selections(case, kind))
        found, again = (gradients(queries, latents, indices, "mosaic_gpu") for _ in range(2))
        exact = gradients(queries.astype(jnp.float32), latents.astype(jnp.float32), indices, "xla")
        for one, same, other in zip(found, again, exact, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(same), err_msg=kind)
            assert not np.any(other) or relative_error(one, other) < 1e-2, kind


@needs_hopper
def test_other_widths_and_dtypes_are_left_to_others():
    case = Case(1, 3, 4, 100, 30, 64, 16)
    queries, latents = inputs(case)
    indices = jnp.asarray(selections(case, "ascending"))
    with pytest.raises(NotImplementedError, match=r"512\+64"):
        _compiled("mosaic_gpu", case.c)(queries, latents, indices)
    out = _compiled(None, case.c)(queries, latents, indices)
    assert relative_error(out, _reference(case.c)(queries, latents, indices)) < 5e-3
