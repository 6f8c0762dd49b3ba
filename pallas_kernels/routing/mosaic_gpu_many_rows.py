"""The experts of many rows on Hopper, and pairs of a row and an expert sorted by expert.

`choose`: a warp has a row, as in mosaic_gpu. XLA sorts all scores of every row for the few that are chosen.

`sort_by_group` is one step of a radix sort whose digit is the group. XLA counts the groups of every block of THREADS pairs and
adds up where each block's pairs of each group begin, as sums of small tables; in the kernel a block finds for each of its
pairs how many before it are of the same group: in its warp by comparing lanes, in the warps before by their counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import ptx
from pallas_kernels.hopper.lanes import THREADS, WARPS, Thread, Value, call_kernel
from pallas_kernels.routing import reference
from pallas_kernels.routing.choice import Choice
from pallas_kernels.routing.mosaic_gpu import choice_of

MAX_GROUPS = 1023  # their counts, and those of pairs of no group, fit the shared memory that needs no opt-in
MAX_BLOCKS = 1024  # whose counts XLA compares block by block
FEW = 256  # rows, or pairs: below, XLA's own are as fast


def why_not(logits: jax.Array, bias: jax.Array, **of_choice: Any) -> str | None:
    if any(x.dtype != jnp.float32 for x in (logits, bias)):
        return f"it compares float32 scores, not {logits.dtype} and {bias.dtype}"
    rows, experts = logits.shape
    if rows < FEW:
        return f"it takes {FEW} rows or more, not {rows}"
    return Choice(experts, **of_choice).why_not()


def choose(logits: jax.Array, bias: jax.Array, **of_choice: Any) -> tuple[jax.Array, jax.Array]:
    return _choose(logits, bias, Choice(logits.shape[1], **of_choice))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _choose(logits: jax.Array, bias: jax.Array, choice: Choice) -> tuple[jax.Array, jax.Array]:
    rows = logits.shape[0]
    outputs = [jax.ShapeDtypeStruct((rows, choice.choices), dtype) for dtype in (jnp.int32, jnp.float32)]
    experts, weights = call_kernel(choose_program(rows, choice), [logits, bias], outputs, -(-rows // WARPS))
    return experts, weights


def _choose_and_keep(logits: jax.Array, bias: jax.Array, choice: Choice) -> Any:
    experts, weights = _choose(logits, bias, choice)
    return (experts, weights), (logits, bias, experts)


def _backward(choice: Choice, residuals: Any, cotangents: Any) -> tuple[jax.Array, jax.Array]:
    logits, bias, experts = residuals
    weights = functools.partial(reference.weights_of, experts=experts, normalised=choice.normalised, scale=choice.scale)
    return *jax.vjp(weights, logits)[1](cotangents[1]), jnp.zeros_like(bias)


_choose.defvjp(_choose_and_keep, _backward)


def choose_program(rows: int, choice: Choice) -> Callable[..., None]:
    """The kernel of `choose`, a warp for every row."""

    def choose_experts(logits: Value, bias: Value, out_experts: Value, out_weights: Value, block: Value) -> None:
        thread = Thread.current()
        row = block * WARPS + thread.warp
        exists = row.signed < rows
        experts, weights = choice_of(thread, choice, logits, bias, ptx.min_s32(row, rows - 1))
        writes = exists & thread.lane.equals(0)
        for j, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            place = row * choice.choices + j
            ptx.store_global(ptx.offset(out_experts, place, 4), expert, writes)
            ptx.store_global(ptx.offset(out_weights, place, 4), ptx.bits_of(weight), writes)

    return choose_experts


def why_not_sort(groups: jax.Array, num_groups: int) -> str | None:
    if num_groups > MAX_GROUPS or not FEW <= groups.size <= THREADS * MAX_BLOCKS:
        return f"it sorts {FEW} to {THREADS * MAX_BLOCKS} pairs of up to {MAX_GROUPS} groups, not {groups.size} of {num_groups}"
    return None


def sort_by_group(groups: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    (m,), bins = groups.shape, num_groups + 1
    starts, sizes = starts_of(groups, num_groups)
    outputs = [jax.ShapeDtypeStruct((m,), jnp.int32)] * 2
    order, back = call_kernel(sort_program(m, bins), [groups, starts], outputs, starts.shape[0], WARPS * bins)
    return order, back, sizes


def starts_of(groups: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """Where every block's pairs of every group begin, [blocks, num_groups + 1], and the groups' sizes [num_groups]."""
    bins = jnp.arange(num_groups + 1)
    blocked = jnp.pad(groups, (0, -groups.size % THREADS), constant_values=num_groups).reshape(-1, THREADS)
    counts = jnp.sum(blocked[:, :, None] == bins, axis=1, dtype=jnp.int32)
    blocks = jnp.arange(counts.shape[0])
    sizes = jnp.sum(counts, axis=0)
    of_groups_before = jnp.sum(jnp.where(bins[:, None] < bins, sizes[:, None], 0), axis=0)
    of_blocks_before = jnp.sum(jnp.where((blocks[:, None] < blocks)[..., None], counts[:, None], 0), axis=0)
    return of_groups_before + of_blocks_before, sizes[:num_groups]


def sort_program(pairs: int, bins: int) -> Callable[..., None]:
    """The kernel that puts pairs in their places, one of each thread; `memory` holds a count for every warp and group."""

    def sort_pairs(groups: Value, starts: Value, order: Value, back: Value, block: Value, memory: Value) -> None:
        thread = Thread.current()
        pair = block * THREADS + thread.index
        exists = pair.signed < pairs
        group = ptx.load_global(ptx.offset(groups, ptx.min_s32(pair, pairs - 1), 4))
        # Beyond the last, pairs of no group, which come after all others.
        group = ptx.select(exists, group, bins - 1)
        start = ptx.load_global(ptx.offset(starts, block * bins + group, 4))
        for first in range(0, WARPS * bins, THREADS):
            at = thread.index + first
            with ptx.when(at.signed < WARPS * bins):
                ptx.store_shared(memory + (at << 2), ptx.constant(0))
        ptx.block_barrier()
        alike = ptx.alike_in_warp(group)
        before = ptx.population(alike & ((1 << thread.lane) - 1))

        def count_of(warp: Value | int) -> Value:
            return memory + ((group + warp * bins) << 2)

        with ptx.when(before.equals(0)):
            ptx.store_shared(count_of(thread.warp), ptx.population(alike))
        ptx.block_barrier()
        for warp in range(WARPS - 1):
            earlier = ptx.constant(warp).signed < thread.warp
            before = before + ptx.select(earlier, ptx.load_shared(count_of(warp)), 0)
        place = start + before
        ptx.store_global(ptx.offset(back, pair, 4), place, exists)
        ptx.store_global(ptx.offset(order, place, 4), pair, exists)

    return sort_pairs
