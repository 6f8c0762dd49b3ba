"""The measurements: rounds through the schedules, prefill and decode of each, and profiles after the last round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.speed import stages
from experiments.benchmarks.speed.bench import Bench, at, profiled_layer, refill
from experiments.benchmarks.speed.rows import Row, record
from experiments.benchmarks.speed.stages import Profile
from experiments.benchmarks.speed.tables import cells
from experiments.common.report import time_left
from indexcache_jax import serving
from indexcache_jax.serving.generation import padded_kv_length
from indexcache_jax.serving.layer import run_layer_in_place

PAIRS = 64  # neighbouring queries whose selections are compared in every F layer
TIMED = 3  # decode programs a figure


@jax.jit
def neighbours_overlap(indices: jax.Array) -> jax.Array:
    """Of indices [1, S, k]: the share of a query's selection that the next one's has too, over up to PAIRS even pairs."""
    queries = indices.shape[1]
    first = jnp.arange(min(PAIRS, queries - 1)) * max(1, (queries - 1) // PAIRS)
    one, next_one = indices[0, first], indices[0, first + 1]  # [P, k]
    both = jax.vmap(lambda a, b: jnp.sum(jnp.isin(a, b) & (a >= 0)))(one, next_one)
    return jnp.sum(both) / jnp.maximum(jnp.sum(one >= 0), 1)


def random_prompt(seed: int, vocab_size: int, length: int, run: int) -> np.ndarray:
    """[length] tokens, every one drawn standing `run` times."""
    drawn = np.random.default_rng(seed).integers(0, vocab_size, -(-length // run))
    return np.repeat(drawn, run)[:length]


class Rounds:
    """The rounds of a run, and the rows they fill. update: called with this object whenever a row has changed."""

    def __init__(
        self,
        bench: Bench,
        prompt: np.ndarray,
        deadline: float,
        price: float,
        update: Callable[[Rounds], None],
        kernel_by_kernel: bool = False,
    ) -> None:
        self.bench, self.deadline, self.price, self.update = bench, deadline, price, update
        self.kernel_by_kernel = kernel_by_kernel
        self.rows = {(p, n): Row(p, n) for p in bench.weights for n in bench.sizes.lengths}
        for (pattern, length), row in self.rows.items():
            row.cache_bytes = int(bench.bytes_per_token(pattern) * length * bench.model.scale)
        self.prompt = prompt[None].astype(np.int32)
        self.overlap: dict[str, float] = {}  # of neighbours' selections, by pattern
        self.peak: int | None = None

    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def chunk_at(self, end: int) -> np.ndarray:
        return self.prompt[:, end - self.bench.sizes.chunk : end]

    def one_schedule(self, pattern: str, first: bool) -> None:
        """A prefill with its decodes, and where asked for one without CUDA graphs; in the first round the full cache too."""
        if self.kernel_by_kernel:
            if first:
                self.launch_one_by_one(pattern, self.bench.sizes.chunk)  # compiles the programs
            row = self.rows[pattern, self.bench.sizes.lengths[-1]]
            row.kernel_by_kernel.append(self.launch_one_by_one(pattern, row.length))
        cache = self.prefill(pattern)
        if first:
            stats = jax.devices()[0].memory_stats() or {}
            self.peak = self.peak or stats.get("peak_bytes_in_use")
            if not self.late():
                one = jax.device_get(cache)
                del cache
                self.decode_full(pattern, one)

    def prefill(self, pattern: str) -> serving.Cache:
        """Timed, with one request's decoding at every length; the cache that is left holds the longest."""
        bench = self.bench
        cache = bench.cache(pattern, 1, bench.sizes.max_len)
        total = 0.0
        for end in range(bench.sizes.chunk, bench.sizes.lengths[-1] + 1, bench.sizes.chunk):
            began = time.perf_counter()
            logits, cache = bench.prefill_chunk(pattern, self.chunk_at(end), cache)
            logits.block_until_ready()
            total += time.perf_counter() - began
            if end in bench.sizes.lengths:
                row = self.rows[pattern, end]
                row.prefill.append(total)
                cache = self.decode_one(row, cache)
                self.show(row)
        return cache

    def launch_one_by_one(self, pattern: str, length: int) -> float:
        """Seconds of a prefill of so many tokens whose kernels are launched one by one, as `prefill` times it otherwise."""
        bench, total = self.bench, 0.0
        cache = bench.cache(pattern, 1, bench.sizes.max_len)
        for end in range(bench.sizes.chunk, length + 1, bench.sizes.chunk):
            began = time.perf_counter()
            logits, cache = bench.prefill_chunk(pattern, self.chunk_at(end), cache, profiled_layer)
            logits.block_until_ready()
            total += time.perf_counter() - began
        return total

    def decode_one(self, row: Row, cache: serving.Cache) -> serving.Cache:
        bench, times = self.bench, []
        for _ in range(TIMED):
            began = time.perf_counter()
            out, cache = bench.decode(bench.decode_one[row.pattern], row.pattern, at(cache, row.length))
            out.block_until_ready()
            times.append((time.perf_counter() - began) / bench.sizes.steps)
        row.step.append(statistics.median(times))
        return at(cache, row.length)

    def profile(self, pattern: str, cache: serving.Cache) -> serving.Cache:
        """Kernel times of the chunk that ends at each length, and of decoding there. `cache` is donated and comes back."""
        bench = self.bench
        by_length: dict[int, dict[str, float]] = {}  # stages of the chunk that ends there
        for length in bench.sizes.lengths:
            row = self.rows[pattern, length]
            held = [cache]

            def chunk(length: int = length, held: list[serving.Cache] = held) -> Any:
                before, tokens = at(held[0], length - bench.sizes.chunk), self.chunk_at(length)
                logits, held[0] = bench.prefill_chunk(pattern, tokens, before, profiled_layer)
                return logits

            def decode(length: int = length, held: list[serving.Cache] = held) -> Any:
                out, held[0] = bench.decode(bench.decode_one[pattern], pattern, at(held[0], length))
                return out

            try:
                decoding = stages.profile(decode)  # first: without CUPTI no layer is compiled for the other
                filling = stages.profile(chunk)
            except ValueError as error:
                row.notes.append(str(error))
                return held[0]
            cache = held[0]
            row.decode_stages = self.shares(row, decoding, "decode program")
            if row.decode_stages:
                row.notes.append(f"{decoding.launches / bench.sizes.steps:.0f} launches a decode step")
            by_length[length] = self.shares(row, filling, "prefill chunk")
            if all(by_length.values()):
                # A stage's time grows evenly with the keys between the chunks that were profiled.
                every = range(bench.sizes.chunk, length + 1, bench.sizes.chunk)
                for stage in filling.stages:
                    profiled = [one[stage] for one in by_length.values()]
                    row.prefill_stages[stage] = float(np.interp(every, list(by_length), profiled).sum())
            elif by_length[length]:
                row.notes.append("no shares of the prefill, because a shorter one has none")
        return cache

    def shares(self, row: Row, profile: Profile, what: str) -> dict[str, float]:
        """The stages of a profile; none, and a note in the row, where kernels are missing from it."""
        by_stage, why_not = profile.shares(what)
        if why_not:
            row.notes.append(why_not)
        return by_stage

    def measure_overlap(self, pattern: str, cache: serving.Cache) -> None:
        """Of neighbouring queries' selections in the last chunk, the mean over the F layers."""
        bench, length = self.bench, self.bench.sizes.lengths[-1]
        weights, lengths = bench.weights[pattern], np.full((1,), bench.sizes.chunk, np.int32)
        cache = at(cache, length - bench.sizes.chunk)
        x, positions = serving.embed(weights.embedding, self.chunk_at(length), cache.lengths, lengths, bench.config)
        overlaps = []

        def record(layer: int, x: jax.Array, selected: jax.Array | None) -> jax.Array:
            if selected is not None:
                overlaps.append(neighbours_overlap(selected))
            return x

        kv_length = padded_kv_length(bench.sizes.max_len, bench.sizes.max_len)
        serving.walk(weights, x, cache, positions, kv_length, bench.config, run_layer_in_place, record)
        self.overlap[pattern] = float(np.mean(jax.device_get(overlaps)))

    def full_step(self, pattern: str, one: serving.Cache, length: int) -> float:
        """Seconds of a step of the full cache, made of `one`, a request's on the host."""
        bench, (rows, program) = self.bench, self.bench.decode_full[pattern, length]
        cache = refill(one, rows, length, bench.sizes.room(length))
        times = []
        for _ in range(TIMED):
            began = time.perf_counter()
            out, cache = bench.decode(program, pattern, at(cache, length))
            out.block_until_ready()
            times.append((time.perf_counter() - began) / bench.sizes.steps)
        return statistics.median(times)

    def decode_full(self, pattern: str, one: serving.Cache) -> None:
        bench = self.bench
        for length in reversed(bench.sizes.full_lengths):
            row = self.rows[pattern, length]
            while row.full_step is None and not self.late():
                rows = bench.decode_full[pattern, length][0]
                failed = ""
                try:
                    row.full_step, row.full_rows = self.full_step(pattern, one, length), rows
                except jax.errors.JaxRuntimeError as error:
                    failed = str(error).splitlines()[0][:120]
                if failed:
                    print(f"{rows} rows of {length}: {failed}", flush=True)
                    if rows == 1 or "RESOURCE_EXHAUSTED" not in failed:
                        row.notes.append(f"{rows} rows of {length}: {failed}")
                        break
                    bench.compile_full(pattern, length, rows - max(1, rows // 20))
            self.show(row)

    def show(self, row: Row) -> None:
        print("  ".join(cells(record(row, self.bench.model, self.price))), flush=True)
        self.update(self)

    def run(self, rounds: int) -> int:
        """Runs the rounds there is time for, returns how many, and profiles after them: tracing might slow what follows."""
        done, began, every = 0, time.perf_counter(), list(self.bench.weights)
        while done < rounds:
            for number, pattern in enumerate(every, 1):
                if self.late():
                    return done
                self.one_schedule(pattern, first=done == 0)
                far = time_left(done * len(every) + number, rounds * len(every), began)
                print(f"schedules in all rounds: {far}, at most until --time_limit", flush=True)
            done += 1
            # Later rounds have no full cache and take less than the first; profiling takes one more.
            if time.perf_counter() + 1.4 * (time.perf_counter() - began) / done > self.deadline:
                break
        for pattern in self.bench.weights:
            if self.late():
                break
            self.measure_overlap(pattern, self.profile(pattern, self.prefill(pattern)))
        self.update(self)
        return done
