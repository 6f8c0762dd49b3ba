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
import dataclasses
import functools
import math
import threading
import types
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.emulated.registers import floats, of_registers, put_in_place, words32
from tests.support.emulated.threads import SEGMENT, Memory, Threads, pallas, vocabulary

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
        self.memory = Memory()
        for array in (*(np.full(shared_bytes, Warpgroup.NOISE, np.uint8) for _ in range(blocks)), *arrays):
            self.memory.address(array)
        self.barriers: dict[int, Barrier] = {}
        self.landing: list[Callable[[], None]] = []  # copies that are under way
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
                self.landing.pop(self.rng.integers(len(self.landing)))()
            able = [w for w, condition in self.waiting.items() if condition is None or condition()]
            if able:
                self.whose = able[self.rng.integers(len(able))]
                return
            if not self.landing:
                self.whose = None
                if self.waiting:
                    self.failure = self.failure or Deadlock(f"warpgroups {sorted(self.waiting)} wait for ever")
                return
            self.landing.pop(self.rng.integers(len(self.landing)))()

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
                self.memory.arrays[rank][:] = Warpgroup.NOISE  # is no longer the block's
            self._pick()
            self.turn.notify_all()


class Warpgroup(Threads):
    """128 threads."""

    NOISE = 0xFF  # NaN in any float

    def __init__(self, chip: Chip, rank: int, number: int):
        super().__init__(128 * number + np.arange(128), chip.memory, rank)
        self.chip, self.name = chip, (rank, number)
        self.group: list[list[bool]] = []  # whether they have landed, of those on their way since the last commit
        self.groups: list[list[list[bool]]] = []
        self.under_way: list[list[Callable[[], None]]] = [[]]  # groups of products

    def same(self, x):
        assert self.active.all(), "not all threads take part"
        return super().same(x)

    def shared_address(self, place):
        """Of a buffer that begins so many bytes after the block's shared memory."""
        return self.spread((self.rank + 1 << SEGMENT) + place)

    def peer_address(self, address, rank):
        assert 0 <= rank < self.chip.blocks
        return super().peer_address(address, rank)

    def cluster_rank(self):
        return self.spread(self.rank)

    # -- copies

    def _copies_so_far(self, then: Callable[[], None]):
        copies, self.copies = self.copies, []
        landed = [False]
        self.group.append(landed)

        def land():
            for copy in copies:
                copy()
            landed[0] = True
            then()

        self.chip.landing.append(land)

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
        barrier, parity = self.chip.barrier(address), self.same(parity)
        assert parity in (0, 1)
        self.chip.wait(self.name, lambda: barrier.completed & 1 != parity)

    def block_barrier(self):
        self.chip.meet(self.name, self.rank, sum(rank == self.rank for rank, _ in self.chip.waiting))

    def cluster_barrier(self):
        self.chip.meet(self.name, "cluster", len(self.chip.waiting))

    def barrier(self, identity, threads):
        """Of warps that take every step together."""

    def barrier_any(self, identity, threads, predicate):
        return self.spread(int(np.any(predicate)))

    # -- matrices

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
        a, b = int(self.same(a)), int(self.same(b))
        dtype = {"bf16": jnp.bfloat16, "e4m3": jnp.float8_e4m3fn}[kind]
        depth = 32 // np.dtype(dtype).itemsize
        assert kind == "bf16" or not transposed

        def left(into):
            if transposed:
                return self.swizzled(a + into, depth, 64, dtype).T
            return self.swizzled(a + into, 64, depth, dtype)

        def right(into):
            return self.swizzled(b + into, columns, depth, dtype).T

        products = [(i, functools.partial(left, into_a), functools.partial(right, into_b)) for i, into_a, into_b in steps]
        return self._start_product(sums, columns, fresh, products)

    def multiply_fragments(self, sums, fragments, b, into_b, *, columns):
        b = int(self.same(b))
        lane, warp = np.arange(128) % 32, np.arange(128) // 32

        def left(fragment):
            out = np.zeros((64, 16), np.float32)
            for i, word in enumerate(fragment):
                for half, numbers in enumerate(words32(word).view(np.float16).reshape(128, 2).T):
                    out[16 * warp + lane // 4 + i % 2 * 8, lane % 4 * 2 + i // 2 * 8 + half] = numbers
            return out

        def right(into):
            return self.swizzled(b + into, columns, 16, np.float16).T

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
        lines = np.zeros((4, 32, 8), np.uint16)  # of a warp's lanes, of which 16 have one
        for i, word in enumerate(words):
            lines[:, 8 * i : 8 * i + 8] = words32(word).view(np.uint16).reshape(4, 8, 8).transpose(0, 2, 1)
        self.store(address, lines.reshape(128, 8).T, np.arange(128) % 32 < 16, np.uint16)

    def load_shared_transposed(self, address):
        lines = np.stack(self.load(address, np.uint16, 8), 1).astype(np.uint16).reshape(4, 4, 8, 8)  # [warps, blocks, lines, 8]
        words = np.ascontiguousarray(lines.transpose(1, 0, 3, 2)).view(np.int32)
        return list(words.reshape(4, 128).astype(np.int64))

    def transposed_block(self, word):
        blocks = words32(word).view(np.uint16).reshape(4, 8, 8)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(-1).view(np.int32).astype(np.int64)


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


def run(monkeypatch, module, function, *arguments, seed: int = 0, **options):
    """`function(*arguments)` of a kernel module, whose kernel has one output and buffers of shared memory."""
    here = threading.local()

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
                        body(*arrays, *places[:-1])
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
    with monkeypatch.context() as patch:
        put_in_place(patch, vocabulary(Warpgroup, lambda: here.warpgroup))
        patch.setattr(jax.lax, "axis_index", lambda name: here.axes[name])
        patch.setattr(module, "plgpu", pallas(kernel))
        patch.setattr(module, "pl", fake_pallas, raising=False)
        patch.setattr(module, "arith", ARITHMETIC, raising=False)
        return function(*arguments, **options)
