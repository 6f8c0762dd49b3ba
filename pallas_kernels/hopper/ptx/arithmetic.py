"""What operators do not say: minima and maxima, choices, sums of several, bits, and products of bfloat16 numbers in pairs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

from jaxlib.mlir.dialects import arith

from pallas_kernels.hopper.ptx.registers import (
    Address,
    Float,
    Predicate,
    Word,
    as_float,
    as_value,
    asm,
    f32,
    i32,
    number,
    typed,
)

Number = TypeVar("Number", Word, Float)


@overload
def select(condition: Predicate, a: Address, b: Address) -> Address: ...
@overload
def select(condition: Predicate, a: Word | int, b: Word | int) -> Word: ...
@overload
def select(condition: Predicate, a: Float | float, b: Float | float) -> Float: ...
def select(condition: Predicate, a: Any, b: Any) -> Any:
    """a where the condition holds, else b: words, floats or addresses."""
    of = as_float if any(isinstance(x, (Float, float)) for x in (a, b)) else as_value
    return typed(arith.select(condition, of(a), of(b)))


def total(parts: Iterable[Number]) -> Number:
    """The sum of words or floats, from the first on."""
    return functools.reduce(operator.add, parts)


# ---- words


def min_u32(a: Word, b: Word | int) -> Word:
    return Word(arith.minui(a, as_value(b)))


def max_u32(a: Word, b: Word | int) -> Word:
    return Word(arith.maxui(a, as_value(b)))


def min_s32(a: Word, b: Word | int) -> Word:
    return Word(arith.minsi(a, as_value(b)))


def max_s32(a: Word, b: Word | int) -> Word:
    return Word(arith.maxsi(a, as_value(b)))


def as_number(condition: Predicate) -> Word:
    """1 where the condition holds, else 0."""
    return Word(arith.extui(i32(), condition))


def population(bits: Word) -> Word:
    return asm("popc.b32 $0, $1;", [bits], "=r,r", i32())


def leading_zeros(bits: Word) -> Word:
    return asm("clz.b32 $0, $1;", [bits], "=r,r", i32())


def lowest_bit(bits: Word) -> Word:
    """The position of the lowest set bit."""
    return asm("{\n.reg .b32 r;\nbrev.b32 r, $1;\nclz.b32 $0, r;\n}", [bits], "=r,r", i32())


# ---- floats


def max_f32(a: Float, b: Float) -> Float:
    """The larger one; of a NaN and a number the number."""
    return asm("max.f32 $0, $1, $2;", [a, b], "=f,f,f", f32())


def max_nan_f32(a: Float, b: Float) -> Float:
    """The larger one; NaN if either is."""
    return Float(arith.maximumf(a, b))


def maxnum_f32(a: Float, b: Float) -> Float:
    """The larger one, as max_f32 has it, by an instruction that the compiler may move and merge."""
    return Float(arith.maxnumf(a, b))


def number_or_lowest(x: Float) -> Float:
    """-inf for NaN."""
    return Float(arith.maxnumf(x, number(float("-inf"))))


def fma(a: Float, b: Float, c: Float) -> Float:
    """a * b + c, rounded once."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], "=f,f,f,f", f32())


def div_rn(a: Float, b: Float) -> Float:
    """a / b, rounded to nearest whatever the compiler is told of divisions."""
    return asm("div.rn.f32 $0, $1, $2;", [a, b], "=f,f,f", f32())


def rcp(x: Float) -> Float:
    """1 / x to within the last bit, by the instruction that XLA takes for it."""
    return asm("rcp.approx.f32 $0, $1;", [x], "=f,f", f32())


def div_full(a: Float, b: Float) -> Float:
    """a / b within two units of the last place, with the instruction that XLA divides with."""
    return asm("div.full.f32 $0, $1, $2;", [a, b], "=f,f,f", f32())


def rsqrt(x: Float) -> Float:
    return asm("rsqrt.approx.f32 $0, $1;", [x], "=f,f", f32())


def exp2(x: Float) -> Float:
    return asm("ex2.approx.ftz.f32 $0, $1;", [x], "=f,f", f32())


def log2(x: Float) -> Float:
    return asm("lg2.approx.ftz.f32 $0, $1;", [x], "=f,f", f32())


def count_at_least(xs: Sequence[Float], threshold: Float, start: Word, unit: int) -> Word:
    """start + unit * (how many of four floats are >= threshold), in one piece of predicated code."""
    counts = "".join(f"setp.ge.f32 p, ${3 + i}, $2;\n@p add.u32 $0, $0, {unit};\n" for i in range(4))
    text = "{\n.reg .pred p;\nmov.b32 $0, $1;\n" + counts + "}"
    return asm(text, [start, threshold, *xs], "=&r,r,f,f,f,f,f", i32())


# ---- bfloat16 numbers in pairs


def larger_magnitudes(a: Word, b: Word) -> Word:
    """The larger of |a| and |b|, of both bfloat16 numbers of a word."""
    ptx = "{\n.reg .b32 x, y;\nand.b32 x, $1, 0x7fff7fff;\nand.b32 y, $2, 0x7fff7fff;\nmax.bf16x2 $0, x, y;\n}"
    return asm(ptx, [a, b], "=r,r,r", i32())


def add_dot(total: Float, a: Sequence[Word], b: Sequence[Word]) -> Float:
    """total + the dot product of 8 bfloat16 numbers with 8 others, four words each."""
    lines = [".reg .f32 x, y, odd;", "mov.f32 $0, $1;", "mov.f32 odd, 0f00000000;"]
    for i in range(4):
        lines += [f"shl.b32 x, ${2 + i}, 16;", f"shl.b32 y, ${6 + i}, 16;", "fma.rn.f32 $0, x, y, $0;"]
        lines += [f"and.b32 x, ${2 + i}, 0xffff0000;", f"and.b32 y, ${6 + i}, 0xffff0000;", "fma.rn.f32 odd, x, y, odd;"]
    lines += ["add.f32 $0, $0, odd;"]
    return asm("{\n" + "\n".join(lines) + "\n}", [total, *a, *b], "=&f,f" + ",r" * 8, f32())


def add_multiples(totals: Sequence[Float], words: Sequence[Word], factor: Float) -> list[Float]:
    """totals[i] + factor * the i-th of the 8 bfloat16 numbers in four words."""
    lines = [".reg .f32 x;"]
    for i in range(4):
        lines += [f"shl.b32 x, ${16 + i}, 16;", f"fma.rn.f32 ${2 * i}, x, $20, ${8 + 2 * i};"]
        lines += [f"and.b32 x, ${16 + i}, 0xffff0000;", f"fma.rn.f32 ${2 * i + 1}, x, $20, ${9 + 2 * i};"]
    constraints = ",".join(["=&f"] * 8 + ["f"] * 8 + ["r"] * 4 + ["f"])
    return asm("{\n" + "\n".join(lines) + "\n}", [*totals, *words, factor], constraints, f32(), 8)
