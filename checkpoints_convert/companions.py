"""The files beside the weights that belong to a checkpoint: which are copied, and which tokens end a text."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from indexcache_jax.config import Config
from indexcache_jax.config_json import token_ids
from indexcache_jax.foreign import MAX_LARGE, is_there, read_json, shown

# What a conversion copies beside the weights: these names and no others.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
GENERATION_CONFIG, TOKENIZER_CONFIG, TOKENIZER, ADDED_TOKENS = (
    *("generation_config.json", "tokenizer_config.json"),
    *("tokenizer.json", "added_tokens.json"),
)


def find_companions(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files of COMPANIONS in a checkpoint directory.

    ValueError for one that is no regular file, or a link out of the directory: a stranger's link would make a copy of
    anything that the user can read. Links into the blobs of the cache that a directory is a snapshot of are what
    huggingface_hub makes.
    """
    inside = directory.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parent.parent / "blobs")
    found = []
    for name in COMPANIONS:
        path = directory / name
        if not is_there(path):
            continue
        target = path.resolve()
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise ValueError(f"{path}: is a link out of {directory}, to {target}; copy that file here if it belongs here")
        if not path.is_file():
            raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'is a link to a file that is not there'}")
        found.append(path)
    return found


def with_stop_tokens(config: Config, directory: pathlib.Path) -> Config:
    """The config with every token that ends a text by config.json, generation_config.json or tokenizer_config.json.

    config.json's come first, each once. ValueError, naming file and field, for what is no token.
    """
    more: list[int] = []
    if is_there(path := directory / GENERATION_CONFIG):
        more += _numbers(path, read_json(path))
    if is_there(path := directory / TOKENIZER_CONFIG):
        fields = read_json(path)
        more += _numbers(path, fields)
        more += _named(path, fields)
    every = dict.fromkeys([*config.eos_token_ids, *more])
    return dataclasses.replace(config, eos_token_ids=tuple(every))


def _numbers(path: pathlib.Path, fields: Mapping[str, Any]) -> tuple[int, ...]:
    try:
        return token_ids("eos_token_id", fields.get("eos_token_id"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def content_of(value: Any) -> str | None:
    """The text of a token that is written as a string or as an object with a "content"; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def is_number(text: str) -> bool:
    """Whether a text, such as a key of JSON, is the number of a token in decimal digits."""
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _named(path: pathlib.Path, fields: Mapping[str, Any]) -> list[int]:
    """The number of tokenizer_config.json's eos_token, where one of the tokenizer's files has it."""
    name = fields.get("eos_token")
    if name is None:
        return []
    if (text := content_of(name)) is None:
        raise ValueError(f"{path}: eos_token: {shown(name)} is not a token's text")
    declared = fields.get("added_tokens_decoder")
    for number, token in (declared if isinstance(declared, Mapping) else {}).items():
        if content_of(token) == text and is_number(number):
            return [int(number)]
    for file in (ADDED_TOKENS, TOKENIZER):
        if is_there(beside := path.with_name(file)):
            number = _number_in(read_json(beside, MAX_LARGE), text)
            if number is not None:
                return [number]
    return []


def _number_in(fields: Mapping[str, Any], text: str) -> int | None:
    """A token's number in the object of added_tokens.json or tokenizer.json."""
    model = fields.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    places: list[Any] = [fields, vocab]
    for token in fields["added_tokens"] if isinstance(fields.get("added_tokens"), list) else []:
        if isinstance(token, Mapping) and token.get("content") == text:
            places.insert(0, {text: token.get("id")})
    if isinstance(vocab, list):  # of a unigram model: [text, score] in order
        places.append({entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry and entry[0] == text})
    found = (place.get(text) for place in places if isinstance(place, Mapping))
    return next((number for number in found if type(number) is int), None)
