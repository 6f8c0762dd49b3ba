"""32-bit words of one GPU thread: the small language in which the selection kernel is written.

Pallas has no scans, ballots, histograms or stores through index vectors on a GPU, so that kernel is straight code on
registers inside `inline_mgpu`. A `Word` is a 32-bit register or a predicate and a float an MLIR f32 value; the functions
below are the thread's instructions, most of them one line of PTX. Shared-memory addresses are words, global ones 64 bit.
The kernel takes this module as an argument: tests hand it another one with the same names that runs on NumPy vectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

Value = Any  # an MLIR value


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _f32() -> ir.Type:
    return ir.F32Type.get()


class Word:
    """An unsigned 32-bit register or, from comparisons, a predicate. Arithmetic wraps, as the registers do."""

    def __init__(self, value: Value):
        self.value = value

    def _binary(self, operation: Callable[..., Value], other: Word | int) -> Word:
        return Word(operation(self.value, _value(other)))

    def _compare(self, predicate: str, other: Word | int) -> Word:
        return Word(arith.cmpi(getattr(arith.CmpIPredicate, predicate), self.value, _value(other)))

    def __add__(self, other: Word | int) -> Word:
        return self._binary(arith.addi, other)

    def __sub__(self, other: Word | int) -> Word:
        return self._binary(arith.subi, other)

    def __mul__(self, other: Word | int) -> Word:
        return self._binary(arith.muli, other)

    def __floordiv__(self, other: Word | int) -> Word:
        return self._binary(arith.divui, other)

    def __and__(self, other: Word | int) -> Word:
        return self._binary(arith.andi, other)

    def __or__(self, other: Word | int) -> Word:
        return self._binary(arith.ori, other)

    def __xor__(self, other: Word | int) -> Word:
        return self._binary(arith.xori, other)

    def __lshift__(self, other: Word | int) -> Word:
        return self._binary(arith.shli, other)

    def __rshift__(self, other: Word | int) -> Word:
        return self._binary(arith.shrui, other)

    def __lt__(self, other: Word | int) -> Word:
        return self._compare("ult", other)

    def __le__(self, other: Word | int) -> Word:
        return self._compare("ule", other)

    def __gt__(self, other: Word | int) -> Word:
        return self._compare("ugt", other)

    def __ge__(self, other: Word | int) -> Word:
        return self._compare("uge", other)

    def equals(self, other: Word | int) -> Word:
        return self._compare("eq", other)


def word(number: int) -> Word:
    number &= 0xFFFFFFFF
    return Word(arith.constant(_i32(), ir.IntegerAttr.get(_i32(), number - (1 << 32) if number >> 31 else number)))


def _value(x: Word | int) -> Value:
    return x.value if isinstance(x, Word) else word(x).value


def select(predicate: Word, yes: Word | int, no: Word | int) -> Word:
    return Word(arith.select(predicate.value, _value(yes), _value(no)))


def smaller(a: Word, b: Word | int) -> Word:
    return Word(arith.minui(a.value, _value(b)))


def larger(a: Word, b: Word | int) -> Word:
    return Word(arith.maxui(a.value, _value(b)))


def signed_smaller(a: Word, b: Word) -> Word:
    return Word(arith.minsi(a.value, b.value))


def signed_larger(a: Word, b: Word | int) -> Word:
    return Word(arith.maxsi(a.value, _value(b)))


def as_number(predicate: Word) -> Word:
    return Word(arith.extui(_i32(), predicate.value))


def sign_mask(x: Word) -> Word:
    """All bits of the highest one."""
    return Word(arith.shrsi(x.value, _value(31)))


def float_at_least(x: Value, y: Value) -> Word:
    """False where either is NaN."""
    return Word(arith.cmpf(arith.CmpFPredicate.OGE, x, y))


def number_or_lowest(x: Value) -> Value:
    """-inf for NaN."""
    lowest = arith.constant(_f32(), ir.FloatAttr.get(_f32(), float("-inf")))
    return arith.maxnumf(x, lowest)


def lowest_unless(predicate: Word, x: Value) -> Value:
    """x where the predicate holds, else -inf."""
    lowest = arith.constant(_f32(), ir.FloatAttr.get(_f32(), float("-inf")))
    return arith.select(predicate.value, x, lowest)


def bits(x: Value) -> Word:
    return Word(arith.bitcast(_i32(), x))


def float_of(x: Word) -> Value:
    return arith.bitcast(_f32(), x.value)


def global_address(base: Value, index: Word, item_bytes: int = 4) -> Value:
    """base + index * item_bytes in 64 bits."""
    wide = arith.extui(_i64(), index.value)
    size = arith.constant(_i64(), ir.IntegerAttr.get(_i64(), item_bytes))
    return arith.addi(base, arith.muli(wide, size))


def choose_address(predicate: Word, yes: Value, no: Value) -> Value:
    return arith.select(predicate.value, yes, no)


def base_of_global(ref: Value) -> Value:
    return llvm.ptrtoint(_i64(), mgpu.memref_ptr(ref))


def base_of_shared(ref: Value) -> Word:
    return Word(llvm.ptrtoint(_i32(), mgpu.memref_ptr(ref)))


def thread() -> Word:
    return Word(mgpu.thread_idx())


def _ptx(text: str, inputs: Sequence[Word | Value], constraints: str, results: int = 0, kind: ir.Type | None = None) -> Any:
    """Inline PTX that is neither moved nor merged: None, one value, or a list of them (i32 unless `kind` says else)."""
    kind = kind or _i32()
    operands = [x.value if isinstance(x, Word) else x for x in inputs]
    if results == 0:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)
        return None
    if results == 1:
        return llvm.inline_asm(kind, operands, text, constraints, has_side_effects=True)
    struct = ir.Type.parse("!llvm.struct<(" + ", ".join([str(kind)] * results) + ")>")
    out = llvm.inline_asm(struct, operands, text, constraints, has_side_effects=True)
    return [llvm.extractvalue(kind, out, ir.DenseI64ArrayAttr.get([i])) for i in range(results)]


# ---- shared memory


def load_shared(address: Word) -> Word:
    return Word(_ptx("ld.shared.b32 $0, [$1];", [address], "=r,r", 1))


def load_shared_pair(address: Word) -> list[Word]:
    return [Word(x) for x in _ptx("ld.shared.v2.b32 {$0,$1}, [$2];", [address], "=r,=r,r", 2)]


def load_shared_floats(address: Word) -> list[Value]:
    """Four floats from a 16-byte boundary."""
    return _ptx("ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", [address], "=f,=f,=f,=f,r", 4, _f32())


def store_shared_floats(address: Word, xs: Sequence[Value]) -> None:
    _ptx("st.shared.v4.f32 [$0], {$1,$2,$3,$4};", [address, *xs], "r,f,f,f,f")


def store_shared(address: Word, x: Word | int) -> None:
    _ptx("st.shared.b32 [$0], $1;", [address, _value(x)], "r,r")


def store_shared_if(predicate: Word, address: Word, x: Word) -> None:
    _ptx("@$2 st.shared.b32 [$0], $1;", [address, x, predicate], "r,r,b")


def store_shared_pair_if(predicate: Word, address: Word, x: Word, y: Word) -> None:
    _ptx("@$3 st.shared.v2.b32 [$0], {$1,$2};", [address, x, y, predicate], "r,r,r,b")


def store_shared_short_if(predicate: Word, address: Word, x: Word) -> None:
    _ptx("{\n.reg .b16 h;\ncvt.u16.u32 h, $1;\n@$2 st.shared.b16 [$0], h;\n}", [address, x, predicate], "r,r,b")


def load_shared_short_if(predicate: Word, address: Word) -> Word:
    """A 16-bit number, 0 without the predicate."""
    text = "{\n.reg .b16 h;\nmov.b16 h, 0;\n@$2 ld.shared.u16 h, [$1];\ncvt.u32.u16 $0, h;\n}"
    return Word(_ptx(text, [address, predicate], "=r,r,b", 1))


def increment_shared_if(predicate: Word, address: Word) -> None:
    _ptx("@$1 red.shared.add.u32 [$0], 1;", [address, predicate], "r,b")


# ---- global memory


def load_global(address: Value) -> Word:
    return Word(_ptx("ld.global.nc.b32 $0, [$1];", [address], "=r,l", 1))


def load_global_floats_if(predicate: Word, address: Value) -> list[Value]:
    """Four floats from a 16-byte boundary, NaN without the predicate."""
    fill = "".join(f"mov.b32 ${i}, 0x7fffffff;\n" for i in range(4))
    load = "@$5 ld.global.nc.L1::no_allocate.v4.f32 {$0,$1,$2,$3}, [$4];\n"
    return _ptx("{\n" + fill + load + "}", [address, predicate], "=&f,=&f,=&f,=&f,l,b", 4, _f32())


def copy_to_shared_if(predicate: Word, address: Word, source: Value) -> None:
    """Begins to copy 16 bytes from global memory, for this thread alone to read."""
    _ptx("@$2 cp.async.cg.shared.global [$0], [$1], 16;", [address, source, predicate], "r,l,b")


def close_copies() -> None:
    """What this thread has begun to copy since the last time is a group, which may be empty."""
    _ptx("cp.async.commit_group;", [], "")


def await_copies(groups: int) -> None:
    """Until all but the last so many groups are there."""
    _ptx(f"cp.async.wait_group {groups};", [], "")


def store_global_if(predicate: Word, address: Value, x: Word) -> None:
    _ptx("@$2 st.global.b32 [$0], $1;", [address, x, predicate], "l,r,b")


# ---- the 32 lanes of a warp, and the threads of a row


def ballot(predicate: Word) -> Word:
    return Word(_ptx("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [predicate], "=r,b", 1))


def reduce_lanes(operation: str, x: Word) -> Word:
    """`operation` is add, min or max."""
    return Word(_ptx(f"redux.sync.{operation}.u32 $0, $1, 0xffffffff;", [x], "=r,r", 1))


def count_bits(x: Word) -> Word:
    return Word(_ptx("popc.b32 $0, $1;", [x], "=r,r", 1))


def leading_zeros(x: Word) -> Word:
    return Word(_ptx("clz.b32 $0, $1;", [x], "=r,r", 1))


def scan_lanes(x: Word) -> Word:
    """The inclusive sum over the lanes up to this one."""
    step = "shfl.sync.up.b32 t|p, $0, {}, 0, 0xffffffff;\n@p add.u32 $0, $0, t;\n"
    text = "{\n.reg .pred p;\n.reg .b32 t;\nmov.b32 $0, $1;\n" + "".join(step.format(d) for d in (1, 2, 4, 8, 16)) + "}"
    return Word(_ptx(text, [x], "=&r,r", 1))


def from_lane(x: Word, lane: int) -> Word:
    return Word(_ptx("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", [x, word(lane)], "=r,r,r", 1))


def barrier(number: Word, threads: int) -> None:
    """Meets the `threads` threads that name the same barrier."""
    _ptx(f"bar.sync $0, {threads};", [number], "r")


# ---- the inner loop of the stream, as one piece of predicated code each


def count_at_least(xs: Sequence[Value], threshold: Value, start: Word, unit: int) -> Word:
    """start + unit * (how many of four floats are >= threshold)."""
    counts = "".join(f"setp.ge.f32 p, ${3 + i}, $2;\n@p add.u32 $0, $0, {unit};\n" for i in range(4))
    text = "{\n.reg .pred p;\nmov.b32 $0, $1;\n" + counts + "}"
    return Word(_ptx(text, [start, threshold, *xs], "=&r,r,f,f,f,f,f", 1))


def append_at_least(xs: Sequence[Value], threshold: Value, address: Word, position: Word) -> None:
    """Stores (bits, position + i) of the floats xs[i] >= threshold one after the other from the shared address on."""
    text = "{\n.reg .pred p;\n.reg .b32 a, q;\nmov.b32 a, $0;\n"
    for i in range(4):
        text += f"add.u32 q, $1, {i};\nsetp.ge.f32 p, ${3 + i}, $2;\n@p st.shared.v2.b32 [a], {{${3 + i}, q}};\n"
        text += "@p add.u32 a, a, 8;\n"
    _ptx(text + "}", [address, position, threshold, *xs], "r,r,f,f,f,f,f")


# ---- control flow; every condition is the same for all threads of a row, except `when`'s


@contextlib.contextmanager
def when(predicate: Word) -> Iterator[None]:
    """For the threads of the predicate only: no barrier and no operation of a warp inside."""
    with mgpu.when(predicate.value):
        yield


def branch(predicate: Word, body: Callable[[], None]) -> None:
    with mgpu.when(predicate.value):
        body()


def loop(count: Word, carry: Sequence[Word], body: Callable[[Word, list[Word]], Sequence[Word]]) -> list[Word]:
    """carry = body(i, carry) for i below count."""
    op = scf.ForOp(_value(0), count.value, _value(1), [x.value for x in carry])
    with ir.InsertionPoint(op.body):
        out = body(Word(op.induction_variable), [Word(x) for x in op.inner_iter_args])
        scf.YieldOp([x.value for x in out])
    return [Word(x) for x in op.results]


def repeat(
    carry: Sequence[Word], body: Callable[[list[Word]], tuple[Sequence[Word], Sequence[Word], Word]], extras: int
) -> list[Word]:
    """carry, extra, more = body(carry) until not more: the last carry and extra (`extras` words)."""
    kinds = [x.value.type for x in carry]
    op = scf.WhileOp(kinds + [_i32()] * extras, [x.value for x in carry])
    before = op.regions[0].blocks.append(*kinds)
    after = op.regions[1].blocks.append(*kinds, *[_i32()] * extras)
    with ir.InsertionPoint(before):
        out, extra, more = body([Word(x) for x in before.arguments])
        scf.ConditionOp(more.value, [x.value for x in (*out, *extra)])
    with ir.InsertionPoint(after):
        scf.YieldOp(list(after.arguments)[: len(kinds)])
    return [Word(x) for x in op.results]


def otherwise_keep(predicate: Word, values: Sequence[Word], body: Callable[[], Sequence[Word]]) -> list[Word]:
    """body() where the predicate holds, else values."""
    op = scf.IfOp(predicate.value, [x.value.type for x in values], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.YieldOp([x.value for x in body()])
    with ir.InsertionPoint(op.else_block):
        scf.YieldOp([x.value for x in values])
    return [Word(x) for x in op.results]
