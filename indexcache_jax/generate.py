"""Batched generation: ragged prompts in chunks, then many steps a program, without the host between tokens.

Memory is the weights, the cache, that of a shared document, and one chunk: about (4 D + 2 k (D + 3 I)) x 2 bytes a token of
it (D hidden, I an expert's width, k experts a token), and at most 1 GiB of index scores. A chunk costs what the keys that
exist cost, not the cache's size: the kernels for Hopper skip what is beyond, elsewhere the cache is cut to the next power of
two.

A decode program holds the whole model once and loops over its steps on the device, caches updated in place. What a step
launches is `serving.step`'s business: for a single row on Hopper two kernels an S layer and four an F layer, else a few
dozen a layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import serving
from indexcache_jax.config import Config
from indexcache_jax.params import Params
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import Cache, Weights
from pallas_kernels import hopper

CHUNK = 8192  # prompt tokens of a row at a time
STEPS = 32  # tokens a row between two looks at the stop tokens
MIN_WIDTH, MIN_KEYS = 16, 512  # of a prompt's last chunk, and of the part of the cache that is looked at
ROUND = 64  # a cache's length is a multiple of it

# Told of what was done: "prefill" or "decode", and how many tokens of all rows it was.
Progress = Callable[[str, int], None]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ValueError, naming the field, for values out of range.

    temperature 0 is greedy. top_k > 0 keeps the k likeliest tokens, top_p < 1 then the likeliest ones that together have
    at least that probability; what is as likely as the last one kept is kept too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature!r} is not a number of at least 0")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k!r} is not an integer of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p!r} is not above 0 and at most 1")


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """One token [B] int32 a row from logits [B, V] float32; `keys` [B] are the rows' own."""
    if sampling.temperature < jnp.finfo(jnp.float32).tiny:  # as a divisor it would be 0
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature  # the best one is finite whatever it is
    vocabulary = logits.shape[-1]
    count = min(sampling.top_k or vocabulary, vocabulary)
    if count < vocabulary or sampling.top_p < 1:
        best = jax.lax.top_k(logits, count)[0]  # [B, count], descending
        probabilities = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.maximum(jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1, 0)  # top_p may round to 0
        logits = jnp.where(logits < jnp.take_along_axis(best, last, axis=-1), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(seed: jax.Array | int, ids: jax.Array, count: jax.Array | int) -> jax.Array:
    """The key of token number `count` of every request [B]: a request draws the same whatever else is in its batch."""
    one = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(one, i), count))(ids)


_first = jax.jit(lambda logits, seed, ids, sampling: sample(logits, sampling, row_keys(seed, ids, 0)))


def power_of_two(n: int, least: int, most: int) -> int:
    """n rounded up so that few different numbers come out: to a power of two, at least `least` and at most `most`."""
    return min(most, max(least, 1 << (n - 1).bit_length()))


def visible_keys(needed: int, max_len: int) -> int:
    """How much of a cache of `max_len` tokens a program looks at that needs the first `needed`.

    Few different ones, because each is a program. The kernels for Hopper read only what exists, so there it is all.
    """
    if hopper.why_not() is None:
        return max_len
    return power_of_two(needed, MIN_KEYS, max_len)


def chunk_width(left: int, chunk: int) -> int:
    """Tokens of the next chunk of a prompt that has `left` to go: few different ones, because each is a program."""
    return power_of_two(left, MIN_WIDTH, chunk)


@jax.jit
def _last_hidden(x: jax.Array, lengths: jax.Array, hidden: jax.Array) -> jax.Array:
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((lengths > 0)[:, None], last, hidden)


_logits = jax.jit(serving.logits)


def last_logits(weights: Weights, x: jax.Array, lengths: jax.Array, config: Config) -> jax.Array:
    """Logits [B, V] float32 of each row's last token, from hidden states x [B, S, D] of which lengths [B] count."""
    hidden = _last_hidden(x, lengths, jnp.zeros_like(x[:, 0]))
    return _logits(dataclasses.replace(weights, layers=()), hidden, config)


def prefill_chunk(
    weights: Weights,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    config: Config,
    keys: int | None = None,
    layer: Callable[..., Any] = serving.prefill_layer,
) -> tuple[jax.Array, Cache]:
    """Appends right-padded tokens [B, S], of which lengths [B] count: hidden states [B, S, D] before the final norm.

    One program a layer, queued without waiting; `cache` is donated. `keys`: only so much of the cache is looked at, which
    must hold what it has then. What does not fit is dropped. `layer` is that of `serving`, for a caller that
    compiles it in its own way.
    """
    x, positions = serving.embed(weights.embedding, tokens, cache.lengths, lengths, config)
    indices, layers = None, []
    for p, one in zip(weights.layers, cache.layers, strict=True):
        x, selected, one = layer(p, x, None if p.full else indices, one, positions, keys or cache.max_len, config)
        indices = selected if p.full else indices
        layers.append(one)
    return x, Cache(tuple(layers), positions.kv_lengths)


