"""PTX instructions for the parts of a Mosaic GPU kernel that Pallas has no operation for, to be used inside `inline_mgpu`.

Integers are MLIR values of 32 bits (shared addresses, indices) or 64 (global addresses). Python integers are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

Value = ir.Value


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def constant(value: int) -> Value:
    return arith.constant(i32(), value)


def _as_value(x: Value | int) -> Value:
    return constant(x) if isinstance(x, int) else x


def add(a: Value, *others: Value | int) -> Value:
    for other in others:
        a = arith.addi(a, _as_value(other))
    return a


def sub(a: Value | int, b: Value | int) -> Value:
    return arith.subi(_as_value(a), _as_value(b))


def mul(a: Value, b: Value | int) -> Value:
    return arith.muli(a, _as_value(b))


def div(a: Value, b: Value | int) -> Value:
    return arith.divui(a, _as_value(b))


def rem(a: Value, b: Value | int) -> Value:
    return arith.remui(a, _as_value(b))


def minimum(a: Value, b: Value | int) -> Value:
    return arith.minsi(a, _as_value(b))


def maximum(a: Value, b: Value | int) -> Value:
    return arith.maxsi(a, _as_value(b))


def shift_left(a: Value | int, bits: Value | int) -> Value:
    return arith.shli(_as_value(a), _as_value(bits))


def shift_right(a: Value, bits: Value | int) -> Value:
    return arith.shrui(a, _as_value(bits))


def bit_and(a: Value, b: Value | int) -> Value:
    return arith.andi(a, _as_value(b))


def bit_or(a: Value, b: Value | int) -> Value:
    return arith.ori(a, _as_value(b))


def bit_xor(a: Value, b: Value | int) -> Value:
    return arith.xori(a, _as_value(b))


def compare(relation: str, a: Value, b: Value | int) -> Value:
    """`relation` is one of eq, ne, slt, sle, sgt, sge, ult."""
    return arith.cmpi(getattr(arith.CmpIPredicate, relation), a, _as_value(b))


def select(condition: Value, a: Value | int, b: Value | int) -> Value:
    return arith.select(condition, _as_value(a), _as_value(b))


def offset(base: Value, index: Value, scale: int) -> Value:
    """The 64-bit address `base` + `index` (32 bits, not negative) * `scale` bytes."""
    wide = arith.extui(i64(), index)
    return arith.addi(base, arith.muli(wide, arith.constant(i64(), scale)))


def shared_address(ref: Value) -> Value:
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def global_address(ref: Value) -> Value:
    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def scalar(array) -> Value:
    """The register of a scalar argument of an inline function."""
    return array.registers.item()


def thread() -> Value:
    return utils.thread_idx()


def opaque(x: Value) -> Value:
    """x, of which the compiler knows nothing: what is computed from it stays where it is written."""
    return asm("mov.b32 $0, $1;", [x], "=r,r", i32())


def uniform(x: Value) -> Value:
    """x of the warp's first lane. The compiler knows nothing more of it, and that it is the same in all lanes."""
    return asm("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", [x], "=r,r", i32())


when = utils.when


def loop(count: Value, carry: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]) -> list[Value]:
    """for i in range(count): carry = body(i, carry)."""
    op = scf.ForOp(constant(0), count, constant(1), list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(op.induction_variable, list(op.inner_iter_args))))
    return list(op.results)


def asm(ptx: str, arguments: Sequence[Value] = (), constraints: str = "", result: ir.Type | None = None) -> Value:
    void = ir.Type.parse("!llvm.void")
    return llvm.inline_asm(result or void, list(arguments), ptx, constraints, has_side_effects=True)


def block_barrier() -> None:
    """A barrier of all threads of the block."""
    asm("bar.sync 0;")


def barrier_init(address: Value, arrivals: int) -> None:
    asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", [address], "r")


def barrier_init_done() -> None:
    asm("fence.mbarrier_init.release.cluster;")


def barrier_arrive(address: Value, predicate: Value | None = None) -> None:
    """An arrival of every thread, or of those for which `predicate` holds."""
    arrive = "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
    if predicate is None:
        asm(arrive, [address], "r")
    else:
        asm(f"@$1 {arrive}", [address, predicate], "r,b")


def barrier_arrive_after_copies(address: Value) -> None:
    """This thread arrives once all its cp.async so far have landed."""
    asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", [address], "r")


def barrier_wait(address: Value, parity: Value) -> None:
    asm(
        "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1, 0x989680;\n"
        "@done bra DONE;\nbra WAIT;\nDONE:\n}",
        [address, parity],
        "r,r",
    )


def proxy_fence() -> None:
    """What ordinary instructions and cp.async wrote to shared memory so far is seen by wgmma and TMA from here on."""
    asm("fence.proxy.async.shared::cta;")


