"""Registers of one thread: their types, constants, and instructions in PTX's own words.

Integers are MLIR values of 32 bits (shared addresses, indices) or 64 (global addresses). Python integers are constants.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

Value = ir.Value


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def constant(value: int) -> Value:
    return arith.constant(i32(), value)


def as_value(x: Value | int) -> Value:
    return constant(x) if isinstance(x, int) else x


def scalar(array) -> Value:
    """The register of a scalar argument of an inline function."""
    return array.registers.item()


def opaque(x: Value) -> Value:
    """x, of which the compiler knows nothing: what is computed from it stays where it is written."""
    return asm("mov.b32 $0, $1;", [x], "=r,r", i32())


def asm(ptx: str, arguments: Sequence[Value] = (), constraints: str = "", result: ir.Type | None = None) -> Value:
    void = ir.Type.parse("!llvm.void")
    return llvm.inline_asm(result or void, list(arguments), ptx, constraints, has_side_effects=True)


def f32() -> ir.Type:
    return ir.F32Type.get()


def number(x: float) -> Value:
    return arith.constant(f32(), x)


def floats(count: int) -> ir.Type:
    return ir.Type.parse("!llvm.struct<(" + ", ".join(["f32"] * count) + ")>")


def unpacked(struct: Value, count: int) -> list[Value]:
    return [llvm.extractvalue(f32(), struct, [i]) for i in range(count)]
