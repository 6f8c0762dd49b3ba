"""The blockwise losses against the same written with full [B, S, T] arrays, layer by layer."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax import attention, distill, indexer, model, ops
from indexcache_jax.config import Config
from indexcache_jax.distill import averaged_divergence, divergence, formulas, losses
from indexcache_jax.norm import rms_norm
from indexcache_jax.params import Params, at_layer, shape_structs, slots
from indexcache_jax.positions import whole_rows
from indexcache_jax.schedule import Schedule
from pallas_kernels.blocks import block_rows
from tests.support.tiny_models import DEEPSEEK_FIELDS, GLM_FIELDS, Case

# Two runs each: compiling gradients is what these tests spend their time on.
CASES = {
    "glm": Case(GLM_FIELDS | {"num_hidden_layers": 4}, "FFSS", 2, (26, 26)),
    "deepseek": Case(DEEPSEEK_FIELDS | {"num_hidden_layers": 3, "first_k_dense_replace": 1}, "FSS", 0, (26, 26)),
}
# One schedule among others that may be given as data, and alone.
WHOLE, PART = (Case(GLM_FIELDS | {"num_hidden_layers": 3}, pattern, 2, (26, 26)) for pattern in ("FFF", "FSF"))
both_stages = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


def ours(params, case, sparse, **options):
    return losses(
        params, case.tokens, case.config, case.schedule, indexers=True, sparse=sparse, compute_dtype=jnp.float32, **options
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """The two losses and the gradient of each with respect to all weights."""

    language: Any
    indexer: Any
    of_language: Params
    of_indexer: Params


def differentiate(function, params):
    """`function(params) -> (language, indexer)`: one program for both gradients."""

    def run(params):
        values, pull = jax.vjp(function, params)
        one, none = jnp.ones(()), jnp.zeros(())
        return values, pull((one, none))[0], pull((none, one))[0]

    (language, indexers), of_language, of_indexer = jax.jit(run)(params)
    return Found(language, indexers, of_language, of_indexer)


@functools.cache
def blockwise(name, sparse):
    case = CASES[name]

    def function(params):
        found = ours(params, case, sparse)
        return found.language, found.indexer

    return differentiate(function, case.params)


@functools.cache
def written_out(name, sparse, averaged=False):
    case = CASES[name]
    return differentiate(lambda params: plain(params, case, sparse, averaged), case.params)


def plain(params, case, sparse, averaged=False):
    """(language loss, sum over F layers of the multi-layer KL): nothing in blocks, nothing scanned."""
    config, schedule, tokens = case.config, case.schedule, jnp.asarray(case.tokens)
    x, targets = params.embedding[tokens[:, :-1]], tokens[:, 1:]
    b, s = targets.shape
    positions = whole_rows(x, config)
    causal = jnp.tril(jnp.ones((s, s), bool))[None]
    dense, experts = slots(config.dense_layers), slots(config.expert_layers)
    log_q, mask, targets_of = {}, causal, {}
    for layer in range(config.num_layers):
        p = model.attention_layer(params, layer, slots(schedule.full_layers).get(layer))
        h = rms_norm(x, p.norm, config.rms_norm_eps)
        q_latent = attention.query_latents(p.attention, h, config)
        if schedule.is_full[layer]:
            frozen, frozen_latent = jax.lax.stop_gradient((h, q_latent))
            q = indexer.index_queries(p.indexer, frozen_latent, positions.cos_sin, config)
            k = indexer.index_keys(p.indexer, frozen, positions.cos_sin, config)
            w = indexer.head_weights(p.indexer, frozen, config)
            scores = jnp.sum(w[..., None] * jnp.maximum(jnp.einsum("bshd,btd->bsht", q, k), 0), axis=2)
            if sparse:
                ranked = jnp.sort(jnp.where(causal, scores, -jnp.inf), axis=-1)
                mask = causal & (scores >= ranked[..., -config.index_topk, None])
            shifted = jnp.where(mask, jnp.exp(scores - scores.max()), 0)
            log_q[layer] = scores - scores.max() - jnp.log(shifted.sum(-1, keepdims=True))
        q = jnp.concatenate(attention.queries(p.attention, q_latent, positions.cos_sin, config), axis=-1)
        keys, values = attention.expand(p.attention, attention.latents(p.attention, h, positions.cos_sin, config), config)
        logits = jnp.einsum("bshd,bthd->bhst", q, keys) * config.attention_scale
        probabilities = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), axis=-1)
        x = x + attention.output(p.attention, jnp.einsum("bhst,bthd->bshd", probabilities, values))
        targets_of.setdefault(schedule.source[layer], []).append(jax.lax.stop_gradient(probabilities.mean(1)))
        stack = at_layer(params.moe, experts[layer]) if layer in experts else at_layer(params.dense, dense[layer])
        x = model.mlp_block(stack, at_layer(params.mlp_norm, layer), x, config)
    logp = jax.nn.log_softmax(model.unembed(params, x, config))
    language = -jnp.mean(jnp.take_along_axis(logp, targets[..., None], axis=-1))
    total = 0.0
    for source, found in targets_of.items():
        found = [jnp.mean(jnp.stack(found), axis=0)] if averaged else found
        for p in found:
            terms = jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, 1e-37)) - jnp.where(p > 0, log_q[source], 0)), 0)
            total += jnp.mean(terms.sum(-1)) / len(found)
    return language, total


def assert_close(found, expected, tolerance=2e-4):
    """Of gradients, relative to the largest number of each tensor."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, atol=tolerance * scale + 1e-7, rtol=0, err_msg=str(path))


