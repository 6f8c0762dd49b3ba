"""A checkpoint's tokenizer as transformers makes it: tokenizer.json and the tokens that the files beside it add.

Truncation and padding that were saved with it are off: a text gives all of its tokens and no others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from checkpoints_convert.companions import ADDED_TOKENS, TOKENIZER, TOKENIZER_CONFIG, content_of, is_number
from indexcache_jax.foreign import MAX_LARGE, check_no_pointer, escaped, is_there, read_bytes, read_json, shown

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
# Files from which transformers makes a tokenizer where there is no tokenizer.json, or which tell of one.
_OTHERS = (
    *("tokenizer.model", "*.tiktoken", "tiktoken.model", "tekken.json", "*.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenization_*.py", "tokenizer.*.json", TOKENIZER_CONFIG, ADDED_TOKENS, SPECIAL_TOKENS_MAP),
)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROPERTIES = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(directory: pathlib.Path) -> tuple[tokenizers.Tokenizer, str] | None:
    """The tokenizer of a checkpoint directory and what tells it from others; None where there is no tokenizer's file.

    ValueError, naming the file, for a tokenizer.json that cannot be read, tokens beside it that contradict it, and for a
    tokenizer in another format: none of its tokens may be taken for bytes.
    """
    path = directory / TOKENIZER
    if not is_there(path):
        if others := sorted({found.name for pattern in _OTHERS for found in directory.glob(pattern)}):
            raise ValueError(
                f"{directory / others[0]}: belongs to a tokenizer without {TOKENIZER}, the only format that is read; make one "
                f"with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        return None
    tokenizer, identity = read_file(path)
    declared, special, settings = _tokens_beside(directory, tokenizer.get_added_tokens_decoder())
    with boundary(path):
        _add(tokenizer, declared, special)
        tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
    for number, (token, source) in declared.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise ValueError(f"{source}: token {shown(token.content)} is {number} there, but {found} with {TOKENIZER}")
    if declared or special.every:
        about = json.dumps([[n, str(token)] for n, (token, _) in declared.items()] + [str(token) for token in special.every])
        identity += f" {zlib.crc32(about.encode('utf-8', 'surrogatepass'))}"
    return tokenizer, identity


def read_file(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer that one file describes, and what tells it from others."""
    content = read_bytes(path, MAX_LARGE)
    check_no_pointer(path, content)
    with boundary(path):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer, f"{path.name} {zlib.crc32(content)}"  # the name is the same in every checkpoint


