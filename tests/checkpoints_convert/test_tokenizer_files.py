"""A text's tokens are those that transformers makes of a prompt, whatever lies beside tokenizer.json."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from checkpoints_convert.tokenizer_files import read_tokenizer
from experiments.common import text

TEXTS = ("", "the cat", "the <think> cat</s>x", "<extra>the  <user>\n cat <pad>", "a<s>b<think>c", "  the cat  ")


def save_tokenizer(directory, edit=lambda tokenizer: None):
    """A byte-level BPE with two merges, and <s>, </s> after the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "th", "the"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])  # 258, 259
    edit(made)
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    return directory


def begin(made):
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 258)])


def begin_and_end(made):
    made.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 258), ("</s>", 259)]
    )


def cut_and_filled(made):
    made.enable_truncation(max_length=3)
    made.enable_padding(length=64, pad_id=259, pad_token="</s>")


def token(content, **flags):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | flags
    return {"content": content, **flags}


THINK = {"<think>": 260, "<user>": 261}
CASES = {
    "tokenizer.json alone": (lambda made: None, {}),
    "truncation and padding": (cut_and_filled, {}),
    "a token before": (begin, {}),
    "tokens before and after": (begin_and_end, {}),
    "added_tokens.json": (begin, {"added_tokens.json": THINK}),
    "added_tokens.json, one of them special": (
        begin,
        {"added_tokens.json": THINK, "special_tokens_map.json": {"eos_token": "</s>", "pad_token": "<user>"}},
    ),
    "added_tokens_decoder": (
        begin,
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "260": token("<think>", special=False, lstrip=True),
                    "261": token("<user>", rstrip=True),
                }
            },
            "added_tokens.json": {"<extra>": 262},  # which counts for nothing beside it
        },
    ),
    "special tokens by name": (
        begin,
        {
            "tokenizer_config.json": {
                "pad_token": "<pad>",
                "eos_token": {"__type": "AddedToken", **token("</s>")},
                "add_bos_token": True,
                "extra_special_tokens": ["<extra>"],
                "image_token": "<user>",
            }
        },
    ),
    "added_tokens.json repeats what tokenizer.json says more of": (
        lambda made: made.add_tokens([AddedToken("<think>", lstrip=True), AddedToken("<user>", rstrip=True)]),
        {"added_tokens.json": THINK | {"<extra>": 262}},
    ),
    "names of a model's own and a list": (
        begin,
        {
            "tokenizer_config.json": {
                "extra_special_tokens": {"image_token": "<extra>"},
                "additional_special_tokens": ["<user>"],
            }
        },
    ),
    "two lists": (
        begin,
        {"tokenizer_config.json": {"extra_special_tokens": ["<extra>"], "additional_special_tokens": ["<user>"]}},
    ),
    "special_tokens_map.json adds to the list": (
        begin,
        {
            "tokenizer_config.json": {"extra_special_tokens": ["<extra>"]},
            "special_tokens_map.json": {"extra_special_tokens": ["<user>", "<extra>"], "additional_special_tokens": ["the"]},
        },
    ),
    "a named token is in the list too": (
        begin,
        {
            "tokenizer_config.json": {"extra_special_tokens": ["<user>"]},
            "special_tokens_map.json": {"pad_token": token("<user>", lstrip=True, rstrip=True)},
        },
    ),
    "a token of the list is none by its properties": (
        begin,
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {"260": token("<user>", special=False)},
                "extra_special_tokens": ["<user>"],
                "split_special_tokens": True,
            }
        },
    ),
    "special_tokens_map.json has the older name": (
        begin,
        {"tokenizer_config.json": {"bos_token": "<s>"}, "special_tokens_map.json": {"additional_special_tokens": ["<user>"]}},
    ),
    "an old name for them": (begin, {"tokenizer_config.json": {"additional_special_tokens": ["<extra>", "<think>"]}}),
    "special tokens are text": (begin, {"tokenizer_config.json": {"split_special_tokens": True, "bos_token": "<s>"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_has_the_tokens_that_transformers_gives_it(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="the test extra has it below Python 3.12")
    edit, beside = CASES[name]
    directory = save_tokenizer(tmp_path / "model", edit)
    for file, content in beside.items():
        (directory / file).write_text(json.dumps(content))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours = text.tokenizer(directory, 300)
    for sample in TEXTS:
        expected = theirs(sample).input_ids
        assert ours.encode(sample.encode()).tolist() == expected, sample
        assert [t.tolist() for t in ours.encode_many([sample.encode(), b"the"])] == [expected, theirs("the").input_ids]
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


def test_a_part_of_a_text_has_only_its_own_tokens(tmp_path):
    encoder = text.tokenizer(save_tokenizer(tmp_path / "model", begin_and_end), 300)
    whole, own = encoder.encode(b"the the").tolist(), encoder.encode(b"the the", begins=False, ends=False).tolist()
    assert whole == [258, 258, *own, 259]
    assert encoder.encode(b"the the", ends=False).tolist() == [258, 258, *own]
    assert encoder.encode(b"the the", begins=False).tolist() == [*own, 259]
    assert encoder.encode(b"<s>the", begins=False, ends=False).tolist() == [258, 257]  # written by whoever wrote the text


def test_a_document_that_the_tokenizer_ends_is_not_ended_twice(tmp_path):
    encoder = text.tokenizer(save_tokenizer(tmp_path / "model", begin_and_end), 300)
    (tmp_path / "a.txt").write_text("the")
    found = text.documents(str(tmp_path / "a.txt"))
    np.testing.assert_array_equal(text.stream(found * 2, encoder, 259), [258, 258, 257, 259] * 2)


def test_added_tokens_tell_tokenizers_apart(tmp_path):
    directory = save_tokenizer(tmp_path / "model")
    before = read_tokenizer(directory)[1]
    assert before.startswith("tokenizer.json ")
    (directory / "added_tokens.json").write_text(json.dumps(THINK))
    assert read_tokenizer(directory)[1] != before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<think>": 500}, r"added_tokens\.json: token '<think>' is 500 there, but 260"),
        ("added_tokens.json", {"<think>": "260"}, r"added_tokens\.json: token '<think>' has the number '260'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": token("<think>")}}, r"token '<think>' is 7 there, but 260"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("a")}}, r"added_tokens_decoder: .* is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"260": 5}}, r"tokenizer_config\.json: 5 is not a token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"260": token("a", lstrip=1)}}, r"is not a token"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, r"extra_special_tokens: 5 is not a list"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, r"fast_tokenizer_files: .* are not read"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json: holds list, not an object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9" * 5000: token("a")}},
            r"decoder: .* is not an object of tokens",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"\u0662": token("a")}}, r"decoder: .* is not an object of"),
        ("tokenizer_config.json", {"bos_token": "\ud800"}, r"tokenizer_config\.json: '\\ud800' is not a token"),
        ("added_tokens.json", {"\ud800": 260}, r"added_tokens\.json: '\\ud800' is not a token"),
    ],
)
def test_tokens_that_contradict_are_refused_with_their_file(tmp_path, file, content, message):
    directory = save_tokenizer(tmp_path / "model")
    (directory / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_tokenizer(directory)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"])
def test_a_link_to_a_file_that_is_not_there_is_not_no_file(tmp_path, name):
    """As in a snapshot of which a blob was not fetched: its tokens would be missing without a word."""
    directory = save_tokenizer(tmp_path / "model")
    (directory / name).symlink_to("../blobs/0")
    with pytest.raises(ValueError, match=rf"{name}: no such file, but a link to one"):
        read_tokenizer(directory)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "qwen.tiktoken", "spiece.model"),
        *("tokenizer_config.json", "added_tokens.json", "tokenization_glm.py", "tokenizer.4.0.json", "special_tokens_map.json"),
    ],
)
def test_another_tokenizer_is_never_taken_for_bytes(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=rf"{name}: belongs to a tokenizer without tokenizer\.json"):
        text.tokenizer(tmp_path, 97)


def test_bytes_are_not_the_tokens_of_a_large_vocabulary(tmp_path):
    assert text.tokenizer(tmp_path, 258).name == "bytes"
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file, and bytes are not the 154880 tokens"):
        text.tokenizer(tmp_path, 154880)


def test_a_tokenizer_that_is_not_there_or_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file, but a link to one"):
        read_tokenizer(tmp_path)
    path.unlink()
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"{}", "not a tokenizer that the tokenizers library reads"),
        (b"", "not a tokenizer that the tokenizers library reads"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_tokenizer(tmp_path)


UNKNOWN_TOKEN = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}], "pair": []}


@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # when it is read
        {"post_processor": UNKNOWN_TOKEN | {"special_tokens": {}}},  # when it is used
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    ],
)
def test_a_panic_of_the_tokenizers_library_is_an_error_like_others(tmp_path, fields):
    path = save_tokenizer(tmp_path / "model") / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizers library fails with it: "):
        text.tokenizer(path.parent, 300).encode(b"the cat")
