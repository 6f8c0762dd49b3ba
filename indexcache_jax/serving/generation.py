"""Batched generation: ragged prompts in chunks, then many steps a program, without the host between tokens.

Memory is the weights, the cache, that of a shared document, and one chunk: about (4 D + 2 k (D + 3 I)) x 2 bytes a token of
it (D hidden, I an expert's width, k experts a token), and at most 1 GiB of index scores. The time of a chunk grows with the
tokens that are cached, not with the cache's size: the kernels for Hopper skip what is not filled, elsewhere a program reads
the cache up to the next power of two.

A decode program holds the whole model once and loops over its steps on the device, caches updated in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import arguments, ops, sharding
from indexcache_jax.config import Config
from indexcache_jax.foreign import shown
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import model
from indexcache_jax.serving.cache import Cache, CacheFormat, check_cache, fork, formats, init_cache
from indexcache_jax.serving.sampling import (
    GREEDY,
    NO_TOKEN,
    RowSampling,
    Sampling,
    SharedSampling,
    by_row,
    for_all,
    row_keys,
    sample,
)
from indexcache_jax.serving.weights import Weights, check_weights, weights_for

Tokens = Sequence[int] | np.ndarray  # token numbers

CHUNK = 8192  # prompt tokens of a row at a time
STEPS = 32  # tokens a row between two checks for stop tokens
MIN_CHUNK = 16  # tokens of a prompt's last chunk
MIN_KV_LENGTH = 512  # cached positions a program reads, at least
CACHE_MULTIPLE = 64  # a cache's length is a multiple of it, and of the devices that split it

# Called after every piece of work with "prefill" or "decode", and how many tokens of all rows it was.
Progress = Callable[[str, int], None]
# Called with a row and its tokens so far, whenever it has new ones; returns after how many of them the row ends, or None.
Ending = Callable[[int, Sequence[int]], int | None]

_first_tokens = jax.jit(lambda logits, seed, ids, sampling: sample(logits, sampling, row_keys(seed, ids, 0)))


def power_of_two(n: int, least: int, most: int) -> int:
    """n rounded up so that few different numbers come out: to a power of two, at least `least` and at most `most`."""
    return min(most, max(least, 1 << (n - 1).bit_length()))


def padded_kv_length(needed: int, max_len: int) -> int:
    """Cached positions a program reads when the first `needed` are filled, of a cache of `max_len`.

    Rounded up to a power of two, so that few programs are compiled. Where the kernels skip what is not filled it is all, and
    where devices split the positions: a part of them would have to be split anew.
    """
    if ops.skips_invisible_keys() or sharding.devices_along("tokens") > 1:
        return max_len
    return power_of_two(needed, MIN_KV_LENGTH, max_len)


def cache_length(tokens: int) -> int:
    """Positions of a cache that has room for so many tokens a row."""
    multiple = math.lcm(CACHE_MULTIPLE, sharding.devices_along("tokens"))
    return -(-tokens // multiple) * multiple


def padded_chunk(left: int, chunk: int) -> int:
    """Tokens of the next chunk of a prompt with `left` to go: rounded up, so that few programs are compiled."""
    return power_of_two(left, MIN_CHUNK, chunk)


def prefill_prompts(
    weights: Weights,
    prompts: Sequence[np.ndarray],
    cache: Cache,
    config: Config,
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> tuple[jax.Array, Cache]:
    """Appends a prompt of at least one token to every row of `cache`, which is donated, `chunk` tokens at a time.

    Returns the logits [B, V] float32 of each row's last token and the cache. ValueError for a prompt that is empty or not made
    of the model's tokens, and where a row does not fit.
    """
    check_prompts(prompts, config)
    sizes, filled = np.array([len(p) for p in prompts], np.int32), sharding.to_host(cache.lengths)
    if len(sizes) != len(filled) or sizes.min() < 1:
        raise ValueError(f"prefill: {len(sizes)} prompts of {sizes.tolist()} tokens for a cache of {len(filled)} rows")
    if (filled + sizes).max() > cache.max_len:
        row = int((filled + sizes).argmax())
        raise ValueError(f"prompt {row}: {sizes[row]} tokens after {filled[row]} exceed the cache of {cache.max_len}")
    shape = (len(sizes), config.hidden_size)
    hidden = jnp.zeros(shape, weights.embedding.dtype, device=sharding.fitting(shape, ("batch", None)))
    start = 0
    while start < sizes.max():
        width = padded_chunk(int(sizes.max()) - start, chunk)
        lengths = np.clip(sizes - start, 0, width)
        tokens = np.zeros((len(sizes), max(width, 2)), np.int32)  # a cache drops no single token, which may be padding
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            tokens[row, :length] = prompt[start : start + length]
        kv_length = padded_kv_length(int((filled + np.minimum(sizes, start + width)).max()), cache.max_len)
        x, cache = model.prefill_chunk(weights, tokens, lengths, cache, config, kv_length)
        hidden = model.last_hidden(x, lengths, hidden)
        start += width
        if progress is not None:
            hidden.block_until_ready()
            progress("prefill", int(lengths.sum()))
    return model.last_logits(weights, hidden, config), cache


def _decode(
    weights: Weights,
    token: jax.Array,
    cache: Cache,
    config: Config,
    *,
    steps: int,
    kv_length: int | None = None,
    sampling: Sampling | SharedSampling | RowSampling = GREEDY,
    seed: jax.Array | int = 0,
    ids: jax.Array | None = None,
    count: jax.Array | int = 1,
) -> tuple[jax.Array, Cache]:
    """Appends token [B] and the ones drawn after it: the next `steps` tokens [B, steps], one program for all of them.

    `cache` is donated. Only its first `kv_length` positions are read, which must include the new tokens; default all.
    seed, of all rows or [B], ids [B] and `count`, the number of tokens drawn before, decide what is drawn next. ValueError
    for no steps, and for other rows than the cache has; that `token` is one of the model's and that all fits the cache the
    caller sees to.
    """
    ids = jnp.arange(token.shape[0]) if ids is None else ids

    def body(i: jax.Array, state: tuple[jax.Array, Cache, jax.Array]) -> tuple[jax.Array, Cache, jax.Array]:
        token, cache, out = state
        logits, cache = model.step(weights, token, cache, config, kv_length)
        token = sample(logits, sampling, row_keys(seed, ids, count + i))
        return token, cache, out.at[:, i].set(token)

    out = jnp.zeros((token.shape[0], steps), jnp.int32)
    _, cache, out = jax.lax.fori_loop(0, steps, body, (token, cache, out))
    return out, cache


@functools.cache
def decode_program(cache_formats: Cache | None) -> jax.stages.Wrapped:
    """The compiled program behind `decode`. cache_formats: the layouts of the cache it returns, as of `cache.formats`."""
    return jax.jit(
        _decode,
        static_argnames=("steps", "kv_length"),
        donate_argnames="cache",
        out_shardings=None if cache_formats is None else (None, cache_formats),
    )


@functools.wraps(_decode)
def decode(
    weights: Weights, token: jax.Array, cache: Cache, config: Config, *, steps: int, **options: Any
) -> tuple[jax.Array, Cache]:
    arguments.integer("steps", steps, 1)
    token = jnp.asarray(arguments.integers("token", token, ("B",)))
    if token.shape != cache.lengths.shape:
        raise ValueError(f"token: {token.shape[0]} rows for a cache of {cache.lengths.shape[0]}")
    if isinstance(options.get("sampling"), Sampling):
        options["sampling"] = for_all(options["sampling"])
    return decode_program(formats(cache))(weights, token, cache, config, steps=steps, **options)


def _check(name: str, tokens: Tokens, config: Config, room: int | None = None) -> None:
    if arguments.is_text(tokens):
        raise ValueError(f"{name}: {shown(tokens)} is text; a tokenizer makes token numbers of it")
    if not hasattr(tokens, "__len__"):
        raise ValueError(f"{name}: {arguments.described(tokens)} is not a row of token numbers")
    if len(tokens) == 0:
        raise ValueError(f"{name}: is empty")
    if room is not None and len(tokens) > room:
        raise ValueError(f"{name}: {len(tokens)} tokens are more than the {room} that the cache has room for")
    arguments.tokens(name, tokens, config.vocab_size, ("S",), one="token ")


def check_prompts(prompts: Sequence[Any], config: Config, room: int | None = None) -> None:
    """ValueError that names the first prompt that is empty, holds no token of the model, or is longer than `room` if given."""
    for i, prompt in enumerate(prompts):
        _check(f"prompt {i}", prompt, config, room)


def prefill_document(
    weights: Weights,
    document: Sequence[int],
    config: Config,
    schedule: Schedule,
    *,
    cache_format: CacheFormat | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Cache:
    """The cache, of one row, of a document that several calls of `generate` share; arguments and errors are as there."""
    weights = weights_for(weights, config, schedule)
    _check("document", document, config)
    arguments.integer("chunk", chunk, 1)
    room = cache_length(len(document))
    cache = init_cache(config, schedule, 1, room, cache_format or weights.embedding.dtype)
    return prefill_prompts(weights, [np.asarray(document)], cache, config, chunk=chunk, progress=progress)[1]


def _of_rows(name: str, value: Any, rows: int) -> list[Any]:
    """One value a row, of those or of one for all. ValueError, naming the argument, for another number of them."""
    values = list(value) if isinstance(value, (list, tuple)) or getattr(value, "ndim", None) else [value] * rows
    if len(values) != rows:
        raise ValueError(f"{name}: {len(values)} of them for {rows} prompts")
    return values


def _samplings(sampling: Any, rows: int) -> Sampling | SharedSampling | RowSampling:
    """The argument of `generate`, checked: settings for all rows, or of each."""
    each = _of_rows("sampling", sampling, rows)
    for value in each:
        if not isinstance(value, Sampling):
            raise ValueError(f"sampling: {arguments.described(value)} is not a Sampling")
    return for_all(sampling) if isinstance(sampling, Sampling) else by_row(each)


def _check_options(rows: int, stop_tokens: Any, cache_len: Any, ids: Any, chunk: Any) -> None:
    """ValueError, naming the argument of `generate`, for one that is not what it should be, for so many prompts."""
    arguments.integer("chunk", chunk, 1)
    if cache_len is not None:
        arguments.integer("cache_len", cache_len, 1)
    if arguments.is_text(stop_tokens) or not isinstance(stop_tokens, (Collection, np.ndarray, jax.Array)):
        raise ValueError(f"stop_tokens: {arguments.described(stop_tokens)} is not a list of token numbers")
    for token in stop_tokens:
        arguments.integer("stop_tokens", token)
    if ids is None:
        return
    if arguments.is_text(ids) or not hasattr(ids, "__len__") or len(ids) != rows:
        count = len(ids) if hasattr(ids, "__len__") else "no list of"
        raise ValueError(f"ids: {count} ids for {rows} prompts")
    for number in ids:
        arguments.integer("ids", number, -arguments.INT32_MAX - 1, arguments.INT32_MAX)


def _document_tokens(
    document: Sequence[int] | Cache, config: Config, schedule: Schedule, cache_format: CacheFormat | None
) -> int:
    """How many tokens a document has, or the cache of one, once it is checked.

    cache_format: what the rows' caches are to be kept in. ValueError where a document's cache is kept in another one.
    """
    if isinstance(document, Cache):
        check_cache(document, 1, config, schedule)
        if cache_format is not None and document.format != cache_format:
            raise ValueError(f"cache_format: {cache_format}, but the document's cache has {document.format}")
        return int(document.lengths[0])
    if arguments.is_text(document) or not hasattr(document, "__len__") or len(document):
        _check("document", document, config)
    return len(document)


def _room_for(before: int, longest: int, most: int, cache_len: int | None, config: Config) -> int:
    """Positions a row of the cache gets for a document of `before` tokens, the longest prompt and the most new ones.

    cache_len: how many the caller asks for, None for as many as are needed. ValueError where the model has not so many
    positions, and where cache_len has no room for a prompt.
    """
    if before + longest + most > config.max_position_embeddings:
        raise ValueError(
            f"a document of {before} tokens, a prompt of {longest} and {most} new ones exceed the "
            f"model's {config.max_position_embeddings} positions (max_position_embeddings)"
        )
    if cache_len is None:
        return cache_length(before + longest + most)
    if cache_len - most - before < 1:
        raise ValueError(f"cache_len: {cache_len} leaves no room for a prompt beside {before} and {most} tokens")
    return cache_len


class _Completions:
    """The tokens that each row has drawn so far, and which rows are done.

    limits: the most tokens of each row. stops: the tokens after which a row is done. ending: as of `generate`. ids, dtype: of
    the requests and the weights, which an error names.
    """

    def __init__(
        self, limits: Sequence[int], stops: frozenset[int], ending: Ending | None, ids: np.ndarray, dtype: Any
    ) -> None:
        self._limits, self._stops, self._ending, self._ids, self._dtype = limits, stops, ending, ids, dtype
        self.tokens: list[list[int]] = [[] for _ in limits]
        self.done = [False] * len(limits)

    def add(self, drawn: np.ndarray) -> int:
        """Adds new tokens [B, N] to the rows that are not done; how many of them are kept.

        ValueError where no token could be drawn for a row.
        """
        so_far = sum(map(len, self.tokens))
        for row, new in enumerate(drawn.tolist()):
            if self.done[row]:
                continue
            tokens = self.tokens[row]
            new = new[: self._limits[row] - len(tokens)]
            new = new[: next((i + 1 for i, t in enumerate(new) if t in self._stops), len(new))]
            if NO_TOKEN in new:
                why = f"the weights hold NaN or infinity, or {self._dtype} arithmetic overflows"
                raise ValueError(f"request {self._ids[row]}: the model's logits are not finite: {why}")
            tokens += new
            end = None if self._ending is None else self._ending(row, tokens)
            if end is not None:
                del tokens[end:]
            self.done[row] = end is not None or tokens[-1] in self._stops or len(tokens) == self._limits[row]
        return sum(map(len, self.tokens)) - so_far


def generate(
    params: Params | Weights,
    prompts: Sequence[Tokens],
    config: Config,
    schedule: Schedule,
    max_new_tokens: int | Sequence[int],
    *,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    ending: Ending | None = None,
    cache_len: int | None = None,
    cache_format: CacheFormat | None = None,
    document: Sequence[int] | Cache = (),
    ids: Sequence[int] | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Up to `max_new_tokens` tokens after every prompt; a row ends with the first stop token it draws.

    max_new_tokens, sampling and seed are for all rows, or one for each. A row draws the same tokens whatever the others ask
    for, as long as `sampling` is one for each in both calls.

    Args:
      params: serving weights, as `checkpoints_convert.load(directory, form="serving")` gives them, or params, which are
        converted at every call.
      prompts: token ids, at least one each; lengths may differ.
      sampling, seed: token n of request i is drawn with a key of (seed, ids[i], n), whatever else is in the batch.
      stop_tokens: a row is done once it has drawn one of them.
      ending: ends rows by what else their tokens are, such as the text that they decode to.
      cache_len: tokens a row has room for, at least those of the document, the longest prompt and the most new ones;
        default that.
      cache_format: what the cache is kept in; default that of the document's cache, else the dtype of the weights.
      document: tokens before every prompt. They are prefilled once and their cache is copied to every row; a caller with
        several batches does it once for all with `prefill_document`, whose cache stays as it is.
      ids: the numbers that requests are drawn by; default their indices in `prompts`.
      chunk: prompt tokens of a row at a time, which bounds memory.
      progress: called after every piece of work.

    Raises:
      ValueError naming the prompt that is empty, too long or not made of the model's tokens, or the argument at fault; the
      request after which the model's logits are not finite.
    """
    check_weights(params, config, schedule)
    if arguments.is_text(prompts) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts: {arguments.described(prompts)} is not a list of rows of token numbers")
    rows = len(prompts)
    limits = [arguments.integer("max_new_tokens", limit, 1) for limit in _of_rows("max_new_tokens", max_new_tokens, rows)]
    bounds = -arguments.INT32_MAX - 1, arguments.INT32_MAX
    seeds = [arguments.integer("seed", value, *bounds) for value in _of_rows("seed", seed, rows)]
    settings = _samplings(sampling, rows)
    _check_options(rows, stop_tokens, cache_len, ids, chunk)
    if cache_format is not None:
        cache_format = CacheFormat.of(cache_format)
    if rows == 0:
        return []
    check_prompts(prompts, config)
    before, longest, most = _document_tokens(document, config, schedule, cache_format), max(map(len, prompts)), max(limits)
    cache_len = _room_for(before, longest, most, cache_len, config)
    check_prompts(prompts, config, cache_len - most - before)
    weights = weights_for(params, config, schedule)

    # The prompts, after the document that all of them share.
    cache_format = cache_format or CacheFormat.of(weights.embedding.dtype)
    if before:
        if not isinstance(document, Cache):
            document = prefill_document(
                weights, document, config, schedule, cache_format=cache_format, chunk=chunk, progress=progress
            )
        cache = fork(document, rows, cache_len)
        del document  # a caller that shares it keeps it
    else:
        cache = init_cache(config, schedule, rows, cache_len, cache_format)
    logits, cache = prefill_prompts(weights, [np.asarray(p) for p in prompts], cache, config, chunk=chunk, progress=progress)

    # The first tokens, from the prompts' logits.
    drawn_by = np.asarray(range(rows) if ids is None else ids, np.int32)
    draw = {"sampling": settings, "seed": np.asarray(seeds, np.int32), "ids": drawn_by}
    token = _first_tokens(logits, draw["seed"], drawn_by, settings)
    stops = frozenset(int(token) for token in stop_tokens)
    completions = _Completions(limits, stops, ending, drawn_by, weights.embedding.dtype)
    completions.add(sharding.to_host(token)[:, None])
    count = 1
    if progress is not None:
        progress("decode", rows)

    # The others, `steps` at a time, until every row is done.
    steps = power_of_two(most, 1, STEPS)  # few different numbers, because each is a program
    while not all(completions.done):
        kv_length = padded_kv_length(min(before + longest + count - 1 + steps, cache_len), cache_len)
        drawn, cache = decode(weights, token, cache, config, steps=steps, kv_length=kv_length, count=count, **draw)
        token = drawn[:, -1]
        kept = completions.add(sharding.to_host(drawn))
        count += steps
        if progress is not None:
            progress("decode", kept)
    return completions.tokens
