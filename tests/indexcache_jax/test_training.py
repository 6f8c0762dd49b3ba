"""The training step: what each stage changes, its learning rates, schedules as data, and what a token costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from indexcache_jax import distill, sharding, training
from indexcache_jax.distill import traced_schedule
from indexcache_jax.params import abstract, with_schedule
from indexcache_jax.training import Stage
from tests.support.tiny_models import GLM_FIELDS, Case

CASE = Case(GLM_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 2, "vocab_size": 258}, "FS", 0)
WITH_EXPERTS = Case(GLM_FIELDS | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 258}, "F", 0)
WARMUP = Stage("warm-up", "warmup", 3, 1, 24, 0.0, 1e-2, lr_warmup_steps=1, compute_dtype="float32")
SPARSE = Stage("sparse", "sparse", 3, 1, 24, 1e-3, 1e-2, lr_warmup_steps=1, compute_dtype="float32")


def take_steps(stage, tokens, case=CASE):
    config, schedule = case.config, case.schedule
    params = jax.tree.map(jnp.copy, case.params)
    state = training.init_optimiser_state(params, stage, config, schedule)
    metrics = []
    for rows in tokens:
        params, state, found = training.step(params, state, jnp.asarray(rows), config, schedule, stage)
        metrics.append(np.asarray(found))
    return params, state, np.array(metrics)


def batches(stage, count):
    return np.random.default_rng(0).integers(0, 256, (count, stage.accumulate, stage.rows, stage.context + 1)).astype(np.int32)


def changed(params, case=CASE):
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, case.params)
    return {jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal}


def test_the_warm_up_changes_indexers_alone_and_keeps_state_for_them_alone():
    params, state, metrics = take_steps(WARMUP, batches(WARMUP, 3))
    assert changed(params) == {f".indexer.{name}" for name in ("queries", "keys", "key_norm", "key_norm_bias", "head_weights")}
    trained = sum(leaf.size for leaf in jax.tree.leaves(CASE.params.indexer))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * trained + 20
    assert np.isfinite(metrics).all()


def test_the_sparse_stage_changes_everything_but_the_routers_bias():
    case = WITH_EXPERTS
    params, _, _ = take_steps(SPARSE, batches(SPARSE, 2), case)
    every = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert changed(params, case) == every - {".moe.router_bias"}


def test_the_two_rates_are_apart_and_balancing_is_by_rule():
    still = dataclasses.replace(SPARSE, model_learning_rate=0.0, balance_speed=0.1)
    params, _, _ = take_steps(still, batches(SPARSE, 1), WITH_EXPERTS)
    assert {name.split(".")[1] for name in changed(params, WITH_EXPERTS)} == {"moe"}  # the rates start from 0
    np.testing.assert_allclose(jnp.abs(params.moe.router_bias - WITH_EXPERTS.params.moe.router_bias).max(), 0.1, atol=1e-6)
    params, _, _ = take_steps(still, batches(SPARSE, 2), WITH_EXPERTS)
    assert {name for name in changed(params, WITH_EXPERTS) if "indexer" not in name} == {".moe.router_bias"}


def test_weights_that_are_not_finite_are_named_where_they_train():
    broken = CASE.params.replace(final_norm=CASE.params.final_norm.at[1].set(jnp.inf))
    assert training.non_finite_weights(CASE.params, "sparse") == []
    assert training.non_finite_weights(broken, "sparse") == [".final_norm"]
    assert training.non_finite_weights(broken, "warmup") == []


def test_the_state_of_a_weight_lies_where_the_weight_does():
    mesh = AbstractMesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    case = WITH_EXPERTS
    of_params = sharding.shardings(abstract(case.config, case.schedule), mesh, sharding.TRAINING)
    for stage in (WARMUP, SPARSE):
        state = jax.eval_shape(
            lambda params, stage=stage: training.init_optimiser_state(params, stage, case.config, case.schedule), case.params
        )
        placed = training.optimiser_shardings(state, of_params)
        assert jax.tree.structure(placed) == jax.tree.structure(state)
        trained = distill.trainable(of_params, stage.kind)
        for kind in ("model", "indexer"):
            expected = jax.tree.map(lambda label, where, kind=kind: where if label == kind else None, trained, of_params)
            adam = placed.inner_states[kind].inner_state[1][0]
            for moment in (adam.mu, adam.nu):
                assert jax.tree.leaves(moment) == jax.tree.leaves(expected)
            assert adam.count.spec == PartitionSpec()
    assert placed.inner_states["model"].inner_state[1][0].mu.moe.gate_up.spec[1] == ("data", "context", "tensor")
    assert placed.inner_states["model"].inner_state[1][0].nu.moe.shared.down.spec == PartitionSpec(None, None, "data")


def test_what_is_split_by_labels_is_merged_again():
    tree, labels = {"a": 1, "b": 2, "c": (3,)}, {"a": "frozen", "b": "model", "c": ("indexer",)}
    trained, frozen = training.split(tree, labels)
    assert trained == {"a": None, "b": 2, "c": (3,)} and frozen == {"a": 1, "b": None, "c": (None,)}
    assert training.merge(trained, frozen) == tree


def test_accumulated_rows_are_one_batch():
    whole = dataclasses.replace(WARMUP, rows=4)
    parts = dataclasses.replace(WARMUP, rows=2, accumulate=2)
    (_, state, one), (_, other_state, other) = take_steps(whole, batches(whole, 1)), take_steps(parts, batches(parts, 1))
    np.testing.assert_allclose(one[:, [0, 1, 3]], other[:, [0, 1, 3]], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):  # Adam's means of the gradients
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(jnp.asarray(a)).max()))


def test_training_lowers_the_divergence():
    stage = dataclasses.replace(WARMUP, steps=30, rows=2)
    _, _, metrics = take_steps(stage, batches(stage, 30))
    assert metrics[-5:, 1].mean() < 0.9 * metrics[:5, 1].mean()


def test_the_rate_is_optaxs_warm_up_and_cosine():
    for steps in (1, 3, 40, 1000):
        warmup = max(1, min(WARMUP.lr_warmup_steps, steps // 5))
        expected = optax.warmup_cosine_decay_schedule(0.0, 2.0, warmup, max(steps, warmup + 1), 2.0 * WARMUP.final_lr_fraction)
        found = training.learning_rate(WARMUP, 2.0, jnp.int32(steps))
        counts = np.unique(np.linspace(0, steps - 1, 20).astype(int))
        np.testing.assert_allclose([found(i) for i in counts], [expected(i) for i in counts], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def all_full():
    return Case(CASE.fields, "FF", 0)


@pytest.mark.parametrize("stage", [WARMUP, SPARSE], ids=["warm-up", "sparse"])
def test_a_schedule_as_data_trains_as_one_compiled_in(stage, all_full):
    rows = jnp.asarray(batches(stage, 1)[0])
    expected, expected_state, expected_metrics = take_steps(stage, [rows] * 2)
    params, state = (
        jax.tree.map(jnp.copy, all_full.params),
        training.init_optimiser_state(all_full.params, stage, CASE.config, all_full.schedule),
    )
    traced = traced_schedule(CASE.schedule)
    for _ in range(2):
        length = jnp.int32(stage.steps)
        arguments = CASE.config, all_full.schedule, stage.program, length, traced
        params, state, metrics = training.step(params, state, rows, *arguments)
    np.testing.assert_allclose(metrics, expected_metrics[-1], rtol=1e-4)
    kept = with_schedule(params, all_full.schedule, CASE.schedule)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, expected)


def test_flops_count_what_a_token_needs():
    """Against products counted one by one."""
    case = Case(GLM_FIELDS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}, "FS", 0)
    s, k = 24, 8
    attended = {"dense": sum(range(1, s + 1)) / s, "sparse": sum(min(i, k) for i in range(1, s + 1)) / s}
    # Per layer: queries down and up, latents down, keys and values up, output; then logits and values of attended keys.
    layer = 64 * 48 + 48 * 4 * 40 + 64 * 48 + 32 * 4 * (24 + 20) + 4 * 20 * 64
    pair = 4 * (40 + 20)
    mlps = 3 * 64 * 128 + 3 * 64 * 32 * (2 + 1) + 64 * 8
    head = 64 * 97
    indexer, score = 48 * 16 * 32 + 64 * 32 + 64 * 16, 16 * 32 + 16

    def model(keys):
        return 2 * (layer + pair * keys) + mlps + head

    def count(stage):
        return training.flops_per_token(case.config, case.schedule, stage) / 2

    dense = dataclasses.replace(WARMUP, kind="dense")
    assert count(dense) == pytest.approx(3 * model(attended["dense"]))
    expected = model(attended["dense"]) + 2 * indexer + 3 * score * attended["dense"]
    assert count(WARMUP) == pytest.approx(expected)
    expected = 3 * model(attended["sparse"]) + 2 * indexer + 3 * score * attended["sparse"] + score * attended["dense"]
    assert count(SPARSE) == pytest.approx(expected)


def test_neighbours_are_drawn_together_by_the_gradient_of_their_differences():
    weights = jax.random.normal(jax.random.key(0), (4, 3, 2))
    decay = training.neighbour_decay(0.6)
    found, _ = decay.update({"w": jnp.ones_like(weights)}, decay.init({"w": weights}), {"w": weights})
    expected = jax.grad(lambda w: 0.6 / 4 * jnp.sum((w[1:] - w[:-1]) ** 2))(weights)
    np.testing.assert_allclose(found["w"], 1 + expected, rtol=1e-5, atol=1e-6)


def test_neighbour_decay_is_of_matrices_that_attend():
    drawn = dataclasses.replace(SPARSE, neighbour_decay=100.0)
    (alone, _, _), (together, _, _) = (take_steps(stage, batches(SPARSE, 2)) for stage in (SPARSE, drawn))
    matrices = {f".attention.{name}" for name in ("q_down", "q_up", "kv_down", "k_up", "v_up", "out")}
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), alone, together)
    assert {jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal} == matrices
    apart = [float(jnp.linalg.norm(jnp.diff(p.attention.q_down, axis=0))) for p in (CASE.params, alone, together)]
    assert apart[2] < 0.95 * apart[1] and abs(apart[1] / apart[0] - 1) < 0.02
