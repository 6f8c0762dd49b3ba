"""One thread block on NumPy: `mosaic_gpu_words` with all threads in lockstep, for running the selection kernel on a CPU.

Shared memory starts as noise, global reads are checked for their bounds, and every access to a shared word that another
warp wrote, or every write to one that another warp read, since the last barrier counts as a race. Fences and timing are
outside its reach.
"""

from __future__ import annotations

import contextlib

import numpy as np

u32 = np.uint32
SEGMENT = 40  # bits of an address below the number of its array


class Word:
    """A 32-bit register or a predicate of every thread."""

    __array_priority__ = 1000

    def __init__(self, value):
        self.value = value

    def _binary(self, function, other):
        with np.errstate(over="ignore"):
            return Word(function(self.value, other.value if isinstance(other, Word) else u32(other & 0xFFFFFFFF)))

    def __add__(self, other):
        return self._binary(np.add, other)

    def __sub__(self, other):
        return self._binary(np.subtract, other)

    def __mul__(self, other):
        return self._binary(np.multiply, other)

    def __floordiv__(self, other):
        return self._binary(np.floor_divide, other)

    def __and__(self, other):
        return self._binary(np.bitwise_and, other)

    def __or__(self, other):
        return self._binary(np.bitwise_or, other)

    def __xor__(self, other):
        return self._binary(np.bitwise_xor, other)

    def __lshift__(self, other):
        return self._binary(np.left_shift, other)

    def __rshift__(self, other):
        return self._binary(np.right_shift, other)

    def __lt__(self, other):
        return self._binary(np.less, other)

    def __le__(self, other):
        return self._binary(np.less_equal, other)

    def __gt__(self, other):
        return self._binary(np.greater, other)

    def __ge__(self, other):
        return self._binary(np.greater_equal, other)

    def equals(self, other):
        return self._binary(np.equal, other)


class _Accesses:
    """Who touched a shared word since the last barrier, and whether it was several warps."""

    def __init__(self, words: int):
        self.epoch, self.warp, self.several = np.zeros(words, int), np.zeros(words, int), np.zeros(words, bool)

    def by_others(self, index, warps, epoch):
        return (self.epoch[index] == epoch) & ((self.warp[index] != warps) | self.several[index])

    def note(self, index, warps, epoch) -> bool:
        """Returns whether two warps touched one word."""
        seen = dict.fromkeys(zip(index.tolist(), warps.tolist(), strict=True))
        clash = False
        for i, warp in seen:
            if self.epoch[i] != epoch:
                self.epoch[i], self.warp[i], self.several[i] = epoch, warp, False
            elif self.warp[i] != warp:
                self.several[i] = clash = True
        return clash


