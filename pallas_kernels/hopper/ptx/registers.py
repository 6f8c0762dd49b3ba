"""Registers of one thread: words, floats, predicates and addresses with Python's operators, and instructions in PTX's words.

A `Word` has 32 bits: an integer, a shared-memory address, or narrower numbers packed. Its operators are those of unsigned
registers; where signs count one writes so: `a.signed < b`, `min_s32`. A `Float` is a float32. Comparisons give a
`Predicate`, which & and | join. An `Address` of global memory has 64 bits and is moved by `offset`. Python's numbers beside
a register are constants. All are MLIR values, so what takes those takes them; what makes them has types only at run time, for
which `typed` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

Descriptor = ir.Value  # of a matrix in shared memory, 64 bits


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    return ir.F32Type.get()


class Predicate(ir.Value):
    """A condition of this thread."""

    def __and__(self, other: Predicate) -> Predicate:
        return Predicate(arith.andi(self, other))

    def __or__(self, other: Predicate) -> Predicate:
        return Predicate(arith.ori(self, other))


class Word(ir.Value):
    """A 32-bit register. Arithmetic wraps; division, remainder, >> and comparisons are of unsigned numbers."""

    def __add__(self, other: Word | int) -> Word:
        return Word(arith.addi(self, as_value(other)))

    __radd__ = __add__

    def __sub__(self, other: Word | int) -> Word:
        return Word(arith.subi(self, as_value(other)))

    def __rsub__(self, other: int) -> Word:
        return Word(arith.subi(as_value(other), self))

    def __mul__(self, other: Word | int) -> Word:
        return Word(arith.muli(self, as_value(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other: Word | int) -> Word:
        return Word(arith.divui(self, as_value(other)))

    def __mod__(self, other: Word | int) -> Word:
        return Word(arith.remui(self, as_value(other)))

    def __and__(self, other: Word | int) -> Word:
        return Word(arith.andi(self, as_value(other)))

    def __or__(self, other: Word | int) -> Word:
        return Word(arith.ori(self, as_value(other)))

    def __xor__(self, other: Word | int) -> Word:
        return Word(arith.xori(self, as_value(other)))

    def __lshift__(self, other: Word | int) -> Word:
        return Word(arith.shli(self, as_value(other)))

    def __rlshift__(self, other: int) -> Word:
        return Word(arith.shli(as_value(other), self))

    def __rshift__(self, other: Word | int) -> Word:
        return Word(arith.shrui(self, as_value(other)))

    def _compare(self, relation: str, other: Word | int) -> Predicate:
        return Predicate(arith.cmpi(getattr(arith.CmpIPredicate, relation), self, as_value(other)))

    def __lt__(self, other: Word | int) -> Predicate:
        return self._compare("ult", other)

    def __le__(self, other: Word | int) -> Predicate:
        return self._compare("ule", other)

    def __gt__(self, other: Word | int) -> Predicate:
        return self._compare("ugt", other)

    def __ge__(self, other: Word | int) -> Predicate:
        return self._compare("uge", other)

    def equals(self, other: Word | int) -> Predicate:
        return self._compare("eq", other)

    def differs(self, other: Word | int) -> Predicate:
        return self._compare("ne", other)

    @property
    def signed(self) -> Signed:
        return Signed(self)


class Signed:
    """The same register for what depends on the sign: comparisons and >>."""

    def __init__(self, word: Word):
        self._word = word

    def __lt__(self, other: Word | int) -> Predicate:
        return self._word._compare("slt", other)

    def __le__(self, other: Word | int) -> Predicate:
        return self._word._compare("sle", other)

    def __gt__(self, other: Word | int) -> Predicate:
        return self._word._compare("sgt", other)

    def __ge__(self, other: Word | int) -> Predicate:
        return self._word._compare("sge", other)

    def __rshift__(self, other: Word | int) -> Word:
        return Word(arith.shrsi(self._word, as_value(other)))


class Float(ir.Value):
    """A float32 register. Comparisons are false for NaN."""

    def __add__(self, other: Float | float) -> Float:
        return Float(arith.addf(self, as_float(other)))

    __radd__ = __add__

    def __sub__(self, other: Float | float) -> Float:
        return Float(arith.subf(self, as_float(other)))

    def __mul__(self, other: Float | float) -> Float:
        return Float(arith.mulf(self, as_float(other)))

    __rmul__ = __mul__

    def __truediv__(self, other: Float | float) -> Float:
        return Float(arith.divf(self, as_float(other)))

    def __rtruediv__(self, other: float) -> Float:
        return Float(arith.divf(as_float(other), self))

    def __gt__(self, other: Float | float) -> Predicate:
        return Predicate(arith.cmpf(arith.CmpFPredicate.OGT, self, as_float(other)))

    def __ge__(self, other: Float | float) -> Predicate:
        return Predicate(arith.cmpf(arith.CmpFPredicate.OGE, self, as_float(other)))

    def equals(self, other: Float | float) -> Predicate:
        return Predicate(arith.cmpf(arith.CmpFPredicate.OEQ, self, as_float(other)))


class Address(ir.Value):
    """An address of global memory, 64 bits."""


def typed(x: ir.Value) -> Any:
    """An MLIR value as the register of its type."""
    kinds = {i32(): Word, f32(): Float, i64(): Address, ir.IntegerType.get_signless(1): Predicate}
    return kinds[x.type](x) if x.type in kinds else x


def constant(value: int) -> Word:
    """A register with the value's lowest 32 bits."""
    value &= 0xFFFFFFFF
    return Word(arith.constant(i32(), value - (1 << 32) if value >> 31 else value))


def number(x: float) -> Float:
    return Float(arith.constant(f32(), x))


def as_value(x: ir.Value | int) -> ir.Value:
    return constant(x) if isinstance(x, int) else x


def as_float(x: ir.Value | float) -> ir.Value:
    return number(x) if isinstance(x, (int, float)) else x


def scalar(array) -> Word:
    """The register of a scalar argument of an inline function."""
    return Word(array.registers.item())


def opaque(x: Word) -> Word:
    """x, of which the compiler knows nothing: what is computed from it stays where it is written."""
    return asm("mov.b32 $0, $1;", [x], "=r,r", i32())


def asm(
    ptx: str, arguments: Sequence[ir.Value] = (), constraints: str = "", kind: ir.Type | None = None, count: int = 1
) -> Any:
    """Inline PTX that is neither moved nor merged. Returns None without `kind`, a register of it, or a list of `count`."""
    if kind is None:
        result = ir.Type.parse("!llvm.void")
    else:
        result = kind if count == 1 else ir.Type.parse("!llvm.struct<(" + ", ".join([str(kind)] * count) + ")>")
    out = llvm.inline_asm(result, list(arguments), ptx, constraints, has_side_effects=True)
    if kind is None:
        return None
    return typed(out) if count == 1 else [typed(llvm.extractvalue(kind, out, [i])) for i in range(count)]
