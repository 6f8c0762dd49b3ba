"""Runs a Mosaic GPU kernel that is written in `pallas_kernels.hopper.ptx` words alone, on NumPy.

All threads of a block take every step together, under a mask of those a branch or a loop has active. So barriers are
nothing, and what needs them is not found; indexing, arithmetic and the algorithm are checked. Shared memory starts as
garbage, and an access outside an array raises.
"""

from __future__ import annotations

import contextlib
import types

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.hopper import ptx

GARBAGE = 0x5A5A5A5A


def put_in_place(patch, words) -> None:
    """Puts `words` in the place of the functions of `ptx` with these names, in all its modules."""
    modules = [ptx, *(part for part in vars(ptx).values() if isinstance(part, types.ModuleType))]
    for name, word in words.items():
        for module in modules:
            if hasattr(module, name):
                patch.setattr(module, name, word)


def _wrapped(x) -> np.ndarray:
    return np.asarray(x, np.int64).astype(np.uint64).astype(np.uint32).view(np.int32).astype(np.int64)


def _unsigned(x) -> np.ndarray:
    return np.asarray(x, np.int64) & 0xFFFFFFFF


class Block:
    """The threads of one block, their shared memory and the arrays they reach."""

    def __init__(self, threads: int):
        self.threads = threads
        self.active = np.ones(threads, bool)
        self.memories: list[np.ndarray] = []
        self.cluster: list[Block] = [self]
        self.copies: list[list] = [[]]  # by group: what has been read and not been written yet

    def address(self, array: np.ndarray) -> np.ndarray:
        """Every array has 2**40 bytes of addresses of its own."""
        for i, known in enumerate(self.memories):
            if known is array:
                return self.spread(i << 40)
        self.memories.append(array)
        return self.spread(len(self.memories) - 1 << 40)

    def spread(self, x) -> np.ndarray:
        return np.broadcast_to(np.asarray(x, np.int64), (self.threads,))

    @contextlib.contextmanager
    def when(self, condition):
        before, self.active = self.active, self.active & self.spread(condition).astype(bool)
        yield
        self.active = before

    def loop(self, count, carry, body):
        carry = [x if np.asarray(x).dtype == np.float32 else self.spread(x) for x in carry]
        for i in range(int(self.spread(count)[self.active].max(initial=0))):
            with self.when(i < self.spread(count)):
                new = body(self.spread(i), list(carry))
                carry = [np.where(self.active, n, c) for n, c in zip(new, carry, strict=True)]
        return carry

    def _places(self, address, mask):
        address = self.spread(address)[mask]
        assert (address % 4 == 0).all()
        for memory in np.unique(address >> 40):
            chosen = address >> 40 == memory
            places = (address[chosen] & (1 << 40) - 1) // 4
            flat = self.memories[memory].reshape(-1)
            assert (places < flat.size).all(), "outside the array"
            yield flat, places, np.flatnonzero(mask)[chosen]

    def load(self, address):
        out = np.full(self.threads, GARBAGE, np.int64)
        for flat, places, threads in self._places(address, self.active):
            out[threads] = flat[places]
        return out

    def store(self, address, value, predicate=True):
        for flat, places, threads in self._places(address, self.active & self.spread(predicate).astype(bool)):
            flat[places] = self.spread(value)[threads]

    def or_shared(self, address, bits):
        out = np.full(self.threads, GARBAGE, np.int64)
        for flat, places, threads in self._places(address, self.active):
            for place, thread in zip(places, threads, strict=True):
                out[thread] = flat[place]
                flat[place] = _wrapped(flat[place] | self.spread(bits)[thread])
        return out

    def _by_warp(self, x):
        warps = self.active.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all(), "a whole warp takes part"
        return np.broadcast_to(x, (self.threads,)).reshape(-1, 32)

    def _floats(self, x):
        return np.broadcast_to(np.asarray(x, np.float32), (self.threads,))

    def load_words(self, address, count):
        assert (self.spread(address)[self.active] % (4 * count) == 0).all(), "not on a boundary of its size"
        return [self.load(address + 4 * i) for i in range(count)]

    def store_words(self, address, words):
        for i, word in enumerate(words):
            self.store(address + 4 * i, word)

    def store_bfloat16(self, address, x, predicate):
        address, halves = self.spread(address), self._floats(x).astype(ml_dtypes.bfloat16).view(np.int16)
        on = self.active & self.spread(predicate).astype(bool)
        for memory in np.unique(address[on] >> 40):
            chosen = on & (address >> 40 == memory)
            places = (address[chosen] & (1 << 40) - 1) // 2
            flat = self.memories[memory].reshape(-1).view(np.int16)
            assert (places < flat.size).all(), "outside the array"
            flat[places] = halves[chosen]

    def prefetch(self, address, size, predicate):
        on = self.active & self.spread(predicate).astype(bool)
        for at, count in zip(self.spread(address)[on], self.spread(size)[on], strict=True):
            memory = self.memories[at >> 40]
            assert at % 16 == 0 and count % 16 == 0 and count > 0, "not whole pieces of 16 bytes"
            assert (at & (1 << 40) - 1) + count <= memory.nbytes, "outside the array"

    def copy_async(self, target, source, size, pieces, target_step, source_step):
        for piece in range(pieces):
            with self.when(self.spread(size) == 16):
                words = self.load_words(source + piece * source_step, 4)
            words = [np.where(self.spread(size) == 16, word, 0) for word in words]
            self.copies[-1].append((self.active, target + piece * target_step, words))

    def copy_async_word(self, target, source, size):
        with self.when(self.spread(size) == 4):
            word = self.load(source)
        self.copies[-1].append((self.active, target, [np.where(self.spread(size) == 4, word, 0)]))

    def copies_done(self, pending=0):
        """What this thread copied is there from here on, and not before."""
        done, self.copies = self.copies[: len(self.copies) - 1 - pending], self.copies[len(self.copies) - 1 - pending :]
        for active, target, words in (copy for group in done for copy in group):
            with self.when(active):
                self.store_words(target, words)

    def load_peer(self, address):
        out = np.full(self.threads, GARBAGE, np.int64)
        for rank, peer in enumerate(self.cluster):
            with peer.when(self.active & ((self.spread(address) >> 50) - 1 == rank)):
                out = np.where(peer.active, peer.load(self.spread(address) & (1 << 50) - 1), out)
        return out

    def _swizzled_matrix(self, address, chunk, columns):
        """The float16 matrix [128, columns] of two chunks of lines of 128 bytes, as `ptx.multiply_codes` orders them."""
        flat = self.memories[address >> 40].reshape(-1).view(np.float16)
        assert address % 1024 == 0 and chunk % 1024 == 0
        matrix = np.empty((128, columns), np.float32)
        for half in range(2):
            first = ((address & (1 << 40) - 1) + half * chunk) // 2
            lines = flat[first : first + 64 * columns].reshape(columns, 8, 8)  # a column's pieces of 16 bytes
            lines = np.stack([line[np.arange(8) ^ i % 8] for i, line in enumerate(lines)])
            words = lines.reshape(columns, 8, 4, 2).transpose(0, 2, 1, 3)  # a column's numbers 16 q + 2 i + 0 and 1
            matrix[64 * half : 64 * half + 64] = words.reshape(columns, 64).T
        return matrix

    def prefetch_line(self, address, predicate):
        on = self.active & self.spread(predicate).astype(bool)
        for at in self.spread(address)[on]:
            assert (at & (1 << 40) - 1) < self.memories[at >> 40].nbytes, "outside the array"

    def reduce_warp(self, operation, x):
        function = {"max": np.max, "min": np.min, "or": np.bitwise_or.reduce}[operation]
        return _wrapped(np.repeat(function(_unsigned(self._by_warp(x)), axis=1), 32))

    def float_words(self) -> dict[str, object]:
        """What stands for the functions of `ptx` on float32 numbers, and what is loaded and stored in pieces."""

        def bits(x):
            return self._floats(x).view(np.int32).astype(np.int64)

        def number(word):
            return np.broadcast_to(_wrapped(word).astype(np.int32), (self.threads,)).view(np.float32)

        def pair(word):
            return number(_wrapped(np.left_shift(_unsigned(word), 16))), number(np.bitwise_and(word, -0x10000))

        def to_pair(low, high):
            halves = [self._floats(x).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int64) for x in (low, high)]
            return _wrapped(halves[0] | halves[1] << 16)

        def eight(words):
            return [x for word in words for x in pair(word)]

        def to_e4m3(xs):
            xs = [np.clip(self._floats(x), -448, 448).astype(ml_dtypes.float8_e4m3fn) for x in xs]
            return _wrapped(sum(x.view(np.uint8).astype(np.int64) << 8 * i for i, x in enumerate(xs)))

        def add(a, *others):
            for other in others:
                a = a + other
            return a

        def words_or_zeros(address, predicate, count):
            with self.when(self.spread(predicate) != 0):
                words = self.load_words(address, count)
            return [np.where(self.spread(predicate) != 0, word, 0) for word in words]

        def across(x, distance):
            return self._by_warp(x)[:, np.arange(32) ^ distance].reshape(-1)

        def dot(total, a, b):
            return total + sum(x * y for x, y in zip(eight(a), eight(b), strict=True))

        def float16_pair(low, high):
            halves = [self._floats(x).astype(np.float16).view(np.uint16).astype(np.int64) for x in (low, high)]
            return _wrapped(halves[0] | halves[1] << 16)

        def bytes_of(words, kind):
            words = np.stack([np.broadcast_to(_wrapped(word).astype(np.int32), (self.threads,)) for word in words], axis=1)
            return np.ascontiguousarray(words).view(kind).astype(np.float32)

        def products_of_codes(row, other_row, vector):
            """The vector is that of lanes 0 .. 3; others must have the same."""
            numbers = bytes_of(vector, np.float16)
            lanes = self._by_warp(np.arange(self.threads)).reshape(-1)
            first = numbers[lanes // 32 * 32 + lanes % 4]
            assert np.array_equal(first, numbers, equal_nan=True), "every row has the same vector"
            codes = (bytes_of(words, ml_dtypes.float8_e4m3fn) for words in (row, other_row))
            sums = [(c * numbers).sum(1, dtype=np.float32) for c in codes]
            for distance in (1, 2):
                sums = [x + across(x, distance) for x in sums]
            return sums

        def add_products(sums, row, other_row, column):
            def lines(words):  # of a warp's 8 rows or columns, 32 numbers each
                return bytes_of(words, ml_dtypes.bfloat16).reshape(-1, 8, 32)

            both = np.concatenate([lines(row), lines(other_row)], axis=1) @ lines(column).transpose(0, 2, 1)  # [warps, 16, 8]
            products = both.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(self.threads, 4)
            return [x + products[:, i] for i, x in enumerate(sums)]

        def multiply_codes(codes, b, chunk, columns):
            row, other_row = (
                np.concatenate([bytes_of(codes[i], ml_dtypes.float8_e4m3fn) for i in (start, start + 2)], axis=1)
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

        def float_or_zero(address, predicate):
            with self.when(self.spread(predicate) != 0):
                word = self.load(address)
            return number(np.where(self.spread(predicate) != 0, word, 0))

        return {
            "to_float16_pair": float16_pair,
            "products_of_codes": products_of_codes,
            "multiply_codes": multiply_codes,
            "add_products": add_products,
            "matrix": self.spread,
            "peer_address": lambda address, rank: address + (self.spread(rank) + 1 << 50),
            "load_peer_float": lambda address: number(self.load_peer(address)),
            "load_float_or_zero": float_or_zero,
            "load_shared_floats": lambda address: [number(word) for word in self.load_words(address, 2)],
            "times_plus": lambda a, b, c: a * b + c,
            "prefetch_line": self.prefetch_line,
            "number": lambda value: self._floats(value),
            "plus": add,
            "minus": lambda a, b: a - b,
            "times": np.multiply,
            "divide_as_xla": lambda a, b: a / b,
            "divide_floats": lambda a, b: a / b,
            "maximum_floats": np.maximum,
            "rsqrt": lambda x: 1 / np.sqrt(x),
            "exp2": np.exp2,
            "bits_of": bits,
            "float_of": number,
            "rounded": lambda x: self._floats(x).astype(ml_dtypes.bfloat16).astype(np.float32),
            "from_bfloat16_pair": pair,
            "to_bfloat16_pair": to_pair,
            "to_e4m3_word": to_e4m3,
            "add_dot": dot,
            "add_multiples": lambda totals, words, factor: [t + factor * x for t, x in zip(totals, eight(words), strict=True)],
            "lane_distant": across,
            "reduce_warp": self.reduce_warp,
            "both": np.logical_and,
            "load_words": lambda address: self.load_words(address, 4),
            "load_words_or_zeros": words_or_zeros,
            "load_fresh": self.load,
            "load_fresh_pair": lambda address: self.load_words(address, 2),
            "load_fresh_words": lambda address: self.load_words(address, 4),
            "load_shared_words": lambda address: self.load_words(address, 4),
            "store_shared_words": self.store_words,
            "prefetch": self.prefetch,
            "store_global_bfloat16": self.store_bfloat16,
        }

    def words(self) -> dict[str, object]:
        """What stands for the functions of `ptx`."""
        compare = {"eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater}
        compare["sge"] = np.greater_equal
        compare["ult"] = lambda a, b: _unsigned(a) < _unsigned(b)
        return self.float_words() | {
            "constant": self.spread,
            "add": lambda a, *others: _wrapped(a + sum(others)) if (np.abs(a) < 1 << 40).all() else a + sum(others),
            "sub": lambda a, b: _wrapped(np.subtract(a, b)),
            "mul": lambda a, b: _wrapped(a * b),
            "div": lambda a, b: _unsigned(a) // _unsigned(b),
            "rem": lambda a, b: _unsigned(a) % _unsigned(b),
            "minimum": np.minimum,
            "maximum": np.maximum,
            "shift_left": lambda a, bits: _wrapped(np.left_shift(_unsigned(a), bits)),
            "shift_right": lambda a, bits: _wrapped(np.right_shift(_unsigned(a), bits)),
            "bit_and": np.bitwise_and,
            "bit_or": np.bitwise_or,
            "bit_xor": np.bitwise_xor,
            "compare": lambda relation, a, b: compare[relation](a, b),
            "select": np.where,
            "offset": lambda base, index, scale: base + self._counted(index) * scale,
            "shared_address": self.address,
            "global_address": self.address,
            "scalar": self.spread,
            "thread": lambda: np.arange(self.threads),
            "when": self.when,
            "loop": self.loop,
            "block_barrier": lambda: None,
            "cluster_barrier": lambda: None,
            "cluster_exit": lambda: None,
            "proxy_fence": lambda: None,
            "copy_async": self.copy_async,
            "copy_async_word": self.copy_async_word,
            "copies_commit": lambda: self.copies.append([]),
            "copies_done": self.copies_done,
            "load_global": self.load,
            "store_global": self.store,
            "load_shared": self.load,
            "store_shared": self.store,
            "store_shared_zeros": lambda address: [self.store(address + 4 * i, 0) for i in range(4)],
            "or_shared": self.or_shared,
            "population": lambda bits: np.bitwise_count(_unsigned(bits).astype(np.uint32)).astype(np.int64),
            "lowest_bit": lambda bits: np.log2(np.maximum(_unsigned(bits & -bits), 1)).astype(np.int64),
            "sum_of_warp": lambda x: np.repeat(self._by_warp(x).sum(1), 32),
            "sum_of_lanes_below": lambda x: (np.cumsum(self._by_warp(x), 1) - self._by_warp(x)).reshape(-1),
        }

    def _counted(self, index):
        assert (self.spread(index)[self.active] >= 0).all(), "an index of an address is not negative"
        return index


def run(monkeypatch, module, function, *arguments):
    """`function(*arguments)` of a kernel module whose kernels' bodies are single inline functions."""

    def kernel(body, *, out_type, scratch_types, grid, num_threads, **_):
        def call(*operands):
            outs = [np.full(out.shape, GARBAGE, np.int32) for out in out_type]
            for i in range(*grid):
                block = Block(128 * num_threads)
                scratch = [np.full(s.shape, GARBAGE, np.int32) for s in scratch_types]
                with monkeypatch.context() as patch:
                    put_in_place(patch, block.words())
                    patch.setattr(jax.lax, "axis_index", lambda _, i=i: i)
                    body(*map(np.asarray, operands), *outs, *scratch)
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

    def as_block(block, action):
        # What lanes without work compute from garbage may overflow.
        with monkeypatch.context() as patch, np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            put_in_place(patch, block.words())
            return action()

    for number in range(blocks):
        block = Block(threads)
        shared = np.full(-(-shared_bytes // 4), GARBAGE, np.int32)

        def start(block=block, number=number, shared=shared):
            addresses = {name: block.address(array) for name, array in arrays.items()}
            return stages(addresses, block.spread(number), block.address(shared))

        grid.append((block, as_block(block, start)))
    for number, (block, _) in enumerate(grid):
        first = number // cluster * cluster
        block.cluster = [peer for peer, _ in grid[first : first + cluster]]
    for i in range(len(grid[0][1])):
        # Every block before this stage has ended the one before it; `begin` may run while others have not.
        for block, stages_of_block in grid:
            as_block(block, stages_of_block[i].begin)
            for prefetch in stages_of_block[i].prefetches:
                as_block(block, prefetch)
        for block, stages_of_block in grid:
            as_block(block, stages_of_block[i].run)
