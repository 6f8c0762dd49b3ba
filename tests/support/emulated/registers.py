"""The registers of `ptx` as NumPy arrays, one element a thread, and the functions of `ptx` that need nothing else.

Integers are int64 with the value that the 32 bits have as a signed number. Addresses are those from 2**40 on: they are not
wrapped, so that every array can have addresses of its own.
"""

from __future__ import annotations

import functools
import types

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import ptx

LARGEST = 1 << 40  # what is at least that is an address


def wrapped(x) -> np.ndarray:
    x = np.asarray(x, np.int64)
    return np.where(
        np.abs(x) < LARGEST, x.astype(np.uint32).view(np.int32) if x.ndim else np.uint32(x & 0xFFFFFFFF).view(np.int32), x
    )


def unsigned(x) -> np.ndarray:
    x = np.asarray(x, np.int64)
    return np.where(np.abs(x) < LARGEST, x & 0xFFFFFFFF, x)


class Register:
    __array_ufunc__ = None  # NumPy leaves operators to us

    def __init__(self, value):
        self.value = value


class Predicate(Register):
    def __and__(self, other):
        return Predicate(np.logical_and(self.value, arrays(other)))

    def __or__(self, other):
        return Predicate(np.logical_or(self.value, arrays(other)))


def _operator(function):
    """An operator on numbers that are signed; its result may be any integer."""

    def call(self, other):
        other = other if isinstance(other, int) else arrays(other)
        with np.errstate(all="ignore"):
            return Word(wrapped(function(self.value, other)))

    return call


def _product(a, b):
    return (unsigned(a) * unsigned(b)).astype(np.int64) & 0xFFFFFFFF


def _relation(function, view):
    return lambda self, other: Predicate(function(view(self.value), view(wrapped(arrays(other)))))


class Word(Register):
    __add__ = __radd__ = _operator(lambda a, b: a + b)
    __sub__ = _operator(lambda a, b: a - b)
    __rsub__ = _operator(lambda a, b: b - a)
    __mul__ = __rmul__ = _operator(_product)
    __floordiv__ = _operator(lambda a, b: unsigned(a) // np.maximum(unsigned(b), 1))
    __mod__ = _operator(lambda a, b: unsigned(a) % np.maximum(unsigned(b), 1))
    __and__ = _operator(lambda a, b: a & wrapped(b))
    __or__ = _operator(lambda a, b: a | wrapped(b))
    __xor__ = _operator(lambda a, b: a ^ wrapped(b))
    __lshift__ = _operator(lambda a, b: unsigned(a) << np.minimum(unsigned(b), 31))
    __rlshift__ = _operator(lambda a, b: unsigned(b) << np.minimum(unsigned(a), 31))
    __rshift__ = _operator(lambda a, b: unsigned(a) >> np.minimum(unsigned(b), 31))
    __lt__ = _relation(np.less, unsigned)
    __le__ = _relation(np.less_equal, unsigned)
    __gt__ = _relation(np.greater, unsigned)
    __ge__ = _relation(np.greater_equal, unsigned)
    equals = _relation(np.equal, wrapped)
    differs = _relation(np.not_equal, wrapped)

    @property
    def signed(self):
        return Signed(self.value)


class Signed(Register):
    __lt__ = _relation(np.less, wrapped)
    __le__ = _relation(np.less_equal, wrapped)
    __gt__ = _relation(np.greater, wrapped)
    __ge__ = _relation(np.greater_equal, wrapped)
    __rshift__ = _operator(lambda a, b: a >> np.minimum(unsigned(b), 31))


def floats(function):
    """`function` of float32 arrays, whatever it warns of."""

    def call(*arguments):
        with np.errstate(all="ignore"):
            return np.asarray(function(*(np.asarray(x, np.float32) for x in arguments)), np.float32)

    return call


def _float_operator(function):
    return lambda self, other: Float(floats(function)(self.value, arrays(other)))


class Float(Register):
    __add__ = __radd__ = _float_operator(np.add)
    __sub__ = _float_operator(np.subtract)
    __mul__ = __rmul__ = _float_operator(np.multiply)
    __truediv__ = _float_operator(np.divide)
    __rtruediv__ = _float_operator(lambda a, b: b / a)

    def __gt__(self, other):
        return Predicate(np.greater(self.value, np.float32(arrays(other))))

    def __ge__(self, other):
        return Predicate(np.greater_equal(self.value, np.float32(arrays(other))))


# ---- between registers and arrays


def arrays(x):
    """The arrays of registers, also of those in lists and tuples."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(arrays, x))
    return x.value if isinstance(x, Register) else x


def registers(x):
    """The registers that hold arrays, by their dtypes."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(registers, x))
    if not isinstance(x, (np.ndarray, np.generic)):
        return x
    return (Predicate if x.dtype == bool else Float if x.dtype.kind == "f" else Word)(x)


def of_registers(function):
    """`function` of arrays as one of registers."""

    @functools.wraps(function)
    def call(*given, **options):
        return registers(function(*map(arrays, given), **{name: arrays(x) for name, x in options.items()}))

    return call


def put_in_place(patch, words) -> None:
    """Puts `words` in the place of the functions of `ptx` with these names, in all its modules."""
    modules = [ptx, *(part for part in vars(ptx).values() if isinstance(part, types.ModuleType))]
    for name, word in words.items():
        found = [module for module in modules if hasattr(module, name)]
        assert found, f"ptx has no {name}"
        for module in found:
            patch.setattr(module, name, word)


# ---- functions of single threads


def bits(x) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x, np.float32)).view(np.int32).astype(np.int64)