def copy_async(target: Value, source: Value, size: Value, pieces: int, target_step: int, source_step: int) -> None:
    """`pieces` cp.async of 16 bytes each; of every source only `size` bytes (16 or 0) are read, the rest becomes zero."""
    lines = [
        f"cp.async.cg.shared.global.L2::128B [$0+{i * target_step}], [$1+{i * source_step}], 16, $2;" for i in range(pieces)
    ]
    asm("\n".join(lines), [target, source, size], "r,l,r")


def copy_async_word(target: Value, source: Value, size: Value) -> None:
    """A cp.async of 4 bytes, of which `size` (4 or 0) are read; else the word becomes zero."""
    asm("cp.async.ca.shared.global [$0], [$1], 4, $2;", [target, source, size], "r,l,r")


def copies_commit() -> None:
    """Makes one group of the copies that this thread started since the last commit."""
    asm("cp.async.commit_group;")


def copies_done(pending: int = 0) -> None:
    """This thread waits until its cp.async have landed, all but those of its last `pending` groups."""
    asm(f"cp.async.wait_group {pending};" if pending else "cp.async.wait_all;")


def load_global(address: Value) -> Value:
    """A 32-bit load of what nothing writes during the kernel."""
    return asm("ld.global.nc.b32 $0, [$1];", [address], "=r,l", i32())


def load_global_float(address: Value) -> Value:
    """A float32 of what nothing writes during the kernel."""
    return asm("ld.global.nc.f32 $0, [$1];", [address], "=f,l", ir.F32Type.get())


def store_global(address: Value, value: Value, predicate: Value) -> None:
    asm("@$2 st.global.b32 [$0], $1;", [address, value, predicate], "l,r,b")


def load_shared(address: Value) -> Value:
    return asm("ld.shared.b32 $0, [$1];", [address], "=r,r", i32())


def float16_pairs(word: Value) -> list[Value]:
    """4 e4m3 numbers as two vectors of two float16."""
    f16 = ir.F16Type.get()
    ptx = "{\n.reg .b16 a0, a1;\nmov.b32 {a0, a1}, $2;\ncvt.rn.f16x2.e4m3x2 $0, a0;\ncvt.rn.f16x2.e4m3x2 $1, a1;\n}"
    pairs = asm(ptx, [word], "=r,=r,r", ir.Type.parse("!llvm.struct<(i32, i32)>"))
    return [llvm.bitcast(ir.VectorType.get((2,), f16), llvm.extractvalue(i32(), pairs, [i])) for i in range(2)]


def store_shared(address: Value, value: Value) -> None:
    asm("st.shared.b32 [$0], $1;", [address, value], "r,r")


def store_shared_pair(address: Value, pair: Sequence[Value]) -> None:
    """Two words that lie side by side."""
    asm("st.shared.v2.b32 [$0], {$1, $2};", [address, *pair], "r,r,r")


def store_shared_zeros(address: Value) -> None:
    """Writes 16 bytes."""
    asm("{\n.reg .b32 z;\nmov.b32 z, 0;\nst.shared.v4.b32 [$0], {z, z, z, z};\n}", [address], "r")


def or_shared(address: Value, bits: Value) -> Value:
    """Sets bits of a shared word atomically and returns the word as it was."""
    return asm("atom.shared.or.b32 $0, [$1], $2;", [address, bits], "=r,r,r", i32())


def both(a: Value, b: Value) -> Value:
    """Of two conditions."""
    return arith.andi(a, b)


def population(bits: Value) -> Value:
    return asm("popc.b32 $0, $1;", [bits], "=r,r", i32())


def lowest_bit(bits: Value) -> Value:
    """The position of the lowest set bit."""
    return asm("{\n.reg .b32 r;\nbrev.b32 r, $1;\nclz.b32 $0, r;\n}", [bits], "=r,r", i32())


def sum_of_warp(x: Value) -> Value:
    return asm("redux.sync.add.s32 $0, $1, 0xffffffff;", [x], "=r,r", i32())


def sum_of_lanes_below(x: Value) -> Value:
    """The sum of x over the lanes of the warp before this one."""
    steps = "".join(
        f"shfl.sync.up.b32 t|p, s, {distance}, 0, 0xffffffff;\n@p add.s32 s, s, t;\n" for distance in (1, 2, 4, 8, 16)
    )
    ptx = "{\n.reg .pred p;\n.reg .b32 s, t;\nmov.b32 s, $1;\n" + steps + "sub.s32 $0, s, $1;\n}"
    return asm(ptx, [x], "=&r,r", i32())


def cluster_barrier() -> None:
    """A barrier of all threads of the cluster, after which all see what any wrote to shared memory before."""
    asm("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;")


def cluster_exit() -> None:
    """A barrier of all threads of the cluster before they end, so that no shared memory goes while others read it."""
    asm("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;")


