"""Continues prompts of a JSONL file with a checkpoint, batch by batch; completions come out as JSONL in the same order.

A line of --prompts is {"prompt": "text"}, {"tokens": [1, 2, ...]} or {"messages": [{"role": "user", "content": "text"}]},
which goes through the checkpoint's chat template, with an "id" or "custom_id" and settings of its own where it likes; or a
request of OpenAI's batch format, which is answered in that format. Completions go to completions.jsonl, what is wrong with
the lines that cannot be done to errors.jsonl; a bad line does not stop the others. docs/inference.md has the fields.

After a kill --resume keeps the answers that are there and goes on after them; batches are those of an uninterrupted run.
The file is read a window at a time, so that its size is no matter of memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from io import RawIOBase
from typing import Any, BinaryIO

import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import devices, fit, inputs, options, processes, stop_strings, text
from experiments.common.batch_answers import Answers, InOrder, completion, standard_output
from experiments.common.batch_file import RequestFile, standard_input
from experiments.common.batch_requests import Drawing, Reader, Request
from experiments.common.chat import ChatTemplate
from experiments.common.report import Output, duration, markdown_table
from indexcache_jax import search, serving
from indexcache_jax.config import Config
from indexcache_jax.foreign import parse_json
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, Sampling, generate, prefill_document
from indexcache_jax.serving.generation import CHUNK, MIN_KV_LENGTH, power_of_two
from indexcache_jax.sharding import SERVING

for _name in ("checkpoint", "dtype", "weights", "chunk", "latent_cache", "index_cache", "resume", "mesh"):
    flags.declare_key_flag(_name)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    "",
    'JSONL file of {"prompt": "text"}, {"tokens": [1, 2, ...]}, {"messages": [...]} or requests of OpenAI\'s batch format; '
    "- is standard input",
)
_COMPLETIONS = flags.DEFINE_enum(
    "completions", None, ["-"], "- for completions on standard output; default completions.jsonl in --output_dir"
)
_TEMPLATE_KWARGS = flags.DEFINE_string(
    "chat_template_kwargs", "{}", 'what the chat template is told besides the messages, such as {"enable_thinking": false}'
)
_DOCUMENT = flags.DEFINE_string("document", "", "text file that stands before every prompt; prefilled once")
_NEW = flags.DEFINE_integer("max_new_tokens", 128, "tokens at most after every prompt whose line says no other number")
_ROWS = flags.DEFINE_integer("rows_per_batch", 8, "prompts at a time")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy; this and what follows where a line says nothing else")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among so many of the likeliest tokens; 0 is all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "draw among the likeliest tokens that together have this probability")
_STOP = flags.DEFINE_list("stop_tokens", [], "token numbers that end a completion; default the checkpoint's own")
_CACHE_LEN = flags.DEFINE_integer(
    "cache_len", 0, "tokens a row has room for, document and completion included; default the model's max_position_embeddings"
)

WINDOW = 8  # batches sorted by length together, so that a batch's rows are about as long
STANDARD = "-"  # input or output
NAMED = 10  # lines that cannot be done that are named on the terminal


def batches(window: Sequence[Request], rows: int, room: int) -> Iterator[list[Request]]:
    """The requests of a window without an error, those of about one length together.

    room: tokens of a row of the cache, which have to do for the longest prompt of a batch and its longest completion.
    """
    batch: list[Request] = []
    for request in sorted((r for r in window if not r.error), key=lambda r: len(r.tokens)):
        most_new = max(r.drawing.max_new_tokens for r in [*batch, request])
        if len(batch) == rows or len(request.tokens) + most_new > room:
            if batch:
                yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


class Meter:
    """Progress on the terminal: tokens a second of prompts and of completions. Its line ends where a block with it ends."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self._before = total, done, done
        self.tokens = {"prefill": 0, "decode": 0}
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._began = self._last = time.perf_counter()

    def __call__(self, phase: str, tokens: int) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now
        self.tokens[phase] += tokens
        self.say()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if processes.is_main():
            print(file=sys.stderr, flush=True)

    def say(self) -> None:
        """Writes how many prompts are done, the rates, and the time that is left, over what was written before."""
        rates = ", ".join(f"{name} {self.rate(name):.1f} tok/s" for name in self.tokens)
        if processes.is_main():
            print(f"\r{self.done}/{self.total} prompts, {rates}{self._left()}", end="", file=sys.stderr, flush=True)

    def _left(self) -> str:
        """What the prompts that are left take, once some of this run are done."""
        if self.done == self._before:
            return ""
        each = (time.perf_counter() - self._began) / (self.done - self._before)
        return f", {duration(each * (self.total - self.done))} left"

    def rate(self, phase: str) -> float:
        """Tokens a second, compilation included."""
        return self.tokens[phase] / self.seconds[phase] if self.seconds[phase] else 0.0


