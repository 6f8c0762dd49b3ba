"""Drawing the next token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from indexcache_jax.serving.sampling import GREEDY, Sampling, by_row, for_all, row_keys, sample


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2), {0, 1}),
        (Sampling(1.0, top_k=9), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.7), {0, 1}),
        (Sampling(1.0, top_p=0.4), {0}),
        (Sampling(1.0, top_k=3, top_p=0.85), {0, 1}),  # of the three kept, two have 0.84 + 0.01
        (Sampling(1.0, top_p=1e-46), {0}),
        (Sampling(1e-3), {0}),
        (Sampling(0.0), {0}),
    ],
)
def test_sampling_draws_from_what_it_keeps_and_by_probability(sampling, kept):
    probabilities = np.array([0.5, 0.3, 0.14, 0.06])
    if sampling == Sampling(1.0, top_k=3, top_p=0.85):
        assert (0.5 + 0.3) / 0.94 > 0.85  # after top_k, top_p counts among what that kept
    n = 4000
    logits = jnp.broadcast_to(jnp.log(probabilities), (n, 4))
    drawn = np.asarray(sample(logits, sampling, jax.random.split(jax.random.key(0), n)))
    assert set(drawn.tolist()) == kept
    expected = np.where(np.isin(np.arange(4), list(kept)), probabilities, 0)
    expected = expected / expected.sum() if sampling.temperature == 1 else np.eye(4)[0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / n, expected, atol=0.03)


def test_rows_with_settings_of_their_own_draw_what_they_draw_where_all_have_them():
    settings = [
        Sampling(0.7),
        GREEDY,
        Sampling(1.3, top_k=5),
        Sampling(2.0, top_p=0.6),
        Sampling(1.0, top_k=2**40, top_p=1e-46),
        Sampling(1e300, top_k=7),
        Sampling(1.0, top_k=9, top_p=0.8),
        Sampling(1e-39, top_p=0.5),
    ]
    rows, repeated = len(settings), 200
    logits = jnp.repeat(3 * jax.random.normal(jax.random.key(0), (repeated, 40)), rows, axis=0)
    keys = jax.random.split(jax.random.key(1), rows * repeated)
    together = np.asarray(sample(logits, by_row(settings * repeated), keys)).reshape(repeated, rows)
    for row, setting in enumerate(settings):
        uniform = np.asarray(sample(logits, setting, keys)).reshape(repeated, rows)[:, row]
        np.testing.assert_array_equal(together[:, row], uniform, err_msg=str(setting))
        alone = sample(logits[row::rows], by_row([setting] * repeated), keys[row::rows])
        np.testing.assert_array_equal(together[:, row], alone)
    assert len(np.unique(together[:, 0])) > 20  # of 40: it is drawn, not chosen


def test_rows_that_are_all_greedy_need_no_settings_as_arrays():
    assert by_row([GREEDY, Sampling(1e-40, top_k=3)]) is GREEDY


def test_one_program_draws_with_every_temperature_and_top_p():
    """The tokens are those of programs that know the settings when they are compiled."""
    logits = 3 * jax.random.normal(jax.random.key(0), (500, 40))
    keys, traced = jax.random.split(jax.random.key(1), 500), []

    @jax.jit
    def draw(sampling):
        traced.append(sampling)
        return sample(logits, sampling, keys)

    for setting in (Sampling(0.7, 20, 0.9), Sampling(1.3, 20, 0.5), Sampling(2.1, 20, 0.99)):
        np.testing.assert_array_equal(draw(for_all(setting)), draw(setting))
    assert len(traced) == 1 + 3
    assert for_all(Sampling(0.0, top_k=20)) is GREEDY


def test_a_seed_of_each_row_is_as_if_it_were_that_of_all():
    ids, seeds = jnp.array([4, 4, 7, -1]), np.array([3, -5, 3, 2**31 - 1], np.int32)
    each = jax.random.key_data(row_keys(seeds, ids, 2))
    for row, seed in enumerate(seeds):
        np.testing.assert_array_equal(each[row], jax.random.key_data(row_keys(int(seed), ids, 2))[row])


@pytest.mark.parametrize("temperature", [1e-46, 1e-39, 2e-38, 1e-30])
@pytest.mark.parametrize("rest", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_a_temperature_near_0_is_greedy(temperature, rest):
    logits = jnp.tile(jnp.array([200.0, -300.0, 201.0, 7.0]), (50, 1))
    drawn = sample(logits, Sampling(temperature, **rest), jax.random.split(jax.random.key(0), 50))
    assert set(drawn.tolist()) == {2}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_sampling_refuses_values_out_of_range(fields, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**fields)