def cluster_rank() -> Value:
    """Which block of its cluster this is."""
    return asm("mov.u32 $0, %cluster_ctarank;", (), "=r", i32())


def peer_address(address: Value, rank: Value | int) -> Value:
    """The address of the same shared memory in block `rank` of the cluster."""
    return asm("mapa.shared::cluster.u32 $0, $1, $2;", [address, _as_value(rank)], "=r,r,r", i32())


def load_peer_float(address: Value) -> Value:
    return asm("ld.shared::cluster.f32 $0, [$1];", [address], "=f,r", ir.F32Type.get())


def load_peer_words(address: Value) -> list[Value]:
    """16 bytes as four words."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    loaded = asm("ld.shared::cluster.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,r", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def store_global_words(address: Value, words: Sequence[Value], predicate: Value, *, passing: bool = False) -> None:
    """16 bytes; `passing` ones are the first that L2 gives up, so that it keeps what this kernel reads again."""
    how = ".cs" if passing else ""
    asm(f"@$5 st.global{how}.v4.b32 [$0], {{$1, $2, $3, $4}};", [address, *words, predicate], "l,r,r,r,r,b")


def exp2(x: Value) -> Value:
    return asm("ex2.approx.ftz.f32 $0, $1;", [x], "=f,f", ir.F32Type.get())


def log2(x: Value) -> Value:
    return asm("lg2.approx.ftz.f32 $0, $1;", [x], "=f,f", ir.F32Type.get())


def from_bfloat16_pair(word: Value) -> tuple[Value, Value]:
    """The low and the high half of a word as float32."""
    f32 = ir.F32Type.get()
    return arith.bitcast(f32, shift_left(word, 16)), arith.bitcast(f32, bit_and(word, -0x10000))


def to_bfloat16_pair(low: Value, high: Value) -> Value:
    return asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], "=r,f,f", i32())


def to_float16_pair(low: Value, high: Value) -> Value:
    return asm("cvt.rn.f16x2.f32 $0, $2, $1;", [low, high], "=r,f,f", i32())


def larger_magnitudes(a: Value, b: Value) -> Value:
    """The larger of |a| and |b|, of both bfloat16 numbers of a word."""
    ptx = "{\n.reg .b32 x, y;\nand.b32 x, $1, 0x7fff7fff;\nand.b32 y, $2, 0x7fff7fff;\nmax.bf16x2 $0, x, y;\n}"
    return asm(ptx, [a, b], "=r,r,r", i32())


def load_words_or_zeros(address: Value, predicate: Value, count: int) -> list[Value]:
    """4 or 2 words of what nothing writes during the kernel, zeros where the predicate (0 or not) says so."""
    outputs = ", ".join(f"${i}" for i in range(count))
    zeros = "\n".join(f"mov.b32 ${i}, 0;" for i in range(count))
    ptx = (
        f"{{\n.reg .pred p;\nsetp.ne.b32 p, ${count + 1}, 0;\n{zeros}\n"
        f"@p ld.global.nc.L2::128B.v{count}.b32 {{{outputs}}}, [${count}];\n}}"
    )
    words = ir.Type.parse("!llvm.struct<(" + ", ".join(["i32"] * count) + ")>")
    loaded = asm(ptx, [address, predicate], ",".join(["=&r"] * count + ["l", "r"]), words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(count)]


def load_float_or_zero(address: Value, predicate: Value) -> Value:
    ptx = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0f00000000;\n@p ld.global.nc.f32 $0, [$1];\n}"
    return asm(ptx, [address, predicate], "=&f,l,r", ir.F32Type.get())


def store_shared_products(address: Value, pair: Sequence[Value], scale: Value) -> None:
    """8 e4m3 numbers (two words) times a float32 scale, as 8 bfloat16 (16 bytes) to a shared address."""
    lines = [".reg .b16 a<4>;", ".reg .b16 h<8>;", ".reg .b32 w<4>;", ".reg .f32 f<8>;", ".reg .b32 r<4>;"]
    lines += ["mov.b32 {a0, a1}, $1;", "mov.b32 {a2, a3}, $2;"]
    lines += [f"cvt.rn.f16x2.e4m3x2 w{i}, a{i};" for i in range(4)]
    lines += [f"mov.b32 {{h{2 * i}, h{2 * i + 1}}}, w{i};" for i in range(4)]
    lines += [f"cvt.f32.f16 f{i}, h{i};\nmul.f32 f{i}, f{i}, $3;" for i in range(8)]
    lines += [f"cvt.rn.bf16x2.f32 r{i}, f{2 * i + 1}, f{2 * i};" for i in range(4)]
    lines += ["st.shared.v4.b32 [$0], {r0, r1, r2, r3};"]
    asm("{\n" + "\n".join(lines) + "\n}", [address, *pair, scale], "r,r,r,f")


# ---- float32 registers


def f32() -> ir.Type:
    return ir.F32Type.get()


def number(x: float) -> Value:
    return arith.constant(f32(), x)


def plus(a: Value, *others: Value) -> Value:
    for other in others:
        a = arith.addf(a, other)
    return a


def minus(a: Value, b: Value) -> Value:
    return arith.subf(a, b)


def times(a: Value, b: Value) -> Value:
    return arith.mulf(a, b)


def times_plus(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], "=f,f,f,f", f32())


def larger(a: Value, b: Value) -> Value:
    return asm("max.f32 $0, $1, $2;", [a, b], "=f,f,f", f32())


def above(a: Value, b: Value) -> Value:
    """Whether a > b, false for NaN."""
    return arith.cmpf(arith.CmpFPredicate.OGT, a, b)


def either(condition: Value, a: Value, b: Value) -> Value:
    return arith.select(condition, a, b)


def inverse(x: Value) -> Value:
    return arith.divf(number(1.0), x)


def approximate_inverse(x: Value) -> Value:
    """1 / x within one unit of the last place, as XLA computes it on a GPU."""
    return asm("rcp.approx.f32 $0, $1;", [x], "=f,f", f32())


def lane_distant(x: Value, distance: int) -> Value:
    """x of the lane whose number differs by the bit `distance`."""
    return asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;", [x], "=f,f", f32())


def transposed_among_lanes(words: Sequence[Value], lane: Value) -> list[Value]:
    """Four words of four neighbouring lanes: lane q gets word q of each, in the lanes' order."""
    words = list(words)
    for distance in (1, 2):
        upper = compare("ne", bit_and(lane, distance), 0)
        for low in range(4):
            if not low & distance:
                high = low | distance
                received = utils.shfl_bfly(select(upper, words[low], words[high]), distance)
                words[low], words[high] = select(upper, received, words[low]), select(upper, words[high], received)
    return words


