"""Continues prompts of a JSONL file with a checkpoint, batch by batch; completions come out as JSONL in the same order.

A line of --prompts is {"prompt": "text"}, {"tokens": [1, 2, ...]} or {"messages": [{"role": "user", "content": "text"}]},
which goes through the checkpoint's chat template; besides it may have an "id" or "custom_id", which its answer has too. Other
fields are refused, as they would count for nothing. A line of completions.jsonl has the line's number and either its
completion, tokens and why it ended ("stop" or "length"), or an error; a bad line does not stop the others.

After a kill --resume keeps the lines that are there and goes on after them; batches are those of an uninterrupted run.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import devices, fit, inputs, options, processes, text
from experiments.common.chat import ChatTemplate
from experiments.common.journal import Journal, set_aside
from experiments.common.report import Output, markdown_table
from indexcache_jax import search, serving
from indexcache_jax.config import Config
from indexcache_jax.foreign import escaped, parse_json, shown
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, Sampling, generate, prefill_document
from indexcache_jax.serving.generation import CHUNK, MIN_KV_LENGTH, check_prompts, power_of_two
from indexcache_jax.sharding import SERVING

for _name in ("checkpoint", "dtype", "weights", "chunk", "latent_cache", "index_cache", "resume", "mesh"):
    flags.declare_key_flag(_name)
_PROMPTS = flags.DEFINE_string(
    "prompts", "", 'JSONL file of {"prompt": "text"}, {"tokens": [1, 2, ...]} or {"messages": [...]}'
)
_TEMPLATE_KWARGS = flags.DEFINE_string(
    "chat_template_kwargs", "{}", 'what the chat template is told besides the messages, such as {"enable_thinking": false}'
)
_DOCUMENT = flags.DEFINE_string("document", "", "text file that stands before every prompt; prefilled once")
_NEW = flags.DEFINE_integer("max_new_tokens", 128, "tokens at most after every prompt")
_ROWS = flags.DEFINE_integer("rows_per_batch", 8, "prompts at a time")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among so many of the likeliest tokens; 0 is all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "draw among the likeliest tokens that together have this probability")
_STOP = flags.DEFINE_list("stop_tokens", [], "token numbers that end a completion; default the checkpoint's own")
_CACHE_LEN = flags.DEFINE_integer(
    "cache_len", 0, "tokens a row has room for, document and completion included; default the model's max_position_embeddings"
)

WINDOW = 8  # batches sorted by length together, so that a batch's rows are about as long
OUTPUT = "completions.jsonl"
ABOUT = "completions.about.json"  # what they were made with


@dataclasses.dataclass(frozen=True)
class Request:
    """A line of the prompts: its tokens, or what is wrong with it."""

    line: int  # from 1
    tokens: Sequence[int] = ()
    error: str = ""
    ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the line's own, for its answer


IDS, PROMPTS = ("id", "custom_id"), ("prompt", "tokens", "messages")


def read_line(line: bytes) -> dict[str, Any]:
    """The fields of one line; ValueError says what is wrong."""
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {escaped(str(error))}") from None
    if isinstance(fields, dict) and "body" in fields:
        raise ValueError("body: lines of OpenAI's batch format are not read; give the messages of the body, and its custom_id")
    if not isinstance(fields, dict) or len(fields.keys() & set(PROMPTS)) != 1:
        raise ValueError('not an object with either "prompt" or "tokens" or "messages"')
    if other := sorted(fields.keys() - {*PROMPTS, *IDS}):
        raise ValueError(f"{escaped(other[0])}: is not read of a line; the flags hold for all of them")
    return fields


def ids_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The line's own name, of which its answer has a copy. ValueError where it is no name."""
    ids = {name: fields[name] for name in IDS if name in fields}
    for name, value in ids.items():
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ValueError(f"{name}: {shown(value)} is neither a string nor an integer")
    return ids


