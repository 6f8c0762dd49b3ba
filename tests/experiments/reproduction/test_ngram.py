import math

import numpy as np
import pytest

from experiments.reproduction import ngram


def text(data):
    return np.frombuffer(data.encode(), np.uint8)


def plain_loss(train, held_out, order):
    """The recursion as it is written, one byte at a time, counting by search."""

    def count(gram):
        return sum(train[i : i + len(gram)] == gram for i in range(len(train) - len(gram) + 1))

    def probability(byte, context):
        if context is None:
            return 1 / 256
        shorter = probability(byte, context[1:] if context else None)
        followers = [
            train[i + len(context)] for i in range(len(train) - len(context)) if train[i : i + len(context)] == context
        ]
        if not followers:
            return shorter
        return (count(context + byte) + len(set(followers)) * shorter) / (len(followers) + len(set(followers)))

    terms = [-math.log(probability(held_out[i], held_out[i - order + 1 : i])) for i in range(order - 1, len(held_out))]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_loss_is_the_written_one(order):
    train, held_out = "abracadabra, abracadabra, brab", "a bracket, abracax"
    assert ngram.loss(text(train), text(held_out), order) == pytest.approx(plain_loss(train, held_out, order), rel=1e-12)


def test_what_was_seen_is_likelier():
    train = text("the cat sat on the mat. " * 20)
    assert ngram.loss(train, text("the mat sat on the cat. "), 4) < 1.0 < ngram.loss(train, text("zq xv jk wp yb. kq zx vj"), 4)


@pytest.mark.parametrize("order", [0, 8])
def test_orders_that_are_not_served_are_refused(order):
    with pytest.raises(ValueError, match=f"order: {order}"):
        ngram.loss(text("abc"), text("abc"), order)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_distance_is_that_to_the_last_occurrence(n):
    tokens = np.random.default_rng(n).integers(0, 3, 60)
    expected = np.zeros(60, int)
    for i in range(n - 1, 60):
        earlier = [j for j in range(n - 1, i) if (tokens[j - n + 1 : j + 1] == tokens[i - n + 1 : i + 1]).all()]
        expected[i] = i - earlier[-1] if earlier else 0
    np.testing.assert_array_equal(ngram.distance(tokens, n), expected)


def test_distance_of_a_short_text_is_none():
    assert ngram.distance(np.array([1, 2]), 3).tolist() == [0, 0]
    with pytest.raises(ValueError, match="n: 0"):
        ngram.distance(np.array([1, 2]), 0)