@pytest.mark.parametrize("name, sparse", [("glm", False), ("glm", True), ("deepseek", True)])
def test_losses_and_gradients_equal_the_plain_form(name, sparse):
    found, expected = blockwise(name, sparse), written_out(name, sparse)
    np.testing.assert_allclose((found.language, found.indexer), (expected.language, expected.indexer), rtol=2e-5)
    assert found.indexer > 0.05
    assert_close(found.of_language, expected.of_language)
    assert_close(found.of_indexer, expected.of_indexer)


def test_the_selection_matters():
    assert abs(blockwise("glm", True).language - blockwise("glm", False).language) > 1e-3


@both_stages
def test_the_sum_and_the_averaged_target_have_one_gradient_through_the_model(sparse):
    found, averaged = blockwise("glm", sparse), written_out("glm", sparse, averaged=True)
    assert_close(found.of_indexer, averaged.of_indexer)
    assert found.indexer > averaged.indexer + 1e-3


@both_stages
def test_either_loss_keeps_to_its_own_weights(sparse):
    found = blockwise("glm", sparse)
    for leaf in jax.tree.leaves(found.of_language.indexer):
        assert not np.any(leaf)
    for leaf in jax.tree.leaves(dataclasses.replace(found.of_indexer, indexer=None)):
        assert not np.any(leaf)
    for leaf in jax.tree.leaves(found.of_indexer.indexer):
        assert np.all(np.any(np.asarray(leaf).reshape(len(leaf), -1), axis=1))  # every F layer's
    rest = jax.tree_util.tree_leaves_with_path(dataclasses.replace(found.of_language, indexer=None))
    assert [jax.tree_util.keystr(path) for path, leaf in rest if not np.any(leaf)] == [".moe.router_bias"]


def assert_slope(function, params, direction, step):
    """The gradient of a scalar function along a direction against a central difference."""
    value, gradient = jax.jit(jax.value_and_grad(function))(params)
    value = jax.jit(function)
    there, back = (value(jax.tree.map(lambda w, d, by=by: w + by * d, params, direction)) for by in (step, -step))
    expected = float(there - back) / (2 * step)
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.vdot(g, d), gradient, direction)))
    assert abs(expected) > 5e-3 and abs(found - expected) < 0.04 * abs(expected)


def direction(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: np.std(w) * rng.normal(size=w.shape).astype(np.float32), tree)


@both_stages
def test_the_divergence_has_the_slope_of_finite_differences(sparse):
    """In steps small enough that no selection changes."""
    case = CASES["glm"]

    def function(indexers):
        return ours(dataclasses.replace(case.params, indexer=indexers), case, sparse).indexer

    assert_slope(function, case.params.indexer, direction(case.params.indexer), 1e-4 if sparse else 1e-3)


def test_the_language_loss_has_the_slope_of_finite_differences():
    """Of a model without experts, whose choice would jump."""
    case = Case(CASES["glm"].fields | {"first_k_dense_replace": 4}, "FFSS", 2, (26, 26))

    def function(params):
        options = {"indexers": False, "sparse": False, "compute_dtype": jnp.float32}
        return losses(params, case.tokens, case.config, case.schedule, **options).language

    assert_slope(function, case.params, direction(case.params), 1e-3)


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.slow), True], ids=["dense", "sparse"])
def test_attention_by_bits_gives_the_same(sparse, monkeypatch):
    """What Hopper's kernels are given, here with their references."""
    whole = blockwise("glm", sparse)
    monkeypatch.setattr(ops, "trains_by_kernels", lambda *_: True)
    by_bits = blockwise.__wrapped__("glm", sparse)
    np.testing.assert_allclose((by_bits.language, by_bits.indexer), (whole.language, whole.indexer), rtol=1e-5)
    assert_close(by_bits.of_language, whole.of_language)
    assert_close(by_bits.of_indexer, whole.of_indexer)


