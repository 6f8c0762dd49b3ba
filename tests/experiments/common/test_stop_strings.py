"""A completion ends before the first of its stop strings, with the token that completes it."""

import pytest

from experiments.common import text
from experiments.common.stop_strings import first_stop, stop_tokens, tokens_to_stop
from tests.checkpoints_convert.test_tokenizer_files import begin, save_tokenizer


@pytest.mark.parametrize(
    ("stops", "begins", "tokens"),
    [
        (["c"], 2, 3),
        (["cd"], 2, 4),
        (["e", "cd"], 2, 4),
        (["e", "f"], 4, 5),
        (["é"], 6, 8),  # of two bytes
        (["x"], None, None),
        ([], None, None),
    ],
)
def test_where_a_text_ends_and_after_how_many_tokens(stops, begins, tokens):
    said = "abcdefé end"
    drawn = list(said.encode())
    assert first_stop(said, stops) == begins
    assert tokens_to_stop(drawn, stops, text.Bytes().decode) == tokens
    if tokens is not None:
        assert tokens_to_stop(drawn[:tokens], stops, text.Bytes().decode) == tokens
        assert tokens_to_stop(drawn[: tokens - 1], stops, text.Bytes().decode) is None


def test_a_stop_string_that_is_a_token_and_no_text_is_a_stop_token(tmp_path):
    encoder = text.tokenizer(save_tokenizer(tmp_path / "model", begin), 300)
    assert stop_tokens(["</s>", "a", "the", "the cat"], encoder) == {259}
    assert stop_tokens(["</s>"], text.Bytes()) == set()
