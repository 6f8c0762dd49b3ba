"""Threads of `ptx` on NumPy that take every step together, under a mask, and the memory they reach: what both emulators share.

The methods of `Threads` that are named as functions of `ptx` stand for these; they take and return arrays with an element for
every thread. An access outside an array, or not on a boundary of its size, raises. What a thread does not load is noise, and
so is what a copy will overwrite from the moment it is issued until it lands.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.hopper import ptx
from tests.support.emulated.registers import PURE, arrays, bits, number, of_registers, registers, unsigned, words32, wrapped

SEGMENT = 40  # bits of an address below the number of its array
CONTROL = ("when", "branch", "choose", "loop", "repeat")  # what is called inside takes and returns registers


class Memory:
    """Arrays, each with 2**40 addresses of its own, as bytes."""

    def __init__(self) -> None:
        self.known: list[np.ndarray] = []
        self.arrays: list[np.ndarray] = []

    def address(self, array: np.ndarray) -> int:
        """Where an array begins."""
        for i, known in enumerate(self.known):
            if known is array:
                return i + 1 << SEGMENT
        self.known.append(array)
        self.arrays.append(array.reshape(-1).view(np.uint8))
        return len(self.known) << SEGMENT

    def at(self, address: int) -> tuple[np.ndarray, int]:
        """The array that an address is in, and the number of its byte there."""
        return self.arrays[(address >> SEGMENT) - 1], address & (1 << SEGMENT) - 1


class Threads:
    """Some threads and the memory they reach. rank: of their block in its cluster, whose shared memories follow one another."""

    NOISE = 0x5A  # of every byte

    def __init__(self, ids: np.ndarray, memory: Memory, rank: int = 0):
        self.ids, self.memory, self.rank = ids, memory, rank
        self.active = np.ones(ids.size, bool)
        self.copies: list[Callable[[], None]] = []  # since the last commit: what lands them

    def spread(self, x) -> np.ndarray:
        x = np.asarray(arrays(x))
        return np.broadcast_to(x.astype(np.int64) if x.dtype.kind in "iu" else x, self.ids.shape)

    def on(self, predicate) -> np.ndarray:
        return self.active if predicate is None else self.active & self.spread(predicate).astype(bool)

    def same(self, x):
        """The value that all active threads have."""
        values = self.spread(x)[self.active]
        assert (values == values[0]).all(), "the threads differ"
        return values[0]

    # -- control flow

    @contextlib.contextmanager
    def when(self, condition):
        before, self.active = self.active, self.on(condition)
        yield
        self.active = before

    def branch(self, condition, body):
        if self.same(condition):
            body()

    def choose(self, condition, body, otherwise):
        return list(body() if self.same(condition) else otherwise)

    def loop(self, count, carry, body):
        """A thread whose count has been reached keeps what it has."""
        carry, count = list(carry), self.spread(count)
        for i in range(int(count[self.active].max(initial=0))):
            with self.when(i < count):
                new = body(registers(self.spread(i)), list(carry))
                if not self.active.all():
                    pairs = zip(new, carry, strict=True)
                    new = [registers(np.where(self.active, arrays(n), self.spread(c))) for n, c in pairs]
                carry = list(new)
        return carry

    def repeat(self, carry, body, extras):
        for _ in range(1000):
            carry, extra, more = body(list(carry))
            assert len(extra) == extras
            if not self.same(more):
                return [*carry, *extra]
        raise AssertionError("a loop that does not end")

    # -- registers

    def constant(self, x):
        return self.spread(x)

    scalar = constant

    def number(self, x):
        return np.full(self.ids.shape, x, np.float32)

    def thread(self):
        return self.ids

    def offset(self, base, index, scale):
        assert (self.spread(index)[self.active] >= 0).all(), "an index of an address is not negative"
        return base + index * scale

    def global_address(self, array):
        return self.spread(self.memory.address(array))

    shared_address = global_address

    def peer_address(self, address, rank):
        return self.spread(address) + (self.spread(rank) - self.rank << SEGMENT)

    # -- memory

    def note(self, kind: str, array: np.ndarray, places: np.ndarray, size: int, threads: np.ndarray) -> None:
        """Is told of every access: "reads", "writes" or "counts" of pieces of `size` bytes of an array."""

    def accesses(self, address, size: int, on: np.ndarray, kind: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(an array in pieces of `size` bytes, the numbers of pieces, the threads that reach them) of the threads of `on`."""
        address, threads = self.spread(address)[on], np.flatnonzero(on)
        assert (address % size == 0).all(), "not on a boundary of its size"
        for segment in np.unique(address >> SEGMENT):
            chosen = address >> SEGMENT == segment
            array, places = self.memory.arrays[segment - 1], (address[chosen] & (1 << SEGMENT) - 1) // size
            assert (places < array.size // size).all(), "outside the array"
            self.note(kind, array, places, size, threads[chosen])
            yield array[: array.size // size * size].reshape(-1, size), places, threads[chosen]

    def load(self, address, kind=np.int32, count=1, on=None, absent=None) -> list[np.ndarray]:
        """`count` numbers that lie side by side, of the active threads or those of `on`; the others get `absent`, or noise."""
        size, on = count * np.dtype(kind).itemsize, self.active if on is None else on
        out = np.full((self.ids.size, size), self.NOISE, np.uint8)
        for pieces, places, threads in self.accesses(address, size, on, "reads"):
            out[threads] = pieces[places]
        numbers = out.view(kind)
        if absent is not None:
            numbers[~on] = absent
        return list(numbers.T.astype(np.int64) if numbers.dtype.kind in "iu" else np.ascontiguousarray(numbers.T))

    def store(self, address, values, predicate=None, kind=np.int32):
        """Stores numbers side by side."""
        out = np.stack([self.spread(x).astype(kind) for x in values], 1).view(np.uint8)
        for pieces, places, threads in self.accesses(address, out.shape[1], self.on(predicate), "writes"):
            pieces[places] = out[threads]

    def load_global(self, address):
        return self.load(address)[0]

    load_shared = load_fresh = load_global

    def load_global_float(self, address):
        return self.load(address, np.float32)[0]

    load_shared_float = load_peer_float = load_global_float

    def load_shared_pair(self, address):
        return self.load(address, count=2)

    load_fresh_pair = load_shared_pair

    def load_global_words(self, address):
        return self.load(address, count=4)

    load_shared_words = load_fresh_words = load_peer_words = load_global_words

    def load_shared_floats(self, address, count=2):
        return self.load(address, np.float32, count)

    def load_shared_short(self, address, predicate):
        return self.load(address, np.uint16, on=self.on(predicate), absent=0)[0]

    def load_global_words_or_zeros(self, address, predicate, count):
        return self.load(address, count=count, on=self.on(self.spread(predicate) != 0), absent=0)

    def load_global_float_or_zero(self, address, predicate):
        return self.load(address, np.float32, on=self.on(self.spread(predicate) != 0), absent=0)[0]

    def load_global_floats_or_nan(self, address, predicate):
        return [number(word) for word in self.load(address, count=4, on=self.on(predicate), absent=0x7FFFFFFF)]

    def store_global(self, address, value, predicate=None):
        self.store(address, [value], predicate)

    store_shared = store_global

    def store_global_words(self, address, words, predicate=None, *, passing=False):
        self.store(address, words, predicate)

    store_shared_words = store_shared_pair = store_global_words

    def store_shared_floats(self, address, floats):
        self.store(address, floats, kind=np.float32)

    def store_shared_zeros(self, address):
        self.store(address, [0] * 4)

    def store_shared_short(self, address, value, predicate):
        self.store(address, [value], predicate, np.int16)

    def store_global_bfloat16(self, address, x, predicate):
        self.store(address, [self.spread(x).astype(ml_dtypes.bfloat16).view(np.int16)], predicate, np.int16)

    def increment_shared(self, address, predicate):
        for pieces, places, _ in self.accesses(address, 4, self.on(predicate), "counts"):
            np.add.at(pieces.view(np.int32)[:, 0], places, 1)

    def or_shared(self, address, bits):
        out, bits = self.spread(0).copy(), self.spread(bits)
        for pieces, places, threads in self.accesses(address, 4, self.active, "counts"):
            words = pieces.view(np.int32)[:, 0]
            for place, thread in zip(places, threads, strict=True):
                out[thread] = words[place]
                words[place] |= np.int64(bits[thread]).astype(np.int32)
        return out

    def append_at_least(self, xs, threshold, address, position):
        for i, x in enumerate(xs):
            fits = np.asarray(x >= threshold)
            self.store(address, (bits(x), position + i), fits)
            address = address + 8 * fits

    def prefetch(self, address, size, predicate):
        on = self.on(predicate)
        for at, count in zip(self.spread(address)[on], self.spread(size)[on], strict=True):
            array, first = self.memory.at(at)
            assert at % 16 == 0 and count % 16 == 0 and count > 0, "not whole pieces of 16 bytes"
            assert first + count <= array.size, "outside the array"

    def prefetch_line(self, address, predicate):
        for at in self.spread(address)[self.on(predicate)]:
            array, first = self.memory.at(at)
            assert first < array.size, "outside the array"

    # -- copies

    def begin_copy(self, target, source, size: int, reads, on) -> None:
        """Starts copying `size` bytes in the threads of `on`; those without `reads` do not read the source and get zeros."""
        target, source, on, reads = self.spread(target), self.spread(source), on.copy(), on & reads
        for pieces, places, _ in self.accesses(target, size, on, "writes"):
            pieces[places] = self.NOISE

        def land() -> None:
            data = np.zeros((self.ids.size, size), np.uint8)
            for pieces, places, threads in self.accesses(source, size, reads, "reads"):
                data[threads] = pieces[places]
            for pieces, places, threads in self.accesses(target, size, on, "reads"):  # the write was noted when it began
                pieces[places] = data[threads]

        self.copies.append(land)

    def copy_async(self, target, source, size, pieces, target_step, source_step):
        size = self.spread(size)
        assert np.isin(size[self.active], (0, 16)).all()
        for piece in range(pieces):
            self.begin_copy(target + piece * target_step, source + piece * source_step, 16, size == 16, self.active)

    def copy_async_where(self, target, source, predicate):
        self.begin_copy(target, source, 16, True, self.on(predicate))

    def copy_async_word(self, target, source, size):
        size = self.spread(size)
        assert np.isin(size[self.active], (0, 4)).all()
        self.begin_copy(target, source, 4, size == 4, self.active)

    # -- warps

    def by_warp(self, x) -> np.ndarray:
        warps = self.active.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all(), "a whole warp takes part"
        return np.broadcast_to(x, self.ids.shape).reshape(-1, 32)

    def lane_distant(self, x, distance):
        return self.by_warp(x)[:, np.arange(32) ^ distance].reshape(-1)

    def alike_in_warp(self, x):
        lanes = self.by_warp(x)
        return wrapped(((lanes[:, :, None] == lanes[:, None]) << np.arange(32)).sum(2).reshape(-1))

    def reduce_warp(self, operation, x):
        function = {"add": np.sum, "max": np.max, "min": np.min, "or": np.bitwise_or.reduce}[operation]
        return wrapped(np.repeat(function(unsigned(self.by_warp(x)), axis=1), 32))

    def sum_of_warp(self, x):
        return self.reduce_warp("add", x)

    def sum_of_lanes_up_to(self, x):
        return wrapped(np.cumsum(unsigned(self.by_warp(x)), 1).reshape(-1))

    def sum_of_lanes_below(self, x):
        return wrapped(self.sum_of_lanes_up_to(x) - self.spread(x))

    def from_lane(self, x, lane):
        return np.repeat(self.by_warp(x)[:, lane], 32)

    def uniform(self, x):
        return self.from_lane(x, 0)

    def ballot(self, predicate):
        lanes = self.by_warp(predicate).astype(np.int64) << np.arange(32)
        return wrapped(np.repeat(lanes.sum(1), 32))

    # -- matrices

    def bytes_of(self, words, kind) -> np.ndarray:
        """The numbers in each thread's words as float32."""
        words = np.stack([np.broadcast_to(words32(word), self.ids.shape) for word in words], axis=1)
        return np.ascontiguousarray(words).view(kind).astype(np.float32)

    def swizzled(self, address: int, lines: int, length: int, kind) -> np.ndarray:
        """[lines, length] numbers at a descriptor's address as float32; lines are 128 bytes, 8 lines 1024."""
        array, first = self.memory.at(int(address))
        size = np.dtype(kind).itemsize
        line, place = np.arange(lines)[:, None], size * np.arange(length)[None]
        places = first + line // 8 * 1024 + line % 8 * 128 + place
        places = places ^ (places >> 7 & 7) << 4
        assert (places < array.size).all(), "outside the array"
        return array.view(kind)[places // size].astype(np.float32)


def vocabulary(kind: type[Threads], whose: Callable[[], Threads]) -> dict[str, Callable]:
    """What stands for the functions of `ptx`: the methods of the threads that `whose` returns at the time of a call."""

    def method(name: str) -> Callable:
        return lambda *given, **options: getattr(whose(), name)(*given, **options)

    own = {name: method(name) for name in vars(ptx) if hasattr(kind, name)}
    return {name: f if name in CONTROL else of_registers(f) for name, f in (PURE | own).items()}


def pallas(kernel: Callable) -> types.SimpleNamespace:
    """What stands for Pallas' Mosaic GPU module: its `kernel`, and of the rest what kernels in `ptx` words need."""
    return types.SimpleNamespace(
        kernel=kernel,
        inline_mgpu=lambda arg_types: lambda f: lambda *refs: f(None, *refs),
        CompilerParams=lambda **_: None,
        SMEM=lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype),
        RefType=lambda: None,
        set_max_registers=lambda count, action: None,
    )
