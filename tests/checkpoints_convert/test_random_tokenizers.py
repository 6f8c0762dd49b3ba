"""Tokenizers with random companions, each seeded: the tokens of a text are those that transformers makes of it."""

import json
import random
import shutil

import pytest
from tokenizers import AddedToken

from experiments.common import text
from tests.checkpoints_convert.test_tokenizer_files import (
    TEXTS,
    THINK,
    begin,
    begin_and_end,
    cut_and_filled,
    save_tokenizer,
    token,
)

transformers = pytest.importorskip("transformers", reason="the test extra has it below Python 3.12")
CASES = 400
SAMPLES = (*TEXTS, "<s>the</s>", "x <img> y", "the<think>the", " </s> the", "THE <Think>")
FLAGS = ("lstrip", "rstrip", "normalized", "special", "single_word")


def some(rng, values, share):
    """Each of the values with this probability."""
    return [value for value in values if rng.random() < share]


def with_flags(rng, content):
    return token(content, **{flag: rng.random() < 0.5 for flag in some(rng, FLAGS, 0.5)})


def edit(rng):
    """What is done to a tokenizer before it is saved: a post-processor, truncation, added tokens of its own."""
    steps = [rng.choice([begin, begin_and_end, lambda made: None]), *some(rng, [cut_and_filled], 0.3)]
    if rng.random() < 0.3:
        think = AddedToken("<think>", lstrip=rng.random() < 0.5, normalized=rng.random() < 0.5)
        steps.append(lambda made: made.add_tokens([think, *some(rng, [AddedToken("<user>", rstrip=True)], 0.5)]))

    def apply(made):
        for step in steps:
            step(made)

    return apply


def decoder(rng, own):
    """added_tokens_decoder: some tokens under the numbers that they have, or the next ones."""
    following, found = max(own.values()) + 1, {}
    for content in some(rng, ("<s>", "</s>", "<think>", "<user>"), 0.7):
        number = own.get(content, following)
        following += number == following
        found[str(number)] = with_flags(rng, content)
    return found


def companions(rng, own):
    """The files beside a tokenizer.json with these added tokens, by name."""
    settings = {
        "bos_token": "<s>",
        "eos_token": rng.choice(["</s>", "<end>"]),
        "pad_token": rng.choice(["<pad>", "</s>", None]),
        "mask_token": "<img>",
        "image_token": "<user>",
        "extra_special_tokens": rng.choice([["<extra>"], {"image_token": "<img>"}, []]),
        "additional_special_tokens": ["<user>"],
        "add_bos_token": rng.random() < 0.5,
        "add_eos_token": rng.random() < 0.5,
        "add_prefix_space": rng.random() < 0.5,
        "split_special_tokens": rng.random() < 0.5,
        "model_max_length": 5,
        "truncation_side": "left",
        "padding_side": "left",
        "tokenizer_class": rng.choice(["PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend"]),
        "added_tokens_decoder": decoder(rng, own),
    }
    special = {name: rng.choice(["</s>", "<think>", with_flags(rng, "<user>")]) for name in ("eos_token", "pad_token")}
    special |= {"extra_special_tokens": ["<extra>", "<user>"], "additional_special_tokens": ["<img>"]}
    files = {
        "tokenizer_config.json": dict(some(rng, settings.items(), 0.3)),
        "special_tokens_map.json": dict(some(rng, special.items(), 0.5)),
        "added_tokens.json": THINK,
    }
    return dict(some(rng, files.items(), 0.6))


@pytest.mark.slow
def test_tokens_are_those_of_transformers(tmp_path):
    for seed in range(CASES):
        rng = random.Random(seed)
        directory = save_tokenizer(tmp_path / str(seed), edit(rng))
        added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
        files = companions(rng, {entry["content"]: entry["id"] for entry in added})
        for name, fields in files.items():
            (directory / name).write_text(json.dumps(fields))
        theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(directory), text.tokenizer(directory, 400)
        for sample in SAMPLES:
            assert ours.encode(sample.encode()).tolist() == theirs(sample).input_ids, (seed, sample, files)
        shutil.rmtree(directory)
