"""The union of the key lists of neighbouring queries, each key with the queries that own it, for Hopper.

Queries with few heads share a tile of 64 rows in the attention kernel, which then has to visit every key that any of them
selected, once. One block of the grid builds one tile's list: every query sets its keys' bits in a bitmap of its own in
shared memory, then the block walks the words of the bitmaps in order, 32 keys a lane, and writes the keys of the union,
ascending, at the place that prefix sums over lanes, steps and warps give. So lists need not be sorted, and the cost is
one pass over the indices and one over N / 32 words, 3 to 5 % of the attention's.

A bitmap cannot hold a key twice. Where a query selected one twice (no indexer does, but nothing forbids it), the tile's
lists are written one after the other instead, which is the same attention over a longer list.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ptx
from pallas_kernels.sparse_mla.mosaic_gpu_attention_tasks import OWNER_SHIFT, PAIR, Tasks

WARPGROUPS = 4
THREADS = 128 * WARPGROUPS
WARPS = THREADS // 32
SHARED_BYTES = 212 * 1024  # for bitmaps

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


def bitmap_words(keys: int) -> int:
    """Words of one query's bitmap: whole steps of every thread."""
    return -(-keys // (32 * THREADS)) * THREADS


def most_queries(keys: int) -> int:
    """How many queries' bitmaps fit in shared memory."""
    return SHARED_BYTES // (4 * bitmap_words(keys))  # and what clearing them in whole steps adds, at most 8 KB


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A thread of the block that builds a tile's list, and where its inputs, outputs and shared memory are."""

    tasks: Tasks
    k: int  # entries of a query's list
    words: int  # of a query's bitmap
    index: ptx.Word  # of this thread
    lane: ptx.Word
    warp: ptx.Word
    bitmaps: ptx.Word  # [packed][words]
    sums: ptx.Word  # [WARPS], keys of a warp's words
    repeats: ptx.Word  # whether a query selected a key twice
    present: ptx.Word  # queries of this tile, fewer at the end of a batch row
    source: ptx.Address  # the tile's first query's list
    target: ptx.Address  # the tile's list
    number: ptx.Word  # of the tile
    counts: Any  # [tasks.lists] pairs of key blocks
    always: ptx.Predicate

    @staticmethod
    def of(tasks: Tasks, k: int, tile: ptx.Word, indices, lists, counts, bitmaps, totals) -> _Tile:
        thread = ptx.thread()
        lane, warp = thread & 31, thread >> 5
        maps, sums = ptx.shared_address(bitmaps), ptx.shared_address(totals)
        repeats = sums + 4 * WARPS
        batch, local = tile // tasks.tiles_per_batch, tile % tasks.tiles_per_batch
        first = local * tasks.packed
        present = ptx.min_s32(tasks.queries - first, tasks.packed)
        source = ptx.offset(ptx.global_address(indices), batch * tasks.queries + first, 4 * k)
        target = ptx.offset(ptx.global_address(lists), tile, 4 * tasks.pairs * PAIR)
        always = ptx.constant(0).equals(0)
        words = bitmap_words(tasks.keys)
        where = maps, sums, repeats, present, source, target, tile, counts
        return _Tile(tasks, k, words, thread, lane, warp, *where, always)

    @property
    def steps(self) -> int:
        """Steps of a warp, which walks words // WARPS words in order, 32 at a time."""
        return self.words // THREADS

    def build(self, clears: int) -> None:
        self._clear(clears)
        self._each_index(self._mark)
        ptx.block_barrier()
        first_word = self.warp * (32 * self.steps) + self.lane
        before, total = self._keys_before(first_word)
        repeats = ptx.load_shared(self.repeats)
        with ptx.when(repeats.equals(0)):
            ptx.loop(ptx.constant(self.steps), [before], functools.partial(self._write_step, first_word))
            self._finish(total)
        with ptx.when(repeats.differs(0)):
            self._each_index(self._chain)
            self._finish(self.present * self.k)

    def _each_index(self, visit: Callable[[int, ptx.Word, ptx.Word], None]) -> None:
        """visit(query, position in its list, key) for every index, the threads side by side."""

        def step(step, carry):
            position = step * THREADS + self.index
            inside = position.signed < self.k
            for query in range(self.tasks.packed):
                there = ptx.select(inside, 1, 0) & ptx.select(self.present.signed > query, 1, 0)
                with ptx.when(there.differs(0)):
                    row = ptx.offset(self.source, ptx.constant(query), 4 * self.k)
                    visit(query, position, ptx.load_global(ptx.offset(row, position, 4)))
            return carry

        ptx.loop(ptx.constant(-(-self.k // THREADS)), [], step)

    def _clear(self, clears: int) -> None:
        def step(step, carry):
            thread_of_all = step * THREADS + self.index
            ptx.store_shared_zeros(self.bitmaps + (thread_of_all << 4))
            return carry

        ptx.loop(ptx.constant(clears), [], step)
        with ptx.when(self.index.equals(0)):
            ptx.store_shared(self.repeats, ptx.constant(0))
        ptx.block_barrier()

    def _mark(self, query: int, position: ptx.Word, key: ptx.Word) -> None:
        """Sets a key's bit."""
        with ptx.when(key.signed >= 0):
            key = ptx.min_s32(key, self.tasks.keys - 1)
            word = self.bitmaps + 4 * self.words * query + ((key >> 5) << 2)
            bit = 1 << (key & 31)
            before = ptx.or_shared(word, bit)
            with ptx.when((before & bit).differs(0)):
                ptx.store_shared(self.repeats, ptx.constant(1))

    def _words_at(self, first_word: ptx.Word, step: ptx.Word) -> list[Any]:
        """This lane's word of every query's bitmap; first_word is its first."""
        at = self.bitmaps + ((first_word + step * 32) << 2)
        return [ptx.load_shared(at + 4 * self.words * query) for query in range(self.tasks.packed)]

    def _keys_before(self, first_word: ptx.Word) -> tuple[ptx.Word, ptx.Word]:
        """Keys of the union in the words of the warps before this one, and of all."""

        def count(step, carry):
            return [carry[0] + ptx.population(functools.reduce(operator.or_, self._words_at(first_word, step)))]

        (mine,) = ptx.loop(ptx.constant(self.steps), [ptx.constant(0)], count)
        of_warp = ptx.sum_of_warp(mine)
        with ptx.when(self.lane.equals(0)):
            ptx.store_shared(self.sums + (self.warp << 2), of_warp)
        ptx.block_barrier()
        before, total = ptx.constant(0), ptx.constant(0)
        for other in range(WARPS):
            here = ptx.load_shared(self.sums + 4 * other)
            before = before + ptx.select(self.warp.signed > other, here, 0)
            total = total + here
        return before, total

    def _write_step(self, first_word: ptx.Word, step: ptx.Word, carry: list[Any]) -> list[Any]:
        """The keys of 32 words, a word a lane, into the list from position carry[0] on."""
        bits = self._words_at(first_word, step)
        united = functools.reduce(operator.or_, bits)
        size = ptx.population(united)
        position = carry[0] + ptx.sum_of_lanes_below(size)
        key = (first_word + step * 32) << 5

        def write(i, rest):
            bit = ptx.lowest_bit(rest[0])
            owners = ptx.constant(0)
            for query in range(self.tasks.packed):
                owns = (bits[query] >> bit) & 1
                owners = owners | (owns << (OWNER_SHIFT + query))
            entry = (key + bit) | owners
            self._write(position + i, entry)
            return [rest[0] & (rest[0] - 1)]

        ptx.loop(size, [united], write)
        return [carry[0] + ptx.sum_of_warp(size)]

    def _chain(self, query: int, position: ptx.Word, key: ptx.Word) -> None:
        """Writes an index where it is if the lists follow one another."""
        owned = ptx.min_s32(key, self.tasks.keys - 1) | ptx.constant(1 << (OWNER_SHIFT + query))
        entry = ptx.select(key.signed >= 0, owned, 0)
        self._write(position + query * self.k, entry)

    def _write(self, position: ptx.Word, entry: ptx.Word) -> None:
        ptx.store_global(ptx.offset(self.target, position, 4), entry, self.always)

    def _finish(self, total: ptx.Word) -> None:
        """Fills up the last pair of key blocks, and says how many pairs there are."""
        pairs = ptx.max_s32((total + (PAIR - 1)) // PAIR, 1)
        position = total + self.index
        inside = position.signed < pairs * PAIR
        ptx.store_global(ptx.offset(self.target, position, 4), ptx.constant(0), inside)
        first_thread = self.index.equals(0)
        ptx.store_global(ptx.offset(ptx.global_address(self.counts), self.number, 4), pairs, first_thread)


def unite(indices: jax.Array, tasks: Tasks) -> tuple[jax.Array, jax.Array]:
    """The lists of tiles of `tasks.packed` queries.

    Args:
      indices: [B * S, k] int32 in [0, T), -1 where empty.

    Returns:
      [tasks.lists, tasks.pairs * 128] int32 entries key | owners << 24, of which the first counts[i] * 128 of row i are
      set, 0 where nobody owns them; and counts [tasks.lists] int32, at least 1.
    """
    k, packed, words = indices.shape[1], tasks.packed, bitmap_words(tasks.keys)
    clears = -(-packed * words // (4 * THREADS))  # 16 bytes a thread each; the bitmaps' memory is whole clears
    length = tasks.pairs * PAIR
    if packed * k > length:
        raise ValueError(f"a list of {length} entries does not hold {packed} queries of {k} keys")

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, _REF, _REF, _SCALAR))
    def build(ctx, indices, lists, counts, bitmaps, totals, tile):
        _Tile.of(tasks, k, ptx.scalar(tile), indices, lists, counts, bitmaps, totals).build(clears)

    def sparse_mla_union(
        # Input
        indices,  # [B * S, k] int32
        # Output
        lists,  # [tasks.lists, length] int32
        counts,  # [tasks.lists] int32
        # Scratch
        bitmaps,  # [packed][words] int32 and what is left of the last clear
        totals,  # [32] int32: keys of every warp's words, then whether a query selected a key twice
    ):
        build(indices, lists, counts, bitmaps, totals, jax.lax.axis_index("tile"))

    kernel = plgpu.kernel(
        sparse_mla_union,
        out_type=(
            jax.ShapeDtypeStruct((tasks.lists, length), jnp.int32),
            jax.ShapeDtypeStruct((tasks.lists,), jnp.int32),
        ),
        scratch_types=(plgpu.SMEM((clears * 4 * THREADS,), jnp.int32), plgpu.SMEM((32,), jnp.int32)),
        grid=(tasks.lists,),
        grid_names=("tile",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return kernel(indices)
