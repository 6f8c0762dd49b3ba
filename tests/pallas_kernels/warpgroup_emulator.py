"""Runs a Mosaic GPU kernel whose warpgroups do different things, written in `pallas_kernels.ptx` words, on NumPy.

The threads of a warpgroup take every step together; the warpgroups take turns at random, and change only where they wait
or arrive. Copies land and products of matrices are made as late or as early as chance has it: what a copy will overwrite is
noise from the moment it is issued, so is a sum that nobody has waited for. So wrong parities, missing barriers and places
that are reused too soon show as a deadlock or as noise in the result. Races between the warps of a warpgroup and missing
fences are outside its reach. Matrices are read as wgmma reads them: strides and swizzle are checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ptx

SEGMENT = 40  # bits of an address below the number of its array; shared memory is number 0


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
    """One block: shared memory, the arrays it reaches, its barriers, and what is under way."""

    def __init__(self, shared_bytes: int, arrays: list[np.ndarray], warpgroups: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.memories = [np.zeros(shared_bytes, np.uint8), *(array.reshape(-1).view(np.uint8) for array in arrays)]
        self.memories[0][:] = 0xFF  # NaN in either float
        self.barriers: dict[int, Barrier] = {}
        self.landing: list[tuple[int, Callable[[], None]]] = []  # (warpgroup, what happens when its copies land)
        self.turn = threading.Condition()
        self.whose: int | None = None
        self.waiting: dict[int, Callable[[], bool] | None] = dict.fromkeys(range(warpgroups))
        self.failure: BaseException | None = None
        self.met = 0

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
                self.whose = int(self.rng.choice(able))
                return
            if not self.landing:
                self.whose = None
                if self.waiting:
                    self.failure = self.failure or Deadlock(f"warpgroups {sorted(self.waiting)} wait for ever")
                return
            self.landing.pop(self.rng.integers(len(self.landing)))[1]()

    def wait(self, warpgroup: int, condition: Callable[[], bool] | None) -> None:
        with self.turn:
            self.waiting[warpgroup] = condition
            self._pick()
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.whose == warpgroup or self.failure is not None)
            if self.failure is not None:
                raise Deadlock("stopped")
            self.waiting[warpgroup] = None

    def leave(self, warpgroup: int, failure: BaseException | None) -> None:
        with self.turn:
            if failure is not None and self.failure is None:
                self.failure = failure
            del self.waiting[warpgroup]
            self._pick()
            self.turn.notify_all()


class Warpgroup:
    """128 threads. The names of `ptx` as methods."""

    def __init__(self, chip: Chip, number: int):
        self.chip, self.number = chip, number
        self.threads = 128 * number + np.arange(128)
        self.active = np.ones(128, bool)
        self.copies: list[Callable[[], None]] = []
        self.under_way: list[list[Callable[[], None]]] = [[]]  # groups of products

    def spread(self, x):
        return np.broadcast_to(np.asarray(x), (128,))

    def uniform(self, x) -> int:
        assert self.active.all(), "not all threads take part"
        (one,) = np.unique(self.spread(x))
        return one

    # -- memory

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

    def _copies_so_far(self, then: Callable[[], None]):
        copies, self.copies = self.copies, []

        def land():
            for copy in copies:
                copy()
            then()

        self.chip.landing.append((self.number, land))

    def barrier_arrive_after_copies(self, address):
        barrier = self.chip.barrier(address)
        self._copies_so_far(lambda: barrier.arrive(128))

    def copies_done(self):
        self._copies_so_far(lambda: None)
        self.chip.wait(self.number, lambda: all(number != self.number for number, _ in self.chip.landing))

    # -- barriers

    def barrier_init(self, address, arrivals):
        for one in address[self.active]:
            self.chip.barriers[int(one)] = Barrier(arrivals)

    def barrier_arrive(self, address, predicate):
        self.chip.barrier(address).arrive(int((self.active & predicate).sum()))
        self.chip.wait(self.number, None)

    def barrier_wait(self, address, parity):
        barrier, parity = self.chip.barrier(address), self.uniform(parity)
        assert parity in (0, 1)
        self.chip.wait(self.number, lambda: barrier.completed & 1 != parity)

    def block_barrier(self):
        chip = self.chip
        chip.met += 1
        goal = -(-chip.met // len(chip.waiting)) * len(chip.waiting)
        chip.wait(self.number, lambda: chip.met >= goal)

    # -- matrices

    def _matrix(self, address, lines: int, length: int) -> np.ndarray:
        """[lines, length] 16-bit words at a descriptor's address; lines are 128 bytes, 8 lines 1024."""
        line, place = np.arange(lines)[:, None], 2 * np.arange(length)[None]
        address = address + line // 8 * 1024 + line % 8 * 128 + place
        address = address ^ (address >> 7 & 7) << 4
        assert (address < self.chip.memories[0].size).all()
        words = self.chip.memories[0].view(np.uint16)[address // 2].astype(np.uint32) << 16
        return words.view(np.float32)

    def multiply(self, sums, a, b, steps, *, columns, transposed, fresh):
        a, b = int(self.uniform(a)), int(self.uniform(b))
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
            for i, into_a, into_b in steps:
                left = self._matrix(a + into_a, 16, 64).T if transposed else self._matrix(a + into_a, 64, 16)
                with np.errstate(invalid="ignore"):
                    total[i] += left @ self._matrix(b + into_b, columns, 16).T
            for values, matrix in zip(results, total, strict=True):
                for i, value in enumerate(values):
                    value[:] = matrix[rows[i], cols[i]]

        self.under_way[-1].append(run)
        return results

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
        address, blocks = self.spread(address).reshape(4, 32), [np.asarray(word, np.int64).reshape(4, 32) for word in words]
        for warp in range(4):
            for i, block in enumerate(blocks):
                numbers = block[warp].astype(np.uint32).view(np.uint16).reshape(8, 8)
                for line in range(8):
                    at = address[warp, 8 * i + line]
                    self.chip.memories[0][at : at + 16] = np.ascontiguousarray(numbers[:, line]).view(np.uint8)

    def transposed_block(self, word):
        blocks = np.asarray(word, np.int64).astype(np.uint32).view(np.uint16).reshape(4, 8, 8)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(-1).view(np.int32).astype(np.int64)

    # -- control flow

    @contextlib.contextmanager
    def when(self, condition):
        before, self.active = self.active, self.active & self.spread(condition)
        yield
        self.active = before

    def loop(self, count, carry, body):
        carry = list(carry)
        for i in range(int(self.uniform(count))):
            carry = list(body(self.spread(np.int64(i)), carry))
        return carry

    def choose(self, condition, body, otherwise):
        return list(body()) if self.uniform(condition) else list(otherwise)


def _pair(low, high):
    halves = [np.asarray(x, np.float32).astype(jnp.bfloat16).view(np.uint16).astype(np.uint32) for x in (low, high)]
    return (halves[0] | halves[1] << 16).view(np.int32).astype(np.int64)


def _floats(function):
    def call(*arguments):
        with np.errstate(all="ignore"):
            return np.asarray(function(*(np.asarray(x, np.float32) for x in arguments)), np.float32)

    return call


RELATIONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "slt": np.less,
    "sle": np.less_equal,
    "sgt": np.greater,
    "sge": np.greater_equal,
}

