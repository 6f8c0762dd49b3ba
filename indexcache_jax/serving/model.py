"""All layers over a cache: chunks of prompt, and single tokens.

Prefill runs one program a layer, compiled once for each kind of layer (F or S, dense or experts) however many layers there
are; the host queues them one after the other, and a chunk of prompt keeps the device busy for longer. A decode step is one
program of all layers, so that between tokens nothing returns to the host.

The mathematics is that of `indexcache_jax.model`, whose forward the tests hold it against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from indexcache_jax import arguments, sharding
from indexcache_jax.config import Config
from indexcache_jax.norm import rms_norm
from indexcache_jax.params import Params
from indexcache_jax.positions import Positions, even_order, make_positions
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import few_rows, fused
from indexcache_jax.serving.cache import Cache, check_cache, formats
from indexcache_jax.serving.layer import LayerFunction, linear, run_layer, run_layer_in_place
from indexcache_jax.serving.weights import Weights, weights_for
from indexcache_jax.sharding import constrain

# Called after every layer with its number, the hidden states [B, S, D] and an F layer's indices; returns the hidden states
# that the next layer is given.
Visit = Callable[[int, jax.Array, jax.Array | None], jax.Array]


@jax.jit
def embed(
    embedding: jax.Array, tokens: jax.Array, starts: jax.Array, lengths: jax.Array, config: Config
) -> tuple[jax.Array, Positions]:
    """Hidden states and positions of tokens [B, S], of which lengths [B] count, after starts [B] earlier ones.

    Both are in the order of `positions.even_order`.
    """
    width = tokens.shape[1]
    order = even_order(width)
    tokens = constrain(tokens if order is None else tokens[:, order], "batch", "queries")
    x = constrain(embedding[tokens], "batch", "queries", None)
    return x, make_positions(starts, lengths, width, config, order)


def logits(weights: Weights, x: jax.Array, config: Config) -> jax.Array:
    """Hidden states [..., D] -> [..., V] float32."""
    head = weights.embedding if weights.head is None else weights.head
    return linear(rms_norm(x, weights.final_norm, config.rms_norm_eps), head, jnp.float32)


_logits = jax.jit(logits)


@jax.jit
def last_hidden(x: jax.Array, lengths: jax.Array, hidden: jax.Array) -> jax.Array:
    """The hidden states [B, D] of each row's last token; `hidden` [B, D] for rows of length 0.

    x [B, S, D]: what `prefill_chunk` returns for right-padded tokens of these lengths [B].
    """
    last, order = jnp.maximum(lengths - 1, 0), even_order(x.shape[1])
    if order is not None:
        last = jnp.asarray(np.argsort(order))[last]
    last = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return constrain(jnp.where((lengths > 0)[:, None], last, hidden), "batch", None)


def last_logits(weights: Weights, hidden: jax.Array, config: Config) -> jax.Array:
    """Logits [B, V] float32 from hidden states [B, D], as a program that is not given the layers."""
    return _logits(weights.ends, hidden, config)


def walk(
    weights: Weights,
    x: jax.Array,
    cache: Cache,
    positions: Positions,
    kv_length: int,
    config: Config,
    layer: LayerFunction = run_layer,
    visit: Visit | None = None,
) -> tuple[jax.Array, Cache]:
    """All layers over new tokens x [B, S, D]: hidden states before the final norm, and the cache.

    Only the first `kv_length` positions of the cache are read. `layer` runs one layer and is called as `layer.layer` is.
    """
    indices, layers = None, []
    for number, (p, layer_cache) in enumerate(zip(weights.layers, cache.layers, strict=True)):
        x, selected, layer_cache = layer(p, x, None if p.full else indices, layer_cache, positions, kv_length, config)
        indices = selected if p.full else indices
        layers.append(layer_cache)
        if visit is not None:
            x = visit(number, x, selected)
    return x, Cache(tuple(layers), positions.kv_lengths)


def prefill_chunk(
    weights: Weights,
    tokens: jax.Array | np.ndarray,
    lengths: jax.Array | np.ndarray,
    cache: Cache,
    config: Config,
    kv_length: int | None = None,
    layer: LayerFunction = run_layer_in_place,
) -> tuple[jax.Array, Cache]:
    """Appends right-padded tokens [B, S], of which lengths [B] count: hidden states [B, S, D] before the final norm.

    Under a mesh that splits queries the hidden states are in the order of `positions.even_order`.
    One program a layer, queued without waiting; `cache` is donated. Only the first `kv_length` positions of the cache are
    read, which must include the new tokens; default all. What does not fit is dropped.
    """
    x, positions = embed(weights.embedding, tokens, cache.lengths, lengths, config)
    return walk(weights, x, cache, positions, kv_length or cache.max_len, config, layer)


def step(
    weights: Weights, token: jax.Array, cache: Cache, config: Config, kv_length: int | None = None
) -> tuple[jax.Array, Cache]:
    """Appends one token [B] a row: logits [B, V] float32 of the next, and the cache.

    Only the first `kv_length` positions of the cache are read, which must include the new tokens; default all.
    """
    x, positions = embed(weights.embedding, token[:, None], cache.lengths, jnp.ones_like(cache.lengths), config)
    run: Callable[..., tuple[jax.Array, Cache]] = functools.partial(
        _single_tokens, kv_length=kv_length or cache.max_len, config=config
    )
    if sharding.computes_alone():
        run = sharding.on_each_device(run, ((), ("batch",), ("batch",), ("batch",)), (("batch",), ("batch",)))
    x, cache = run(weights, x, cache, positions)
    return constrain(logits(weights, x[:, 0], config), "batch", None), cache


def _single_tokens(
    weights: Weights, x: jax.Array, cache: Cache, positions: Positions, kv_length: int, config: Config
) -> tuple[jax.Array, Cache]:
    """`walk` over one token a row, x [B, 1, D], by the kernels for a single token or for few rows where they serve."""
    if fused.why_not(weights, x, cache, positions, config) is None:
        x, layers = fused.layers(weights, x, cache, positions, kv_length, config)
        return x, Cache(layers, positions.kv_lengths)
    serves_rows = few_rows.why_not(weights, x, cache, positions, config) is None
    return walk(weights, x, cache, positions, kv_length, config, few_rows.run_layer if serves_rows else run_layer)


def _check_room(cache: Cache, lengths: jax.Array | np.ndarray) -> None:
    """ValueError where a row of a cache has no room for so many more tokens, as far as host memory knows.

    An accelerator is not asked: it has yet to finish the chunk before, and the next one is queued meanwhile.
    """
    filled, new = arguments.numbers_of(cache.lengths, wait=False), arguments.numbers_of(lengths, wait=False)
    if filled is None or new is None:
        return
    if (filled + new).max() > cache.max_len:
        row = int((filled + new).argmax())
        raise ValueError(f"cache: row {row} holds {filled[row]} tokens of at most {cache.max_len}, and {new[row]} more come")


def prefill(
    params: Params | Weights,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    config: Config,
    schedule: Schedule,
    *,
    donate: bool = False,
) -> tuple[jax.Array, Cache]:
    """Appends right-padded tokens [B, S], of which lengths [B] count, to the cache.

    Called again it continues, so a long prompt goes in chunk by chunk. What does not fit is dropped: the caller sees to
    cache.lengths + lengths <= T where these are traced or on an accelerator. A row of length 0 stays as it is and its logits
    mean nothing.

    Args:
      params: serving weights, or params, which are converted at every call.
      tokens: [B, S] integers.
      lengths: [B] integers, from 0 to S.
      cache: of B rows, as `init_cache` makes it for the same config and schedule.
      donate: update `cache` in place, which saves a copy of it; the one passed in must not be used again.

    Returns:
      The logits [B, V] float32 of each row's last token, and the cache.

    Raises:
      ValueError where weights or cache are those of another model or schedule, for numbers that are no tokens of the model,
      and for lengths that do not fit tokens or exceed the cache. Within a traced function only shapes and dtypes are checked.
    """
    weights = weights_for(params, config, schedule)
    tokens = arguments.tokens("tokens", tokens, config.vocab_size)
    check_cache(cache, tokens.shape[0], config, schedule)
    lengths = jnp.asarray(arguments.lengths(lengths, *tokens.shape), jnp.int32)
    _check_room(cache, lengths)
    if tokens.shape[1] == 1:  # the cache drops no single token, and in a row of length 0 this one is padding
        tokens = jnp.pad(jnp.asarray(tokens), ((0, 0), (0, 1)))
    layer = run_layer_in_place if donate else run_layer
    x, cache = prefill_chunk(weights, jnp.asarray(tokens), lengths, cache, config, layer=layer)
    return last_logits(weights, last_hidden(x, lengths, jnp.zeros_like(x[:, 0])), config), cache


@functools.cache
def step_program(cache_formats: Cache | None, donate: bool) -> jax.stages.Wrapped:
    """`step` as one compiled program; arguments as of `layer.layer_program`."""
    return jax.jit(
        step,
        static_argnames="kv_length",
        donate_argnames="cache" if donate else (),
        out_shardings=None if cache_formats is None else (None, cache_formats),
    )


def decode_step(
    params: Params | Weights, token: jax.Array, cache: Cache, config: Config, schedule: Schedule, *, donate: bool = False
) -> tuple[jax.Array, Cache]:
    """Appends one token [B] a row: logits [B, V] float32 of the next, and the cache; arguments and errors as of `prefill`.

    One program for all layers. `generate` runs many such steps without returning to the host between them. Numbers on an
    accelerator are not checked, so that a step does not wait for the one before.
    """
    weights = weights_for(params, config, schedule)
    token = arguments.tokens("token", token, config.vocab_size, ("B",), wait=False)
    check_cache(cache, token.shape[0], config, schedule)
    _check_room(cache, np.ones(token.shape, np.int32))
    return step_program(formats(cache), donate)(weights, jnp.asarray(token), cache, config)
