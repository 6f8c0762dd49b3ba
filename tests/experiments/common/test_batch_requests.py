"""What a line of a batch asks for is followed or refused by name: nothing in it counts for nothing."""

import json

import pytest

from experiments.common import text
from experiments.common.batch_requests import Call, Drawing, Reader
from experiments.common.options import DEMO
from indexcache_jax.config import Config
from indexcache_jax.serving import Sampling

CONFIG = Config.from_hf(DEMO)
DEFAULTS = Drawing(Sampling(0.5, 4, 0.9), max_new_tokens=6)


class Template:
    """A chat template that writes the contents and what it is told."""

    def text(self, messages, settings=None):
        return "".join(message["content"] for message in messages) + "".join(map(str, (settings or {}).values()))


def reader(encoder=None, cache_len=100, **options):
    return Reader(encoder or text.Bytes(), CONFIG, DEFAULTS, cache_len, **options)


def read(line, **options):
    """The request of a line, which is given as a text or as its fields."""
    content = line if isinstance(line, str) else json.dumps(line)
    return reader(**options).request(7, content.encode())


def call(url="/v1/completions", custom_id="a", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the line: cannot be read as JSON"),
        ("[" * 100_000, "the line: cannot be read as JSON: maximum recursion depth"),
        ('"text"', "the line: holds str, not an object"),
        ('{"prompt": "a", "prompt": "b"}', "the line: cannot be read as JSON: the key 'prompt' is there twice"),
        ({}, 'the line: is no object with either "prompt" or "tokens" or "messages"'),
        ({"prompt": "a", "tokens": [1]}, "the line: is no object with either"),
        ({"prompt": 3}, "prompt: 3 is neither a string nor a list of token numbers"),
        ({"prompt": ["a", "b"]}, "prompt: ['a', 'b'] is neither a string"),
        ({"tokens": "abc"}, "tokens: 'abc' is not a list of token numbers"),
        ({"tokens": [1, True]}, "tokens: [1, True] is not a list"),
        ({"tokens": [999]}, "tokens: token 999 is not one of the model's"),
        ({"tokens": [2**70]}, "tokens: an array of shape [1] and dtype object"),
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": "a" * 95}, "prompt: 95 tokens are more than the 94"),
        ({"prompt": "a" * 95, "max_tokens": 6}, "prompt: 95 tokens are more than the 94"),
        ({"prompt": "a", "max_tokens": 100}, "max_tokens: 100 leave no room for a prompt in the 100 tokens"),
        ({"prompt": "a", "id": [1]}, "id: [1] is neither a string nor an integer"),
        ({"prompt": "a", "topp": 5}, "topp: is no parameter that is read of a line"),
        ({"prompt": "a", "model": "m"}, "model: is no parameter that is read of a line"),
        ({"prompt": "a", "\x1b[31m": 5}, r"\x1b[31m: is no parameter"),
        ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: not without messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages: the checkpoint has no chat template"),
        ({"prompt": "a", "temperature": -1}, "temperature: -1.0 is not a number of at least 0"),
        ({"prompt": "a", "temperature": True}, "temperature: True is not a number"),
        ('{"prompt": "a", "temperature": NaN}', "temperature: nan is not a number of at least 0"),
        ({"prompt": "a", "temperature": 10**400}, "temperature: 1000000"),
        ({"prompt": "a", "top_p": "0.5"}, "top_p: '0.5' is not a number"),
        ({"prompt": "a", "top_p": 0}, "top_p: 0.0 is not above 0"),
        ({"prompt": "a", "top_k": 1.5}, "top_k: 1.5 is not an integer of at least 0"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: 0 is not an integer of at least 1"),
        ({"prompt": "a", "max_completion_tokens": "9"}, "max_completion_tokens: '9' is not an integer"),
        ({"prompt": "a", "max_tokens": 5, "max_completion_tokens": 7}, "max_tokens: 5 and 7, under its two names"),
        ({"prompt": "a", "seed": 2**31}, "seed: 2147483648 is not an integer of 32 bits"),
        ({"prompt": "a", "seed": 1.0}, "seed: 1.0 is not an integer"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop: ['x', ''] is neither a string nor a list of strings, none of them empty"),
        ({"prompt": "a", "stop": 5}, "stop: 5 is neither a string"),
        ({"prompt": "a", "logit_bias": {"5": 3}}, "logit_bias: {'5': 3} is not supported"),
        ({"prompt": "a", "n": 2}, "n: 2 is not supported; only 1 is"),
        ({"prompt": "a", "n": True}, "n: True is not supported"),
        ({"prompt": "a", "logprobs": 0}, "logprobs: 0 is not supported"),
        ({"prompt": "a", "stop_token_ids": [5]}, "stop_token_ids: is no parameter that is read"),
        (call(url="/v1/embeddings", input="a"), "url: '/v1/embeddings' is none of /v1/chat/completions, /v1/completions"),
        (call(url="/v1/chat/completions", prompt="a"), "messages: is what /v1/chat/completions continues; the body has prompt"),
        (call(messages=[]), "prompt: is what /v1/completions continues; the body has messages"),
        (call(prompt="a", custom_id=5), "custom_id: 5 is not a string"),
        (call(prompt="a") | {"method": "GET"}, "method: 'GET' is not POST"),
        (call(prompt="a") | {"seed": 5}, "seed: is no field of a request in a batch; parameters stand in its body"),
        (call(prompt="a") | {"body": []}, "body: [] is not an object"),
        (call(prompt="a", model=5), "model: 5 is not a string"),
        (call(prompt="a", stream=True), "stream: True is not supported; only False is"),
        (call(prompt="a", frequency_penalty=0.5), "frequency_penalty: 0.5 is not supported"),
        (
            call(prompt="a", response_format={"type": "json_object"}),
            "response_format: {'type': 'json_object'} is not",
        ),
        (call(prompt="a", reasoning_effort="low"), "reasoning_effort: is no parameter"),
        (call(url="/v1/chat/completions", messages=[], tools=[{}]), "tools: [{}] is not supported"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, message):
    request = read(line)
    assert request.error.startswith(message) and len(request.error) < 400
    assert request.tokens.size == 0 and request.line == 7


def test_a_prompt_is_read_by_the_tokenizer():
    assert read({"prompt": "aé"}).tokens.tolist() == [97, 195, 169]
    assert read({"tokens": [3, 1]}).tokens.tolist() == [3, 1]
    assert read(call(prompt=[3, 1])).tokens.tolist() == [3, 1]


def test_a_line_that_says_nothing_else_has_the_defaults():
    nothing = {"temperature": None, "stop": None, "seed": None, "max_tokens": None}
    for line in ({"prompt": "a"}, {"prompt": "a"} | nothing, call(prompt="a"), call(prompt="a", **nothing)):
        request = read(line)
        assert request.error == "" and request.drawing == DEFAULTS


@pytest.mark.parametrize("make", [lambda **body: {"prompt": "a"} | body, lambda **body: call(prompt="a", **body)])
def test_a_lines_own_settings_hold(make):
    assert read(make(temperature=0, top_p=0.25)).drawing == Drawing(Sampling(0.0, 4, 0.25), 6)
    asked = read(make(top_k=0, max_tokens=50, stop="\n", seed=-3)).drawing
    assert asked == Drawing(Sampling(0.5, 0, 0.9), 50, ("\n",), -3)
    assert read(make(stop=["a", "b"], max_completion_tokens=9)).drawing == Drawing(DEFAULTS.sampling, 9, ("a", "b"))


def test_parameters_that_ask_for_nothing_pass():
    nothing = {"n": 1, "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0, "stream": False, "logprobs": None}
    request = read(call(prompt="a", **nothing, user="me", metadata={"batch": "3"}, response_format={"type": "text"}))
    assert request.error == "" and request.drawing == DEFAULTS


def test_a_request_of_openais_keeps_what_its_answer_says():
    assert read(call(prompt="a")).call == Call("a", "/v1/completions", "m")
    assert read(call(prompt=3)).call == Call("a", "/v1/completions", "m")
    assert read({"custom_id": "b", "method": "POST", "body": 5}).call == Call("b", None, None)
    plain = read({"prompt": "a", "custom_id": "x\n"})
    assert plain.call is None and plain.ids == {"custom_id": "x\n"}
    assert read({"prompt": 5, "id": 7}).ids == {"id": 7}


def test_messages_are_written_by_the_template_with_what_the_line_tells_it():
    messages = [{"role": "user", "content": "hé"}]
    for line in ({"messages": messages}, call(url="/v1/chat/completions", messages=messages)):
        assert bytes(read(line, chat=Template()).tokens.tolist()).decode() == "hé"
    told = {"messages": messages, "chat_template_kwargs": {"think": False}}
    assert bytes(read(told, chat=Template()).tokens.tolist()).decode() == "héFalse"
    assert read(told | {"chat_template_kwargs": 5}, chat=Template()).error == "chat_template_kwargs: 5 is not an object"
    assert read(told, chat=Template(), document=3).error == "messages: not with --document"


def test_a_document_takes_its_part_of_the_room():
    assert read({"prompt": "a" * 64}, document=30).error == ""
    assert read({"prompt": "a" * 65}, document=30).error.startswith("prompt: 65 tokens are more than the 64")


def test_bytes_that_are_no_text_are_said_and_not_replaced():
    assert "can't decode byte 0xe9" in reader().request(1, b'{"prompt": "caf\xe9"}').error