def number(word) -> np.ndarray:
    return np.ascontiguousarray(wrapped(word).astype(np.int32)).view(np.float32)


def words32(word) -> np.ndarray:
    return np.ascontiguousarray(unsigned(word).astype(np.uint32))


def halves(word):
    return number(unsigned(word) << 16 & 0xFFFFFFFF), number(np.bitwise_and(word, -0x10000))


def pair_of(dtype):
    def pair(low, high):
        with np.errstate(all="ignore"):
            both = [np.asarray(x, np.float32).astype(dtype).view(np.uint16).astype(np.int64) for x in (low, high)]
        return wrapped(both[0] | both[1] << 16)

    return pair


def eight(words):
    """Eight bfloat16 numbers of four words."""
    return [x for word in words for x in halves(word)]


def float16_from_e4m3(word):
    numbers = words32(word).view(jnp.float8_e4m3fn).reshape(-1, 4).astype(np.float32)
    return [pair_of(np.float16)(numbers[:, i], numbers[:, i + 2]) for i in range(2)]


def to_e4m3_sum(words, factor):
    with np.errstate(all="ignore"):
        numbers = np.stack(eight(words), 1) * np.asarray(factor)[:, None]
        exact = numbers.astype(np.float16).astype(np.float32)
        high = np.clip(exact, -448, 448).astype(jnp.float8_e4m3fn)
        low = np.clip(exact - high.astype(np.float32), -448, 448).astype(jnp.float8_e4m3fn)
    return tuple(list(x.view(np.int32).astype(np.int64).T) for x in (high, low))


def to_e4m3_word(xs):
    codes = [np.clip(np.asarray(x, np.float32), -448, 448).astype(jnp.float8_e4m3fn) for x in xs]
    return wrapped(sum(x.view(np.uint8).astype(np.int64) << 8 * i for i, x in enumerate(codes)))


def larger_magnitudes(a, b):
    pairs = zip(halves(a), halves(b), strict=True)
    return pair_of(jnp.bfloat16)(*(np.fmax(np.abs(x), np.abs(y)) for x, y in pairs))


def select(condition, a, b):
    if any(np.asarray(x).dtype.kind == "f" for x in (a, b)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    else:
        a, b = wrapped(a), wrapped(b)
    return np.where(condition, a, b)


def _lowest_bit(x):
    x = unsigned(x)
    return np.log2(np.maximum(x & -x, 1)).astype(np.int64)


def _leading_zeros(x):
    return np.array([32 - int(value).bit_length() for value in np.ravel(unsigned(x))], np.int64)


PURE = {
    "opaque": lambda x: x,
    "select": select,
    "min_u32": lambda a, b: wrapped(np.minimum(unsigned(a), unsigned(b))),
    "max_u32": lambda a, b: wrapped(np.maximum(unsigned(a), unsigned(b))),
    "min_s32": lambda a, b: np.minimum(wrapped(a), wrapped(b)),
    "max_s32": lambda a, b: np.maximum(wrapped(a), wrapped(b)),
    "as_number": lambda condition: np.asarray(condition).astype(np.int64),
    "population": lambda x: np.bitwise_count(unsigned(x).astype(np.uint32)).astype(np.int64),
    "leading_zeros": _leading_zeros,
    "lowest_bit": _lowest_bit,
    "max_f32": floats(np.fmax),
    "max_nan_f32": floats(np.maximum),
    "number_or_lowest": floats(lambda x: np.where(np.isnan(x), -np.inf, x)),
    "fma": floats(lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)),
    "div_rn": floats(np.divide),
    "div_full": floats(np.divide),
    "rcp": floats(lambda x: np.float32(1) / x),
    "rsqrt": floats(lambda x: 1 / np.sqrt(x)),
    "exp2": floats(np.exp2),
    "log2": floats(np.log2),
    "count_at_least": lambda xs, threshold, start, unit: wrapped(start + unit * sum((x >= threshold).astype(int) for x in xs)),
    "larger_magnitudes": larger_magnitudes,
    "add_dot": lambda total, a, b: total + sum(x * y for x, y in zip(eight(a), eight(b), strict=True)),
    "add_multiples": lambda totals, words, factor: [t + factor * x for t, x in zip(totals, eight(words), strict=True)],
    "bits_of": bits,
    "float_of": number,
    "rounded": lambda x: np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32),
    "from_bfloat16_pair": halves,
    "to_bfloat16_pair": pair_of(jnp.bfloat16),
    "to_float16_pair": pair_of(np.float16),
    "to_e4m3_word": to_e4m3_word,
    "to_e4m3_sum": to_e4m3_sum,
    "float16_from_e4m3": float16_from_e4m3,
    "matrix": lambda address: address,
    "proxy_fence": lambda: None,
    "barrier_init_done": lambda: None,
}
