"""Runs a Mosaic GPU kernel whose warpgroups do different things, written in `ptx` words, on NumPy.

The threads of a warpgroup take every step together; the warpgroups take turns at random, and change only where they wait
or arrive. Copies land and products of matrices are made as late or as early as chance has it: what a copy will overwrite is
noise from the moment it is issued, so is a sum that nobody has waited for. So wrong parities, missing barriers and places
that are reused too soon show as a deadlock or as noise in the result. Races between the warps of a warpgroup and missing
fences are outside its reach. Matrices are read as wgmma reads them: strides and swizzle are checked. The blocks of a cluster
run side by side and reach one another's shared memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import threading
import types
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.emulated.registers import PURE, arrays, floats, of_registers, put_in_place, registers, words32

SEGMENT = 40  # bits of an address below the number of its array; the first ones are the blocks' shared memories
Name = tuple[int, int]  # of a warpgroup: the rank of its block in the cluster, and its number there


@dataclasses.dataclass
class Barrier:
    expected: int
    arrived: int = 0
    completed: int = 0

    def arrive(self, count: int) -> None:
        self.arrived += count
        assert self.arrived <= self.expected, "more arrivals than the barrier expects"
        if self.arrived == self.expected:
            self.arrived, self.completed = 0, self.completed + 1


class Deadlock(AssertionError):
    pass


class Chip:
    """One block, or those of a cluster: shared memory, the arrays they reach, their barriers, and what is under way."""

    def __init__(self, shared_bytes: int, arrays: list[np.ndarray], blocks: int, warpgroups: int, seed: int):
        self.rng, self.blocks = np.random.default_rng(seed), blocks
        shared = [np.full(shared_bytes, 0xFF, np.uint8) for _ in range(blocks)]  # NaN in either float
        self.memories = [*shared, *(array.reshape(-1).view(np.uint8) for array in arrays)]
        self.barriers: dict[int, Barrier] = {}
        self.landing: list[tuple[Name, Callable[[], None]]] = []  # (warpgroup, what happens when its copies land)
        self.turn = threading.Condition()
        self.whose: Name | None = None
        self.waiting: dict[Name, Callable[[], bool] | None] = {
            (rank, number): None for rank in range(blocks) for number in range(warpgroups)
        }
        self.failure: BaseException | None = None
        self.met: collections.Counter[Hashable] = collections.Counter()

    def barrier(self, address: np.ndarray) -> Barrier:
        (one,) = np.unique(address)
        return self.barriers[int(one)]

    # -- turns

    def _pick(self) -> None:
        """Who goes on, after any number of copies have landed."""
        while True:
            while self.landing and self.rng.random() < 0.5:
                self.landing.pop(self.rng.integers(len(self.landing)))[1]()
            able = [w for w, condition in self.waiting.items() if condition is None or condition()]
            if able:
                self.whose = able[self.rng.integers(len(able))]
                return
            if not self.landing:
                self.whose = None
                if self.waiting:
                    self.failure = self.failure or Deadlock(f"warpgroups {sorted(self.waiting)} wait for ever")
                return
            self.landing.pop(self.rng.integers(len(self.landing)))[1]()

    def wait(self, warpgroup: Name, condition: Callable[[], bool] | None) -> None:
        with self.turn:
            self.waiting[warpgroup] = condition
            self._pick()
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.whose == warpgroup or self.failure is not None)
            if self.failure is not None:
                raise Deadlock("stopped")
            self.waiting[warpgroup] = None

    def meet(self, warpgroup: Name, where: Hashable, count: int) -> None:
        """Waits until `count` warpgroups have come to the same place, time and again."""
        self.met[where] += 1
        goal = -(-self.met[where] // count) * count
        self.wait(warpgroup, lambda: self.met[where] >= goal)

    def leave(self, warpgroup: Name, failure: BaseException | None) -> None:
        with self.turn:
            if failure is not None and self.failure is None:
                self.failure = failure
            del self.waiting[warpgroup]
            rank = warpgroup[0]
            if all(other != rank for other, _ in self.waiting):
                self.memories[rank][:] = 0xFF  # is no longer the block's
            self._pick()
            self.turn.notify_all()


class Warpgroup:
    """128 threads. The names of `ptx` as methods."""

    def __init__(self, chip: Chip, rank: int, number: int):
        self.chip, self.rank, self.name = chip, rank, (rank, number)
        self.threads = 128 * number + np.arange(128)
        self.active = np.ones(128, bool)
        self.copies: list[Callable[[], None]] = []  # not yet on their way
        self.group: list[list[bool]] = []  # whether they have landed, of those on their way since the last commit
        self.groups: list[list[list[bool]]] = []
        self.under_way: list[list[Callable[[], None]]] = [[]]  # groups of products

    def spread(self, x):
        return np.broadcast_to(np.asarray(arrays(x)), (128,))

    def uniform(self, x) -> int:
        assert self.active.all(), "not all threads take part"
        (one,) = np.unique(self.spread(x))
        return one

    # -- memory

    def shared_address(self, place):
        return np.full(128, (self.rank << SEGMENT) + place, np.int64)

    def peer_address(self, address, rank):
        assert (address >> SEGMENT == self.rank).all() and rank < self.chip.blocks
        return address + (rank - self.rank << SEGMENT)

    def load_global_words_or_zeros(self, address, predicate, count):
        with self.when(self.spread(predicate) != 0):
            return self.load(address, np.int32, count)

    def _places(self, address, size, mask):
        address = self.spread(address)[mask]
        assert (address % size == 0).all(), "not aligned"
        for number in np.unique(address >> SEGMENT):
            chosen = address >> SEGMENT == number
            memory = self.chip.memories[number]
            places = address[chosen] & (1 << SEGMENT) - 1
            assert (places >= 0).all() and (places + size <= memory.size).all(), "outside the array"
            yield memory, places[:, None] + np.arange(size), np.flatnonzero(mask)[chosen]

    def load(self, address, dtype, count=1):
        size = np.dtype(dtype).itemsize
        out = np.zeros((128, count * size), np.uint8)
        for memory, places, threads in self._places(address, count * size, self.active):
            out[threads] = memory[places]
        words = out.view(dtype)
        return [words[:, i].astype(np.int64) if dtype == np.int32 else words[:, i] for i in range(count)]

    def store(self, address, values, dtype, predicate=True):
        words = np.stack([self.spread(x).astype(dtype) for x in values], 1).view(np.uint8)
        for memory, places, threads in self._places(address, words.shape[1], self.active & self.spread(predicate)):
            memory[places] = words[threads]

    def copy_async(self, target, source, size, pieces, target_step, source_step):
        on, size = self.active.copy(), self.spread(size)
        assert np.isin(size[on], (0, 16)).all()
        for piece in range(pieces):
            to, of = self.spread(target + piece * target_step), self.spread(source + piece * source_step)
            list(self._places(of, 16, on))  # inside also where it is not read
            for memory, places, _ in self._places(to, 16, on):
                memory[places] = 0xFF

            def land(to=to, of=of):
                data = np.zeros((128, 16), np.uint8)
                for memory, places, threads in self._places(of, 16, on & (size == 16)):
                    data[threads] = memory[places]
                for memory, places, threads in self._places(to, 16, on):
                    memory[places] = data[threads]

            self.copies.append(land)

    def copy_async_word(self, target, source, size):
        on, size = self.active.copy(), self.spread(size)
        assert np.isin(size[on], (0, 4)).all()
        to, of = self.spread(target), self.spread(source)
        list(self._places(of, 4, on))
        for memory, places, _ in self._places(to, 4, on):
            memory[places] = 0xFF

        def land():
            data = np.zeros((128, 4), np.uint8)
            for memory, places, threads in self._places(of, 4, on & (size == 4)):
                data[threads] = memory[places]
            for memory, places, threads in self._places(to, 4, on):
                memory[places] = data[threads]

        self.copies.append(land)

    def prefetch(self, address, size, predicate):
        on = self.active & self.spread(predicate)
        for at, count in zip(self.spread(address)[on], self.spread(size)[on], strict=True):
            memory = self.chip.memories[at >> SEGMENT]
            assert at % 16 == 0 and count % 16 == 0 and count > 0, "not whole pieces of 16 bytes"
            assert (at & (1 << SEGMENT) - 1) + count <= memory.size, "outside the array"

    def _copies_so_far(self, then: Callable[[], None]):
        copies, self.copies = self.copies, []
        landed = [False]
        self.group.append(landed)

        def land():
            for copy in copies:
                copy()
            landed[0] = True
            then()

        self.chip.landing.append((self.name, land))

    def barrier_arrive_after_copies(self, address):
        barrier = self.chip.barrier(address)
        self._copies_so_far(lambda: barrier.arrive(128))

    def copies_commit(self):
        self._copies_so_far(lambda: None)
        self.groups.append(self.group)
        self.group = []

    def copies_done(self, pending=None):
        if pending is None:
            self.copies_commit()
            pending = 0
        waited_for, self.groups = self.groups[: len(self.groups) - pending], self.groups[len(self.groups) - pending :]
        self.chip.wait(self.name, lambda: all(landed for group in waited_for for (landed,) in group))

    # -- barriers

    def barrier_init(self, address, arrivals):
        for one in address[self.active]:
            self.chip.barriers[int(one)] = Barrier(arrivals)

    def barrier_arrive(self, address, predicate=True):
        self.chip.barrier(address).arrive(int((self.active & predicate).sum()))
        self.chip.wait(self.name, None)

    def barrier_wait(self, address, parity):
        barrier, parity = self.chip.barrier(address), self.uniform(parity)
        assert parity in (0, 1)
        self.chip.wait(self.name, lambda: barrier.completed & 1 != parity)

    def block_barrier(self):
        self.chip.meet(self.name, self.rank, sum(rank == self.rank for rank, _ in self.chip.waiting))

    def cluster_barrier(self):
        self.chip.meet(self.name, "cluster", len(self.chip.waiting))

    # -- matrices

    def _matrix(self, address, lines: int, length: int, dtype) -> np.ndarray:
        """[lines, length] numbers at a descriptor's address as float32; lines are 128 bytes, 8 lines 1024."""
        memory, address = self.chip.memories[self.rank], address - (self.rank << SEGMENT)
        size = np.dtype(dtype).itemsize
        line, place = np.arange(lines)[:, None], size * np.arange(length)[None]
        address = address + line // 8 * 1024 + line % 8 * 128 + place
        address = address ^ (address >> 7 & 7) << 4
        assert (address < memory.size).all()
        return memory.view(dtype)[address // size].astype(np.float32)

    def _start_product(self, sums, columns, fresh, steps):
        """sums[i] += left() @ right() for (i, left, right) of `steps`, whenever it is made."""
        assert columns % 8 == 0 and all(len(values) == columns // 2 for values in sums)
        results = [[np.full(128, np.nan, np.float32) for _ in values] for values in sums]
        lane, warp = np.arange(128) % 32, np.arange(128) // 32
        rows = [16 * warp + lane // 4 + i % 4 // 2 * 8 for i in range(columns // 2)]
        cols = [i // 4 * 8 + lane % 4 * 2 + i % 2 for i in range(columns // 2)]

        def run():
            total = [np.zeros((64, columns), np.float32) for _ in sums]
            for values, matrix in zip(sums, total, strict=True):
                for i, value in enumerate(values):
                    matrix[rows[i], cols[i]] = 0 if fresh else value
            with np.errstate(invalid="ignore"):
                for i, left, right in steps:
                    total[i] += left() @ right()
            for values, matrix in zip(results, total, strict=True):
                for i, value in enumerate(values):
                    value[:] = matrix[rows[i], cols[i]]

        self.under_way[-1].append(run)
        return results

    def multiply(self, sums, a, b, steps, *, columns, transposed, fresh, kind="bf16"):
        a, b = int(self.uniform(a)), int(self.uniform(b))
        dtype = {"bf16": jnp.bfloat16, "e4m3": jnp.float8_e4m3fn}[kind]
        depth = 32 // np.dtype(dtype).itemsize
        assert kind == "bf16" or not transposed

        def left(into):
            if transposed:
                return self._matrix(a + into, depth, 64, dtype).T
            return self._matrix(a + into, 64, depth, dtype)

        def right(into):
            return self._matrix(b + into, columns, depth, dtype).T

        products = [(i, functools.partial(left, into_a), functools.partial(right, into_b)) for i, into_a, into_b in steps]
        return self._start_product(sums, columns, fresh, products)

    def multiply_fragments(self, sums, fragments, b, into_b, *, columns):
        b = int(self.uniform(b))
        lane, warp = np.arange(128) % 32, np.arange(128) // 32

        def left(fragment):
            out = np.zeros((64, 16), np.float32)
            for i, word in enumerate(fragment):
                for half, numbers in enumerate(words32(word).view(np.float16).reshape(128, 2).T):
                    out[16 * warp + lane // 4 + i % 2 * 8, lane % 4 * 2 + i // 2 * 8 + half] = numbers
            return out

        def right(into):
            return self._matrix(b + into, columns, 16, np.float16).T

        products = [
            (0, functools.partial(left, fragment), functools.partial(right, into))
            for fragment, into in zip(fragments, into_b, strict=True)
        ]
        return self._start_product([sums], columns, False, products)[0]

    def multiply_commit(self):
        self.under_way.append([])
        if self.chip.rng.random() < 0.3:
            self._end(0)

    def _end(self, pending: int) -> None:
        finished = self.under_way[: max(0, len(self.under_way) - 1 - pending)]
        for group in finished:
            for product in group:
                product()
        self.under_way = self.under_way[len(finished) :]

    def multiply_wait(self, pending):
        self._end(pending)

    def multiplied(self, sums):
        assert not self.under_way[-1], "products were started and not committed"
        self._end(0)
        return sums

    def store_shared_transposed(self, address, words):
        memory, address = self.chip.memories[self.rank], self.spread(address).reshape(4, 32) - (self.rank << SEGMENT)
        blocks = [np.asarray(word, np.int64).reshape(4, 32) for word in words]
        for warp in range(4):
            for i, block in enumerate(blocks):
                numbers = block[warp].astype(np.uint32).view(np.uint16).reshape(8, 8)
                for line in range(8):
                    at = address[warp, 8 * i + line]
                    memory[at : at + 16] = np.ascontiguousarray(numbers[:, line]).view(np.uint8)

    def load_shared_transposed(self, address):
        memory, address = self.chip.memories[self.rank], self.spread(address).reshape(4, 32) - (self.rank << SEGMENT)
        assert (address % 16 == 0).all() and (address >= 0).all() and (address + 16 <= memory.size).all()
        words = []
        for block in range(4):
            lines = memory[address[:, 8 * block : 8 * block + 8, None] + np.arange(16)].view(np.uint16)  # [warps, lines, 8]
            fragment = np.ascontiguousarray(lines.transpose(0, 2, 1)).view(np.int32).reshape(128)
            words.append(fragment.astype(np.int64))
        return words

    def transposed_block(self, word):
        blocks = np.asarray(word, np.int64).astype(np.uint32).view(np.uint16).reshape(4, 8, 8)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(-1).view(np.int32).astype(np.int64)

    # -- control flow

    @contextlib.contextmanager
    def when(self, condition):
        before, self.active = self.active, self.active & self.spread(condition)
        yield
        self.active = before

    def branch(self, condition, body):
        if self.uniform(condition):
            body()

    def loop(self, count, carry, body):
        carry = list(carry)
        for i in range(int(self.uniform(count))):
            carry = list(body(registers(self.spread(np.int64(i))), carry))
        return carry

    def choose(self, condition, body, otherwise):
        return list(body()) if self.uniform(condition) else list(otherwise)


# What needs no memory.
OF_THREADS: dict[str, Callable] = PURE | {
    "constant": lambda x: np.full(128, x, np.int64),
    "number": lambda x: np.full(128, x, np.float32),
    "scalar": lambda x: np.full(128, x, np.int64),
    "offset": lambda base, index, scale: base + index * scale,
    "lane_distant": lambda x, distance: x[np.arange(128) ^ distance],
    "barrier": lambda identity, threads: None,
    "uniform": lambda x: np.broadcast_to(x, (128,))[np.arange(128) // 32 * 32],
    "barrier_any": lambda identity, threads, predicate: np.full(128, int(np.any(predicate)), np.int64),
}


def _floats(function):
    return lambda *given: of_registers(floats(function))(*given)


# What kernels take from the MLIR dialect of the same name.
ARITHMETIC = types.SimpleNamespace(
    addf=_floats(np.add),
    subf=_floats(np.subtract),
    mulf=_floats(np.multiply),
    divf=_floats(np.divide),
    maximumf=_floats(np.maximum),
)

# What is done by the warpgroup that asks for it.
OWN: dict[str, Callable] = {
    word.__name__: word
    for word in (
        Warpgroup.shared_address,
        Warpgroup.peer_address,
        Warpgroup.load_global_words_or_zeros,
        Warpgroup.copy_async,
        Warpgroup.copy_async_word,
        Warpgroup.prefetch,
        Warpgroup.barrier_arrive_after_copies,
        Warpgroup.copies_commit,
        Warpgroup.copies_done,
        Warpgroup.barrier_init,
        Warpgroup.barrier_arrive,
        Warpgroup.barrier_wait,
        Warpgroup.block_barrier,
        Warpgroup.cluster_barrier,
        Warpgroup.multiply,
        Warpgroup.multiply_fragments,
        Warpgroup.multiply_commit,
        Warpgroup.multiply_wait,
        Warpgroup.multiplied,
        Warpgroup.store_shared_transposed,
        Warpgroup.load_shared_transposed,
        Warpgroup.transposed_block,
    )
} | {
    "thread": lambda self: self.threads,
    "cluster_rank": lambda self: np.full(128, self.rank, np.int64),
    "load_global": lambda self, address: self.load(address, np.int32)[0],
    "store_global": lambda self, address, value, predicate: self.store(address, [value], np.int32, predicate),
    "load_shared": lambda self, address: self.load(address, np.int32)[0],
    "store_shared": lambda self, address, value: self.store(address, [value], np.int32),
    "load_peer_float": lambda self, address: self.load(address, np.float32)[0],
    "load_peer_words": lambda self, address: self.load(address, np.int32, 4),
    "load_shared_words": lambda self, address: self.load(address, np.int32, 4),
    "store_shared_words": lambda self, address, words: self.store(address, words, np.int32),
    "load_global_words": lambda self, address: self.load(address, np.int32, 4),
    "store_global_words": lambda self, address, words, predicate: self.store(address, words, np.int32, predicate),
    "store_shared_pair": lambda self, address, words: self.store(address, words, np.int32),
    "load_shared_float": lambda self, address: self.load(address, np.float32)[0],
    "load_shared_floats": lambda self, address, count=2: self.load(address, np.float32, count),
    "store_shared_floats": lambda self, address, pair: self.store(address, pair, np.float32),
    "global_address": lambda self, number: np.full(128, number << SEGMENT, np.int64),
}

CONTROL: dict[str, Callable] = {
    word.__name__: word for word in (Warpgroup.when, Warpgroup.branch, Warpgroup.loop, Warpgroup.choose)
}


def run(monkeypatch, module, function, *arguments, seed: int = 0, **options):
    """`function(*arguments)` of a kernel module, whose kernel has one output and buffers of shared memory."""
    here = threading.local()

    def dispatched(word):
        return lambda *given, **how: word(here.warpgroup, *given, **how)

    def kernel(body, *, out_type, scratch_types, grid, num_threads, cluster=(), cluster_names=(), **_):
        def call(*operands):
            out = np.full(out_type.shape, np.nan, out_type.dtype)
            sizes = [math.prod(scratch.shape) * np.dtype(scratch.dtype).itemsize for scratch in scratch_types]
            places = [0, *np.cumsum(sizes).tolist()]
            arrays, blocks = [*map(np.array, operands), out], math.prod(cluster)
            for block in range(*grid):
                chip = Chip(places[-1], arrays, blocks, num_threads, seed + block)

                def one_warpgroup(rank, number, chip=chip, block=block):
                    here.warpgroup = Warpgroup(chip, rank, number)
                    here.axes = {"block": block, "warpgroup": number} | dict.fromkeys(cluster_names, rank)
                    failure: BaseException | None = None
                    try:
                        with chip.turn:
                            chip.turn.wait_for(lambda: chip.whose == (rank, number) or chip.failure is not None)
                        body(*range(blocks, blocks + len(arrays)), *places[:-1])
                    except BaseException as error:  # whatever it is, the others have to stop
                        failure = error
                    chip.leave((rank, number), failure)

                threads = [threading.Thread(target=one_warpgroup, args=name) for name in chip.waiting]
                for thread in threads:
                    thread.start()
                with chip.turn:
                    chip._pick()
                    chip.turn.notify_all()
                for thread in threads:
                    thread.join()
                if chip.failure is not None:
                    raise chip.failure
            return out

        return call

    fake_pallas = types.SimpleNamespace(when=lambda condition: lambda f: f() if condition else None)
    fake = types.SimpleNamespace(
        kernel=kernel,
        inline_mgpu=lambda arg_types: lambda f: lambda *refs: f(None, *refs),
        CompilerParams=lambda **_: None,
        SMEM=lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype),
        set_max_registers=lambda count, action: None,
    )
    with monkeypatch.context() as patch:
        words = OF_THREADS | {name: dispatched(word) for name, word in OWN.items()}
        words = {name: of_registers(word) for name, word in words.items()}
        put_in_place(patch, words | {name: dispatched(word) for name, word in CONTROL.items()})
        patch.setattr(jax.lax, "axis_index", lambda name: here.axes[name])
        patch.setattr(module, "plgpu", fake)
        patch.setattr(module, "pl", fake_pallas, raising=False)
        patch.setattr(module, "arith", ARITHMETIC, raising=False)
        return function(*arguments, **options)