def load_shared_float(address: Value) -> Value:
    return asm("ld.shared.f32 $0, [$1];", [address], "=f,r", f32())


def load_shared_floats(address: Value) -> list[Value]:
    """Two that lie side by side."""
    pair = ir.Type.parse("!llvm.struct<(f32, f32)>")
    loaded = asm("ld.shared.v2.f32 {$0, $1}, [$2];", [address], "=f,=f,r", pair)
    return [llvm.extractvalue(f32(), loaded, [i]) for i in range(2)]


def store_shared_floats(address: Value, pair: Sequence[Value]) -> None:
    asm("st.shared.v2.f32 [$0], {$1, $2};", [address, *pair], "r,f,f")


# ---- barriers of some of a block's threads, and branches that have results


def barrier(identity: int, threads: int) -> None:
    """The named barrier `identity` of `threads` threads of the block; number 0 is that of the whole block."""
    asm(f"barrier.cta.sync {identity}, {threads};")


def barrier_any(identity: int, threads: int, predicate: Value) -> Value:
    """A named barrier of `threads` threads that returns 1 to all of them if the predicate holds for any, else 0."""
    return asm(
        f"{{\n.reg .pred p;\nbarrier.cta.red.or.pred p, {identity}, {threads}, $1;\nselp.b32 $0, 1, 0, p;\n}}",
        [predicate],
        "=r,b",
        i32(),
    )


