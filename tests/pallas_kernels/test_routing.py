"""The routes of few rows: the kernel for Hopper, run on NumPy, against the reference."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import moe
from pallas_kernels import hopper
from pallas_kernels.decode_layer import mosaic_gpu_parts as parts
from pallas_kernels.routing import api, mosaic_gpu, reference
from tests.support.emulated import lockstep


def emulated(monkeypatch, logits, bias, **options):
    p = mosaic_gpu.Options(*logits.shape, **options)
    arrays = {
        name: np.asarray(x, np.float32).reshape(-1).view(np.int32).copy() for name, x in (("logits", logits), ("bias", bias))
    }
    outs = mosaic_gpu.outputs(p)
    arrays |= {name: np.full(int(np.prod(out.shape)), 0x5A5A5A5A, np.int32) for name, out in outs.items()}
    counted = parts.SharedMemory()
    mosaic_gpu.Program(p, {}, None, counted)

    def stages(a, block, shared):
        program = mosaic_gpu.Program(p, a, parts.Thread.current(block), parts.SharedMemory(shared))
        return [types.SimpleNamespace(begin=lambda: None, prefetches=(), run=program.run)]

    lockstep.run_grid(monkeypatch, arrays, 1, parts.THREADS, counted.used, stages)
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
    return jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize("kind", ["random", "tied", "extreme", "same"])
@pytest.mark.parametrize(
    "rows,experts,choices,shared", [(1, 32, 1, False), (16, 64, 4, True), (19, 256, 8, True), (64, 96, 3, False)]
)
def test_routes_are_those_of_the_reference(monkeypatch, kind, rows, experts, choices, shared):
    logits = logits_of(kind, rows, experts)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(experts) * (kind != "tied"), jnp.float32)
    options = dict(choices=choices, normalised=rows % 2 == 0, scale=1.8, shared=shared)
    ours, exact = emulated(monkeypatch, logits, bias, **options), vars(reference.route(logits, bias, **options))
    for name, array in exact.items():
        if name == "weights":
            np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-37)
        else:
            np.testing.assert_array_equal(ours[name], array, name)


def test_the_reference_chooses_as_the_model_does():
    config = types.SimpleNamespace(
        n_group=1, num_experts_per_tok=3, n_routed_experts=32, norm_topk_prob=True, routed_scaling_factor=2.5
    )
    logits, bias = logits_of("tied", 9, 32), jnp.zeros(32)
    exact = moe._choose(logits, bias, config)
    ours = reference.choose(logits, bias, choices=3, normalised=True, scale=2.5)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_routes_list_the_groups_that_rows_are_of():
    routes = reference.tables(jnp.array([[3, 0], [3, 2]]), jnp.ones((2, 2)), 4, shared=True)
    assert routes.groups.tolist() == [4, 0, 2, 3, -1] and routes.num_groups.tolist() == [4]
    assert routes.slots.tolist() == [[1, -1], [-1, -1], [-1, 3], [0, 2], [4, 5]]


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
    with pytest.raises(ValueError, match="groups"):
        api.sort_by_group(jnp.zeros((2, 2), jnp.int32), 4)
    monkeypatch.setattr(hopper, "why_not", lambda: None)
    assert mosaic_gpu.why_not(jnp.zeros((65, 64)), None, choices=4) is not None
    assert mosaic_gpu.why_not(jnp.zeros((64, 64)), None, choices=4) is None
