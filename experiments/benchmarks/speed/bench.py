"""What is run: weights that all schedules share, compiled programs, and caches of as many rows as fit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.speed.models import Model
from experiments.common.profiling import KERNEL_BY_KERNEL
from indexcache_jax import serving, sharding
from indexcache_jax.config import Config
from indexcache_jax.schedule import Schedule
from indexcache_jax.serving import CacheFormat, prefill_chunk
from indexcache_jax.serving.cache import formats
from indexcache_jax.serving.generation import CACHE_MULTIPLE, decode_program, padded_kv_length
from indexcache_jax.serving.layer import LayerFunction, layer_program, run_layer_in_place
from indexcache_jax.serving.model import last_hidden, last_logits

ROWS_WITHOUT_MEMORY_FIGURES = 3
MARGIN = 2 * 2**30  # bytes of device memory left free, for what libraries take and the allocator rounds up

profiled_layer = layer_program(None, donate=True, compiler_options=tuple(KERNEL_BY_KERNEL.items()))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompt lengths, ascending; those at which the full cache is measured; tokens of a chunk; decode steps of a program."""

    lengths: list[int]
    full_lengths: list[int]
    chunk: int
    steps: int

    @property
    def max_len(self) -> int:
        """Positions of a cache for the longest prompt."""
        return self.room(self.lengths[-1])

    def room(self, length: int) -> int:
        """Positions of a cache that holds `length` tokens and what is decoded after them."""
        return length + -(-self.steps // CACHE_MULTIPLE) * CACHE_MULTIPLE


@dataclasses.dataclass
class Bench:
    """Weights, programs and sizes of one run. Weights and schedules are those of --schedule's entries, by what it says."""

    model: Model
    weights: dict[str, serving.Weights]
    schedules: dict[str, Schedule]
    sizes: Sizes
    cache_format: CacheFormat
    decode_one: dict[str, Any] = dataclasses.field(default_factory=dict)  # compiled, by pattern
    decode_full: dict[tuple[str, int], tuple[int, Any]] = dataclasses.field(default_factory=dict)  # rows and program

    @property
    def config(self) -> Config:
        return self.model.config

    def cache(self, pattern: str, batch: int, max_len: int) -> serving.Cache:
        return serving.init_cache(self.config, self.schedules[pattern], batch, max_len, self.cache_format)

    def bytes_per_token(self, pattern: str) -> int:
        return serving.bytes_per_token(self.config, self.schedules[pattern], self.cache_format)

    def full_rows(self, pattern: str, length: int, asked: int, temporaries: int = 0) -> int:
        """Rows of `length` tokens that fit beside the weights and a program's temporary memory, at least one a device."""
        stats = jax.devices()[0].memory_stats()
        if asked or not stats or "bytes_limit" not in stats:
            return asked or ROWS_WITHOUT_MEMORY_FIGURES * sharding.devices_along("batch")
        arrays = {id(x): x for w in self.weights.values() for x in jax.tree.leaves(w)}.values()
        held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
        row = self.bytes_per_token(pattern) * self.sizes.room(length)
        source = row // self.config.num_layers  # one layer's part of a request, of which the rows are made
        row //= sharding.devices_along("tokens")
        rows = (stats["bytes_limit"] - held - temporaries - source - MARGIN) // row  # of a device
        return max(1, rows) * sharding.devices_along("batch")

    # Programs.

    def lower_decode(self, pattern: str, batch: int, max_len: int) -> Any:
        tree = serving.cache.abstract(self.config, self.schedules[pattern], batch, max_len, self.cache_format)
        cache = serving.cache.shape_structs(tree)
        token = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding.fitting((batch,), ("batch",)))
        return decode_program(formats(cache)).lower(self.weights[pattern], token, cache, self.config, steps=self.sizes.steps)

    def compile_full(self, pattern: str, length: int, rows: int) -> None:
        self.decode_full[pattern, length] = rows, self.lower_decode(pattern, rows, self.sizes.room(length)).compile()

    def warm_prefill(self) -> list[Callable[[], Any]]:
        """One call for every kind of layer, each of which compiles its program."""
        kinds: dict[Any, Callable[[], Any]] = {}
        for pattern, weights in self.weights.items():
            for p in weights.layers:
                kind = (p.full, type(p.mlp))
                kinds.setdefault(kind, functools.partial(self._call_layer, pattern, p))
        return list(kinds.values())

    def _call_layer(self, pattern: str, p: serving.Layer) -> Any:
        lengths = np.full((1,), self.sizes.chunk, np.int32)
        tokens = np.zeros((1, self.sizes.chunk), np.int32)
        x, positions = serving.embed(self.weights[pattern].embedding, tokens, 0 * lengths, lengths, self.config)
        one = serving.init_cache(
            dataclasses.replace(self.config, num_layers=1, moe_layers=(True,)),
            Schedule("F"),
            1,
            self.sizes.max_len,
            self.cache_format,
        ).layers[0]
        if not p.full:
            one = dataclasses.replace(one, index_keys=None, index_scales=None)
        kv_length = padded_kv_length(self.sizes.max_len, self.sizes.max_len)
        shape = (1, self.sizes.chunk, min(self.config.index_topk, kv_length))
        where = sharding.fitting(shape, ("batch", "queries", None))
        indices = None if p.full else jnp.zeros(shape, jnp.int32, device=where)
        return jax.block_until_ready(run_layer_in_place(p, x, indices, one, positions, kv_length, self.config)[0])

    def compile(self, asked_rows: int) -> None:
        """All programs, at the same time on the host's cores."""
        with futures.ThreadPoolExecutor() as pool:
            warm = [pool.submit(call) for call in self.warm_prefill()]
            for one in warm:
                one.result()  # before the rest, because choosing algorithms times them on the device
            print(f"{len(warm)} prefill programs, one for each kind of layer", flush=True)
            waiting = {}
            for pattern in self.weights:
                waiting[pattern, 0] = 1, pool.submit(self.lower_decode(pattern, 1, self.sizes.max_len).compile)
                for length in self.sizes.full_lengths:
                    rows = self.full_rows(pattern, length, asked_rows)
                    lowered = self.lower_decode(pattern, rows, self.sizes.room(length))
                    waiting[pattern, length] = rows, pool.submit(lowered.compile)
            for (pattern, length), (rows, program) in waiting.items():
                if not length:
                    self.decode_one[pattern] = program.result()
                    continue
                self.decode_full[pattern, length] = rows, program.result()
                if (fitting := self.full_rows(pattern, length, asked_rows, temporaries(program.result()))) < rows:
                    self.compile_full(pattern, length, fitting)
        for pattern in self.weights:  # what else a chunk takes is small, and compiled by running one
            logits, cache = self.prefill_chunk(
                pattern, np.zeros((1, self.sizes.chunk), np.int32), self.cache(pattern, 1, self.sizes.max_len)
            )
            jax.block_until_ready(self.decode(self.decode_one[pattern], pattern, cache))

    # Runs.

    def prefill_chunk(
        self, pattern: str, tokens: np.ndarray, cache: serving.Cache, layer: LayerFunction = run_layer_in_place
    ) -> tuple[jax.Array, serving.Cache]:
        lengths = np.full((1,), self.sizes.chunk, np.int32)
        kv_length = padded_kv_length(self.sizes.max_len, self.sizes.max_len)
        weights = self.weights[pattern]
        x, cache = prefill_chunk(weights, tokens, lengths, cache, self.config, kv_length, layer)
        return last_logits(weights, last_hidden(x, lengths, jnp.zeros_like(x[:, 0])), self.config), cache

    def decode(self, program: Any, pattern: str, cache: serving.Cache) -> tuple[jax.Array, serving.Cache]:
        # Rows with tokens of their own choose experts of their own, although their caches are alike.
        token = _tokens(cache.lengths, self.config.vocab_size)
        return program(self.weights[pattern], token, cache, self.config)


