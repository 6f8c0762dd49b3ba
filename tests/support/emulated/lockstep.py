"""Runs a Mosaic GPU kernel that is written in `ptx` words alone with all threads of a block in lockstep.

Threads take every step together, under a mask of those that a branch or a loop has active. Indexing, arithmetic and the
algorithm are checked; shared memory starts as garbage, what a copy will overwrite is garbage until it is waited for, and an
access outside an array raises. Where a block is told to (`races`), every access to a word of shared memory that another
warp wrote, and every write to one that another warp read, since the last barrier counts as a race. Fences and timing are
outside its reach.
"""

from __future__ import annotations

import contextlib
import types

import jax
import ml_dtypes
import numpy as np

from tests.support.emulated.registers import (
    PURE,
    arrays,
    bits,
    number,
    of_registers,
    put_in_place,
    registers,
    unsigned,
    words32,
    wrapped,
)

GARBAGE = 0x5A5A5A5A
SEGMENT = 40  # bits of an address below the number of its array


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


class Block:
    """The threads of one block, their shared memory and the arrays they reach.

    The methods that are named as functions of `ptx` stand for these; they take and return arrays.
    """

    def __init__(self, threads: int):
        self.threads, self.ids = threads, np.arange(threads)
        self.active = np.ones(threads, bool)
        self.memories: list[np.ndarray] = []
        self.cluster: list[Block] = [self]
        self.copies: list[list] = [[]]  # by group: what has been read and not been written yet
        self.epoch, self.races, self.tracked = 1, 0, -1
        self.accesses: dict[str, _Accesses] = {}

    def address(self, array: np.ndarray) -> np.ndarray:
        """Every array has 2**40 bytes of addresses of its own."""
        for i, known in enumerate(self.memories):
            if known is array:
                return self.spread((i + 1) << SEGMENT)
        self.memories.append(array)
        return self.spread(len(self.memories) << SEGMENT)

    def count_races(self, array: np.ndarray) -> None:
        """Counts races in this shared memory."""
        self.address(array)
        self.tracked = next(i for i, known in enumerate(self.memories) if known is array)
        self.accesses = {kind: _Accesses(array.size) for kind in ("reads", "writes", "counts")}

    def spread(self, x) -> np.ndarray:
        x = np.asarray(arrays(x))
        return np.broadcast_to(x.astype(np.int64) if x.dtype.kind in "iu" else x, (self.threads,))

    def _floats(self, x):
        return np.broadcast_to(np.asarray(x, np.float32), (self.threads,))

    def _on(self, predicate) -> np.ndarray:
        return self.active if predicate is None else self.active & self.spread(predicate).astype(bool)

    def _uniform(self, x):
        values = self.spread(x)[self.active]
        assert (values == values[0]).all(), "control flow depends on the thread"
        return values[0]

    # -- control flow: what is called inside takes and returns registers

    @contextlib.contextmanager
    def when(self, condition):
        before, self.active = self.active, self._on(condition)
        yield
        self.active = before

    def branch(self, condition, body):
        if self._uniform(condition):
            body()

    def choose(self, condition, body, otherwise):
        return list(body() if self._uniform(condition) else otherwise)

    def loop(self, count, carry, body):
        carry, count = [registers(self.spread(x)) for x in carry], self.spread(count)
        for i in range(int(count[self.active].max(initial=0))):
            with self.when(i < count):
                new = body(registers(self.spread(i)), list(carry))
                carry = [registers(np.where(self.active, arrays(n), arrays(c))) for n, c in zip(new, carry, strict=True)]
        return carry

    def repeat(self, carry, body, extras):
        for _ in range(1000):
            carry, extra, more = body(list(carry))
            assert len(extra) == extras
            if not self._uniform(more):
                return [*carry, *extra]
        raise AssertionError("a loop that does not end")

    # -- memory

    def _touch(self, kind: str, places, threads) -> None:
        others = {"reads": ("writes", "counts"), "writes": ("writes", "reads", "counts"), "counts": ("reads", "writes")}
        warps = self.ids[threads] >> 5
        self.races += any(self.accesses[other].by_others(places, warps, self.epoch).any() for other in others[kind])
        clash = self.accesses[kind].note(places, warps, self.epoch)
        self.races += clash and kind == "writes"

    def _places(self, address, on, kind: str, size: int = 4):
        address = self.spread(address)[on]
        assert (address % size == 0).all(), "not on a boundary of its size"
        for memory in np.unique(address >> SEGMENT):
            chosen = address >> SEGMENT == memory
            places = (address[chosen] & (1 << SEGMENT) - 1) // size
            flat = self.memories[memory - 1].reshape(-1).view({4: np.int32, 2: np.int16}[size])
            assert (places < flat.size).all(), "outside the array"
            threads = np.flatnonzero(on)[chosen]
            if memory - 1 == self.tracked and size == 4:
                self._touch(kind, places, threads)
            yield flat, places, threads

    def load(self, address, predicate=None, size=4, absent=GARBAGE):
        out = np.full(self.threads, absent, np.int64)
        for flat, places, threads in self._places(address, self._on(predicate), "reads", size):
            out[threads] = flat[places].view(np.uint16) if size == 2 else flat[places]
        return out

    def store(self, address, value, predicate=None, size=4):
        for flat, places, threads in self._places(address, self._on(predicate), "writes", size):
            flat[places] = wrapped(self.spread(value))[threads].astype(flat.dtype)

    def load_words(self, address, count):
        assert (self.spread(address)[self.active] % (4 * count) == 0).all(), "not on a boundary of its size"
        return [self.load(address + 4 * i) for i in range(count)]

    def store_words(self, address, words, predicate=None):
        assert (self.spread(address)[self._on(predicate)] % (4 * len(words)) == 0).all(), "not on a boundary of its size"
        for i, word in enumerate(words):
            self.store(address + 4 * i, word, predicate)

    def load_shared_short(self, address, predicate):
        return self.load(address, predicate, size=2, absent=0)

    def store_shared_short(self, address, value, predicate):
        self.store(address, value, predicate, size=2)

    def increment_shared(self, address, predicate):
        for flat, places, _ in self._places(address, self._on(predicate), "counts"):
            np.add.at(flat, places, 1)

    def or_shared(self, address, bits):
        out = np.full(self.threads, GARBAGE, np.int64)
        for flat, places, threads in self._places(address, self.active, "counts"):
            for place, thread in zip(places, threads, strict=True):
                out[thread] = flat[place]
                flat[place] = wrapped(flat[place] | self.spread(bits)[thread])
        return out

    def append_at_least(self, xs, threshold, address, position):
        for i, x in enumerate(xs):
            fits = np.asarray(x >= threshold)
            self.store_words(address, (bits(x), position + i), fits)
            address = address + 8 * fits

    def load_global_words_or_zeros(self, address, predicate, count):
        with self.when(self.spread(predicate) != 0):
            words = self.load_words(address, count)
        return [np.where(self.spread(predicate) != 0, word, 0) for word in words]

    def load_global_float_or_zero(self, address, predicate):
        return number(np.where(self.spread(predicate) != 0, self.load(address, self.spread(predicate) != 0), 0))

    def load_global_floats_or_nan(self, address, predicate):
        with self.when(predicate):
            words = self.load_words(address, 4)
        return [number(np.where(self._on(predicate), word, 0x7FFFFFFF)) for word in words]

    def store_global_bfloat16(self, address, x, predicate):
        self.store(address, self._floats(x).astype(ml_dtypes.bfloat16).view(np.int16).astype(np.int64), predicate, size=2)

    def load_peer(self, address):
        out = np.full(self.threads, GARBAGE, np.int64)
        for rank, peer in enumerate(self.cluster):
            with peer.when(self.active & ((self.spread(address) >> 50) - 1 == rank)):
                out = np.where(peer.active, peer.load(self.spread(address) & (1 << 50) - 1), out)
        return out

    def prefetch(self, address, size, predicate):
        on = self._on(predicate)
        for at, count in zip(self.spread(address)[on], self.spread(size)[on], strict=True):
            memory = self.memories[(at >> SEGMENT) - 1]
            assert at % 16 == 0 and count % 16 == 0 and count > 0, "not whole pieces of 16 bytes"
            assert (at & (1 << SEGMENT) - 1) + count <= memory.nbytes, "outside the array"

    def prefetch_line(self, address, predicate):
        for at in self.spread(address)[self._on(predicate)]:
            assert (at & (1 << SEGMENT) - 1) < self.memories[(at >> SEGMENT) - 1].nbytes, "outside the array"

    # -- copies

    def _begin_copy(self, target, words, on):
        with self.when(on):
            self.store_words(target, [GARBAGE] * 4)
        self.copies[-1].append((on, target, words))

    def copy_async(self, target, source, size, pieces, target_step, source_step):
        real = self.spread(size) == 16
        for piece in range(pieces):
            with self.when(real):
                words = self.load_words(source + piece * source_step, 4)
            self._begin_copy(target + piece * target_step, [np.where(real, word, 0) for word in words], self.active)

    def copy_async_where(self, target, source, predicate):
        on = self._on(predicate)
        with self.when(on):
            words = self.load_words(source, 4)
        self._begin_copy(target, words, on)

    def copy_async_word(self, target, source, size):
        real = self.spread(size) == 4
        with self.when(real):
            word = self.load(source)
        self.store(target, GARBAGE)
        self.copies[-1].append((self.active, target, [np.where(real, word, 0)]))

    def copies_commit(self):
        self.copies.append([])

    def copies_done(self, pending=None):
        """What this thread copied is there from here on, and not before."""
        if pending is None:
            self.copies_commit()
            pending = 0
        done, self.copies = self.copies[: len(self.copies) - 1 - pending], self.copies[len(self.copies) - 1 - pending :]
        for on, target, words in (copy for group in done for copy in group):
            for i, word in enumerate(words):
                for flat, places, threads in self._places(target + 4 * i, on, "reads"):
                    flat[places] = word[threads]

    # -- barriers

    def block_barrier(self):
        self.epoch += 1

    def barrier_aligned(self, identity, threads):
        assert self.active.all() and threads == self.threads
        self.epoch += 1

    # -- warps

    def _by_warp(self, x):
        warps = self.active.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all(), "a whole warp takes part"
        return np.broadcast_to(x, (self.threads,)).reshape(-1, 32)

    def lane_distant(self, x, distance):
        return self._by_warp(x)[:, np.arange(32) ^ distance].reshape(-1)

    def alike_in_warp(self, x):
        lanes = self._by_warp(x)
        return wrapped(((lanes[:, :, None] == lanes[:, None]) << np.arange(32)).sum(2).reshape(-1))

    def reduce_warp(self, operation, x):
        function = {"add": np.sum, "max": np.max, "min": np.min, "or": np.bitwise_or.reduce}[operation]
        return wrapped(np.repeat(function(unsigned(self._by_warp(x)), axis=1), 32))

    def sum_of_lanes_up_to(self, x):
        return wrapped(np.cumsum(unsigned(self._by_warp(x)), 1).reshape(-1))

    def sum_of_lanes_below(self, x):
        return wrapped(self.sum_of_lanes_up_to(x) - self.spread(x))

    def from_lane(self, x, lane):
        return np.repeat(self._by_warp(x)[:, lane], 32)

    def ballot(self, predicate):
        lanes = self._by_warp(predicate).astype(np.int64) << np.arange(32)
        return wrapped(np.repeat(lanes.sum(1), 32))

    # -- products

    def _bytes_of(self, words, kind):
        words = np.stack([np.broadcast_to(words32(word), (self.threads,)) for word in words], axis=1)
        return np.ascontiguousarray(words).view(kind).astype(np.float32)

    def products_of_codes(self, row, other_row, vector):
        """The vector is that of lanes 0 .. 3; others must have the same."""
        numbers = self._bytes_of(vector, np.float16)
        lanes = self._by_warp(np.arange(self.threads)).reshape(-1)
        first = numbers[lanes // 32 * 32 + lanes % 4]
        assert np.array_equal(first, numbers, equal_nan=True), "every row has the same vector"
        codes = (self._bytes_of(words, ml_dtypes.float8_e4m3fn) for words in (row, other_row))
        sums = [(c * numbers).sum(1, dtype=np.float32) for c in codes]
        for distance in (1, 2):
            sums = [x + self.lane_distant(x, distance) for x in sums]
        return sums

    def add_products(self, sums, row, other_row, column):
        def lines(words):  # of a warp's 8 rows or columns, 32 numbers each
            return self._bytes_of(words, ml_dtypes.bfloat16).reshape(-1, 8, 32)

        products = np.concatenate([lines(row), lines(other_row)], axis=1) @ lines(column).transpose(0, 2, 1)  # [warps, 16, 8]
        products = products.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(self.threads, 4)
        return [x + products[:, i] for i, x in enumerate(sums)]

    def _swizzled_matrix(self, address, chunk, columns):
        """The float16 matrix [128, columns] of two chunks of lines of 128 bytes, as `ptx.multiply_codes` orders them."""
        flat = self.memories[(address >> SEGMENT) - 1].reshape(-1).view(np.float16)
        assert address % 1024 == 0 and chunk % 1024 == 0
        matrix = np.empty((128, columns), np.float32)
        for half in range(2):
            first = ((address & (1 << SEGMENT) - 1) + half * chunk) // 2
            lines = flat[first : first + 64 * columns].reshape(columns, 8, 8)  # a column's pieces of 16 bytes
            lines = np.stack([line[np.arange(8) ^ i % 8] for i, line in enumerate(lines)])
            words = lines.reshape(columns, 8, 4, 2).transpose(0, 2, 1, 3)  # a column's numbers 16 q + 2 i + 0 and 1
            matrix[64 * half : 64 * half + 64] = words.reshape(columns, 64).T
        return matrix

    def multiply_codes(self, codes, b, chunk, columns):
        row, other_row = (
            np.concatenate([self._bytes_of(codes[i], ml_dtypes.float8_e4m3fn) for i in (start, start + 2)], axis=1)
            for start in (0, 1)
        )
        sums = np.zeros((self.threads, columns // 2), np.float32)
        for first in range(0, self.threads, 128):
            group = slice(first, first + 128)
            matrix = self._swizzled_matrix(self.spread(b)[first], chunk, columns)
            for other, of_lane in enumerate((row, other_row)):
                # Of the 32 codes of lane 4 r + q, the first 16 begin at 16 q, the others at 64 + 16 q.
                lines = of_lane[group].reshape(32, 4, 2, 16).transpose(0, 2, 1, 3).reshape(32, 128)
                products = np.repeat(lines @ matrix, 4, axis=0).reshape(128, columns // 8, 4, 2)
                mine = products[np.arange(128), :, np.arange(128) % 4]
                sums[group].reshape(128, columns // 8, 2, 2)[:, :, other] = mine
        return list(sums.T)

    # -- the vocabulary

    def _counted(self, index):
        assert (self.spread(index)[self.active] >= 0).all(), "an index of an address is not negative"
        return index

    def words(self) -> dict[str, object]:
        """What stands for the functions of `ptx`."""
        own = (
            "load_shared_short", "store_shared_short", "increment_shared", "or_shared", "append_at_least",
            "load_global_words_or_zeros", "load_global_floats_or_nan", "load_global_float_or_zero", "store_global_bfloat16",
            "prefetch", "prefetch_line", "copy_async_word",
            "copy_async", "copy_async_where", "copies_commit", "copies_done", "block_barrier", "barrier_aligned",
            "lane_distant", "alike_in_warp", "reduce_warp", "sum_of_lanes_up_to", "sum_of_lanes_below", "from_lane", "ballot",
            "products_of_codes", "add_products", "multiply_codes",
        )  # fmt: skip
        named = {
            "constant": self.spread,
            "number": self._floats,
            "scalar": self.spread,
            "thread": lambda: self.ids,
            "shared_address": self.address,
            "global_address": self.address,
            "offset": lambda base, index, scale: base + self._counted(index) * scale,
            "peer_address": lambda address, rank: address + (self.spread(rank) + 1 << 50),
            "load_peer_float": lambda address: number(self.load_peer(address)),
            "load_shared_float": lambda address: number(self.load(address)),
            "load_global_float": lambda address: number(self.load(address)),
            "load_shared_floats": lambda address, count=2: [number(word) for word in self.load_words(address, count)],
            "store_shared_floats": lambda address, floats: self.store_words(address, list(map(bits, floats))),
            "store_shared_zeros": lambda address: self.store_words(address, [0] * 4),
            "sum_of_warp": lambda x: self.reduce_warp("add", x),
            "cluster_barrier": lambda: None,
            "cluster_exit": lambda: None,
        }
        for name in ("load_global", "load_shared", "load_fresh"):
            named[name] = lambda address: self.load(address)
        for name in ("load_global_words", "load_shared_words", "load_fresh_words"):
            named[name] = lambda address: self.load_words(address, 4)
        for name in ("load_shared_pair", "load_fresh_pair"):
            named[name] = lambda address: self.load_words(address, 2)
        for name in ("store_global", "store_shared"):
            named[name] = self.store
        for name in ("store_shared_words", "store_shared_pair", "store_global_words"):
            named[name] = self.store_words
        functions = PURE | named | {name: getattr(self, name) for name in own}
        control = {name: getattr(self, name) for name in ("when", "branch", "choose", "loop", "repeat")}
        return {name: of_registers(function) for name, function in functions.items()} | control


def take_turn(monkeypatch, block: Block, action):
    """action() with the block's words in the place of `ptx`. What lanes without work compute from garbage may overflow."""
    with monkeypatch.context() as patch, np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        put_in_place(patch, block.words())
        return action()


def run(monkeypatch, module, function, *arguments):
    """`function(*arguments)` of a kernel module whose kernels' bodies are single inline functions."""

    def kernel(body, *, out_type, scratch_types, grid, num_threads, **_):
        def call(*operands):
            outs = [np.full(out.shape, GARBAGE, np.int32) for out in out_type]
            for i in range(*grid):
                scratch = [np.full(s.shape, GARBAGE, np.int32) for s in scratch_types]
                with monkeypatch.context() as patch:
                    patch.setattr(jax.lax, "axis_index", lambda _, i=i: i)
                    inputs = [*map(np.asarray, operands), *outs, *scratch]
                    take_turn(patch, Block(128 * num_threads), lambda inputs=inputs: body(*inputs))
            return outs

        return call

    fake = types.SimpleNamespace(
        kernel=kernel,
        inline_mgpu=lambda arg_types: lambda f: lambda *refs: f(None, *refs),
        CompilerParams=lambda **_: None,
        SMEM=lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype),
        RefType=lambda: None,
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, "plgpu", fake)
        return function(*arguments)


def run_grid(
    monkeypatch, arrays: dict[str, np.ndarray], blocks: int, threads: int, shared_bytes: int, stages, cluster: int = 1
) -> None:
    """Runs the stages of a grid of thread blocks with a grid barrier between any two stages.

    stages(addresses by name, number of the block, address of its shared memory) returns one block's stages, each with
    `begin`, `prefetches` and `run`. `arrays` are of 32-bit words; the kernel's writes go to them. Every `cluster` blocks that
    follow one another read each other's shared memory.
    """
    grid = []
    for rank in range(blocks):
        block = Block(threads)
        shared = np.full(-(-shared_bytes // 4), GARBAGE, np.int32)

        def start(block=block, rank=rank, shared=shared):
            addresses = {name: registers(block.address(array)) for name, array in arrays.items()}
            return stages(addresses, registers(block.spread(rank)), registers(block.address(shared)))

        grid.append((block, take_turn(monkeypatch, block, start)))
    for rank, (block, _) in enumerate(grid):
        first = rank // cluster * cluster
        block.cluster = [peer for peer, _ in grid[first : first + cluster]]
    for i in range(len(grid[0][1])):
        # Every block before this stage has ended the one before it; `begin` may run while others have not.
        for block, stages_of_block in grid:
            take_turn(monkeypatch, block, stages_of_block[i].begin)
            for prefetch in stages_of_block[i].prefetches:
                take_turn(monkeypatch, block, prefetch)
        for block, stages_of_block in grid:
            take_turn(monkeypatch, block, stages_of_block[i].run)
