"""The experts of few rows: the kernels for Hopper, run on NumPy, against the reference and float64."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, quant
from pallas_kernels.hopper import persistent
from pallas_kernels.routed_mlp import api, mosaic_gpu, reference
from pallas_kernels.routing import reference as routing
from tests.support.emulated import lockstep

HIDDEN, WIDTH, EXPERTS, CHOICES = 640, 384, 8, 2


@pytest.fixture
def emulated(monkeypatch):
    """With fewer SMs than there are, so that they have several tiles each."""
    monkeypatch.setattr(mosaic_gpu, "BLOCKS", 5)

    def words(x):
        flat = np.asarray(x).reshape(-1).view(np.uint8)
        return np.pad(flat, (0, -flat.size % 4)).view(np.int32).copy()

    def call(sizes, operands, outs):
        arrays = {n: words(x) for n, x in operands.items()}
        arrays |= {n: words(np.full(like.shape, np.nan, like.dtype)) for n, like in outs.items()}

        def stages(a, block, shared):
            first, second = mosaic_gpu.stages(sizes, a, persistent.Thread.current(block), shared)
            return [
                types.SimpleNamespace(begin=lambda: None, prefetches=(), run=first.run),
                types.SimpleNamespace(begin=second.begin, prefetches=(), run=second.run),
            ]

        lockstep.run_grid(monkeypatch, arrays, mosaic_gpu.BLOCKS, persistent.THREADS, mosaic_gpu.shared_bytes(sizes), stages)
        return {n: jnp.asarray(arrays[n].view(like.dtype).reshape(like.shape)) for n, like in outs.items()}

    monkeypatch.setattr(mosaic_gpu, "_call", call)


def matrices(random, shared=True):
    def codes(*shape):
        return quant.quantise_matrix(jnp.asarray(random.standard_normal(shape) * shape[-1] ** -0.5, jnp.float32))

    routed = codes(EXPERTS, 2, WIDTH, HIDDEN), codes(EXPERTS, HIDDEN, WIDTH)
    return (*routed, codes(2 * WIDTH, HIDDEN), codes(HIDDEN, WIDTH)) if shared else (*routed, None, None)


def routes_of(experts, weights, shared=True):
    return routing.tables(jnp.asarray(experts, jnp.int32), jnp.asarray(weights, jnp.float32), EXPERTS, shared=shared)


def added(results):
    out, of_shared = results
    return out if of_shared is None else out + of_shared


def check(ours, exact):
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert np.abs(exact).max() > 0
    assert np.abs(ours - exact).max() <= 2.0**-7 * np.abs(exact).max()


@pytest.mark.parametrize("rows,shared", [(1, True), (5, False), (16, True)])
def test_few_rows_are_multiplied_by_their_experts(emulated, rows, shared):
    random = np.random.default_rng(rows)
    x = jnp.asarray(random.standard_normal((rows, HIDDEN)), jnp.bfloat16)
    experts = np.stack([random.permutation(EXPERTS)[:CHOICES] for _ in range(rows)])
    routes, given = routes_of(experts, random.uniform(0.1, 1, experts.shape), shared), matrices(random, shared)
    check(*(added(module.routed_mlp(x, routes, *given)) for module in (mosaic_gpu, reference)))


@pytest.mark.parametrize("rows,parts_of_rows", [(11, 2), (2, 3)])
def test_rows_may_be_in_shared_memory_in_parts(emulated, monkeypatch, rows, parts_of_rows):
    """3 + 2 and 2 + 2 + 1 pieces of 128 numbers."""
    monkeypatch.setattr(mosaic_gpu.Plan, "of", lambda sizes: mosaic_gpu.Plan(2, parts_of_rows, 2))
    random = np.random.default_rng(rows)
    x = jnp.asarray(random.standard_normal((rows, HIDDEN)), jnp.bfloat16)
    experts = np.stack([random.permutation(EXPERTS)[:CHOICES] for _ in range(rows)])
    routes, given = routes_of(experts, random.uniform(0.1, 1, experts.shape)), matrices(random)
    check(*(added(module.routed_mlp(x, routes, *given)) for module in (mosaic_gpu, reference)))


def test_blocks_may_have_one_tile_or_none(emulated, monkeypatch):
    """The shared experts have 12 and 10 tiles, and the rows are in parts."""
    monkeypatch.setattr(mosaic_gpu, "BLOCKS", 13)
    monkeypatch.setattr(mosaic_gpu.Plan, "of", lambda sizes: mosaic_gpu.Plan(2, 2, 2))
    random = np.random.default_rng(5)
    x = jnp.asarray(random.standard_normal((1, HIDDEN)), jnp.bfloat16)
    routes, given = routes_of([[-1, -1]], np.ones((1, CHOICES))), matrices(random)
    check(*(added(module.routed_mlp(x, routes, *given)) for module in (mosaic_gpu, reference)))


def test_rows_of_the_released_models_fit_shared_memory():
    """In how many parts the first stage has them."""
    for hidden, width, rows, parts_of_rows in [
        (2048, 1536, 16, 1),
        (6144, 2048, 8, 1),
        (6144, 2048, 16, 2),
        (7168, 2048, 16, 2),
    ]:
        plan = mosaic_gpu.Plan.of(mosaic_gpu.Sizes(rows, hidden, width, 256, 8))
        assert plan.parts_of_rows == parts_of_rows and plan.first and plan.second


def test_all_rows_may_choose_the_same_experts(emulated):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((9, HIDDEN)), jnp.bfloat16)
    routes, given = routes_of(np.full((9, CHOICES), [6, 1]), np.full((9, CHOICES), 0.5)), matrices(random)
    check(*(added(module.routed_mlp(x, routes, *given)) for module in (mosaic_gpu, reference)))


def test_experts_of_other_devices_count_for_nothing(emulated):
    """Nothing is written for them, and what is not written is NaN here."""
    random = np.random.default_rng(4)
    x = jnp.asarray(random.standard_normal((3, HIDDEN)), jnp.bfloat16)
    given, weights = matrices(random), jnp.asarray([[0.5, 0.25], [1.0, 2.0], [0.5, 0.5]])
    routes = routes_of([[-1, 3], [-1, -1], [5, 3]], weights)
    out, of_shared = mosaic_gpu.routed_mlp(x, routes, *given)
    exact, of_shared_exact = reference.routed_mlp(x, routes, *given)
    check(out, exact)
    check(of_shared, of_shared_exact)
    assert (out[1] == 0).all()
    nothing = routes_of(np.full((3, CHOICES), -1), weights, shared=False)
    out, of_shared = mosaic_gpu.routed_mlp(x, nothing, *given[:2], None, None)
    assert of_shared is None and (out == 0).all()


def test_rows_and_scales_of_very_different_sizes(emulated):
    random = np.random.default_rng(1)
    x = random.standard_normal((4, HIDDEN)) * 10.0 ** np.array([-6, 0, 2, 4])[:, None]
    routes = routes_of(random.integers(0, EXPERTS, (4, 1)), np.ones((4, 1)))
    given = matrices(random)
    x = jnp.asarray(x, jnp.bfloat16)
    ours, exact = (added(module.routed_mlp(x, routes, *given)) for module in (mosaic_gpu, reference))
    for a, b in zip(ours, exact, strict=True):
        check(a, b)


def test_rows_that_are_not_finite_leave_the_others_alone(emulated):
    random = np.random.default_rng(2)
    x = jnp.asarray(random.standard_normal((3, HIDDEN)), jnp.bfloat16)
    routes, given = routes_of([[0, 1], [1, 2], [2, 0]], np.ones((3, 2))), matrices(random)
    exact = added(mosaic_gpu.routed_mlp(x, routes, *given))
    ours = added(mosaic_gpu.routed_mlp(x.at[1, 7].set(jnp.nan), routes, *given))
    assert np.isnan(ours[1]).all()
    assert (ours[jnp.array([0, 2])] == exact[jnp.array([0, 2])]).all()


def test_the_reference_is_the_sum_over_the_chosen_experts():
    random = np.random.default_rng(3)
    x = jnp.asarray(random.standard_normal((3, HIDDEN)), jnp.float32)
    experts, weights = np.array([[0, 5], [1, 5], [7, 2]]), random.uniform(0.1, 1, (3, 2))
    given = matrices(random)
    gate_up, down, shared_gate_up, shared_down = (np.asarray(quant.dequantise(m, jnp.float32), np.float64) for m in given)

    def mlp(row, gate_up, down):
        gate, up = gate_up @ row
        return down @ (gate / (1 + np.exp(-gate)) * up)

    for n, row in enumerate(np.asarray(x, np.float64)):
        exact = mlp(row, shared_gate_up.reshape(2, WIDTH, HIDDEN), shared_down)
        exact += sum(w * mlp(row, gate_up[e], down[e]) for e, w in zip(experts[n], weights[n], strict=True))
        ours = added(reference.routed_mlp(x, routes_of(experts, weights), *given))[n]
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named(monkeypatch):
    given, x = matrices(np.random.default_rng(0)), jnp.zeros((2, HIDDEN), jnp.bfloat16)
    routes = routes_of([[0, 1], [1, 2]], np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"down \[E, D, I\], got \(3, 640\)"):
        api.routed_mlp(jnp.zeros((3, HIDDEN)), routes, *given)
    with pytest.raises(ValueError, match="together, shared_down is None"):
        api.routed_mlp(x, routes, *given[:3])
    with pytest.raises(ValueError, match=r"shared_down \[D, Is\] for D = 640, got"):
        api.routed_mlp(x, routes, *given[:3], given[2])
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    assert mosaic_gpu.why_not(x, routes, *given) is None
    many = jax.eval_shape(lambda: (jnp.zeros((17, HIDDEN), jnp.bfloat16), routes_of(np.zeros((17, 1)), np.ones((17, 1)))))
    assert mosaic_gpu.why_not(*many, *given) == "it takes up to 16 rows, not 17"
    assert "bfloat16" in mosaic_gpu.why_not(x.astype(jnp.float32), routes, *given)
    wide = jax.eval_shape(lambda: quant.quantise_matrix(jnp.zeros((HIDDEN, 2 * WIDTH))))
    assert "shared experts as wide as" in mosaic_gpu.why_not(x, routes, *given[:3], wide)
    by_row = quant.quantise_rows(jnp.zeros((EXPERTS, HIDDEN, WIDTH)))
    assert "down is not such a matrix" in mosaic_gpu.why_not(x, routes, given[0], by_row, *given[2:])
