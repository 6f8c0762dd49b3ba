"""Completions and errors stand in two files, in the order of the requests; after a kill they go on together."""

import dataclasses
import json
import os

import numpy as np
import pytest

from experiments.common import batch_answers
from experiments.common.batch_answers import ABOUT, COMPLETIONS, ERRORS, Answers, InOrder, completion, failure, line_of
from experiments.common.batch_requests import Call, Request
from tests.experiments.common.test_batch_requests import DEFAULTS

ABOUT_IT = {"seed": 0, "dtype": "float32"}
REQUESTS = [(1, False), (3, True), (4, False), (5, True)]
CHAT = Call("x", "/v1/chat/completions", "m")


def request(line, error="", **fields):
    return Request(line, DEFAULTS, np.array([5], np.int32), error=error, **fields)


def answers(directory, about=ABOUT_IT, requests=REQUESTS, resume=True, **options):
    return Answers(directory, about, iter(requests), resume=resume, **options)


def write(directory, count, **options):
    """The answers to the first requests, as files have them."""
    with answers(directory, resume=False, **options) as written:
        for line, bad in REQUESTS[:count]:
            written.append({"line": line, "error": "bad"} if bad else {"line": line, "tokens": [7]}, bad)


def contents(directory):
    return [(directory / name).read_bytes() if (directory / name).exists() else b"" for name in (COMPLETIONS, ERRORS)]


def test_an_answer_in_our_form_and_in_openais(monkeypatch):
    monkeypatch.setattr(batch_answers.time, "time", lambda: 12.5)
    plain = completion(request(3, ids={"id": "a"}), "text", [7, 8], "stop", 5)
    assert plain == {"line": 3, "id": "a", "completion": "text", "tokens": [7, 8], "finish": "stop"}
    chat = completion(request(3, call=CHAT), "text", [7, 8], "length", 5)
    assert chat == {
        "id": "batch_req_3",
        "custom_id": "x",
        "response": {
            "status_code": 200,
            "request_id": "req_3",
            "body": {
                "id": "chatcmpl-3",
                "object": "chat.completion",
                "created": 12,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "text", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "length",
                    }
                ],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
            },
        },
        "error": None,
    }
    other = completion(request(3, call=dataclasses.replace(CHAT, url="/v1/completions")), "text", [7], "stop", 5)
    body = other["response"]["body"]
    assert (body["id"], body["object"]) == ("cmpl-3", "text_completion")
    assert body["choices"] == [{"index": 0, "text": "text", "logprobs": None, "finish_reason": "stop"}]


def test_an_error_in_our_form_and_in_openais():
    assert failure(request(3, "prompt: no", ids={"id": 5})) == {"line": 3, "id": 5, "error": "prompt: no"}
    refused = failure(request(3, "n: 2 is not supported", call=CHAT))
    assert refused["custom_id"] == "x" and refused["error"] is None
    assert refused["response"]["status_code"] == 400
    error = {"message": "n: 2 is not supported", "type": "invalid_request_error", "param": "n", "code": None}
    assert refused["response"]["body"] == {"error": error}
    assert failure(request(3, "is empty", call=CHAT))["response"]["body"]["error"]["param"] is None


def test_an_answer_says_its_line():
    for made in (request(31), request(31, call=CHAT)):
        assert line_of(completion(made, "", [1], "stop", 1)) == line_of(failure(made)) == 31
    assert line_of({"id": "batch_req_", "custom_id": "a"}) is None
    assert line_of({"line": "3"}) is None and line_of({}) is None


@pytest.mark.parametrize("done", range(5))
@pytest.mark.parametrize("tails", [(b"", b""), (b'{"line": 4, "tok', b""), (b"", b'{"line": 5}')])
def test_a_run_goes_on_after_what_is_there(tmp_path, done, tails):
    write(tmp_path, done)
    whole = contents(tmp_path)
    for name, tail in zip((COMPLETIONS, ERRORS), tails, strict=True):
        with open(tmp_path / name, "ab") as file:
            file.write(tail)
    assert answers(tmp_path).done == done
    assert contents(tmp_path) == whole