class Machine:
    """The names of `mosaic_gpu_words` as methods. Compactions and the like are counted by `otherwise_keep`."""

    Word = Word

    def __init__(self, threads: int, shared_bytes: int, arrays: list[np.ndarray]):
        self.threads, self.ids = threads, np.arange(threads)
        self.memory = np.random.default_rng(0).integers(0, 2**32, -(-shared_bytes // 4), u32)
        self.arrays = [array.reshape(-1).view(u32) for array in arrays]
        self.mask = np.ones(threads, bool)
        self.epoch, self.races, self.rounds = 1, 0, 0
        self.reads, self.writes, self.counts = (_Accesses(self.memory.size) for _ in range(3))
        self.open_copies, self.copies = [], []  # those of the group that is not closed yet, and the groups under way

    def addresses(self) -> list[np.ndarray]:
        return [np.full(self.threads, number << SEGMENT, np.int64) for number in range(len(self.arrays))]

    # -- registers

    def word(self, number):
        return Word(np.full(self.threads, number & 0xFFFFFFFF, u32))

    def _array(self, x):
        return x.value if isinstance(x, Word) else self.word(x).value

    def _uniform(self, x):
        assert (x.value == x.value[0]).all(), "control flow depends on the thread"
        return x.value[0]

    def thread(self):
        return Word(self.ids.astype(u32))

    def select(self, predicate, yes, no):
        return Word(np.where(predicate.value, self._array(yes), self._array(no)))

    def smaller(self, a, b):
        return Word(np.minimum(a.value, self._array(b)))

    def larger(self, a, b):
        return Word(np.maximum(a.value, self._array(b)))

    def signed_smaller(self, a, b):
        return Word(np.minimum(a.value.view(np.int32), self._array(b).view(np.int32)).view(u32))

    def signed_larger(self, a, b):
        return Word(np.maximum(a.value.view(np.int32), self._array(b).view(np.int32)).view(u32))

    def as_number(self, predicate):
        return Word(predicate.value.astype(u32))

    def sign_mask(self, x):
        return Word((x.value.view(np.int32) >> 31).view(u32))

    def float_at_least(self, x, y):
        return Word(x >= y)

    def number_or_lowest(self, x):
        return np.where(np.isnan(x), np.float32(-np.inf), x)

    def bits(self, x):
        return Word(x.view(u32))

    def float_of(self, x):
        return x.value.view(np.float32)

    def count_bits(self, x):
        return Word(np.bitwise_count(x.value).astype(u32))

    def leading_zeros(self, x):
        return Word(np.array([32 - int(value).bit_length() for value in x.value], u32))

    # -- shared memory

    def _touch(self, own, others, address, on):
        index, warps = address[on] >> 2, self.ids[on] >> 5
        assert index.size == 0 or index.max() < self.memory.size, "outside shared memory"
        self.races += any(accesses.by_others(index, warps, self.epoch).any() for accesses in others)
        clash = own.note(index, warps, self.epoch)
        self.races += clash and own is self.writes

    def load_shared(self, address):
        self._touch(self.reads, [self.writes, self.counts], address.value, self.mask)
        return Word(self.memory[np.where(self.mask, address.value, 0) >> 2])

    def _aligned(self, address, size, on=True):
        assert (address[self.mask & on] % size == 0).all(), f"not on a {size}-byte boundary"

    def load_shared_pair(self, address):
        self._aligned(address.value, 8)
        return [self.load_shared(address), self.load_shared(address + 4)]

    def load_shared_floats(self, address):
        self._aligned(address.value, 16)
        return [self.float_of(self.load_shared(address + 4 * i)) for i in range(4)]

    def store_shared_if(self, predicate, address, x):
        on = self.mask & predicate.value
        self._touch(self.writes, [self.writes, self.reads, self.counts], address.value, on)
        self.memory[address.value[on] >> 2] = self._array(x)[on]

    def _all(self):
        return Word(np.ones(self.threads, bool))

    def store_shared(self, address, x):
        self.store_shared_if(self._all(), address, x)

    def store_shared_floats(self, address, xs):
        self._aligned(address.value, 16)
        for i, x in enumerate(xs):
            self.store_shared(address + 4 * i, self.bits(x))

    def store_shared_pair_if(self, predicate, address, x, y):
        self._aligned(address.value, 8, predicate.value)
        self.store_shared_if(predicate, address, x)
        self.store_shared_if(predicate, address + 4, y)

    def store_shared_short_if(self, predicate, address, x):
        on = self.mask & predicate.value  # neighbouring halves of a word may come from two warps
        self.memory.view(np.uint16)[address.value[on] >> 1] = x.value[on].astype(np.uint16)

    def load_shared_short_if(self, predicate, address):
        on = self.mask & predicate.value
        return Word(np.where(on, self.memory.view(np.uint16)[np.where(on, address.value, 0) >> 1], 0).astype(u32))

    def increment_shared_if(self, predicate, address):
        on = self.mask & predicate.value
        self._touch(self.counts, [self.reads, self.writes], address.value, on)
        np.add.at(self.memory, address.value[on] >> 2, u32(1))

    # -- global memory

    def global_address(self, base, index, item_bytes=4):
        return base + index.value.astype(np.int64) * item_bytes

    def choose_address(self, predicate, yes, no):
        return np.where(predicate.value, yes, no)

    def _global(self, address, on):
        numbers = np.unique(address[on] >> SEGMENT)
        assert numbers.size <= 1
        array, index = self.arrays[numbers[0] if numbers.size else 0], (address[on] & ((1 << SEGMENT) - 1)) >> 2
        assert index.size == 0 or index.max() < array.size, "outside an array"
        return array, index

    def _load_global_if(self, predicate, address):
        on, out = self.mask & predicate.value, np.full(self.threads, 0x7FFFFFFF, u32)
        array, index = self._global(address, on)
        out[on] = array[index]
        return Word(out)

    def load_global(self, address):
        return self._load_global_if(self._all(), address)

    def load_global_floats_if(self, predicate, address):
        self._aligned(address, 16, predicate.value)
        return [self.float_of(self._load_global_if(predicate, address + 4 * i)) for i in range(4)]

    def copy_to_shared_if(self, predicate, address, source):
        """Until it is awaited the target holds noise."""
        self._aligned(source, 16, predicate.value)
        self._aligned(address.value, 16, predicate.value)
        for i in range(4):
            x = self._load_global_if(predicate, source + 4 * i)
            self.store_shared_if(predicate, address + 4 * i, self.word(0x7E57ED00 + i))
            self.open_copies.append((self.mask & predicate.value, address + 4 * i, x))

    def close_copies(self):
        self.copies.append(self.open_copies)
        self.open_copies = []

    def await_copies(self, groups):
        while len(self.copies) > groups:
            for on, address, x in self.copies.pop(0):
                self.memory[address.value[on] >> 2] = x.value[on]

    def store_global_if(self, predicate, address, x):
        on = self.mask & predicate.value
        array, index = self._global(address, on)
        array[index] = x.value[on]

    # -- warps

    def _warps(self, x):
        return x.value.reshape(-1, 32)

    def ballot(self, predicate):
        lanes = self._warps(predicate).astype(np.uint64) << np.arange(32, dtype=np.uint64)
        return Word(np.repeat(lanes.sum(1).astype(u32), 32))

    def reduce_lanes(self, operation, x):
        values = {"add": np.sum, "max": np.max, "min": np.min}[operation](self._warps(x), axis=1)
        return Word(np.repeat(values.astype(u32), 32))

    def scan_lanes(self, x):
        return Word(np.cumsum(self._warps(x), 1, dtype=u32).reshape(-1))

    def from_lane(self, x, lane):
        return Word(np.repeat(self._warps(x)[:, lane], 32))

    def barrier(self, number, threads):
        assert self.mask.all() and threads == self.threads
        self.epoch += 1

    # -- pieces of predicated code

    def count_at_least(self, xs, threshold, start, unit):
        return start + Word(sum((x >= threshold).astype(u32) for x in xs)) * unit

    def append_at_least(self, xs, threshold, address, position):
        for i, x in enumerate(xs):
            fits = Word(x >= threshold)
            self.store_shared_pair_if(fits, address, self.bits(x), position + i)
            address = address + self.as_number(fits) * 8

    # -- control flow

    @contextlib.contextmanager
    def when(self, predicate):
        outer, self.mask = self.mask, self.mask & predicate.value
        yield
        self.mask = outer

    def branch(self, predicate, body):
        if self._uniform(predicate):
            body()

    def loop(self, count, carry, body):
        carry = list(carry)
        for i in range(int(self._uniform(count))):
            carry = list(body(self.word(i), carry))
        return carry

    def repeat(self, carry, body, extras):
        for _ in range(1000):
            carry, extra, more = body(list(carry))
            if not self._uniform(more):
                return [*carry, *extra]
        raise AssertionError("a loop that does not end")

    def otherwise_keep(self, predicate, values, body):
        return list(body() if self._uniform(predicate) else values)