@functools.partial(jax.jit, static_argnames="vocab_size")
def _tokens(lengths: jax.Array, vocab_size: int) -> jax.Array:
    """A token for every row, as many different ones as there are."""
    return sharding.constrain(jnp.arange(lengths.size, dtype=jnp.int32) * 31 % vocab_size, "batch")


def at(cache: serving.Cache, length: int) -> serving.Cache:
    """The cache as it was when it held `length` tokens: what is beyond does not count."""
    return dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, length))


def temporaries(program: Any) -> int:
    """Bytes that a compiled program needs beside its arguments."""
    found = program.memory_analysis()
    if found is None:
        return 0
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


@functools.partial(jax.jit, static_argnames="rows")
def _copies(one: serving.LayerCache, rows: int) -> serving.LayerCache:
    def copy(x: jax.Array) -> jax.Array:
        axes = "batch", "tokens", *(None,) * (x.ndim - 2)
        return sharding.constrain(jnp.repeat(sharding.constrain(x, *axes), rows, axis=0), *axes)

    return jax.tree.map(copy, one)


def refill(one: serving.Cache, rows: int, length: int, max_len: int) -> serving.Cache:
    """`rows` copies of the first `length` tokens of `one`, the cache of a request on the host.

    There it takes no room, and leaves no holes where layers of another size have to go.
    """
    layers = []
    for layer in one.layers:
        source = jax.tree.map(lambda x: x[:1, :max_len], layer)
        layers.append(jax.block_until_ready(_copies(source, rows)))
    lengths = jnp.full((rows,), length, jnp.int32, device=sharding.fitting((rows,), ("batch",)))
    return serving.Cache(tuple(layers), lengths)