def choose(condition: Value, body: Callable[[], Sequence[Value]], otherwise: Sequence[Value]) -> list[Value]:
    """What `body` makes where the condition holds, else `otherwise`."""
    branch = scf.IfOp(condition, [value.type for value in otherwise], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.YieldOp(list(body()))
    with ir.InsertionPoint(branch.else_block):
        scf.YieldOp(list(otherwise))
    return list(branch.results)


# ---- matrices: wgmma on matrices in shared memory or fragments in registers, and the 8 x 8 blocks of fragments

# Instructions by the numbers of both matrices: how many of them are 32 bytes, types, and whether lines may lie along either
# dimension, which takes two more operands.
_PRODUCTS = {"bf16": (16, "bf16.bf16", True), "e4m3": (32, "e4m3.e4m3", False)}


def matrix(address: Value) -> Value:
    """The descriptor of a matrix of 128-byte lines in tiles of 8 lines, swizzled, one tile after the other (1024 bytes).

    It serves lines along either dimension. `address` is that of the first tile, or up to 96 bytes into its lines.
    """
    high = 1 << 30 | 1024 >> 4  # 128-byte swizzle, bytes from tile to tile
    ptx = f"{{\n.reg .b32 low;\nshr.u32 low, $1, 4;\nand.b32 low, low, 0x3fff;\nmov.b64 $0, {{low, {high}}};\n}}"
    return asm(ptx, [address], "=l,r", i64())


def multiply(
    sums: Sequence[Sequence[Value]],
    a: Value,
    b: Value,
    steps: Sequence[tuple[int, int, int]],
    *,
    columns: int,
    transposed: bool,
    fresh: bool,
    kind: str = "bf16",
) -> list[list[Value]]:
    """Starts sums[i] [64, columns] += A [64, 16] B [16, columns] for every (i, bytes into a, bytes into b) of `steps`.

    a: descriptor; lines are rows of A, or with `transposed` its columns.
    b: descriptor; lines are columns of B.
    fresh: the sums start at zero.
    kind: "bf16", or "e4m3": then A is [64, 32] and B [32, columns], and A is not transposed.
    Until they are waited for, nothing else may touch the sums.
    """
    flat = [value for values in sums for value in values]
    each, total = columns // 2, len(flat)
    depth, types, either_way = _PRODUCTS[kind]
    directions = f", {int(transposed)}, 0" if either_way else ""
    lines = [".reg .pred add, set;", ".reg .b64 a, b;", f"setp.ne.b32 add, ${2 * total + 2}, 0;"]
    lines += [f"setp.eq.b32 set, ${2 * total + 2}, 0;", "wgmma.fence.sync.aligned;"]
    begun: set[int] = set()
    for i, into_a, into_b in steps:
        registers = ", ".join(f"${i * each + j}" for j in range(each))
        first = fresh and i not in begun
        begun.add(i)
        lines += [f"add.s64 a, ${2 * total}, {into_a >> 4};", f"add.s64 b, ${2 * total + 1}, {into_b >> 4};"]
        lines += [
            f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{types} {{{registers}}}, a, b, "
            f"{'set' if first else 'add'}, 1, 1{directions};"
        ]
    constraints = ",".join(["=f"] * total + [str(i) for i in range(total)] + ["l", "l", "n"])
    text = "{\n" + "\n".join(lines) + "\n}"
    results = _unpacked(asm(text, [*flat, a, b, constant(1)], constraints, _floats(total)), total)
    return [results[i : i + each] for i in range(0, total, each)]


def multiply_fragments(
    sums: Sequence[Value], fragments: Sequence[Sequence[Value]], b: Value, into_b: Sequence[int], *, columns: int
) -> list[Value]:
    """Starts sums [64, columns] += A [64, 16] B [16, columns] in float16 for every fragment and its bytes into b.

    fragments: A, four words a thread: rows g, g + 8, g, g + 8 of a warp's 16, g = lane / 4, and of these columns
      2 (lane % 4) and the next, for the last two words 8 further on.
    b: descriptor; lines are columns of B.
    Until they are waited for, nothing else may touch the sums and the fragments.
    """
    total, words = len(sums), [word for fragment in fragments for word in fragment]
    at_b = total + len(words) + total
    lines = [".reg .pred add;", ".reg .b64 b;", f"setp.ne.b32 add, ${at_b + 1}, 0;", "wgmma.fence.sync.aligned;"]
    registers = ", ".join(f"${i}" for i in range(total))
    for i, offset_ in enumerate(into_b):
        of_a = ", ".join(f"${2 * total + 4 * i + j}" for j in range(4))
        lines += [
            f"add.s64 b, ${at_b}, {offset_ >> 4};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{registers}}}, {{{of_a}}}, b, add, 1, 1, 0;",
        ]
    constraints = ",".join(["=f"] * total + [str(i) for i in range(total)] + ["r"] * len(words) + ["l", "n"])
    text = "{\n" + "\n".join(lines) + "\n}"
    return _unpacked(asm(text, [*sums, *words, b, constant(1)], constraints, _floats(total)), total)


def _floats(count: int) -> ir.Type:
    return ir.Type.parse("!llvm.struct<(" + ", ".join(["f32"] * count) + ")>")


def _unpacked(struct: Value, count: int) -> list[Value]:
    return [llvm.extractvalue(f32(), struct, [i]) for i in range(count)]


def multiply_commit() -> None:
    """Makes one group of the products started since the last commit."""
    asm("wgmma.commit_group.sync.aligned;")


def multiply_wait(pending: int) -> None:
    """Until at most the last `pending` groups are under way."""
    asm(f"wgmma.wait_group.sync.aligned {pending};")


def multiplied(sums: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """The sums, once everything that was started has ended."""
    flat = [value for values in sums for value in values]
    each, count = len(sums[0]), len(flat)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    ended = _unpacked(asm("wgmma.wait_group.sync.aligned 0;", flat, constraints, _floats(count)), count)
    return [ended[i : i + each] for i in range(0, count, each)]


def store_shared_transposed(address: Value, words: Sequence[Value]) -> None:
    """Two 8 x 8 blocks of 16-bit numbers, a warp's fragments, each column of a block as one line of 16 bytes.

    Lanes 0 to 7 have the addresses of the first block's lines, 8 to 15 those of the second's.
    """
    asm("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0], {$1, $2};", [address, *words], "r,r,r")


def load_shared_transposed(address: Value) -> list[Value]:
    """Four 8 x 8 blocks of 16-bit numbers as fragments of their transposes.

    Lanes 0 to 7 have the addresses of the first block's lines, the next 8 those of the second's, and so on.
    """
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    loaded = asm(text, [address], "=r,=r,=r,=r,r", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def transposed_block(word: Value) -> Value:
    """The fragment of the transpose of an 8 x 8 block of 16-bit numbers."""
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [word], "=r,r", i32())


# ---- bfloat16 numbers in pairs, and words of 16 bytes


def divide_floats(a: Value, b: Value) -> Value:
    return asm("div.rn.f32 $0, $1, $2;", [a, b], "=f,f,f", f32())


def maximum_floats(a: Value, b: Value) -> Value:
    return arith.maximumf(a, b)


def rsqrt(x: Value) -> Value:
    return asm("rsqrt.approx.f32 $0, $1;", [x], "=f,f", f32())


def bits_of(x: Value) -> Value:
    return arith.bitcast(i32(), x)


def float_of(bits: Value) -> Value:
    return arith.bitcast(f32(), bits)


def rounded(x: Value) -> Value:
    """The nearest bfloat16, as float32."""
    return from_bfloat16_pair(to_bfloat16_pair(x, x))[0]


def to_e4m3_word(xs: Sequence[Value]) -> Value:
    """Four numbers as e4m3; what is too large becomes the largest."""
    ptx = (
        "{\n.reg .b16 a, b;\ncvt.rn.satfinite.e4m3x2.f32 a, $2, $1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;\nmov.b32 $0, {a, b};\n}"
    )
    return asm(ptx, list(xs), "=r,f,f,f,f", i32())


def float16_from_e4m3(word: Value) -> list[Value]:
    """The first and third of four e4m3 numbers as a pair of float16, exactly, and the second and fourth."""
    ptx = (
        "{\n.reg .b32 t;\n.reg .b16 a, b;\nprmt.b32 t, $2, 0, 0x3120;\nmov.b32 {a, b}, t;\n"
        "cvt.rn.f16x2.e4m3x2 $0, a;\ncvt.rn.f16x2.e4m3x2 $1, b;\n}"
    )
    pair = asm(ptx, [word], "=r,=r,r", ir.Type.parse("!llvm.struct<(i32, i32)>"))
    return [llvm.extractvalue(i32(), pair, [i]) for i in range(2)]


def to_e4m3_sum(words: Sequence[Value], factor: Value) -> tuple[list[Value], list[Value]]:
    """8 bfloat16 numbers (four words) times a factor as sums of two e4m3 numbers: two words of the larger, two of the others.

    The product is rounded to float16. Where it has at most 8 significant bits and is at least 2**-2, the sum is exact; else
    it is within 2**-10.
    """
    lines = [".reg .f32 x, y;", ".reg .b32 a, b;", ".reg .b16 h<4>, l<4>;"]
    for i in range(4):
        lines += [f"shl.b32 a, ${4 + i}, 16;", "mov.b32 x, a;", f"and.b32 b, ${4 + i}, 0xffff0000;", "mov.b32 y, b;"]
        lines += ["mul.f32 x, x, $8;", "mul.f32 y, y, $8;", "cvt.rn.f16x2.f32 a, y, x;"]
        lines += [f"cvt.rn.satfinite.e4m3x2.f16x2 h{i}, a;", f"cvt.rn.f16x2.e4m3x2 b, h{i};"]
        lines += ["sub.f16x2 a, a, b;", f"cvt.rn.satfinite.e4m3x2.f16x2 l{i}, a;"]
    lines += ["mov.b32 $0, {h0, h1};", "mov.b32 $1, {h2, h3};", "mov.b32 $2, {l0, l1};", "mov.b32 $3, {l2, l3};"]
    kind = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    out = asm("{\n" + "\n".join(lines) + "\n}", [*words, factor], ",".join(["=&r"] * 4 + ["r"] * 4 + ["f"]), kind)
    parts = [llvm.extractvalue(i32(), out, [i]) for i in range(4)]
    return parts[:2], parts[2:]


def add_dot(total: Value, a: Sequence[Value], b: Sequence[Value]) -> Value:
    """total + the dot product of 8 bfloat16 numbers with 8 others, four words each."""
    lines = [".reg .f32 x, y, odd;", "mov.f32 $0, $1;", "mov.f32 odd, 0f00000000;"]
    for i in range(4):
        lines += [f"shl.b32 x, ${2 + i}, 16;", f"shl.b32 y, ${6 + i}, 16;", "fma.rn.f32 $0, x, y, $0;"]
        lines += [f"and.b32 x, ${2 + i}, 0xffff0000;", f"and.b32 y, ${6 + i}, 0xffff0000;", "fma.rn.f32 odd, x, y, odd;"]
    lines += ["add.f32 $0, $0, odd;"]
    return asm("{\n" + "\n".join(lines) + "\n}", [total, *a, *b], "=&f,f" + ",r" * 8, f32())


def magnitude_bits(x: Value) -> Value:
    """The bits of |x|, which are ordered as |x| is."""
    return bit_and(bits_of(x), 0x7FFFFFFF)


def float16_scale(top: Value) -> tuple[Value, Value]:
    """A power of two that numbers are multiplied by to be float16, and its inverse.

    top: `magnitude_bits` of the largest of them, which becomes at least 2^14. So numbers that are bfloat16 stay exact, but for
    those below 2^-31 of the largest.
    """
    exponent = minimum(maximum(bit_and(top, 0x7F800000), 16 << 23), 254 << 23)
    return float_of(sub((127 + 127 + 14) << 23, exponent)), float_of(sub(exponent, 14 << 23))


def products_of_codes(row: Sequence[Value], other_row: Sequence[Value], vector: Sequence[Value]) -> list[Value]:
    """The products of 16 rows of 64 e4m3 codes with 64 float16 numbers, by tensor cores: of rows l / 4 and l / 4 + 8 in lane l.

    row, other_row: 16 codes of each of the two rows, those from 16 (l % 4) on, as four words. vector: the 16 numbers of the
    vector from there on, as eight words.
    """
    lines = [".reg .b16 low, high;", ".reg .b32 a<4>;", ".reg .f32 even, odd, x, y;"]
    lines += [f"mov.f32 {register}, 0f00000000;" for register in ("even", "odd", "x", "y")]
    for i in range(4):
        for half, word in enumerate((f"${2 + i}", f"${6 + i}")):
            lines += [f"mov.b32 {{low, high}}, {word};"]
            lines += [f"cvt.rn.f16x2.e4m3x2 a{half}, low;", f"cvt.rn.f16x2.e4m3x2 a{2 + half}, high;"]
        sums = "{even, x, odd, y}"
        lines += [
            f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {sums}, {{a0, a1, a2, a3}}, "
            f"{{${10 + 2 * i}, ${11 + 2 * i}}}, {sums};"
        ]
    lines += ["mov.f32 $0, even;", "mov.f32 $1, odd;"]
    text = "{\n" + "\n".join(lines) + "\n}"
    return _unpacked(asm(text, [*row, *other_row, *vector], "=f,=f" + ",r" * 16, _floats(2)), 2)


def multiply_codes(codes: Sequence[Sequence[Value]], b: Value, chunk: int, columns: int) -> list[Value]:
    """The product of 64 rows of 128 e4m3 codes and a float16 matrix [128, columns] in shared memory, by a warpgroup.

    codes: 16 codes each, as four words, of rows l / 4 and l / 4 + 8 of the warp's 16, for lane l: those from 16 (l % 4) on of
      the first 64 codes, then of the other 64.
    b: descriptor of 64 of the matrix's rows as lines of 64 numbers, a line a column; `chunk` bytes further are the other 64.
      Of the 16 bytes i of a line, word q is rows 16 q + 2 i and 16 q + 2 i + 1: the order in which the lanes have the codes.
    Returns as wgmma does, of every 8 columns, two of row l / 4 and the same two of l / 4 + 8.
    """
    sums, inputs = columns // 2, [word for piece in codes for word in piece]
    lines = [".reg .b16 low, high;", ".reg .b32 a<32>;", ".reg .b64 b;", ".reg .pred set, add;"]
    lines += [f"setp.eq.b32 set, ${sums + 17}, 0;", f"setp.ne.b32 add, ${sums + 17}, 0;"]
    for step in range(8):
        half, word = divmod(step, 4)
        for row in range(2):
            lines += [f"mov.b32 {{low, high}}, ${sums + 4 * (2 * half + row) + word};"]
            lines += [f"cvt.rn.f16x2.e4m3x2 a{4 * step + row}, low;", f"cvt.rn.f16x2.e4m3x2 a{4 * step + 2 + row}, high;"]
    lines += ["wgmma.fence.sync.aligned;"]
    registers = ", ".join(f"${i}" for i in range(sums))
    for step in range(8):
        half, word = divmod(step, 4)
        a = ", ".join(f"a{4 * step + i}" for i in range(4))
        lines += [
            f"add.s64 b, ${sums + 16}, {(half * chunk + 32 * word) >> 4};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{registers}}}, {{{a}}}, b, "
            f"{'add' if step else 'set'}, 1, 1, 0;",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    constraints = ",".join(["=&f"] * sums + ["r"] * 16 + ["l", "n"])
    return _unpacked(asm("{\n" + "\n".join(lines) + "\n}", [*inputs, b, constant(1)], constraints, _floats(sums)), sums)


def add_multiples(totals: Sequence[Value], words: Sequence[Value], factor: Value) -> list[Value]:
    """totals[i] + factor * the i-th of the 8 bfloat16 numbers in four words."""
    lines = [".reg .f32 x;"]
    for i in range(4):
        lines += [f"shl.b32 x, ${16 + i}, 16;", f"fma.rn.f32 ${2 * i}, x, $20, ${8 + 2 * i};"]
        lines += [f"and.b32 x, ${16 + i}, 0xffff0000;", f"fma.rn.f32 ${2 * i + 1}, x, $20, ${9 + 2 * i};"]
    kind = ir.Type.parse("!llvm.struct<(" + ", ".join(["f32"] * 8) + ")>")
    constraints = ",".join(["=&f"] * 8 + ["f"] * 8 + ["r"] * 4 + ["f"])
    out = asm("{\n" + "\n".join(lines) + "\n}", [*totals, *words, factor], constraints, kind)
    return [llvm.extractvalue(f32(), out, [i]) for i in range(8)]


def load_words(address: Value) -> list[Value]:
    """16 bytes, as four words, of what is read once and nothing writes during the kernel."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];"
    loaded = asm(text, [address], "=r,=r,=r,=r,l", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def reduce_warp(operation: str, x: Value) -> Value:
    """`operation` is max or min, of unsigned numbers, or or."""
    kind = "b32" if operation == "or" else "u32"
    return asm(f"redux.sync.{operation}.{kind} $0, $1, 0xffffffff;", [x], "=r,r", i32())


def load_shared_words(address: Value) -> list[Value]:
    """16 bytes as four words."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    loaded = asm("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,r", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def store_shared_words(address: Value, words: Sequence[Value]) -> None:
    asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", [address, *words], "r,r,r,r,r")


def store_global_bfloat16(address: Value, x: Value, predicate: Value) -> None:
    ptx = "{\n.reg .b16 h;\ncvt.rn.bf16.f32 h, $1;\n@$2 st.global.b16 [$0], h;\n}"
    asm(ptx, [address, x, predicate], "l,f,b")


def prefetch(address: Value, size: Value, predicate: Value) -> None:
    """Asks for `size` bytes, a multiple of 16, to be brought to L2; nothing waits for them."""
    asm("@$2 cp.async.bulk.prefetch.L2.global [$0], $1;", [address, size, predicate], "l,r,b")


def prefetch_line(address: Value, predicate: Value) -> None:
    """Asks for the 128 bytes around an address to be brought to L2; nothing waits for them."""
    asm("@$1 prefetch.global.L2 [$0];", [address, predicate], "l,b")


# ---- a barrier of a grid whose blocks are all resident, and loads of what other blocks wrote before it


def load_fresh(address: Value) -> Value:
    """A 32-bit load of what another block wrote before the grid met: not through L1."""
    return asm("ld.global.cg.b32 $0, [$1];", [address], "=r,l", i32())


def load_fresh_pair(address: Value) -> list[Value]:
    """8 bytes of the same as two words."""
    loaded = asm("ld.global.cg.v2.b32 {$0, $1}, [$2];", [address], "=r,=r,l", ir.Type.parse("!llvm.struct<(i32, i32)>"))
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(2)]


def load_fresh_words(address: Value) -> list[Value]:
    """16 bytes of the same as four words."""
    words = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    loaded = asm("ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,l", words)
    return [llvm.extractvalue(i32(), loaded, [i]) for i in range(4)]


def grid_arrive(counter: Value, blocks: int) -> Value:
    """This block has written what others wait for. Returns what `grid_wait` waits for.

    The counter is zero when the first grid of a sequence starts, and every grid adds `blocks` to it at each barrier.
    """
    block_barrier()
    ptx = (
        "{\n.reg .pred p;\n.reg .b32 old;\nmov.b32 old, 0;\nsetp.eq.u32 p, $2, 0;\n"
        "@p atom.add.release.gpu.global.u32 old, [$1], 1;\nmov.b32 $0, old;\n}"
    )
    old = asm(ptx, [counter, thread()], "=r,l,r", i32())
    return mul(add(div(old, blocks), 1), blocks)


def grid_wait(counter: Value, target: Value) -> None:
    """Waits until all blocks have arrived; what they wrote before is then seen by `load_fresh`."""
    with when(compare("eq", thread(), 0)):
        asm(
            "{\n.reg .pred done;\n.reg .b32 seen;\nAGAIN:\nld.acquire.gpu.global.u32 seen, [$0];\n"
            "sub.s32 seen, seen, $1;\nsetp.ge.s32 done, seen, 0;\n@!done bra AGAIN;\n}",
            [counter, target],
            "l,r",
        )
    block_barrier()