@contextlib.contextmanager
def boundary(path: pathlib.Path | str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises, its panics too, into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # the library raises bare Exception for whatever it finds wrong
        raise ValueError(f"{path}: not a tokenizer that the tokenizers library reads: {escaped(str(error))}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which is no Exception
            raise
        raise ValueError(f"{path}: the tokenizers library fails with it: {escaped(str(error))}") from None


Declared = dict[int, tuple[tokenizers.AddedToken, pathlib.Path]]


@dataclasses.dataclass(frozen=True)
class Special:
    """Special tokens: with the names that every model has, with names of the model's own, and without a name."""

    named: list[tokenizers.AddedToken]
    of_model: list[tokenizers.AddedToken]
    extra: list[tokenizers.AddedToken]

    @property
    def every(self) -> list[tokenizers.AddedToken]:
        """All of them, in the order of their numbers where they are new."""
        return [*self.named, *self.of_model, *self.extra]


def _tokens_beside(
    directory: pathlib.Path, own: Mapping[int, tokenizers.AddedToken]
) -> tuple[Declared, Special, Mapping[str, Any]]:
    """Tokens with their numbers and files, special tokens without numbers, and tokenizer_config.json.

    As transformers 5 reads them: added_tokens_decoder in tokenizer_config.json, else special_tokens_map.json and
    added_tokens.json, unless they are among tokenizer.json's `own` added tokens; and in any case the special tokens that
    tokenizer_config.json names.
    """
    path, declared = directory / TOKENIZER_CONFIG, {}
    settings = read_json(path) if is_there(path) else {}
    files = settings.get("fast_tokenizer_files")
    if files not in (None, [], [TOKENIZER]):
        raise ValueError(f"{path}: fast_tokenizer_files: {shown(files)} are not read, only {TOKENIZER}")
    of_decoder = settings.get("added_tokens_decoder")
    special_map: Mapping[str, Any] = {}
    if of_decoder is not None:
        if not isinstance(of_decoder, Mapping) or not all(map(is_number, of_decoder)):
            raise ValueError(f"{path}: added_tokens_decoder: {shown(of_decoder)} is not an object of tokens by number")
        declared = {int(number): (_token(path, token), path) for number, token in of_decoder.items()}
    elif is_there(beside := directory / SPECIAL_TOKENS_MAP):
        special_map = read_json(beside)
    special = _special(path, settings, special_map)
    if of_decoder is None and is_there(beside := directory / ADDED_TOKENS):
        names = {token.content for token in (*special.named, *special.extra)}
        for text, number in read_json(beside, MAX_LARGE).items():
            if type(number) is not int or number < 0:
                raise ValueError(f"{beside}: token {shown(text)} has the number {shown(number)}")
            if number not in own or own[number].content != text:  # tokenizer.json says more of its own tokens
                token = _added(beside, text, normalized=text not in names, special=text in names)
                declared[number] = (token, beside)
    return dict(sorted(declared.items())), special, settings


def _special(path: pathlib.Path, settings: Mapping[str, Any], special_map: Mapping[str, Any]) -> Special:
    """The special tokens of tokenizer_config.json and special_tokens_map.json."""
    named = dict(settings) | dict(special_map)
    own = {name: value for name, value in named.items() if name.endswith("_token") and name not in _NAMED}
    by_name, extra = _extra(path, settings, special_map)

    own = {name: value for name, value in own.items() if content_of(value) is not None}  # add_bos_token is no token
    of_every = [named[name] for name in _NAMED if content_of(named.get(name)) is not None]
    lists = ([_token(path, value) for value in values] for values in (of_every, (own | by_name).values(), extra))
    return Special(*lists)


def _extra(path: pathlib.Path, settings: Mapping[str, Any], special_map: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The special tokens with names of the model's own, and those without.

    extra_special_tokens is an object of the former or a list of the latter, additional_special_tokens an older name of the
    list. special_tokens_map.json adds to the list, and replaces it by an object.
    """
    by_name: dict[str, Any] = {}
    extra: Any = None
    additional = settings.get("additional_special_tokens")
    for found in (settings, special_map):
        value = found.get("extra_special_tokens")
        if not isinstance(value, (list, Mapping, type(None))):
            raise ValueError(f"{path}: extra_special_tokens: {shown(value)} is not a list of tokens")
        if isinstance(value, Mapping) and value:
            by_name, extra = by_name | dict(value), None
        elif value:
            extra = [*(extra or []), *(token for token in value if token not in (extra or []))]
        if found is settings and not value and additional is not None:
            extra, additional = additional, None
    if extra is None:
        extra = special_map.get("additional_special_tokens", additional) or []
    if not isinstance(extra, list):
        raise ValueError(f"{path}: additional_special_tokens: {shown(extra)} is not a list of tokens")
    return by_name, extra


def _token(path: pathlib.Path, value: Any) -> tokenizers.AddedToken:
    text = content_of(value)
    if not text:
        raise ValueError(f"{path}: {shown(value)} is not a token")
    if isinstance(value, str):
        return _added(path, text, normalized=False, special=True)
    properties = {name: value[name] for name in _PROPERTIES if name in value}
    if not all(isinstance(flag, bool) for flag in properties.values()):
        raise ValueError(f"{path}: {shown(value)} is not a token")
    return _added(path, text, **properties)


def _added(path: pathlib.Path, text: str, **properties: bool) -> tokenizers.AddedToken:
    try:
        return tokenizers.AddedToken(text, **properties)
    except UnicodeEncodeError:  # half of a pair of surrogates is no text
        raise ValueError(f"{path}: {shown(text)} is not a token") from None


def _add(tokenizer: tokenizers.Tokenizer, declared: Declared, special: Special) -> None:
    """Adds tokens in the order of their numbers, then special ones, which keep the properties that they had before.

    What has a name becomes special; what has none is as it was, or as it says where it is new.
    """
    named = [*special.named, *special.of_model]
    names = {token.content for token in named}
    for token, _ in declared.values():
        token.special = token.special or token.content in names
    tokenizer.add_tokens([token for token, _ in declared.values()])
    there = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([there.get(token.content, token) for token in named])
    tokenizer.add_tokens([token for token in special.extra if token.content not in there])
