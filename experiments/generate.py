"""Continues prompts of a JSONL file with a checkpoint, batch by batch; completions come out as JSONL in the same order.

A line of --prompts is {"prompt": "text"} or {"tokens": [1, 2, ...]}. A line of completions.jsonl has the line's number and
either its completion, tokens and why it ended ("stop" or "length"), or an error; a bad line does not stop the others.

After a kill --resume keeps the lines that are there and goes on after them; batches are those of an uninterrupted run.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import checkpoints_convert
from experiments.common import options, text
from experiments.common.report import Output, markdown_table
from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.search import greedy as search
from indexcache_jax.serving import CacheFormat, Sampling, generate, prefill_document
from indexcache_jax.serving.generation import CHUNK, MIN_KV_LENGTH, check_prompts, power_of_two

for _name in ("checkpoint", "dtype", "resume"):
    flags.declare_key_flag(_name)
_PROMPTS = flags.DEFINE_string("prompts", "", 'JSONL file of {"prompt": "text"} or {"tokens": [1, 2, ...]}')
_DOCUMENT = flags.DEFINE_string("document", "", "text file that stands before every prompt; prefilled once")
_NEW = flags.DEFINE_integer("max_new_tokens", 128, "tokens at most after every prompt")
_ROWS = flags.DEFINE_integer("rows_per_batch", 8, "prompts at a time")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among so many of the likeliest tokens; 0 is all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "draw among the likeliest tokens that together have this probability")
_STOP = flags.DEFINE_list("stop_tokens", [], "token numbers that end a completion; default the checkpoint's eos_token_id")
_CACHE_LEN = flags.DEFINE_integer(
    "cache_len", 0, "tokens a row has room for, document and completion included; default the model's max_position_embeddings"
)
_CHUNK = flags.DEFINE_integer("prefill_chunk", CHUNK, "prompt tokens of a row at a time, which bounds memory")
_LATENTS = flags.DEFINE_enum("kept_latents", "", ["", "float8_e4m3fn"], "keep the latent cache in 8 bits")
_KEYS = flags.DEFINE_enum("kept_index_keys", "", ["", "float8_e4m3fn"], "keep the index keys in 8 bits")

WINDOW = 8  # batches sorted by length together, so that a batch's rows are about as long
OUTPUT = "completions.jsonl"
ABOUT = "completions.about.json"  # what they were made with


@dataclasses.dataclass(frozen=True)
class Request:
    """A line of the prompts: its tokens, or what is wrong with it."""

    line: int  # from 1
    tokens: Sequence[int] = ()
    error: str = ""


def parse(line: str, encoder: text.Bytes | text.FromFile) -> list[int]:
    """The tokens of one line; ValueError says what is wrong."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or ("prompt" in fields) == ("tokens" in fields):
        raise ValueError('not an object with either "prompt" or "tokens"')
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise ValueError(f"prompt: {type(fields['prompt']).__name__}, not a string")
        return encoder.encode(fields["prompt"].encode("utf-8", errors="replace")).tolist()
    tokens = fields["tokens"]
    if not isinstance(tokens, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
        raise ValueError("tokens: not a list of integers")
    return tokens


def requests(path: pathlib.Path, encoder: text.Bytes | text.FromFile, config: Config, room: int) -> Iterator[Request]:
    """Every line of the file that is not blank. Only a line feed ends one: strings may hold what else Unicode breaks at."""
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            tokens = parse(line.decode(), encoder)
            check_prompts([tokens], config, room)
            yield Request(number, tokens)
        except ValueError as error:
            yield Request(number, error=str(error).removeprefix("prompt 0: "))


def batches(window: Sequence[Request], rows: int) -> Iterator[list[Request]]:
    """The requests of a window without an error, those of about one length together."""
    good = sorted((r for r in window if not r.error), key=lambda r: len(r.tokens))
    for first in range(0, len(good), rows):
        yield good[first : first + rows]


def finished(output: Output, about: dict[str, Any], found: Sequence[Request]) -> int:
    """How many prompts, from the first on, are done in the output folder; what follows them there is cut off.

    ValueError where the completions were made with something else than `about`.
    """
    path, described = output.directory / OUTPUT, output.directory / ABOUT
    if not path.exists():
        return 0
    if not described.exists():
        raise ValueError(f"--resume: {described} is missing, so what {path} was made with is not known")
    for name, before in json.loads(described.read_text()).items():
        if about.get(name) != before:
            raise ValueError(f"--resume: {path} was made with {name} {before!r}, this run has {about.get(name)!r}")
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # a kill may leave half of the last line
    lines = whole.splitlines()
    if len(lines) > len(found):
        raise ValueError(f"--resume: {path} has {len(lines)} lines for {len(found)} prompts")
    for number, (line, request) in enumerate(zip(lines, found, strict=False), 1):
        try:
            of = json.loads(line)["line"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"--resume: {path}: line {number} is not a completion") from None
        if of != request.line:
            raise ValueError(f"--resume: {path}: line {number} is of prompt {of}, not of {request.line}")
    os.truncate(path, len(whole) + 1 if lines else 0)
    return len(lines)


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
        print(f"\r{self.done}/{self.total} prompts, {rates}", end="", file=sys.stderr, flush=True)

    def rate(self, phase: str) -> float:
        """Tokens a second, compilation included."""
        return self.tokens[phase] / self.seconds[phase] if self.seconds[phase] else 0.0


def stop_tokens(config: Config) -> tuple[int, ...]:
    if not _STOP.value:
        return config.eos_token_ids
    for value in _STOP.value:
        if not value.isdecimal() or int(value) >= config.vocab_size:
            raise ValueError(f"--stop_tokens={value}: not one of the model's {config.vocab_size} tokens")
    return tuple(int(value) for value in _STOP.value)


def run(output_dir: str, seed: int) -> None:
    for name, flag in (("max_new_tokens", _NEW), ("rows_per_batch", _ROWS), ("prefill_chunk", _CHUNK)):
        if flag.value < 1:
            raise ValueError(f"--{name}={flag.value}: must be at least 1")
    if not _PROMPTS.value:
        raise ValueError("--prompts: name a JSONL file")
    path = pathlib.Path(_PROMPTS.value)
    if not path.is_file():
        raise ValueError(f"--prompts={path}: no such file")
    if _DOCUMENT.value and not pathlib.Path(_DOCUMENT.value).is_file():
        raise ValueError(f"--document={_DOCUMENT.value}: no such file")
    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    directory = options.CHECKPOINT.value or str(options.DEMO)
    dtype = options.DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    encoder = text.tokenizer(directory)
    config, schedule, weights = checkpoints_convert.load(directory, dtype=jnp.dtype(dtype), form="serving")
    stops = stop_tokens(config)
    document: list[int] = []
    if _DOCUMENT.value:
        document = encoder.encode(pathlib.Path(_DOCUMENT.value).read_bytes()).tolist()
    most = _CACHE_LEN.value or config.max_position_embeddings
    if most > config.max_position_embeddings:
        raise ValueError(
            f"--cache_len={most}: the model has {config.max_position_embeddings} positions (max_position_embeddings)"
        )
    room = most - len(document) - _NEW.value
    if room < 1:
        raise ValueError(
            f"--cache_len={most}: no room for a prompt beside the document's {len(document)} tokens and "
            f"--max_new_tokens={_NEW.value}"
        )
    found = list(requests(path, encoder, config, room))
    if not found:
        raise ValueError(f"--prompts={path}: holds no lines")
    for request in found:
        if request.error:
            print(f"{path}: line {request.line}: {request.error}", file=sys.stderr)

    about = {
        "prompts": zlib.crc32(path.read_bytes()),
        "document": zlib.crc32(np.asarray(document, np.int32).tobytes()),
        "schedule": schedule.pattern,
        "weights": search.fingerprint(weights, [])["weights"],
        "dtype": dtype,
        "sampling": dataclasses.asdict(sampling) | {"seed": seed},
        "stop_tokens": list(stops),
        "rows_per_batch": _ROWS.value,
        "max_new_tokens": _NEW.value,
        "cache": [most, _CHUNK.value, _LATENTS.value, _KEYS.value],
    }
    output = Output.create(output_dir)
    target = output.directory / OUTPUT
    if target.exists() and not options.RESUME.value:
        target.replace(target.with_name(f"previous-{OUTPUT}"))
    kept = finished(output, about, found)
    output.write(ABOUT, json.dumps(about) + "\n")
    begun, meter, written = time.perf_counter(), Meter(len(found), kept), 0
    shared = None  # the document's cache
    if document and any(not r.error for r in found[kept:]):
        shared = prefill_document(
            weights, document, config, schedule, cache_format=cache_format(weights), chunk=_CHUNK.value, progress=meter
        )
    with open(target, "a", encoding="utf-8") as out:
        size = WINDOW * _ROWS.value
        for first in range(kept // size * size, len(found), size):
            window = found[first : first + size]
            waiting = window[max(0, kept - first) :]  # in the order in which they are written
            lines: dict[int, dict[str, Any]] = {r.line: {"line": r.line, "error": r.error} for r in waiting if r.error}
            meter.done += len(lines)

            def write(waiting: list[Request] = waiting, lines: dict[int, dict[str, Any]] = lines) -> None:
                while waiting and waiting[0].line in lines:
                    out.write(json.dumps(lines[waiting.pop(0).line]) + "\n")
                out.flush()

            for batch in batches(window, _ROWS.value):
                missing = {r.line for r in batch} & {r.line for r in waiting}
                if not missing:
                    continue
                completed = complete(batch, weights, config, schedule, shared, sampling, seed, stops, meter)
                for request, tokens in zip(batch, completed, strict=True):
                    stopped = tokens[-1] in stops
                    lines[request.line] = {
                        "line": request.line,
                        "completion": encoder.decode(tokens[:-1] if stopped else tokens),
                        "tokens": tokens,
                        "finish": "stop" if stopped else "length",
                    }
                    written += len(tokens) if request.line in missing else 0
                meter.done += len(missing)
                write()
            write()
    print(file=sys.stderr)
    finish(output, schedule, found, kept, written, meter, time.perf_counter() - begun)


def cache_format(weights: serving.Weights) -> CacheFormat:
    """What --kept_latents and --kept_index_keys ask for; by default the dtype of the weights."""
    dtype = weights.embedding.dtype
    return CacheFormat(_LATENTS.value or dtype, _KEYS.value or dtype)


def complete(
    batch: Sequence[Request],
    weights: serving.Weights,
    config: Config,
    schedule: Schedule,
    document: serving.Cache | None,
    sampling: Sampling,
    seed: int,
    stops: Sequence[int],
    meter: Meter,
) -> list[list[int]]:
    """The new tokens of every request. The last batch is filled up with copies, for a program that exists already."""
    rows = [*batch, *[batch[-1]] * (_ROWS.value - len(batch))]
    before = 0 if document is None else int(document.lengths[0])
    needed = before + max(len(r.tokens) for r in rows) + _NEW.value
    # Few different lengths of cache, because each is a program.
    cache_len = power_of_two(needed, MIN_KV_LENGTH, _CACHE_LEN.value or config.max_position_embeddings)
    return generate(
        weights,
        [r.tokens for r in rows],
        config,
        schedule,
        _NEW.value,
        sampling=sampling,
        seed=seed,
        stop_tokens=stops,
        cache_len=cache_len,
        cache_format=cache_format(weights),
        document=document or (),
        ids=[r.line for r in rows],
        chunk=_CHUNK.value,
        progress=meter,
    )[: len(batch)]


def finish(
    output: Output, schedule: Schedule, found: Sequence[Request], kept: int, written: int, meter: Meter, seconds: float
) -> None:
    """results.json and report.md, then a ValueError if a line could not be done. `written`: new tokens of the completions."""
    bad = [r for r in found if r.error]
    metrics = {
        "schedule": schedule.pattern,
        "prompts": len(found),
        "of_them_done_before": kept,
        "errors": {r.line: r.error for r in bad},
        "seconds": seconds,
        "prompt_tokens": meter.tokens["prefill"],
        "new_tokens": written,
        "prompt_tokens_per_second": meter.rate("prefill"),
        "new_tokens_per_second": meter.rate("decode"),
    }
    rows = [
        [name.replace("_", " "), value if not isinstance(value, float) else f"{value:.1f}"] for name, value in metrics.items()
    ]
    about = "Prompt tokens and rates count the copies that fill up a last batch; rates include compilation."
    output.finish("generate", metrics, "\n\n".join(["# Completions", about, markdown_table(["what", "value"], rows)]))
    print(f"{len(found) - len(bad)} of {len(found)} prompts in {seconds:.1f} s, written to {output.directory / OUTPUT}")
    if bad:
        lines = ", ".join(str(r.line) for r in bad[:10]) + (", ..." if len(bad) > 10 else "")
        raise ValueError(f"{_PROMPTS.value}: {len(bad)} of {len(found)} lines could not be done: {lines}")