def test_where_a_file_lost_its_end_the_other_goes_back_to_it(tmp_path):
    write(tmp_path, 4)
    completions, errors = contents(tmp_path)
    os.truncate(tmp_path / COMPLETIONS, completions.index(b"\n") + 5)  # the answer to line 4 is lost
    assert answers(tmp_path).done == 2
    assert contents(tmp_path) == [completions[: completions.index(b"\n") + 1], errors[: errors.index(b"\n") + 1]]
    (tmp_path / ERRORS).unlink()
    assert answers(tmp_path).done == 1


@pytest.mark.parametrize(
    ("completions", "errors", "message"),
    [
        (b'{"line": 3}\n', b"", "completions.jsonl: line 1 is of prompt 3, not of 1"),
        (b'{"line": 1}\n{"line": 4}\n', b'{"line": 4}\n', "errors.jsonl: line 1 is of prompt 4, not of 3"),
        (b'{"line": 1}\nnonsense\n', b'{"line": 3}\n', "completions.jsonl: line 2: cannot be read as JSON"),
        (b'{"id": "a"}\n', b"", "completions.jsonl: line 1 is no answer to a line"),
        (b'{"line": 1}\n{"line": 4}\n{"line": 4}\n', b'{"line": 3}\n{"line": 5}\n', "has more lines than the 4 prompts"),
    ],
)
def test_answers_that_are_not_those_of_the_requests_are_refused(tmp_path, completions, errors, message):
    (tmp_path / ABOUT).write_text(json.dumps(ABOUT_IT))
    (tmp_path / COMPLETIONS).write_bytes(completions)
    (tmp_path / ERRORS).write_bytes(errors)
    with pytest.raises(ValueError, match=message):
        answers(tmp_path)
    assert contents(tmp_path) == [completions, errors]


def test_answers_made_with_something_else_are_refused(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(ValueError, match="was made with another dtype: 'float32' there, 'bfloat16' here"):
        answers(tmp_path, ABOUT_IT | {"dtype": "bfloat16"})
    (tmp_path / ABOUT).unlink()
    with pytest.raises(ValueError, match=r"about\.json: is missing, so what .*completions\.jsonl was made with is not known"):
        answers(tmp_path)


def test_answers_that_are_not_gone_on_with_are_moved_aside(tmp_path):
    write(tmp_path, 4)
    before = contents(tmp_path)
    assert answers(tmp_path, {"seed": 1}, resume=False).done == 0
    assert contents(tmp_path) == [b"", b""]
    assert [(tmp_path / f"previous-{name}").read_bytes() for name in (COMPLETIONS, ERRORS)] == before
    assert answers(tmp_path, {"seed": 1}).done == 0


def test_answers_are_written_in_the_order_of_their_requests(tmp_path):
    requests = [request(1), request(3, "bad", ids={"id": "e"}), request(4), request(5, "bad")]
    with answers(tmp_path, resume=False) as written:
        window = InOrder(written, list(requests))
        window.write()
        assert contents(tmp_path) == [b"", b""]
        window.add(4, {"line": 4})
        window.write()
        assert contents(tmp_path) == [b"", b""] and window.missing(requests) == {1, 3, 4, 5}
        window.add(1, {"line": 1})
        window.write()
    assert contents(tmp_path)[0] == b'{"line": 1}\n{"line": 4}\n' and window.missing(requests) == set()
    assert [json.loads(line) for line in contents(tmp_path)[1].splitlines()] == [
        {"line": 3, "id": "e", "error": "bad"},
        {"line": 5, "error": "bad"},
    ]


def test_standard_output_holds_completions_alone(tmp_path, capfd):
    with batch_answers.standard_output() as stream:
        print("progress", flush=True)
        os.write(1, b"of a library\n")
        write(tmp_path, 4, stream=stream)
        print("report")
    print("after")
    out, err = capfd.readouterr()
    assert [json.loads(line)["line"] for line in out.splitlines()[:-1]] == [1, 4] and out.splitlines()[-1] == "after"
    assert err.split() == ["progress", "of", "a", "library", "report"]
    assert contents(tmp_path)[0] == b"" and contents(tmp_path)[1].count(b"\n") == 2


def test_a_reader_that_goes_away_is_named(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as stream, pytest.raises(ValueError, match="standard output: is closed by"):
        write(tmp_path, 1, stream=stream)
