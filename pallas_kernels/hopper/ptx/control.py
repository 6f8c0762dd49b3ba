"""Branches and loops. The values that they carry have one type each, which they keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.hopper.ptx.registers import Predicate, Word, constant, i32, typed


@contextlib.contextmanager
def when(condition: Predicate) -> Iterator[None]:
    """What is inside is for the threads of the condition only. Where it differs within a warp: no barrier, no exchange."""
    with utils.when(condition):
        yield


def branch(condition: Predicate, body: Callable[[], None]) -> None:
    """`when`, for a condition that is the same in all threads that meet at the barriers of `body`."""
    with utils.when(condition):
        body()


def choose(condition: Predicate, body: Callable[[], Sequence[ir.Value]], otherwise: Sequence[ir.Value]) -> list[Any]:
    """What `body` makes where the condition holds, else `otherwise`."""
    op = scf.IfOp(condition, [value.type for value in otherwise], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.YieldOp(list(body()))
    with ir.InsertionPoint(op.else_block):
        scf.YieldOp(list(otherwise))
    return [typed(x) for x in op.results]


def loop(count: Word, carry: Sequence[ir.Value], body: Callable[[Word, list[Any]], Sequence[ir.Value]]) -> list[Any]:
    """for i in range(count): carry = body(i, carry)."""
    op = scf.ForOp(constant(0), count, constant(1), list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(Word(op.induction_variable), [typed(x) for x in op.inner_iter_args])))
    return [typed(x) for x in op.results]


def repeat(
    carry: Sequence[ir.Value], body: Callable[[list[Any]], tuple[Sequence[ir.Value], Sequence[Word], Predicate]], extras: int
) -> list[Any]:
    """carry, extra, more = body(carry) until not more: the last carry and extra (`extras` words)."""
    kinds = [x.type for x in carry]
    op = scf.WhileOp(kinds + [i32()] * extras, list(carry))
    before = op.regions[0].blocks.append(*kinds)
    after = op.regions[1].blocks.append(*kinds, *[i32()] * extras)
    with ir.InsertionPoint(before):
        out, extra, more = body([typed(x) for x in before.arguments])
        scf.ConditionOp(more, [*out, *extra])
    with ir.InsertionPoint(after):
        scf.YieldOp(list(after.arguments)[: len(kinds)])
    return [typed(x) for x in op.results]