# ---- reading


@dataclasses.dataclass(frozen=True)
class Settings:
    """How completions are made. drawing: where a request says nothing else; cache_len: positions of a row at most; chunk:
    prompt tokens of a row at a time."""

    drawing: Drawing
    seed: int
    stop_tokens: tuple[int, ...]
    rows_per_batch: int
    cache_len: int
    chunk: int
    cache_format: CacheFormat


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A checkpoint's weights, the requests in the order of the file, and the document that stands before each of them."""

    config: Config
    schedule: Schedule
    weights: serving.Weights | None  # None where no request can be done
    encoder: text.Bytes | text.FromFile
    document: list[int]
    requests: RequestFile
    settings: Settings
    about: dict[str, Any]  # what completions depend on: those of a run to be resumed must be about the same


def stop_tokens(config: Config) -> tuple[int, ...]:
    """--stop_tokens, or the checkpoint's own."""
    if not _STOP.value:
        return config.eos_token_ids
    for value in _STOP.value:
        if not value.isdecimal() or int(value) >= config.vocab_size:
            raise ValueError(f"--stop_tokens={value}: not one of the model's {config.vocab_size} tokens")
    return tuple(int(value) for value in _STOP.value)


def sampling() -> Sampling:
    """How tokens are drawn where a line says nothing else. ValueError that names the flag."""
    try:
        return Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    except ValueError as error:  # names the field, as which the flag is called
        raise ValueError(f"--{error}") from None


def check_files() -> None:
    """ValueError unless --prompts and, if it is given, --document name files, and what is asked of a stream can be."""
    if not _PROMPTS.value:
        raise ValueError("--prompts: name a JSONL file, or - for standard input")
    if _PROMPTS.value == STANDARD:
        if processes.count() > 1:
            raise ValueError(f"--prompts={STANDARD}: several processes cannot all read standard input; name a file")
    elif not pathlib.Path(_PROMPTS.value).is_file():
        what = "is no regular file; - reads standard input" if pathlib.Path(_PROMPTS.value).exists() else "no such file"
        raise ValueError(f"--prompts={_PROMPTS.value}: {what}")
    if _COMPLETIONS.value and options.RESUME.value:
        raise ValueError(f"--resume: what --completions={STANDARD} wrote is not there to go on from; leave out one of the two")
    if _DOCUMENT.value and not pathlib.Path(_DOCUMENT.value).is_file():
        raise ValueError(f"--document={_DOCUMENT.value}: no such file")


def check_room(config: Config, document: Sequence[int]) -> int:
    """--cache_len. ValueError where it leaves no room for a prompt beside the document and --max_new_tokens."""
    cache_len = _CACHE_LEN.value or config.max_position_embeddings
    if cache_len > config.max_position_embeddings:
        raise ValueError(
            f"--cache_len={cache_len}: the model has {config.max_position_embeddings} positions (max_position_embeddings)"
        )
    if cache_len - len(document) - _NEW.value < 1:
        raise ValueError(
            f"--cache_len={cache_len}: no room for a prompt beside the document's {len(document)} tokens and "
            f"--max_new_tokens={_NEW.value}"
        )
    return cache_len


