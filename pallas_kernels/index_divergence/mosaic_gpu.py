"""index_divergence on Hopper: all of it, gradients too, in one pass over blocks of queries.

The divergence's gradient with respect to a score is q - p, whatever comes after: so the forward pass, which has both at
hand, makes the gradients of the index queries, keys and weights at once, and the backward pass scales them. Nothing is
computed twice, and of what is quadratic only the scores and targets of one block of queries exist, float32 and at most
BLOCK_BYTES each. Per block, kernels and XLA in turn:

    target   p: a tile of queries and keys stays, the heads' logits stream past and add up as probabilities
    scores   I: the same with relu and head weights
    XLA      softmax of I, the divergence, g = q - p in bfloat16, and g transposed
    queries  a tile of queries of one index head stays, keys and g stream past: dots again, where positive g k adds up
    keys     a tile of keys stays, queries of some of the heads and g transposed stream past

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
from pallas_kernels.softmax import LOG2E, MASKED, START

BLOCK_BYTES = 128 * 2**20  # of one block's float32 scores, and as many of its targets
STAGES = 2
MAX_WIDTH, MAX_INDEX_WIDTH = 192, 128  # narrower ones are padded to a multiple of SWIZZLE_COLUMNS
MIN_BLOCKS = 2 * hopper.NUM_SMS  # thread blocks that keep the device busy


def why_not(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
) -> str | None:
    if reason := hopper.why_not():
        return reason
    if any(x.dtype != jnp.bfloat16 for x in (index_queries, index_keys, queries, keys)):
        return f"it takes bfloat16, not {index_queries.dtype}, {index_keys.dtype}, {queries.dtype} and {keys.dtype}"
    if queries.shape[3] > MAX_WIDTH or index_queries.shape[3] > MAX_INDEX_WIDTH:
        widths = f"{queries.shape[3]} and {index_queries.shape[3]}"
        return f"it takes heads up to {MAX_WIDTH} and index heads up to {MAX_INDEX_WIDTH}, these are {widths} wide"
    if 0 in queries.shape or 0 in keys.shape:
        return "there is nothing to attend"
    return None


def _target(seen, q, k, lse, words, heads: int, scale: float, interpret: Any) -> jax.Array:
    """Mean over heads of the probabilities [B, R, T] float32 of queries [B, R, H D], 0 where not selected.

    lse [B, H, R] to base 2, words [B, T / 32, R]; seen [R / TILE]: how many tiles of keys each tile of queries sees.
    """
    b, r, width = q.shape[0], q.shape[1], q.shape[2] // heads
    t = k.shape[1]

    def target_kernel(seen_ref, q_ref, k_ref, lse_ref, words_ref, out_ref, words_sm, barriers):
        batch, i, j = lax.axis_index("batch"), lax.axis_index("queries"), lax.axis_index("keys")
        group = lax.axis_index("warpgroup")
        rows = pl.ds(i * TILE + group * ROWS, ROWS)

        def context(run: Any) -> None:
            source = words_ref.at[batch, pl.ds(j * (TILE // WORD_BITS), TILE // WORD_BITS), rows]
            plgpu.copy_gmem_to_smem(source, words_sm.at[group], barriers.at[group])
            plgpu.barrier_wait(barriers.at[group])
            total = run(filled((ROWS, TILE), 0))
            mine = selected_by_row(words_sm.at[group], 0, TILE)
            out_ref[batch, rows, pl.ds(j * TILE, TILE)] = jnp.where(mine, total * (1 / heads), 0.0)

        def step(_, q_sm, k_sm, lse_sm, total):
            logits = product(q_sm.at[pl.ds(group * ROWS, ROWS)], k_sm.transpose((1, 0)), ROWS, TILE)
            lse = vector(lse_sm.at[0, pl.ds(group * ROWS, ROWS)], BY_ROW)
            # A key that is not selected may have any logit: bound it, its probability is dropped in the end.
            exponent = jnp.minimum(logits * (scale * LOG2E) - by_row(lse, TILE), 1.0)
            return total + jnp.exp2(exponent)

        specs = [
            streamed(TILE, width, lambda h: (i, h)),
            streamed(TILE, width, lambda h: (j, h)),
            plgpu.BlockSpec((1, TILE), lambda h: (h, i)),
        ]
        steps = jnp.where(j < seen_ref[i], heads, 0)
        stream(step, context, (steps,), specs, STAGES)(q_ref.at[batch], k_ref.at[batch], lse_ref.at[batch])

    grid, names = (t // TILE, r // TILE, b), ("keys", "queries", "batch")
    scratch = (
        plgpu.SMEM((WARPGROUPS, TILE // WORD_BITS, ROWS), jnp.int32),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    run = call_kernel(target_kernel, jax.ShapeDtypeStruct((b, r, t), jnp.float32), grid, names, scratch, interpret)
    return run(seen, q, k, lse, words)


def _scores(seen, q, k, w, words, interpret: Any) -> jax.Array:
    """I [B, R, T] float32 of index queries [B, R, Hi Di], keys [B, T, Di] and weights [B, Hi, R], MASKED where not selected."""
    b, r, heads = q.shape[0], q.shape[1], w.shape[1]
    t, width = k.shape[1], k.shape[2]

    def scores_kernel(seen_ref, q_ref, k_ref, w_ref, words_ref, out_ref, k_sm, words_sm, barriers):
        batch, i, j = lax.axis_index("batch"), lax.axis_index("queries"), lax.axis_index("keys")
        group = lax.axis_index("warpgroup")
        rows = pl.ds(i * TILE + group * ROWS, ROWS)

        def context(run: Any) -> None:
            # Each warpgroup has a copy of the keys, so that neither waits for the other.
            barrier = barriers.at[group]
            source = words_ref.at[batch, pl.ds(j * (TILE // WORD_BITS), TILE // WORD_BITS), rows]
            plgpu.copy_gmem_to_smem(source, words_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(k_ref.at[batch, pl.ds(j * TILE, TILE)], k_sm.at[group], barrier)
            plgpu.barrier_wait(barrier)
            total = run(filled((ROWS, TILE), 0))
            mine = selected_by_row(words_sm.at[group], 0, TILE)
            out_ref[batch, rows, pl.ds(j * TILE, TILE)] = jnp.where(mine, total, MASKED)

        def step(_, q_sm, w_sm, total):
            dots = product(q_sm.at[pl.ds(group * ROWS, ROWS)], k_sm.at[group].transpose((1, 0)), ROWS, TILE)
            weights = vector(w_sm.at[0, pl.ds(group * ROWS, ROWS)], BY_ROW)
            return total + jnp.maximum(dots, 0.0) * by_row(weights, TILE)

        specs = [streamed(TILE, width, lambda h: (i, h)), plgpu.BlockSpec((1, TILE), lambda h: (h, i))]
        steps = jnp.where(j < seen_ref[i], heads, 0)
        stream(step, context, (steps,), specs, STAGES)(q_ref.at[batch], w_ref.at[batch])

    grid, names = (t // TILE, r // TILE, b), ("keys", "queries", "batch")
    scratch = (
        smem(WARPGROUPS, TILE, width),
        plgpu.SMEM((WARPGROUPS, TILE // WORD_BITS, ROWS), jnp.int32),
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    )
    run = call_kernel(scores_kernel, jax.ShapeDtypeStruct((b, r, t), jnp.float32), grid, names, scratch, interpret)
    return run(seen, q, k, w, words)


def _of_queries(seen, q, k, w, g, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """The gradients of index queries [B, R, Hi Di] and weights [B, Hi, R] from g [B, R, T] of the scores."""
    b, r, heads, width = q.shape[0], q.shape[1], w.shape[1], k.shape[2]

    def index_dq_kernel(seen_ref, q_ref, k_ref, w_ref, g_ref, dq_ref, dw_ref, q_sm, w_sm, barriers):
        batch, i, head = lax.axis_index("batch"), lax.axis_index("queries"), lax.axis_index("head")
        group = lax.axis_index("warpgroup")
        rows, columns = pl.ds(i * TILE + group * ROWS, ROWS), pl.ds(head * width, width)

        def context(run: Any) -> None:
            barrier = barriers.at[group]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, columns], q_sm.at[group], barrier)
            plgpu.copy_gmem_to_smem(w_ref.at[batch, head, rows], w_sm.at[group], barrier)
            plgpu.barrier_wait(barrier)
            weights = vector(w_sm.at[group], BY_ROW)
            dq, dw = run((filled((ROWS, width), 0), filled((ROWS,), 0, BY_ROW)))
            q_sm[group] = (dq * by_row(weights, width)).astype(q_sm.dtype)
            w_sm[group] = dw
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm.at[group], dq_ref.at[batch, rows, columns])
            plgpu.copy_smem_to_gmem(w_sm.at[group], dw_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def step(_, k_sm, g_sm, carry):
            dq, dw = carry
            dots = product(q_sm.at[group], k_sm.transpose((1, 0)), ROWS, TILE)
            of_scores = plgpu.load(g_sm.at[pl.ds(group * ROWS, ROWS)], layout=plgpu.Layout.WGMMA)
            of_relu = jnp.where(dots > 0, of_scores.astype(jnp.float32), 0.0)
            dw = dw + (of_relu * dots).sum(axis=1)
            return add_product(dq, of_relu.astype(k_sm.dtype), k_sm), dw

        specs = [streamed(TILE, width, lambda j: (j, 0)), streamed(TILE, TILE, lambda j: (i, j))]
        stream(step, context, (seen_ref[i],), specs, STAGES)(k_ref.at[batch], g_ref.at[batch])

    outputs = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(w.shape, jnp.float32)
    scratch = (
        smem(WARPGROUPS, ROWS, width),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    )
    grid, names = (heads, r // TILE, b), ("head", "queries", "batch")
    return call_kernel(index_dq_kernel, outputs, grid, names, scratch, interpret)(seen, q, k, w, g)


def _head_groups(heads: int, tiles: int) -> int:
    """Into how many groups the index heads fall, each with a sum of its own: the fewest that fill the device."""
    return next((n for n in range(1, heads) if heads % n == 0 and n * tiles >= MIN_BLOCKS), heads)


def _of_keys(seen, q, k, w, g_transposed, interpret: Any) -> jax.Array:
    """The gradient of index keys [B, T, Di] float32 from that of the scores [B, T, R]."""
    b, r, heads = q.shape[0], q.shape[1], w.shape[1]
    t, width = k.shape[1], k.shape[2]
    groups = _head_groups(heads, b * (t // TILE))
    per_group = heads // groups

    def index_dk_kernel(first_ref, q_ref, k_ref, w_ref, g_ref, dk_ref, k_sm, barriers):
        batch, j, head_group = lax.axis_index("batch"), lax.axis_index("keys"), lax.axis_index("heads")
        group = lax.axis_index("warpgroup")
        rows = pl.ds(j * TILE + group * ROWS, ROWS)
        start = first_ref[j]  # tile of queries: those before see none of these keys

        def context(run: Any) -> None:
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows], k_sm.at[group], barriers.at[group])
            plgpu.barrier_wait(barriers.at[group])
            dk_ref[batch, head_group, rows] = run(filled((ROWS, width), 0))

        def step(_, q_sm, w_sm, g_sm, dk):
            dots = product(k_sm.at[group], q_sm.transpose((1, 0)), ROWS, TILE)
            of_scores = plgpu.load(g_sm.at[pl.ds(group * ROWS, ROWS)], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            of_relu = jnp.where(dots > 0, of_scores * by_column(vector(w_sm.at[0], BY_COLUMN)), 0.0)
            return add_product(dk, of_relu.astype(q_sm.dtype), q_sm)

        specs = [
            streamed(TILE, width, lambda i, h: (start + i, head_group * per_group + h)),
            plgpu.BlockSpec((1, TILE), lambda i, h: (head_group * per_group + h, start + i)),
            streamed(TILE, TILE, lambda i, h: (j, start + i)),
        ]
        steps = r // TILE - start, per_group
        stream(step, context, steps, specs, STAGES)(q_ref.at[batch], w_ref.at[batch], g_ref.at[batch])

    output = jax.ShapeDtypeStruct((b, groups, t, width), jnp.float32)
    scratch = (smem(WARPGROUPS, ROWS, width), plgpu.Barrier(num_barriers=WARPGROUPS))
    grid, names = (groups, t // TILE, b), ("heads", "keys", "batch")
    run = call_kernel(index_dk_kernel, output, grid, names, scratch, interpret)
    return jnp.sum(run(first_seeing(seen, t), q, k, w, g_transposed), axis=1)


def block_rows(batch: int, queries: int, keys: int) -> int:
    """Queries of a block: whole tiles, even blocks."""
    tiles = -(-queries // TILE)
    most = max(1, BLOCK_BYTES // (4 * batch * keys * TILE))
    return -(-tiles // -(-tiles // most)) * TILE


def _run(
    arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, scale: float, interpret: Any, gradients: bool
) -> tuple[jax.Array, Any]:
    index_queries, index_keys, head_weights, queries, keys, lse, words = arrays
    b, s, heads, _ = queries.shape
    index_heads, index_width = index_queries.shape[2:]
    rows = block_rows(b, s, index_keys.shape[1])

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1)

    q, iq = to_tiles(flat(queries), 1, rows), to_tiles(flat(index_queries), 1, rows)
    k, ik = to_tiles(flat(keys), 1), to_tiles(index_keys, 1)
    w = to_tiles(head_weights.astype(jnp.float32).swapaxes(1, 2), 2, rows)
    seen = tiles_seen(q_positions, s, index_keys.shape[1])
    seen = jnp.pad(seen, (0, -seen.size % (rows // TILE)), mode="edge")
    lse, words = to_tiles(lse * LOG2E, 2, rows), to_tiles(to_tiles(words, 1, TILE // WORD_BITS), 2, rows)

    def step(carry: Any, i: jax.Array) -> Any:
        total, of_keys = carry

        def cut(x: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, i * rows, rows, axis)

        seen_block = lax.dynamic_slice_in_dim(seen, i * (rows // TILE), rows // TILE)
        iq_block, w_block, words_block = cut(iq, 1), cut(w, 2), cut(words, 2)
        p = _target(seen_block, cut(q, 1), k, cut(lse, 2), words_block, heads, scale, interpret)
        scores = _scores(seen_block, iq_block, ik, w_block, words_block, interpret)
        log_q = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        terms = jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1.0)) - log_q), 0.0)
        total = total + jnp.sum(terms)
        if not gradients:
            return (total, of_keys), None
        # All scores of a query that selects nothing are MASKED, and their softmax means nothing.
        g = jnp.where(scores > START, jnp.exp(log_q) - p, 0.0).astype(jnp.bfloat16)
        dq, dw = _of_queries(seen_block, iq_block, ik, w_block, g, interpret)
        of_keys = of_keys + _of_keys(seen_block, iq_block, ik, w_block, g.swapaxes(1, 2), interpret)
        return (total, of_keys), (dq, dw)

    start = jnp.zeros((), jnp.float32), jnp.zeros(ik.shape, jnp.float32)
    (total, of_keys), of_queries = lax.scan(step, start, jnp.arange(q.shape[1] // rows, dtype=jnp.int32))
    if not gradients:
        return total, None
    dq, dw = of_queries  # [blocks, B, R, Hi Di], [blocks, B, Hi, R]
    dq = dq.swapaxes(0, 1).reshape(b, -1, index_heads, index_width)[:, :s]
    dw = dw.transpose(1, 0, 3, 2).reshape(b, -1, index_heads)[:, :s]
    return total, (dq, of_keys[:, : index_keys.shape[1]].astype(index_keys.dtype), dw.astype(head_weights.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def diverge(arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, scale: float, interpret: Any) -> jax.Array:
    return _run(arrays, q_positions, scale, interpret, gradients=False)[0]


def _keep(arrays: tuple[jax.Array, ...], q_positions: jax.Array | None, scale: float, interpret: Any) -> tuple[jax.Array, Any]:
    return _run(arrays, q_positions, scale, interpret, gradients=True)


def _pull(scale: float, interpret: Any, gradients: tuple[jax.Array, ...], cotangent: jax.Array) -> Any:
    scaled = (cotangent * gradient.astype(jnp.float32) for gradient in gradients)
    of_queries, of_keys, of_weights = (x.astype(gradient.dtype) for x, gradient in zip(scaled, gradients, strict=True))
    return (of_queries, of_keys, of_weights, None, None, None, None), None


diverge.defvjp(_keep, _pull)


def index_divergence(
    index_queries: jax.Array,
    index_keys: jax.Array,
    head_weights: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    words: jax.Array,
    *,
    scale: float,
    q_positions: jax.Array | None = None,
    interpret: Any = None,
) -> jax.Array:
    index_queries, queries, keys = (to_tiles(x, 3, SWIZZLE_COLUMNS) for x in (index_queries, queries, keys))
    index_keys = to_tiles(index_keys, 2, SWIZZLE_COLUMNS)
    arrays = (index_queries, index_keys, head_weights, queries, keys, lse, words)
    return diverge(arrays, q_positions, scale, interpret)