# What needs no memory.
PURE: dict[str, Callable] = {
    "constant": lambda x: np.full(128, x, np.int64),
    "add": lambda a, *others: a + sum(others),
    "sub": lambda a, b: np.subtract(a, b),
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a // b,
    "rem": lambda a, b: a % b,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "shift_left": np.left_shift,
    "shift_right": np.right_shift,
    "bit_and": np.bitwise_and,
    "bit_or": np.bitwise_or,
    "bit_xor": np.bitwise_xor,
    "compare": lambda relation, a, b: RELATIONS[relation](a, b),
    "select": np.where,
    "offset": lambda base, index, scale: base + index * scale,
    "number": lambda x: np.full(128, x, np.float32),
    "plus": _floats(np.add),
    "minus": _floats(np.subtract),
    "times": _floats(np.multiply),
    "times_plus": _floats(lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)),
    "larger": _floats(np.fmax),
    "above": np.greater,
    "either": np.where,
    "inverse": _floats(lambda x: 1 / x),
    "exp2": _floats(np.exp2),
    "lane_distant": lambda x, distance: x[np.arange(128) ^ distance],
    "to_bfloat16_pair": _pair,
    "matrix": lambda address: address,
    "warp_barrier": lambda: None,
    "proxy_fence": lambda: None,
    "barrier_init_done": lambda: None,
    "barrier": lambda identity, threads: None,
    "barrier_any": lambda identity, threads, predicate: np.full(128, int(np.any(predicate)), np.int64),
}

