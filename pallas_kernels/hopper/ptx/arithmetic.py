"""Arithmetic, comparisons and selection on registers: 32-bit integers and float32, and bfloat16 numbers in pairs."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.ptx.registers import Value, as_value, asm, f32, i32, number


def add(a: Value, *others: Value | int) -> Value:
    for other in others:
        a = arith.addi(a, as_value(other))
    return a


def sub(a: Value | int, b: Value | int) -> Value:
    return arith.subi(as_value(a), as_value(b))


def mul(a: Value, b: Value | int) -> Value:
    return arith.muli(a, as_value(b))


def div(a: Value, b: Value | int) -> Value:
    return arith.divui(a, as_value(b))


def rem(a: Value, b: Value | int) -> Value:
    return arith.remui(a, as_value(b))


def minimum(a: Value, b: Value | int) -> Value:
    return arith.minsi(a, as_value(b))


def maximum(a: Value, b: Value | int) -> Value:
    return arith.maxsi(a, as_value(b))


def shift_left(a: Value | int, bits: Value | int) -> Value:
    return arith.shli(as_value(a), as_value(bits))


def shift_right(a: Value, bits: Value | int) -> Value:
    return arith.shrui(a, as_value(bits))


def bit_and(a: Value, b: Value | int) -> Value:
    return arith.andi(a, as_value(b))


def bit_or(a: Value, b: Value | int) -> Value:
    return arith.ori(a, as_value(b))


def bit_xor(a: Value, b: Value | int) -> Value:
    return arith.xori(a, as_value(b))


def compare(relation: str, a: Value, b: Value | int) -> Value:
    """`relation` is one of eq, ne, slt, sle, sgt, sge, ult."""
    return arith.cmpi(getattr(arith.CmpIPredicate, relation), a, as_value(b))


def select(condition: Value, a: Value | int, b: Value | int) -> Value:
    return arith.select(condition, as_value(a), as_value(b))


def both(a: Value, b: Value) -> Value:
    """Of two conditions."""
    return arith.andi(a, b)


def population(bits: Value) -> Value:
    return asm("popc.b32 $0, $1;", [bits], "=r,r", i32())


def lowest_bit(bits: Value) -> Value:
    """The position of the lowest set bit."""
    return asm("{\n.reg .b32 r;\nbrev.b32 r, $1;\nclz.b32 $0, r;\n}", [bits], "=r,r", i32())


def exp2(x: Value) -> Value:
    return asm("ex2.approx.ftz.f32 $0, $1;", [x], "=f,f", ir.F32Type.get())


def log2(x: Value) -> Value:
    return asm("lg2.approx.ftz.f32 $0, $1;", [x], "=f,f", ir.F32Type.get())


def larger_magnitudes(a: Value, b: Value) -> Value:
    """The larger of |a| and |b|, of both bfloat16 numbers of a word."""
    ptx = "{\n.reg .b32 x, y;\nand.b32 x, $1, 0x7fff7fff;\nand.b32 y, $2, 0x7fff7fff;\nmax.bf16x2 $0, x, y;\n}"
    return asm(ptx, [a, b], "=r,r,r", i32())


def plus(a: Value, *others: Value) -> Value:
    for other in others:
        a = arith.addf(a, other)
    return a


def minus(a: Value, b: Value) -> Value:
    return arith.subf(a, b)


def times(a: Value, b: Value) -> Value:
    return arith.mulf(a, b)


def times_plus(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], "=f,f,f,f", f32())


def larger(a: Value, b: Value) -> Value:
    return asm("max.f32 $0, $1, $2;", [a, b], "=f,f,f", f32())


def above(a: Value, b: Value) -> Value:
    """Whether a > b, false for NaN."""
    return arith.cmpf(arith.CmpFPredicate.OGT, a, b)


def either(condition: Value, a: Value, b: Value) -> Value:
    return arith.select(condition, a, b)


def inverse(x: Value) -> Value:
    return arith.divf(number(1.0), x)


def divide_floats(a: Value, b: Value) -> Value:
    return asm("div.rn.f32 $0, $1, $2;", [a, b], "=f,f,f", f32())


def maximum_floats(a: Value, b: Value) -> Value:
    return arith.maximumf(a, b)


def rsqrt(x: Value) -> Value:
    return asm("rsqrt.approx.f32 $0, $1;", [x], "=f,f", f32())


def add_dot(total: Value, a: Sequence[Value], b: Sequence[Value]) -> Value:
    """total + the dot product of 8 bfloat16 numbers with 8 others, four words each."""
    lines = [".reg .f32 x, y, odd;", "mov.f32 $0, $1;", "mov.f32 odd, 0f00000000;"]
    for i in range(4):
        lines += [f"shl.b32 x, ${2 + i}, 16;", f"shl.b32 y, ${6 + i}, 16;", "fma.rn.f32 $0, x, y, $0;"]
        lines += [f"and.b32 x, ${2 + i}, 0xffff0000;", f"and.b32 y, ${6 + i}, 0xffff0000;", "fma.rn.f32 odd, x, y, odd;"]
    lines += ["add.f32 $0, $0, odd;"]
    return asm("{\n" + "\n".join(lines) + "\n}", [total, *a, *b], "=&f,f" + ",r" * 8, f32())


def add_multiples(totals: Sequence[Value], words: Sequence[Value], factor: Value) -> list[Value]:
    """totals[i] + factor * the i-th of the 8 bfloat16 numbers in four words."""
    lines = [".reg .f32 x;"]
    for i in range(4):
        lines += [f"shl.b32 x, ${16 + i}, 16;", f"fma.rn.f32 ${2 * i}, x, $20, ${8 + 2 * i};"]
        lines += [f"and.b32 x, ${16 + i}, 0xffff0000;", f"fma.rn.f32 ${2 * i + 1}, x, $20, ${9 + 2 * i};"]
    kind = ir.Type.parse("!llvm.struct<(" + ", ".join(["f32"] * 8) + ")>")
    constraints = ",".join(["=&f"] * 8 + ["f"] * 8 + ["r"] * 4 + ["f"])
    out = asm("{\n" + "\n".join(lines) + "\n}", [*totals, *words, factor], constraints, kind)
    return [llvm.extractvalue(f32(), out, [i]) for i in range(8)]
