"""Exact top-k of score rows on Hopper: no sort, one read of the part of a row that can matter.

A group of threads owns a row and keeps the row's best candidates, (score, position) in position order, in shared memory:

1. Threshold. With block maxima (of every 16 scores) it is a value that at least k maxima reach, hence at least k scores;
   it comes from a histogram over the maxima. Without them, or where the row is too short for that to cut much, it is
   a guess from 4096 sampled scores, low enough that fewer than k pass only if the sample misleads.
2. List. The blocks whose maximum reaches the threshold, in order: only they are read. At 120K keys that is a quarter of the
   row, so the whole selection costs less than one read of it.
3. Stream. The scores are copied to shared memory a few chunks ahead, and those that reach the threshold are appended to the
   candidates. Should fewer than k have passed (the sample misled), the row is streamed once more with no threshold.
4. The k-th best is found by histograms over what remains of the range; ties are cut lowest position first.
5. One ordered pass writes the chosen positions.

A row that fits into all this shared memory at once (some 20000 scores) is read whole instead, and step 4 and 5 run over it.
Of a row that sees at most k keys all are taken. NaN counts as -inf and -0 as 0.

Each step has a file: `mosaic_gpu_select_threshold` (1, 2), `_stream` (3), `_candidates` (4, 5), `_resident`; below them are
`_row`, with the search, and `_problem`, which says how threads share rows, why, and where shared memory holds what.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.ptx import Address, Predicate, Word
from pallas_kernels.indexer_topk.mosaic_gpu_select_candidates import Candidates
from pallas_kernels.indexer_topk.mosaic_gpu_select_problem import BLOCK, SAMPLE, SLACK, Problem, SelectConfig, default_config
from pallas_kernels.indexer_topk.mosaic_gpu_select_resident import Resident
from pallas_kernels.indexer_topk.mosaic_gpu_select_row import KEY_OF_INFINITY, KEY_OF_LOWEST, Row
from pallas_kernels.indexer_topk.mosaic_gpu_select_stream import Stream
from pallas_kernels.indexer_topk.mosaic_gpu_select_threshold import Values

SAMPLE_MARGIN = 32  # sampled scores, with a quarter of those expected above the k-th best: the guess is that much lower


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Global addresses of the arrays of `select`."""

    # Input
    scores: Any  # [B, S', T'] float32
    maxima: Any  # [B, S', T' / 16] float32, or None
    positions: Any  # [B, S] int32
    lengths: Any  # [B] int32
    # Output
    out: Any  # [B, S, k] int32

    def of_row(self, p: Problem, row: Word, batch: Word) -> RowArrays:
        score_row = batch * p.pitch + (row - batch * p.batch_rows)
        scores = ptx.offset(self.scores, score_row, 4 * p.width)
        maxima = ptx.offset(self.maxima, score_row, 4 * p.width // BLOCK) if p.has_maxima else None
        return RowArrays(scores, maxima, ptx.offset(self.out, row, 4 * p.k))


@dataclasses.dataclass(frozen=True, eq=False)
class RowArrays:
    """Global addresses of a row's part of the arrays."""

    # Input
    scores: Address  # [T'] float32
    maxima: Any  # [T' / 16] float32, or None
    # Output
    out: Address  # [k] int32


def take_all(row: Row, visible: Word, out: Address) -> None:
    """Writes 0, 1, ... visible - 1, then -1."""

    def step(i: Word, carry: list[Word]) -> list[Word]:
        place = i * row.threads + row.thread
        value = ptx.select(place < visible, place, 0xFFFFFFFF)
        real = place < row.p.k
        ptx.store_global(ptx.offset(out, place, 4), value, real)
        return carry

    ptx.loop(row.rounds(ptx.constant(row.p.k)), [], step)


def choose(row: Row, visible: Word, arrays: RowArrays) -> None:
    """Steps 1 to 5 of a row that sees more than k keys and is too long for shared memory."""
    p = row.p
    blocks = (visible + (BLOCK - 1)) >> (BLOCK.bit_length() - 1)
    if p.has_maxima:
        threshold, top, stream = _begin_with_maxima(row, visible, blocks, arrays)
    else:  # what is read is known, so it may already come while a threshold is looked for
        stream = Stream(row, arrays.scores, visible, None, blocks)
        stream.begin()
        threshold, top = _threshold(row, visible, blocks, visible < 0, arrays)[:2]
    row.barrier()  # the values make way for candidates
    _finish(row, stream, threshold, top, arrays.out)


def _begin_with_maxima(row: Row, visible: Word, blocks: Word, arrays: RowArrays) -> tuple[Word, Word, Stream]:
    """Steps 1 and 2, and the begin of step 3: the threshold, a key that none exceeds, and the stream."""
    by_maxima = blocks > row.p.fewest_maxima
    threshold, top, values = _threshold(row, visible, blocks, by_maxima, arrays)
    found = ptx.choose(by_maxima, lambda: [values.list_blocks(threshold)], [blocks])[0]
    listed = by_maxima & (found <= row.p.list_capacity)  # a plateau may exceed the list: the whole row is read then
    row.barrier()  # the list is complete
    stream = Stream(row, arrays.scores, visible, listed, ptx.select(listed, found, blocks))
    stream.begin()
    return threshold, top, stream


def _threshold(row: Row, visible: Word, blocks: Word, by_maxima: Predicate, arrays: RowArrays) -> tuple[Word, Word, Values]:
    """Step 1: the threshold, a key that none exceeds, and the values that they are from: the maxima, or a sample."""
    p = row.p
    stride = (visible >> 7) & 0xFFFFFFF8  # between the sample's lines of 32 scores

    def address(index: Word) -> Address:
        of_sample = ptx.offset(arrays.scores, (index >> 5) * stride + (index & 31), 4)
        if not p.has_maxima:
            return of_sample
        return ptx.select(by_maxima, ptx.offset(arrays.maxima, index, 4), of_sample)

    values = Values(row, ptx.select(by_maxima, blocks, SAMPLE), address)
    expected = ((visible - 1) + SAMPLE * p.k) // visible
    guess = ptx.min_u32(expected * 2, expected + (expected >> 2) + SAMPLE_MARGIN)
    slack = ptx.constant(SAMPLE * (p.capacity // 8)) // visible
    rank, slack = ptx.select(by_maxima, p.k, guess), ptx.select(by_maxima, SLACK, slack)
    # The whole row fits into the buffer, or a threshold is needed.
    needed = by_maxima | (visible > p.capacity)
    start = [ptx.constant(KEY_OF_LOWEST), ptx.constant(KEY_OF_INFINITY)]
    threshold, most = ptx.choose(needed, lambda: values.threshold(rank, slack), start)
    return threshold, ptx.select(by_maxima, most, KEY_OF_INFINITY), values


def _finish(row: Row, stream: Stream, threshold: Word, top: Word, out: Address) -> None:
    """Steps 3 to 5, the stream having begun."""
    p, candidates = row.p, Candidates(row)

    def attempt(carry: list[Word]) -> tuple[list[Word], list[Word], Predicate]:
        limit, again = carry
        ptx.branch(again > 0, stream.begin)
        count, reached = stream.fill(limit, top)
        return [ptx.constant(KEY_OF_LOWEST), ptx.constant(1)], [count, reached], (count < p.k) & again.equals(0)

    if p.config.leave_out:
        count = stream.fill(threshold, top)[0]
        leads = row.thread.equals(0)
        ptx.store_global(ptx.offset(out, row.thread, 4), count, leads)
        return
    count, threshold = ptx.repeat([threshold, ptx.constant(0)], attempt, 2)[2:]
    if not p.has_maxima:
        top = candidates.largest(count)  # a closer bound than infinity saves a pass
    lo, hi, room = row.narrow(candidates.visit(count), candidates.below(threshold), top, ptx.constant(p.k), 0)

    def sink(chosen: Predicate, rank: Word, score: Word, position: Word) -> None:
        ptx.store_global(ptx.offset(out, rank, 4), position, chosen)

    candidates.in_order(count, lo, hi, room, sink)


def select_rows(p: Problem, block: Word, arrays: Arrays, shared: Word) -> None:
    """The program of one thread block, from its number and the address of its shared memory."""
    row_program = Row(p, shared, ptx.thread())
    row = block * p.config.rows + row_program.group

    def program() -> None:
        batch = row // p.batch_rows
        last = ptx.load_global(ptx.offset(arrays.positions, row, 4)) + 1
        length = ptx.load_global(ptx.offset(arrays.lengths, batch, 4))
        visible = ptx.min_u32(ptx.max_s32(ptx.min_s32(last, length), 0), p.keys)
        own = arrays.of_row(p, row, batch)
        ptx.branch(visible <= p.k, lambda: take_all(row_program, visible, own.out))
        ptx.branch(
            (visible > p.k) & (visible <= p.resident),
            lambda: Resident.copied(row_program, visible, own.scores).choose(own.out),
        )
        ptx.branch((visible > p.k) & (visible > p.resident), lambda: choose(row_program, visible, own))

    ptx.branch(row < p.rows, program)


def select(
    scores: jax.Array,
    maxima: jax.Array | None,
    q_positions: jax.Array,
    kv_lengths: jax.Array,
    k: int,
    *,
    clean: bool,
    keys: int | None = None,
    config: SelectConfig | None = None,
) -> jax.Array:
    """The k best positions of each row among those it sees, ascending, then -1.

    Args:
      scores: [B, S', T'] float32, of which the first S rows count; T' is a multiple of 64.
      maxima: [B, S', T' / 16] float32, of the visible scores of each block of 16, or None.
      q_positions: [B, S] int32 and kv_lengths [B] int32: the row sees keys t <= position and t < length.
      clean: no visible score is NaN, and the others in the last visible block of a row are -inf.
      keys: T, how many of a row's scores are of keys; None for T'.

    Returns:
      [B, S, k] int32.
    """
    b, s = q_positions.shape
    problem = Problem(
        rows=b * s,
        batch_rows=s,
        pitch=scores.shape[1],
        width=scores.shape[2],
        keys=scores.shape[2] if keys is None else keys,
        k=k,
        has_maxima=maxima is not None,
        clean=clean,
        config=config or default_config(b * s),
    )
    config = problem.config

    def indexer_select(*refs: Any) -> None:
        ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

        @plgpu.inline_mgpu(arg_types=(ref,) * len(refs) + (scalar,))
        def program(ctx: Any, *values: Any) -> None:
            *inputs, out, shared, block = values
            scores, *maxima, positions, lengths = map(ptx.global_address, inputs)
            arrays = Arrays(scores, maxima[0] if maxima else None, positions, lengths, ptx.global_address(out))
            select_rows(problem, ptx.scalar(block), arrays, ptx.shared_address(shared))

        program(*refs, jax.lax.axis_index("block"))

    kernel = plgpu.kernel(
        indexer_select,
        out_type=jax.ShapeDtypeStruct((b, s, k), jnp.int32),
        scratch_types=[plgpu.SMEM((config.rows * problem.row_bytes // 4,), jnp.int32)],  # `Problem` lays it out
        grid=(-(-problem.rows // config.rows),),
        grid_names=("block",),
        num_threads=config.rows * config.threads // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return kernel(*(x for x in (scores, maxima, q_positions, kv_lengths) if x is not None))
