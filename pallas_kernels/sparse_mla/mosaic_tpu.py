"""sparse_mla on TPU. Gathering single latents is out of the question for a prompt: 4096 queries of 2048 are 8.4 million DMAs.

A prompt goes by pages. A block of neighbouring queries, whose selections overlap, reads the pages of keys that any of them
selects and attends to them through a mask per query, so the result is exact per token: `unite` turns lists into bits and
the union into a list of pages (tpu/sets.py), `attend_pages` streams the pages, double-buffered, under a running
softmax. Rows of the products are the heads of all queries of the block, [H * Q, C+R], heads first, so that a mask [Q, keys]
broadcasts over whole registers. Small pages follow the selections closely; pages of a whole tile of TILE keys need one
DMA and no moving of mask bits, which is the masked dense form with unselected tiles left out, and better where
the context is short enough for the union to hold most of it: `page_size` is the rule.

A decode step goes by rows: `attend_rows` has up to 2 x ROWS DMAs in flight, one for each entry of the list. A row of HBM's
tiles is 32 bits high, so what arrives for bfloat16 is a pair of tokens, of which a mask picks the wanted one.

Unselected latents may hold anything. Logits of theirs are masked; as values they are multiplied by 0, so what is not finite
is replaced by 0 there: a query that selects such a latent has it in its logits. Positions of a query must be distinct in
a prompt, as selections are. The backward pass is the reference's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import quant, tpu
from pallas_kernels.softmax import MASKED, START
from pallas_kernels.sparse_mla import gradient
from pallas_kernels.tpu import LANES, SUBLANES, sets

TILE = 256  # keys of a step of the running softmax over pages
PAGE = 32  # keys of a small page
ROWS = 256  # entries of a list that a decode step fetches while it attends to as many others
PRODUCT_ROWS = 512  # heads x queries of a program: enough to keep a matrix unit busy while its other operand is loaded
MAX_QUERIES = 32
DENSE_KEYS = 8  # times k: up to here whole tiles; docs/tpu.md has the counts


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def why_not(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    lengths: jax.Array | None = None,
    return_lse: bool = False,
) -> str | None:
    if reason := tpu.why_not():
        return reason
    if queries.dtype not in (jnp.bfloat16, jnp.float32) or latents.dtype not in (queries.dtype, jnp.float8_e4m3fn):
        return (
            f"it takes bfloat16 or float32 queries with latents of the same dtype or 8 bits: {queries.dtype}, {latents.dtype}"
        )
    if 0 in queries.shape or 0 in latents.shape or 0 in indices.shape:
        return "there is nothing to attend"
    if return_lse and queries.shape[1] >= SUBLANES:
        return f"it returns the log-sum-exp of fewer than {SUBLANES} queries a row, not of {queries.shape[1]}"
    if -(-latents.shape[1] // sets.SPAN) > sets.MAX_ROWS:
        return f"it takes up to {sets.MAX_ROWS * sets.SPAN} keys, not {latents.shape[1]}"
    return None


def queries_per_block(heads: int, queries: int) -> int:
    """Neighbouring queries that share pages: a multiple of 8 and a power of two."""
    block = SUBLANES
    while block < MAX_QUERIES and block < queries and 2 * block * heads <= PRODUCT_ROWS:
        block *= 2
    return block


def page_size(keys: int, k: int) -> int:
    """Keys of a page: small ones where a context is much longer than a selection."""
    return TILE if keys <= DENSE_KEYS * k else PAGE


def _dot(a: jax.Array, b: jax.Array, contract_b: int) -> jax.Array:
    dims = (((1,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=tpu.precision(a.dtype), preferred_element_type=jnp.float32)


def _attend(queries: jax.Array, kv: jax.Array, wanted: jax.Array, state: tuple, *, scale: float, value_dim: int) -> tuple:
    """One step of the running softmax: queries [M, W], kv [N, W], wanted [M, N], state (largest, total, sum) [M, 1 | C]."""
    largest, total, out = state
    logits = jnp.where(wanted, _dot(queries, kv, 1) * scale, MASKED)
    new = jnp.maximum(largest, jnp.max(logits, axis=1, keepdims=True))
    weights, shrink = jnp.exp(logits - new), jnp.exp(largest - new)
    values = kv[:, :value_dim].astype(jnp.float32)
    values = jnp.where(jnp.abs(values) < jnp.inf, values, 0.0).astype(kv.dtype)
    return (
        new,
        shrink * total + jnp.sum(weights, axis=1, keepdims=True),
        shrink * out + _dot(weights.astype(kv.dtype), values, 0),
    )


def _start(rows: int, value_dim: int) -> tuple:
    return jnp.full((rows, 1), START, jnp.float32), jnp.zeros((rows, 1), jnp.float32), jnp.zeros((rows, value_dim), jnp.float32)


def _params(vmem: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem * 7 // 8)


# ---- a prompt


def _word_place(position: jax.Array, word_rows: int) -> tuple[jax.Array, jax.Array]:
    """Row and shift of the bit of `position` among words: a word's byte q is the row of bits q * word_rows further down."""
    row, chunk = position >> 10, (position >> 7) & 7
    return jax.lax.rem(row, word_rows), 8 * jax.lax.div(row, word_rows) + chunk


