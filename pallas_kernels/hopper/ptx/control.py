"""Branches and loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.hopper.ptx.registers import Value, constant

when = utils.when


def loop(count: Value, carry: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]) -> list[Value]:
    """for i in range(count): carry = body(i, carry)."""
    op = scf.ForOp(constant(0), count, constant(1), list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(op.induction_variable, list(op.inner_iter_args))))
    return list(op.results)


def choose(condition: Value, body: Callable[[], Sequence[Value]], otherwise: Sequence[Value]) -> list[Value]:
    """What `body` makes where the condition holds, else `otherwise`."""
    branch = scf.IfOp(condition, [value.type for value in otherwise], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.YieldOp(list(body()))
    with ir.InsertionPoint(branch.else_block):
        scf.YieldOp(list(otherwise))
    return list(branch.results)