@pytest.mark.slow
@both_stages
def test_causal_parts_do_not_change_the_result(sparse, monkeypatch):
    """25 queries in parts of 6, 6, 6 and 7, each with the keys up to its end."""
    whole = blockwise("glm", sparse)
    monkeypatch.setattr(formulas, "CAUSAL_FROM", 25)
    cut = blockwise.__wrapped__("glm", sparse)
    np.testing.assert_allclose((cut.language, cut.indexer), (whole.language, whole.indexer), rtol=1e-5)
    assert_close(cut.of_language, whole.of_language)
    assert_close(cut.of_indexer, whole.of_indexer)


@both_stages
def test_blocks_do_not_change_the_result(sparse, monkeypatch):
    """25 queries in blocks of 4 leave a last one of 1."""
    case, whole = CASES["glm"], blockwise("glm", sparse)
    b, s = case.tokens.shape[0], case.tokens.shape[1] - 1
    row = 4 * s * (case.config.num_heads + case.config.index_n_heads)
    monkeypatch.setattr(formulas, "SCORE_BYTES", 4 * b * row)
    assert block_rows(s, b * row, formulas.SCORE_BYTES) == 4
    cut = blockwise.__wrapped__("glm", sparse)
    np.testing.assert_allclose((cut.language, cut.indexer), (whole.language, whole.indexer), rtol=1e-5)
    assert_close(cut.of_language, whole.of_language)
    assert_close(cut.of_indexer, whole.of_indexer)


LONG = 32768


def shapes(jaxpr):
    """Of every value made in a program and in the programs inside it."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars if hasattr(var.aval, "shape"))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@both_stages
def test_nothing_is_quadratic_at_long_context(sparse):
    config, schedule = Config.from_hf(CASES["glm"].fields | {"index_topk": 2048}), CASES["glm"].schedule
    params = shape_structs(config, schedule, jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, LONG + 1), jnp.int32)

    def loss(params, tokens):
        found = losses(params, tokens, config, schedule, indexers=True, sparse=sparse)
        return found.language + found.indexer

    traced = jax.jit(jax.grad(loss)).trace(params, tokens)
    largest = max(math.prod(shape) for shape in shapes(traced.jaxpr.jaxpr))
    # Scores of one block of queries, or two numbers for every query and selected key, where [S, T] is 2^30.
    assert distill.SCORE_BYTES // 8 < largest < LONG * LONG // 7


def test_divergence_is_zero_where_both_agree_and_where_nothing_is_visible():
    mask = jnp.arange(6) < jnp.array([0, 1, 4])[:, None]
    scores = jnp.array(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    target = jnp.nan_to_num(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1))
    np.testing.assert_allclose(divergence(target, scores, mask), 0, atol=1e-6)
    uniform = jnp.where(mask, 1 / jnp.maximum(mask.sum(-1, keepdims=True), 1), 0)
    gradient = jax.grad(lambda s: divergence(uniform, s, mask).sum())(scores)
    np.testing.assert_allclose(gradient, jnp.where(mask, target - uniform, 0), atol=1e-6)


def test_the_forms_differ_by_the_jensen_shannon_divergence():
    rng = np.random.default_rng(1)
    mask = jnp.tril(jnp.ones((9, 9), bool))[None]
    scores = jnp.asarray(rng.normal(size=(1, 9, 9)), jnp.float32)
    logits = jnp.where(mask, jnp.asarray(2 * rng.normal(size=(3, 1, 9, 9)), jnp.float32), -jnp.inf)
    targets = jax.nn.softmax(logits, axis=-1)

    def summed(scores):
        return jnp.mean(jnp.stack([divergence(t, scores, mask) for t in targets]), axis=0)

    p = np.float64(targets)
    floor = np.mean(np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p / p.mean(0), 1)), 0), axis=-1), axis=0)
    assert floor.max() > 0.1
    np.testing.assert_allclose(summed(scores) - averaged_divergence(targets, scores, mask), floor, atol=2e-6)
    np.testing.assert_allclose(
        jax.grad(lambda s: summed(s).sum())(scores),
        jax.grad(lambda s: averaged_divergence(targets, s, mask).sum())(scores),
        atol=2e-6,
    )


def test_without_the_cross_layer_loss_shared_layers_teach_nothing():
    """FFSS: layer 1 serves three, so its own term counts a third, or all of it; layer 0's counts alike."""
    case = CASES["glm"]
    value = {cross: jax.jit(lambda p, cross=cross: ours(p, case, False, cross_layer=cross).indexer) for cross in (True, False)}
    first_two = Case(case.fields | {"num_hidden_layers": 2}, "FF", case.seed, case.lengths)
    of_two = jax.jit(lambda p: ours(p, first_two, False).indexer)(first_two.params)
    np.testing.assert_allclose(value[False](case.params), of_two, rtol=1e-5)
    assert abs(value[True](case.params) - of_two) > 1e-3


