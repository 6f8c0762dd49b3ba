"""Messages as the text that a model was trained to see, by the checkpoint's own chat template.

A template is a program from strangers: it runs in Jinja's sandbox, which lets it read what it is given and nothing else.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints_convert.companions import TOKENIZER_CONFIG, content_of
from indexcache_jax.foreign import escaped, is_there, read_json, read_text, shown

TEMPLATE = "chat_template.jinja"


class ChatTemplate:
    """A checkpoint's chat template. settings: what else it is told, such as whether to think (--chat_template_kwargs).

    ValueError, naming the file, where the checkpoint has none, or where it cannot be read.
    """

    def __init__(self, directory: str | pathlib.Path, settings: Mapping[str, Any]) -> None:
        directory = pathlib.Path(directory)
        path = directory / TOKENIZER_CONFIG
        fields = read_json(path) if is_there(path) else {}
        if is_there(directory / TEMPLATE):
            self._path, source = directory / TEMPLATE, read_text(directory / TEMPLATE)
        else:
            self._path, source = path, _default(fields.get("chat_template"), path)
        self._settings = _special_tokens(fields) | dict(settings)
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # of Jinja and of what it calls
            raise ValueError(f"{self._path}: not a chat template: {escaped(str(error))}") from None

    def text(self, messages: Any, settings: Mapping[str, Any] | None = None) -> str:
        """The text of messages, up to where the model's answer begins. ValueError says what is wrong with them.

        settings: what the template is told of these messages, before what it is told of all.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages: {shown(messages)} is not a list of messages")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"messages: {shown(message)} is not an object with a role")
        try:
            told = {"add_generation_prompt": True} | self._settings | dict(settings or {})
            return self._template.render(messages=messages, tools=None, documents=None, **told)
        except Exception as error:  # of Jinja, of the template's own checks, and of what it calls
            raise ValueError(f"{self._path}: the chat template fails: {escaped(str(error))}") from None


def _default(found: Any, path: pathlib.Path) -> str:
    """The template that tokenizer_config.json holds, of several the one called default."""
    if isinstance(found, Sequence) and not isinstance(found, str):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(f"{path.parent}: has no chat template, in {TEMPLATE} or {TOKENIZER_CONFIG}; give prompts as text")
    return found


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and others by name, as templates ask for them."""
    named = {name: content_of(value) for name, value in fields.items() if name.endswith("_token")}
    return {name: text for name, text in named.items() if text is not None}


def _environment() -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError("messages: a chat template needs jinja2, which pip install 'indexcache-jax[chat]' brings") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model is trained on; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
