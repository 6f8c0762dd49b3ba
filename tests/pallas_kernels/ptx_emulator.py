"""Runs a Mosaic GPU kernel that is written in `pallas_kernels.ptx` words alone, on NumPy.

All threads of a block take every step together, under a mask of those a branch or a loop has active. So barriers are
nothing, and what needs them is not found; indexing, arithmetic and the algorithm are checked. Shared memory starts as
garbage, and an access outside an array raises.
"""

from __future__ import annotations

import contextlib
import types

import jax
import numpy as np

from pallas_kernels import ptx

GARBAGE = 0x5A5A5A5A


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
        carry = [self.spread(x) for x in carry]
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
        assert self.active.all(), "a whole warp takes part"
        return self.spread(x).reshape(-1, 32)

    def words(self) -> dict[str, object]:
        """What stands for the functions of `ptx`."""
        compare = {"eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater}
        compare["sge"] = np.greater_equal
        return {
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
                    for name, word in block.words().items():
                        patch.setattr(ptx, name, word)
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