def parse(
    fields: Mapping[str, Any], encoder: text.Bytes | text.FromFile, chat: ChatTemplate | None = None, begins: bool = True
) -> list[int]:
    """The tokens of one line's fields; ValueError says what is wrong.

    chat: the checkpoint's chat template, for messages. begins: no document stands before it.
    """
    if "messages" in fields:
        if chat is None or not begins:
            raise ValueError(f"messages: {'not with --document' if chat else 'the checkpoint has no chat template'}")
        written = chat.text(fields["messages"]).encode("utf-8", errors="replace")
        return encoder.encode(written, begins=False, ends=False).tolist()  # the template writes what stands around a text
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise ValueError(f"prompt: {type(fields['prompt']).__name__}, not a string")
        return encoder.encode(fields["prompt"].encode("utf-8", errors="replace"), begins=begins).tolist()
    tokens = fields["tokens"]
    if not isinstance(tokens, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
        raise ValueError("tokens: not a list of integers")
    return tokens


def requests(
    path: pathlib.Path,
    encoder: text.Bytes | text.FromFile,
    config: Config,
    room: int,
    chat: ChatTemplate | None = None,
    begins: bool = True,
) -> Iterator[Request]:
    """Every line of the file that is not blank. Only a line feed ends one: strings may hold what else Unicode breaks at."""
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        ids: dict[str, Any] = {}
        try:
            fields = read_line(line)
            ids = ids_of(fields)
            tokens = parse(fields, encoder, chat, begins)
            check_prompts([tokens], config, room)
            yield Request(number, tokens, ids=ids)
        except ValueError as error:
            yield Request(number, error=str(error).removeprefix("prompt 0: "), ids=ids)


def batches(window: Sequence[Request], rows: int) -> Iterator[list[Request]]:
    """The requests of a window without an error, those of about one length together."""
    good = sorted((r for r in window if not r.error), key=lambda r: len(r.tokens))
    for first in range(0, len(good), rows):
        yield good[first : first + rows]


def completions(output: Output, about: dict[str, Any], found: Sequence[Request]) -> Journal:
    """The journal of completions in the output folder; it holds those of the first prompts, in the order of the file.

    ValueError where they were made with something else than `about`, or are not of these prompts.
    """
    path = output.directory / OUTPUT
    journal = Journal(path, about, about_path=output.directory / ABOUT, fields={"line": int})
    if len(journal.entries) > len(found):
        raise ValueError(f"{path}: has {len(journal.entries)} lines for {len(found)} prompts")
    for number, (entry, request) in enumerate(zip(journal.entries, found, strict=False), start=1):
        if entry["line"] != request.line:
            raise ValueError(f"{path}: line {number} is of prompt {entry['line']}, not of {request.line}")
    return journal


class Meter:
    """Progress on the terminal: tokens a second of prompts and of completions."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done
        self.tokens = {"prefill": 0, "decode": 0}
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._last = time.perf_counter()

    def __call__(self, phase: str, tokens: int) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now
        self.tokens[phase] += tokens
        rates = ", ".join(f"{name} {self.rate(name):.1f} tok/s" for name in self.tokens)
        if processes.is_main():
            print(f"\r{self.done}/{self.total} prompts, {rates}", end="", file=sys.stderr, flush=True)

    def rate(self, phase: str) -> float:
        """Tokens a second, compilation included."""
        return self.tokens[phase] / self.seconds[phase] if self.seconds[phase] else 0.0


# ---- reading


@dataclasses.dataclass(frozen=True)
class Settings:
    """How completions are made. cache_len: positions of a row at most; chunk: prompt tokens of a row at a time."""

    sampling: Sampling
    seed: int
    stop_tokens: tuple[int, ...]
    max_new_tokens: int
    rows_per_batch: int
    cache_len: int
    chunk: int
    cache_format: CacheFormat


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A checkpoint's weights, the requests in the order of the file, and the document that stands before each of them."""

    config: Config
    schedule: Schedule
    weights: serving.Weights
    encoder: text.Bytes | text.FromFile
    document: list[int]
    requests: list[Request]
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


def check_files() -> None:
    """ValueError unless --prompts and, if it is given, --document name files."""
    if not _PROMPTS.value:
        raise ValueError("--prompts: name a JSONL file")
    if not pathlib.Path(_PROMPTS.value).is_file():
        raise ValueError(f"--prompts={_PROMPTS.value}: no such file")
    if _DOCUMENT.value and not pathlib.Path(_DOCUMENT.value).is_file():
        raise ValueError(f"--document={_DOCUMENT.value}: no such file")


def room_for_a_prompt(config: Config, document: Sequence[int]) -> int:
    """Tokens of a prompt that fit into --cache_len beside the document and the completion; ValueError where none do."""
    cache_len = _CACHE_LEN.value or config.max_position_embeddings
    if cache_len > config.max_position_embeddings:
        raise ValueError(
            f"--cache_len={cache_len}: the model has {config.max_position_embeddings} positions (max_position_embeddings)"
        )
    room = cache_len - len(document) - _NEW.value
    if room < 1:
        raise ValueError(
            f"--cache_len={cache_len}: no room for a prompt beside the document's {len(document)} tokens and "
            f"--max_new_tokens={_NEW.value}"
        )
    return room


def chat_template(directory: str) -> ChatTemplate | None:
    """The checkpoint's chat template, None where it has none. ValueError for settings that are no JSON object."""
    settings = parse_json(_TEMPLATE_KWARGS.value, f"--chat_template_kwargs={_TEMPLATE_KWARGS.value}")
    try:
        return ChatTemplate(directory, settings)
    except ValueError:
        if b'"messages"' in pathlib.Path(_PROMPTS.value).read_bytes():
            raise
        return None


def read_requests(encoder: text.Bytes | text.FromFile, config: Config, room: int, chat: ChatTemplate | None) -> list[Request]:
    """The lines of --prompts; those that cannot be done are named on stderr. ValueError where there are none."""
    path = pathlib.Path(_PROMPTS.value)
    every = list(requests(path, encoder, config, room, chat, begins=not _DOCUMENT.value))
    if not every:
        raise ValueError(f"--prompts={path}: holds no lines")
    for request in every:
        if request.error and processes.is_main():
            print(f"{path}: line {request.line}: {request.error}", file=sys.stderr)
    return every


def about(
    settings: Settings, document: Sequence[int], every: Sequence[Request], schedule: Schedule, weights: int, dtype: str
) -> dict[str, Any]:
    """What completions depend on. every: the requests, whose tokens a template or a tokenizer may have made; weights: their
    checksum."""
    prompts = zlib.crc32(pathlib.Path(_PROMPTS.value).read_bytes())
    for request in every:
        prompts = zlib.crc32(np.asarray(request.tokens, np.int32).tobytes(), prompts)
    return {
        "prompts": prompts,
        "document": zlib.crc32(np.asarray(document, np.int32).tobytes()),
        "schedule": schedule.pattern,
        "weights": weights,
        "dtype": dtype,
        "sampling": dataclasses.asdict(settings.sampling) | {"seed": settings.seed},
        "stop_tokens": list(settings.stop_tokens),
        "rows_per_batch": settings.rows_per_batch,
        "max_new_tokens": settings.max_new_tokens,
        "cache": [
            settings.cache_len,
            settings.chunk,
            settings.cache_format.latent_dtype.name,
            settings.cache_format.index_dtype.name,
        ],
    }


def check_memory(
    config: Config, schedule: Schedule, settings: Settings, prompt: int, document: int, checkpoint: inputs.Checkpoint
) -> None:
    """Says what weights and the cache of the longest prompts take of each device; ValueError where that does not fit."""
    fit.serving(
        config,
        schedule,
        rows=settings.rows_per_batch,
        length=room_for(document + prompt + settings.max_new_tokens, settings),
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


def read_inputs(seed: int) -> Inputs:
    """All that is read, checked before anything takes long."""
    options.check_positive("max_new_tokens", "chunk")
    check_files()
    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    checkpoint = inputs.checkpoint()
    config, schedule = inputs.described(checkpoint.directory)
    encoder = text.tokenizer(checkpoint.directory, config.vocab_size)
    settings = Settings(
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens(config),
        max_new_tokens=_NEW.value,
        rows_per_batch=_ROWS.value,
        cache_len=_CACHE_LEN.value or config.max_position_embeddings,
        chunk=options.CHUNK.value or CHUNK,
        cache_format=inputs.cache_format(checkpoint.dtype, checkpoint.dtype),
    )
    document: list[int] = []
    if _DOCUMENT.value:
        document = encoder.encode(pathlib.Path(_DOCUMENT.value).read_bytes(), ends=False).tolist()
    every = read_requests(encoder, config, room_for_a_prompt(config, document), chat_template(checkpoint.directory))
    check_memory(config, schedule, settings, max(len(r.tokens) for r in every), len(document), checkpoint)
    config, schedule, weights = checkpoints_convert.load(
        checkpoint.directory, dtype=checkpoint.dtype, form="serving", weights=checkpoint.weights
    )
    made_with = about(settings, document, every, schedule, search.fingerprint(weights, [])["weights"], checkpoint.dtype)
    return Inputs(config, schedule, weights, encoder, document, every, settings, made_with)


# ---- completing


@dataclasses.dataclass(frozen=True)
class Result:
    """How many requests an earlier run had done, and the new tokens, progress and seconds of this one."""

    done_before: int
    new_tokens: int
    meter: Meter
    seconds: float


class Writer:
    """Writes the lines of one window of requests in their order, each as soon as all before it are known."""

    def __init__(self, journal: Journal, waiting: Sequence[Request]) -> None:
        self._journal = journal
        self._waiting = list(waiting)
        self._lines: dict[int, dict[str, Any]] = {
            r.line: {"line": r.line, **r.ids, "error": r.error} for r in waiting if r.error
        }
        self.errors = len(self._lines)

    def missing(self, batch: Sequence[Request]) -> set[int]:
        """The numbers of the batch's lines that are still to be written."""
        return {r.line for r in batch} & {r.line for r in self._waiting}

    def add(self, line: dict[str, Any]) -> None:
        self._lines[line["line"]] = line

    def write(self) -> None:
        """Writes what is known up to the first line that is not."""
        while self._waiting and self._waiting[0].line in self._lines:
            self._journal.append(self._lines[self._waiting.pop(0).line])


def resumed(output: Output, given: Inputs) -> Journal:
    """The journal of completions, with those that this run goes on from; what is not resumed is moved aside."""
    target = output.directory / OUTPUT
    if not options.RESUME.value:
        set_aside(target)
    return completions(output, given.about, given.requests)


def complete_all(given: Inputs, output: Output) -> Result:
    """Completes every request that is not done yet and appends the lines to the output's file."""
    journal = resumed(output, given)
    done = len(journal.entries)
    began, meter, new_tokens = time.perf_counter(), Meter(len(given.requests), done), 0
    document = None  # its cache
    if given.document and any(not r.error for r in given.requests[done:]):
        document = prefill_document(
            given.weights,
            given.document,
            given.config,
            given.schedule,
            cache_format=given.settings.cache_format,
            chunk=given.settings.chunk,
            progress=meter,
        )
    with journal:
        size = WINDOW * given.settings.rows_per_batch
        for first in range(done // size * size, len(given.requests), size):
            window = given.requests[first : first + size]
            writer = Writer(journal, window[max(0, done - first) :])
            new_tokens += complete_window(window, writer, given, document, meter)
    if processes.is_main():
        print(file=sys.stderr)
    return Result(done, new_tokens, meter, time.perf_counter() - began)


def complete_window(
    window: Sequence[Request], writer: Writer, given: Inputs, document: serving.Cache | None, meter: Meter
) -> int:
    """Completes the window's requests, batch by batch, and writes their lines; the new tokens of those."""
    new_tokens = 0
    meter.done += writer.errors
    for batch in batches(window, given.settings.rows_per_batch):
        if not (missing := writer.missing(batch)):
            continue
        for request, tokens in zip(batch, complete(batch, given, document, meter), strict=True):
            stopped = tokens[-1] in given.settings.stop_tokens
            writer.add(
                {
                    "line": request.line,
                    **request.ids,
                    "completion": given.encoder.decode(tokens[:-1] if stopped else tokens),
                    "tokens": tokens,
                    "finish": "stop" if stopped else "length",
                }
            )
            new_tokens += len(tokens) if request.line in missing else 0
        meter.done += len(missing)
        writer.write()
    writer.write()
    return new_tokens


def complete(batch: Sequence[Request], given: Inputs, document: serving.Cache | None, meter: Meter) -> list[list[int]]:
    """The new tokens of every request. The last batch is filled up with copies, for a program that exists already."""
    settings = given.settings
    rows = [*batch, *[batch[-1]] * (settings.rows_per_batch - len(batch))]
    before = 0 if document is None else int(document.lengths[0])
    needed = before + max(len(r.tokens) for r in rows) + settings.max_new_tokens
    return generate(
        given.weights,
        [r.tokens for r in rows],
        given.config,
        given.schedule,
        settings.max_new_tokens,
        sampling=settings.sampling,
        seed=settings.seed,
        stop_tokens=settings.stop_tokens,
        cache_len=room_for(needed, settings),
        cache_format=settings.cache_format,
        document=document or (),
        ids=[r.line for r in rows],
        chunk=settings.chunk,
        progress=meter,
    )[: len(batch)]


# ---- the report


def report(result: Result, given: Inputs, output: Output, layout: devices.Layout) -> None:
    """Writes results.json and report.md, then raises a ValueError if a line could not be done."""
    every, meter = given.requests, result.meter
    bad = [r for r in every if r.error]
    metrics = {
        "schedule": given.schedule.pattern,
        "prompts": len(every),
        "of_them_done_before": result.done_before,
        "errors": {r.line: r.error for r in bad},
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
    print(f"{len(every) - len(bad)} of {len(every)} prompts in {result.seconds:.1f} s, written to {output.directory / OUTPUT}")
    if bad:
        lines = ", ".join(str(r.line) for r in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise ValueError(f"{_PROMPTS.value}: {len(bad)} of {len(every)} lines could not be done: {lines}")


def run(output_dir: str, seed: int) -> None:
    options.check_positive("rows_per_batch")
    layout = devices.layout(_ROWS.value)
    with devices.in_force(layout, SERVING):
        given = read_inputs(seed)
        output = Output.create(output_dir)
        result = complete_all(given, output)
    report(result, given, output, layout)
