"""The answers to a batch: completions in one file, errors in another, each in the order of the requests.

A request of OpenAI's batch format is answered in that format. An answer says the number of its request's line, in OpenAI's
format within its id, so that a run that was killed can tell what is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import RawIOBase
from typing import Any, BinaryIO

from checkpoints_convert.ending import writing
from experiments.common import processes
from experiments.common.batch_requests import CHAT, PARAMETERS, Request
from experiments.common.journal import check_same, replacing, set_aside
from indexcache_jax.foreign import parse_json, read_json

COMPLETIONS = "completions.jsonl"
ERRORS = "errors.jsonl"
ABOUT = "completions.about.json"  # what both were made with
STANDARD = "standard output"
_ID = "batch_req_"


def completion(request: Request, text: str, tokens: Sequence[int], finish: str, prompt_tokens: int) -> dict[str, Any]:
    """The answer to a request. tokens: all that were drawn; finish: "stop" or "length"; prompt_tokens: a document included."""
    if request.call is None:
        return {"line": request.line, **request.ids, "completion": text, "tokens": list(tokens), "finish": finish}
    chat = request.call.url == CHAT
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.line}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.call.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(tokens),
            "total_tokens": prompt_tokens + len(tokens),
        },
    }
    return _response(request, 200, body)


def failure(request: Request) -> dict[str, Any]:
    """The answer to a request that cannot be done."""
    if request.call is None:
        return {"line": request.line, **request.ids, "error": request.error}
    name = request.error.partition(":")[0]
    error = {
        "message": request.error,
        "type": "invalid_request_error",
        "param": name if name in PARAMETERS else None,
        "code": None,
    }
    return _response(request, 400, {"error": error})


def _response(request: Request, status: int, body: dict[str, Any]) -> dict[str, Any]:
    assert request.call is not None
    return {
        "id": f"{_ID}{request.line}",
        "custom_id": request.call.custom_id,
        "response": {"status_code": status, "request_id": f"req_{request.line}", "body": body},
        "error": None,
    }


def line_of(answer: Mapping[str, Any]) -> int | None:
    """The line of the request that an answer is to; None for what is no answer."""
    line, name = answer.get("line"), answer.get("id")
    if line is None and isinstance(name, str) and name.removeprefix(_ID).isdecimal():
        return int(name.removeprefix(_ID)[:18])
    return line if isinstance(line, int) else None


class _Log:
    """A file of answers: those that it holds are read one at a time, and others are added after those that were read."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.read, self.size = path, 0, 0
        self._file: BinaryIO | None = None

    def lines(self) -> Iterator[int]:
        """Of every answer the line that it is to. A last one that a kill cut short is passed over."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for content in file:
                if not content.endswith(b"\n"):
                    return
                self.read, self.size = self.read + 1, self.size + len(content)
                line = line_of(parse_json(content, f"{self.path}: line {self.read}"))
                if line is None:
                    raise ValueError(f"{self.path}: line {self.read} is no answer to a line: {content[:80]!r}")
                yield line

    def cut(self) -> None:
        """Drops what was not read, such as half a line."""
        if self.path.exists():
            os.truncate(self.path, self.size)

    def append(self, content: bytes) -> None:
        """Adds a line; it is in the operating system's hands on return, so that a kill leaves it there."""
        if self._file is None:
            self._file = open(self.path, "ab")  # noqa: SIM115 (open until close)
        with writing(self.path, len(content)):
            self._file.write(content)
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Answers:
    """The answers in a folder, or the completions on standard output. done: how many requests are answered already.

    about: what the answers depend on, JSON. requests: of each its line, and whether it cannot be done. resume: goes on with
    the answers that are there; without, they are moved aside. Of several processes, process 0 alone reads and writes.

    ValueError, with nothing written, where the answers are about something else or are not those of the requests.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        about: Mapping[str, Any],
        requests: Iterable[tuple[int, bool]],
        *,
        resume: bool = False,
        stream: RawIOBase | None = None,
    ) -> None:
        self.errors_path = directory / ERRORS
        self.where = STANDARD if stream is not None else str(directory / COMPLETIONS)
        self._completions, self._errors, self._stream = _Log(directory / COMPLETIONS), _Log(self.errors_path), stream

        def opened() -> int:
            logs, about_path = (self._completions, self._errors), directory / ABOUT
            if not resume:
                for log in logs:
                    set_aside(log.path)
            there = [log.path for log in logs if log.path.exists()]
            if there and not about_path.exists():
                raise ValueError(f"{about_path}: is missing, so what {there[0]} was made with is not known")
            if there:
                check_same(read_json(about_path), about, there[0])
            done = self._answered(requests) if there else 0
            if not there:
                with replacing(about_path) as file:
                    file.write(json.dumps(about).encode() + b"\n")
            for log in logs:
                log.cut()
            return done

        self.done: int = processes.from_main(opened)

    def _answered(self, requests: Iterable[tuple[int, bool]]) -> int:
        """How many of the first requests have their answers. An answer after one that is missing counts for nothing."""
        completions, errors = self._completions.lines(), self._errors.lines()
        done = 0
        for line, bad in requests:
            log, lines = (self._errors, errors) if bad else (self._completions, completions)
            answered = next(lines, None)
            if answered is None:
                break
            if answered != line:
                raise ValueError(f"{log.path}: line {log.read} is of prompt {answered}, not of {line}")
            done += 1
        else:
            for log, lines in ((self._completions, completions), (self._errors, errors)):
                if next(lines, None) is not None:
                    raise ValueError(f"{log.path}: has more lines than the {done} prompts")
        return done

    def append(self, answer: Mapping[str, Any], bad: bool) -> None:
        """Adds the answer to the next request; bad: that it cannot be done."""
        if not processes.is_main():
            return
        content = json.dumps(answer).encode() + b"\n"
        if bad:
            self._errors.append(content)
        elif self._stream is None:
            self._completions.append(content)
        else:
            _write_out(self._stream, content)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._completions.close()
        self._errors.close()


def _write_out(stream: RawIOBase, content: bytes) -> None:
    try:
        while content:
            content = content[stream.write(content) :]
    except BrokenPipeError:
        raise ValueError(f"{STANDARD}: is closed by what reads it") from None


@contextlib.contextmanager
def standard_output() -> Iterator[RawIOBase]:
    """Standard output for results alone: what Python, or a library, writes there within the block goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "wb", buffering=0, closefd=False) as stream, contextlib.redirect_stdout(sys.stderr):
            yield stream
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@dataclasses.dataclass
class InOrder:
    """Writes answers in the order of their requests, each as soon as those to all before it are there."""

    answers: Answers
    waiting: list[Request]

    def __post_init__(self) -> None:
        self._ready = {r.line: failure(r) for r in self.waiting if r.error}

    def missing(self, batch: Iterable[Request]) -> set[int]:
        """The lines of the batch whose answers are still to be written."""
        return {r.line for r in batch} & {r.line for r in self.waiting}

    def add(self, line: int, answer: dict[str, Any]) -> None:
        self._ready[line] = answer

    def write(self) -> None:
        """Writes what is there up to the first answer that is not."""
        while self.waiting and self.waiting[0].line in self._ready:
            request = self.waiting.pop(0)
            self.answers.append(self._ready.pop(request.line), bool(request.error))
