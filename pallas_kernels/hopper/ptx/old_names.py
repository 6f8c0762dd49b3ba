"""Names of arithmetic from before registers had operators, until every kernel is converted."""

from __future__ import annotations

import functools
from typing import Any

from pallas_kernels.hopper.ptx.arithmetic import div_full, div_rn, fma, max_f32, max_nan_f32, max_s32, min_s32, rcp, select
from pallas_kernels.hopper.ptx.ld_st import load_global_float_or_zero, load_global_words, load_global_words_or_zeros
from pallas_kernels.hopper.ptx.registers import Float, Predicate, Word, as_value, typed


def _register(x: Any) -> Any:
    return as_value(x) if isinstance(x, int) else x if isinstance(x, (Word, Float, Predicate)) else typed(x)


def add(a: Any, *others: Any) -> Any:
    return functools.reduce(lambda x, y: x + y, others, _register(a))


def sub(a: Any, b: Any) -> Any:
    return _register(a) - b


def mul(a: Any, b: Any) -> Any:
    return _register(a) * b


def div(a: Any, b: Any) -> Any:
    return _register(a) // b


def rem(a: Any, b: Any) -> Any:
    return _register(a) % b


def minimum(a: Any, b: Any) -> Any:
    return min_s32(a, b)


def maximum(a: Any, b: Any) -> Any:
    return max_s32(a, b)


def shift_left(a: Any, bits: Any) -> Any:
    return _register(a) << bits


def shift_right(a: Any, bits: Any) -> Any:
    return _register(a) >> bits


def bit_and(a: Any, b: Any) -> Any:
    return _register(a) & b


def bit_or(a: Any, b: Any) -> Any:
    return _register(a) | b


def bit_xor(a: Any, b: Any) -> Any:
    return _register(a) ^ b


def compare(relation: str, a: Any, b: Any) -> Any:
    """`relation` is one of eq, ne, slt, sle, sgt, sge, ult."""
    a = _register(a)
    relations = {
        "eq": lambda: a.equals(b),
        "ne": lambda: a.differs(b),
        "slt": lambda: a.signed < b,
        "sle": lambda: a.signed <= b,
        "sgt": lambda: a.signed > b,
        "sge": lambda: a.signed >= b,
        "ult": lambda: a < b,
    }
    return relations[relation]()


def both(a: Any, b: Any) -> Any:
    return _register(a) & b


def plus(a: Any, *others: Any) -> Any:
    return add(a, *others)


def minus(a: Any, b: Any) -> Any:
    return _register(a) - b


def times(a: Any, b: Any) -> Any:
    return _register(a) * b


def times_plus(a: Any, b: Any, c: Any) -> Any:
    return fma(a, b, c)


def larger(a: Any, b: Any) -> Any:
    return max_f32(a, b)


def maximum_floats(a: Any, b: Any) -> Any:
    return max_nan_f32(a, b)


def divide_floats(a: Any, b: Any) -> Any:
    return div_rn(a, b)


def either(condition: Any, a: Any, b: Any) -> Any:
    return select(condition, a, b)


def load_words(address: Any) -> Any:
    return load_global_words(address)


def load_words_or_zeros(address: Any, predicate: Any, count: int) -> Any:
    return load_global_words_or_zeros(address, predicate, count)


def load_float_or_zero(address: Any, predicate: Any) -> Any:
    return load_global_float_or_zero(address, predicate)


def above(a: Any, b: Any) -> Any:
    return _register(a) > b


def inverse(x: Any) -> Any:
    return 1.0 / _register(x)


def divide_as_xla(a: Any, b: Any) -> Any:
    return div_full(a, b)


def approximate_inverse(x: Any) -> Any:
    return rcp(x)
