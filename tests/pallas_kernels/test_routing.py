"""The routes of few rows: the kernel for Hopper, run on NumPy, against the reference."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.hopper import persistent
from pallas_kernels.routing import api, mosaic_gpu, reference
from pallas_kernels.routing.choice import Choice
from tests.support.emulated import lockstep


def emulated(monkeypatch, logits, bias, first, **options):
    rows, experts = logits.shape
    choice = {name: x for name, x in options.items() if name not in ("num_own", "shared")}
    p = mosaic_gpu.Options(rows, Choice(experts, **choice), options["num_own"], options["shared"])
    arrays = {
        name: np.asarray(x, np.float32).reshape(-1).view(np.int32).copy() for name, x in (("logits", logits), ("bias", bias))
    }
    arrays["first"] = np.array([first], np.int32)
    outs = mosaic_gpu.outputs(p)
    arrays |= {name: np.full(int(np.prod(out.shape)), 0x5A5A5A5A, np.int32) for name, out in outs.items()}
    counted = persistent.SharedMemory()
    mosaic_gpu.Program(p, {}, None, counted)

    def stages(a, block, shared):
        program = mosaic_gpu.Program(p, a, persistent.Thread.current(block), persistent.SharedMemory(shared))
        return [types.SimpleNamespace(begin=lambda: None, prefetches=(), run=program.run)]

    lockstep.run_grid(monkeypatch, arrays, 1, persistent.THREADS, counted.used, stages)
    return {n: arrays[n].view(out.dtype).reshape(out.shape) for n, out in outs.items()}


def logits_of(kind, rows, experts):
    random = np.random.default_rng(rows)
    logits = random.standard_normal((rows, experts))
    if kind == "tied":
        logits = np.round(logits)
    if kind == "extreme":
        logits = logits * 10.0 ** random.uniform(-30, 30, (rows, experts))
    if kind == "same":
        logits = np.broadcast_to(logits[:1], logits.shape)
    if kind == "equal":
        logits = np.zeros(logits.shape)
    return jnp.asarray(logits, jnp.float32)


def bias_of(kind, experts):
    """In `unwanted` more experts have a bias of -inf than are left for some rows to choose from."""
    bias = np.random.default_rng(1).standard_normal(experts) * (kind not in ("tied", "equal"))
    return jnp.asarray(np.where((kind == "unwanted") & (np.arange(experts) % 16 > 0), -np.inf, bias), jnp.float32)


@pytest.mark.parametrize(
    "rows,experts,choices,shared,groups,own",
    [
        (1, 32, 1, False, (1, 1), (0, 32)),
        (64, 96, 3, False, (1, 1), (0, 96)),
        (19, 256, 8, True, (8, 4), (64, 160)),
        (5, 384, 6, False, (3, 1), (144, 48)),
    ],
)
@pytest.mark.parametrize("kind", ["random", "tied", "extreme", "same", "equal", "unwanted"])
def test_routes_are_those_of_the_reference(monkeypatch, kind, rows, experts, choices, shared, groups, own):
    """groups: of experts, and how many are kept; own: the device's first expert, and how many it has."""
    logits, bias = logits_of(kind, rows, experts), bias_of(kind, experts)
    (n_group, topk_group), (first, num_own) = groups, own
    options = dict(choices=choices, normalised=rows % 2 == 0, scale=1.8, n_group=n_group, topk_group=topk_group)
    options |= dict(num_own=num_own, shared=shared)
    ours = emulated(monkeypatch, logits, bias, first, **options)
    exact = vars(reference.route(logits, bias, jnp.array([first]), **options))
    for name, array in exact.items():
        if name == "weights":
            np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-37)
        else:
            np.testing.assert_array_equal(ours[name], array, name)


