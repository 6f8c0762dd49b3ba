"""Conversions between float32 and pairs or fours of narrower numbers that share a register (cvt)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.ptx.arithmetic import max_s32, min_s32
from pallas_kernels.hopper.ptx.registers import Float, Word, asm, f32, i32


def float16_pairs(word: Word) -> list[Any]:
    """4 e4m3 numbers as two vectors of two float16."""
    f16 = ir.F16Type.get()
    ptx = "{\n.reg .b16 a0, a1;\nmov.b32 {a0, a1}, $2;\ncvt.rn.f16x2.e4m3x2 $0, a0;\ncvt.rn.f16x2.e4m3x2 $1, a1;\n}"
    return [llvm.bitcast(ir.VectorType.get((2,), f16), pair) for pair in asm(ptx, [word], "=r,=r,r", i32(), 2)]


def from_bfloat16_pair(word: Word) -> tuple[Float, Float]:
    """The low and the high half of a word as float32."""
    return float_of(word << 16), float_of(word & -0x10000)


def to_bfloat16_pair(low: Float, high: Float) -> Word:
    return asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], "=r,f,f", i32())


def to_float16_pair(low: Float, high: Float) -> Word:
    return asm("cvt.rn.f16x2.f32 $0, $2, $1;", [low, high], "=r,f,f", i32())


def bits_of(x: Float) -> Word:
    return Word(arith.bitcast(i32(), x))


def float_of(bits: Word) -> Float:
    return Float(arith.bitcast(f32(), bits))


def rounded(x: Float) -> Float:
    """The nearest bfloat16, as float32."""
    return from_bfloat16_pair(to_bfloat16_pair(x, x))[0]


def to_e4m3_word(xs: Sequence[Float]) -> Word:
    """Four numbers as e4m3; what is too large becomes the largest."""
    ptx = (
        "{\n.reg .b16 a, b;\ncvt.rn.satfinite.e4m3x2.f32 a, $2, $1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;\nmov.b32 $0, {a, b};\n}"
    )
    return asm(ptx, list(xs), "=r,f,f,f,f", i32())


def float16_from_e4m3(word: Word) -> list[Word]:
    """The first and third of four e4m3 numbers as a pair of float16, exactly, and the second and fourth."""
    ptx = (
        "{\n.reg .b32 t;\n.reg .b16 a, b;\nprmt.b32 t, $2, 0, 0x3120;\nmov.b32 {a, b}, t;\n"
        "cvt.rn.f16x2.e4m3x2 $0, a;\ncvt.rn.f16x2.e4m3x2 $1, b;\n}"
    )
    return asm(ptx, [word], "=r,=r,r", i32(), 2)


def to_e4m3_sum(words: Sequence[Word], factor: Float) -> tuple[list[Word], list[Word]]:
    """8 bfloat16 numbers (four words) times a factor as sums of two e4m3 numbers: two words of the larger, two of the others.

    The product is rounded to float16. Where it has at most 8 significant bits and is at least 2**-2, the sum is exact; else
    it is within 2**-10.
    """
    lines = [".reg .f32 x, y;", ".reg .b32 a, b;", ".reg .b16 h<4>, l<4>;"]
    for i in range(4):
        lines += [f"shl.b32 a, ${4 + i}, 16;", "mov.b32 x, a;", f"and.b32 b, ${4 + i}, 0xffff0000;", "mov.b32 y, b;"]
        lines += ["mul.f32 x, x, $8;", "mul.f32 y, y, $8;", "cvt.rn.f16x2.f32 a, y, x;"]
        lines += [f"cvt.rn.satfinite.e4m3x2.f16x2 h{i}, a;", f"cvt.rn.f16x2.e4m3x2 b, h{i};"]
        lines += ["sub.f16x2 a, a, b;", f"cvt.rn.satfinite.e4m3x2.f16x2 l{i}, a;"]
    lines += ["mov.b32 $0, {h0, h1};", "mov.b32 $1, {h2, h3};", "mov.b32 $2, {l0, l1};", "mov.b32 $3, {l2, l3};"]
    constraints = ",".join(["=&r"] * 4 + ["r"] * 4 + ["f"])
    parts = asm("{\n" + "\n".join(lines) + "\n}", [*words, factor], constraints, i32(), 4)
    return parts[:2], parts[2:]


def magnitude_bits(x: Float) -> Word:
    """The bits of |x|, which are ordered as |x| is."""
    return bits_of(x) & 0x7FFFFFFF


def float16_scale(top: Word) -> tuple[Float, Float]:
    """A power of two that numbers are multiplied by to be float16, and its inverse.

    top: `magnitude_bits` of the largest of them, which becomes at least 2^14. So numbers that are bfloat16 stay exact, but for
    those below 2^-31 of the largest.
    """
    exponent = min_s32(max_s32(top & 0x7F800000, 16 << 23), 254 << 23)
    return float_of((127 + 127 + 14 << 23) - exponent), float_of(exponent - (14 << 23))
