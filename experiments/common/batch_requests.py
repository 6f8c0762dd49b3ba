"""One line of a batch: a prompt in a form of our own, or a request of OpenAI's batch format, and the settings it asks for.

Whatever a line says is followed or refused by name, so that nothing in it counts for nothing. A parameter that is not
supported passes with the value that asks for nothing, such as "n": 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.common import text
from experiments.common.chat import ChatTemplate
from indexcache_jax.config import Config
from indexcache_jax.foreign import escaped, parse_json, shown
from indexcache_jax.serving import Sampling
from indexcache_jax.serving.generation import check_prompts

IDS = ("id", "custom_id")  # of a line of our own form; its answer has a copy
PROMPTS = ("prompt", "tokens", "messages")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = {CHAT: "messages", COMPLETIONS: "prompt"}  # and what the body of such a request continues
_OF_A_CALL = ("custom_id", "method", "url", "body")

# Parameters that are followed, besides those that Sampling has.
_LIMITS = ("max_tokens", "max_completion_tokens")
_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
_FOLLOWED = (*_LIMITS, *_SAMPLING, "stop", "seed", "chat_template_kwargs")
# Parameters that are not, with the values besides null that ask for nothing.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# For the records of a service: no completion depends on them.
_WHO_ASKS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
PARAMETERS = (*PROMPTS, *_FOLLOWED, *_NOT_SUPPORTED, "model", *_OF_A_CALL)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How one request is completed. seed: its own, for which its tokens do not depend on its line; None, the run's."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """A request of OpenAI's batch format, which is answered in that format. None where the line does not say it rightly."""

    custom_id: str | None = None
    url: str | None = None
    model: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A line of the prompts: its tokens and how they are continued, or what is wrong with it."""

    line: int  # from 1
    drawing: Drawing
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the line's own, for its answer
    call: Call | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes requests of lines.

    defaults: what holds where a line says nothing else. chat: the checkpoint's chat template, or why there is none.
    cache_len: tokens that a row has room for, completion included. document: how many stand before every prompt.
    """

    encoder: text.Bytes | text.FromFile
    config: Config
    defaults: Drawing
    cache_len: int
    chat: ChatTemplate | str = "the checkpoint has no chat template"
    document: int = 0

    @property
    def longest_line(self) -> int:
        """Bytes of a line that can be a prompt that fits: what bounds the memory to read one."""
        return max(2**20, 16 * self.config.max_position_embeddings)

    def request(self, line: int, content: bytes | None) -> Request:
        """The request of a line; None is one that is longer than `longest_line`. What is wrong with it is its `error`."""
        found = Request(line, self.defaults)
        try:
            if content is None:
                raise ValueError(f"the line: has more than {self.longest_line} bytes")
            fields = parse_json(content, "the line")
            if fields.keys() & {"method", "url", "body"}:
                found = dataclasses.replace(found, call=Call())
                found = dataclasses.replace(found, call=_call(fields))
                body = _body(fields)
            else:
                found = dataclasses.replace(found, ids=_ids(fields))
                body = {name: value for name, value in fields.items() if name not in IDS}
                if len(body.keys() & set(PROMPTS)) != 1:
                    raise ValueError('the line: is no object with either "prompt" or "tokens" or "messages"')
            found = dataclasses.replace(found, drawing=_drawing(body, self.defaults))
            return dataclasses.replace(found, tokens=self._tokens(body, found.drawing.max_new_tokens))
        except ValueError as error:
            return dataclasses.replace(found, error=str(error))

    def _tokens(self, body: Mapping[str, Any], new: int) -> np.ndarray:
        room = self.cache_len - self.document - new
        if room < 1:
            raise ValueError(f"max_tokens: {shown(new)} leave no room for a prompt in the {self.cache_len} tokens of the cache")
        tokens = self.prompt(body)
        try:
            check_prompts([tokens], self.config, room)
        except ValueError as error:
            field = next(name for name in PROMPTS if name in body)
            raise ValueError(f"{field}: {str(error).removeprefix('prompt 0: ')}") from None
        return np.asarray(tokens, np.int32)

    def prompt(self, body: Mapping[str, Any]) -> np.ndarray | list[int]:
        """The tokens of a prompt, of tokens, or of messages; ValueError says what is wrong with them."""
        if "messages" in body:
            if isinstance(self.chat, str):
                raise ValueError(f"messages: {self.chat}")
            if self.document:
                raise ValueError("messages: not with --document")
            written = self.chat.text(body["messages"], _template_settings(body)).encode("utf-8", errors="replace")
            return self.encoder.encode(written, begins=False, ends=False)  # the template writes what stands around a text
        if body.get("chat_template_kwargs") is not None:
            raise ValueError("chat_template_kwargs: not without messages")
        prompt = body["prompt"] if "prompt" in body else body["tokens"]
        if isinstance(prompt, str) and "prompt" in body:
            return self.encoder.encode(prompt.encode("utf-8", errors="replace"), begins=not self.document)
        if not isinstance(prompt, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
            wanted = "neither a string nor a list of token numbers" if "prompt" in body else "not a list of token numbers"
            raise ValueError(f"{'prompt' if 'prompt' in body else 'tokens'}: {shown(prompt)} is {wanted}")
        return prompt


def _ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The line's own names, of which its answer has a copy. ValueError where one is no name."""
    ids = {name: fields[name] for name in IDS if name in fields}
    for name, value in ids.items():
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ValueError(f"{name}: {shown(value)} is neither a string nor an integer")
    return ids


def _call(fields: Mapping[str, Any]) -> Call:
    """Who asks for what, as far as a line of OpenAI's format says it rightly; `_body` says what it does not."""
    named, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    return Call(
        named if isinstance(named, str) else None,
        url if isinstance(url, str) else None,
        model if isinstance(model, str) else None,
    )


def _body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of OpenAI's format asks for. ValueError, with the field, for a line that is none."""
    if not isinstance(fields.get("custom_id"), str):
        raise ValueError(f"custom_id: {shown(fields.get('custom_id'))} is not a string")
    if fields.get("method") != "POST":
        raise ValueError(f"method: {shown(fields.get('method'))} is not POST")
    url, body = fields.get("url"), fields.get("body")
    if not isinstance(url, str) or url not in URLS:
        raise ValueError(f"url: {shown(url)} is none of {', '.join(URLS)}")
    if other := sorted(fields.keys() - set(_OF_A_CALL)):
        raise ValueError(f"{escaped(other[0])}: is no field of a request in a batch; parameters stand in its body")
    if not isinstance(body, dict):
        raise ValueError(f"body: {shown(body)} is not an object")
    if not isinstance(body.get("model"), (str, type(None))):
        raise ValueError(f"model: {shown(body['model'])} is not a string")
    if body.keys() & set(PROMPTS) != {URLS[url]}:
        given = ", ".join(sorted(body.keys() & set(PROMPTS))) or "none of them"
        raise ValueError(f"{URLS[url]}: is what {url} continues; the body has {given}")
    return {name: value for name, value in body.items() if name != "model" and name not in _WHO_ASKS}


def _drawing(body: Mapping[str, Any], defaults: Drawing) -> Drawing:
    """The settings that a request asks for. ValueError, with the parameter, for what cannot be or is not supported."""
    for name, value in body.items():
        if name in _NOT_SUPPORTED:
            _check_asks_nothing(name, value)
        elif name not in _FOLLOWED and name not in PROMPTS:
            raise ValueError(f"{escaped(name)}: is no parameter that is read of a line")
    given = {name: value for name in _FOLLOWED if (value := body.get(name)) is not None}  # null is as if it were not there
    sampling = dataclasses.asdict(defaults.sampling)
    for name in _SAMPLING:
        if name in given:
            sampling[name] = _integer(name, given[name], 0) if name == "top_k" else _number(name, given[name])
    return Drawing(
        Sampling(**sampling),
        _limit(given, defaults.max_new_tokens),
        _stop(given.get("stop")),
        _seed(given["seed"]) if "seed" in given else None,
    )


def _check_asks_nothing(name: str, value: Any) -> None:
    """ValueError unless a parameter that is not supported has a value that asks for nothing."""
    nothing = _NOT_SUPPORTED[name]
    if value is not None and not any(type(value) is type(same) and value == same for same in nothing):
        only = f"; only {shown(nothing[0])} is" if nothing else ""
        raise ValueError(f"{name}: {shown(value)} is not supported{only}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"{name}: {shown(value)} is not a number")


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {shown(value)} is not an integer of at least {least}")
    return value


def _limit(given: Mapping[str, Any], default: int) -> int:
    """max_tokens, which has two names."""
    limits = {name: given[name] for name in _LIMITS if name in given}
    for name, value in limits.items():
        _integer(name, value, 1)
    if len(set(limits.values())) > 1:
        raise ValueError(f"max_tokens: {' and '.join(map(shown, limits.values()))}, under its two names, are not the same")
    return next(iter(limits.values()), default)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise ValueError(f"seed: {shown(value)} is not an integer of 32 bits")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"stop: {shown(value)} is neither a string nor a list of strings, none of them empty")
    return tuple(stops)


def _template_settings(body: Mapping[str, Any]) -> dict[str, Any]:
    settings = body.get("chat_template_kwargs")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"chat_template_kwargs: {shown(settings)} is not an object")
    return settings or {}
