"""index_cross_entropy on Hopper: the value and its gradients in one pass over blocks of queries.

The gradient with respect to a score is q - p, whatever comes after: so the forward pass, which has both at hand, makes the
gradients of the index queries, keys and weights at once, and the backward pass scales them. Of what is quadratic only the
scores of one block of queries exist, float32 and at most BLOCK_BYTES, and their gradient. Per block, kernels and XLA in turn:

    scores   a tile of keys stays, a tile's index queries stream past two heads at a time, so that the products of one are
             computed while the other's are weighted; what softmax and the loss need of a tile is summed in it
    XLA      those sums united
    slopes   g = q - p in bfloat16 by tiles, and the same transposed
    queries  a tile of queries of one index head stays, keys and g stream past: dots again, where positive g k adds up. That
             sum times the query is the gradient of the head's weight, so no step has to add that up
    keys     a tile of keys stays, queries of two heads and g transposed stream past

Every sum is one thread block's in a fixed order, or XLA's: the result repeats bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.bits import WORD_BITS
from pallas_kernels.hopper.tiles import (
    BY_COLUMN,
    BY_ROW,
    ROWS,
    SWIZZLE_COLUMNS,
    TILE,
    WARPGROUPS,
    add_product,
    by_column,
    by_row,
    call_kernel,
    filled,
    first_seeing,
    product,
    selected_by_row,
    smem,
    stream,
    streamed,
    tiles_seen,
    to_tiles,
    vector,
)
from pallas_kernels.softmax import MASKED, START

BLOCK_BYTES = 512 * 2**20  # of one block's float32 scores
STAGES = 2
MAX_INDEX_WIDTH = 128  # narrower ones are padded to a multiple of SWIZZLE_COLUMNS
MIN_BLOCKS = 4 * hopper.NUM_SMS  # thread blocks that keep the device busy where some have little to do
STATISTICS = 4  # of a row in a tile: the largest score, the sum of exponentials, that of target times score, the target's sum


def why_not(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    target: jax.Array,
    words: jax.Array,
    *,
    q_positions: jax.Array | None = None,
) -> str | None:
    if reason := hopper.why_not():
        return reason
    if any(x.dtype != jnp.bfloat16 for x in (index_queries, index_keys)):
        return f"it takes bfloat16, not {index_queries.dtype} and {index_keys.dtype}"
    if index_queries.shape[3] > MAX_INDEX_WIDTH:
        return f"it takes index heads up to {MAX_INDEX_WIDTH} wide, these are {index_queries.shape[3]}"
    if 0 in index_queries.shape or 0 in index_keys.shape:
        return f"there is nothing to score: index queries are {index_queries.shape}, index keys {index_keys.shape}"
    return None


def fold_products(pairs: list[tuple[Any, Any]], fold: Any, start: jax.Array, rows: int, columns: int) -> jax.Array:
    """fold(fold(start, first product, 0), second product, 1) and so on; products are computed while earlier ones are folded."""

    def run(*accumulators: Any) -> jax.Array:
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        found = start
        for i, accumulator in enumerate(accumulators):
            found = fold(found, plgpu.wgmma_accumulator_load(accumulator, wait_n=len(pairs) - 1 - i), i)
        return found

    return pl.run_scoped(run, *[plgpu.ACC((rows, columns), jnp.float32)] * len(pairs))


def add_chained(total: jax.Array, pairs: list[tuple[Any, Any]], between: Any, seconds: list[Any], columns: int) -> jax.Array:
    """total + sum_i between(product of pair i, i) @ seconds[i]; `between` runs while other products are computed."""

    def run(*accumulators: Any) -> jax.Array:
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)

        def add(total_ref: Any) -> None:
            for i, (accumulator, second) in enumerate(zip(accumulators, seconds, strict=True)):
                factor = between(plgpu.wgmma_accumulator_load(accumulator, wait_n=len(pairs) - 1), i)
                plgpu.wgmma(total_ref, factor, second)

        return pl.run_state(add)(plgpu.ACC.init(total))

    return pl.run_scoped(run, *[plgpu.ACC((ROWS, columns), jnp.float32)] * len(pairs))


def _heads_of_a_step(heads: int) -> int:
    return 2 if heads % 2 == 0 else 1


def _scores(first, seen, q, k, w, words, target, rows_of_block: int, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """I [B, R, T] float32 of a block of R queries, MASKED where not selected, and STATISTICS [B, T / TILE, 4, R] of its tiles.

    Of a tile that the block's queries do not see nothing is written. q [B, S, Hi Di], k [B, T, Di], w [B, Hi, S],
    words [B, T / 32, S], target [B, S, T] bfloat16; first [1]: the block's first tile of queries; seen [R / TILE]: how many
    tiles of keys each tile of the block sees.
    """
    b, heads = q.shape[0], w.shape[1]
    t, width = k.shape[1], k.shape[2]
    n = _heads_of_a_step(heads)

    def scores_kernel(
        # Input
        first_ref,  # [1]
        seen_ref,  # [R / TILE]
        q_ref,  # [B, S, Hi Di]
        k_ref,  # [B, T, Di]
        w_ref,  # [B, Hi, S]
        words_ref,  # [B, T / 32, S]
        target_ref,  # [B, S, T]
        # Output
        out_ref,  # [B, R, T]
        statistics_ref,  # [B, T / TILE, 4, R]
        # Scratch
        k_sm,  # [TILE, Di]
        target_sm,  # [WARPGROUPS, ROWS, TILE]
        words_sm,  # [WARPGROUPS, TILE / 32, ROWS]
        statistics_sm,  # [WARPGROUPS, 4, ROWS]
        # Barriers
        keys_barrier,
        barriers,  # [WARPGROUPS]
    ):
        batch, i, j = lax.axis_index("batch"), lax.axis_index("queries"), lax.axis_index("keys")
        group = lax.axis_index("warpgroup")
        tile = first_ref[0] + i  # among all queries
        given, rows = pl.ds(tile * TILE + group * ROWS, ROWS), pl.ds(i * TILE + group * ROWS, ROWS)
        columns = pl.ds(j * TILE, TILE)
        sees = j < seen_ref[i]

        def context(run: Any) -> None:
            @pl.when(sees)
            def _load() -> None:
                @pl.when(group == 0)
                def _load_keys() -> None:
                    plgpu.copy_gmem_to_smem(k_ref.at[batch, columns], k_sm, keys_barrier)

                source = words_ref.at[batch, pl.ds(j * (TILE // WORD_BITS), TILE // WORD_BITS), given]
                plgpu.copy_gmem_to_smem(source, words_sm.at[group], barriers.at[group])
                plgpu.copy_gmem_to_smem(target_ref.at[batch, given, columns], target_sm.at[group], barriers.at[group])
                plgpu.barrier_wait(keys_barrier)

            total = run(filled((ROWS, TILE), 0))

            @pl.when(sees)
            def _store() -> None:
                plgpu.barrier_wait(barriers.at[group])
                mine = selected_by_row(words_sm.at[group], 0, TILE)
                scores = jnp.where(mine, total, MASKED)
                out_ref[batch, rows, columns] = scores
                top = scores.max(axis=1)
                p = plgpu.load(target_sm.at[group], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                p = jnp.where(mine, p, 0.0)
                statistics_sm[group, 0] = top
                statistics_sm[group, 1] = jnp.where(mine, jnp.exp(scores - by_row(top, TILE)), 0.0).sum(axis=1)
                statistics_sm[group, 2] = (p * jnp.where(mine, total, 0.0)).sum(axis=1)
                statistics_sm[group, 3] = p.sum(axis=1)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(statistics_sm.at[group], statistics_ref.at[batch, j, :, rows])
                plgpu.wait_smem_to_gmem(0)

        def step(_, q_sm, w_sm, total):
            mine = pl.ds(group * ROWS, ROWS)

            def add(total: jax.Array, dots: jax.Array, h: int) -> jax.Array:
                return total + jnp.maximum(dots, 0.0) * by_row(vector(w_sm.at[h, mine], BY_ROW), TILE)

            pairs = [(q_sm.at[mine, pl.ds(h * width, width)], k_sm.transpose((1, 0))) for h in range(n)]
            return fold_products(pairs, add, total, ROWS, TILE)

        specs = [streamed(TILE, n * width, lambda h: (tile, h)), plgpu.BlockSpec((n, TILE), lambda h: (h, tile))]
        stream(step, context, (jnp.where(sees, heads // n, 0),), specs, STAGES)(q_ref.at[batch], w_ref.at[batch])

    r = rows_of_block
    outputs = (
        jax.ShapeDtypeStruct((b, r, t), jnp.float32),
        jax.ShapeDtypeStruct((b, t // TILE, STATISTICS, r), jnp.float32),
    )
    scratch = (
        smem(TILE, width),
        smem(WARPGROUPS, ROWS, TILE),
        plgpu.SMEM((WARPGROUPS, TILE // WORD_BITS, ROWS), jnp.int32),
        plgpu.SMEM((WARPGROUPS, STATISTICS, ROWS), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    )
    grid, names = (t // TILE, r // TILE, b), ("keys", "queries", "batch")
    run = call_kernel(scores_kernel, outputs, grid, names, scratch, interpret)
    return run(first, seen, q, k, w, words, target)


def _slopes(first, seen, scores, lse, mass, target, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """g = mass * softmax - target [B, R, T] bfloat16 of a block's scores, 0 where not selected, and g transposed [B, T, R].

    lse and mass [B, R] float32; else as `_scores`. Nothing is written to tiles that the block's queries do not see.
    """
    b, r, t = scores.shape

    def slopes_kernel(
        # Input
        first_ref,  # [1]
        seen_ref,  # [R / TILE]
        scores_ref,  # [B, R, T]
        lse_ref,  # [B, R]
        mass_ref,  # [B, R]
        target_ref,  # [B, S, T]
        # Output
        g_ref,  # [B, R, T]
        transposed_ref,  # [B, T, R]
        # Scratch
        g_sm,  # [WARPGROUPS, ROWS, TILE]
        transposed_sm,  # [WARPGROUPS, TILE, ROWS]
    ):
        batch, i, j = lax.axis_index("batch"), lax.axis_index("queries"), lax.axis_index("keys")
        group = lax.axis_index("warpgroup")
        given = pl.ds((first_ref[0] + i) * TILE + group * ROWS, ROWS)
        rows, columns = pl.ds(i * TILE + group * ROWS, ROWS), pl.ds(j * TILE, TILE)

        def load(ref: Any, layout: Any) -> jax.Array:
            return plgpu.load(ref, layout=layout, optimized=False)

        @pl.when(j < seen_ref[i])
        def _sees() -> None:
            scores = load(scores_ref.at[batch, rows, columns], plgpu.Layout.WGMMA)
            p = load(target_ref.at[batch, given, columns], plgpu.Layout.WGMMA).astype(jnp.float32)
            lse, mass = load(lse_ref.at[batch, rows], BY_ROW), load(mass_ref.at[batch, rows], BY_ROW)
            q = jnp.exp(scores - by_row(lse, TILE)) * by_row(mass, TILE)
            # All scores of a query that selects nothing are MASKED, and their softmax means nothing.
            g = jnp.where(scores > START, q - p, 0.0).astype(jnp.bfloat16)
            g_sm[group] = g
            transposed_sm.at[group].transpose((1, 0))[...] = plgpu.layout_cast(g, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(g_sm.at[group], g_ref.at[batch, rows, columns])
            plgpu.copy_smem_to_gmem(transposed_sm.at[group], transposed_ref.at[batch, columns, rows])
            plgpu.wait_smem_to_gmem(0)

    outputs = jax.ShapeDtypeStruct((b, r, t), jnp.bfloat16), jax.ShapeDtypeStruct((b, t, r), jnp.bfloat16)
    scratch = smem(WARPGROUPS, ROWS, TILE), smem(WARPGROUPS, TILE, ROWS)
    grid, names = (t // TILE, r // TILE, b), ("keys", "queries", "batch")
    run = call_kernel(slopes_kernel, outputs, grid, names, scratch, interpret, copies=False)
    return run(first, seen, scores, lse, mass, target)


def _of_queries(first, seen, q, k, w, g, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """The gradients of a block's index queries [B, R, Hi Di] and weights [B, Hi, R] from g [B, R, T] of its scores.

    q [B, S, Hi Di] and w [B, Hi, S] are of all queries; first and seen are as `_scores` takes them.
    """
    b, heads, width, r = q.shape[0], w.shape[1], k.shape[2], g.shape[1]

    def index_dq_kernel(
        # Input
        first_ref,  # [1]
        seen_ref,  # [R / TILE]
        q_ref,  # [B, S, Hi Di]
        k_ref,  # [B, T, Di]
        w_ref,  # [B, Hi, S]
        g_ref,  # [B, R, T]
        # Output
        dq_ref,  # [B, R, Hi Di]
        dw_ref,  # [B, Hi, R]
        # Scratch
        q_sm,  # [WARPGROUPS, ROWS, Di]
        w_sm,  # [WARPGROUPS, ROWS]
        # Barriers
        barriers,  # [WARPGROUPS]
    ):
        batch, head, group = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        i = r // TILE - 1 - lax.axis_index("queries")  # those with most to do start first
        given, rows = pl.ds((first_ref[0] + i) * TILE + group * ROWS, ROWS), pl.ds(i * TILE + group * ROWS, ROWS)
        columns = pl.ds(head * width, width)

        def context(run: Any) -> None:
            barrier = barriers.at[group]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, given, columns], q_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(w_ref.at[batch, head, given], w_sm.at[group], barrier)
            plgpu.barrier_wait(barrier)
            weights = vector(w_sm.at[group], BY_ROW)
            positive = run(filled((ROWS, width), 0))
            queries = plgpu.load(q_sm.at[group], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            w_sm[group] = (positive * queries).sum(axis=1)
            q_sm[group] = (positive * by_row(weights, width)).astype(q_sm.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm.at[group], dq_ref.at[batch, rows, columns])
            plgpu.copy_smem_to_gmem(w_sm.at[group], dw_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def step(_, k_sm, g_sm, positive):
            dots = product(q_sm.at[group], k_sm.transpose((1, 0)), ROWS, TILE)
            of_scores = plgpu.load(g_sm.at[pl.ds(group * ROWS, ROWS)], layout=plgpu.Layout.WGMMA)
            return add_product(positive, jnp.where(dots > 0, of_scores, jnp.zeros_like(of_scores)), k_sm)

        specs = [streamed(TILE, width, lambda j: (j, 0)), streamed(TILE, TILE, lambda j: (i, j))]
        stream(step, context, (seen_ref[i],), specs, STAGES)(k_ref.at[batch], g_ref.at[batch])

    outputs = jax.ShapeDtypeStruct((b, r, heads * width), q.dtype), jax.ShapeDtypeStruct((b, heads, r), jnp.float32)
    scratch = (
        smem(WARPGROUPS, ROWS, width),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    )
    grid, names = (heads, r // TILE, b), ("head", "queries", "batch")
    return call_kernel(index_dq_kernel, outputs, grid, names, scratch, interpret)(first, seen, q, k, w, g)


def _head_groups(heads: int, tiles: int) -> int:
    """Into how many groups heads fall, each with a sum of its own: the fewest that fill the device."""
    return next((n for n in range(1, heads) if heads % n == 0 and n * tiles >= MIN_BLOCKS), heads)


def _of_keys(first, seen, q, k, w, g_transposed, interpret: Any) -> jax.Array:
    """The gradient of index keys [B, T, Di] float32 from that of a block's scores [B, T, R]; else as `_of_queries`."""
    b, heads, r = q.shape[0], w.shape[1], g_transposed.shape[2]
    t, width = k.shape[1], k.shape[2]
    n = _heads_of_a_step(heads)
    groups = _head_groups(heads // n, b * (t // TILE))
    per_group = heads // n // groups

    def index_dk_kernel(
        # Input
        first_ref,  # [1]
        first_seeing_ref,  # [T / TILE]
        q_ref,  # [B, S, Hi Di]
        k_ref,  # [B, T, Di]
        w_ref,  # [B, Hi, S]
        g_ref,  # [B, T, R]
        # Output
        dk_ref,  # [B, groups, T, Di]
        # Scratch
        k_sm,  # [WARPGROUPS, ROWS, Di]
        # Barriers
        barriers,  # [WARPGROUPS]
    ):
        batch, j, head_group = lax.axis_index("batch"), lax.axis_index("keys"), lax.axis_index("heads")
        group = lax.axis_index("warpgroup")
        rows = pl.ds(j * TILE + group * ROWS, ROWS)
        start = first_seeing_ref[j]  # tile of the block's queries: those before see none of these keys
        given = first_ref[0] + start

        def context(run: Any) -> None:
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows], k_sm.at[group], barriers.at[group])
            plgpu.barrier_wait(barriers.at[group])
            dk_ref[batch, head_group, rows] = run(filled((ROWS, width), 0))

        def step(_, q_sm, w_sm, g_sm, dk):
            def of_relu(dots: jax.Array, h: int) -> jax.Array:
                # Loaded for each head: registers have no room for it beside the products of the next one.
                of_scores = plgpu.load(g_sm.at[pl.ds(group * ROWS, ROWS)], layout=plgpu.Layout.WGMMA)
                weighted = of_scores.astype(jnp.float32) * by_column(vector(w_sm.at[h], BY_COLUMN))
                return jnp.where(dots > 0, weighted, 0.0).astype(q_sm.dtype)

            queries = [q_sm.at[:, pl.ds(h * width, width)] for h in range(n)]
            pairs = [(k_sm.at[group], x.transpose((1, 0))) for x in queries]
            return add_chained(dk, pairs, of_relu, queries, TILE)

        specs = [
            streamed(TILE, n * width, lambda i, h: (given + i, head_group * per_group + h)),
            plgpu.BlockSpec((n, TILE), lambda i, h: (head_group * per_group + h, given + i)),
            streamed(TILE, TILE, lambda i, h: (j, start + i)),
        ]
        steps = r // TILE - start, per_group
        stream(step, context, steps, specs, STAGES)(q_ref.at[batch], w_ref.at[batch], g_ref.at[batch])

    output = jax.ShapeDtypeStruct((b, groups, t, width), jnp.float32)
    scratch = (smem(WARPGROUPS, ROWS, width), plgpu.Barrier(num_barriers=WARPGROUPS))
    grid, names = (groups, t // TILE, b), ("heads", "keys", "batch")
    run = call_kernel(index_dk_kernel, output, grid, names, scratch, interpret)
    return jnp.sum(run(first, first_seeing(seen, t), q, k, w, g_transposed), axis=1)


def block_rows(batch: int, queries: int, keys: int, budget: int) -> int:
    """Queries of a block whose float32 scores take at most `budget` bytes: whole tiles, even blocks."""
    tiles = -(-queries // TILE)
    most = max(1, budget // (4 * batch * keys * TILE))
    return -(-tiles // -(-tiles // most)) * TILE


def _united(seen: jax.Array, statistics: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The value summed over a block's queries, and by query [B, R] the log-sum-exp of scores and the target's sum."""
    sees = jnp.arange(statistics.shape[1])[:, None] < jnp.repeat(seen, TILE)  # the rest was never written
    fills = MASKED, 0.0, 0.0, 0.0
    top, total, hit, mass = (jnp.where(sees, statistics[:, :, i], fill) for i, fill in enumerate(fills))
    highest = jnp.max(top, axis=1, keepdims=True)
    total = jnp.sum(total * jnp.exp(top - highest), axis=1)
    lse = jnp.where(total > 0, highest[:, 0] + jnp.log(jnp.where(total > 0, total, 1.0)), 0.0)
    mass = jnp.sum(mass, axis=1)
    return jnp.sum(mass * lse - jnp.sum(hit, axis=1)), lse, mass


def _block(first, seen, q, k, w, words, target, rows: int, interpret: Any, gradients: bool) -> tuple[jax.Array, Any]:
    """The value summed over a block's queries, and the gradients of its queries and weights, and of all keys, if wanted."""
    scores, statistics = _scores(first, seen, q, k, w, words, target, rows, interpret)
    value, lse, mass = _united(seen, statistics)
    if not gradients:
        return value, None
    g, g_transposed = _slopes(first, seen, scores, lse, mass, target, interpret)
    dq, dw = _of_queries(first, seen, q, k, w, g, interpret)
    return value, (dq, dw, _of_keys(first, seen, q, k, w, g_transposed, interpret))


def run_blocks(
    arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, interpret: Any, gradients: bool
) -> tuple[jax.Array, Any]:
    """The value and the gradients of index queries, keys and head weights, None unless wanted."""
    index_queries, index_keys, head_weights, target, words = arrays
    b, s, heads, width = index_queries.shape
    t = index_keys.shape[1]
    rows = block_rows(b, s, t, BLOCK_BYTES)
    q = to_tiles(index_queries.reshape(b, s, -1), 1, rows)
    k = to_tiles(index_keys, 1)
    w = to_tiles(head_weights.astype(jnp.float32).swapaxes(1, 2), 2, rows)
    words = to_tiles(to_tiles(words, 1, TILE // WORD_BITS), 2, rows)
    target = to_tiles(to_tiles(target.astype(jnp.bfloat16), 1, rows), 2)
    seen = tiles_seen(q_positions, s, t)
    seen = jnp.pad(seen, (0, -seen.size % (rows // TILE)), mode="edge")

    def step(carry: Any, i: jax.Array) -> Any:
        total, of_keys = carry
        first = i * (rows // TILE)
        of_block = lax.dynamic_slice_in_dim(seen, first, rows // TILE)
        value, found = _block(first[None], of_block, q, k, w, words, target, rows, interpret, gradients)
        if found is None:
            return (total + value, of_keys), None
        return (total + value, of_keys + found[2]), found[:2]

    start = jnp.zeros((), jnp.float32), jnp.zeros(k.shape, jnp.float32)
    (total, of_keys), of_queries = lax.scan(step, start, jnp.arange(q.shape[1] // rows, dtype=jnp.int32))
    if not gradients:
        return total, None
    dq, dw = of_queries  # [blocks, B, R, Hi Di], [blocks, B, Hi, R]
    dq = dq.swapaxes(0, 1).reshape(b, -1, heads, width)[:, :s]
    dw = dw.transpose(1, 0, 3, 2).reshape(b, -1, heads)[:, :s]
    return total, (dq, of_keys[:, :t].astype(index_keys.dtype), dw.astype(head_weights.dtype))


def scaled_gradients(gradients: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients that the forward pass made times what comes after, in their own dtypes."""
    return tuple((cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype) for gradient in gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def miss(arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, interpret: Any) -> jax.Array:
    """The cross-entropy of `run_blocks`, whose gradients are made with it where they are wanted."""
    return run_blocks(arrays, q_positions, interpret, gradients=False)[0]


def _keep(arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, interpret: Any) -> tuple[jax.Array, Any]:
    return run_blocks(arrays, q_positions, interpret, gradients=True)


def _pull(interpret: Any, gradients: tuple[jax.Array, ...], cotangent: jax.Array) -> Any:
    return (*scaled_gradients(gradients, cotangent), None, None), None


miss.defvjp(_keep, _pull)


def index_cross_entropy(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    target: jax.Array,
    words: jax.Array,
    *,
    q_positions: jax.Array | None = None,
    interpret: Any = None,
) -> jax.Array:
    index_queries, index_keys = to_tiles(index_queries, 3, SWIZZLE_COLUMNS), to_tiles(index_keys, 2, SWIZZLE_COLUMNS)
    return miss((index_queries, index_keys, head_weights, target, words), q_positions, interpret)