def prefill(
    weights: Weights,
    prompts: Sequence[np.ndarray],
    cache: Cache,
    config: Config,
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> tuple[jax.Array, Cache]:
    """Appends a prompt of at least one token to every row of `cache`, which is donated, `chunk` tokens at a time.

    Returns the logits [B, V] float32 of each row's last token and the cache. ValueError where a row does not fit.
    """
    sizes, filled = np.array([len(p) for p in prompts], np.int32), np.asarray(cache.lengths)
    if len(sizes) != len(filled) or sizes.min() < 1:
        raise ValueError(f"prefill: {len(sizes)} prompts of {sizes.tolist()} tokens for a cache of {len(filled)} rows")
    if (filled + sizes).max() > cache.max_len:
        row = int((filled + sizes).argmax())
        raise ValueError(f"prompt {row}: {sizes[row]} tokens after {filled[row]} exceed the cache of {cache.max_len}")
    hidden = jnp.zeros((len(sizes), config.hidden_size), weights.embedding.dtype)
    start = 0
    while start < sizes.max():
        width = chunk_width(int(sizes.max()) - start, chunk)
        lengths = np.clip(sizes - start, 0, width)
        tokens = np.zeros((len(sizes), width), np.int32)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            tokens[row, :length] = prompt[start : start + length]
        keys = visible_keys(int((filled + np.minimum(sizes, start + width)).max()), cache.max_len)
        x, cache = prefill_chunk(weights, jnp.asarray(tokens), jnp.asarray(lengths), cache, config, keys)
        hidden = _last_hidden(x, lengths, hidden)
        start += width
        if progress is not None:
            hidden.block_until_ready()
            progress("prefill", int(lengths.sum()))
    return _logits(dataclasses.replace(weights, layers=()), hidden, config), cache


@functools.partial(jax.jit, static_argnames=("steps", "keys"), donate_argnames="cache")
def decode(
    weights: Weights,
    token: jax.Array,
    cache: Cache,
    config: Config,
    *,
    steps: int,
    keys: int | None = None,
    sampling: Sampling = Sampling(),
    seed: jax.Array | int = 0,
    ids: jax.Array | None = None,
    count: jax.Array | int = 1,
) -> tuple[jax.Array, Cache]:
    """Appends token [B] and the ones drawn after it: the next `steps` tokens [B, steps], one program for all of them.

    `cache` is donated; `ids` [B] and `count`, the number of tokens drawn before, decide what is drawn next.
    """
    ids = jnp.arange(token.shape[0]) if ids is None else ids

    def body(i: jax.Array, state: tuple[jax.Array, Cache, jax.Array]) -> tuple[jax.Array, Cache, jax.Array]:
        token, cache, out = state
        logits, cache = serving.step(weights, token, cache, config, keys)
        token = sample(logits, sampling, row_keys(seed, ids, count + i))
        return token, cache, out.at[:, i].set(token)

    out = jnp.zeros((token.shape[0], steps), jnp.int32)
    _, cache, out = jax.lax.fori_loop(0, steps, body, (token, cache, out))
    return out, cache


def _check(name: str, tokens: Sequence[int], config: Config, room: int) -> None:
    if len(tokens) == 0:
        raise ValueError(f"{name}: is empty")
    if len(tokens) > room:
        raise ValueError(f"{name}: {len(tokens)} tokens are more than the {room} that the cache has room for")
    array = np.asarray(tokens)
    outside = (array < 0) | (array >= config.vocab_size)
    if outside.any():
        raise ValueError(f"{name}: token {array[outside][0]} is not one of the model's {config.vocab_size}")


def check_prompts(prompts: Sequence[Sequence[int]], config: Config, room: int) -> None:
    """ValueError that names the first prompt that is empty, holds no token of the model, or is longer than `room`."""
    for i, prompt in enumerate(prompts):
        _check(f"prompt {i}", prompt, config, room)


def prefill_document(
    weights: Weights,
    document: Sequence[int],
    config: Config,
    schedule: Schedule,
    *,
    latent_dtype: Any = None,
    index_dtype: Any = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Cache:
    """The cache, of one row, of a document that several calls of `generate` share; arguments are as there."""
    room = -(-len(document) // ROUND) * ROUND
    _check("document", document, config, room)
    cache = serving.init_cache(
        config, schedule, 1, room, weights.embedding.dtype, latent_dtype=latent_dtype, index_dtype=index_dtype
    )
    return prefill(weights, [np.asarray(document)], cache, config, chunk=chunk, progress=progress)[1]


def generate(
    params: Params | Weights,
    prompts: Sequence[Sequence[int]],
    config: Config,
    schedule: Schedule,
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    cache_len: int | None = None,
    latent_dtype: Any = None,
    index_dtype: Any = None,
    document: Sequence[int] | Cache = (),
    ids: Sequence[int] | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Up to `max_new_tokens` tokens after every prompt; a row ends with its stop token, where it met one.

    Args:
      params: the model's, or the same prepared by `serving.weights_of`, which a caller with several batches does once.
      prompts: token ids, at least one each; lengths may differ.
      sampling, seed: token n of request i is drawn with a key of (seed, ids[i], n), whatever else is in the batch.
      stop_tokens: a row is done once it has drawn one of them.
      cache_len: tokens a row has room for, prompt and document included; default what these prompts need.
      latent_dtype, index_dtype: what the cache is kept in, as of `serving.init_cache`; default the dtype of the weights.
      document: tokens before every prompt. They are prefilled once and their cache is copied to every row; a caller with
        several batches does it once for all with `prefill_document`, whose cache stays as it is.
      ids: what the requests are drawn by; default their places in `prompts`.
      chunk: prompt tokens of a row at a time, which bounds memory.
      progress: told of every piece of work done.

    Raises:
      ValueError naming the prompt that is empty, too long or not made of the model's tokens, or the argument at fault.
    """
    if max_new_tokens < 1 or chunk < 1:
        raise ValueError(f"generate: max_new_tokens {max_new_tokens} and chunk {chunk} must be at least 1")
    if len(prompts) == 0:
        return []
    if ids is not None and len(ids) != len(prompts):
        raise ValueError(f"generate: {len(ids)} ids for {len(prompts)} prompts")
    if not -(2**31) <= seed < 2**31:
        raise ValueError(f"generate: seed {seed} is not an integer of 32 bits")
    prompt = max(map(len, prompts))
    before = int(document.lengths[0]) if isinstance(document, Cache) else len(document)
    longest = before + prompt + max_new_tokens
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"a document of {before} tokens, a prompt of {prompt} and {max_new_tokens} new ones exceed the model's "
            f"{config.max_position_embeddings} positions (max_position_embeddings)"
        )
    if cache_len is None:
        cache_len = -(-longest // ROUND) * ROUND
    check_prompts(prompts, config, cache_len - max_new_tokens - before)
    weights = params if isinstance(params, Weights) else serving.weights_of(params, config, schedule)
    if (held := [p.full for p in weights.layers]) != list(schedule.is_full):
        pattern = "".join("F" if full else "S" for full in held)
        raise ValueError(f"schedule pattern {schedule.pattern}: these weights are those of {pattern}; see serving.restrict")
    rows = len(prompts)
    kinds = dict(latent_dtype=latent_dtype, index_dtype=index_dtype)
    if before:
        if not isinstance(document, Cache):
            document = prefill_document(weights, document, config, schedule, chunk=chunk, progress=progress, **kinds)
        cache = serving.fork(document, rows, cache_len)
        del document  # a caller that shares it keeps it
    else:
        cache = serving.init_cache(config, schedule, rows, cache_len, weights.embedding.dtype, **kinds)
    logits, cache = prefill(weights, [np.asarray(p) for p in prompts], cache, config, chunk=chunk, progress=progress)

    drawn_by = jnp.asarray(range(rows) if ids is None else ids, jnp.int32)
    token = _first(logits, seed, drawn_by, sampling)
    found = [[int(t)] for t in np.asarray(token)]
    stops, steps = set(stop_tokens), min(STEPS, max_new_tokens)
    done = [row[-1] in stops for row in found]
    count = 1
    if progress is not None:
        progress("decode", rows)
    while count < max_new_tokens and not all(done):
        needed = before + prompt + count - 1 + steps
        keys = visible_keys(min(needed, cache_len), cache_len)
        drawn, cache = decode(
            weights, token, cache, config, steps=steps, keys=keys, sampling=sampling, seed=seed, ids=drawn_by, count=count
        )
        token = drawn[:, -1]
        kept = 0
        for row, tokens in enumerate(np.asarray(drawn)[:, : max_new_tokens - count].tolist()):
            if done[row]:
                continue
            end = next((i + 1 for i, t in enumerate(tokens) if t in stops), len(tokens))
            found[row] += tokens[:end]
            done[row] = found[row][-1] in stops
            kept += end
        count += steps
        if progress is not None:
            progress("decode", kept)
    return found