def chat_template(directory: str) -> ChatTemplate | str:
    """The checkpoint's chat template, or why there is none. ValueError for settings that are no JSON object."""
    settings = parse_json(_TEMPLATE_KWARGS.value, f"--chat_template_kwargs={_TEMPLATE_KWARGS.value}")
    try:
        return ChatTemplate(directory, settings)
    except ValueError as error:
        return str(error)


@contextlib.contextmanager
def opened_prompts(directory: pathlib.Path) -> Iterator[BinaryIO]:
    """The file --prompts, or what standard input held, kept in the output folder meanwhile."""
    if _PROMPTS.value == STANDARD:
        with standard_input(directory) as file:
            yield file
    else:
        with open(_PROMPTS.value, "rb") as file:
            yield file


def say_errors(requests: RequestFile) -> None:
    """Names the first lines that cannot be done on stderr."""
    if not processes.is_main():
        return
    for line, error in list(requests.scan.errors.items())[:NAMED]:
        print(f"{requests.name}: line {line}: {error}", file=sys.stderr)
    if requests.scan.failed > NAMED:
        print(f"{requests.name}: {requests.scan.failed - NAMED} more lines cannot be done", file=sys.stderr)


def about(
    settings: Settings, document: Sequence[int], requests: RequestFile, schedule: Schedule, weights: int | None, dtype: str
) -> dict[str, Any]:
    """What completions depend on. weights: their checksum."""
    return {
        "prompts": requests.scan.checksum,
        "document": zlib.crc32(np.asarray(document, np.int32).tobytes()),
        "schedule": schedule.pattern,
        "weights": weights,
        "dtype": dtype,
        "sampling": dataclasses.asdict(settings.drawing.sampling) | {"seed": settings.seed},
        "stop_tokens": list(settings.stop_tokens),
        "rows_per_batch": settings.rows_per_batch,
        "max_new_tokens": settings.drawing.max_new_tokens,
        "cache": [
            settings.cache_len,
            settings.chunk,
            settings.cache_format.latent_dtype.name,
            settings.cache_format.index_dtype.name,
        ],
    }


def check_memory(
    config: Config, schedule: Schedule, settings: Settings, longest: int, document: int, checkpoint: inputs.Checkpoint
) -> None:
    """Says what weights and the cache take of each device; ValueError where that does not fit. longest: tokens of a row."""
    fit.serving(
        config,
        schedule,
        rows=settings.rows_per_batch,
        length=room_for(longest, settings),
        chunk=settings.chunk,
        dtype=checkpoint.dtype,
        form=settings.cache_format,
        document=document,
        flag="prompts",
        weights=checkpoint.weights,
    )


def room_for(tokens: int, settings: Settings) -> int:
    """Positions of a cache for rows of so many tokens: few different lengths, because each is a program."""
    return power_of_two(tokens, MIN_KV_LENGTH, settings.cache_len)


@contextlib.contextmanager
def read_inputs(seed: int, output_dir: str) -> Iterator[tuple[Inputs, Output]]:
    """All that is read, checked before anything takes long, and the output folder. The file of requests is open within."""
    check_files()
    drawing = Drawing(sampling(), _NEW.value)
    checkpoint = inputs.checkpoint()
    config, schedule = inputs.described(checkpoint.directory)
    encoder = text.tokenizer(checkpoint.directory, config.vocab_size)
    document: list[int] = []
    if _DOCUMENT.value:
        document = encoder.encode(pathlib.Path(_DOCUMENT.value).read_bytes(), ends=False).tolist()
    settings = Settings(
        drawing=drawing,
        seed=seed,
        stop_tokens=stop_tokens(config),
        rows_per_batch=_ROWS.value,
        cache_len=check_room(config, document),
        chunk=options.CHUNK.value or CHUNK,
        cache_format=inputs.cache_format(checkpoint.dtype, checkpoint.dtype),
    )
    reader = Reader(encoder, config, drawing, settings.cache_len, chat_template(checkpoint.directory), len(document))
    output = Output.create(output_dir)
    with opened_prompts(output.directory) as file:
        name = "standard input" if _PROMPTS.value == STANDARD else _PROMPTS.value
        requests = RequestFile(file, name, reader, WINDOW * settings.rows_per_batch)
        say_errors(requests)
        weights = None
        if requests.scan.failed < requests.scan.requests:
            longest = min(len(document) + requests.scan.longest + requests.scan.most_new, settings.cache_len)
            check_memory(config, schedule, settings, longest, len(document), checkpoint)
            config, schedule, weights = checkpoints_convert.load(
                checkpoint.directory, dtype=checkpoint.dtype, form="serving", weights=checkpoint.weights
            )
        checksum = None if weights is None else search.fingerprint(weights, [])["weights"]
        made_with = about(settings, document, requests, schedule, checksum, checkpoint.dtype)
        yield Inputs(config, schedule, weights, encoder, document, requests, settings, made_with), output


