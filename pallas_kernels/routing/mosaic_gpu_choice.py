"""The experts of a row, chosen by one warp on Hopper: what the kernels of few rows, of many and of a single token share.

A lane has the scores of every 32nd expert, and the largest keys are found one after the other by reductions over the warp.
With groups of experts, each of which has the same registers in all lanes, the two largest keys of a group are reduced first,
its quality becomes a key of the lane with the group's number, and the largest of those are found in the same way. What is in
no group that is kept then counts as -inf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.routing.choice import LANES, Choice

Value = Any
_LOWEST = 0x007FFFFF  # sortable_bits of -inf


def choose(
    thread: Any, choice: Choice, logit: Callable[[Value], Value], bias: Callable[[Value], Value]
) -> tuple[list[Value], list[Value]]:
    """The experts of a row, and their weights, in all lanes of a warp. logit(i), bias(i): of expert i, others in every lane."""
    scores, keys = [], []
    for start in range(0, choice.experts, LANES):
        number = thread.lane + start
        score = persistent.sigmoid(logit(number))
        scores.append(score)
        keys.append(persistent.sortable_bits(score + bias(number)))
    if choice.n_group > 1:
        keys = _in_best_groups(thread, choice, keys)
    experts = persistent.largest_keys(thread, keys, choice.choices)
    weights = []
    for expert in experts:
        bits = ptx.constant(0)
        for i, score in enumerate(scores):
            bits = ptx.select((thread.lane + LANES * i).equals(expert), ptx.bits_of(score), bits)
        weights.append(ptx.float_of(ptx.reduce_warp("or", bits)))
    if choice.normalised:
        total = ptx.total(weights) + ptx.number(1e-20)
        weights = [ptx.div_rn(w, total) for w in weights]
    return experts, [w * choice.scale for w in weights]


def _in_best_groups(thread: Any, choice: Choice, keys: Sequence[Value]) -> list[Value]:
    """The keys with that of -inf in place of those in no group that is kept."""
    of_group = len(keys) // choice.n_group
    quality = ptx.constant(0)  # below every key, in lanes of no group
    for group in range(choice.n_group):
        key = persistent.sortable_bits(_two_largest(thread, keys[group * of_group : (group + 1) * of_group]))
        quality = ptx.select(thread.lane.equals(group), key, quality)
    kept = persistent.largest_keys(thread, [quality], choice.topk_group)
    masked = []
    for i, key in enumerate(keys):
        is_kept = functools.reduce(lambda a, b: a | b, (group.equals(i // of_group) for group in kept))
        masked.append(ptx.select(is_kept, key, _LOWEST))
    return masked


def _two_largest(thread: Any, keys: Sequence[Value]) -> Value:
    """The sum of the two floats with the largest keys of a warp."""
    first, second = keys[0], ptx.constant(0)  # of the lane
    for key in keys[1:]:
        second = ptx.max_u32(second, ptx.min_u32(first, key))
        first = ptx.max_u32(first, key)
    top = ptx.reduce_warp("max", first)
    leads = thread.lane.equals(ptx.reduce_warp("min", ptx.select(first.equals(top), thread.lane, LANES)))
    other = ptx.reduce_warp("max", ptx.select(leads, second, first))
    return _float_of_key(top) + _float_of_key(other)


def _float_of_key(key: Value) -> Value:
    """The float32 whose `persistent.sortable_bits` the key is."""
    return ptx.float_of(ptx.select(key.signed < 0, key ^ -0x80000000, key ^ -1))