def test_bfloat16_arithmetic_is_close_and_leaves_float32_gradients():
    case, exact = CASES["glm"], blockwise("glm", False)

    def loss(params, part="language"):
        return getattr(losses(params, case.tokens, case.config, case.schedule, indexers=True, sparse=False), part)

    rounded = jax.jit(lambda p: (loss(p), loss(p, "indexer")))(case.params)
    np.testing.assert_allclose(rounded, (exact.language, exact.indexer), rtol=0.05)
    gradient = jax.eval_shape(jax.grad(loss), case.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_every_token_of_every_expert_layer_is_counted():
    case = CASES["glm"]
    found = jax.jit(lambda p: ours(p, case, False).tokens_per_expert)(case.params)
    assert found.shape == (2, 8)
    np.testing.assert_array_equal(found.sum(1), 2 * 25 * case.config.num_experts_per_tok)


def test_runs_end_where_a_kind_does():
    config = Config.from_hf(GLM_FIELDS)  # experts from layer 2
    found = [(run.start, run.stop, run.full, run.experts) for run in distill.runs(config, Schedule("FFFSS"))]
    assert found == [(0, 2, True, False), (2, 3, True, True), (3, 5, False, True)]


def test_balancing_moves_experts_towards_their_share():
    found = distill.balance(jnp.zeros((1, 3)), jnp.array([[9, 3, 0]]), 0.1)
    np.testing.assert_allclose(found, [[-0.1, 0.1, 0.1]], atol=1e-7)


def test_what_a_stage_trains():
    case = CASES["glm"]

    def labels(stage):
        found = distill.trainable(case.params, stage)
        assert found.moe.router_bias == "frozen"
        return found.indexer.keys, found.attention.out, found.moe.router, found.embedding

    assert labels("warmup") == ("indexer", "frozen", "frozen", "frozen")
    assert labels("sparse") == ("indexer", "model", "model", "model")
    assert labels("dense") == ("frozen", "model", "model", "model")
    with pytest.raises(ValueError, match="'cooldown'"):
        distill.trainable(case.params, "cooldown")


def test_sparse_needs_indexers():
    case = CASES["glm"]
    with pytest.raises(ValueError, match="needs indexers"):
        losses(case.params, case.tokens, case.config, case.schedule, indexers=False, sparse=True)


@functools.cache
def gradient_of_any_schedule(sparse):
    """One program for every schedule that is given as data."""

    def total(params, traced):
        found = ours(params, WHOLE, sparse, traced=traced)
        return found.language + found.indexer, found

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("sparse, cross_layer", [(False, True), (True, True), (True, False)])
def test_a_traced_schedule_is_the_schedule_compiled_in(sparse, cross_layer):
    def total(params):
        found = ours(params, PART, sparse, cross_layer=cross_layer)
        return found.language + found.indexer, found

    (_, expected), of_expected = jax.jit(jax.value_and_grad(total, has_aux=True))(PART.params)
    traced = jax.tree.map(jnp.asarray, distill.traced_schedule(PART.schedule, cross_layer))
    (_, found), of = gradient_of_any_schedule(sparse)(WHOLE.params, traced)
    np.testing.assert_allclose((found.language, found.indexer), (expected.language, expected.indexer), rtol=1e-5)
    assert float(expected.indexer) > 1e-3
    assert all(float(jnp.abs(leaf[1]).max()) == 0 for leaf in jax.tree.leaves(of.indexer))
    slots_kept = jax.tree.map(lambda a: a[jnp.array([0, 2])], of.indexer)
    assert_close(dataclasses.replace(of, indexer=slots_kept), of_expected)


def test_a_traced_schedule_needs_all_indexers():
    case = CASES["glm"]
    with pytest.raises(ValueError, match="traced schedule needs the indexers of all layers.*FFSS"):
        losses(
            case.params,
            case.tokens,
            case.config,
            case.schedule,
            indexers=True,
            sparse=False,
            traced=distill.traced_schedule(case.schedule),
        )