# ---- completing


@dataclasses.dataclass(frozen=True)
class Result:
    """Where the answers are, how many an earlier run had made, and the new tokens, progress and seconds of this one."""

    completions: str
    errors: str
    done_before: int
    new_tokens: int
    meter: Meter
    seconds: float


def complete_all(given: Inputs, output: Output, resume: bool, stream: RawIOBase | None = None) -> Result:
    """Completes every request and writes the answers into the output folder, completions to `stream` if there is one.

    resume: answers that are there are kept, and their requests passed over.
    """
    requests, settings = given.requests, given.settings
    answers = Answers(output.directory, given.about, requests.numbers(), resume=resume, stream=stream)
    began, new_tokens, size = time.perf_counter(), 0, WINDOW * settings.rows_per_batch
    meter = Meter(requests.scan.requests, answers.done)
    document = None  # its cache
    if given.document and given.weights is not None and answers.done < requests.scan.requests:
        document = prefill_document(
            given.weights,
            given.document,
            given.config,
            given.schedule,
            cache_format=settings.cache_format,
            chunk=settings.chunk,
            progress=meter,
        )
    with answers, meter:
        done_of_window = answers.done % size
        for window in requests.windows(answers.done // size):
            new_tokens += complete_window(window, InOrder(answers, window[done_of_window:]), given, document, meter)
            done_of_window = 0
    return Result(answers.where, str(answers.errors_path), answers.done, new_tokens, meter, time.perf_counter() - began)


def complete_window(
    window: Sequence[Request], written: InOrder, given: Inputs, document: serving.Cache | None, meter: Meter
) -> int:
    """Completes the window's requests, batch by batch, and writes their answers; the new tokens of those."""
    new_tokens = 0
    meter.done += sum(bool(r.error) for r in written.waiting)
    for batch in batches(window, given.settings.rows_per_batch, given.settings.cache_len - len(given.document)):
        if not (missing := written.missing(batch)):
            continue
        for request, tokens in zip(batch, complete(batch, given, document, meter), strict=True):
            said, finish = ended(request, tokens, given)
            prompt_tokens = len(given.document) + len(request.tokens)
            written.add(request.line, completion(request, said, tokens, finish, prompt_tokens))
            new_tokens += len(tokens) if request.line in missing else 0
        meter.done += len(missing)
        meter.say()
        written.write()
    written.write()
    return new_tokens


def ended(request: Request, tokens: Sequence[int], given: Inputs) -> tuple[str, str]:
    """The text of a completion, without what ended it, and why it ended: "stop" or "length"."""
    stops = request.drawing.stop
    stopped = tokens[-1] in {*given.settings.stop_tokens, *stop_strings.stop_tokens(stops, given.encoder)}
    said = given.encoder.decode(tokens[:-1] if stopped else tokens)
    at = stop_strings.first_stop(said, stops)
    return said[:at], "stop" if stopped or at is not None else "length"


@contextlib.contextmanager
def naming(batch: Sequence[Request]) -> Iterator[None]:
    """Puts the line of a request before what is wrong with it, such as logits that are not finite, or those of the batch."""
    try:
        yield
    except ValueError as error:
        request = re.match(r"request (\d+): ", str(error))
        if request is None:
            raise ValueError(f"lines {', '.join(str(line) for line in sorted(r.line for r in batch))}: {error}") from None
        line = batch[min(int(request[1]), len(batch) - 1)].line  # what fills up a batch are copies of its last request
        raise ValueError(f"line {line}: {str(error)[request.end() :]}") from None


def complete(batch: Sequence[Request], given: Inputs, document: serving.Cache | None, meter: Meter) -> list[list[int]]:
    """The new tokens of every request. A batch of fewer rows is filled up with copies, for a program that exists already."""
    settings, encoder = given.settings, given.encoder
    rows = [*batch, *[batch[-1]] * (settings.rows_per_batch - len(batch))]
    drawings = [r.drawing for r in rows]
    before = 0 if document is None else int(document.lengths[0])
    needed = before + max(len(r.tokens) for r in rows) + max(d.max_new_tokens for d in drawings)
    ends = {stops: stop_strings.stop_tokens(stops, encoder) for stops in {d.stop for d in drawings}}

    def ending(row: int, tokens: Sequence[int]) -> int | None:
        stops = drawings[row].stop
        at_token = next((i + 1 for i, token in enumerate(tokens) if token in ends[stops]), None)
        at_string = stop_strings.tokens_to_stop(tokens, stops, encoder.decode)
        return min((at for at in (at_token, at_string) if at is not None), default=None)

    assert given.weights is not None
    with naming(batch):
        drawn = generate(
            given.weights,
            [r.tokens for r in rows],
            given.config,
            given.schedule,
            [d.max_new_tokens for d in drawings],
            sampling=[d.sampling for d in drawings],
            seed=[settings.seed if d.seed is None else d.seed for d in drawings],
            stop_tokens=settings.stop_tokens,
            ending=ending if any(ends) else None,
            cache_len=room_for(needed, settings),
            cache_format=settings.cache_format,
            document=document or (),
            ids=[r.line if r.drawing.seed is None else 0 for r in rows],
            chunk=settings.chunk,
            progress=meter,
        )
    return drawn[: len(batch)]


# ---- the report


def report(result: Result, given: Inputs, output: Output, layout: devices.Layout) -> None:
    """Writes results.json and report.md, then raises a ValueError if a line could not be done."""
    scan, meter = given.requests.scan, result.meter
    metrics = {
        "schedule": given.schedule.pattern,
        "prompts": scan.requests,
        "of_them_done_before": result.done_before,
        "failed": scan.failed,
        "errors": scan.errors,
        "seconds": result.seconds,
        "prompt_tokens": meter.tokens["prefill"],
        "new_tokens": result.new_tokens,
        "prompt_tokens_per_second": meter.rate("prefill"),
        "new_tokens_per_second": meter.rate("decode"),
    }
    rows = [
        [name.replace("_", " "), value if not isinstance(value, float) else f"{value:.1f}"] for name, value in metrics.items()
    ]
    note = "Prompt tokens and rates count the copies that fill up a last batch; rates include compilation."
    output.finish("generate", metrics, "\n\n".join(["# Completions", note, markdown_table(["what", "value"], rows)]), layout)
    answered = scan.requests - scan.failed
    print(f"{answered} of {scan.requests} prompts in {result.seconds:.1f} s, written to {result.completions}")
    if scan.failed:
        lines = ", ".join(map(str, list(scan.errors)[:NAMED])) + (", ..." if scan.failed > NAMED else "")
        raise ValueError(
            f"{given.requests.name}: {scan.failed} of {scan.requests} lines could not be done: {lines}; "
            f"{result.errors} says why"
        )


def run(output_dir: str, seed: int) -> None:
    options.check_positive("rows_per_batch", "max_new_tokens", "chunk")
    with standard_output() if _COMPLETIONS.value else contextlib.nullcontext() as stream:
        complete_and_report(output_dir, seed, stream)


def complete_and_report(output_dir: str, seed: int, stream: RawIOBase | None) -> None:
    """The experiment; stream: where completions go, None for a file."""
    layout = devices.layout(_ROWS.value)
    with devices.in_force(layout, SERVING), read_inputs(seed, output_dir) as (given, output):
        result = complete_all(given, output, options.RESUME.value, stream)
    report(result, given, output, layout)
