"""What every implementation of indexer_topk must do, on inputs whose scores are exact however they are summed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import indexer_topk

# Shared, so that equal shapes compile once.
run = jax.jit(indexer_topk, static_argnames=("k_select", "implementation", "return_scores"))
FORMATS = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}
OTHER_FORMATS = {"float32": jnp.float32, "int8": jnp.int8}  # int8 knows no NaN, so not every property applies
SCALED = ("fp8", "int8")


def numpy_scores(queries, keys, head_weights, key_scales=None):
    """I = scale_t * sum_h w_h relu(q_h . k_t) in float64: [B, S, Hi, Di], [B, T, Di], [B, S, Hi] -> [B, S, T]."""
    dots = np.einsum("bshd,btd->bsht", *(np.asarray(x, np.float64) for x in (queries, keys)))
    total = np.einsum("bsht,bsh->bst", np.maximum(dots, 0), np.asarray(head_weights, np.float64))
    return total if key_scales is None else total * np.asarray(key_scales, np.float64)[:, None]


def numpy_select(scores, visible, k):
    """The k best of scores [..., T] of which each row sees the first visible[...]: ascending, then -1."""
    out = np.full((*visible.shape, k), -1, np.int32)
    for row in np.ndindex(visible.shape):
        seen = scores[row][: max(visible[row], 0)]
        seen = np.where(np.isnan(seen), -np.inf, seen)
        best = np.sort(np.argsort(-seen, kind="stable")[:k])
        out[row][: best.size] = best
    return out


def assert_scores(found, scores, positions):
    """`found` [..., k] are what scores [..., T] hold at positions [..., k], as they are compared."""
    expected = np.take_along_axis(np.asarray(scores, np.float32), np.maximum(positions, 0), axis=-1)
    expected = np.where((positions < 0) | np.isnan(expected), -np.inf, expected)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    assert not np.signbit(found[found == 0]).any()


def _arrays(queries, keys, head_weights, key_scales, number_format):
    kind = (FORMATS | OTHER_FORMATS)[number_format]
    scales = jnp.asarray(key_scales, jnp.float32) if number_format in SCALED else None
    return (jnp.asarray(queries, kind), jnp.asarray(keys, kind), jnp.asarray(head_weights, jnp.float32)), scales


def check_integers(implementation: str, number_format: str, *, shape: tuple[int, ...], k: int, seed: int = 0) -> None:
    """Ragged rows, causal and not, of small integers (so with many ties) against NumPy, and the same with the scores."""
    b, s, heads, width, t = shape
    rng = np.random.default_rng(seed)
    queries, keys = rng.integers(-2, 3, (b, s, heads, width)), rng.integers(-2, 3, (b, t, width))
    weights, scales = rng.integers(-3, 4, (b, s, heads)) / 4, 2.0 ** rng.integers(-2, 3, (b, t))
    positions, lengths = rng.integers(-1, t + 3, (b, s)), rng.integers(0, t + 1, b)
    lengths[0], positions[0, -1] = t, t - 1
    arrays, key_scales = _arrays(queries, keys, weights, scales, number_format)
    options = dict(k_select=k, q_positions=positions, kv_lengths=lengths, implementation=implementation)
    scores = numpy_scores(queries, keys, weights, scales if number_format in SCALED else None)
    out = run(*arrays, **options, key_scales=key_scales)
    np.testing.assert_array_equal(out, numpy_select(scores, np.minimum(positions + 1, lengths[:, None]), k))
    again, found = map(np.asarray, run(*arrays, **options, key_scales=key_scales, return_scores=True))
    np.testing.assert_array_equal(out, again)
    assert_scores(found, scores, again)


def with_scores(values: np.ndarray, heads: int = 8, width: int = 128):
    """Queries, keys and weights that give key t the score values[t], an integer below 4096 in magnitude, of one sign.

    Keys hold a value's digits in base 16, which even 8 bits represent exactly.
    """
    assert np.all(values >= 0) or np.all(values <= 0)
    digits = np.abs(values).astype(int)[:, None] // [256, 256, 256, 256, 16, 1] % 16
    queries, keys = np.zeros((1, 1, heads, width)), np.zeros((1, values.size, width))
    queries[0, 0, 0, :6], keys[0, :, :6] = [64, 64, 64, 64, 16, 1], digits  # 256 would not fit int8
    weights = np.zeros((1, 1, heads))
    weights[0, 0, 0] = -1 if np.any(values < 0) else 1
    return queries, keys, weights


T = 3000
_STEPS = np.arange(T)
PATTERNS: dict[str, np.ndarray] = {
    "rising": _STEPS,
    "falling": _STEPS[::-1],
    "rising and negative": _STEPS - T,
    "constant": np.full(T, 7),
    "constant and negative": np.full(T, -7),
    "all zero": np.zeros(T),
    "zeros with a few others": np.where(_STEPS % 97 == 5, 3, 0),
    "best in one block": np.where(abs(_STEPS - 1500) < 200, 1000 + _STEPS % 50, _STEPS % 1000),
    "two values": np.where(_STEPS % 3 == 0, 9, 8),
    "best first and last": np.where((_STEPS < 100) | (_STEPS >= T - 50), 4000, _STEPS % 7),
}


def select_one(implementation: str, number_format: str, queries, keys, weights, k: int, scales=None) -> np.ndarray:
    t = keys.shape[1]
    arrays, key_scales = _arrays(queries, keys, weights, np.ones((1, t)) if scales is None else scales, number_format)
    out = run(
        *arrays,
        k_select=k,
        q_positions=np.full((1, 1), t - 1),
        kv_lengths=np.full((1,), t),
        implementation=implementation,
        key_scales=key_scales,
    )
    return np.asarray(out)[0, 0]


def check_pattern(implementation: str, number_format: str, name: str, k: int) -> None:
    values = PATTERNS[name]
    out = select_one(implementation, number_format, *with_scores(values), k)
    np.testing.assert_array_equal(out, numpy_select(values.astype(float)[None], np.array([T]), k)[0])


def check_nan_is_lowest(implementation: str, number_format: str) -> None:
    """NaN keys lose against every number, and among themselves the first ones win."""
    values = np.where(_STEPS % 5 == 0, -4000, -(_STEPS % 900))
    queries, keys, weights = with_scores(values)
    keys[0, ::2] = np.nan
    scores = np.where(_STEPS % 2 == 0, np.nan, values)
    for k in (1000, 1700):
        out = select_one(implementation, number_format, queries, keys, weights, k)
        np.testing.assert_array_equal(out, numpy_select(scores[None], np.array([T]), k)[0])


def check_nan_query(implementation: str, number_format: str) -> None:
    """A NaN anywhere in a query makes all of its scores NaN, in whichever head it sits: the first keys are taken."""
    queries, keys, weights = with_scores(_STEPS, heads=8)
    queries, keys, weights = np.tile(queries, (8, 5, 1, 1)), np.tile(keys, (8, 1, 1)), np.tile(weights, (8, 5, 1))
    for head in range(8):
        queries[head, 2, head, 100] = np.nan
    arrays, key_scales = _arrays(queries, keys, weights, np.ones((8, T)), number_format)
    positions, lengths = np.full((8, 5), T - 1), np.full(8, T)
    out = run(
        *arrays,
        k_select=10,
        q_positions=positions,
        kv_lengths=lengths,
        implementation=implementation,
        key_scales=key_scales,
    )
    assert np.asarray(out).tolist() == 8 * [[list(range(10) if i == 2 else range(T - 10, T)) for i in range(5)]]


def check_infinite_scores(implementation: str) -> None:
    """-inf ties with NaN, +inf wins. Infinite keys exist in bfloat16 only."""
    queries, keys, weights = with_scores(-(_STEPS % 900))
    queries[0, 0], weights[...] = queries[0, 0, 0], -1 / 8  # a head of zeros would make NaN of an infinite key
    keys[0, 10:20, 0], keys[0, 15, 0] = np.inf, np.nan
    scores = np.where((_STEPS >= 10) & (_STEPS < 20), -np.inf, -(_STEPS % 900.0))
    out = select_one(implementation, "bfloat16", queries, keys, weights, T - 5)
    np.testing.assert_array_equal(out, numpy_select(scores[None], np.array([T]), T - 5)[0])
    out = select_one(implementation, "bfloat16", queries, keys, -weights, 9)
    assert out.tolist() == [10, 11, 12, 13, 14, 16, 17, 18, 19]


def check_causal_prompt(implementation: str, number_format: str) -> None:
    """Query s sees keys 0 ... s: all of them at the front, k of them later; batch rows end where their keys end."""
    s = 300
    rng = np.random.default_rng(3)
    queries, keys = rng.integers(-2, 3, (2, s, 16, 64)), rng.integers(-2, 3, (2, s, 64))
    weights, scales = rng.integers(0, 4, (2, s, 16)), np.ones((2, s))
    arrays, key_scales = _arrays(queries, keys, weights, scales, number_format)
    out = run(
        *arrays,
        k_select=64,
        q_positions=np.tile(np.arange(s), (2, 1)),
        kv_lengths=np.array([s, 201]),
        implementation=implementation,
        key_scales=key_scales,
    )
    visible = np.minimum(np.arange(1, s + 1), np.array([[s], [201]]))
    np.testing.assert_array_equal(np.asarray(out), numpy_select(numpy_scores(queries, keys, weights), visible, 64))


def check_batch_changes_nothing(implementation: str, number_format: str) -> None:
    """A row gives the same positions alone as beside others, on inputs whose sums do round."""
    rng = np.random.default_rng(4)
    b, s, heads, width, t = 3, 5, 32, 128, 1200
    kind = (FORMATS | OTHER_FORMATS)[number_format]
    queries = jnp.asarray(rng.standard_normal((b, s, heads, width)), kind)
    keys = jnp.asarray(rng.standard_normal((b, t, width)), kind)
    weights = jnp.asarray(rng.standard_normal((b, s, heads)), jnp.float32)
    scales = jnp.asarray(rng.random((b, t)) + 0.5, jnp.float32) if number_format in SCALED else None
    positions, lengths = rng.integers(1000, t, (b, s)), np.full(b, t)

    def part(rows: slice, queries_of: slice) -> np.ndarray:
        out = run(
            queries[rows, queries_of],
            keys[rows],
            weights[rows, queries_of],
            k_select=100,
            q_positions=positions[rows, queries_of],
            kv_lengths=lengths[rows],
            implementation=implementation,
            key_scales=None if scales is None else scales[rows],
        )
        return np.asarray(out)

    together = part(slice(None), slice(None))
    np.testing.assert_array_equal(part(slice(1, 2), slice(None)), together[1:2])
    np.testing.assert_array_equal(part(slice(None), slice(4, 5)), together[:, 4:5])


def check_scores(implementation: str, number_format: str) -> None:
    """Scores of a row that sees less than k keys, of ties, of NaN and of zeros, which are those of a negative weight."""
    values = -np.where(_STEPS % 5 == 0, 0, _STEPS % 900)
    queries, keys, weights = with_scores(values)
    keys[0, ::7] = np.nan
    scores = np.where(_STEPS % 7 == 0, np.nan, values)[None, None]
    arrays, key_scales = _arrays(queries, keys, weights, np.ones((1, T)), number_format)
    options = dict(implementation=implementation, key_scales=key_scales, kv_lengths=np.full((1,), T), return_scores=True)
    for k, visible in ((100, 60), (100, 100), (100, T), (T, T)):
        positions, found = run(*arrays, k_select=k, q_positions=np.full((1, 1), visible - 1), **options)
        np.testing.assert_array_equal(positions, numpy_select(scores, np.array([[visible]]), k))
        assert_scores(np.asarray(found), scores, np.asarray(positions))


PROPERTIES: dict[str, Callable[[str, str], None]] = {
    "NaN is the lowest": check_nan_is_lowest,
    "a NaN query takes the first keys": check_nan_query,
    "a causal prompt": check_causal_prompt,
    "the batch changes nothing": check_batch_changes_nothing,
    "scores come with the positions": check_scores,
}