def _unite_kernel(listed_ref, words_ref, pages_ref, *, queries: int, page: int, rows: int):
    """listed_ref [1, 1, Q, K] -> words_ref [1, 1, rows / 4, Q, LANES] and pages_ref [1, 1, 1, P + LANES], as `unite` says."""
    word_rows = rows // 4

    def one(query, union):
        bits = sets.bits_of(listed_ref[0, 0, pl.ds(query, 1)], rows)
        quarters = [bits[q * word_rows : (q + 1) * word_rows] << (8 * q) for q in range(4)]
        words_ref[0, 0, :, query] = functools.reduce(jnp.bitwise_or, quarters)
        return union | bits

    union = jax.lax.fori_loop(0, queries, one, jnp.zeros((rows, LANES), jnp.int32))
    # Or over every page, into the bit of its first key.
    step = 1
    while step < min(page, LANES):
        union |= pltpu.roll(union, LANES - step, 1)
        step *= 2
    for chunks in (1, 2, 4):
        if page > chunks * LANES:
            union |= union >> chunks
    lane = jax.lax.broadcasted_iota(jnp.int32, union.shape, 1)
    firsts = sum(1 << c for c in range(0, sets.CHUNKS, max(1, page // LANES)))
    places = pages_ref.shape[-1] - LANES
    listed, number = sets.positions(jnp.where(lane & (min(page, LANES) - 1) == 0, union & firsts, 0), places)
    pages_ref[0, 0, :, :places] = listed
    pages_ref[0, 0, :, places:] = jnp.broadcast_to(number, (1, LANES))


def unite(indices: jax.Array, keys: int, block: int, page: int) -> tuple[jax.Array, jax.Array]:
    """What blocks of queries select among `keys` keys: indices [B, S, K] with S and K whole blocks.

    Returns words [B, S / block, rows, block, LANES] int32, a bit for every query and key (`_word_place` says where), and
    pages [B, S / block, 1, P + LANES] int32: the first keys of the pages that any query selects from, ascending, and from
    place P on their number.
    """
    b, s, k = indices.shape
    rows = _rounded(-(-keys // sets.SPAN), LANES)
    places = _rounded(min(-(-keys // page), block * k), LANES)
    shapes = (rows // 4, block, LANES), (1, places + LANES)

    def spec(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *shape), lambda b, i: (b, i, *(0 for _ in shape)))

    return pl.pallas_call(
        functools.partial(_unite_kernel, queries=block, page=page, rows=rows),
        grid=(b, s // block),
        in_specs=[spec(block, k)],
        out_specs=[spec(*shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct((b, s // block, *shape), jnp.int32) for shape in shapes],
        compiler_params=_params(tpu.chip().vmem),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * s * rows * LANES * k, transcendentals=0, bytes_accessed=4 * b * s * (k + rows // 4 * LANES)
        ),
        name="sparse_mla_unite",
    )(indices.reshape(b, s // block, block, k))


def _pages_kernel(
    query_ref, words_ref, pages_ref, kv_hbm, out_ref, buffer, largest_ref, total_ref, sum_ref, semaphores, *, page, **options
):
    """One block of queries: query_ref [1, 1, H * Q, W], words and pages of `unite`, kv_hbm [B, T, W] -> [1, 1, H * Q, C]."""
    b = pl.program_id(0)
    word_rows, queries = words_ref.shape[2:4]
    heads, per_tile = query_ref.shape[2] // queries, TILE // page
    number = pages_ref[0, 0, 0, pages_ref.shape[-1] - LANES]

    def copies(tile, act):
        for i in range(per_tile):
            entry, slot = tile * per_tile + i, tile & 1

            @pl.when(entry < number)
            def _(entry=entry, slot=slot, i=i):
                source = kv_hbm.at[b, pl.ds(pl.multiple_of(pages_ref[0, 0, 0, entry], page), page)]
                act(pltpu.make_async_copy(source, buffer.at[slot, pl.ds(i * page, page)], semaphores.at[slot]))

    def bits(entry, chunk):
        """Which query selects what, in the `chunk`-th 128 keys of those that the entry's page begins in: [Q, LANES]."""
        first = jnp.where(entry < number, pages_ref[0, 0, 0, jnp.minimum(entry, number - 1)], 0)
        row, shift = _word_place(first + chunk * LANES, word_rows)
        chosen = (words_ref[0, 0, row] >> shift) & 1
        return jnp.where(entry < number, chosen, 0), first & (LANES - 1)

    def mask(tile):
        """[Q, TILE] int32."""
        if page >= LANES:
            entries = [(tile * per_tile + i, chunk) for i in range(per_tile) for chunk in range(page // LANES)]
            return jnp.concatenate([bits(*entry)[0] for entry in entries], axis=1)
        lane = jax.lax.broadcasted_iota(jnp.int32, (queries, LANES), 1)
        parts = []
        for first in range(0, per_tile, LANES // page):
            part = jnp.zeros((queries, LANES), jnp.int32)
            for i in range(LANES // page):  # the page's bits move from where they are among 128 keys to where it is here
                chosen, begin = bits(tile * per_tile + first + i, 0)
                moved = pltpu.roll(chosen, (i * page - begin) & (LANES - 1), 1)
                part = jnp.where((lane >= i * page) & (lane < (i + 1) * page), moved, part)
            parts.append(part)
        return jnp.concatenate(parts, axis=1)

    copies(0, lambda copy: copy.start())
    state_refs = (largest_ref, total_ref, sum_ref)
    for ref, value in zip(state_refs, _start(heads * queries, sum_ref.shape[1]), strict=True):
        ref[...] = jnp.broadcast_to(value, ref.shape)

    def step(tile, _):
        copies(tile + 1, lambda copy: copy.start())
        copies(tile, lambda copy: copy.wait())
        wanted = jnp.concatenate([mask(tile)] * heads, axis=0) == 1
        state = (largest_ref[:, :1], total_ref[:, :1], sum_ref[...])
        state = _attend(query_ref[0, 0], buffer[tile & 1], wanted, state, **options)
        for ref, value in zip(state_refs, state, strict=True):
            ref[...] = jnp.broadcast_to(value, ref.shape)
        return 0

    jax.lax.fori_loop(0, pl.cdiv(number, per_tile), step, 0)
    total = total_ref[:, :1]
    out_ref[0, 0] = (sum_ref[...] / jnp.where(total == 0, 1.0, total)).astype(out_ref.dtype)


def attend_pages(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    block: int | None = None,
    page: int | None = None,
) -> jax.Array:
    """The operation by pages; `block` and `page` overrule how many queries share pages and how large they are."""
    b, s, heads, width = queries.shape
    t, k = latents.shape[1], indices.shape[2]
    block, page = block or queries_per_block(heads, s), page or page_size(t, k)
    blocks = -(-s // block)
    pad = ((0, 0), (0, blocks * block - s))
    indices = jnp.pad(indices, (*pad, (0, -k % LANES)), constant_values=-1)
    words, pages = unite(indices, t, block, page)
    by_head = jnp.pad(queries, (*pad, (0, 0), (0, 0))).reshape(b, blocks, block, heads, width)
    by_head = by_head.swapaxes(2, 3).reshape(b, blocks, heads * block, width)
    if t % page:
        latents = jnp.pad(latents, ((0, 0), (0, -t % page), (0, 0)))

    def spec(array: jax.Array | jax.ShapeDtypeStruct, **place: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *array.shape[2:]), lambda b, i: (b, i, *(0 for _ in array.shape[2:])), **place)

    out = jax.ShapeDtypeStruct((b, blocks, heads * block, value_dim), queries.dtype)
    rows = heads * block
    out = pl.pallas_call(
        functools.partial(_pages_kernel, page=page, scale=scale, value_dim=value_dim),
        grid=(b, blocks),
        in_specs=[
            spec(by_head),
            spec(words),
            spec(pages, memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=spec(out),
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((2, TILE, width), latents.dtype),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, value_dim), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=_params(tpu.chip().vmem),
        cost_estimate=pl.CostEstimate(  # as if the unions were all of the keys
            flops=2 * b * s * heads * t * (width + value_dim),
            transcendentals=b * s * heads * t,
            bytes_accessed=b * blocks * t * width * latents.dtype.itemsize,
        ),
        name="sparse_mla_pages",
    )(by_head, words, pages, latents)
    out = out.reshape(b, blocks, heads, block, value_dim).swapaxes(2, 3)
    return out.reshape(b, blocks * block, heads, value_dim)[:, :s]


# ---- a decode step


def _rows_kernel(query_ref, listed_ref, wanted_ref, kv_hbm, out_ref, *refs, packed, **options):
    """One query: query_ref [1, 1, H, W], listed_ref [1, 1, 1, K], wanted_ref [1, 1, 1, packed * K], kv_hbm [B, T, W].

    refs: the log-sum-exp [1, 1, H, LANES], the same in every lane, where it is asked for; the buffer and its semaphores.
    """
    *lse_ref, buffer, semaphores = refs
    b = pl.program_id(0)
    if kv_hbm.dtype != buffer.dtype:
        kv_hbm = kv_hbm.bitcast(buffer.dtype)  # [B, T / 2, W]: pairs of tokens
    steps = listed_ref.shape[-1] // ROWS

    def fetch(step):
        def start(i, _):
            row = jnp.maximum(listed_ref[0, 0, 0, step * ROWS + i], 0) >> (packed - 1)
            source, place = kv_hbm.at[b, pl.ds(row, 1)], buffer.at[step % 2, pl.ds(i, 1)]
            pltpu.make_async_copy(source, place, semaphores.at[step % 2]).start()
            return 0

        jax.lax.fori_loop(0, ROWS, start, 0)

    def wait(step):
        slot = buffer.at[step % 2]
        pltpu.make_async_copy(slot, slot, semaphores.at[step % 2]).wait()  # for as many bytes as all rows have

    state = _start(query_ref.shape[2], out_ref.shape[3])
    fetch(0)
    for step in range(steps):
        if step + 1 < steps:
            fetch(step + 1)
        wait(step)
        kv = buffer[step % 2]
        if packed > 1:
            kv = pltpu.bitcast(kv, query_ref.dtype)  # [2 * ROWS, W]
        wanted = wanted_ref[0, 0, :, step * packed * ROWS : (step + 1) * packed * ROWS] == 1
        state = _attend(query_ref[0, 0], kv, jnp.broadcast_to(wanted, (query_ref.shape[2], packed * ROWS)), state, **options)
    largest, total, out = state
    out_ref[0, 0] = (out / jnp.where(total == 0, 1.0, total)).astype(out_ref.dtype)
    for ref in lse_ref:
        lse = jnp.where(total == 0, -jnp.inf, largest + jnp.log(jnp.where(total == 0, 1.0, total)))
        ref[0, 0] = jnp.broadcast_to(lse, ref.shape[2:])


def attend_rows(
    queries: jax.Array,
    latents: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    return_lse: bool = False,
) -> Any:
    """The operation by rows, one program a query.

    bfloat16 latents may also come as int32 [B, T / 2, C+R], tokens 2 i and 2 i + 1 in the low and the high half: Pallas'
    interpreter cannot see the one as the other.
    """
    b, s, heads, width = queries.shape
    packed = 4 // queries.dtype.itemsize
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, -indices.shape[2] % ROWS)), constant_values=-1)
    k = indices.shape[2]
    if latents.dtype == queries.dtype and latents.shape[1] % packed:
        latents = jnp.pad(latents, ((0, 0), (0, 1), (0, 0)))
    wanted = (indices[..., None] % packed == jnp.arange(packed)) & (indices >= 0)[..., None]
    padded_heads = _rounded(heads, SUBLANES * packed)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padded_heads - heads), (0, 0)))

    def spec(*shape: int, **place: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *shape), lambda b, i: (b, i, 0, 0), **place)

    sizes = [(value_dim, queries.dtype), *([(LANES, jnp.float32)] if return_lse else [])]
    out, *lse = pl.pallas_call(
        functools.partial(_rows_kernel, packed=packed, scale=scale, value_dim=value_dim),
        grid=(b, s),
        in_specs=[
            spec(padded_heads, width),
            spec(1, k, memory_space=pltpu.SMEM),
            spec(1, packed * k),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[spec(padded_heads, size) for size, _ in sizes],
        out_shape=[jax.ShapeDtypeStruct((b, s, padded_heads, size), dtype) for size, dtype in sizes],
        scratch_shapes=[
            pltpu.VMEM((2, ROWS, width), jnp.int32 if packed > 1 else jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=_params(tpu.chip().vmem),
        cost_estimate=pl.CostEstimate(
            flops=2 * packed * b * s * padded_heads * k * (width + value_dim),
            transcendentals=packed * b * s * padded_heads * k,
            bytes_accessed=4 * b * s * k * width,
        ),
        name="sparse_mla_rows",
    )(queries, indices[:, :, None], wanted.astype(jnp.int32).reshape(b, s, 1, packed * k), latents)
    return (out[:, :, :heads], lse[0][:, :, :heads, 0]) if return_lse else out[:, :, :heads]


def forward(queries: jax.Array, latents: jax.Array, indices: jax.Array, *, scale: float, value_dim: int) -> jax.Array:
    attend = attend_rows if queries.shape[1] < SUBLANES else attend_pages
    return attend(queries, latents, indices, scale=scale, value_dim=value_dim)


def sparse_mla(
    queries: jax.Array,
    latents: jax.Array | quant.Latents,
    indices: jax.Array,
    *,
    scale: float,
    value_dim: int,
    lengths: jax.Array | None = None,  # the lists themselves are read
    return_lse: bool = False,
) -> Any:
    if isinstance(latents, quant.Latents):
        latents, indices = quant.dequantise_selected(latents, indices, queries.dtype)
    if return_lse:
        return attend_rows(queries, latents, indices, scale=scale, value_dim=value_dim, return_lse=True)
    return gradient.differentiable(forward)(queries, latents, indices, scale, value_dim)