@pytest.mark.parametrize("kind", ["random", "tied", "equal", "unwanted"])
def test_the_reference_keeps_the_best_groups_lowest_first_and_chooses_within_them(kind):
    logits, bias = logits_of(kind, 9, 24), bias_of(kind, 24)
    options = dict(normalised=True, scale=2.5)
    experts, weights = reference.choose(logits, bias, choices=3, n_group=6, topk_group=2, **options)
    scores = np.asarray(jax.nn.sigmoid(logits))
    choice = scores + np.asarray(bias)
    for row, (of_row, chosen) in enumerate(zip(choice, np.asarray(experts), strict=True)):
        quality = np.sort(of_row.reshape(6, 4), axis=1)[:, 2:].sum(axis=1)
        kept = sorted(range(6), key=lambda g: (-quality[g], g))[:2]
        allowed = np.where(np.isin(np.arange(24) // 4, kept), of_row, -np.inf)
        assert chosen.tolist() == sorted(range(24), key=lambda e: (-allowed[e], e))[:3]
        exact = scores[row, chosen] / scores[row, chosen].sum() * 2.5
        np.testing.assert_allclose(weights[row], exact, rtol=1e-5)


def test_routes_list_the_groups_that_rows_are_of():
    routes = reference.tables(jnp.array([[3, 0], [3, 2]]), jnp.ones((2, 2)), 4, shared=True)
    assert routes.groups.tolist() == [4, 0, 2, 3, -1] and routes.num_groups.tolist() == [4]
    assert routes.slots.tolist() == [[1, -1], [-1, -1], [-1, 3], [0, 2], [4, 5]]


def test_a_device_has_the_routes_of_its_own_experts():
    logits, bias = logits_of("tied", 9, 24), bias_of("random", 24)
    options = dict(choices=3, normalised=True, scale=2.5)
    chosen, weights = (np.asarray(array) for array in reference.choose(logits, bias, **options))
    routes = api.route(logits, bias, own=(jnp.int32(8), 8), shared=True, **options)
    own = np.where((chosen >= 8) & (chosen < 16), chosen - 8, -1)
    np.testing.assert_array_equal(routes.experts, own)
    np.testing.assert_array_equal(routes.weights, weights)
    slots = np.full((9, 9), -1)
    slots[8] = 27 + np.arange(9)
    for row, pair in zip(*np.nonzero(own >= 0), strict=True):
        slots[own[row, pair], row] = 3 * row + pair
    np.testing.assert_array_equal(routes.slots, slots)
    used = sorted(set(own[own >= 0].tolist()))
    assert used and routes.groups.tolist() == [8, *used, *[-1] * (8 - len(used))] and routes.num_groups[0] == len(used) + 1


@pytest.mark.parametrize("size,groups", [(0, 3), (1, 1), (50, 7), (200, 64)])
def test_sorting_by_group_is_stable(size, groups):
    given = np.random.default_rng(size).integers(0, groups + 1, size).astype(np.int32)
    order, back, sizes = jax.jit(api.sort_by_group, static_argnums=1)(jnp.asarray(given), groups)
    assert (order == np.argsort(given, kind="stable")).all()
    assert (order[back] == np.arange(size)).all()
    assert (sizes == np.bincount(given, minlength=groups + 1)[:groups]).all()


def test_what_does_not_fit_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"bias \[E\] and 1 to E choices, got \(2, 32\), \(31,\), 4"):
        api.route(jnp.zeros((2, 32)), jnp.zeros(31), choices=4, normalised=True, scale=1.0)
    for groups in ((3, 1), (32, 1), (4, 5), (4, 0), (0, 0)):
        with pytest.raises(ValueError, match="got n_group {} and topk_group {}".format(*groups)):
            choice = dict(choices=4, normalised=True, scale=1.0, n_group=groups[0], topk_group=groups[1])
            api.choose(jnp.zeros((2, 32)), jnp.zeros(32), **choice)
    with pytest.raises(ValueError, match="groups"):
        api.sort_by_group(jnp.zeros((2, 2), jnp.int32), 4)
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    options = dict(choices=4, normalised=True, scale=1.0, num_own=64, shared=False)
    assert mosaic_gpu.why_not(jnp.zeros((65, 64)), None, None, **options) == "it takes up to 64 rows, not 65"
    assert mosaic_gpu.why_not(jnp.zeros((64, 64)), None, None, **options) is None


def test_choices_that_the_kernels_cannot_make_are_named():
    choice = Choice(256, 8, True, 2.5, n_group=8, topk_group=4)
    assert choice.why_not() is None and Choice(64, 4, True, 1.0).why_not() is None
    assert dataclasses.replace(choice, n_group=16).why_not().endswith("multiples of 32, not 16 of 16")
    assert dataclasses.replace(choice, experts=40, n_group=1).why_not().endswith("32 choices, not 40 and 8")
    assert dataclasses.replace(choice, choices=33).why_not().endswith("not 256 and 33")
