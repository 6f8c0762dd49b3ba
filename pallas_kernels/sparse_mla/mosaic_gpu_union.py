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

    def sparse_mla_union(index_gmem, list_gmem, count_gmem, bitmaps, totals):
        @plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, _REF, _REF, _SCALAR))
        def build(ctx, index_gmem, list_gmem, count_gmem, bitmaps, totals, tile):
            tile = ptx.scalar(tile)
            thread = ptx.thread()
            lane, warp = ptx.bit_and(thread, 31), ptx.shift_right(thread, 5)
            maps, sums = ptx.shared_address(bitmaps), ptx.shared_address(totals)
            twice = ptx.add(sums, 4 * WARPS)  # set where a query selected a key twice
            batch, local = ptx.div(tile, tasks.tiles_per_batch), ptx.rem(tile, tasks.tiles_per_batch)
            first = ptx.mul(local, packed)
            present = ptx.minimum(ptx.sub(tasks.queries, first), packed)  # queries of this tile, fewer at the end of a row
            source = ptx.offset(ptx.global_address(index_gmem), ptx.add(ptx.mul(batch, tasks.queries), first), 4 * k)
            target = ptx.offset(ptx.global_address(list_gmem), tile, 4 * length)
            always = ptx.compare("eq", ptx.constant(0), 0)

            def each_index(visit) -> None:
                """visit(query, place in its list, key) for every index, the threads side by side."""

                def one(step, carry):
                    place = ptx.add(ptx.mul(step, THREADS), thread)
                    inside = ptx.compare("slt", place, k)
                    for query in range(packed):
                        there = ptx.bit_and(ptx.select(inside, 1, 0), ptx.select(ptx.compare("sgt", present, query), 1, 0))
                        with ptx.when(ptx.compare("ne", there, 0)):
                            row = ptx.offset(source, ptx.constant(query), 4 * k)
                            visit(query, place, ptx.load_global(ptx.offset(row, place, 4)))
                    return carry

                ptx.loop(ptx.constant(-(-k // THREADS)), [], one)

            def clear(step, carry):
                ptx.store_shared_zeros(ptx.add(maps, ptx.shift_left(ptx.add(ptx.mul(step, THREADS), thread), 4)))
                return carry

            ptx.loop(ptx.constant(clears), [], clear)
            with ptx.when(ptx.compare("eq", thread, 0)):
                ptx.store_shared(twice, ptx.constant(0))
            ptx.block_barrier()

            def mark(query, place, key):
                with ptx.when(ptx.compare("sge", key, 0)):
                    key = ptx.minimum(key, tasks.keys - 1)
                    word = ptx.add(maps, 4 * words * query, ptx.shift_left(ptx.shift_right(key, 5), 2))
                    bit = ptx.shift_left(1, ptx.bit_and(key, 31))
                    before = ptx.or_shared(word, bit)
                    with ptx.when(ptx.compare("ne", ptx.bit_and(before, bit), 0)):
                        ptx.store_shared(twice, ptx.constant(1))

            each_index(mark)
            ptx.block_barrier()

            steps = words // THREADS  # of a warp, which walks words // WARPS words in order
            first_word = ptx.add(ptx.mul(warp, 32 * steps), lane)

            def words_at(step):
                at = ptx.add(maps, ptx.shift_left(ptx.add(first_word, ptx.mul(step, 32)), 2))
                return [ptx.load_shared(ptx.add(at, 4 * words * query)) for query in range(packed)]

            def any_of(bits):
                united = bits[0]
                for other in bits[1:]:
                    united = ptx.bit_or(united, other)
                return united

            def count(step, carry):
                return [ptx.add(carry[0], ptx.population(any_of(words_at(step))))]

            (mine,) = ptx.loop(ptx.constant(steps), [ptx.constant(0)], count)
            of_warp = ptx.sum_of_warp(mine)
            with ptx.when(ptx.compare("eq", lane, 0)):
                ptx.store_shared(ptx.add(sums, ptx.shift_left(warp, 2)), of_warp)
            ptx.block_barrier()
            before, total = ptx.constant(0), ptx.constant(0)
            for other in range(WARPS):
                here = ptx.load_shared(ptx.add(sums, 4 * other))
                before = ptx.add(before, ptx.select(ptx.compare("sgt", warp, other), here, 0))
                total = ptx.add(total, here)

            def write_step(step, carry):
                bits = words_at(step)
                united = any_of(bits)
                size = ptx.population(united)
                place = ptx.add(carry[0], ptx.sum_of_lanes_below(size))
                key = ptx.shift_left(ptx.add(first_word, ptx.mul(step, 32)), 5)

                def write(i, rest):
                    position = ptx.lowest_bit(rest[0])
                    owners = ptx.constant(0)
                    for query in range(packed):
                        owns = ptx.bit_and(ptx.shift_right(bits[query], position), 1)
                        owners = ptx.bit_or(owners, ptx.shift_left(owns, OWNER_SHIFT + query))
                    entry = ptx.bit_or(ptx.add(key, position), owners)
                    ptx.store_global(ptx.offset(target, ptx.add(place, i), 4), entry, always)
                    return [ptx.bit_and(rest[0], ptx.sub(rest[0], 1))]

                ptx.loop(size, [united], write)
                return [ptx.add(carry[0], ptx.sum_of_warp(size))]

            def finish(total):
                """Fills up the last pair of key blocks, and says how many pairs there are."""
                pairs = ptx.maximum(ptx.div(ptx.add(total, PAIR - 1), PAIR), 1)
                place = ptx.add(total, thread)
                inside = ptx.compare("slt", place, ptx.mul(pairs, PAIR))
                ptx.store_global(ptx.offset(target, place, 4), ptx.constant(0), inside)
                first_thread = ptx.compare("eq", thread, 0)
                ptx.store_global(ptx.offset(ptx.global_address(count_gmem), tile, 4), pairs, first_thread)

            def chain(query, place, key):
                owned = ptx.bit_or(ptx.minimum(key, tasks.keys - 1), ptx.constant(1 << (OWNER_SHIFT + query)))
                entry = ptx.select(ptx.compare("sge", key, 0), owned, 0)
                ptx.store_global(ptx.offset(target, ptx.add(place, query * k), 4), entry, always)

            is_twice = ptx.load_shared(twice)
            with ptx.when(ptx.compare("eq", is_twice, 0)):
                ptx.loop(ptx.constant(steps), [before], write_step)
                finish(total)
            with ptx.when(ptx.compare("ne", is_twice, 0)):
                each_index(chain)
                finish(ptx.mul(present, k))

        build(index_gmem, list_gmem, count_gmem, bitmaps, totals, jax.lax.axis_index("tile"))

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