# What is done by the warpgroup that asks for it.
OWN: dict[str, Callable] = {
    word.__name__: word
    for word in (
        Warpgroup.copy_async,
        Warpgroup.barrier_arrive_after_copies,
        Warpgroup.copies_done,
        Warpgroup.barrier_init,
        Warpgroup.barrier_arrive,
        Warpgroup.barrier_wait,
        Warpgroup.block_barrier,
        Warpgroup.multiply,
        Warpgroup.multiply_commit,
        Warpgroup.multiply_wait,
        Warpgroup.multiplied,
        Warpgroup.store_shared_transposed,
        Warpgroup.transposed_block,
        Warpgroup.when,
        Warpgroup.loop,
        Warpgroup.choose,
    )
} | {
    "thread": lambda self: self.threads,
    "load_global": lambda self, address: self.load(address, np.int32)[0],
    "store_global": lambda self, address, value, predicate: self.store(address, [value], np.int32, predicate),
    "load_shared": lambda self, address: self.load(address, np.int32)[0],
    "store_shared": lambda self, address, value: self.store(address, [value], np.int32),
    "load_shared_floats": lambda self, address: self.load(address, np.float32, 2),
    "store_shared_floats": lambda self, address, pair: self.store(address, pair, np.float32),
    "scalar": lambda self, x: np.full(128, x, np.int64),
    "shared_address": lambda self, number: np.full(128, number << SEGMENT, np.int64),
    "global_address": lambda self, number: np.full(128, number << SEGMENT, np.int64),
}


def run(monkeypatch, module, function, *arguments, seed: int = 0, **options):
    """`function(*arguments)` of a kernel module, whose kernel has one output and one scratch buffer of shared memory."""
    here = threading.local()

    def dispatched(word):
        return lambda *given, **how: word(here.warpgroup, *given, **how)

    def kernel(body, *, out_type, scratch_types, grid, num_threads, **_):
        def call(*operands):
            out = np.full(out_type.shape, np.nan, out_type.dtype)
            (scratch,) = scratch_types
            arrays = [*map(np.array, operands), out]
            for block in range(*grid):
                chip = Chip(4 * scratch.shape[0], arrays, num_threads, seed + block)

                def one_warpgroup(number, chip=chip, block=block):
                    here.warpgroup, here.axes = Warpgroup(chip, number), {"block": block, "warpgroup": number}
                    failure: BaseException | None = None
                    try:
                        with chip.turn:
                            chip.turn.wait_for(lambda: chip.whose == number or chip.failure is not None)
                        body(*range(1, len(arrays) + 1), 0)
                    except BaseException as error:  # whatever it is, the others have to stop
                        failure = error
                    chip.leave(number, failure)

                threads = [threading.Thread(target=one_warpgroup, args=(i,)) for i in range(num_threads)]
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
    )
    with monkeypatch.context() as patch:
        for name, word in PURE.items():
            patch.setattr(ptx, name, word)
        for name, word in OWN.items():
            patch.setattr(ptx, name, dispatched(word))
        patch.setattr(jax.lax, "axis_index", lambda name: here.axes[name])
        patch.setattr(module, "plgpu", fake)
        patch.setattr(module, "pl", fake_pallas)
        return function(*arguments, **options)
